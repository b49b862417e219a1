"""Broken restores that the gate of a revert has to refuse by name, and healthy ones, for benchmarks/revert.py.

A restore is broken in memory after its checkpoint was read, as the faults of others were: nothing of it shows in the
files. `a file of an older checkpoint` is the one that does.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.revert_steps import EVERY, KINDS, QUIET, STEP, replaced
from isthmus.model.model import Model
from isthmus.run import RunFolder
from isthmus.stages.steps import repeat, text
from isthmus.supervise import gate
from isthmus.trainer.checkpoint import TrainingState
from isthmus.trainer.optimizer import Optimizer

BIAS = "e_score_correction_bias"


@dataclass(frozen=True)
class Filled:
    """What a restore filled, and the tensors of the checkpoint before, by the keys of a manifest."""

    state: TrainingState
    optimizer: Optimizer
    older: dict[str, Tensor]
    seed: int

    def named(self, *parts: str) -> list[Tensor]:
        return [tensor for name, tensor in self.state.keyed.items() if all(part in name for part in parts)]


def moments_dropped(filled: Filled) -> None:
    for tensor in filled.named("optimizer/", "exp_avg"):
        tensor.zero_()


def half_of_the_moments(filled: Filled) -> None:
    """Those of the second kind alone."""
    for tensor in filled.named("optimizer/", "exp_avg_sq"):
        tensor.zero_()


def step_reset(filled: Filled) -> None:
    for tensor in filled.named("adam.step."):
        tensor.zero_()


def stale_bias(filled: Filled) -> None:
    """Of the checkpoint before; where that has the same, of before any update."""
    older = {name: tensor for name, tensor in filled.older.items() if name.endswith(BIAS)}
    same = all(filled.state.keyed[name].equal(tensor) for name, tensor in older.items())
    for name, tensor in older.items():
        filled.state.keyed[name].copy_(tensor + 1e-3 if same else tensor)


def older_shard(filled: Filled) -> None:
    """A quarter of the weights is that of the checkpoint before."""
    names = sorted(name for name in filled.older if name.startswith("model/") and not name.endswith(BIAS))
    for name in names[: len(names) // 4]:
        filled.state.keyed[name].copy_(filled.older[name])


def bf16_masters(filled: Filled) -> None:
    for name, tensor in filled.state.keyed.items():
        if name.startswith("model/") and not name.endswith(BIAS):
            tensor.copy_(tensor.bfloat16().float())


def transposed(filled: Filled) -> None:
    matrix = next(tensor for tensor in filled.named("model/", "layers.1", "proj") if tensor.dim() == 2)
    matrix.copy_(matrix.t().reshape(matrix.shape))


def fresh_random_state(_filled: Filled) -> None:
    torch.seed()


def first_random_state(filled: Filled) -> None:
    """That of the start of the step: epoch 0's. Training on text draws nothing, so there it is the right one."""
    torch.manual_seed(filled.seed)


def schedule_restarted(filled: Filled) -> None:
    """It begins anew at the checkpoint."""
    sound = filled.optimizer.schedule
    filled.optimizer.schedule = lambda step: sound(step % EVERY)


def nothing(_filled: Filled) -> None: ...


@contextmanager
def first_order_again(run: RunFolder) -> Iterator[None]:
    """Data from the start of the order, and the position says otherwise."""
    section = run.recipe.named(STEP)
    if section.kind == "rl":
        read = repeat.read_replay
        with replaced(
            (repeat, "read_replay", lambda work, number: read(work, EVERY if number > EVERY else number + 1))
        ):
            yield
        return
    module = importlib.import_module(f"isthmus.stages.steps.{section.kind}")
    sound = module.text

    def shifted(step: Any, ranks: Any) -> Any:
        made = sound(step, ranks)
        return dataclasses.replace(made, batch=lambda number: made.batch(number - EVERY))

    with replaced((module, "text", shifted)):
        yield


@contextmanager
def counted_twice(_run: RunFolder) -> Iterator[None]:
    """Gradients that are accumulated twice."""
    sound = text.accumulate_gradients

    def accumulate(model: Model, *rest: Any) -> Any:
        found = sound(model, *rest)
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(2.0)
        return found

    with replaced((text, "accumulate_gradients", accumulate)):
        yield


@dataclass(frozen=True)
class Restore:
    """`names` of which the refusal has to have one; none: it has to go."""

    names: tuple[str, ...]
    breaks: Callable[[Filled], None] = nothing
    within: Callable[[RunFolder], Any] | None = None
    kinds: tuple[str, ...] = KINDS


RESTORES = {
    "random state fresh": Restore(("random streams",), fresh_random_state),
    "random state of epoch 0": Restore(("random streams",), first_random_state, kinds=("rl",)),
    "order of epoch 0": Restore(("digest of the batch",), within=first_order_again),
    "moments dropped": Restore(("moments of every parameter",), moments_dropped),
    "second moments dropped": Restore(("moments of every parameter",), half_of_the_moments),
    "step reset": Restore(("step count",), step_reset),
    "schedule restarted": Restore(("learning rate",), schedule_restarted),
    "stale router bias": Restore(("router bias",), stale_bias),
    "a shard of an older checkpoint": Restore(("model weights",), older_shard),
    "masters in bf16": Restore(("model weights",), bf16_masters),
    "a layer transposed": Restore(("model weights",), transposed),
    "accumulated twice": Restore(("norm of the gradient",), within=counted_twice, kinds=("sft", "pretrain")),
}
HEALTHY = Restore(())
FILE = "a file of an older checkpoint"


def checkpoint(run: RunFolder, at: int) -> Path:
    return run.step_folder(STEP) / "checkpoints" / f"step-{at:06d}"


def one_restore(name: str, run: RunFolder, at: int) -> dict[str, Any]:
    """What the gate says of the restore of an update's checkpoint, and what the loss of the updates after it says."""
    restore = RESTORES.get(name, HEALTHY)
    sound, older = repeat.examine, _tensors(run, at - EVERY)

    @torch.no_grad()
    def examine(state: TrainingState, optimizer: Optimizer, *rest: Any) -> gate.Restored:
        restore.breaks(Filled(state, optimizer, older, run.recipe.seed))
        return sound(state, optimizer, *rest)

    with ExitStack() as within:
        within.enter_context(replaced((repeat, "examine", examine)))
        if restore.within is not None:
            within.enter_context(restore.within(run))
        found, verdict = asked(run, at)
    right = (
        verdict.verdict == "refuse" and any(one in verdict.reason for one in restore.names)
        if restore.names
        else verdict.verdict == "go"
    )
    return {
        "kind": name,
        "step": run.recipe.named(STEP).kind,
        "verdict": verdict.verdict,
        "right": right,
        "reason": verdict.reason,
        **_by_loss(run, found),
    }


def asked(run: RunFolder, at: int) -> tuple[gate.Repeated | None, Any]:
    """The gate over one checkpoint, by what a pool of the same kind makes of it; (that, the verdict)."""
    out, kept = run.path / "repeat.json", list[gate.Repeated]()

    def again(step: int, _side: gate.Side) -> gate.Repeated:
        if not kept:
            repeat.execute(run, QUIET, name=STEP, pool="home", at=step, count=gate.COUNT, host=False, out=str(out))
            kept.append(gate.Repeated.read(out))
            out.unlink()
        return kept[0]

    def saved(step: int) -> Any:
        return repeat.read_manifest(checkpoint(run, step))[0].extra

    events = run.events(STEP)
    reinforced = run.recipe.named(STEP).kind == "rl"
    verdict = gate.judge(
        [at], gate.recorded(events), again, saved, lambda step: gate.updates_made(events, step, reinforced), gate.SAME
    )
    return (kept[0] if kept else None), verdict


def of_files(run: RunFolder, at: int, place: Path) -> dict[str, Any]:
    """A file of the weights is that of the checkpoint before: it does not match its hash."""
    shutil.copytree(run.path, place)
    copy = RunFolder.open(place)
    path = next(checkpoint(copy, at).glob("model-*.safetensors"))
    shutil.copyfile(checkpoint(copy, at - EVERY) / path.name, path)
    _, verdict = asked(copy, at)
    shutil.rmtree(place)
    right = verdict.verdict == "refuse" and "does not match its hash" in verdict.reason
    told = {"kind": FILE, "step": run.recipe.named(STEP).kind, "verdict": verdict.verdict, "right": right}
    return told | {"reason": verdict.reason, "passes_1": None, "passes_2": None}


def _tensors(run: RunFolder, at: int) -> dict[str, Tensor]:
    """Of a checkpoint, by the keys of a manifest: of one rank, where all are whole."""
    return {
        f"{path.name.partition('-')[0]}/{name}": tensor
        for path in checkpoint(run, at).glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def _by_loss(run: RunFolder, found: gate.Repeated | None) -> dict[str, bool | None]:
    """Whether a comparison of losses within 1 % and 2 % lets it through."""
    if found is None:
        return {"passes_1": None, "passes_2": None}
    seen = gate.recorded(run.events(STEP))
    pairs = [(seen[one.update].loss, one.loss) for one in found.seen if one.update in seen]
    gaps = [abs(new - old) / abs(old) if old and new is not None else math.nan for old, new in pairs]
    return {f"passes_{limit}": all(gap <= limit / 100 for gap in gaps) for limit in (1, 2)}
