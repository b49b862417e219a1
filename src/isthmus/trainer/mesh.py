"""The processes that train together, and how they divide a model among themselves."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from isthmus.errors import IsthmusError
from isthmus.recipe.architecture import ModelSection
from isthmus.recipe.schema import TrainSection, layout_problem

PATIENCE = timedelta(hours=2)
"""For what one rank does alone while others wait: training a tokenizer, writing a large checkpoint."""

LEFT_OUT = "ISTHMUS_WITHOUT"
"""The variable that names devices of this machine that no rank uses, by number."""


@dataclass(frozen=True)
class Ranks:
    """This process among `world` ones. `grouped` says whether torch.distributed is set up: one alone may do without.

    `storage` is a group of all ranks on the CPU that checkpoints have for themselves.
    """

    rank: int
    world: int
    device: torch.device
    grouped: bool = False
    storage: dist.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def first_of_node(self) -> bool:
        """Whether no rank before this one is on the same machine."""
        return os.environ.get("LOCAL_RANK", "0") == "0"

    def total(self, values: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def wait(self) -> None:
        """Until all ranks are here, for as long as the first may need for what it does alone."""
        if self.storage is not None:
            dist.barrier(group=self.storage)


def alone(device: torch.device) -> Ranks:
    """A single process that sets nothing up."""
    return Ranks(0, 1, device)


def launched_world() -> int | None:
    """The number of ranks that torchrun started, or None if it did not start this process."""
    world = os.environ.get("WORLD_SIZE")
    return int(world) if world and "LOCAL_RANK" in os.environ else None


@contextmanager
def open_ranks(device_type: str, *, grouped: bool) -> Iterator[Ranks]:
    """This process's place among the ranks that torchrun started; alone, torch.distributed is set up if `grouped`."""
    world = launched_world() or 1
    if world == 1 and not grouped:
        yield alone(torch.device(device_type))
        return
    device = torch.device(device_type)
    if device.type != "cpu":
        device = torch.device(device_type, _device_index(int(os.environ.get("LOCAL_RANK", "0"))))
        torch.accelerator.set_device_index(device)
    if world == 1:
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(_backend(device), store=store, rank=0, world_size=1)
    else:
        dist.init_process_group(_backend(device), device_id=device if device.type != "cpu" else None)
    storage = own_group() if world > 1 else None
    try:
        yield Ranks(dist.get_rank(), world, device, grouped=True, storage=storage)
    except BaseException:
        if world == 1:
            dist.destroy_process_group()
        raise  # of several ranks, the others may be in a collective, for which a clean end would wait
    dist.destroy_process_group()


def _device_index(local_rank: int) -> int:
    """The device of a rank of this machine: the one of its number among those that are not left out."""
    without = {int(one) for one in os.environ.get(LEFT_OUT, "").split(",") if one}
    count = torch.accelerator.device_count()
    return [index for index in range(max(count, local_rank + len(without) + 1)) if index not in without][local_rank]


def own_group() -> dist.ProcessGroup:
    """A group of all ranks on the CPU, for what takes as long as PATIENCE. All ranks must call it."""
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    assert isinstance(group, dist.ProcessGroup)
    return group


def _backend(device: torch.device) -> str:
    if device.type == "cpu":
        return "gloo"
    return f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"


@dataclass(frozen=True)
class Meshes:
    """`dense` shards all parameters but those of the routed experts, which `sparse` shards within a rank of `expert`.

    Each has one dimension, or two with replication: (replicate, shard).
    """

    dense: DeviceMesh
    sparse: DeviceMesh
    expert: DeviceMesh


def make_meshes(ranks: Ranks, section: TrainSection) -> Meshes:
    """The meshes of a checked layout. Ranks that exchange tokens are neighbours."""
    kind, shard = ranks.device.type, ranks.world // section.replicate
    dense = init_device_mesh(kind, (section.replicate, shard), mesh_dim_names=("replicate", "shard"))
    shape = (section.replicate, shard // section.expert, section.expert)
    sparse = init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard", "expert"))
    if section.replicate == 1:
        return Meshes(dense["shard"], sparse["shard"], sparse["expert"])
    return Meshes(dense, sparse["replicate", "shard"], sparse["expert"])


def check_layout(architecture: ModelSection, section: TrainSection, world: int) -> None:
    """Raise IsthmusError unless `world` ranks divide as [train] says."""
    if problem := layout_problem(architecture, section, world):
        raise IsthmusError(problem)
