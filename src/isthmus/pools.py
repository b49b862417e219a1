"""What a recipe may run on: its pools, and the cores that are here for a pool of this machine's CPU."""

from __future__ import annotations

import math
import os
import typing
from dataclasses import dataclass, field
from pathlib import Path

from isthmus.recipe.schema import PlacedStage, Recipe

CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")
ON_POOL = "ISTHMUS_ON_POOL"
"""The variable that names the pool on a node of which a process was started: to this process it is here."""


@dataclass(frozen=True)
class Nodes:
    """The nodes of a Ray cluster on which the processes of a pool run.

    They have all of `labels`. Each process takes `resources` of its node: those of its kind of chip if None. `python`
    runs it, the interpreter that Ray has there if None, with the variables `env`. `wait_s` is what a start waits for
    nodes, in seconds.
    """

    address: str
    wait_s: float
    labels: dict[str, str] = field(hash=False)
    resources: dict[str, float] | None = field(hash=False)
    python: str | None
    env: dict[str, str] = field(hash=False)


@dataclass(frozen=True)
class Pool:
    """A number of chips of one kind. `rehearsed`: the chip is not here, its rules are enforced on the CPU.

    `ranks` is the number of processes that train on it.
    `nodes` are those of a Ray cluster on which it stands, unless this process is on one of them.
    `engines` are URLs of engines that generate on it elsewhere, with the file of their key, and the `exchange` folder.
    Compute threads of a process on the CPU: `threads` if it works alone, `shared_threads` if the process of another
    pool works beside it. The recipe's number counts for both.
    """

    name: str
    chip: str
    count: int
    ranks: int
    rehearsed: bool
    threads: int
    shared_threads: int
    engines: tuple[str, ...] = ()
    api_key_file: Path | None = None
    exchange: Path | None = None
    nodes: Nodes | None = None

    @property
    def elsewhere(self) -> bool:
        """Whether it is reached by URLs alone."""
        return bool(self.engines)

    def __str__(self) -> str:
        chips = self.chip if self.count == 1 else f"{self.count} x {self.chip}"
        how = ", rehearsed" if self.rehearsed else ", elsewhere" if self.elsewhere else ""
        how = ", on nodes" if self.nodes else how
        return f"{self.name} ({chips}{how})"


def get_pool(recipe: Recipe, name: str) -> Pool:
    """The pool `name` of a recipe, with its thread counts decided. Raises KeyError for a name that it does not have."""
    section = recipe.pools[name]
    cpus = int(((section.ray and section.ray.resources) or {}).get("CPU", 0))
    alone = section.threads or cpus or default_threads()
    shared = section.threads or max(1, alone // 2)
    ranks = section.ranks or section.count
    return Pool(
        name,
        section.chip,
        section.count,
        ranks,
        section.rehearsed,
        alone,
        shared,
        tuple(url.rstrip("/") for url in section.engines),
        section.api_key_file,
        section.exchange,
        _nodes(recipe, name),
    )


def _nodes(recipe: Recipe, name: str) -> Nodes | None:
    """None for a pool that is not on nodes, and within a process on one of its nodes."""
    ray, cluster = recipe.pools[name].ray, recipe.cluster
    if ray is None or cluster is None or os.environ.get(ON_POOL) == name:
        return None
    return Nodes(cluster.address, cluster.wait_s, ray.labels, ray.resources, ray.python, ray.env)


def placed_pools(recipe: Recipe) -> list[Pool]:
    """The pools that `[place]` names, each once, in the order in which it names them."""
    stages = typing.get_args(PlacedStage)
    names = dict.fromkeys(name for stage in stages for name in getattr(recipe.place, stage))
    return [get_pool(recipe, name) for name in names]


def default_threads() -> int:
    """Compute threads of a process: OMP_NUM_THREADS where it is set, else the cores that this process may use."""
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return int(asked) if asked.isdigit() and int(asked) > 0 else available_cores()


def available_cores(quota_file: Path = CGROUP_QUOTA) -> int:
    """Cores this process may use: its affinity, cut to the CPU quota of its control group, which `cpu.max` holds."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota_cores(quota_file.read_text(encoding="ascii")) if quota_file.is_file() else None
    return max(1, min(cores, math.ceil(quota))) if quota is not None else cores


def _quota_cores(content: str) -> float | None:
    """Cores of a control group's `cpu.max`, "quota period" in microseconds; None without a limit."""
    quota, _, period = content.strip().partition(" ")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None
