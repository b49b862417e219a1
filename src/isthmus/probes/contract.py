"""The contract of a live probe: what it finds, what it costs, and how it looks at a pool through its crew."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from isthmus.chips import Chip
from isthmus.chips.rehearse import Profile
from isthmus.chips.rehearse.faults import FaultKind
from isthmus.launch.crew import Called, Crew
from isthmus.pools import Pool
from isthmus.probes.judge.rates import median_of
from isthmus.recipe.schema import Recipe
from isthmus.records import Aspect, Evidence, FailureCase, Use
from isthmus.run import Figure, write_atomic


@dataclass
class Setting:
    """What is examined, and where findings are put.

    `folder` is the pool's own, `qualify/<pool>`; `root` the run folder. `profile` is there for a rehearsed chip.
    `stall_s` is how long a probe waits for a sign of life before it calls a rank hung.
    """

    recipe: Recipe
    pool: Pool
    chip: Chip
    profile: Profile | None
    device: str
    root: Path
    folder: Path
    stall_s: float = 20.0
    say: Callable[[str], None] = lambda _text: None
    failures: list[Path] = field(default_factory=list)

    def measured(
        self, value: float, unit: str, source: str, low: float | None = None, high: float | None = None
    ) -> Figure:
        """A figure read off this pool."""
        return Figure.measured(value, unit, source, rehearsed=self.pool.rehearsed, low=low, high=high)

    def median(self, samples: Sequence[float], unit: str, source: str) -> Figure:
        """The median of a few samples read off this pool, with its interval at the recipe's confidence."""
        median = median_of(samples, self.recipe.qualify.confidence)
        source = f"{source}; median of {median.samples}, interval {median.confidence:.0%}"
        return self.measured(median.value, unit, source, median.low, median.high)

    def keep_failure(
        self,
        crew: Crew,
        called: Called,
        *,
        probe: str,
        title: str,
        function: str,
        arguments: dict[str, Any],
        expected: str,
        observed: str,
    ) -> str:
        """Write a failing call as a case that `isthmus case` can pack. Returns its folder, relative to the run's."""
        case = FailureCase(
            probe=probe,
            title=title,
            function=function,
            arguments=arguments,
            ranks=crew.world,
            device=crew.device,
            pool=self.pool.name,
            chip=self.pool.chip,
            rehearsed=self.pool.rehearsed,
            planted=[str(fault) for fault in crew.faults],
            expected=expected,
            observed=observed,
            replies=[
                {
                    "rank": one.rank,
                    "state": one.state,
                    "value": one.value,
                    "error": one.error,
                    "beat": str(one.beat),
                    "seconds": one.seconds,
                }
                for one in called.replies
            ],
            environment=environment(),
            log=[line for one in called.replies if one.log for line in (f"rank {one.rank}:", *one.log.splitlines())],
        )
        folder = self.folder / "failures" / f"{len(self.failures) + 1:02}-{probe.replace(' ', '-')}"
        folder.mkdir(parents=True, exist_ok=True)
        content = json.dumps(case.model_dump(mode="json"), indent=1, default=str)
        write_atomic(folder / "failure.json", content.encode())
        self.failures.append(folder)
        return str(folder.relative_to(self.root))

    def drop_failures(self, kept: int) -> None:
        """Delete all failures but the first `kept`: they say nothing about the pool."""
        for folder in self.failures[kept:]:
            shutil.rmtree(folder)
        del self.failures[kept:]


@dataclass(frozen=True)
class Probe:
    """One probe of the live tier.

    `finds` are the kinds of faults that it can see: with `price` (seconds, on this setting) they decide what a budget
    buys. `run` returns at least one finding, also where it could not look. It is not run for fewer than `min_ranks`.
    """

    name: str
    aspect: Aspect
    needed_for: Use
    finds: tuple[FaultKind, ...]
    price: Callable[[Setting], float]
    run: Callable[[Crew, Setting], list[Evidence]]
    min_ranks: int = 1


def environment() -> dict[str, str]:
    """Versions that a vendor's engineer asks for first."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }
