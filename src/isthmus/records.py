"""The records of all stages: what each writes into the run folder, and so what the others may read.

They load without torch, so that the plan and the report stay on the desk.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import date
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from isthmus.run import Figure, Record

Verdict = Literal["fit", "fit with limits", "serve-only", "unfit", "not enough evidence"]
Outcome = Literal["pass", "fail", "unknown"]
Aspect = Literal["stability", "links", "software", "compute"]
Use = Literal["training", "serving", "both"]


class Part(BaseModel):
    """Base of what records are made of."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Limit(Part):
    """What a use of a pool has to keep to. `setting` is a key of the recipe, `train.expert` for example.

    A numeric setting stays between `least` and `most`; any setting stays out of `excluded`. The setting `pool.ranks`
    excludes ranks by number, as text.
    """

    setting: str
    least: float | None = None
    most: float | None = None
    excluded: list[str] = []
    reason: str
    needed_for: Use = "training"


class Evidence(Part):
    """One finding about a pool. `needed_for` says which use of the pool it bears on.

    A failing finding that `limits` describe completely does not make the pool unfit: it is fit within them.
    `failure` is the folder of a case that `isthmus case` packs, relative to the run folder.
    """

    name: str
    aspect: Aspect
    needed_for: Use
    outcome: Outcome
    detail: str
    samples: int = 0
    confidence: float | None = None
    figures: dict[str, Figure] = {}
    limits: list[Limit] = []
    ranks: list[int] = []
    failure: str | None = None


AspectOutcome = Literal["pass", "limited", "fail", "unknown"]


class Score(Part):
    """How one question about a pool came out. `looked_for`: the share, 0 to 1, of the faults to be expected there, by
    what is met in the field, that the probes which ran can see."""

    aspect: Aspect
    outcome: AspectOutcome
    passed: int
    findings: int
    looked_for: float
    skipped: int


class Skipped(Part):
    """A probe that was not run, what it would have cost (None: not known beforehand), and the kinds of faults that
    therefore nobody looked for."""

    probe: str
    aspect: Aspect
    price_s: float | None
    why: str
    unseen: list[str]


class FailureCase(Part):
    """`failure.json`: one failing call of a portable probe, complete enough to fail again elsewhere.

    `function` is `module:function` of `isthmus.probes.portable`; `arguments` are what each rank got, in JSON.
    `planted` are the faults that a rehearsal injected, in the notation of `isthmus rehearse --fault`. `files` names the
    arguments whose values are names of files in the case's folder.
    """

    probe: str
    title: str
    function: str
    arguments: dict[str, Any]
    files: list[str] = []
    ranks: int
    device: str
    pool: str
    chip: str
    rehearsed: bool
    planted: list[str] = []
    expected: str
    observed: str
    replies: list[dict[str, Any]] = []
    environment: dict[str, str] = {}
    log: list[str] = []


class QualifyRecord(Record):
    """`qualify/<pool>.json`"""

    pool: str
    chip: str
    present: bool
    rehearsed: bool
    verdict: Verdict
    title: str
    reasons: list[str]
    evidence: list[Evidence]
    figures: dict[str, Figure] = {}
    scores: list[Score] = []
    limits: list[Limit] = []
    skipped: list[Skipped] = []


RuleAnswer = Literal["nothing found", "caution", "unknown", "licence", "refused"]
"""What the records of a day say of a chip, a buyer and a place, mildest first. `refused`: a licence is needed and the
stated policy is to refuse it."""


class RuleStep(Part):
    """One step of the arithmetic of export classes, written out. None: unknown; `low` is a floor of what is unknown."""

    name: str
    formula: str
    value: float | None
    low: float | None = None
    unit: str
    source: str


class RuleFinding(Part):
    """One record that applies, or may apply where `certain` is false, with what it asks for after others relaxed it.

    `stale`: on the day that was asked about nobody had looked at it again since it expired. `cap`: one that the number
    of chips exceeds.
    """

    record: str
    side: Literal["US", "CN"]
    kind: Literal["rule", "letter", "guidance", "press", "reported"]
    effect: Literal["note", "caution", "licence", "denial"]
    since: date
    day_known: bool
    as_of: date
    expires: date
    stale: bool
    certain: bool
    cap: int | None = None
    what: str
    what_zh: str
    why: str
    source: str


class Ruling(Part):
    """What the dated records say of one chip, for one buyer and one place. It is as of a day, and no legal advice.

    `export_class` is by arithmetic alone; "unknown" where die area or peak is. `licence`: a licence that the buyer says
    to hold, by its number or name; it is not checked.
    """

    chip: str
    maker: str | None
    as_of: date
    records_end: date
    buyer_parent: str
    site: str
    count: int | None = None
    state_funded: bool | None = None
    export_class: str
    window: Literal["inside", "outside", "unknown", "none"]
    steps: list[RuleStep]
    findings: list[RuleFinding]
    answer: RuleAnswer
    licence: str | None = None


class Placement(Part):
    stage: str
    pool: str
    reason: str


class Rejection(Part):
    stage: str
    pool: str
    reason: str


class PlanRecord(Record):
    """`plan.json`. `rulings` are by pool; None if the recipe does not say who buys and where."""

    placements: list[Placement]
    rejected: list[Rejection]
    estimate: dict[str, Figure]
    rulings: dict[str, Ruling] | None = None

    def pool_of(self, stage: str) -> str:
        """The pool on which a stage runs; raises KeyError for an unknown stage."""
        for placement in self.placements:
            if placement.stage == stage:
                return placement.pool
        raise KeyError(stage)


class TrainRecord(Record):
    """`train.json`: supervised fine-tuning."""

    pool: str
    steps: int
    resumed_from: list[int]
    checkpoint: str
    checkpoint_sha256: str
    figures: dict[str, Figure]


class RlRecord(Record):
    """`rl.json`"""

    train_pool: str
    rollout_pool: str
    rollout_rehearsed: bool
    algorithm: str
    steps: int
    resumed_from: list[int]
    checkpoint: str
    checkpoint_sha256: str
    weight_version: int
    heldout_problems: int
    accuracy_before: Figure
    accuracy_after: Figure
    accuracy_gain: Figure
    thought_tokens_before: Figure
    thought_tokens_after: Figure
    figures: dict[str, Figure]
    sample_before: str
    sample_after: str


Layer = Literal["source", "files", "coverage", "config", "modules", "tokens", "engine", "task"]
"""The layers of the parity gate, cheapest first."""
CheckOutcome = Literal["pass", "caution", "fail", "unknown"]
"""`unknown`: it was measured, and what was found does not tell. `caution`: a known risk that was not measured."""


class Check(Part):
    """One finding of the parity gate: a figure against its limit, where it has them.

    A finding about one module names it (its path in the published names), and the operator in it where that is known.
    """

    layer: Layer
    name: str
    outcome: CheckOutcome
    figure: Figure | None = None
    limit: Figure | None = None
    detail: str
    module: str | None = None
    operator: str | None = None


class LedgerRow(Part):
    """What a module lost on the way, as relative L2 errors of its output on golden inputs.

    `quantisation` is between the trained weights and the exact emulator of the format, `chip` between the emulator and
    the target. `floor` is what rounding on a healthy target costs. None: not measured.
    """

    module: str
    kind: str
    quantisation: float | None
    chip: float | None
    floor: float | None

    @property
    def cost(self) -> float:
        """Both costs together: the error from the trained weights to the target is no larger."""
        return (self.quantisation or 0.0) + (self.chip or 0.0)


def costliest(ledger: Iterable[LedgerRow], count: int = 8) -> list[LedgerRow]:
    """The rows that lost most on the way."""
    return sorted(ledger, key=lambda row: row.cost, reverse=True)[:count]


class ParityVerdict(Part):
    """`verdict.json` of a bundle: what the gate found on the target, and where the fault is if it refused."""

    verdict: Literal["pass", "refuse"]
    target: str
    rehearsed: bool
    checks: list[Check]
    ledger: list[LedgerRow]
    culprit: str | None
    operator: str | None
    isthmus: str
    torch: str
    started: float
    ended: float


class HandoffRecord(Record):
    """`parity.json`"""

    source_pool: str
    target_pool: str
    format: str
    verdict: Literal["pass", "refuse"]
    checks: list[Check]
    bundles: dict[str, str]
    seal_id: str | None
    figures: dict[str, Figure]
    ledger: list[LedgerRow] = []
    culprit: str | None = None
    operator: str | None = None
