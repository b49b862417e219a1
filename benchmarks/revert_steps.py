"""Tiny steps that are trained, supervised and moved within one process, for benchmarks/revert.py.

The supervisor, the ladder and the gate are those of a run; what is not there is the process around a step, whose end is
raised instead, and, in reinforcement learning, the engine: rollouts are drawn by seed here. Real processes, ranks and
engines are killed in benchmarks/kills.py.
"""

from __future__ import annotations

import math
import random
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from isthmus.engines import Completion, Sampling
from isthmus.engines.account import Account
from isthmus.errors import IsthmusError
from isthmus.pools import Pool
from isthmus.progress import Watch
from isthmus.recipe.read import parse_recipe
from isthmus.recipe.schema import Recipe
from isthmus.records import Placement, PlanRecord, QualifyRecord, Rejection, TrainPlace, read_weights
from isthmus.rewards import EachAlone, Rewards, Sample
from isthmus.run import Figure, RunFolder
from isthmus.stages import steps
from isthmus.stages.steps import data, generate, repeat
from isthmus.stages.steps.rl import engines, loop
from isthmus.supervise import gate
from isthmus.supervise.guard import Computed, Guard
from isthmus.supervise.supervisor import Supervisor
from isthmus.tasks import Task, load_tasks, tasks_of

STEP, UPDATES, EVERY = "watched", 9, 3
KINDS = ("sft", "pretrain", "rl")
QUIET = Watch(quiet=True)
OPTIMIZER = {"name": "adamw", "learning_rate": 3e-3, "warmup_steps": 3, "decay_share": 0.5}
SECTIONS: dict[str, dict[str, Any]] = {
    "sft": {"batch_size": 4},
    "pretrain": {"rows_per_step": 4, "row_length": 48},
    "rl": {
        "prompts_per_step": 2,
        "samples_per_prompt": 4,
        "max_new_tokens": 10,
        "heldout_problems": 2,
        "parity_tokens": 0,
        "loss": {"kl_weight": 0.01},
    },
}
"""What each kind of step has beside its number of updates and its checkpoints."""
WORDS = ("the two shores meet at every step", "one pool learns and the other one writes", "nothing is lost on the way")


def recipe(kind: str, folder: Path, seed: int = 0, updates: int = UPDATES, ranks: int = 1, **supervise: Any) -> Recipe:
    """A recipe of one step, which prefers pool home and may move to pool spare."""
    section = {"name": STEP, "kind": kind, "from": "model", "steps": updates, "checkpoint_every": EVERY}
    section |= {"keep_checkpoints": 4, "optimizer": OPTIMIZER, **SECTIONS[kind]}
    if kind == "pretrain":
        section["folder"] = str(_texts(folder))
    pool = {"chip": "cpu", "threads": 1}
    return parse_recipe(
        {
            "name": "revert",
            "seed": seed,
            "model": tomllib.loads(MODEL),
            "pools": {"home": pool | {"ranks": ranks}, "spare": pool},
            "place": {"train": ["home", "spare"], "rollout": ["home"], "serve": ["home"]},
            "tasks": {"countdown": {"teacher_give_up": 0.9}},
            "supervise": {"repeat_every": EVERY, **supervise},
            "step": [section],
        }
    )


MODEL = """
preset = "r-nano"
hidden_size = 32
intermediate_size = 64
moe_intermediate_size = 24
num_hidden_layers = 2
"""


def _texts(folder: Path) -> Path:
    texts = folder / "texts"
    if not texts.is_dir():
        texts.mkdir(parents=True)
        chance = random.Random(7)
        lines = [" ".join(chance.choice(WORDS) for _ in range(12)) for _ in range(200)]
        (texts / "a.txt").write_text("\n\n".join(lines), encoding="utf-8")
    return texts


def new_run(
    folder: Path,
    kind: str,
    shared: Path,
    seed: int = 0,
    updates: int = UPDATES,
    ranks: int = 1,
    **supervise: Any,
) -> RunFolder:
    """A run folder that lacks nothing but its training. `shared` has the texts of all."""
    run = RunFolder.create(folder, recipe(kind, shared, seed, updates, ranks, **supervise))
    places = [Placement(stage=stage, pool="home", reason="the first") for stage in ("train", "rollout", "serve")]
    spare = Rejection(stage="train", pool="spare", reason="acceptable", acceptable=True)
    plan = PlanRecord(recipe_sha256="0", started=0, ended=0, placements=places, rejected=[spare], estimate={})
    run.write_record("plan", plan)
    return run


def expect_pace(run: RunFolder, slowest_s: float, ratio: float | None) -> None:
    """Let the plan think so many seconds of an update likely at most, and pilots tell how quick pool spare is against
    pool home; None: no pilot ran."""
    plan = run.require_record("plan", PlanRecord, "plan")
    whole = slowest_s * getattr(run.recipe.named(STEP), "steps", 0)
    figure = Figure(value=whole / 2, unit="s", kind="forecast", source="the benchmark", low=whole / 4, high=whole)
    run.write_record("plan", plan.model_copy(update={"estimate": {STEP: figure}}))
    if ratio is None:
        return
    for pool, seconds in (("home", 1.0), ("spare", ratio)):
        told = {"sft_step_s": Figure.measured(seconds, "s/step", "the benchmark", rehearsed=False)}
        about: dict[str, Any] = {"pool": pool, "chip": "cpu", "present": True, "rehearsed": False, "verdict": "fit"}
        times = {"recipe_sha256": run.recipe.digest(), "started": 0.0, "ended": 1.0}
        record = QualifyRecord(**times, **about, title="", reasons=[], evidence=[], figures=told)
        run.write_record(f"qualify/{pool}", record)


class OddIsRight(EachAlone):
    """Rewards a text for its length, so that a model that knows nothing has something to learn."""

    def judge(self, sample: Sample) -> float:
        return float(len(sample.text) % 2)


class DrawnEngine:
    """Draws tokens by seed, whatever the weights; its log-probabilities are those of even odds."""

    arithmetic: str | None = "fp32"
    bits: str | None = None
    takes_deltas = False
    vocabulary = 64
    cannot_tell_kept: Sequence[str] = ()
    cannot_tell_routes: Sequence[str] = ()

    def start(self, bundle_folder: Path) -> None: ...

    def generate(
        self, prompts: list[list[int]], sampling: Sampling, seeds: list[int] | None = None
    ) -> list[list[Completion]]:
        numbers = seeds or [sampling.seed + index for index, _ in enumerate(prompts)]
        return [[self._one(random.Random(f"{seed}/{n}"), sampling) for n in range(sampling.n)] for seed in numbers]

    def _one(self, chance: random.Random, sampling: Sampling) -> Completion:
        tokens = [chance.randrange(self.vocabulary) for _ in range(chance.randint(3, sampling.max_new_tokens))]
        return Completion(tokens, [-math.log(self.vocabulary)] * len(tokens), "stop", 0, 0)

    def update(self, payload: bytes, version: int, sha256: str) -> None: ...

    def update_delta(self, parts: Sequence[bytes], base_version: int, version: int, sha256: str) -> float:
        raise AssertionError("this engine takes no deltas")

    def accounts(self) -> list[tuple[str, Account]]:
        return []

    def probe(self, prompts: list[list[int]], sampling: Sampling) -> list[tuple[str, list[list[Completion]]]]:
        return [("drawn", self.generate(prompts, sampling))]

    def stop(self) -> None: ...


@cache
def _tasks() -> dict[str, Task]:
    return dict(load_tasks(parse_recipe({**_BARE})))


_BARE: dict[str, Any] = {
    "name": "tasks",
    "model": {"preset": "r-nano"},
    "pools": {"home": {"chip": "cpu"}},
    "place": {"train": ["home"], "rollout": ["home"], "serve": ["home"]},
    "tasks": {"countdown": {"teacher_give_up": 0.9}},
    "step": [
        {"name": "a", "kind": "sft", "from": "model", "steps": 1, "optimizer": {"name": "adamw", "learning_rate": 1}}
    ],
}


@contextmanager
def replaced(*changes: tuple[Any, str, Any]) -> Iterator[None]:
    """Attributes (of, name, value) that have other values within this."""
    before = [(of, name, getattr(of, name)) for of, name, _ in changes]
    for of, name, value in changes:
        setattr(of, name, value)
    try:
        yield
    finally:
        for of, name, value in reversed(before):
            setattr(of, name, value)


@contextmanager
def in_one_process() -> Iterator[None]:
    """Within this all runs share problems, rollouts are drawn, and the gate looks without a process of its own."""

    @contextmanager
    def engine(*_: Any, **__: Any) -> Iterator[DrawnEngine]:
        yield DrawnEngine()

    @contextmanager
    def rewards(*_: Any) -> Iterator[Rewards]:
        yield Rewards({"accuracy": OddIsRight()}, {"accuracy": 1.0})

    def alone(_pool: Pool, _stage: str, path: Path, options: dict[str, Any], _ranks: int, _logs: Path) -> None:
        repeat.execute(RunFolder.open(path), QUIET, **options)

    with replaced(
        (data, "load_tasks", lambda _recipe: _tasks()),
        (loop, "tasks_of", lambda recipe, step: tasks_of(recipe, step, _tasks())),
        (engines, "engine_on", engine),
        (generate, "open_engine", engine),
        (loop, "open_rewards", rewards),
        (gate, "run_on", alone),
    ):
        yield


SOUND = Guard.update
Compute = Callable[[], Computed[Any]]


@dataclass
class Plant:
    """What goes wrong in a step. `disturb` gets the plant, the guard and how an update of a number is computed, and
    returns how it is computed instead; `attempt` counts the starts of the step."""

    disturb: Callable[[Plant, Guard, int, Compute], Compute] = lambda _plant, _guard, _number, compute: compute
    left_out: frozenset[int] = frozenset()
    attempt: int = 0
    calls: dict[int, int] = field(default_factory=dict)

    def update(self, guard: Guard, number: int, batch: Any, compute: Compute) -> tuple[Computed[Any], bool, str]:
        found, made, digest = SOUND(guard, number, batch, self.disturb(self, guard, number, compute))
        return found, made and number not in self.left_out, digest

    def again(self, number: int) -> int:
        """Counts the computations of an update, over all starts."""
        self.calls[number] = self.calls.get(number, 0) + 1
        return self.calls[number]


def carry_out(run: RunFolder, plant: Plant) -> BaseException | None:
    """The step under its supervisor, until its record is there or the ladder ends; what ended it."""

    def start(step: str, place: TrainPlace) -> None:
        del place
        plant.attempt += 1
        with replaced((Guard, "update", lambda *words: plant.update(*words))):
            steps.execute(run, QUIET, name=step)

    def examine(old: TrainPlace, new: TrainPlace) -> Any:
        return gate.examine(run, STEP, old, new)

    try:
        Supervisor(run, STEP, QUIET, start, examine).train()
    except (IsthmusError, KeyboardInterrupt) as error:
        return error
    return None


def end_of(run: RunFolder) -> str:
    """What the last checkpoint holds: the hash of its manifest."""
    return read_weights(run, STEP).checkpoint_sha256


def digests(run: RunFolder) -> list[tuple[int, str | None]]:
    """(number, digest of the batch) of each update, as the events tell it."""
    return [(event["step"], (event.get("watched") or {}).get("batch")) for event in run.events(STEP, "step")]
