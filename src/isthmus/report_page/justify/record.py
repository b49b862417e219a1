"""`justify.json`: all that the paper says, without its words; both languages are written from it."""

from __future__ import annotations

from datetime import date
from typing import Literal

from isthmus.recipe.schema import PlacedStage
from isthmus.records import Aspect, AspectOutcome, CheckOutcome, Flip, Limit, Part, Ruling, Verdict
from isthmus.report_page.acts import ActKind
from isthmus.run import Figure, Kind, Record

Side = Literal["domestic", "foreign", "unlisted"]
"""Whose chips they are, seen from the authority: made at home, made abroad, or by a maker whom no record names."""
Objection = Literal["rehearsed", "verdict", "limits", "order", "rule", "not listed"]
"""Why an act does not run on a domestic pool."""
Gap = Literal[
    "no rules", "no money", "no forecast", "no domestic pool", "rehearsed", "unfinished", "not signed", "not sealed"
]
"""What the paper cannot say. An authority reads it before it asks."""


class PoolOf(Part):
    """A pool that the plan chose for something, or that was tried for it."""

    pool: str
    chip: str
    chip_name: str
    count: int
    maker: str | None
    side: Side
    rehearsed: bool


class ActOf(Part):
    """One act, where it runs, and what that takes. Chip-hours: seconds x chips, of all that is held."""

    name: str
    kind: ActKind
    placed: PlacedStage
    pool: str
    side: Side
    chip_hours: Figure | None
    tokens: Figure | None
    money: Figure | None


class SideShare(Part):
    """What one side does of everything that is known. A share is None where the other side's part is not known."""

    side: Side
    chip_hours: Figure | None
    chip_hours_share: float | None
    tokens: Figure | None
    tokens_share: float | None
    money: Figure | None
    money_share: float | None


class AspectOf(Part):
    """How a question about a pool came out; `kinds` are those of the figures behind it."""

    aspect: Aspect
    outcome: AspectOutcome
    passed: int
    findings: int
    looked_for: float
    kinds: list[Kind]
    against: list[str]


class Trial(Part):
    """What was tried on one domestic pool for an act, what stood against it, and what the act would take there."""

    pool: PoolOf
    verdict: Verdict
    outcome: list[AspectOf]
    objection: Objection
    limits: list[Limit]
    rule: str | None
    seconds: Figure | None
    chip_hours: Figure | None
    money: Figure | None


class CaseOf(Part):
    """Why one act runs on a chip that is not domestic. `flips` are values at which the answer would be another."""

    act: str
    kind: ActKind
    pool: PoolOf
    verdict: Verdict
    seconds: Figure | None
    chip_hours: Figure | None
    money: Figure | None
    trials: list[Trial]
    flips: list[Flip]
    look_again: date | None
    because: str | None


class Sealed(Part):
    """The gate's word, and who signed the seal, as the seal itself says."""

    verdict: Literal["pass", "refuse"]
    rehearsed: bool
    checks: int
    held: int
    outcomes: dict[CheckOutcome, int]
    seal_id: str | None
    signer: str | None
    accuracy: Figure | None


class JustifyRecord(Record):
    """`justify.json`. `country` is that of the authority: its chips are the domestic ones."""

    run: str
    country: str
    as_of: date | None
    pools: list[PoolOf]
    acts: list[ActOf]
    sides: list[SideShare]
    cases: list[CaseOf]
    rulings: dict[str, Ruling] | None
    gate: Sealed | None
    gaps: list[Gap]
    isthmus: str
