"""Training on text: pretraining if the recipe has it, then supervised fine-tuning on chains of thought.

A pool with several chips is trained on by one rank per chip, started here or by torchrun. The order of the data depends
on the seed and the step alone, whatever the number of ranks, so a run that was killed continues from its last
checkpoint as if nothing had happened, also on another number of ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from isthmus.chips import Chip, device_of, get_chip
from isthmus.data.corpus import run_tokenizer, sft_documents
from isthmus.data.pretrain import TokenStream
from isthmus.data.tokenizer import Tokenizer
from isthmus.errors import IsthmusError
from isthmus.forecast.count import training_flops
from isthmus.formats.parts.assemble import unfilled
from isthmus.launch.local import run_ranks
from isthmus.model.model import Model
from isthmus.model.moe import Experts
from isthmus.pools import Pool, get_pool
from isthmus.progress import Counter, Watch
from isthmus.recipe.schema import PretrainSection, Recipe, TextSection
from isthmus.records import PlanRecord, TrainRecord
from isthmus.run import Figure, RunFolder
from isthmus.tasks import Task, load_task
from isthmus.trainer.batch import ROW_LENGTH, Batch, batch_of_rows, pack
from isthmus.trainer.checkpoint import CheckpointWriter, SavedCheckpoint, TrainingState, resume, rng_state
from isthmus.trainer.compiled import compile_parts
from isthmus.trainer.mesh import Ranks, check_layout, launched_world, open_ranks
from isthmus.trainer.observe import Profiler, TensorBoard, expert_imbalance, mfu, peak_memory, profiler
from isthmus.trainer.optimizer import Optimizer
from isthmus.trainer.parallel import distribute, materialise
from isthmus.trainer.parts import initialise, load_published, model_state
from isthmus.trainer.step import StepLosses, train_step

NAME, PRETRAIN = "train", "pretrain"
TRACED_STEPS = (2, 1, 3)
"""Steps of a profile: before it, to warm up, and in the trace."""


@dataclass(frozen=True)
class Phase:
    """One kind of training. `batch(step)` gives this rank's rows of a step."""

    name: str
    title: str
    event: str
    section: TextSection
    batch: Callable[[int], Batch]
    data: str
    """Identifies the order of the data: a position means something only in the same order."""


@dataclass(frozen=True)
class Voice:
    """Speaks for all ranks: what the first says is written and shown."""

    run: RunFolder
    watch: Watch
    is_first: bool

    def event(self, event: str, **fields: Any) -> None:
        if self.is_first:
            self.run.event(NAME, event, **fields)

    def say(self, text: str) -> None:
        if self.is_first:
            self.watch.say(text)


def execute(run: RunFolder, watch: Watch, *, profile: bool = False) -> TrainRecord:
    """Train from the last checkpoint, or from the start, to the recipe's number of steps.

    `profile` writes a Chrome trace of a few steps of the first rank to `profile/`.
    """
    started = time.time()
    pool = get_pool(run.recipe, run.require_record("plan", PlanRecord, "plan").pool_of(NAME))
    check_layout(run.recipe.model, run.recipe.train, launched_world() or pool.ranks)
    if pool.ranks > 1 and launched_world() is None:
        run_ranks(NAME, run.path, {"profile": profile}, pool.ranks, run.path / NAME / "ranks")
        return run.require_record(NAME, TrainRecord, NAME)
    device, chip = device_of(pool), get_chip(pool.chip)
    precision = run.recipe.train.precision_on(device)
    if device == "cpu":
        torch.set_num_threads(max(1, pool.threads // (launched_world() or 1)))
    torch.manual_seed(run.recipe.seed)
    with open_ranks(device, grouped=precision != "fp32") as ranks:
        voice = Voice(run, watch, ranks.is_first)
        voice.event("start", pool=pool.name, ranks=ranks.world, precision=precision)
        model = prepared_model(run.recipe, chip, ranks, precision, voice)
        with _traced(run, voice, profile) as tracing:
            gauges = Gauges(run, pool, chip, precision, ranks, tracing)
            saved = [Training(phase, model, ranks, voice, gauges).finish() for phase in _phases(run, ranks)]
            if ranks.is_first:
                record = _record(run, pool, started, saved[-1])
                run.write_record(NAME, record)
                run.event(NAME, "end", seconds=round(record.seconds, 3))
            ranks.wait()
    return run.require_record(NAME, TrainRecord, NAME)


def prepared_model(recipe: Recipe, chip: Chip, ranks: Ranks, precision: str, voice: Voice) -> Model:
    """The model as training starts: sharded, if there is a group of ranks, and filled."""
    model = unfilled(recipe.model)
    if recipe.train.activation_checkpointing:
        model.recompute_activations()
    if recipe.train.compile:
        compile_parts(model)
    _choose_expert_kernels(model, chip, ranks, precision, voice)
    if ranks.grouped:
        distribute(model, ranks, recipe.train, torch.bfloat16 if precision == "bf16" else torch.float32)
    materialise(model, ranks.device)
    if recipe.model.from_ is None:
        initialise(model, recipe.seed)
        return model
    for left_out in load_published(model, recipe.model.from_):
        voice.event("fallback", what=left_out, why="the recipe's model does without it")
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
def _traced(run: RunFolder, voice: Voice, asked: bool) -> Iterator[Profiler | None]:
    """A trace of the first rank, if it is asked for, and what became of it."""
    if not asked or not voice.is_first:
        yield None
        return
    with profiler(run.path / "profile" / f"{NAME}.json", *TRACED_STEPS) as tracing:
        yield tracing
    if tracing.written is None:
        voice.event("fallback", what="no trace", why=f"a trace needs more than {sum(TRACED_STEPS[:2])} steps to train")
    voice.say(f"  trace: {tracing.written or 'none, there were too few steps left to train'}")


def _phases(run: RunFolder, ranks: Ranks) -> list[Phase]:
    task = load_task(run.recipe)
    if ranks.is_first:
        run_tokenizer(run, task)
    ranks.wait()
    tokenizer = run_tokenizer(run, task)
    sft = sft_phase(run, ranks, task, tokenizer)
    return [sft] if run.recipe.pretrain is None else [pretrain_phase(run, run.recipe.pretrain, ranks, tokenizer), sft]


def sft_phase(run: RunFolder, ranks: Ranks, task: Task, tokenizer: Tokenizer) -> Phase:
    """Supervised fine-tuning on the task's worked examples."""
    row_length = ROW_LENGTH if run.recipe.train.rows_per_microbatch else None

    def rows(step: int) -> Batch:
        whole = pack(sft_documents(run, task, tokenizer, step), row_length, multiple_of=ranks.world)
        return whole.select(range(ranks.rank, len(whole.tokens), ranks.world))

    return Phase(NAME, "SFT", "step", run.recipe.sft, rows, f"seed {run.recipe.seed}")


def pretrain_phase(run: RunFolder, section: PretrainSection, ranks: Ranks, tokenizer: Tokenizer) -> Phase:
    """Next-token prediction on a folder of text."""
    folder, seed, cache = section.folder, run.recipe.seed, run.path / PRETRAIN / "tokens"
    stream = TokenStream(folder, tokenizer, section.row_length, seed, cache, first_of_node=ranks.first_of_node)

    def rows(step: int) -> Batch:
        row = step * section.rows_per_step
        stream.prepare(row, section.rows_per_step)
        count = len(range(ranks.rank, section.rows_per_step, ranks.world))
        if not count:
            return Batch.empty(section.row_length)
        return batch_of_rows(stream.rows(row + ranks.rank, count, ranks.world))

    return Phase(PRETRAIN, "pretraining", "pretrain-step", section, rows, stream.fingerprint)


class Training:
    """One phase under way: its optimiser and its checkpoints."""

    def __init__(self, phase: Phase, model: Model, ranks: Ranks, voice: Voice, gauges: Gauges):
        self.phase, self.model, self.ranks, self.voice, self.gauges = phase, model, ranks, voice, gauges
        self.section, self.recipe = phase.section, voice.run.recipe
        shared_by = self.recipe.train.replicate
        self.optimizer = Optimizer(model, self.section.optimizer, self.section.steps, ranks, shared_by)
        root = voice.run.path / "checkpoints" / phase.name
        self.checkpoints = CheckpointWriter(root, self.section.keep_checkpoints, ranks.storage)

    def finish(self) -> SavedCheckpoint:
        """All steps that are not done yet. Returns the last checkpoint."""
        done = self._resume()
        if done is not None and done.step == self.section.steps:
            return done
        step = done.step if done else 0
        with (
            self.gauges.curves(self.phase.name, first_step=step + 1),
            self.voice.watch.count(self.phase.title, self.section.steps) as counter,
        ):
            counter.advance_to(step)
            while step < self.section.steps:
                self._step(step, counter)
                step += 1
                if step % self.section.checkpoint_every == 0 or step == self.section.steps:
                    self.checkpoints.save(step, self._state())
        saved = self.checkpoints.finish()
        assert saved is not None
        return saved

    def _step(self, step: int, counter: Counter) -> None:
        began = time.perf_counter()
        batch = self.phase.batch(step)
        rows_at_once = self.recipe.train.rows_per_microbatch
        losses, gradient_norm = train_step(
            self.model, self.optimizer, batch, self.section, step, self.ranks, rows_at_once
        )
        seconds = time.perf_counter() - began
        self.gauges.trace_step()
        if not self.ranks.is_first:
            return
        losses = losses.on_host()
        rate = self.section.optimizer.learning_rate * self.optimizer.schedule(step)
        measures = self.gauges.measures(losses, batch.mean_context, seconds)
        measures |= {"grad_norm": round(gradient_norm, 4), "learning_rate": rate}
        self.gauges.tell(self.phase, step + 1, losses, measures)
        counter.advance_to(step + 1, _status(losses, measures))

    def _state(self) -> TrainingState:
        extra = {"data": self.phase.data, "rng": rng_state(self.ranks.device)}
        return TrainingState(model_state(self.model), self.optimizer.state(), extra)

    def _resume(self) -> SavedCheckpoint | None:
        """Load the newest whole checkpoint of the phase into model and optimiser; None if there is none."""
        event = partial(self.voice.event, phase=self.phase.name)
        root, ranks = self.checkpoints.root, self.ranks
        loaded = resume(root, self._state(), ranks.storage, ranks.device, event, self.voice.say)
        if loaded is None:
            return None
        if loaded.extra["data"] != self.phase.data:
            raise IsthmusError(
                f"{loaded.folder} was trained on other data than the recipe now reads: the files, the tokenizer or "
                "their order have changed, so its position in them means nothing. Restore the data, or start a new "
                "run folder."
            )
        event("resume", from_step=loaded.step)
        self.voice.say(f"  continuing {self.phase.title} from the checkpoint at step {loaded.step}")
        return SavedCheckpoint(loaded.folder, loaded.step, loaded.sha256)


@dataclass
class Gauges:
    """What one sees of a step beside its losses, as the first rank sees it."""

    run: RunFolder
    pool: Pool
    chip: Chip
    precision: str
    ranks: Ranks
    tracing: Profiler | None
    board: TensorBoard | None = None

    @contextmanager
    def curves(self, phase: str, first_step: int) -> Iterator[None]:
        """Draw a phase for TensorBoard from a step on, if the recipe wants it."""
        if not self.run.recipe.train.tensorboard or not self.ranks.is_first:
            yield
            return
        self.board = TensorBoard(self.run.path / NAME / "tensorboard" / phase, first_step)
        with closing(self.board):
            yield

    def trace_step(self) -> None:
        if self.tracing is not None:
            self.tracing.step()

    def measures(self, losses: StepLosses, context: float, seconds: float) -> dict[str, float | None]:
        """Of a step in which tokens attended to `context` others on average. Memory is that of the first rank."""
        rate = Figure.measured(losses.tokens / seconds, "tokens/s", "one step", rehearsed=self.pool.rehearsed)
        flops = training_flops(self.run.recipe.model, context)
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

    def tell(self, phase: Phase, step: int, losses: StepLosses, measures: dict[str, float | None]) -> None:
        """The event of a step, and its points on the curves."""
        names = ("loss", "mtp_loss", "balance_loss")
        values = {name: round(getattr(losses, name), 7) for name in names} | measures
        loads = [[round(share, 4) for share in (load / load.sum().clamp(min=1)).tolist()] for load in losses.loads]
        self.run.event(NAME, phase.event, step=step, expert_load=loads, ranks=self.ranks.world, **values)
        if self.board is not None:
            self.board.step(phase.name, step, values)


def _status(losses: StepLosses, measures: dict[str, float | None]) -> str:
    shown = [f"loss {losses.loss:.3f}", f"{measures['tokens_per_s']:,.0f} tokens/s"]
    for key, form in (("mfu", "MFU {:.1%}"), ("memory_gib", "{:.1f} GiB"), ("grad_norm", "grad {:.2f}")):
        if measures[key] is not None:
            shown.append(form.format(measures[key]))
    if measures["expert_imbalance"] is not None:
        shown.append(f"fullest expert {measures['expert_imbalance']:.1f}x")
    return "  ".join(shown)


def _record(run: RunFolder, pool: Pool, started: float, saved: SavedCheckpoint) -> TrainRecord:
    last = run.events(NAME, "step")[-1]
    source = f"step {saved.step} of supervised fine-tuning on pool {pool.name}, events.jsonl"
    parameters = sum(parameter.numel() for parameter in unfilled(run.recipe.model).parameters())
    found = {
        "loss": (last["loss"], "nats/token", source),
        "tokens_per_s": (last["tokens_per_s"], "tokens/s", source),
        "parameters": (parameters, "parameters", "counted on the model"),
    }
    return TrainRecord(
        recipe_sha256=run.recipe.digest(),
        started=started,
        ended=time.time(),
        pool=pool.name,
        steps=saved.step,
        resumed_from=[event["from_step"] for event in run.events(NAME, "resume")],
        checkpoint=str(saved.folder.relative_to(run.path)),
        checkpoint_sha256=saved.sha256,
        figures={name: Figure.measured(*one, rehearsed=pool.rehearsed) for name, one in found.items()},
    )
