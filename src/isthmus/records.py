"""The records of all stages: what each writes into the run folder, and so what the others may read.

They load without torch, so that the plan and the report stay on the desk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import date
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator

from isthmus.errors import IsthmusError
from isthmus.run import Figure, Record, RunFolder

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
    """`qualify/<pool>.json`. `disturbed` is what kept probes from finding anything out and says nothing about the pool:
    such a pool is not done, and is examined again by the next command."""

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
    disturbed: list[str] = []


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
    """A pool that a stage is not on. `acceptable`: it could be, and another one comes first."""

    stage: str
    pool: str
    reason: str
    acceptable: bool = False


FlipOf = Literal["efficiency", "failures", "links", "price"]
"""Of the chosen pool: factors on its forecast efficiency, failures and link speed; its price over the other's."""


class Candidate(Part):
    """A pair of pools that all steps could run on, and what they would take; unknown where the forecast is.

    `why`: what stands against it, or by how much it lost; of the chosen one why nothing is known of it, if so. `shares`
    of the chip-hours are by the vendor of the chips. `keeps_aim`: the pair is known to break no limit of [aim].
    """

    train: str
    rollout: str
    hours: Figure
    chip_hours: Figure
    cost: Figure
    shares: dict[str, float] = {}
    chosen: bool
    keeps_aim: bool = True
    why: str


class Flip(Part):
    """A value at which another pool would be quicker or cheaper."""

    what: FlipOf
    at: Figure


class ForecastOption(Part):
    """What an act would take on a pool; unknown with `why`. `beside` is the other pool that the step holds.

    `flips` are the values at which it would be even with the pool that the plan chose.
    """

    pool: str
    beside: str | None = None
    seconds: Figure | None = None
    chip_hours: Figure | None = None
    money: Figure | None = None
    why: str = ""
    flips: list[Flip] = []


class ForecastAct(Part):
    """An act, and every pool of its place. Reinforcement learning has two: `NAME` learns, `NAME-rollouts` generates."""

    name: str
    pools: list[ForecastOption]


class ForecastRecord(Record):
    """`forecast.json`: what `plan` knew of each act on each pool of its place."""

    steps: list[ForecastAct]


class PlanRecord(Record):
    """`plan.json`. `rulings` are by pool; None if the recipe does not say who buys and where.

    `candidates` are the pairs of pools that its [aim] was held against; none without that section.
    """

    placements: list[Placement]
    rejected: list[Rejection]
    estimate: dict[str, Figure]
    rulings: dict[str, Ruling] | None = None
    candidates: list[Candidate] = []

    def pool_of(self, stage: str) -> str:
        """The pool on which a stage runs; raises KeyError for an unknown stage."""
        for placement in self.placements:
            if placement.stage == stage:
                return placement.pool
        raise KeyError(stage)

    def next_pools(self, stage: str) -> list[str]:
        """Other pools that a stage may move to, in the recipe's order."""
        return [one.pool for one in self.rejected if one.stage == stage and one.acceptable]


class PlayedRecord(Record):
    """Base of what steps leave. The figures of a `drill` are rehearsed, whatever computed."""

    drill: bool = False

    @model_validator(mode="after")
    def _a_drill_measures_nothing(self) -> Self:
        if self.drill and (named := [name for name, one in _figures_of(self) if one.kind != "rehearsed"]):
            raise ValueError(f"figures of a drill are rehearsed; {', '.join(named)} are not")
        return self


def _figures_of(record: Record) -> Iterator[tuple[str, Figure]]:
    """The figures of a record, and those in its tables, with their names."""
    for name, value in record:
        if isinstance(value, Figure):
            yield name, value
        elif isinstance(value, dict):
            yield from ((str(key), one) for key, one in value.items() if isinstance(one, Figure))


class WeightsRecord(PlayedRecord):
    """`steps/NAME/record.json` of a step that leaves weights. `pool` trained them; `steps` are its updates.

    It started from the checkpoint with the hash `started_from_sha256` of the step `started_from`; from a model if that
    is `model`. `checkpoint` is relative to the run folder.
    """

    step: str
    pool: str
    started_from: str
    started_from_sha256: str | None = None
    steps: int
    resumed_from: list[int]
    checkpoint: str
    checkpoint_sha256: str
    figures: dict[str, Figure]

    @property
    def made_from(self) -> dict[str, str]:
        start = {"start": self.started_from_sha256} if self.started_from_sha256 else {}
        return {**super().made_from, **start, "checkpoint": self.checkpoint_sha256}


class TextRecord(WeightsRecord):
    """Of a step that trains on text."""

    kind: Literal["pretrain", "sft"]


class RlRecord(WeightsRecord):
    """Of reinforcement learning. The last version of the weights is `weight_version`.

    `rollout_pool` generated last; `rollout_pools` has the seconds for which the step held each that generated.
    """

    kind: Literal["rl"] = "rl"
    rollout_pool: str
    rollout_rehearsed: bool
    rollout_pools: dict[str, Figure] = {}
    algorithm: str
    weight_version: int
    heldout_problems: int
    accuracy_before: Figure
    accuracy_after: Figure
    accuracy_gain: Figure
    thought_tokens_before: Figure
    thought_tokens_after: Figure
    sample_before: str
    sample_after: str


class SampleRecord(PlayedRecord):
    """`steps/NAME/record.json` of a step that leaves data: answers that passed its filters, in `samples`.

    `dropped` counts what each filter took away, in the order of the filters, of `generated` answers to `prompts`
    problems. The weights that answered are those of the checkpoint with `weights_sha256` of the step `weights_of`.
    """

    step: str
    kind: Literal["sample"] = "sample"
    pool: str
    rehearsed: bool
    weights_of: str
    weights_sha256: str | None
    format: str
    seed: int
    prompts: int
    generated: int
    kept: int
    dropped: dict[str, int]
    samples: str
    samples_sha256: str
    figures: dict[str, Figure]

    @property
    def made_from(self) -> dict[str, str]:
        weights = {"weights": self.weights_sha256} if self.weights_sha256 else {}
        return {**super().made_from, **weights, "samples": self.samples_sha256}


class EvaluationRecord(PlayedRecord):
    """`steps/NAME/evaluation.json`: how the weights of a step answer held-out problems.

    `correct` has a row for each problem and in it each answer, in the order of `problems`, which are ids.
    """

    step: str
    pool: str
    rehearsed: bool
    format: str
    problems: list[str]
    correct: list[list[bool]]
    accuracy: Figure
    greedy_accuracy: Figure
    pass_at: dict[int, Figure]
    by_task: dict[str, Figure]
    language: Figure
    tokens: Figure


Rung = Literal[
    "go on",
    "retry",
    "skip batch",
    "leave",
    "restart engine",
    "restart",
    "leave out a rank",
    "shrink",
    "wait",
    "move rollouts",
    "revert",
    "stop",
]
"""What is done about an incident, mildest first. `leave`: save, end, and go on when the command is run again."""
Side = Literal["train", "rollout"]
"""The two sides of a step: the pool that learns, and the one that generates."""


class GateCheck(Part):
    """One thing that the gate of a revert compared. `exact` ones have to be the same, others within `band`."""

    name: str
    step: int
    exact: bool
    ok: bool
    old: str | float | None
    new: str | float | None
    band: float | None = None


class RevertVerdict(Part):
    """What the gate found of one move. `checkpoint_step` is the last checkpoint that can be trusted, None if none.

    `passed_over` says of each newer checkpoint why it is not trusted.
    """

    verdict: Literal["go", "refuse"]
    reason: str
    checkpoint_step: int | None
    repeated_steps: list[int]
    checks: list[GateCheck]
    passed_over: dict[int, str] = {}


class IncidentRecord(Record):
    """`steps/NAME/incidents/NNN.json`: what a watched step met, what was decided, and what came of it.

    It is on the disk as `decided` before anything is done about it. `update` counts from 1, the update that was under
    way. `figures` are those that the decision rests on. A revert or a shrink says in `to_pool` and `to_ranks` where the
    step goes on, `without_ranks` are the devices that are left out there; `wait_s` passes before a restart. `pool` is
    that of the `side` that failed.
    """

    step: str
    side: Side = "train"
    number: int
    signal: str
    detail: str
    pool: str
    ranks: int
    culprits: list[int] = []
    update: int
    checkpoint: int
    rung: Rung
    why: str
    outcome: Literal["decided", "done", "asked", "failed"]
    to_pool: str | None = None
    to_ranks: int | None = None
    without_ranks: list[int] = []
    wait_s: float | None = None
    figures: dict[str, Figure] = {}
    gate: RevertVerdict | None = None


AnyStepRecord = TextRecord | RlRecord | SampleRecord
STEP_RECORDS: dict[str, type[AnyStepRecord]] = {
    "pretrain": TextRecord,
    "sft": TextRecord,
    "rl": RlRecord,
    "sample": SampleRecord,
}


def step_record(run: RunFolder, name: str) -> AnyStepRecord | None:
    """The record of a step, or None if it is not done. Raises KeyError for a name that no step has."""
    return run.read_record(f"steps/{name}/record", STEP_RECORDS[run.recipe.named(name).kind])


def evaluation_of(run: RunFolder, name: str) -> EvaluationRecord | None:
    """What the weights of a step answered to held-out problems; None if they were not asked yet."""
    return run.read_record(f"steps/{name}/evaluation", EvaluationRecord)


def step_is_done(run: RunFolder, name: str) -> bool:
    """Whether a step has its record, and its evaluation if the recipe asks for one."""
    asked = name in run.recipe.evaluation.after
    return step_record(run, name) is not None and not (asked and evaluation_of(run, name) is None)


def read_weights(run: RunFolder, name: str) -> WeightsRecord:
    """The record of a step that leaves weights; raises IsthmusError that says what to run if it is not done."""
    record = step_record(run, name)
    if not isinstance(record, WeightsRecord):
        raise IsthmusError(f"step {name!r} is not done yet; first run: isthmus run {run.path} --until {name}")
    return record


def incidents(run: RunFolder, step: str) -> list[IncidentRecord]:
    """What a step met so far, in order. Raises DamagedFile for a record that cannot be read."""
    folder = run.step_folder(step) / "incidents"
    names = sorted(path.stem for path in folder.glob("[0-9]*.json"))
    found = (run.read_record(f"steps/{step}/incidents/{name}", IncidentRecord) for name in names)
    return [one for one in found if one is not None]


@dataclass(frozen=True)
class TrainPlace:
    """Where a step trains: a pool, the number of its ranks, and devices that are left out."""

    pool: str
    ranks: int
    without: tuple[int, ...] = ()


def train_place(run: RunFolder, step: str, ranks_of: Callable[[str], int]) -> TrainPlace:
    """Where the plan put training, or where an incident of this step or of one before it moved it since."""
    pool = run.require_record("plan", PlanRecord, "plan").pool_of("train")
    place = TrainPlace(pool, ranks_of(pool))
    names = [one.name for one in run.recipe.step]
    for name in names[: names.index(step) + 1]:
        for one in incidents(run, name):
            if one.side == "train" and one.outcome == "done" and one.to_pool is not None:
                place = TrainPlace(one.to_pool, one.to_ranks or ranks_of(one.to_pool), tuple(one.without_ranks))
    return place


def rollout_pool(run: RunFolder, step: str, planned: str) -> str:
    """The pool that generates for a step: the planned one, or where an incident of this step or of one before it moved
    the rollouts since."""
    names = [one.name for one in run.recipe.step]
    before = (one for name in names[: names.index(step) + 1] for one in incidents(run, name))
    moved = [one.to_pool for one in before if one.rung == "move rollouts" and one.outcome == "done" and one.to_pool]
    return moved[-1] if moved else planned


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


class PlayedPolicy(Part):
    """What a policy made of a drill, over all steps: `updates` of `wanted` were left at its end, `begun` were begun,
    `lost` of them were made again. `ended` says whether it came to its end; `why` is what stopped it otherwise."""

    policy: str
    updates: int
    wanted: int
    begun: int
    lost: int
    seconds: Figure
    moved_to: str | None
    ended: bool
    why: str = ""


class DrillRecord(Record):
    """`drill.json`: the drill as it went, and other policies on the same pools with the same faults."""

    policies: list[PlayedPolicy]


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
