"""Findings and figures of one pool as they come in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from isthmus.pools import Pool
from isthmus.probes.contract import Setting
from isthmus.recipe.schema import Recipe
from isthmus.records import Aspect, Evidence, Limit, Outcome, Use
from isthmus.run import Figure


@dataclass
class Findings:
    """What is known about a pool so far."""

    setting: Setting
    evidence: list[Evidence] = field(default_factory=list)
    figures: dict[str, Figure] = field(default_factory=dict)
    disturbances: list[str] = field(default_factory=list)
    """What kept probes from finding anything out, and says nothing about the pool."""

    @property
    def recipe(self) -> Recipe:
        return self.setting.recipe

    @property
    def pool(self) -> Pool:
        return self.setting.pool

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
        self.evidence.append(finding(name, outcome, detail, samples, figures, aspect=aspect, needed_for=needed_for))


def finding(
    name: str,
    outcome: Outcome,
    detail: str,
    samples: int = 0,
    figures: dict[str, Figure] | None = None,
    limits: Sequence[Limit] = (),
    ranks: Sequence[int] = (),
    failure: str | None = None,
    confidence: float | None = None,
    *,
    aspect: Aspect,
    needed_for: Use,
) -> Evidence:
    """One finding; a module of probes binds its aspect. `failure` is the folder of a kept case."""
    return Evidence(
        name=name,
        aspect=aspect,
        needed_for=needed_for,
        outcome=outcome,
        detail=detail,
        samples=samples,
        confidence=confidence,
        figures=figures or {},
        limits=list(limits),
        ranks=list(ranks),
        failure=failure,
    )


def without_ranks(ranks: Iterable[int], reason: str, needed_for: Use = "training") -> Limit:
    """What a pool is fit within where only these ranks are at fault."""
    return Limit(setting="pool.ranks", excluded=[str(rank) for rank in ranks], reason=reason, needed_for=needed_for)
