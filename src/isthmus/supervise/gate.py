"""The gate of a revert: may a step go on, on another pool, from one of its checkpoints?

From the newest checkpoint backwards: the new pool restores it and computes the recorded updates after it again. What
has to be the same is compared exactly, what two chips round differently within a band that is declared beforehand.
Where the pools disagree, fp32 on the host says which is wrong; if it was the old one, an older checkpoint is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from isthmus.errors import DamagedFile, IsthmusError, RanksFailed
from isthmus.launch.alone import Options
from isthmus.launch.pool_ranks import run_on
from isthmus.lines import read_json_object
from isthmus.pools import get_pool
from isthmus.recipe.steps import RlSection
from isthmus.records import GateCheck, RevertVerdict, TrainPlace
from isthmus.run import RunFolder, fsync_folder
from isthmus.supervise.situation import checkpoints

COUNT = 2
"""Recorded updates after a checkpoint that are computed again."""
Side = Literal["new", "host"]
HOST = "host"


@dataclass(frozen=True)
class Band:
    """|a - b| <= absolute + relative * max(|a|, |b|)."""

    absolute: float
    relative: float

    def limit(self, one: float, other: float) -> float:
        return self.absolute + self.relative * max(abs(one), abs(other))


@dataclass(frozen=True)
class Bands:
    """Of the first update after a checkpoint, and of later ones."""

    first: Band
    later: Band

    def at(self, index: int) -> Band:
        return self.first if index == 0 else self.later


SAME = Bands(Band(0.0, 0.0), Band(0.0, 0.0))
"""The same kind of chip and the same world: the same bits."""
STANDARD = Bands(Band(1e-5, 2e-3), Band(5e-3, 2e-3))
"""NeMo Automodel's standard band of a resumed run, tests/ci_tests/README.md at 36044ad."""
RELAXED = Bands(Band(1e-4, 7.5e-3), Band(1e-2, 7.5e-3))
"""The same project's relaxed one: where kinds of chips or precisions differ. No published band is wider and still tells
a wrong run from a right one; verl's 2 % between two vendors does not."""


@dataclass(frozen=True)
class Restored:
    """A checkpoint as a pool has it in memory, compared there with the file. `tensors` says of each tensor that is not
    what the file holds what is wrong; `rng` is whether the random streams are those of the file, None: another kind of
    chip has its own. `groups` are the optimiser's options, `missing` parameters without moments."""

    step: int
    tensors: Mapping[str, str]
    missing: Sequence[str]
    rng: bool | None
    steps_counted: float
    groups: Mapping[str, str]
    data: str


@dataclass(frozen=True)
class Seen:
    """An update as it was recorded or computed again. `update` counts from 1; `modules` are norms of parts of the
    gradient; `bias` a digest of the router biases before it, where it is known."""

    update: int
    batch: str
    loss: float | None
    norm: float | None
    learning_rate: float
    modules: Mapping[str, float | None]


@dataclass(frozen=True)
class Repeated:
    """What a pool made of a checkpoint; `diverged` says why the updates ended early, None if they did not."""

    restored: Restored
    seen: Sequence[Seen]
    diverged: str | None = None

    @classmethod
    def read(cls, path: Path) -> Repeated:
        content = read_json_object(path)
        return cls(Restored(**content["restored"]), [Seen(**one) for one in content["seen"]], content["diverged"])


def recorded(events: Sequence[Mapping[str, Any]]) -> dict[int, Seen]:
    """What the old pool recorded of its updates, by their number. One that came out as no number was seen and left out:
    it says nothing of the checkpoint before it."""
    return {
        event["step"]: Seen(event["step"], learning_rate=event["learning_rate"], **event["watched"])
        for event in events
        if event["event"] == "step"
        and "watched" in event
        and None not in (event["watched"]["loss"], event["watched"]["norm"])
    }


def exact_checks(found: Restored, saved: Mapping[str, Any], expected_updates: int) -> list[GateCheck]:
    """What has to be the same after a restore. `saved` is what the checkpoint says of itself."""
    step = found.step

    def check(name: str, old: str | float | None, new: str | float | None) -> GateCheck:
        return GateCheck(name=name, step=step, exact=True, ok=old == new, old=old, new=new)

    kinds = {"model weights": "model/", "optimiser state": "optimizer/", "router bias": "bias/"}
    checks = []
    for name, prefix in kinds.items():
        wrong = [f"{key.removeprefix(prefix)} {how}" for key, how in found.tensors.items() if key.startswith(prefix)]
        checks.append(check(name, "as stored", "; ".join(wrong[:3]) or "as stored"))
    checks.append(check("moments of every parameter", "present", "; ".join(found.missing[:3]) or "present"))
    checks.append(check("step count", float(expected_updates), found.steps_counted))
    for name, option in saved.get("groups", {}).items():
        checks.append(check(f"optimiser group {name}", option, found.groups.get(name)))
    checks.append(check("position in the data", saved.get("data"), found.data))
    if found.rng is not None:
        checks.append(check("random streams", "as stored", "as stored" if found.rng else "others"))
    return checks


def update_checks(old: Seen, new: Seen, index: int, bands: Bands) -> list[GateCheck]:
    """One recorded update against the same one computed again."""

    def exact(name: str, one: str | float | None, other: str | float | None) -> GateCheck:
        return GateCheck(name=name, step=old.update, exact=True, ok=one == other, old=one, new=other)

    def within(name: str, one: float | None, other: float | None) -> GateCheck:
        limit = None if one is None or other is None else bands.at(index).limit(one, other)
        ok = limit is not None and one is not None and other is not None and abs(one - other) <= limit
        return GateCheck(name=name, step=old.update, exact=False, ok=ok, old=one, new=other, band=limit)

    return [
        exact("digest of the batch", old.batch, new.batch),
        exact("learning rate", old.learning_rate, new.learning_rate),
        within("loss", old.loss, new.loss),
        within("norm of the gradient", old.norm, new.norm),
        *(within(f"gradient of {name}", value, new.modules.get(name)) for name, value in old.modules.items()),
    ]


def first_broken(checks: Sequence[GateCheck]) -> GateCheck | None:
    return next((check for check in checks if not check.ok), None)


def judge(
    steps: Sequence[int],
    old: Mapping[int, Seen],
    repeat: Callable[[int, Side], Repeated],
    saved: Callable[[int], Mapping[str, Any]],
    made: Callable[[int], int],
    bands: Bands,
) -> RevertVerdict:
    """The verdict over the checkpoints `steps`, oldest first.

    `repeat` restores the checkpoint of a step on one side and computes the updates after it; it raises DamagedFile for
    one that is not whole. `saved` is what a checkpoint says of itself, `made` how many updates were made before it.
    """
    passed_over: dict[int, str] = {}
    last: list[GateCheck] = []
    for step in reversed(steps):
        try:
            found = repeat(step, "new")
        except DamagedFile as error:
            passed_over[step] = str(error)
            continue
        last = exact_checks(found.restored, saved(step), made(step))
        if broken := first_broken(last):
            return _refuse(f"{broken.name} is not as it was: {broken.new}", last, passed_over)
        if found.diverged is not None:
            return _refuse(f"the updates after the checkpoint of update {step}: {found.diverged}", last, passed_over)
        pairs = [(old[one.update], one) for one in found.seen if one.update in old]
        updates = [update_checks(*pair, index, bands) for index, pair in enumerate(pairs)]
        last += [check for checks in updates for check in checks]
        broken = first_broken(last)
        if broken is None:
            again = [new.update for _, new in pairs]
            told = (
                f"updates {', '.join(map(str, again))} come out alike" if again else "no update after it was recorded"
            )
            return RevertVerdict(
                verdict="go",
                reason=f"the checkpoint of update {step} is restored exactly, and {told}",
                checkpoint_step=step,
                repeated_steps=again,
                checks=last,
                passed_over=passed_over,
            )
        if broken.exact:
            return _refuse(
                f"{broken.name} of update {broken.step}: {broken.old} before, {broken.new} now", last, passed_over
            )
        wrong = _who_is_wrong(pairs, repeat(step, "host"), bands)
        named = (
            f"{broken.name} of update {broken.step} is {broken.new:g}, and was {broken.old:g}"
            if (isinstance(broken.new, float) and isinstance(broken.old, float))
            else f"{broken.name} of update {broken.step} is no number"
        )
        if wrong != "old":
            return _refuse(f"{named}; fp32 on the host says that the {wrong} is wrong", last, passed_over)
        passed_over[step] = f"{named}; fp32 on the host says that the old pool was wrong"
    if not steps:
        return RevertVerdict(
            verdict="go",
            reason="there is no checkpoint yet: the step begins again from its start",
            checkpoint_step=None,
            repeated_steps=[],
            checks=[],
        )
    why = "; ".join(f"update {step}: {reason}" for step, reason in passed_over.items())
    return _refuse(f"no checkpoint can be trusted: {why}", last, passed_over)


def _who_is_wrong(pairs: Sequence[tuple[Seen, Seen]], host: Repeated, bands: Bands) -> str:
    """ "old" or "new pool", or "checkpoint or both" where the host agrees with neither."""
    truth = {one.update: one for one in host.seen}
    if host.diverged is not None:
        return "checkpoint or the recording"
    fits = {"old": True, "new": True}
    for index, (old, new) in enumerate(pairs):
        for side, seen in (("old", old), ("new", new)):
            checks = update_checks(truth[seen.update], seen, index, bands)
            fits[side] = fits[side] and first_broken(checks) is None
    if fits["new"] and not fits["old"]:
        return "old"
    return "new pool" if fits["old"] else "checkpoint or the recording"


def _refuse(reason: str, checks: list[GateCheck], passed_over: dict[int, str]) -> RevertVerdict:
    return RevertVerdict(
        verdict="refuse",
        reason=reason,
        checkpoint_step=None,
        repeated_steps=sorted({check.step for check in checks if not check.exact}),
        checks=checks,
        passed_over=passed_over,
    )


def bands_between(run: RunFolder, old: TrainPlace, new: TrainPlace) -> Bands:
    """Declared by what differs, before anything is computed."""
    one, other = get_pool(run.recipe, old.pool), get_pool(run.recipe, new.pool)
    if one.chip != other.chip:
        return RELAXED
    return SAME if (old.ranks, one.threads) == (new.ranks, other.threads) and one.chip == "cpu" else STANDARD


def examine(run: RunFolder, step: str, old: TrainPlace, new: TrainPlace) -> RevertVerdict:
    """Restore and repeat on the new pool, in a process for each try, and judge."""
    folder = run.step_folder(step)
    logs, out = folder / "gate", folder / "gate.json"

    def repeat(at: int, side: Side) -> Repeated:
        options: Options = {
            "name": step,
            "pool": new.pool,
            "at": at,
            "count": COUNT,
            "host": side == HOST,
            "out": str(out),
        }
        ranks = 1 if side == HOST else new.ranks
        run_on(get_pool(run.recipe, new.pool), "steps.repeat", run.path, options, ranks, logs)
        found = Repeated.read(out)
        out.unlink()
        return found

    def saved(at: int) -> Mapping[str, Any]:
        manifest = read_json_object(folder / "checkpoints" / f"step-{at:06d}" / "manifest.json", DamagedFile)
        return manifest["manifest"]["extra"]

    events = run.events(step)

    def made(at: int) -> int:
        return updates_made(events, at, isinstance(run.recipe.named(step), RlSection))

    try:
        return judge(checkpoints(run, step), recorded(events), repeat, saved, made, bands_between(run, old, new))
    except RanksFailed as error:
        return _refuse(f"pool {new.pool} did not get through: {str(error).splitlines()[0]}", [], {})
    except IsthmusError as error:
        return _refuse(f"pool {new.pool} did not get through: {error}", [], {})


def updates_made(events: Sequence[Mapping[str, Any]], at: int, reinforced: bool) -> int:
    """Optimiser steps until update `at`: an update on text is one, one of reinforcement learning says how many."""
    told = [event for event in events if event["event"] == "step" and event["step"] <= at]
    if reinforced:
        return sum(event.get("updates", 0) for event in told)
    return at - sum(bool(event.get("left_out")) for event in told)


def set_aside(run: RunFolder, step: str, verdict: RevertVerdict) -> None:
    """Checkpoints that are newer than the trusted one get another name: nothing goes on from them any more."""
    folder = run.step_folder(step) / "checkpoints"
    for newer in checkpoints(run, step):
        if verdict.checkpoint_step is not None and newer > verdict.checkpoint_step:
            run.forget(folder / f"step-{newer:06d}")
            number = len(list(folder.glob("untrusted-*")))
            (folder / f"step-{newer:06d}").rename(folder / f"untrusted-{number}-step-{newer:06d}")
    if folder.is_dir():
        fsync_folder(folder)
