"""What the ranks of a world do in the tests of checkpoints. The values of a tensor follow from its name alone."""

from __future__ import annotations

import os
import signal
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from isthmus.data.corpus import Document
from isthmus.errors import IsthmusError
from isthmus.model.model import Model
from isthmus.recipe.schema import TrainSection
from isthmus.recipe.steps import OptimizerSection, SftSection
from isthmus.trainer import checkpoint, checkpoint_files
from isthmus.trainer.batch import Batch, pack
from isthmus.trainer.checkpoint import CheckpointWriter, TrainingState, load_latest
from isthmus.trainer.mesh import Ranks
from isthmus.trainer.optimizer import Optimizer
from isthmus.trainer.parallel import distribute
from isthmus.trainer.parts import model_state
from isthmus.trainer.step import train_step
from tests.support.small import tiny_architecture

EXPERTS = 4
SHARDED = {  # rows that divide evenly by no world, fewer rows than ranks, columns, and another type
    "matrix": ((7, 3), torch.float32, 0),
    "row": ((1, 5), torch.float32, 0),
    "columns": ((3, 5), torch.bfloat16, 1),
    "empty": ((0, 4), torch.float32, 0),
}
WHOLE = {"bias": ((4,), torch.float32), "count": ((3,), torch.int64), "flag": ((2,), torch.bool)}


def values(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return (torch.randn(shape, generator=generator) * 100).to(dtype)


def whole_state() -> TrainingState:
    """The state as one process has it."""
    model = {name: values(name, shape, dtype) for name, (shape, dtype, _) in SHARDED.items()}
    model |= {name: values(name, shape, dtype) for name, (shape, dtype) in WHOLE.items()}
    stack = torch.stack([values(f"expert.{index}", (6, 2), torch.float32) for index in range(EXPERTS)])
    for index in range(EXPERTS):
        model[f"expert.{index}.gate"], model[f"expert.{index}.up"] = stack[index].chunk(2)
    optimizer = {f"adam.exp_avg.{name}": values(f"m.{name}", s, torch.float32) for name, (s, _, _) in SHARDED.items()}
    optimizer["adam.step.matrix"] = torch.tensor(17.0)
    return TrainingState(model, optimizer, {"position": 5, "rates": [0.1, 1e-300], "name": "é"})


def sharded_state(rank: int, world: int) -> TrainingState:
    """The part of a rank: rows or columns of some tensors, whole others, and the experts of rank mod 2 or its own."""
    whole = whole_state()
    mesh = init_device_mesh("cpu", (2, world // 2) if world == 4 else (world,))
    placements = [Replicate()] if world == 4 else []

    def own(name: str, tensor: Tensor) -> Tensor:
        base = name.rpartition(".")[2]
        if base not in SHARDED or tensor.dim() == 0:
            return tensor
        return distribute_tensor(tensor, mesh, [*placements, Shard(SHARDED[base][2])], src_data_rank=None)

    def held(name: str) -> bool:
        return not name.startswith("expert.") or int(name.split(".")[1]) % 2 == rank % 2

    model = {name: own(name, tensor) for name, tensor in whole.model.items() if held(name)}
    return TrainingState(model, {name: own(name, tensor) for name, tensor in whole.optimizer.items()}, whole.extra)


def blank(state: TrainingState) -> TrainingState:
    """The same tensors with other values."""

    def other(tensor: Tensor) -> Tensor:
        if isinstance(tensor, DTensor):
            local = torch.zeros_like(tensor.to_local())
            shape, stride = tensor.shape, tensor.stride()
            return DTensor.from_local(local, tensor.device_mesh, tensor.placements, shape=shape, stride=stride)
        return torch.zeros_like(tensor)

    parts = [{name: other(tensor) for name, tensor in part.items()} for part in (state.model, state.optimizer)]
    return TrainingState(parts[0], parts[1], {})


def differing(state: TrainingState, expected: TrainingState) -> list[str]:
    """The keys under which two states do not have the same bits."""

    def local(tensor: Tensor) -> Tensor:
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    ours, theirs = state.keyed, expected.keyed
    assert ours.keys() == theirs.keys()
    return [key for key in ours if not torch.equal(local(ours[key]), local(theirs[key]))]


def load_and_compare(rank: int, root: Path) -> tuple[int, dict, list[str]]:
    expected = sharded_state(rank, dist.get_world_size())
    state = blank(expected)
    loaded = load_latest(root, state, dist.new_group(backend="gloo"), damaged=print)
    return loaded.step, loaded.extra, differing(state, expected)


def save_then_fail(rank: int, root: Path) -> dict[str, Any]:
    """A whole checkpoint, one that rank 1 cannot write, one whose manifest rank 0 cannot write, and a whole one."""
    found = {}
    state = sharded_state(rank, dist.get_world_size())
    writer = CheckpointWriter(root, keep=2, group=dist.new_group(backend="gloo"))
    writer.save(1, state)
    found["first"] = writer.finish().sha256
    with fault(
        checkpoint_files,
        "save_file",
        SafetensorError("I/O error: No space left on device (os error 28)"),
        here=rank == 1,
    ):
        found["part"] = failure_of(writer, 2, state)
    found["after part"] = sorted(path.name for path in root.iterdir())
    with fault(checkpoint, "write_manifest", PermissionError(13, "Permission denied"), here=rank == 0):
        found["manifest"] = failure_of(writer, 3, state)
    found["after manifest"] = sorted(path.name for path in root.iterdir())
    dist.barrier()
    with flushed_inodes() as flushed:
        writer.save(4, state)
        found["last"] = writer.finish().sha256
    found["flushed"] = flushed
    return found


@contextmanager
def flushed_inodes() -> Iterator[set[int]]:
    """The numbers of the files and folders that this process flushes to the disk."""
    original, found = os.fsync, set()

    def fsync(descriptor: int) -> None:
        found.add(os.fstat(descriptor).st_ino)
        original(descriptor)

    os.fsync = fsync
    yield found
    os.fsync = original


def failure_of(writer: CheckpointWriter, step: int, state: TrainingState) -> str:
    writer.save(step, state)
    try:
        writer.finish()
    except IsthmusError as error:
        return str(error)
    return "written"


class fault:
    """While it is open, a function of a module fails, if `here`."""

    def __init__(self, module: ModuleType, function: str, error: Exception, here: bool):
        self.module, self.function, self.error, self.here = module, function, error, here
        self.original = getattr(module, function)

    def __enter__(self) -> None:
        def fail(*_: object) -> None:
            raise self.error

        if self.here:
            setattr(self.module, self.function, fail)
        dist.barrier()

    def __exit__(self, *_: object) -> None:
        dist.barrier()
        setattr(self.module, self.function, self.original)


def damaged_for_one(rank: int, root: Path) -> tuple[int, list[str]]:
    """Load where only the rank that verifies a file can see its damage."""
    state = blank(sharded_state(rank, dist.get_world_size()))
    named: list[str] = []
    loaded = load_latest(root, state, dist.new_group(backend="gloo"), damaged=named.append)
    return loaded.step, named


def missing_on_one(rank: int, root: Path) -> list[str]:
    """What every rank says if one of them wants a tensor that is not stored, and if none wants one that is."""
    said = []
    group = dist.new_group(backend="gloo")
    for change in ("more", "fewer"):
        state = blank(sharded_state(rank, dist.get_world_size()))
        if change == "more" and rank == 1:
            state.model["new"] = torch.zeros(2)
        if change == "fewer":
            state.model.pop("expert.3.up", None)
        try:
            load_latest(root, state, group, damaged=print)
        except IsthmusError as error:
            said.append(str(error))
    return said


def write_and_hang(root: Path) -> None:
    """Write one checkpoint, and hang in the middle of the second."""
    original = checkpoint_files.save_file

    def save_file(tensors: dict[str, Tensor], path: Path) -> None:
        original(tensors, path)
        if ".step-000002" in str(path):
            time.sleep(600)

    checkpoint_files.save_file = save_file
    writer = CheckpointWriter(root, keep=2, group=None)
    writer.save(1, whole_state())
    writer.save(2, whole_state())
    writer.finish()
    os.kill(os.getpid(), signal.SIGTERM)


OPTIMIZER = OptimizerSection(name="muon", learning_rate=2e-3, matrix_learning_rate=5e-3, warmup_steps=5)
STEPS = 8


def documents_of_step(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    lengths = torch.randint(6, 40, (7,), generator=generator).tolist()
    return pack([Document(torch.randint(61, (n,), generator=generator).tolist(), n // 3) for n in lengths], 40)


def train_model(rank: int, root: Path, layout: dict[str, int], save_at: int | None) -> list[float]:
    """The losses of a sharded model to the last step; it is saved at `save_at`, or goes on from what is saved."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    ranks = Ranks(rank, world, torch.device("cpu"), world > 1, dist.new_group(backend="gloo") if world > 1 else None)
    section = SftSection(
        name="taught", kind="sft", steps=STEPS, optimizer=OPTIMIZER, balance_alpha=0.01, bias_update_speed=0.01
    )
    model = Model(tiny_architecture()).initialise(0 if save_at else 1)
    if world > 1:
        distribute(model, ranks, TrainSection(**layout), torch.float32)
    optimizer = Optimizer(model, OPTIMIZER, STEPS, ranks, layout.get("replicate", 1))
    state = TrainingState(model_state(model), optimizer.state(), {})
    first = 0 if save_at else load_latest(root, state, ranks.storage, damaged=print).step
    losses = []
    for step in range(first, STEPS):
        batch = documents_of_step(step)
        own = batch.select(range(rank, len(batch.tokens), world))
        losses.append(train_step(model, optimizer, own, section, step, ranks)[0].loss)
        if step + 1 == save_at:
            writer = CheckpointWriter(root, 1, ranks.storage)
            writer.save(save_at, state)
    if save_at:
        writer.finish()
    return losses
