"""Writes down what a training loop does, step by step, so that it can be held against the same training elsewhere.

This file needs torch alone and can be copied beside a script. `isthmus twin record -- python train.py` starts it in a
program that is not changed; `start(folder)` at the top of a script does the same. Each process writes lines of JSON:

    header   rank, world, device, versions, what was given to `start`
    modules  the names that the squares of the next steps stand for, in order
    state    before the first step, and every `state_every` steps after one: squared norms of parameters and of each of
             the optimiser's tensors, by module
    step     of every optimiser step: digest of the batch, losses, squared gradient norms by module, options of the
             optimiser, digests of the random streams, precision

A squared norm is this rank's share of it: summed over the ranks it is that of the whole module, for a parameter that
every rank holds as for one that is sharded by DTensor.
"""

from __future__ import annotations

import atexit
import gc
import hashlib
import json
import math
import os
import platform
import sys
import time
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

FOLDER, STATE_EVERY = "ISTHMUS_TWIN_FOLDER", "ISTHMUS_TWIN_STATE_EVERY"
"""Of the environment: where `start()` writes, and how often the state."""
VERSION = 1
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_WHOLE = 0.9
"""The share of an optimiser's parameters from which on a module is taken for the model or a wrapper of it."""
_BITS = 1 << 62


def start(folder: str | Path | None = None, state_every: int | None = None) -> Recorder:
    """Record this process into a folder from now on. Without arguments the environment says where, as
    `isthmus twin record` sets it."""
    if folder is None:
        folder = os.environ[FOLDER]
    if state_every is None:
        state_every = int(os.environ.get(STATE_EVERY, "0"))
    recorder = Recorder(Path(folder), state_every)
    recorder.watch()
    return recorder


class Recorder:
    """What one process writes. `state_every` is in optimiser steps; 0: only before the first one."""

    def __init__(self, folder: Path, state_every: int = 0) -> None:
        self.folder, self.state_every = folder, state_every
        self._file: TextIO | None = None
        self._pid = os.getpid()
        self._models: list[nn.Module] = []
        self._names: dict[int, str] = {}
        self._searched: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        self._modules: list[str] = []
        self._depth = 0
        self._step = _Step()
        self._stepped: list[Optimizer] = []
        self._count = 0

    def watch(self) -> None:
        """Hook into torch: optimisers, `backward`, `clip_grad_norm_`, and the models that optimisers are given."""
        recorder = self
        made, backward, clip = Optimizer.__init__, torch.autograd.backward, nn.utils.clip_grad_norm_

        def init(self: Optimizer, *args: Any, **kwargs: Any) -> None:
            made(self, *args, **kwargs)
            recorder._find_models(self)

        def watched_backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
            recorder._before_backward(tensors)
            recorder._depth += 1
            try:
                backward(tensors, *args, **kwargs)
            finally:
                recorder._depth -= 1

        def watched_clip(*args: Any, **kwargs: Any) -> Tensor:
            total = clip(*args, **kwargs)
            recorder._step.clipped = total.detach()
            return total

        Optimizer.__init__ = init
        torch.autograd.backward = watched_backward
        nn.utils.clip_grad_norm_ = nn.utils.clip_grad.clip_grad_norm_ = watched_clip
        register_optimizer_step_pre_hook(lambda optimizer, *_: recorder._before_step(optimizer))
        register_optimizer_step_post_hook(lambda optimizer, *_: recorder._after_step(optimizer))
        atexit.register(self.end)

    def note_batch(self, *batch: Any) -> None:
        """Say what the batch is where no model can be watched: tensors, or lists and mappings of them."""
        self._take_rows(batch)

    def end(self) -> None:
        """Write the last step. Called at the end of the process."""
        if os.getpid() == self._pid:
            self._finish_step()
            if self._file is not None:
                self._file.close()

    def _find_models(self, optimizer: Optimizer) -> None:
        """Learn the names of an optimiser's parameters, and watch what goes into the modules that hold most of them."""
        parameters = _parameters(optimizer)
        own = {id(parameter) for parameter in parameters}
        needed = _WHOLE * sum(parameter.numel() for parameter in parameters)
        for module in [one for one in gc.get_objects() if issubclass(type(one), nn.Module)]:
            if any(module is known for known in self._models):
                continue
            named = [(name, one) for name, one in module.named_parameters() if id(one) in own]
            if sum(one.numel() for _, one in named) >= max(needed, 1):
                self._models.append(module)
                self._names.update({id(one): _plain(name) for name, one in named if _fuller(name, one, self._names)})
                module.register_forward_pre_hook(self._before_forward, with_kwargs=True)
                module.register_forward_hook(self._after_forward, always_call=True)

    def _before_forward(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        if self._depth == 0:
            self._finish_step()
            self._step.begin()
            self._take_rows((args, kwargs))
        self._depth += 1

    def _after_forward(self, *_: Any) -> None:
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():
            self._depth = max(0, self._depth - 1)

    def _take_rows(self, batch: Any) -> None:
        digest, rows = rows_digest(batch)
        self._step.batch = ((self._step.batch or 0) + digest) % _BITS
        self._step.rows += rows

    def _before_backward(self, tensors: Any) -> None:
        """Keep a loss: one number that `backward` is called on, and not within another `backward`."""
        loss = tensors[0] if isinstance(tensors, list | tuple) and len(tensors) == 1 else tensors
        if self._depth == 0 and isinstance(loss, Tensor) and loss.numel() == 1:
            self._finish_step()
            self._step.begin()
            self._step.losses.append(loss.detach().clone())

    def _before_step(self, optimizer: Optimizer) -> None:
        if optimizer in self._stepped:
            self._finish_step()
        parameters = _parameters(optimizer)
        if self._searched.get(optimizer) != len(parameters):
            self._searched[optimizer] = len(parameters)
            self._find_models(optimizer)
        if self._count == 0 and not self._stepped:
            self._write_state(optimizer, "before")
        self._step.begin()
        taught = [(self._module_of(one), one.grad) for one in parameters if one.grad is not None]
        self._step.norms += _norms([gradient for _, gradient in taught])
        self._step.norms_of += [name for name, _ in taught]
        self._step.options.append(_options(optimizer))

    def _after_step(self, optimizer: Optimizer) -> None:
        self._stepped.append(optimizer)

    def _finish_step(self) -> None:
        """Write the step whose optimisers have all stepped; nothing if none has."""
        if not self._stepped:
            return
        optimizers, self._stepped, step, self._step = self._stepped, [], self._step, _Step()
        self._count += 1
        names = list(dict.fromkeys(step.norms_of))
        if names != self._modules:
            self._modules = names
            self._write({"kind": "modules", "names": names})
        self._write({"kind": "step", "count": self._count, **step.line(names)})
        if self.state_every and self._count % self.state_every == 0:
            for optimizer in optimizers:
                self._write_state(optimizer, "after")

    def _write_state(self, optimizer: Optimizer, when: str) -> None:
        parameters = _parameters(optimizer)
        tensors: dict[str, dict[str, float]] = {"parameters": self._squares(parameters, parameters)}
        kinds = dict.fromkeys(key for one in parameters for key in optimizer.state.get(one, {}))
        for kind in kinds:
            held = [(one, optimizer.state.get(one, {}).get(kind)) for one in parameters]
            full = [(one, kept) for one, kept in held if isinstance(kept, Tensor) and kept.numel() == one.numel() > 1]
            if full:
                tensors[kind] = self._squares([one for one, _ in full], [kept for _, kept in full])
        line = {"kind": "state", "count": self._count, "when": when, "optimizer": type(optimizer).__name__}
        self._write({**line, "updates": _updates(optimizer), "squares": tensors})

    def _squares(self, parameters: list[Tensor], tensors: list[Tensor]) -> dict[str, float]:
        summed: dict[str, float] = {}
        for parameter, (norm, share) in zip(parameters, _numbers(_norms(tensors)), strict=True):
            name = self._module_of(parameter)
            summed[name] = summed.get(name, 0.0) + norm * norm * share
        return summed

    def _module_of(self, parameter: Tensor) -> str:
        name = self._names.get(id(parameter), "(a parameter of no known module)")
        return name.rpartition(".")[0] or name

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._file is None:
            self._file = self._open()
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def _open(self) -> TextIO:
        """A file of this start of this rank: a run that is started again into the same folder goes on in a new one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        rank, world = _rank_and_world()
        began = next(n for n in range(10_000) if not (self.folder / f"rank-{rank:05d}-{n:04d}.jsonl").exists())
        file = (self.folder / f"rank-{rank:05d}-{began:04d}.jsonl").open("x", encoding="utf-8")
        header = {
            "kind": "header",
            "version": VERSION,
            "rank": rank,
            "world": world,
            "began": time.time(),
            "command": sys.argv,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "state_every": self.state_every,
        }
        file.write(json.dumps(header) + "\n")
        return file


class _Step:
    """What is gathered of a step; tensors stay on their device until the step is written."""

    def __init__(self) -> None:
        self.batch: int | None = None
        self.rows = 0
        self.losses: list[Tensor] = []
        self.clipped: Tensor | None = None
        self.norms: list[tuple[Tensor, float]] = []
        self.norms_of: list[str] = []
        self.options: list[dict[str, Any]] = []
        self.started: dict[str, Any] | None = None

    def begin(self) -> None:
        """Note, once, what is so at the start of a step."""
        if self.started is None:
            self.started = {"random": _random_digests(), "autocast": _autocast()}

    def line(self, names: list[str]) -> dict[str, Any]:
        squares = dict.fromkeys(names, 0.0)
        for name, (norm, share) in zip(self.norms_of, _numbers(self.norms), strict=True):
            squares[name] += norm * norm * share
        return {
            "batch": None if self.batch is None else f"{self.batch:016x}",
            "rows": self.rows,
            "losses": [float(loss) for loss in self.losses],
            "clipped": None if self.clipped is None else float(self.clipped),
            "squares": [squares[name] for name in names],
            "options": self.options,
            **(self.started or {}),
        }


def rows_digest(batch: Any) -> tuple[int, int]:
    """(62 bits of a batch, its rows). Rows add up, so that it is the same however rows are ordered, or dealt out to
    micro-batches and ranks; whole numbers of any width are alike."""
    tensors = [one.detach().cpu() for one in _tensors(batch) if one.numel()]
    if not tensors:
        return 0, 0
    counts = {one.shape[0] if one.ndim else None for one in tensors}
    rows = counts.pop() if len(counts) == 1 else None
    parts = [[_bytes(one)] if rows is None else [_bytes(row) for row in one] for one in tensors]
    total = 0
    for row in zip(*parts, strict=True):
        hashed = hashlib.blake2b(b"".join(sorted(hashlib.blake2b(one, digest_size=8).digest() for one in row)))
        total += int.from_bytes(hashed.digest()[:8], "little") >> 2
    return total % _BITS, rows or 1


def _bytes(tensor: Tensor) -> bytes:
    plain = tensor if tensor.is_floating_point() or tensor.is_complex() else tensor.long()
    return plain.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [one for group in optimizer.param_groups for one in group["params"]]


def _plain(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name.removeprefix("module.")


def _fuller(name: str, parameter: Tensor, names: Mapping[int, str]) -> bool:
    """Whether a name says more of where a parameter is than the one that is known: that of an outer module."""
    return len(_plain(name)) > len(names.get(id(parameter), ""))


def _norms(tensors: list[Tensor]) -> list[tuple[Tensor, float]]:
    """(norm of what is here, the share of its square that this rank stands for) of each, on their devices."""
    world = _rank_and_world()[1]
    local = [_local(one, world) for one in tensors]
    plain = [(one.coalesce().values() if one.is_sparse else one).detach() for one, _ in local]
    if not plain:
        return []
    with torch.no_grad():
        norms = torch._foreach_norm(plain, 2.0, torch.float32)  # pyright: ignore[reportPrivateImportUsage]
    return [(norm, share) for norm, (_, share) in zip(norms, local, strict=True)]


def _local(tensor: Tensor, world: int) -> tuple[Tensor, float]:
    mesh, placements = getattr(tensor, "device_mesh", None), getattr(tensor, "placements", None)
    if mesh is None or placements is None:
        return tensor, 1.0 / world
    copies = math.prod(mesh.size(axis) for axis, place in enumerate(placements) if place.is_replicate())
    elsewhere = world / mesh.size()
    return tensor.to_local(), 1.0 / (copies * elsewhere)  # pyright: ignore[reportAttributeAccessIssue]


def _numbers(norms: list[tuple[Tensor, float]]) -> list[tuple[float, float]]:
    """The same as numbers, with one copy for each device."""
    found: list[float] = [0.0] * len(norms)
    for device in {norm.device for norm, _ in norms}:
        here = [index for index, (norm, _) in enumerate(norms) if norm.device == device]
        values = torch.stack([norms[index][0].float() for index in here]).tolist()
        for index, value in zip(here, values, strict=True):
            found[index] = value
    return [(value, share) for value, (_, share) in zip(found, norms, strict=True)]


def _options(optimizer: Optimizer) -> dict[str, Any]:
    """An optimiser's kind, its updates so far, and the options of its groups that are numbers or words."""
    groups = []
    for group in optimizer.param_groups:
        values = {key: value for key, value in group.items() if key != "params"}
        groups.append({key: _simple(value) for key, value in sorted(values.items()) if _simple(value) is not None})
    kinds = sorted({str(one.dtype).removeprefix("torch.") for one in _parameters(optimizer)})
    return {"optimizer": type(optimizer).__name__, "updates": _updates(optimizer), "groups": groups, "dtypes": kinds}


def _simple(value: Any) -> Any:
    if isinstance(value, Tensor):
        return float(value) if value.numel() == 1 else None
    if isinstance(value, list | tuple):
        return [_simple(one) for one in value]
    return value if isinstance(value, bool | int | float | str) else None


def _updates(optimizer: Optimizer) -> int | None:
    """Updates that an optimiser counts for its first parameter; None where it counts none."""
    for parameter in _parameters(optimizer):
        kept = optimizer.state.get(parameter, {}).get("step")
        if kept is not None:
            return int(kept)
    return None


def _random_digests() -> dict[str, str]:
    """Digests of the streams of the CPU and of the accelerator, by their device type."""
    streams = {"cpu": torch.get_rng_state()}
    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
        if device is not None:
            streams[device.type] = torch.get_device_module(device).get_rng_state()
    found = {name: hashlib.blake2b(one.cpu().numpy().tobytes(), digest_size=8) for name, one in streams.items()}
    return {name: one.hexdigest() for name, one in found.items()}


def _autocast() -> str:
    """What the forward pass computes in, as far as autocast and the precision of matrix products say."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    kind = device.type if device is not None else "cpu"
    chosen = str(torch.get_autocast_dtype(kind)).removeprefix("torch.") if torch.is_autocast_enabled(kind) else "off"
    return f"{kind}, autocast {chosen}, matrix products {torch.get_float32_matmul_precision()}"


def _rank_and_world() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
