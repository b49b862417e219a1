"""Training on text, whatever the text is: `pretrain` and `sft` say which rows a step has, here they are learnt.

A pool with several chips is trained on by one rank per chip, started here or by torchrun. The order of the data depends
on the seed and the step alone, whatever the number of ranks, so a run that was killed continues from its last
checkpoint as if nothing had happened, also on another number of ranks.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from isthmus.chips import Chip, device_of, get_chip
from isthmus.errors import IsthmusError
from isthmus.forecast.count import training_flops
from isthmus.formats.parts.assemble import unfilled
from isthmus.launch.local import run_ranks
from isthmus.model.model import Model
from isthmus.model.moe import Experts
from isthmus.pools import Pool
from isthmus.progress import Counter, Watch
from isthmus.recipe.steps import PretrainSection, SftSection
from isthmus.records import TextRecord
from isthmus.run import Figure
from isthmus.stages.steps.drilled import Drill
from isthmus.stages.steps.step import StepRun
from isthmus.supervise.guard import WATCHED_MODULES, Computed, Guard, watched_figures
from isthmus.trainer.batch import Batch
from isthmus.trainer.checkpoint import CheckpointWriter, SavedCheckpoint, TrainingState, resume, rng_state
from isthmus.trainer.compiled import compile_parts
from isthmus.trainer.mesh import Ranks, check_layout, launched_world, open_ranks
from isthmus.trainer.observe import Profiler, TensorBoard, expert_imbalance, mfu, peak_memory, profiler
from isthmus.trainer.optimizer import Optimizer
from isthmus.trainer.parallel import distribute, materialise
from isthmus.trainer.parts import model_state
from isthmus.trainer.step import StepLosses, accumulate_gradients, update_router_bias

TRACED_STEPS = (2, 1, 3)
"""Steps of a profile: before it, to warm up, and in the trace."""
TextStep = StepRun[PretrainSection | SftSection]


@dataclass(frozen=True)
class Text:
    """What a step learns: `batch(number)` gives this rank's rows of an update. `title` stands before its progress."""

    title: str
    batch: Callable[[int], Batch]
    data: str
    """Identifies the order of the data: a position means something only in the same order."""


@dataclass(frozen=True)
class Voice:
    """Speaks for all ranks: what the first says is written and shown."""

    step: TextStep
    watch: Watch
    is_first: bool

    def event(self, event: str, **fields: Any) -> None:
        if self.is_first:
            self.step.event(event, **fields)

    def note_events(self) -> None:
        if self.is_first:
            self.step.run.note_events()

    def say(self, text: str) -> None:
        if self.is_first:
            self.watch.say(text)


def learn(step: TextStep, watch: Watch, text: Callable[[Ranks], Text], *, profile: bool) -> TextRecord:
    """Train from the last checkpoint, or from the step's start, to its number of updates, on one rank or several.

    `profile` writes a Chrome trace of a few updates of the first rank to `profile/`.
    """
    started, recipe = time.time(), step.recipe
    pool = step.home
    check_layout(step.architecture, recipe.train, launched_world() or pool.ranks)
    start = step.start
    if pool.ranks > 1 and launched_world() is None:
        options: dict[str, str | bool] = {"name": step.name, "profile": profile}
        run_ranks("steps", step.run.path, options, pool.ranks, step.folder / "ranks")
        return step.run.require_record(f"steps/{step.name}/record", TextRecord, "run")
    device, chip = device_of(pool), get_chip(pool.chip)
    precision = recipe.train.precision_on(device)
    if device == "cpu":
        torch.set_num_threads(max(1, pool.threads // (launched_world() or 1)))
    torch.manual_seed(recipe.seed)
    drill = Drill.of(step.run, step.name, pool, int(os.environ.get("RANK", "0")))
    with open_ranks(device, grouped=precision != "fp32") as ranks:
        voice = Voice(step, watch, ranks.is_first)
        voice.event("start", pool=pool.name, ranks=ranks.world, precision=precision, start=start.name)
        model = empty_model(step, chip, ranks, precision, voice)
        with _traced(step, voice, profile) as tracing:
            gauges = Gauges(step, pool, chip, precision, ranks, tracing)
            training = Training(step, text(ranks), model, ranks, voice, gauges, drill)
            with ExitStack() as played:
                if drill is not None:
                    played.enter_context(drill.under_way())
                    played.enter_context(drill.on_chip())
                saved = training.finish()
            if ranks.is_first:
                record = _record(step, pool, started, saved)
                step.run.write_record(f"steps/{step.name}/record", record)
                step.event("end", seconds=round(record.seconds, 3))
            ranks.wait()
    return step.run.require_record(f"steps/{step.name}/record", TextRecord, "run")


def empty_model(step: TextStep, chip: Chip, ranks: Ranks, precision: str, voice: Voice) -> Model:
    """The model of a step, sharded if there is a group of ranks, with room for its weights."""
    recipe = step.recipe
    model = unfilled(step.architecture)
    if recipe.train.activation_checkpointing:
        model.recompute_activations()
    if recipe.train.compile:
        compile_parts(model)
    _choose_expert_kernels(model, chip, ranks, precision, voice)
    if ranks.grouped:
        distribute(model, ranks, recipe.train, torch.bfloat16 if precision == "bf16" else torch.float32)
    materialise(model, ranks.device)
    return model


def _choose_expert_kernels(model: Model, chip: Chip, ranks: Ranks, precision: str, voice: Voice) -> None:
    """One grouped kernel for all experts where the chip has it. The other way needs the counts on the host."""
    experts = [module for module in model.modules() if isinstance(module, Experts)]
    aligned = all(module.aligned for module in experts)
    grouped = bool(chip.capabilities.grouped_matmul) and precision == "bf16" and aligned
    for module in experts:
        module.grouped = grouped
    if experts and not grouped and ranks.device.type != "cpu":
        why = f"no grouped product in {precision} is known for {chip.name}"
        why = why if aligned else "hidden_size and moe_intermediate_size must be multiples of 8 for a grouped product"
        voice.event("fallback", what="a matrix product for each expert", why=why)


@contextmanager
def _traced(step: TextStep, voice: Voice, asked: bool) -> Iterator[Profiler | None]:
    """A trace of the first rank, if it is asked for, and what became of it."""
    if not asked or not voice.is_first:
        yield None
        return
    with profiler(step.run.path / "profile" / f"{step.name}.json", *TRACED_STEPS) as tracing:
        yield tracing
    if tracing.written is None:
        voice.event("fallback", what="no trace", why=f"a trace needs more than {sum(TRACED_STEPS[:2])} steps to train")
    voice.say(f"  trace: {tracing.written or 'none, there were too few steps left to train'}")


class Training:
    """A step under way: its optimiser and its checkpoints."""

    def __init__(
        self,
        step: TextStep,
        text: Text,
        model: Model,
        ranks: Ranks,
        voice: Voice,
        gauges: Gauges,
        drill: Drill | None = None,
    ):
        self.drill = drill
        self.text, self.model, self.ranks, self.voice, self.gauges = text, model, ranks, voice, gauges
        self.section, self.recipe, self.start = step.section, step.recipe, step.start
        shared_by = self.recipe.train.replicate
        self.optimizer = Optimizer(model, self.section.optimizer, self.section.steps, ranks, shared_by)
        self.checkpoints = CheckpointWriter(step.folder / "checkpoints", self.section.keep_checkpoints, ranks.storage)
        self.guard = Guard(step.run, step.name, step.place, ranks, voice.watch)

    @property
    def recorded(self) -> list[dict[str, Any]]:
        """The events of the updates that were made or left out so far."""
        return self.voice.step.events("step")

    def finish(self) -> SavedCheckpoint:
        """All updates that are not done yet. Returns the last checkpoint."""
        done = self._resume()
        if done is None:
            self.start.fill(self.model, self.recipe.seed, self.ranks.storage, self.voice.event)
        if done is not None and done.step == self.section.steps:
            return done
        step = done.step if done else 0
        with (
            self.gauges.curves(first_step=step + 1),
            self.voice.watch.count(self.text.title, self.section.steps) as counter,
            self.guard.watching(),
        ):
            counter.advance_to(step)
            while step < self.section.steps:
                self._step(step, counter)
                step += 1
                if step % self.section.checkpoint_every == 0 or step == self.section.steps:
                    self.checkpoints.save(step, self.state())
                    self.voice.note_events()
                else:
                    self.guard.leave(step, lambda step=step: self._save_now(step))
        saved = self.checkpoints.finish()
        assert saved is not None
        return saved

    def _step(self, step: int, counter: Counter) -> None:
        began = time.perf_counter()
        if self.drill is not None:
            self.drill.update(step + 1)
        batch = self.text.batch(step)
        found, made, digest = self.guard.update(step + 1, batch, lambda: self.compute(batch))
        losses: StepLosses = found.rest
        modules = self.optimizer.module_norms(WATCHED_MODULES)
        if made:
            self.optimizer.apply(step, found.norm)
            update_router_bias(self.model.routers(), losses.loads, self.section.bias_update_speed)
        self.optimizer.forget()
        seconds = time.perf_counter() - began
        self.gauges.trace_step()
        self.guard.after(step + 1, seconds)
        if not self.ranks.is_first:
            return
        losses = losses.on_host()
        rate = self.section.optimizer.learning_rate * self.optimizer.schedule(step)
        measures = self.gauges.measures(losses, batch.mean_context, seconds)
        measures |= {"grad_norm": _finite(found.norm, 4), "learning_rate": rate}
        watched = watched_figures(found, modules, digest)
        self.gauges.tell(step + 1, losses, measures, {"watched": watched} | ({} if made else {"left_out": True}))
        counter.advance_to(step + 1, _status(losses, measures))

    def compute(self, batch: Batch) -> Computed[StepLosses]:
        """The losses of an update, with its gradients measured and not applied."""
        self.optimizer.forget()
        rows_at_once = self.recipe.train.rows_per_microbatch
        losses = accumulate_gradients(self.model, self.optimizer, batch, self.section, self.ranks, rows_at_once)
        return Computed(losses.loss, self.optimizer.measure(), losses)

    def _save_now(self, step: int) -> None:
        self.checkpoints.save(step, self.state())
        self.checkpoints.finish()
        self.voice.note_events()

    def state(self) -> TrainingState:
        """What a checkpoint holds; the tensors are the training's own."""
        extra = {"data": self.text.data, "rng": rng_state(self.ranks.device), "groups": self.optimizer.groups()}
        return TrainingState(model_state(self.model), self.optimizer.state(), extra)

    def _resume(self) -> SavedCheckpoint | None:
        """Load the newest whole checkpoint of the step into model and optimiser; None if there is none."""
        event = self.voice.event
        root, ranks = self.checkpoints.root, self.ranks
        loaded = resume(root, self.state(), ranks.storage, ranks.device, event, self.voice.say)
        if loaded is None:
            return None
        if loaded.extra["data"] != self.text.data:
            raise IsthmusError(
                f"{loaded.folder} was trained on other data than the recipe now reads: the files, the tokenizer or "
                "their order have changed, so its position in them means nothing. Restore the data, or start a new "
                "run folder."
            )
        event("resume", from_step=loaded.step)
        self.voice.say(f"  continuing {self.text.title} from the checkpoint at step {loaded.step}")
        return SavedCheckpoint(loaded.folder, loaded.step, loaded.sha256)


@dataclass
class Gauges:
    """What one sees of an update beside its losses, as the first rank sees it."""

    step: TextStep
    pool: Pool
    chip: Chip
    precision: str
    ranks: Ranks
    tracing: Profiler | None
    board: TensorBoard | None = None

    @contextmanager
    def curves(self, first_step: int) -> Iterator[None]:
        """Draw the step for TensorBoard from an update on, if the recipe wants it."""
        if not self.step.recipe.train.tensorboard or not self.ranks.is_first:
            yield
            return
        self.board = TensorBoard(self.step.folder / "tensorboard", first_step)
        with closing(self.board):
            yield

    def trace_step(self) -> None:
        if self.tracing is not None:
            self.tracing.step()

    def measures(self, losses: StepLosses, context: float, seconds: float) -> dict[str, float | None]:
        """Of a step in which tokens attended to `context` others on average. Memory is that of the first rank."""
        rate = Figure.measured(losses.tokens / seconds, "tokens/s", "one step", rehearsed=self.pool.rehearsed)
        flops = training_flops(self.step.architecture, context)
        share = mfu(rate, flops, self.chip, self.precision, self.ranks.world)
        memory = peak_memory(self.ranks.device)
        return {
            "tokens": losses.tokens,
            "seconds": round(seconds, 4),
            "tokens_per_s": round(losses.tokens / seconds, 1),
            "mfu": share and share.value,
            "memory_gib": memory and round(memory / 2**30, 3),
            "expert_imbalance": expert_imbalance(losses.loads),
        }

    def tell(self, step: int, losses: StepLosses, measures: dict[str, float | None], watched: dict[str, Any]) -> None:
        """The event of a step, and its points on the curves."""
        names = ("loss", "mtp_loss", "balance_loss")
        values = {name: _finite(getattr(losses, name), 7) for name in names} | measures
        loads = [[round(share, 4) for share in (load / load.sum().clamp(min=1)).tolist()] for load in losses.loads]
        self.step.event("step", step=step, expert_load=loads, ranks=self.ranks.world, **values, **watched)
        if self.board is not None:
            self.board.step(self.step.section.kind, step, values)


def _finite(value: float, digits: int) -> float | None:
    """As an event has it: None if it is no number."""
    return round(value, digits) if math.isfinite(value) else None


def _status(losses: StepLosses, measures: dict[str, float | None]) -> str:
    shown = [f"loss {losses.loss:.3f}", f"{measures['tokens_per_s']:,.0f} tokens/s"]
    for key, form in (("mfu", "MFU {:.1%}"), ("memory_gib", "{:.1f} GiB"), ("grad_norm", "grad {:.2f}")):
        if measures[key] is not None:
            shown.append(form.format(measures[key]))
    if measures["expert_imbalance"] is not None:
        shown.append(f"fullest expert {measures['expert_imbalance']:.1f}x")
    return "  ".join(shown)


def _record(step: TextStep, pool: Pool, started: float, saved: SavedCheckpoint) -> TextRecord:
    last, unreal = step.events("step")[-1], pool.rehearsed or step.recipe.drill is not None
    source = f"update {saved.step} of step {step.name} on pool {pool.name}, events.jsonl"
    parameters = sum(parameter.numel() for parameter in unfilled(step.architecture).parameters())
    found = {
        "loss": (last["loss"], "nats/token", source),
        "tokens_per_s": (last["tokens_per_s"], "tokens/s", source),
        "parameters": (parameters, "parameters", "counted on the model"),
    }
    start = step.start
    return TextRecord(
        recipe_sha256=step.recipe.digest(),
        started=started,
        ended=time.time(),
        step=step.name,
        kind=step.section.kind,
        pool=pool.name,
        drill=step.recipe.drill is not None,
        started_from=start.name,
        started_from_sha256=start.sha256,
        steps=saved.step,
        resumed_from=[event["from_step"] for event in step.events("resume")],
        checkpoint=str(saved.folder.relative_to(step.run.path)),
        checkpoint_sha256=saved.sha256,
        figures={name: Figure.measured(*one, rehearsed=unreal) for name, one in found.items()},
    )
