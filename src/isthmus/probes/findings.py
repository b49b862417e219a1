"""Findings and figures of one pool as they come in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from isthmus.pools import Pool
from isthmus.probes.statistics import median_of
from isthmus.recipe import Recipe
from isthmus.records import Aspect, Evidence, Outcome, Use
from isthmus.run import Figure


@dataclass
class Findings:
    """What is known about a pool so far."""

    recipe: Recipe
    pool: Pool
    evidence: list[Evidence] = field(default_factory=list)
    figures: dict[str, Figure] = field(default_factory=dict)

    def add(
        self,
        name: str,
        aspect: Aspect,
        needed_for: Use,
        outcome: Outcome,
        detail: str,
        samples: int = 0,
        figures: dict[str, Figure] | None = None,
    ) -> None:
        self.evidence.append(
            Evidence(
                name=name,
                aspect=aspect,
                needed_for=needed_for,
                outcome=outcome,
                detail=detail,
                samples=samples,
                figures=figures or {},
            )
        )

    def measured(
        self, value: float, unit: str, source: str, low: float | None = None, high: float | None = None
    ) -> Figure:
        """A figure read off this pool."""
        return Figure.measured(value, unit, source, rehearsed=self.pool.rehearsed, low=low, high=high)

    def median(self, samples: Sequence[float], unit: str, source: str) -> Figure:
        """The median of a few samples, with its interval at the recipe's confidence."""
        median = median_of(samples, self.recipe.qualify.confidence)
        source = f"{source}; median of {median.samples}, interval {median.confidence:.0%}"
        return self.measured(median.value, unit, source, median.low, median.high)
