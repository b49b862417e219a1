"""What crosses at a step of RL of a real model at a small rate: bytes of a version as a delta, and as others pack it.

    python -m benchmarks.real_deltas [--rate 1e-6] [--steps 5]

SmolLM2-135M-Instruct (tests/support/real_model.py), whose weights are bf16, learns as reinforcement does: AdamW on
fp32 masters, and in each step four of its own answers (tests/real/answers.jsonl) with advantages of both signs. Every
version is exported in bf16 and in W8A8, and its delta to the version before is encoded, applied and compared by hash.
Once the masters are the checkpoint's own numbers, as at the start of a run: few of them are near the edge of their
rounding. Once they are anywhere within it, as after a long run.

The rivals, on the last version, of which the best counts: zstd at levels 1 and 9 of each tensor's bits xor those
before, and of the tensors that changed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import zstandard
from torch import Tensor
from torch.nn import functional as F

from benchmarks.conditions import store
from benchmarks.real_formats import Chat, chats, trained_model
from isthmus.formats import get_format
from isthmus.formats.updates.delta import WeightSet, apply, encode
from isthmus.formats.updates.wire import pack
from isthmus.model.model import Model
from tests.support.real_model import real_checkpoint

FORMATS = ("bf16", "w8a8")
ANSWERS, BETAS = 4, (0.9, 0.95)
LEVELS = (1, 9)
RIVALS = (*(f"xor_zstd_{level}" for level in LEVELS), "changed_tensors_zstd_3")
AIMS = {"bf16": 0.01, "w8a8": 0.02}
"""Largest share of a snapshot that a version should have."""


def learn(model: Model, rate: float, steps: int) -> Iterator[int]:
    """In place, step by step: some answers become likelier and as many less likely."""
    asked = chats()
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=BETAS, weight_decay=0.0)
    for step in range(steps):
        optimizer.zero_grad(set_to_none=True)
        for number in range(ANSWERS):
            chat = asked[(step * ANSWERS + number) % len(asked)]
            (_summed_loss(model, chat) * (1.0 if number % 2 else -1.0) / ANSWERS).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield step


def _summed_loss(model: Model, chat: Chat) -> Tensor:
    tokens = torch.tensor([chat.tokens])
    hidden = model.hidden(tokens)[0, chat.answer_at - 1 : -1]
    return F.cross_entropy(model.logits(hidden), tokens[0, chat.answer_at :])


@torch.no_grad()
def spread_within_rounding(model: Model) -> None:
    """Move each weight, in place, to anywhere that bf16 rounds to the same number."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        _, exponent = torch.frexp(parameter)
        step = torch.ldexp(torch.ones_like(parameter), exponent - 8).masked_fill(parameter == 0, 0.0)
        parameter.add_((torch.rand(parameter.shape, generator=generator) - 0.5) * step)


def measure(rate: float, steps: int, spread: bool) -> dict[str, list[dict[str, float]]]:
    """Of each format, a row for each version after the first."""
    model = trained_model(real_checkpoint())
    if spread:
        spread_within_rounding(model)
    held = {name: exported(model, name, 0) for name in FORMATS}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in FORMATS}
    for step in learn(model, rate, steps):
        for name in FORMATS:
            new = exported(model, name, step + 1)
            found[name].append(row(held[name], new, with_rivals=step == steps - 1))
            held[name] = new
            print(f"{'spread' if spread else 'start':6} version {step + 1:2} {name:5} {found[name][-1]}", flush=True)
    return found


@torch.no_grad()
def exported(model: Model, name: str, version: int) -> WeightSet:
    tensors = get_format(name).export(model.state_dict(), model.architecture)
    return WeightSet.of(version, {key: tensor.detach().clone() for key, tensor in tensors.items()})


def row(base: WeightSet, new: WeightSet, *, with_rivals: bool) -> dict[str, float]:
    """Bytes and seconds of the delta, and the share of elements that it changes."""
    began = time.process_time()
    parts = encode(base, new)
    encoded = time.process_time()
    assert apply(base, parts).sha256 == new.sha256, "the delta is not lossless"
    applied = time.process_time()
    snapshot = len(pack(new.tensors))
    size = sum(map(len, parts))
    changed = sum(int((_bits(base.tensors[n]) != _bits(new.tensors[n])).sum()) for n in new.tensors)
    elements = sum(tensor.numel() for tensor in new.tensors.values())
    found = {
        "snapshot_bytes": snapshot,
        "bytes": size,
        "share": size / snapshot,
        "changed": changed / elements,
        "bits_per_change": 8 * size / max(changed, 1),
        "encode_cpu_s": encoded - began,
        "apply_cpu_s": applied - encoded,
    }
    return found | (rivals(base, new, snapshot) if with_rivals else {})


def rivals(base: WeightSet, new: WeightSet, snapshot: int) -> dict[str, float]:
    """Shares of a snapshot of what a general compressor makes of the change."""
    names = [name for name in sorted(new.tensors) if base.hashes[name] != new.hashes[name]]
    xored = b"".join((_bits(base.tensors[name]) ^ _bits(new.tensors[name])).tobytes() for name in names)
    whole = b"".join(_bits(new.tensors[name]).tobytes() for name in names)
    found = {}
    for name in RIVALS:
        squeeze = zstandard.ZstdCompressor(level=int(name.rpartition("_")[2])).compress
        found |= _timed(name, squeeze, xored if name.startswith("xor") else whole, snapshot)
    return found


def _timed(name: str, squeeze: Callable[[bytes], bytes], payload: bytes, snapshot: int) -> dict[str, float]:
    began = time.process_time()
    size = len(squeeze(payload))
    return {f"{name}_share": size / snapshot, f"{name}_cpu_s": time.process_time() - began}


def _bits(tensor: Tensor) -> np.ndarray[Any, Any]:
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    return tensor.contiguous().reshape(-1).view(kinds[tensor.element_size()]).numpy()


def told(rows: list[dict[str, float]]) -> dict[str, Any]:
    """Means over the versions, and the largest share."""
    keys = {key for one in rows for key in one}
    means = {key: statistics.mean(one[key] for one in rows if key in one) for key in sorted(keys)}
    return means | {"largest_share": max(one["share"] for one in rows), "versions": rows}


def show(where: str, found: Mapping[str, Mapping[str, Any]]) -> None:
    for name, one in found.items():
        best = min(
            value for key, value in one.items() if key.startswith(("xor", "changed_t")) and key.endswith("_share")
        )
        print(
            f"{where:6} {name:5} {one['share']:.3%} of a snapshot (largest {one['largest_share']:.3%}, aim "
            f"{AIMS[name]:.0%}), {one['changed']:.3%} of elements changed, {one['bits_per_change']:.1f} bits each; "
            f"the best rival {best:.3%}, {best / one['share']:.1f} times as much; encode {one['encode_cpu_s']:.2f} s"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rate", type=float, default=1e-6)
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for where, spread in (("start", False), ("spread", True)):
        rows = measure(options.rate, options.steps, spread)
        found[where] = {name: told(one) for name, one in rows.items()}
        show(where, found[where])
    store("real_deltas", {"rate": options.rate, "steps": options.steps, "answers_per_step": ANSWERS, "found": found})


if __name__ == "__main__":
    main()
