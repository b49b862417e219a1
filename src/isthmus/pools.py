"""What a recipe may run on: its pools, and the cores that are here for a pool of this machine's CPU."""

from __future__ import annotations

import math
import os
import typing
from dataclasses import dataclass
from pathlib import Path

from isthmus.recipe.schema import PlacedStage, Recipe

CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")


@dataclass(frozen=True)
class Pool:
    """A number of chips of one kind. `rehearsed`: the chip is not here, its rules are enforced on the CPU.

    `ranks` is the number of processes that train on it.
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

    @property
    def elsewhere(self) -> bool:
        """Whether it is reached by URLs alone."""
        return bool(self.engines)

    def __str__(self) -> str:
        chips = self.chip if self.count == 1 else f"{self.count} x {self.chip}"
        how = ", rehearsed" if self.rehearsed else ", elsewhere" if self.elsewhere else ""
        return f"{self.name} ({chips}{how})"


def get_pool(recipe: Recipe, name: str) -> Pool:
    """The pool `name` of a recipe, with its thread counts decided. Raises KeyError for a name that it does not have."""
    section = recipe.pools[name]
    alone = section.threads or default_threads()
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
    )


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
