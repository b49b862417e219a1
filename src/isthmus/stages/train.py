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
from pathlib import Path
from typing import Any

import torch

from isthmus.chips import Chip, device_of, get_chip
from isthmus.data.corpus import run_tokenizer, sft_documents
from isthmus.data.pretrain import TokenStream
from isthmus.data.tasks import load_task
from isthmus.errors import IsthmusError
from isthmus.forecast.count import training_flops
from isthmus.formats.parts.assemble import unfilled
from isthmus.launch.local import run_ranks
from isthmus.model.model import Model
from isthmus.model.moe import Experts
from isthmus.pools import Pool, get_pool
from isthmus.progress import Counter, Watch
from isthmus.recipe.schema import TextSection
from isthmus.records import PlanRecord, TrainRecord
from isthmus.run import Figure, RunFolder
from isthmus.trainer.batch import ROW_LENGTH, Batch, pack
from isthmus.trainer.checkpoint import (
    CheckpointWriter,
    SavedCheckpoint,
    TrainingState,
    rng_state,
)
from isthmus.trainer.compiled import compile_parts
from isthmus.trainer.initial import load_published
from isthmus.trainer.mesh import Ranks, check_layout, launched_world, open_ranks
from isthmus.trainer.observe import Profiler, TensorBoard, expert_imbalance, mfu, peak_memory, profiler
from isthmus.trainer.optimizer import Optimizer
from isthmus.trainer.parallel import distribute, materialise
from isthmus.trainer.parts import initialise, model_state
from isthmus.trainer.pretrain_batch import batch_of_rows
from isthmus.trainer.resume import resume
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


@dataclass
class Session:
    """What the loop works on."""

    run: RunFolder
    watch: Watch
    pool: Pool
    chip: Chip
    ranks: Ranks
    precision: str
    model: Model
    profiler: Profiler | None = None
    board: TensorBoard | None = None

    def event(self, event: str, **fields: Any) -> None:
        if self.ranks.is_first:
            self.run.event(NAME, event, **fields)

    def say(self, text: str) -> None:
        if self.ranks.is_first:
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
    with _open_session(run, watch, pool, profile) as session:
        saved = [_train(session, phase) for phase in _phases(session)]
        if session.ranks.is_first:
            record = _record(session, started, saved[-1])
            run.write_record(NAME, record)
            run.event(NAME, "end", seconds=round(record.seconds, 3))
        session.ranks.wait()
    return run.require_record(NAME, TrainRecord, NAME)


@contextmanager
def _open_session(run: RunFolder, watch: Watch, pool: Pool, profile: bool) -> Iterator[Session]:
    section, device_type = run.recipe.train, device_of(pool)
    precision = section.precision or ("fp32" if device_type == "cpu" else "bf16")
    if device_type == "cpu":
        torch.set_num_threads(max(1, pool.threads // (launched_world() or 1)))
    torch.manual_seed(run.recipe.seed)
    with open_ranks(device_type, grouped=precision != "fp32") as ranks:
        session = Session(run, watch, pool, get_chip(pool.chip), ranks, precision, unfilled(run.recipe.model))
        session.event("start", pool=pool.name, ranks=ranks.world, precision=precision)
        _prepare(session)
        if profile and ranks.is_first:
            with profiler(run.path / "profile" / f"{NAME}.json", *TRACED_STEPS) as session.profiler:
                yield session
            _report_trace(session, session.profiler)
        else:
            yield session


def _report_trace(session: Session, tracing: Profiler) -> None:
    if tracing.written is None:
        session.event(
            "fallback", what="no trace", why=f"a trace needs more than {sum(TRACED_STEPS[:2])} steps to train"
        )
    session.say(f"  trace: {tracing.written or 'none, there were too few steps left to train'}")


def _prepare(session: Session) -> None:
    """Make the model what it is as training starts: sharded, if there is a group of ranks, and filled."""
    model, ranks, recipe = session.model, session.ranks, session.run.recipe
    if recipe.train.activation_checkpointing:
        model.recompute_activations()
    if recipe.train.compile:
        compile_parts(model)
    _choose_expert_kernels(session)
    if ranks.grouped:
        distribute(model, ranks, recipe.train, torch.bfloat16 if session.precision == "bf16" else torch.float32)
    materialise(model, ranks.device)
    if recipe.model.from_ is None:
        initialise(model, recipe.seed)
        return
    for left_out in load_published(model, recipe.model.from_):
        session.event("fallback", what=left_out, why="the recipe's model does without it")


def _choose_expert_kernels(session: Session) -> None:
    """One grouped kernel for all experts where the chip has it. The other way needs the counts on the host."""
    experts = [module for module in session.model.modules() if isinstance(module, Experts)]
    aligned = all(module.aligned for module in experts)
    grouped = bool(session.chip.capabilities.grouped_matmul) and session.precision == "bf16" and aligned
    for module in experts:
        module.grouped = grouped
    if experts and not grouped and session.ranks.device.type != "cpu":
        why = f"no grouped product in {session.precision} is known for {session.chip.name}"
        why = why if aligned else "hidden_size and moe_intermediate_size must be multiples of 8 for a grouped product"
        session.event("fallback", what="a matrix product for each expert", why=why)


def _phases(session: Session) -> list[Phase]:
    run = session.run
    task = load_task(run.recipe)
    if session.ranks.is_first:
        run_tokenizer(run, task)
    session.ranks.wait()
    tokenizer = run_tokenizer(run, task)
    first, world = session.ranks.rank, session.ranks.world

    row_length = ROW_LENGTH if run.recipe.train.rows_per_microbatch else None

    def sft_rows(step: int) -> Batch:
        whole = pack(sft_documents(run, task, tokenizer, step), row_length, multiple_of=world)
        return whole.select(range(first, len(whole.tokens), world))

    sft = Phase(NAME, "SFT", "step", run.recipe.sft, sft_rows, f"seed {run.recipe.seed}")
    section = run.recipe.pretrain
    if section is None:
        return [sft]
    stream = TokenStream(
        section.folder,
        tokenizer,
        section.row_length,
        run.recipe.seed,
        run.path / PRETRAIN / "tokens",
        first_of_node=session.ranks.first_of_node,
    )

    def text_rows(step: int) -> Batch:
        row = step * section.rows_per_step
        stream.prepare(row, section.rows_per_step)
        count = len(range(first, section.rows_per_step, world))
        return batch_of_rows(stream.rows(row + first, count, world)) if count else Batch.empty(section.row_length)

    return [Phase(PRETRAIN, "pretraining", "pretrain-step", section, text_rows, stream.fingerprint), sft]


def _train(session: Session, phase: Phase) -> SavedCheckpoint:
    """All steps of a phase that are not done yet. Returns its last checkpoint."""
    section, ranks = phase.section, session.ranks
    shared_by = session.run.recipe.train.replicate
    optimizer = Optimizer(session.model, section.optimizer, section.steps, ranks, shared_by)
    root = session.run.path / "checkpoints" / phase.name
    writer = CheckpointWriter(root, section.keep_checkpoints, ranks.storage)
    done = _resume(session, phase, optimizer, root)
    if done is not None and done.step == section.steps:
        return done
    step = done.step if done else 0
    with _tensorboard(session, phase, step), session.watch.count(phase.title, section.steps) as counter:
        counter.advance_to(step)
        while step < section.steps:
            _one_step(session, phase, optimizer, step, counter)
            step += 1
            if step % section.checkpoint_every == 0 or step == section.steps:
                writer.save(step, _state(session, phase, optimizer))
    saved = writer.finish()
    assert saved is not None
    return saved


@contextmanager
def _tensorboard(session: Session, phase: Phase, step: int) -> Iterator[None]:
    if not session.run.recipe.train.tensorboard or not session.ranks.is_first:
        yield
        return
    session.board = TensorBoard(session.run.path / NAME / "tensorboard" / phase.name, first_step=step + 1)
    with closing(session.board):
        yield


def _state(session: Session, phase: Phase, optimizer: Optimizer) -> TrainingState:
    extra = {"data": phase.data, "rng": rng_state(session.ranks.device)}
    return TrainingState(model_state(session.model), optimizer.state(), extra)


def _resume(session: Session, phase: Phase, optimizer: Optimizer, root: Path) -> SavedCheckpoint | None:
    """Load the newest whole checkpoint of a phase into model and optimiser; None if there is none."""
    state, ranks = _state(session, phase, optimizer), session.ranks
    event = partial(session.event, phase=phase.name)
    loaded = resume(root, state, ranks.storage, ranks.device, event, session.say)
    if loaded is None:
        return None
    if loaded.extra["data"] != phase.data:
        raise IsthmusError(
            f"{loaded.folder} was trained on other data than the recipe now reads: the files, the tokenizer or their "
            "order have changed, so its position in them means nothing. Restore the data, or start a new run folder."
        )
    session.event("resume", phase=phase.name, from_step=loaded.step)
    session.say(f"  continuing {phase.title} from the checkpoint at step {loaded.step}")
    return SavedCheckpoint(loaded.folder, loaded.step, loaded.sha256)


def _one_step(session: Session, phase: Phase, optimizer: Optimizer, step: int, counter: Counter) -> None:
    began = time.perf_counter()
    batch = phase.batch(step)
    losses, gradient_norm = train_step(
        session.model,
        optimizer,
        batch,
        phase.section,
        step,
        session.ranks,
        session.run.recipe.train.rows_per_microbatch,
    )
    seconds = time.perf_counter() - began
    if session.profiler is not None:
        session.profiler.step()
    if not session.ranks.is_first:
        return
    losses = losses.on_host()
    rate = phase.section.optimizer.learning_rate * optimizer.schedule(step)
    measures = _measures(session, losses, batch.mean_context, seconds)
    measures |= {"grad_norm": round(gradient_norm, 4), "learning_rate": rate}
    _report(session, phase, step + 1, losses, measures)
    counter.advance_to(step + 1, _status(losses, measures))


def _measures(session: Session, losses: StepLosses, context: float, seconds: float) -> dict[str, float | None]:
    """What one sees of a step beside its losses. Memory is that of the first rank."""
    rate = _measured(session, losses.tokens / seconds, "tokens/s", "one step")
    flops = training_flops(session.run.recipe.model, context)
    share = mfu(rate, flops, session.chip, session.precision, session.ranks.world)
    memory = peak_memory(session.ranks.device)
    return {
        "tokens": losses.tokens,
        "seconds": round(seconds, 4),
        "tokens_per_s": round(losses.tokens / seconds, 1),
        "mfu": share and share.value,
        "memory_gib": memory and round(memory / 2**30, 3),
        "expert_imbalance": expert_imbalance(losses.loads),
    }


def _report(session: Session, phase: Phase, step: int, losses: StepLosses, measures: dict[str, float | None]) -> None:
    values = {
        "loss": round(losses.loss, 7),
        "mtp_loss": round(losses.mtp_loss, 7),
        "balance_loss": round(losses.balance_loss, 7),
        **measures,
    }
    loads = [[round(share, 4) for share in (load / load.sum().clamp(min=1)).tolist()] for load in losses.loads]
    session.run.event(NAME, phase.event, step=step, expert_load=loads, ranks=session.ranks.world, **values)
    if session.board is not None:
        session.board.step(phase.name, step, values)


def _status(losses: StepLosses, measures: dict[str, float | None]) -> str:
    shown = [f"loss {losses.loss:.3f}", f"{measures['tokens_per_s']:,.0f} tokens/s"]
    for key, form in (("mfu", "MFU {:.1%}"), ("memory_gib", "{:.1f} GiB"), ("grad_norm", "grad {:.2f}")):
        if measures[key] is not None:
            shown.append(form.format(measures[key]))
    if measures["expert_imbalance"] is not None:
        shown.append(f"fullest expert {measures['expert_imbalance']:.1f}x")
    return "  ".join(shown)


def _measured(session: Session, value: float, unit: str, source: str) -> Figure:
    return Figure.measured(value, unit, source, rehearsed=session.pool.rehearsed)


def _record(session: Session, started: float, saved: SavedCheckpoint) -> TrainRecord:
    run, whole = session.run, unfilled(session.run.recipe.model)
    last = run.events(NAME, "step")[-1]
    source = f"step {saved.step} of supervised fine-tuning on pool {session.pool.name}, events.jsonl"
    figures = {
        "loss": _measured(session, last["loss"], "nats/token", source),
        "tokens_per_s": _measured(session, last["tokens_per_s"], "tokens/s", source),
        "parameters": _measured(
            session, sum(p.numel() for p in whole.parameters()), "parameters", "counted on the model"
        ),
    }
    return TrainRecord(
        recipe_sha256=run.recipe.digest(),
        started=started,
        ended=time.time(),
        pool=session.pool.name,
        steps=saved.step,
        resumed_from=[event["from_step"] for event in run.events(NAME, "resume")],
        checkpoint=str(saved.folder.relative_to(run.path)),
        checkpoint_sha256=saved.sha256,
        figures=figures,
    )
