"""The processes that train together, and how they divide a model among themselves."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from isthmus.errors import IsthmusError
from isthmus.recipe import DeepseekSection, ModelSection, TrainSection


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

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


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
        device = torch.device(device_type, int(os.environ.get("LOCAL_RANK", "0")))
        torch.accelerator.set_device_index(device)
    if world == 1:
        dist.init_process_group(_backend(device), store=HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group(_backend(device), device_id=device if device.type != "cpu" else None)
    try:
        storage = _own_group() if world > 1 else None
        yield Ranks(dist.get_rank(), world, device, grouped=True, storage=storage)
    finally:
        dist.destroy_process_group()


def _own_group() -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo")
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
    if world % (section.replicate * section.expert):
        raise IsthmusError(
            f"{world} ranks do not divide into train.replicate = {section.replicate} groups with "
            f"train.expert = {section.expert}: their product must divide the number of ranks"
        )
    if section.expert == 1:
        return
    if not isinstance(architecture, DeepseekSection):
        raise IsthmusError(f"train.expert = {section.expert}, but a {architecture.model_type} model has no experts")
    if architecture.n_routed_experts % section.expert:
        raise IsthmusError(
            f"train.expert = {section.expert} does not divide the {architecture.n_routed_experts} routed experts"
        )
