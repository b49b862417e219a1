"""A small training run that is the same everywhere. Needs torch and the standard library only.

Latent attention, a small mixture of experts and AdamW on seeded tokens, made of elementary operators. `steps` shows
that a chip computes the same twice, that equal chips compute the same, and that they compute what another device did;
`pace` how fast each chip is beside its peers.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

VOCABULARY, LENGTH, HEADS, EXPERTS, CHOSEN = 64, 32, 4, 4, 2
RATE = 1e-3
WAITS = Path("/proc/thread-self/schedstat")


def steps(
    rank: Any,
    steps: int = 6,
    hidden: int = 64,
    layers: int = 2,
    batch: int = 4,
    seed: int = 0,
    repeats: int = 2,
    data_parallel: bool = False,
    reference: list[float] | None = None,
    tolerance: float = 0.01,
) -> dict[str, Any]:
    """Train `steps` steps from the same start, `repeats` times, in fp32.

    Losses, gradients and parameters are hashed at each step: the repeats must agree bit by bit, and so must all ranks,
    which do the same work. With `data_parallel` each rank has its own tokens and the gradients are averaged over
    ranks: then only parameters and gradients agree. `reference` are the losses that another device had without
    data_parallel; they may differ by `tolerance` of their size.

    Returns {failed, detail, trials, failures, losses, norms, digests, odd, seconds, memory}: a number that is not
    finite is None; `odd` are the ranks that differ from the majority, `seconds` those of each step of the last repeat.
    """
    runs = []
    for repeat in range(repeats):
        runs.append(_train(rank, steps, hidden, layers, batch, seed, data_parallel, repeat * steps))
    first, last = runs[0], runs[-1]
    differing = [i for run in runs[1:] for i in range(len(run["digests"])) if run["digests"][i] != first["digests"][i]]
    wrong: list[str] = []
    if differing:
        wrong.append(f"the same step gave two results, bit by bit, from step {min(differing)} on")
    if not all(map(math.isfinite, (*first["losses"], *last["losses"], *first["norms"], *last["norms"]))):
        wrong.append("a loss or a gradient is not finite")
    if reference is not None and not data_parallel:
        wrong += _far_from(reference, last["losses"], tolerance)
    odd = odd_ranks(rank, hashlib.sha256("".join(last["digests"]).encode()).hexdigest())
    if rank.rank in odd:
        wrong.append("its results differ from those of the other ranks, bit by bit")
    said = f"{repeats} x {steps} steps of training"
    return {
        "failed": bool(wrong),
        "detail": f"rank {rank.rank}: " + ("; ".join(wrong) + f" ({said})" if wrong else f"{said} agree"),
        "trials": (repeats - 1) * steps,
        "failures": len(differing),
        "losses": [_finite(loss) for loss in last["losses"]],
        "norms": [_finite(norm) for norm in last["norms"]],
        "digests": last["digests"],
        "odd": odd,
        "seconds": last["seconds"],
        "memory": _memory(rank.device),
    }


def _far_from(reference: list[float], losses: list[float], tolerance: float) -> list[str]:
    for step, (expected, loss) in enumerate(zip(reference, losses, strict=False)):
        if not abs(loss - expected) <= tolerance * abs(expected):
            return [f"the loss of step {step} is {loss:g}, where the reference had {expected:g}"]
    return []


def _train(
    rank: Any, steps: int, hidden: int, layers: int, batch: int, seed: int, data_parallel: bool, begun: int
) -> dict[str, list[Any]]:
    """One training run; losses, norms, digests and seconds of its steps."""
    parameters = {name: value.to(rank.device) for name, value in _initial(hidden, layers, seed).items()}
    for value in parameters.values():
        value.requires_grad_(True)
    moments = {name: (torch.zeros_like(value), torch.zeros_like(value)) for name, value in parameters.items()}
    found: dict[str, list[Any]] = {"losses": [], "norms": [], "digests": [], "seconds": []}
    with deterministic(rank.device):
        for step in range(steps):
            rank.beat("training step", begun + step)
            tokens = _tokens(batch, seed, step, rank.rank if data_parallel else 0).to(rank.device)
            began = time.perf_counter()
            for value in parameters.values():
                value.grad = None
            loss = _loss(parameters, tokens, layers)
            loss.backward()
            if data_parallel and rank.world > 1:
                _average(list(parameters.values()), rank.world)
            norm = _norm(parameters)
            gradients = [value.grad for value in parameters.values()]
            digest = _digest([*([] if data_parallel else [loss]), *gradients])
            for name, value in parameters.items():
                adamw(value, *moments[name], step + 1)
            found["losses"].append(float(loss.detach()))
            found["norms"].append(float(norm))
            found["digests"].append(_digest(list(parameters.values()), digest))
            found["seconds"].append(time.perf_counter() - began)
    return found


def _initial(hidden: int, layers: int, seed: int) -> dict[str, Tensor]:
    """Parameters by name. Keys and values of a layer come from a latent a quarter as wide."""
    generator = torch.Generator().manual_seed(seed)
    latent, inner = max(1, hidden // 4), hidden // 2
    shapes = {"embedding": (VOCABULARY, hidden), "head": (hidden, VOCABULARY)}
    for layer in range(layers):
        shapes |= {
            f"{layer}.query": (hidden, hidden),
            f"{layer}.down": (hidden, latent),
            f"{layer}.key": (latent, hidden),
            f"{layer}.value": (latent, hidden),
            f"{layer}.out": (hidden, hidden),
            f"{layer}.router": (hidden, EXPERTS),
            f"{layer}.expert_in": (EXPERTS, hidden, 2 * inner),
            f"{layer}.expert_out": (EXPERTS, inner, hidden),
        }
    return {name: torch.randn(shape, generator=generator) / math.sqrt(shape[-2]) for name, shape in shapes.items()}


def _tokens(batch: int, seed: int, step: int, stream: int) -> Tensor:
    """Token ids [batch, LENGTH + 1] of a step: runs that count up from a random start."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step * 101 + stream * 10_007)
    start = torch.randint(0, VOCABULARY, (batch, 1), generator=generator)
    stride = torch.randint(1, 4, (batch, 1), generator=generator)
    return (start + stride * torch.arange(LENGTH + 1)) % VOCABULARY


def _loss(p: dict[str, Tensor], tokens: Tensor, layers: int) -> Tensor:
    """Mean cross entropy of the next token."""
    x = p["embedding"][tokens[:, :-1]]
    for layer in range(layers):
        x = x + _attention(p, layer, _normed(x))
        x = x + _experts(p, layer, _normed(x))
    scores = torch.log_softmax(_normed(x) @ p["head"], dim=-1)
    return -scores.gather(-1, tokens[:, 1:].unsqueeze(-1)).mean()


def _normed(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def _attention(p: dict[str, Tensor], layer: int, x: Tensor) -> Tensor:
    rows, length, hidden = x.shape
    heads = HEADS if hidden % HEADS == 0 else 1

    def split(states: Tensor) -> Tensor:
        return states.view(rows, length, heads, hidden // heads).transpose(1, 2)

    latent = _normed(x @ p[f"{layer}.down"])
    query, key, value = (
        split(x @ p[f"{layer}.query"]),
        split(latent @ p[f"{layer}.key"]),
        split(latent @ p[f"{layer}.value"]),
    )
    scores = query @ key.transpose(-1, -2) / math.sqrt(hidden // heads)
    ahead = torch.ones(length, length, device=x.device).triu(1) > 0
    weights = torch.softmax(scores.masked_fill(ahead, -1e9), dim=-1)
    return (weights @ value).transpose(1, 2).reshape(rows, length, hidden) @ p[f"{layer}.out"]


def _experts(p: dict[str, Tensor], layer: int, x: Tensor) -> Tensor:
    """All experts compute all tokens; those that the router did not choose have weight 0."""
    flat = x.reshape(-1, x.shape[-1])
    scores = torch.sigmoid(flat @ p[f"{layer}.router"])
    least = scores.detach().topk(CHOSEN, dim=-1).values[:, -1:]
    weights = scores * (scores.detach() >= least)
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-9)
    gate, up = (flat @ p[f"{layer}.expert_in"]).chunk(2, dim=-1)
    out = (F.silu(gate) * up) @ p[f"{layer}.expert_out"]
    return (out * weights.t().unsqueeze(-1)).sum(0).view_as(x)


@torch.no_grad()
def adamw(value: Tensor, first: Tensor, second: Tensor, step: int) -> None:
    """One update with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101), in place."""
    assert value.grad is not None
    first.mul_(0.9).add_(value.grad, alpha=0.1)
    second.mul_(0.95).addcmul_(value.grad, value.grad, value=0.05)
    root = (second / (1.0 - 0.95**step)).sqrt().add_(1e-8)
    value.mul_(1.0 - 0.1 * RATE)
    value.addcdiv_(first, root, value=-RATE / (1.0 - 0.9**step))


def _average(parameters: list[Tensor], world: int) -> None:
    """Replace the gradients by their mean over ranks: one sum of all of them."""
    gradients = [value.grad for value in parameters if value.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    parts = (flat / world).split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def _norm(parameters: dict[str, Tensor]) -> Tensor:
    squares = [value.grad.square().sum() for value in parameters.values() if value.grad is not None]
    return torch.stack(squares).sum().sqrt()


def pace(
    rank: Any, size: int = 128, slices: int = 60, share: float = 0.1, limit: float = 2.0, inner: int = 16
) -> dict[str, Any]:
    """Seconds of each of `slices` small equal pieces of work, begun together on all ranks; no rank waits in between.

    A piece is `inner` products of matrices [size, size] with an elementwise function after each: it should take longer
    than the pauses of a chip that is slowed down by pauses, for else many pieces have none. The `share` quantile
    of a rank's seconds is its own pace: the median (0.5) where the chip does nothing else, a low one on a shared
    processor, whose other work can only add. On a processor the time in which the rank had none does not count. A rank
    is slow if its pace is more than `limit` times the median of the others'. Returns {failed, detail, seconds, pace,
    ratio}; `ratio` is to the median of the others.
    """
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, size, generator=generator).to(rank.device) for _ in range(2))
    right = right / math.sqrt(size)
    _wait(rank)
    seconds = []
    for index in range(slices):
        began = _own_clock(rank.device)
        value = left
        for _ in range(inner):
            value = torch.tanh(value @ right)
        if rank.device.type != "cpu":
            torch.accelerator.synchronize()
        rank.beat("pace", index)
        seconds.append(_own_clock(rank.device) - began)
    own = quantile(seconds, share)
    ratio = ratios_to_peers(_gather(rank, own))[rank.rank]
    slow = ratio > limit
    detail = f"rank {rank.rank}: {own * 1e3:.3g} ms for a piece of work, {ratio:.2f} times its peers'"
    return {"failed": slow, "detail": detail, "seconds": seconds, "pace": own, "ratio": ratio}


def _own_clock(device: torch.device) -> float:
    """Seconds. On a processor it stands still while this thread is ready to run and another one runs in its place.

    Linux tells that wait (Documentation/scheduler/sched-stats.rst); elsewhere it stays in. Sleep is no such wait.
    """
    waited = 0.0
    if device.type == "cpu" and WAITS.exists():
        waited = int(WAITS.read_text().split()[1]) / 1e9
    return time.perf_counter() - waited


def quantile(values: Sequence[float], share: float) -> float:
    """The value above `share` of the values; of 0 the least."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def ratios_to_peers(values: Sequence[float]) -> list[float]:
    """Each rank's value divided by the median of the others'; 1 for a rank without peers."""
    if len(values) < 2:
        return [1.0] * len(values)
    return [own / statistics.median([*values[:rank], *values[rank + 1 :]]) for rank, own in enumerate(values)]


def _wait(rank: Any) -> None:
    _gather(rank, 0.0)


def _gather(rank: Any, value: float) -> list[float]:
    """The values of all ranks."""
    if rank.world == 1 or not dist.is_initialized():
        return [value]
    values = [torch.zeros(1, device=rank.device) for _ in range(rank.world)]
    dist.all_gather(values, torch.tensor([value], dtype=torch.float32, device=rank.device))
    return [float(one) for one in values]


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Ask an accelerator for deterministic kernels where there are any, and go back to what was asked before."""
    if device.type == "cpu":
        yield
        return
    before, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)


def odd_ranks(rank: Any, digest: str) -> list[int]:
    """The ranks whose hash is not that of more than half of all; all of them if there is no such majority."""
    if rank.world == 1 or not dist.is_initialized():
        return []
    mine = torch.tensor([int(digest[:15], 16)], dtype=torch.int64, device=rank.device)
    hashes = [torch.zeros_like(mine) for _ in range(rank.world)]
    dist.all_gather(hashes, mine)
    values = [int(one) for one in hashes]
    most, count = Counter(values).most_common(1)[0]
    if 2 * count <= rank.world:
        return list(range(rank.world))
    return [index for index, value in enumerate(values) if value != most]


def _digest(tensors: list[Tensor | None], before: str = "") -> str:
    """A hash of the bytes of tensors, and of a hash before."""
    content = hashlib.sha256(before.encode())
    for tensor in tensors:
        if tensor is not None:
            host = tensor.detach().cpu().contiguous()
            content.update(ctypes.string_at(host.data_ptr(), host.numel() * host.element_size()))
    return content.hexdigest()[:16]


def _memory(device: torch.device) -> int | None:
    """Bytes that tensors occupied at most on an accelerator; None on a CPU."""
    return None if device.type == "cpu" else torch.accelerator.max_memory_allocated(device)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
