"""Supervised fine-tuning on chains of thought: R1's cold start.

The order of the data depends on the seed and the step alone, so a run that was killed continues from its last
checkpoint exactly as if nothing had happened.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from isthmus.chips import device_of
from isthmus.data.corpus import run_tokenizer, sft_documents
from isthmus.data.tasks import Task, load_task
from isthmus.data.tokenizer import Tokenizer
from isthmus.model.model import Model
from isthmus.pools import get_pool
from isthmus.progress import Counter, Watch
from isthmus.records import PlanRecord, TrainRecord
from isthmus.run import Figure, RunFolder
from isthmus.trainer.batch import pack
from isthmus.trainer.checkpoint import load_latest, save_checkpoint
from isthmus.trainer.initial import load_published
from isthmus.trainer.optimizer import Optimizer
from isthmus.trainer.step import StepLosses, sft_step

NAME = "train"


@dataclass
class Session:
    """What the loop works on."""

    run: RunFolder
    task: Task
    tokenizer: Tokenizer
    model: Model
    optimizer: Optimizer
    step: int
    device: torch.device


def execute(run: RunFolder, watch: Watch) -> TrainRecord:
    """Train from the last checkpoint, or from the start, to the recipe's number of steps."""
    started = time.time()
    pool = run.require_record("plan", PlanRecord, "plan").pool_of(NAME)
    session = _open_session(run, pool)
    run.event(NAME, "start", pool=pool, from_step=session.step)
    if session.step:
        run.event(NAME, "resume", from_step=session.step)
        watch.say(f"  continuing from the checkpoint at step {session.step}")
    with watch.count("SFT", run.recipe.sft.steps) as counter:
        while session.step < run.recipe.sft.steps:
            _one_step(session, counter)
    folder, sha256 = _save(session)
    last = run.events(NAME, "step")[-1]
    source = f"step {session.step} of supervised fine-tuning on pool {pool}, events.jsonl"
    record = TrainRecord(
        recipe_sha256=run.recipe.digest(),
        started=started,
        ended=time.time(),
        pool=pool,
        steps=session.step,
        resumed_from=[event["from_step"] for event in run.events(NAME, "resume")],
        checkpoint=str(folder.relative_to(run.path)),
        checkpoint_sha256=sha256,
        figures={
            "loss": Figure.measured(last["loss"], "nats/token", source, rehearsed=False),
            "tokens_per_s": Figure.measured(last["tokens_per_s"], "tokens/s", source, rehearsed=False),
            "parameters": Figure.measured(
                sum(p.numel() for p in session.model.parameters()),
                "parameters",
                "counted on the model",
                rehearsed=False,
            ),
        },
    )
    run.write_record(NAME, record)
    run.event(NAME, "end", seconds=round(record.seconds, 3))
    return record


def _open_session(run: RunFolder, pool: str) -> Session:
    home = get_pool(run.recipe, pool)
    torch.set_num_threads(home.threads)
    device = torch.device(device_of(home))
    task = load_task(run.recipe)
    tokenizer = run_tokenizer(run, task)
    model = Model(run.recipe.model).initialise(run.recipe.seed)
    if run.recipe.model.from_ is not None:
        load_published(model, run.recipe.model.from_)
    model.to(device)
    optimizer = Optimizer(model, run.recipe.sft.optimizer, run.recipe.sft.steps)
    session = Session(run, task, tokenizer, model, optimizer, 0, device)
    if checkpoint := load_latest(run.path / "checkpoints" / NAME):
        model.load_state_dict(checkpoint.model)
        optimizer.load_state(checkpoint.optimizer)
        session.step = checkpoint.step
    return session


def _one_step(session: Session, counter: Counter) -> None:
    began = time.perf_counter()
    section = session.run.recipe.sft
    documents = sft_documents(session.run, session.task, session.tokenizer, session.step)
    batch = pack(documents).to(session.device)
    losses, gradient_norm = sft_step(session.model, session.optimizer, batch, section, session.step)
    session.step += 1
    seconds = time.perf_counter() - began
    _report(session, losses, gradient_norm, batch.num_tokens, seconds)
    counter.advance_to(session.step, f"loss {losses.loss:.3f}  {batch.num_tokens / seconds:,.0f} tokens/s")
    if session.step % section.checkpoint_every == 0 and session.step < section.steps:
        _save(session)


def _save(session: Session):
    root = session.run.path / "checkpoints" / NAME
    keep = session.run.recipe.sft.keep_checkpoints
    return save_checkpoint(root, session.step, session.model.state_dict(), session.optimizer.state(), keep)


def _report(session: Session, losses: StepLosses, gradient_norm: float, tokens: int, seconds: float) -> None:
    session.run.event(
        NAME,
        "step",
        step=session.step,
        loss=round(losses.loss, 5),
        mtp_loss=round(losses.mtp_loss, 5),
        balance_loss=round(losses.balance_loss, 5),
        expert_load=[[round(share, 4) for share in (load / load.sum()).tolist()] for load in losses.loads],
        grad_norm=round(gradient_norm, 4),
        learning_rate=session.run.recipe.sft.optimizer.learning_rate * session.optimizer.schedule(session.step - 1),
        tokens=tokens,
        seconds=round(seconds, 4),
        tokens_per_s=round(tokens / seconds, 1),
    )
