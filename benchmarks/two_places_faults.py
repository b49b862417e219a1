"""Failures of engines during reinforcement learning, planted one by one, and what became of the samples.

`alone` has the rollouts and the crossing of a step as the product has them, on weights that move by themselves: each
step's samples are held against those of one engine that nobody disturbed, to the last bit. `whole` is `isthmus run`:
the weights after every update have to be those of a run that nobody disturbed.
"""

from __future__ import annotations

import random
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from benchmarks.processes import ended, said, start
from benchmarks.two_places_shore import KINDS, REINFORCED, Failure, Row, Shore
from isthmus.engines import Completion
from isthmus.engines.fleet import Fleet
from isthmus.errors import IsthmusError
from isthmus.formats.updates.wire import digest, pack
from isthmus.parity.paired import wilson_interval
from isthmus.progress import Watch
from isthmus.records import PlanRecord, RlRecord
from isthmus.run import RunFolder
from isthmus.stages.steps.rl import loop
from isthmus.stages.steps.rl.crew import Crew
from isthmus.stages.steps.rl.rollout import Rollout
from isthmus.stages.steps.step import StepRun
from isthmus.tools.inspect import check_run
from isthmus.trainer.mesh import alone as one_rank

Note = Callable[[Row], None]
QUIET = Watch(quiet=True)
MOVED = 1e-3
"""How far a weight moves in a version, relative to itself."""
CLOSE = 1e-3
"""Nats that the compiled layers may differ from torch on the same stored weights."""
SERVING = 2
"""Engines that have to serve when one is made to fail."""
WAIT_S, LOOK_S = 120.0, 0.05


class Steps:
    """Step after step without a learner."""

    def __init__(self, shores: loop.Shores, shore: Shore):
        self.shores, self.shore = shores, shore
        assert shore.shadow is not None
        self.twin = shore.shadow
        self._twins = replace(shores.rollouts, engine=self.twin, _begun=deque())

    @property
    def fleet(self) -> Fleet:
        engine = self.shores.crossing.engine.engine
        assert isinstance(engine, Fleet)
        return engine

    def serving(self) -> list[int]:
        """Engines that a failure could strike."""
        return [place for place, one in enumerate(self.fleet.members) if one.serves and place in self.shore.at_work()]

    def one(self, failure: Failure | None) -> Row:
        """The next version crosses and writes, and a failure comes in between. Raises IsthmusError if that is too much
        for the step."""
        state, crossing, events = self.shores.state, self.shores.crossing, self.shores.state.work.events
        state.step += 1
        self._move(state.step)
        told = {name: len(events(name)) for name in ("fallback", "back", "alarm")}
        if failure is not None:
            self.shore.arm(failure)
        began = time.perf_counter()
        crossing.send()
        crossed = time.perf_counter()
        found = self.shores.rollouts.generate(state.step)
        ended_at = time.perf_counter()
        self.shore.mend()
        row: Row = {"step": state.step, "crossing_s": crossed - began, "writing_s": ended_at - crossed}
        row |= {name: events(name)[count:] for name, count in told.items()}
        return row | self._held_against_the_twin(found)

    def _move(self, seed: int) -> None:
        noise = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.shores.state.model.parameters():
                parameter.mul_(1 + MOVED * torch.randn(parameter.shape, generator=noise))

    def _held_against_the_twin(self, found: Rollout) -> Row:
        state, form = self.shores.state, self.shores.crossing.format
        tensors = form.export(state.weights(), state.work.architecture)
        payload = pack(tensors)
        self.twin.update(payload, state.step, digest(payload))
        expected = self._twins.generate(state.step)
        model = form.build(state.work.architecture, dict(tensors))
        return compared(found, expected, state.step) | {"beyond_the_model": _beyond(found, model)}


def compared(found: Rollout, expected: Rollout, version: int) -> Row:
    """Samples that are missing, one too many, others than the twin's, or with a token of another version."""
    pairs = list(zip(found.completions, expected.completions, strict=True))
    both = [(one, other) for group, twins in pairs for one, other in zip(group, twins, strict=False)]
    return {
        "samples": len(expected.flat),
        "lost": sum(max(0, len(twins) - len(group)) for group, twins in pairs),
        "doubled": sum(max(0, len(group) - len(twins)) for group, twins in pairs),
        "others": sum((one.tokens, one.logprobs) != (other.tokens, other.logprobs) for one, other in both),
        "of_other_versions": sum(_versions(one) != {version} for _, one in found.flat),
    }


def _versions(one: Completion) -> set[int]:
    return {one.version, one.last_version, *(version for version, _ in one.versions or [])}


def _beyond(found: Rollout, model: torch.nn.Module) -> int:
    """Of the first sample of each prompt: how many have a log-probability that the format's model does not give."""
    beyond = 0
    for prompt, group in zip(found.prompts, found.completions, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *group[0].tokens]]))[0, len(prompt) - 1 : -1]
        rows = torch.log_softmax(logits, -1)[torch.arange(len(group[0].tokens)), group[0].tokens]
        beyond += bool((rows - torch.tensor(group[0].logprobs)).abs().max() > CLOSE)
    return beyond


def is_kept(row: Row) -> bool:
    """Whether a step's samples are those that they should be."""
    bad = ("lost", "doubled", "others", "of_other_versions", "beyond_the_model")
    return "error" not in row and not any(row[name] for name in bad)


@contextmanager
def steps_of(shore: Shore, run: Path) -> Iterator[Steps]:
    work = StepRun.of(RunFolder.open(run), REINFORCED)
    plan = work.run.require_record("plan", PlanRecord, "plan")
    with loop.open_shores(work, plan, Crew(one_rank(torch.device("cpu"))), QUIET) as shores:
        yield Steps(shores, shore)


def failures_alone(shore: Shore, prepared: Path, folder: Path, kinds: Sequence[str], note: Note) -> Row:
    """One failure of each of these kinds in turn. `note` gets a row for each; what healthy steps took is returned.

    A step that ends in an error is a row too, and the next one opens everything anew.
    """
    calm: list[Row] = []
    waiting, attempt = deque(enumerate(kinds)), 0
    while waiting:
        attempt += 1
        run = folder / f"alone-{attempt}"
        shutil.copytree(prepared, run)
        shore.settle()
        with steps_of(shore, run) as steps:
            _go_on(steps, shore, waiting, calm, note)
        shutil.rmtree(run)
    timed = [row for row in calm if "error" not in row]
    return {
        "steps": len(calm),
        "kept": sum(map(is_kept, calm)),
        "errors": [row["error"] for row in calm if "error" in row],
        "crossing_s": median(row["crossing_s"] for row in timed),
        "writing_s": median(row["writing_s"] for row in timed),
    }


def _go_on(steps: Steps, shore: Shore, waiting: deque[tuple[int, str]], calm: list[Row], note: Note) -> None:
    """Until no failure waits, or one was too much."""
    calm.append(_tried(steps, None))
    while waiting:
        serving = steps.serving()
        if len(serving) < SERVING:
            row = _tried(steps, None)
            calm += [row] if "error" in row or len(steps.serving()) == len(steps.fleet.members) else []
            time.sleep(LOOK_S)
        else:
            number, kind = waiting.popleft()
            failure = Failure.drawn(random.Random(f"{kind} {number}"), kind, serving)
            row = _tried(steps, failure)
            if shore.struck.is_set():
                note(failure.shown() | row | {"kept": is_kept(row)})
            else:
                waiting.append((number + len(KINDS) * 1000, kind))
                calm += [row] if "error" in row else []
        if "error" in row:
            return


def _tried(steps: Steps, failure: Failure | None) -> Row:
    try:
        return steps.one(failure)
    except IsthmusError as error:
        steps.shore.mend()
        return {"step": steps.shores.state.step, "error": f"{type(error).__name__}: {error}"}


def whole_runs(shore: Shore, prepared: Path, folder: Path, kinds: Sequence[str], note: Note) -> Row:
    """The same in the whole command, several failures in each run. Returns what the undisturbed run was."""
    shore.settle()
    calm = _run(shore, prepared, folder / "calm", None)
    waiting, attempt = deque(enumerate(kinds)), 0
    while waiting:
        attempt += 1
        met = Planter(shore, waiting)
        run = _run(shore, prepared, folder / f"run-{attempt}", met)
        for failure, step in met.struck:
            pairs = zip(calm["weights"], run["weights"], strict=False)
            first = next((update for update, (one, other) in enumerate(pairs, 1) if one != other), None)
            same = run["code"] == 0 and run["checkpoint"] == calm["checkpoint"] and run["weights"] == calm["weights"]
            note(
                failure.shown()
                | {"run": attempt, "step": step, "kept": same and not run["breaks"], "first_other_weights": first}
                | {key: run[key] for key in ("code", "seconds", "errors", "breaks")}
                | {"fallback": [one for one in run["fallback"] if shore.urls[failure.engine] in one["what"]]}
            )
        if not met.struck:
            raise SystemExit(f"no failure struck in a whole run: {run}")
    return {"seconds": calm["seconds"], "updates": len(calm["weights"]), "code": calm["code"], "errors": calm["errors"]}


class Planter:
    """Failures one after the other in a run under way, each some updates after the one before it was mended."""

    def __init__(self, shore: Shore, waiting: deque[tuple[int, str]]):
        self.shore, self.waiting = shore, waiting
        self.struck: list[tuple[Failure, int]] = []
        self._now: tuple[Failure, int] | None = None

    def look(self, step: int, most: int) -> None:
        """At the newest update of `most`."""
        if self._now is not None and step >= self._now[1] + 2:
            self.end()
        if self._now is None and self.waiting and step < most - 4 and len(self.shore.at_work()) == len(self.shore.urls):
            number, kind = self.waiting.popleft()
            failure = Failure.drawn(random.Random(f"{kind} {number} whole"), kind, self.shore.at_work())
            self._now = failure, step
            self.shore.arm(failure)

    def end(self) -> None:
        """Mend what is broken; a failure that did not come waits again."""
        if self._now is None:
            return
        self.shore.mend()
        if self.shore.struck.is_set():
            self.struck.append(self._now)
        else:
            self.waiting.append((len(self.waiting) + 1000, self._now[0].kind))
        self._now = None


def _run(shore: Shore, prepared: Path, folder: Path, planter: Planter | None) -> Row:
    """What `isthmus run` of the last step leaves."""
    shutil.copytree(prepared, folder)
    run, began = RunFolder.open(folder), time.perf_counter()
    steps = run.recipe.named(REINFORCED).steps  # type: ignore[union-attr]
    process = start("run", folder, "--only", REINFORCED)
    with ended(process):
        while process.poll() is None:
            if planter is not None:
                planter.look(max((one["step"] for one in run.events(REINFORCED, "step")), default=0), steps)
            time.sleep(LOOK_S)
        result = said(process)
    if planter is not None:
        planter.end()
    shore.settle()
    record = run.read_record(f"steps/{REINFORCED}/record", RlRecord)
    row: Row = {
        "code": result.code,
        "errors": result.errors[-500:],
        "seconds": round(time.perf_counter() - began, 1),
        "weights": [one["weight_sha256"] for one in run.events(REINFORCED, "step")],
        "checkpoint": None if record is None else record.checkpoint_sha256,
        "fallback": run.events(REINFORCED, "fallback"),
        "breaks": check_run(folder).breaks,
    }
    shutil.rmtree(folder)
    return row


def by_kind(rows: Sequence[Row]) -> list[Row]:
    """For each kind: failures after which all was as it should be, with Wilson's interval at 95 %, how often the engine
    was left out, and the seconds of the step."""
    table = []
    for kind in [kind for kind in KINDS if any(row["kind"] == kind for row in rows)]:
        of_it = [row for row in rows if row["kind"] == kind]
        kept = sum(row["kept"] for row in of_it)
        timed = [row["crossing_s"] + row["writing_s"] for row in of_it if "writing_s" in row]
        table.append(
            {
                "kind": kind,
                "failures": len(of_it),
                "kept": kept,
                "interval": wilson_interval(kept / len(of_it), len(of_it), 0.95),
                "left_out": sum(any("left out" in one["what"] for one in row.get("fallback", [])) for row in of_it),
                "step_s": round(median(timed), 2) if timed else None,
                "longest_s": round(max(timed), 2) if timed else None,
                **{
                    name: sum(row.get(name, 0) for row in of_it)
                    for name in ("lost", "doubled", "others", "of_other_versions", "beyond_the_model")
                },
            }
        )
    return table
