"""Findings and figures of one pool as they come in."""

from __future__ import annotations

from dataclasses import dataclass, field

from isthmus.pools import Pool
from isthmus.probes.contract import Setting
from isthmus.recipe.schema import Recipe
from isthmus.records import Aspect, Evidence, Outcome, Use
from isthmus.run import Figure


@dataclass
class Findings:
    """What is known about a pool so far."""

    setting: Setting
    evidence: list[Evidence] = field(default_factory=list)
    figures: dict[str, Figure] = field(default_factory=dict)

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
