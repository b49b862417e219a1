"""Two records of one training, step against step: within which band they agree, or where they part, and how.

`isthmus.twin` writes the records; nothing here needs torch.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from isthmus.errors import IsthmusError
from isthmus.lines import lines_of, parse_object, read_text
from isthmus.supervise.gate import RELAXED, SAME, STANDARD, Band, Bands

STRICT = Bands(Band(1e-6, 0.0), Band(1e-6, 0.0))
"""NeMo Automodel's strict band of a resumed run, tests/ci_tests/README.md at 36044ad."""
BANDS = {"same": SAME, "strict": STRICT, "standard": STANDARD, "relaxed": RELAXED}
"""From the narrowest to the widest."""
NORM_RELATIVE = {"same": 0.0, "strict": 1e-5, "standard": 0.01, "relaxed": 0.04}
"""Of gradient norms. 1 % is the band of Megatron-Bridge's verification cards at 067f987; the others are in the ratio of
the bands of the loss."""
STANDS_OUT = 8.0
"""Times the median difference of all modules, from which on one of them is at fault rather than rounding."""
_BITS = 1 << 62


class _Header(BaseModel):
    rank: int = Field(ge=0)
    world: int = Field(ge=1, le=1_000_000)


class _State(BaseModel):
    squares: dict[str, dict[str, float]]


class _Options(BaseModel):
    updates: int | None
    groups: list[dict[str, Any]]
    dtypes: list[str]


class _Line(BaseModel):
    """What is read of a step."""

    count: int
    batch: str | None = Field(pattern="^[0-9a-f]+$")
    losses: list[float]
    squares: list[float]
    options: list[_Options]


@dataclass(frozen=True)
class Step:
    """A step of all ranks. `squares` are squared norms of the gradient by module; `number` counts from 1, by the
    optimiser's own count where it keeps one."""

    number: int
    batch: str | None
    loss: float | None
    squares: Mapping[str, float]
    options: Sequence[Mapping[str, Any]]
    random: Mapping[str, str]
    precision: str

    @cached_property
    def square(self) -> float:
        """The squared norm of the whole gradient."""
        return sum(self.squares.values())

    @property
    def norm(self) -> float:
        return math.sqrt(self.square)


@dataclass(frozen=True)
class Pair:
    """A step of both, and how far their gradients are apart."""

    mine: Step
    other: Step

    @cached_property
    def gaps(self) -> dict[str, float]:
        return module_gaps(self.mine, self.other)

    @cached_property
    def total(self) -> float:
        return _gap(self.mine.square, self.other.square)


@dataclass
class Twin:
    """A record. `before` has squared norms at its start by kind (parameters, moments) and module."""

    folder: Path
    world: int
    steps: dict[int, Step] = field(default_factory=dict)
    before: dict[str, dict[str, float]] = field(default_factory=dict)


class Parting(BaseModel):
    """The first difference beyond the band."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: int
    kind: str
    module: str | None
    reason: str


class TwinVerdict(BaseModel):
    """Whether two records agree. `largest` are the largest relative differences of loss and gradient norm;
    `narrowest` is the narrowest published band that holds, None if none does."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    agree: bool
    band: str
    narrowest: str | None
    steps: int
    only_first: int
    only_second: int
    largest: dict[str, float]
    parting: Parting | None
    notes: list[str]


def read_twin(folder: Path) -> Twin:
    """The record in a folder. Raises IsthmusError if there is none, a line is damaged, or a rank is missing."""
    files = sorted(folder.glob("rank-*.jsonl"))
    if not files:
        raise IsthmusError(f"{folder} has no record of a twin; `isthmus twin record -- python train.py` writes one")
    by_rank: dict[int, dict[int, dict[str, Any]]] = defaultdict(dict)
    befores: dict[int, list[dict[str, Any]]] = defaultdict(list)
    world = 1
    for file in files:
        header, steps, before = _read_rank(file)
        world = header["world"]
        by_rank[header["rank"]] |= steps
        befores[header["rank"]] = befores[header["rank"]] or before
    missing = sorted(set(range(world)) - set(by_rank))
    if missing:
        raise IsthmusError(f"{folder} lacks the files of ranks {missing} of {world}: copy all of them into the folder")
    twin = Twin(folder, world)
    for number in sorted(set.intersection(*(set(steps) for steps in by_rank.values()))):
        twin.steps[number] = _together(number, [steps[number] for steps in by_rank.values()])
    for line in [line for lines in befores.values() for line in lines]:
        for kind, squares in line["squares"].items():
            _add(twin.before.setdefault(kind, {}), squares)
    return twin


def _read_rank(file: Path) -> tuple[dict[str, Any], dict[int, dict[str, Any]], list[dict[str, Any]]]:
    """(header, steps by their number, states before the first step) of one file."""
    header: dict[str, Any] = {}
    names: list[str] = []
    steps: dict[int, dict[str, Any]] = {}
    before: list[dict[str, Any]] = []
    for where, line in _lines(file):
        try:
            if line["kind"] == "header":
                header = dict(_Header.model_validate(line))
            elif line["kind"] == "modules":
                names = list(line["names"])
            elif line["kind"] == "state" and line["when"] == "before":
                before.append(dict(_State.model_validate(line)))
            elif line["kind"] == "step":
                _Line.model_validate(line)
                steps[_number_of(line, max(steps, default=0))] = {
                    **line,
                    "squares": dict(zip(names, line["squares"], strict=True)),
                }
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise IsthmusError(f"{where} is no line of a twin's record ({error!r}); record it again") from error
    if not header:
        raise IsthmusError(f"{file} has no header: it is no record of a twin, or its beginning is lost")
    return header, steps, before


def _number_of(line: Mapping[str, Any], last: int) -> int:
    """By the optimiser's own count, so that a run that goes on from a checkpoint does so here; one that begins to count
    anew in the middle does not go back."""
    updates = line["options"][0]["updates"] if line["options"] else None
    return max(line["count"] if updates is None else updates + 1, last + 1)


def _lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line with its place. A last line that was cut when its process was killed is left out."""
    text = read_text(file)
    lines = lines_of(text)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield f"{file}, line {number},", parse_object(line.encode())
        except ValueError as error:
            if number == len(lines) and not text.endswith("\n"):
                return
            raise IsthmusError(f"{file}, line {number}, is damaged ({error}); record the twin again") from error


def _together(number: int, ranks: Sequence[Mapping[str, Any]]) -> Step:
    """One step of all ranks. Ranks with the same batch, as under tensor parallelism, count it once; losses are means
    over ranks of the sums over micro-batches."""
    digests = {rank["batch"] for rank in ranks}
    batch = None if None in digests else f"{sum(int(one, 16) for one in digests) % _BITS:016x}"
    losses = [sum(rank["losses"]) for rank in ranks if rank["losses"]]
    squares: dict[str, float] = {}
    for rank in ranks:
        _add(squares, rank["squares"])
    first = ranks[0]
    dtypes = sorted({kind for option in first["options"] for kind in option["dtypes"]})
    return Step(
        number=number,
        batch=batch,
        loss=statistics.fmean(losses) if losses else None,
        squares=squares,
        options=[{key: value for key, value in one.items() if key != "dtypes"} for one in first["options"]],
        random=first.get("random", {}),
        precision=f"parameters {', '.join(dtypes)}; {first.get('autocast', '')}",
    )


def _add(total: dict[str, float], more: Mapping[str, float]) -> None:
    for name, value in more.items():
        total[name] = total.get(name, 0.0) + value


def compare(first: Twin, second: Twin, band: str = "standard") -> TwinVerdict:
    """Hold the second record against the first, step by step.

    Steps are matched by the optimiser's own count. Raises IsthmusError for an unknown band, and for records without a
    common step.
    """
    if band not in BANDS:
        raise IsthmusError(f"there is no band {band!r}; there are {', '.join(BANDS)}, from the narrowest to the widest")
    second, shift = _by_their_batches(first, second)
    common = sorted(set(first.steps) & set(second.steps))
    if not common:
        spans = [f"{min(one.steps)} to {max(one.steps)}" if one.steps else "none" for one in (first, second)]
        raise IsthmusError(
            f"{first.folder} and {second.folder} have no step in common: the first has steps {spans[0]}, "
            f"the second {spans[1]}"
        )
    pairs = [Pair(first.steps[number], second.steps[number]) for number in common]
    exact = _exact_parting(pairs)

    def parts(name: str) -> Parting | None:
        return _weights_apart(first, second, common[0], name) or _first_parting(pairs, exact, name)

    parting = parts(band)
    return TwinVerdict(
        agree=parting is None,
        band=band,
        narrowest=next((name for name in BANDS if parts(name) is None), None),
        steps=len(common),
        only_first=len(first.steps) - len(common),
        only_second=len(second.steps) - len(common),
        largest=_largest(pairs),
        parting=parting,
        notes=[*shift, *_notes(pairs)],
    )


def _by_their_batches(first: Twin, second: Twin) -> tuple[Twin, list[str]]:
    """The second with its steps where the first has the same batches, if it begins to count anew there, and a note of
    it: what a run looks like that goes on from a checkpoint without the state of its optimiser."""
    mine = {step.batch: number for number, step in first.steps.items() if step.batch is not None}
    theirs = [second.steps[number] for number in sorted(second.steps)][:3]
    places = [mine.get(step.batch or "") for step in theirs]
    by = (places[0] or 0) - theirs[0].number if theirs else 0
    if len(mine) < len(first.steps) or by <= 0 or places != [step.number + by for step in theirs]:
        return second, []
    steps = {number + by: dataclasses.replace(step, number=number + by) for number, step in second.steps.items()}
    note = f"step 1 of the second is step {1 + by} of the first, by its batches"
    return dataclasses.replace(second, steps=steps), [note]


def _weights_apart(first: Twin, second: Twin, step: int, band: str) -> Parting | None:
    """Whether the two do not begin alike: other parameters, or moments that one has and the other lacks. Told only
    where both begin at the same step."""
    if not first.steps or min(first.steps) != min(second.steps):
        return None
    for kind in sorted({*first.before, *second.before}, key=lambda name: name != "parameters"):
        mine, other = first.before.get(kind), second.before.get(kind)
        what = "weights" if kind == "parameters" else "optimiser state"
        if mine is None or other is None:
            lacking = second if other is None else first
            reason = f"at its start {lacking.folder} has no {kind}, and its twin has"
            return Parting(step=step, kind=what, module=None, reason=reason)
        gaps = {name: _gap(mine.get(name), other.get(name)) for name in sorted({*mine, *other})}
        worst = max(gaps, key=lambda name: gaps[name])
        if gaps[worst] > max(NORM_RELATIVE[band], 1e-6):
            reason = f"before the first step the norm of {kind} of {worst} differs by {gaps[worst]:.2%}"
            return Parting(step=step, kind=what, module=worst, reason=reason)
    return None


def _exact_parting(pairs: Sequence[Pair]) -> tuple[int, Parting] | None:
    """The first step whose data or options differ, which no band allows."""
    for index, pair in enumerate(pairs):
        found = _batch_apart(pairs, index) or _options_apart(pair.mine, pair.other)
        if found is not None:
            return index, found
    return None


def _first_parting(pairs: Sequence[Pair], exact: tuple[int, Parting] | None, band: str) -> Parting | None:
    until, last = exact or (len(pairs), None)
    apart = (_figures_apart(pair, index, band) for index, pair in enumerate(pairs[:until]))
    return next((found for found in apart if found is not None), last)


def _batch_apart(pairs: Sequence[Pair], index: int) -> Parting | None:
    mine, other = pairs[index].mine, pairs[index].other
    if mine.batch is None or other.batch is None or mine.batch == other.batch:
        return None
    seen, theirs = [pair.mine.batch for pair in pairs], [pair.other.batch for pair in pairs]
    kind, reason = "data", "the batch of this step is another one"
    if Counter(seen) == Counter(theirs):
        kind, reason = "data order", "both see the same batches, in another order"
    else:
        shift = _shift(seen, theirs, index)
        if shift:
            kind = "position in the data"
            reason = f"from here on the second is {abs(shift)} batches {'ahead' if shift > 0 else 'behind'}"
    return Parting(step=mine.number, kind=kind, module=None, reason=reason)


def _shift(seen: Sequence[str | None], theirs: Sequence[str | None], start: int) -> int | None:
    """By how many steps the second is ahead from `start` on, if it is by one number for three steps at least."""
    for shift in sorted(range(-len(seen), len(seen)), key=abs):
        begin, end = max(start, -shift), min(len(seen), len(seen) - shift)
        if shift and end - begin >= 3 and theirs[begin:end] == seen[begin + shift : end + shift]:
            return shift
    return None


def _options_apart(mine: Step, other: Step) -> Parting | None:
    """Other options of the optimisers: learning rates, decay, how many updates they count."""
    if len(mine.options) != len(other.options):
        reason = f"{len(mine.options)} optimisers step here, and {len(other.options)}"
        return Parting(step=mine.number, kind="optimiser", module=None, reason=reason)
    for one, two in zip(mine.options, other.options, strict=True):
        counts = [option["updates"] or 0 for option in (one, two)]
        if counts[0] != counts[1]:
            reason = f"the optimiser counts {counts[0]} updates, and {counts[1]}"
            return Parting(step=mine.number, kind="optimiser state", module=None, reason=reason)
        for key, value, else_ in _unlike(one["groups"], two["groups"]):
            kind = "learning rate" if key == "lr" else "optimiser"
            return Parting(step=mine.number, kind=kind, module=None, reason=f"{key} is {value}, and {else_}")
    return None


def _unlike(mine: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Any, Any]]:
    """Options that both have and that differ by more than the last bits of a float. How a kernel is chosen (`fused`,
    `foreach`, `capturable`) is not what is computed."""
    for one, two in zip(mine, other, strict=False):
        for key in sorted(set(one) & set(two) - {"fused", "foreach", "capturable"}):
            if not _alike(one[key], two[key]):
                yield key, one[key], two[key]


def _alike(one: Any, two: Any) -> bool:
    if isinstance(one, list) and isinstance(two, list):
        return len(one) == len(two) and all(map(_alike, one, two))
    if isinstance(one, int | float) and isinstance(two, int | float):
        return math.isclose(one, two, rel_tol=1e-6)
    return one == two


def _figures_apart(pair: Pair, index: int, band: str) -> Parting | None:
    """A loss, a gradient norm, or the gradient of a module beyond the band."""
    mine, other, gaps = pair.mine, pair.other, pair.gaps
    limit = BANDS[band].at(index)
    typical = statistics.median(gaps.values()) if gaps else 0.0
    module = max(gaps, key=lambda name: gaps[name]) if gaps else None
    worst = gaps[module] if module is not None else 0.0
    stands_out = worst > max(NORM_RELATIVE[band], STANDS_OUT * typical)
    apart = _loss_apart(mine.loss, other.loss, limit)
    if not apart and not stands_out and pair.total <= NORM_RELATIVE[band]:
        return None
    said = f"loss {_number(mine.loss)} and {_number(other.loss)}, gradient norm {mine.norm:.6g} and {other.norm:.6g}"
    if stands_out:
        reason = f"the gradient of {module} differs by {worst:.2%}, that of the median module by {typical:.2%}; {said}"
        return Parting(step=mine.number, kind="one module", module=module, reason=reason)
    return Parting(step=mine.number, kind=_kind_of_all(mine, other), module=None, reason=f"all modules differ; {said}")


def _kind_of_all(mine: Step, other: Step) -> str:
    """What parts two steps in all modules at once, with the same data and options."""
    if mine.precision != other.precision:
        return "precision"
    streams = set(mine.random) & set(other.random)
    if any(mine.random[name] != other.random[name] for name in streams):
        return "random state"
    return "numerics"


def _loss_apart(mine: float | None, other: float | None, limit: Band) -> bool:
    if mine is None or other is None:
        return False
    if not (math.isfinite(mine) and math.isfinite(other)):
        return math.isfinite(mine) or math.isfinite(other)
    return abs(mine - other) > limit.limit(mine, other)


def module_gaps(mine: Step, other: Step) -> dict[str, float]:
    """Relative differences of the gradient norms of modules; those that carry under a millionth of the whole are left
    out. A module that one of the two lacks differs by 1."""
    floor = 1e-12 * max(mine.square, other.square)
    names = sorted({*mine.squares, *other.squares})
    loud = [name for name in names if max(mine.squares.get(name, 0.0), other.squares.get(name, 0.0)) > floor]
    return {name: _gap(mine.squares.get(name), other.squares.get(name)) for name in loud}


def _gap(one: float | None, two: float | None) -> float:
    """Relative difference of two norms, given as squares."""
    if one is None or two is None:
        return 1.0
    if not (math.isfinite(one) and math.isfinite(two)):
        return 0.0 if math.isfinite(one) == math.isfinite(two) else 1.0
    larger = math.sqrt(max(one, two))
    return abs(math.sqrt(one) - math.sqrt(two)) / larger if larger else 0.0


def _largest(pairs: Sequence[Pair]) -> dict[str, float]:
    losses = [
        abs(pair.mine.loss - pair.other.loss) / max(abs(pair.mine.loss), abs(pair.other.loss), 1e-30)
        for pair in pairs
        if pair.mine.loss is not None and pair.other.loss is not None
    ]
    return {
        "loss": max(losses, default=0.0),
        "gradient norm": max(pair.total for pair in pairs),
        "gradient of a module": max(max(pair.gaps.values(), default=0.0) for pair in pairs),
    }


def _notes(pairs: Sequence[Pair]) -> list[str]:
    """What the comparison could not see, and what differs without being a fault."""
    notes = []
    unseen = sum(None in (pair.mine.batch, pair.other.batch) for pair in pairs)
    if unseen:
        notes.append(f"of {unseen} steps the batch is unknown; `Recorder.note_batch` tells it")
    if any(None in (pair.mine.loss, pair.other.loss) for pair in pairs):
        notes.append("some steps have no loss: `backward` was called on something else than one number")
    mine, other = pairs[0].mine, pairs[0].other
    if mine.precision != other.precision:
        notes.append(f"precision: {mine.precision} | {other.precision}")
    if any(mine.random[name] != other.random[name] for name in set(mine.random) & set(other.random)):
        notes.append("the random streams differ from the first common step on")
    return notes


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.6g}"
