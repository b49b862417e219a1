"""What the gate of a revert asks a pool to do: restore a checkpoint of a step, and compute the updates after it again.

Nothing of it is kept but a file with what was found.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from isthmus.chips import device_of, get_chip
from isthmus.model.digest import tensor_sha256
from isthmus.pools import get_pool
from isthmus.progress import Watch
from isthmus.recipe.steps import PretrainSection, SftSection
from isthmus.records import TrainPlace
from isthmus.run import RunFolder, write_atomic
from isthmus.stages.steps.step import StepRun
from isthmus.stages.steps.text import WATCHED_MODULES, Gauges, TextStep, Training, Voice, empty_model
from isthmus.supervise.gate import Repeated, Restored, Seen
from isthmus.supervise.guard import digest_of, watched_figures
from isthmus.trainer.checkpoint import load_checkpoint, restore_rng, rng_state
from isthmus.trainer.checkpoint_files import StoredTensor, folder_step, read_manifest
from isthmus.trainer.mesh import Ranks, launched_world, open_ranks
from isthmus.trainer.step import update_router_bias

BIAS = "e_score_correction_bias"
HOST_CHIP = "cpu"
STEP_COUNTS = "optimizer/adam.step."


def execute(run: RunFolder, watch: Watch, *, name: str, pool: str, at: int, count: int, host: bool, out: str) -> None:
    """Restore the checkpoint of update `at` on a pool, or in fp32 on the host, and write a `Repeated` to `out`.

    Raises DamagedFile if the checkpoint is not whole.
    """
    section = run.recipe.named(name)
    assert isinstance(section, PretrainSection | SftSection)
    step: TextStep = StepRun(run, section, TrainPlace(pool, launched_world() or 1))
    module = importlib.import_module(f"isthmus.stages.steps.{step.section.kind}")
    home = get_pool(run.recipe, pool)
    device = "cpu" if host else device_of(home)
    precision = "fp32" if host else run.recipe.train.precision_on(device)
    if device == "cpu":
        torch.set_num_threads(max(1, home.threads // (launched_world() or 1)))
    with open_ranks(device, grouped=precision != "fp32") as ranks:
        chip, voice = get_chip(HOST_CHIP if host else home.chip), Voice(step, watch, is_first=False)
        model = empty_model(step, chip, ranks, precision, voice)
        gauges = Gauges(step, home, chip, precision, ranks, None)
        training = Training(step, module.text(step, ranks), model, ranks, voice, gauges)
        found = repeated(training, step.folder / "checkpoints" / f"step-{at:06d}", count)
        if ranks.is_first:
            write_atomic(Path(out), json.dumps(asdict(found)).encode())
        ranks.wait()


def repeated(training: Training, folder: Path, count: int) -> Repeated:
    """Fill a new training from a checkpoint, look at what it is filled with, and compute up to `count` updates."""
    loaded = load_checkpoint(folder, training.state(), training.ranks.storage)
    same_kind = restore_rng(loaded.extra["rng"], training.ranks.device)
    restored = examine(training, folder, same_kind)
    last = min(training.section.steps, loaded.step + count)
    left_out = {event["step"] for event in training.recorded if event.get("left_out")}
    return Repeated(restored, [_again(training, step, step + 1 in left_out) for step in range(loaded.step, last)])


def examine(training: Training, folder: Path, same_kind: bool) -> Restored:
    """Hold what is in memory against what the files of a checkpoint say. All ranks make the call."""
    manifest, _ = read_manifest(folder)
    state, optimizer = training.state(), training.optimizer
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
    states = rng_state(training.ranks.device)
    found = Restored(
        step=folder_step(folder),
        tensors=wrong,
        missing=missing,
        rng=states == manifest.extra["rng"] if same_kind else states["cpu"] == manifest.extra["rng"]["cpu"],
        steps_counted=counted[0] if len(set(counted)) == 1 else -1.0,
        groups=optimizer.groups(),
        data=training.text.data,
    )
    return _together(found, training.ranks)


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
    batch, ranks = training.text.batch(step), training.ranks
    found = training.compute(batch)
    own = digest_of(batch)
    halves = ranks.total(torch.tensor([own >> 31, own % (1 << 31)], device=ranks.device)).tolist()
    digest = f"{((halves[0] << 31) + halves[1]) % (1 << 62):016x}"
    watched = watched_figures(found, training.optimizer.module_norms(WATCHED_MODULES), digest)
    rate = training.section.optimizer.learning_rate * training.optimizer.schedule(step)
    if not left_out:
        training.optimizer.apply(step, found.norm)
        update_router_bias(training.model.routers(), found.rest.loads, training.section.bias_update_speed)
    training.optimizer.forget()
    return Seen(update=step + 1, learning_rate=rate, **watched)
