"""Planted incidents and broken restores of a tiny step on text, beside an undisturbed twin, all in one process.

    python -m benchmarks.revert                   # 60 incidents and 60 restores: minutes on an idle core
    python -m benchmarks.revert --count 6 --quick # a few of each, and no result is stored

An incident is planted at a drawn update: a loss that is no number once (retry), a batch that never gives a number (skip
batch), one computation of two that is wrong (retry), one that never repeats (handed to the supervisor). It is found if
there is an incident of its kind, right if the rung is the expected one, and a retried step has to end with the twin's
bits. A restore is broken after the checkpoint was read, and the gate has to refuse it by the right name; beside it
stands what a comparison of the loss alone, within 1 % and 2 %, would have let through. Healthy restores have to go.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import random
import shutil
import tempfile
import time
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from benchmarks.conditions import store
from isthmus.errors import Diverged, IsthmusError, Unrepeatable
from isthmus.progress import Watch
from isthmus.recipe.read import parse_recipe
from isthmus.records import Placement, PlanRecord, incidents, read_weights
from isthmus.run import RunFolder
from isthmus.stages import steps
from isthmus.stages.steps import repeat, text
from isthmus.supervise import gate
from isthmus.supervise.guard import Computed
from isthmus.trainer.checkpoint import LoadedCheckpoint

STEP, UPDATES, EVERY, AT = "taught", 9, 3, 3
RECIPE = f"""
name = "revert"
[model]
preset = "r-nano"
hidden_size = 32
intermediate_size = 64
moe_intermediate_size = 24
num_hidden_layers = 2
[pools.home]
chip = "cpu"
threads = 1
[place]
train = ["home"]
rollout = ["home"]
serve = ["home"]
[tasks.countdown]
teacher_give_up = 0.9
[supervise]
repeat_every = {EVERY}
skips = 1
[[step]]
name = "{STEP}"
kind = "sft"
from = "model"
steps = {UPDATES}
batch_size = 4
checkpoint_every = {EVERY}
keep_checkpoints = 4
[step.optimizer]
name = "adamw"
learning_rate = 3e-3
"""
NAN = math.nan
INCIDENTS = {
    "no number once": ("not finite", "retry"),
    "no number ever": ("not finite", "skip batch"),
    "wrong once": ("repeat differs", "retry"),
    "never the same": ("repeat differs", None),
}
"""The signal and the rung that are expected; None: it is handed to the supervisor."""
Compute = Any
"""A method `compute` of a training."""
SOUND: Compute = text.Training.compute


def new_run(folder: Path) -> RunFolder:
    run = RunFolder.create(folder, parse_recipe(tomllib.loads(RECIPE)))
    places = [Placement(stage=stage, pool="home", reason="the only one") for stage in ("train", "rollout", "serve")]
    plan = PlanRecord(recipe_sha256="0", started=0, ended=0, placements=places, rejected=[], estimate={})
    run.write_record("plan", plan)
    return run


def train(run: RunFolder, compute: Compute = SOUND) -> str | None:
    """The name of the error that ended the step, None if it came to its end."""
    text.Training.compute = compute
    try:
        steps.execute(run, Watch(quiet=True), name=STEP)
    except (Diverged, Unrepeatable) as error:
        return type(error).__name__
    finally:
        text.Training.compute = SOUND
    return None


def planted(kind: str, update: int, chance: random.Random) -> Compute:
    """`compute` that goes wrong at an update, counted from 1."""
    calls = Counter[int]()
    batches: list[Any] = []

    def compute(training: text.Training, batch: Any) -> Computed[Any]:
        if not any(one is batch for one in batches):
            batches.append(batch)
        now = len(batches)
        calls[now] += 1
        found = SOUND(training, batch)
        if now != update:
            return found
        if kind == "no number ever" or (kind == "no number once" and calls[now] == 1):
            return dataclasses.replace(found, loss=NAN, norm=NAN)
        if kind == "never the same" or (kind == "wrong once" and calls[now] == 2):
            return dataclasses.replace(found, norm=found.norm * (1 + 10 ** chance.uniform(-6, -1)))
        return found

    return compute


def one_incident(kind: str, folder: Path, twin: str, chance: random.Random) -> dict[str, Any]:
    update = chance.choice([3, 6]) if kind in ("wrong once", "never the same") else chance.randint(2, UPDATES - 1)
    run = new_run(folder)
    ended = train(run, planted(kind, update, chance))
    met = incidents(run, STEP)
    signal, rung = INCIDENTS[kind]
    signals = {signal, "repeat differs"}  # an update that is computed twice may show it so
    found = any(one.signal in signals and one.update == update for one in met) or ended == "Unrepeatable"
    last = met[-1].rung if met and ended is None else None
    counted = [event["step"] for event in run.events(STEP, "step")]
    once = counted == list(range(1, len(counted) + 1))
    same = None if rung != "retry" else ended is None and read_weights(run, STEP).checkpoint_sha256 == twin
    return {"kind": kind, "found": found, "right": last == rung and len(met) < 3, "once": once, "same": same}


def _zero_moments(training: text.Training, _loaded: LoadedCheckpoint) -> None:
    for name, tensor in training.optimizer.state().items():
        if "exp_avg" in name:
            tensor.zero_()


def _reset_step(training: text.Training, _loaded: LoadedCheckpoint) -> None:
    for name, tensor in training.optimizer.state().items():
        if ".step." in name:
            tensor.zero_()


def _stale_bias(training: text.Training, _loaded: LoadedCheckpoint) -> None:
    for router in training.model.routers():
        if router.e_score_correction_bias is not None:
            router.e_score_correction_bias.add_(1e-3)


@torch.no_grad()
def _bf16_masters(training: text.Training, _loaded: LoadedCheckpoint) -> None:
    for parameter in training.model.parameters():
        parameter.copy_(parameter.bfloat16().float())


@torch.no_grad()
def _transposed(training: text.Training, _loaded: LoadedCheckpoint) -> None:
    matrix = next(parameter for parameter in training.model.parameters() if parameter.dim() == 2)
    matrix.copy_(matrix.t().reshape(matrix.shape))


def _fresh_random_state(_training: text.Training, _loaded: LoadedCheckpoint) -> None:
    torch.manual_seed(12345)


def _schedule_restarted(training: text.Training, _loaded: LoadedCheckpoint) -> None:
    training.optimizer.schedule = lambda step: 0.5


def _other_order(training: text.Training, _loaded: LoadedCheckpoint) -> None:
    sound = training.text
    training.text = dataclasses.replace(sound, batch=lambda number: sound.batch(number + 1))


RESTORES = {
    "healthy": (lambda _training, _loaded: None, None),
    "moments dropped": (_zero_moments, "moments of every parameter"),
    "step reset": (_reset_step, "step count"),
    "stale router bias": (_stale_bias, "router bias"),
    "masters in bf16": (_bf16_masters, "model weights"),
    "a layer transposed": (_transposed, "model weights"),
    "random state fresh": (_fresh_random_state, "random streams"),
    "schedule restarted": (_schedule_restarted, "learning rate"),
    "another order of data": (_other_order, "digest of the batch"),
}


def one_restore(kind: str, run: RunFolder, at: int) -> dict[str, Any]:
    """What the gate says of a restore, and what the loss of the first updates alone would have said."""
    breaks, named = RESTORES[kind]
    sound = repeat.examine

    def broken(training: text.Training, folder: Path, same_kind: bool) -> gate.Restored:
        breaks(training, None)  # pyright: ignore[reportArgumentType]
        return sound(training, folder, same_kind)

    out, seen = run.path / "repeat.json", gate.recorded(run.events(STEP))
    repeat.examine = broken
    try:
        repeat.execute(
            run, Watch(quiet=True), name=STEP, pool="home", at=at, count=gate.COUNT, host=False, out=str(out)
        )
    finally:
        repeat.examine = sound
    found = gate.Repeated.read(out)
    saved = {"groups": found.restored.groups, "data": found.restored.data}
    verdict = gate.judge([at], seen, lambda _at, _side: found, lambda _at: saved, lambda at: at, gate.SAME)
    gaps = [abs((one.loss or NAN) / (seen[one.update].loss or NAN) - 1) for one in found.seen]
    right = verdict.verdict == "go" if named is None else verdict.verdict == "refuse" and named in verdict.reason
    loss = {f"passes_{limit}": all(gap <= limit / 100 for gap in gaps) for limit in (1, 2)}
    return {"kind": kind, "right": right, "reason": verdict.reason, **loss}


def measure(count: int, seed: int, folder: Path) -> dict[str, Any]:
    chance = random.Random(seed)
    twin = new_run(folder / "twin")
    began = time.perf_counter()
    assert train(twin) is None
    undisturbed_s = time.perf_counter() - began
    sha256 = read_weights(twin, STEP).checkpoint_sha256
    healthy_alarms = len(incidents(twin, STEP))
    met, restores = [], []
    for index in range(count):
        kind = list(INCIDENTS)[index % len(INCIDENTS)]
        met.append(one_incident(kind, folder / "incident", sha256, chance))
        shutil.rmtree(folder / "incident")
        restores.append(one_restore(list(RESTORES)[index % len(RESTORES)], twin, chance.choice([3, 6])))
        print(met[-1], restores[-1], flush=True)
    return {
        "incidents": count,
        "found": sum(one["found"] for one in met),
        "right_rung": sum(one["right"] for one in met),
        "events_once": sum(one["once"] for one in met),
        "retried": sum(one["same"] is not None for one in met),
        "retried_same_bits": sum(one["same"] is True for one in met),
        "false_alarms_of_the_twin": healthy_alarms,
        "restores": dict(Counter(one["kind"] for one in restores)),
        "restores_right": sum(one["right"] for one in restores),
        "restores_wrong": [one for one in restores if not one["right"]],
        "broken_that_loss_alone_passes": {
            f"{limit} %": sum(one[f"passes_{limit}"] for one in restores if one["kind"] != "healthy")
            for limit in (1, 2)
        },
        "undisturbed_s": round(undisturbed_s, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=60, help="planted incidents, and as many restores")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="store no result")
    options = parser.parse_args()
    if options.count < 1:
        raise IsthmusError("--count must be at least 1")
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options.count, options.seed, Path(folder))
    print(result)
    if not options.quick:
        store("revert", result)


if __name__ == "__main__":
    main()
