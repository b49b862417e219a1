"""What a drill plants."""

from __future__ import annotations

from typing import Literal

from isthmus.recipe.section import Count, Section, Whole, key

Policy = Literal["persist", "at-once"]


class DrillSection(Section):
    """A pool that fails, played.

    Rehearsed pools may train, and nothing of a drill is sealed for use. The kinds of drawn faults come from published
    counts in chips/fault_weights.csv; how often they come is the recipe's.
    """

    seed: Whole = key(0, "seed of the faults that are drawn", ge=0)
    updates_between_faults: Count | None = key(
        None, "updates of a rehearsed pool between two drawn faults, on average; none is drawn if absent"
    )
    replay: list[Policy] = key(
        [], "what is played afterwards, to be compared: never to leave the pool, or to leave it at the first failure"
    )
