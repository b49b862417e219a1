"""What the gate of a revert asks a pool to do: restore a checkpoint of a step, and compute the updates after it again.

Nothing of it is kept but a file with what was found.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from isthmus.chips import Chip, device_of, get_chip
from isthmus.errors import Diverged
from isthmus.model.digest import tensor_sha256
from isthmus.pools import Pool, get_pool
from isthmus.progress import Watch
from isthmus.recipe.steps import PretrainSection, RlSection, SftSection
from isthmus.records import TrainPlace
from isthmus.run import RunFolder, write_atomic
from isthmus.stages.steps.rl.beside import Beside
from isthmus.stages.steps.rl.crew import Crew
from isthmus.stages.steps.rl.learner import Learner
from isthmus.stages.steps.rl.loop import threads_of
from isthmus.stages.steps.rl.rollouts import read_replay
from isthmus.stages.steps.rl.state import State
from isthmus.stages.steps.step import StepRun
from isthmus.stages.steps.text import Gauges, TextStep, Training, Voice, empty_model
from isthmus.supervise.gate import Repeated, Restored, Seen
from isthmus.supervise.guard import WATCHED_MODULES, shared_digest, watched_figures
from isthmus.trainer.checkpoint import TrainingState, load_checkpoint, restore_rng, rng_state
from isthmus.trainer.checkpoint_files import StoredTensor, folder_step, read_manifest
from isthmus.trainer.mesh import Ranks, launched_world, open_ranks
from isthmus.trainer.optimizer import Optimizer
from isthmus.trainer.step import update_router_bias

BIAS = "e_score_correction_bias"
HOST_CHIP = "cpu"
STEP_COUNTS = "optimizer/adam.step."


def execute(run: RunFolder, watch: Watch, *, name: str, pool: str, at: int, count: int, host: bool, out: str) -> None:
    """Restore the checkpoint of update `at` on a pool, or in fp32 on the host, and write a `Repeated` to `out`.

    Raises DamagedFile if the checkpoint is not whole.
    """
    section, place = run.recipe.named(name), TrainPlace(pool, launched_world() or 1)
    home = get_pool(run.recipe, pool)
    device = "cpu" if host else device_of(home)
    if isinstance(section, RlSection):
        precision, threads = "fp32", threads_of(StepRun(run, section, place), home)
    else:
        assert isinstance(section, PretrainSection | SftSection)
        precision = "fp32" if host else run.recipe.train.precision_on(device)
        threads = max(1, home.threads // (launched_world() or 1))
    if device == "cpu":
        torch.set_num_threads(threads)
    with open_ranks(device, grouped=precision != "fp32") as ranks:
        if isinstance(section, RlSection):
            found = reinforced(StepRun(run, section, place), ranks, at, count)
        else:
            chip = get_chip(HOST_CHIP if host else home.chip)
            found = taught(StepRun(run, section, place), home, chip, precision, ranks, watch, at, count)
        if ranks.is_first:
            write_atomic(Path(out), json.dumps(asdict(found)).encode())
        ranks.wait()


def taught(
    step: TextStep, home: Pool, chip: Chip, precision: str, ranks: Ranks, watch: Watch, at: int, count: int
) -> Repeated:
    """Of a step on text."""
    module = importlib.import_module(f"isthmus.stages.steps.{step.section.kind}")
    voice = Voice(step, watch, is_first=False)
    model = empty_model(step, chip, ranks, precision, voice)
    gauges = Gauges(step, home, chip, precision, ranks, None)
    training = Training(step, module.text(step, ranks), model, ranks, voice, gauges)
    return repeated(training, checkpoint_of(step, at), count)


def checkpoint_of(step: StepRun[Any], at: int) -> Path:
    return step.folder / "checkpoints" / f"step-{at:06d}"


def repeated(training: Training, folder: Path, count: int) -> Repeated:
    """Fill a new training from a checkpoint, look at what it is filled with, and compute up to `count` updates."""
    loaded = load_checkpoint(folder, training.state(), training.ranks.storage)
    same_kind = restore_rng(loaded.extra["rng"], training.ranks.device)
    restored = examine(training.state(), training.optimizer, training.text.data, training.ranks, folder, same_kind)
    last = min(training.section.steps, loaded.step + count)
    left_out = {event["step"] for event in training.recorded if event.get("left_out")}
    seen = list[Seen]()
    try:
        for step in range(loaded.step, last):
            seen.append(_again(training, step, step + 1 in left_out))
    except Diverged as error:
        return Repeated(restored, seen, str(error))
    return Repeated(restored, seen)


def reinforced(step: StepRun[RlSection], ranks: Ranks, at: int, count: int) -> Repeated:
    """Of a step of reinforcement learning: its updates learn from the samples that were kept for this."""
    state = State.empty(step, Crew(ranks))
    state.is_trial = True
    return repeated_rl(state, checkpoint_of(step, at), count)


def repeated_rl(state: State, folder: Path, count: int) -> Repeated:
    """Fill an empty state from a checkpoint, look at what it is filled with, and compute up to `count` updates."""
    work, ranks = state.work, state.crew.ranks
    loaded = load_checkpoint(folder, state.stored({}), ranks.storage)
    state.step = loaded.step
    same_kind = restore_rng(loaded.extra["rng"], ranks.device)
    restored = examine(state.stored({}), state.optimizer, state.told["data"], ranks, folder, same_kind)
    learner = Learner(state, Beside.of(state, models_alone=True))
    told, seen = told_by(work), list[Seen]()
    for number in range(loaded.step, min(work.section.steps, loaded.step + count)):
        replay = read_replay(work, number)
        attempt, left_out = told.get(number + 1, (None, ()))
        if replay is None or attempt not in (None, replay.attempt):
            break
        state.seed()
        try:
            learnt = learner.again(replay.rollout, replay.scored, left_out)
        except Diverged as error:
            return Repeated(restored, seen, str(error))
        state.step += 1
        if learnt.updates:
            found = learnt.recorded()
            seen.append(Seen(update=number + 1, learning_rate=found["learning_rate"], **found["watched"]))
    return Repeated(restored, seen)


def told_by(work: StepRun[RlSection]) -> dict[int, tuple[int, Sequence[int]]]:
    """Of each recorded update: which start of the step made it, and which of its optimiser steps were left out."""
    attempt, found = 0, dict[int, tuple[int, Sequence[int]]]()
    for event in work.run.events(work.name):
        attempt += event["event"] == "start"
        if event["event"] == "step":
            found[event["step"]] = attempt, event.get("updates_left_out", ())
    return found


def examine(
    state: TrainingState, optimizer: Optimizer, data: str, ranks: Ranks, folder: Path, same_kind: bool
) -> Restored:
    """Hold what is in memory against what the files of a checkpoint say. All ranks make the call."""
    manifest, _ = read_manifest(folder)
    wrong, missing = dict[str, str](), list[str]()
    for key, tensor in state.keyed.items():
        if key.startswith(STEP_COUNTS):
            continue
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if (how := _difference(whole.detach().cpu(), manifest.tensors.get(key))) is None:
            continue
        if how == "is empty" and key.startswith("optimizer/"):
            missing.append(key.removeprefix("optimizer/"))
        else:
            wrong[f"bias/{key}" if key.endswith(BIAS) else key] = how
    counted = [float(tensor) for name, tensor in state.optimizer.items() if f"optimizer/{name}".startswith(STEP_COUNTS)]
    states = rng_state(ranks.device)
    found = Restored(
        step=folder_step(folder),
        tensors=wrong,
        missing=missing,
        rng=states == manifest.extra["rng"] if same_kind else states["cpu"] == manifest.extra["rng"]["cpu"],
        steps_counted=_count_of(counted),
        groups=optimizer.groups(),
        data=data,
    )
    return _together(found, ranks)


def _count_of(counted: list[float]) -> float:
    """Of all parameters; -1 if they differ.

    Those that no gradient ever reaches, as heads that reinforcement learning does not train, count nothing.
    """
    reached = {count for count in counted if count} or {0.0}
    return reached.pop() if len(reached) == 1 else -1.0


def _difference(here: Tensor, stored: StoredTensor | None) -> str | None:
    """What is wrong with a tensor, in words; None if it is what the file holds."""
    if stored is None:
        return "is not in the checkpoint"
    if here.dtype != stored.torch_dtype or tuple(here.shape) != stored.shape:
        return f"is {here.dtype} {list(here.shape)}, and was {stored.dtype} {list(stored.shape)}"
    for chunk in stored.chunks:
        part = here
        for dimension, (start, size) in enumerate(zip(chunk.offset, chunk.shape, strict=True)):
            part = part.narrow(dimension, start, size)
        if tensor_sha256(part.contiguous()) != chunk.sha256:
            return "is empty" if not here.any() else "has other values"
    return None


def _together(found: Restored, ranks: Ranks) -> Restored:
    """What all ranks found: each holds experts of its own."""
    if ranks.world == 1:
        return found
    every: list[Any] = [None] * ranks.world
    dist.all_gather_object(every, found)
    tensors: Mapping[str, str] = {key: how for one in every for key, how in one.tensors.items()}
    missing = sorted({name for one in every for name in one.missing})
    return Restored(**{**asdict(found), "tensors": tensors, "missing": missing})


def _again(training: Training, step: int, left_out: bool) -> Seen:
    """One update, made or left out as it was."""
    batch = training.text.batch(step)
    found = training.compute(batch)
    digest = shared_digest(batch, training.ranks)
    watched = watched_figures(found, training.optimizer.module_norms(WATCHED_MODULES), digest)
    rate = training.section.optimizer.learning_rate * training.optimizer.schedule(step)
    if not left_out:
        training.optimizer.apply(step, found.norm)
        update_router_bias(training.model.routers(), found.rest.loads, training.section.bias_update_speed)
    training.optimizer.forget()
    return Seen(update=step + 1, learning_rate=rate, **watched)
