"""Reinforcement learning with verifiable rewards across two pools: one generates, the other learns.

At every step the trainer's weights cross to the rollout engine in its format, with a version and a hash. With
`staleness = 1` the engine generates the next step's samples while the trainer learns from this one's: both pools work
at once, and samples are one version old. Truncated importance sampling corrects for that and for the engine's numerics.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from isthmus.algos import Algorithm, algorithm_config, get_algorithm
from isthmus.chips import device_of
from isthmus.data.corpus import Document, prompt_ids, run_tokenizer
from isthmus.data.tasks import Problem, Task, load_task, seeded
from isthmus.data.tokenizer import Tokenizer
from isthmus.engines import Completion, Engine, Sampling
from isthmus.engines.channel import Channel, writer
from isthmus.engines.local import LocalEngine, report_kernels
from isthmus.errors import DamagedFile, GateRefused
from isthmus.formats import get_format
from isthmus.formats.files.bundle import write_bundle
from isthmus.model.model import Model
from isthmus.parity.engine import LIMIT, LIMIT_SOURCE, Gap, spot_gap
from isthmus.parity.paired import paired_difference, wilson_interval
from isthmus.parity.trend import trend
from isthmus.pools import get_pool
from isthmus.progress import Counter, Watch
from isthmus.records import PlanRecord, RlRecord, TrainRecord
from isthmus.rewards import Reward, RewardModule, get_reward
from isthmus.run import Figure, RunFolder, write_atomic
from isthmus.trainer.batch import Batch, pack
from isthmus.trainer.checkpoint import (
    CheckpointWriter,
    LoadedCheckpoint,
    SavedCheckpoint,
    TrainingState,
    load_model_state,
    rng_state,
)
from isthmus.trainer.correction import mismatch, slope, truncated_importance
from isthmus.trainer.optimizer import Optimizer
from isthmus.trainer.resume import resume
from isthmus.trainer.step import target_logprobs

NAME = "rl"
SPOT_PROMPTS = 2


@dataclass
class Rollout:
    """Samples of one step: G completions for each of P prompts, with their rewards [P, G]."""

    problems: list[Problem]
    prompts: list[list[int]]
    completions: list[list[Completion]]
    rewards: list[list[Reward]]
    seconds: float

    @property
    def flat(self) -> list[tuple[int, Completion]]:
        """(prompt index, completion), sample by sample."""
        return [(index, one) for index, group in enumerate(self.completions) for one in group]

    @property
    def version(self) -> int:
        return min(completion.version for _, completion in self.flat)


_ROLLOUT = TypeAdapter(Rollout)


@dataclass
class Session:
    """What the loop works on."""

    run: RunFolder
    task: Task
    tokenizer: Tokenizer
    reward: RewardModule
    algorithm: Algorithm
    options: Any
    model: Model
    optimizer: Optimizer
    engine: Engine
    channel: Channel
    watch: Watch
    checkpoints: CheckpointWriter
    step: int
    weights_sha256: str = ""
    strikes: int = 0
    mismatches: list[float] = field(default_factory=list)
    drifts: bool = False


def execute(run: RunFolder, watch: Watch) -> RlRecord:
    """Train from the last RL checkpoint, or from the supervised one, to the recipe's number of steps."""
    started = time.time()
    plan = run.require_record("plan", PlanRecord, "plan")
    train = run.require_record("train", TrainRecord, "train")
    run.event(NAME, "start", pool=plan.pool_of("train"), rollout_pool=plan.pool_of("rollout"))
    with _open_session(run, plan, train, watch) as session:
        before = _evaluate(session, "before", watch)
        _loop(session, watch)
        saved = _save_last(session)
        after = _evaluate(session, "after", watch)
    record = _record(session, plan, started, saved, before, after)
    run.write_record(NAME, record)
    run.event(NAME, "end", seconds=round(record.seconds, 3))
    watch.say(f"  held-out accuracy {record.accuracy_before} -> {record.accuracy_after}, gain {record.accuracy_gain}")
    return record


@contextmanager
def _open_session(run: RunFolder, plan: PlanRecord, train: TrainRecord, watch: Watch) -> Iterator[Session]:
    recipe = run.recipe
    home, away = (get_pool(recipe, plan.pool_of(stage)) for stage in ("train", "rollout"))
    if home.ranks > 1:
        run.event(NAME, "fallback", what=f"one of {home.ranks} ranks learns", why="RL does not spread over ranks")
    at_once = recipe.rl.staleness > 0
    torch.set_num_threads(home.shared_threads if at_once else home.threads)
    task = load_task(recipe)
    tokenizer = run_tokenizer(run, task)
    model = Model(recipe.model).to(torch.device(device_of(home)))
    optimizer = Optimizer(model, recipe.rl.optimizer, recipe.rl.steps)
    checkpoints = CheckpointWriter(run.path / "checkpoints" / NAME, recipe.rl.keep_checkpoints, None)
    checkpoint = _resume(run, checkpoints.root, model, optimizer, watch)
    step = checkpoint.step if checkpoint else 0
    if checkpoint is None:
        model.load_state_dict(load_model_state(run.path / train.checkpoint, train.checkpoint_sha256))
    bundle = run.path / NAME / "rollout-bundle"
    write_bundle(bundle, recipe.rl.rollout_format, _host_state(model), recipe.model, tokenizer)
    rehearse = away.chip if away.rehearsed else None
    log = run.path / NAME / "engine.log"
    threads = away.shared_threads if at_once else away.threads
    with LocalEngine(bundle, threads=threads, rehearse=rehearse, log=log) as engine:
        report_kernels(partial(run.event, NAME), engine.kernels)
        session = Session(
            run=run,
            task=task,
            tokenizer=tokenizer,
            reward=get_reward(task.reward),
            algorithm=get_algorithm(recipe.rl.algorithm),
            options=algorithm_config(recipe.rl),
            model=model,
            optimizer=optimizer,
            engine=engine,
            channel=_channel(run, engine),
            watch=watch,
            checkpoints=checkpoints,
            step=step,
            mismatches=_earlier_mismatches(run, step),
        )
        run.event(NAME, "crossing", weight_version=step, **_cross(session))
        yield session


def _channel(run: RunFolder, engine: Engine) -> Channel:
    section = run.recipe.rl
    return Channel(
        engine,
        deltas=section.update == "delta",
        snapshot_every=section.snapshot_every,
        codec=section.update_codec,
        folder=writer(section.publish, section.rollout_format),
        tell=partial(run.event, NAME),
    )


def _resume(run: RunFolder, root: Path, model: Model, optimizer: Optimizer, watch: Watch) -> LoadedCheckpoint | None:
    """Load the last whole checkpoint of this stage into the model and the optimiser; None if there is none."""
    state = TrainingState(model.state_dict(), optimizer.state(), {})
    loaded = resume(root, state, None, next(model.parameters()).device, partial(run.event, NAME), watch.say)
    if loaded is None:
        return None
    run.event(NAME, "resume", from_step=loaded.step)
    watch.say(f"  continuing from the checkpoint at step {loaded.step}")
    return loaded


def _loop(session: Session, watch: Watch) -> None:
    section = session.run.recipe.rl
    with watch.count("RL", section.steps) as counter, ThreadPoolExecutor(max_workers=1) as pool:
        counter.advance_to(session.step)
        pending = _stored_rollout(session)
        while session.step < section.steps:
            rollout = pending.result() if pending else _generate(session, session.step)
            pending = None
            if section.staleness and session.step + 1 < section.steps:
                pending = pool.submit(_generate, session, session.step + 1)
            _learn(session, rollout, pending, counter)
            if session.step % section.checkpoint_every == 0 and session.step < section.steps:
                _store_rollout(session, pending)
                _save(session)


def _store_rollout(session: Session, pending: Future[Rollout] | None) -> None:
    """Keep the samples that older weights generated for the next step: a continued run learns from the same ones."""
    if pending is not None:
        write_atomic(_rollout_path(session), _ROLLOUT.dump_json(pending.result()))
    section = session.run.recipe.rl
    oldest = session.step - section.checkpoint_every * (section.keep_checkpoints + 1)
    for path in _rollout_path(session).parent.glob("rollout-*.json"):
        if path.name < f"rollout-{oldest:06d}":
            path.unlink()


def _stored_rollout(session: Session) -> Future[Rollout] | None:
    path = _rollout_path(session)
    if not path.exists():
        return None
    stored: Future[Rollout] = Future()
    try:
        stored.set_result(_ROLLOUT.validate_json(path.read_bytes()))
    except ValidationError as error:
        raise DamagedFile(f"{path} cannot be read ({error}). Delete it: its samples are then generated anew.") from None
    return stored


def _rollout_path(session: Session) -> Path:
    return session.run.path / NAME / f"rollout-{session.step:06d}.json"


def _generate(session: Session, step: int) -> Rollout:
    """Samples for the prompts of a step; prompts and sampling depend on the seed and the step alone."""
    began = time.perf_counter()
    section = session.run.recipe.rl
    chance = seeded("rl", session.run.recipe.seed, step)
    problems = chance.choices(session.task.train, k=section.prompts_per_step)
    seeds = [chance.getrandbits(48) for _ in problems]
    prompts = [prompt_ids(session.tokenizer, problem) for problem in problems]
    sampling = Sampling(section.max_new_tokens, section.temperature, n=section.samples_per_prompt)
    completions = session.engine.generate(prompts, sampling, seeds)
    rewards = [_score(session, problem, group) for problem, group in zip(problems, completions, strict=True)]
    return Rollout(problems, prompts, completions, rewards, time.perf_counter() - began)


def _score(session: Session, problem: Problem, group: list[Completion]) -> list[Reward]:
    return [session.reward.score(problem, session.tokenizer.decode(completion.tokens)) for completion in group]


def _learn(session: Session, rollout: Rollout, pending: Future[Rollout] | None, counter: Counter) -> None:
    """Update on one rollout, send the new weights across, and report."""
    began = time.perf_counter()
    section = session.run.recipe.rl
    rewards = torch.tensor([[one.total(section.format_reward) for one in group] for group in rollout.rewards])
    advantages = session.algorithm.advantages(rewards, session.options)
    measures = _update(session, rollout, advantages)
    session.step += 1
    trained = time.perf_counter()
    if pending is not None:
        pending.result()
    waited = time.perf_counter()
    crossing = _cross(session)
    timing = {
        "rollout_s": round(rollout.seconds, 4),
        "train_s": round(trained - began, 4),
        "wait_s": round(waited - trained, 4),
        "sync_s": round(time.perf_counter() - waited, 4),
    }
    _watch_drift(session, counter)
    _report(session, rollout, rewards, measures, timing | crossing, counter)


def _watch_drift(session: Session, counter: Counter) -> None:
    """Say so, once per rise, when the mismatch climbs and will pass the budget before the run ends."""
    section = session.run.recipe.rl
    drift = trend(session.mismatches)
    alarmed = drift is not None and drift.alarms(section.drift_budget, section.steps - session.step)
    if drift is not None and alarmed and not session.drifts:
        why = (
            f"it is {drift.level:.3g} nats per token and rises by {drift.slope:.2g} a step: it passes the budget of "
            f"{section.drift_budget:g} in {drift.crossings_until(section.drift_budget):.0f} steps"
        )
        session.run.event(NAME, "alarm", step=session.step, what="the mismatch climbs", why=why)
        counter.say(f"[bold red]drift[/] the mismatch climbs: {why}")
    session.drifts = alarmed


def _update(session: Session, rollout: Rollout, advantages: Tensor) -> dict[str, float | None]:
    """One or more optimiser steps. Samples whose advantage is zero teach nothing and are left out of the batch."""
    kept = [index for index, value in enumerate(advantages.reshape(-1).tolist()) if value != 0.0]
    if not kept:
        session.run.event(NAME, "skipped-update", step=session.step + 1, why="every group has equal rewards")
        return {}
    updates = session.run.recipe.rl.updates_per_rollout
    parts = [_minibatch(session, rollout, kept[start::updates], advantages) for start in range(min(updates, len(kept)))]
    olds = [_frozen_logprobs(session, part) for part in parts] if updates > 1 else [None]
    measures = [
        _one_update(session, part, old, index / updates)
        for index, (part, old) in enumerate(zip(parts, olds, strict=True))
    ]
    session.mismatches.append(measures[0]["mismatch_abs"])
    averaged: dict[str, float | None] = {key: sum(m[key] for m in measures) / len(measures) for key in measures[0]}
    averaged["mismatch_slope"] = slope(session.mismatches)
    return averaged


@dataclass
class Minibatch:
    """Packed samples; [N] over the target tokens: the engine's log-probabilities, advantages, sample numbers."""

    batch: Batch
    engine: Tensor
    advantages: Tensor
    sample: Tensor


def _minibatch(session: Session, rollout: Rollout, kept: list[int], advantages: Tensor) -> Minibatch:
    flat = [rollout.flat[index] for index in kept]
    documents = [Document(rollout.prompts[p] + one.tokens, len(rollout.prompts[p])) for p, one in flat]
    batch = pack(documents)
    sample = batch.document[batch.target_mask]
    offsets = torch.tensor([0, *(len(one.tokens) for _, one in flat)]).cumsum(0)[:-1]
    starts = torch.tensor([document.prompt_length for document in documents])
    place = offsets[sample] + batch.positions[batch.target_mask] - starts[sample]
    engine = torch.tensor([value for _, one in flat for value in one.logprobs])[place]
    per_sample = advantages.reshape(-1)[torch.tensor(kept)]
    device = next(session.model.parameters()).device
    return Minibatch(batch.to(device), engine.to(device), per_sample[sample].to(device), sample.to(device))


@torch.no_grad()
def _frozen_logprobs(session: Session, part: Minibatch) -> Tensor:
    return target_logprobs(session.model, part.batch, session.run.recipe.rl.temperature)[0]


def _one_update(session: Session, part: Minibatch, old: Tensor | None, progress: float) -> dict[str, float]:
    section = session.run.recipe.rl
    session.optimizer.zero_grad()
    logprobs, entropy = target_logprobs(session.model, part.batch, section.temperature)
    before = logprobs.detach() if old is None else old
    correction = truncated_importance(before, part.engine, section.importance_cap)
    loss = session.algorithm.loss(logprobs, before, part.advantages, correction.weights, part.sample, session.options)
    loss.value.backward()
    gap = mismatch(before, part.engine)
    return {
        "loss": loss.value.item(),
        "clipped": loss.clipped,
        "grad_norm": session.optimizer.step(session.step + progress),
        "entropy": entropy.mean().item(),
        "mismatch_abs": gap.mean_abs,
        "mismatch_max": gap.max_abs,
        "mismatch_k3": gap.k3,
        "importance_mean": correction.mean,
        "importance_clipped": correction.clipped,
        "trained_tokens": float(len(logprobs)),
    }


def _cross(session: Session) -> dict[str, Any]:
    """Bring the trainer's weights to the engine in its format, and check what it then computes; both for the event.

    The version is the number of finished steps.
    """
    recipe = session.run.recipe
    tensors = get_format(recipe.rl.rollout_format).export(_host_state(session.model), recipe.model)
    sent = session.channel.send(session.step, tensors)
    session.weights_sha256 = sent.sha256
    return sent.shown() | _check_version(session, tensors)


def _check_version(session: Session, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """A few greedy tokens of the engine against the format's model on the CPU.

    Beyond the limit all weights are sent once more. If that does not help it is a strike, and an engine with too many
    in a row generates no more: raises GateRefused.
    """
    section = session.run.recipe.rl
    if not section.parity_tokens or session.step % section.parity_every:
        return {}
    began = time.perf_counter()
    gap = _spot_gap(session, tensors)
    if gap.is_over:
        session.channel.send_whole()
        first, gap = gap, _spot_gap(session, tensors)
        _alarm(session, first, gap)
    session.strikes = session.strikes + 1 if gap.is_over else 0
    if session.strikes >= section.parity_strikes:
        raise GateRefused(
            f"the engine on the rollout pool does not compute what was sent to it: at version {session.step} its "
            f"log-probabilities are {gap.mean:.3g} nats/token from the exact model of {section.rollout_format} "
            f"(limit {LIMIT}: {LIMIT_SOURCE}), in {session.strikes} checks in a row and after all weights were sent "
            "again. It must not generate: qualify the pool again, or use another engine"
        )
    return {
        "parity_gap": round(gap.mean, 7) if math.isfinite(gap.mean) else None,
        "parity_gap_max": round(gap.largest, 7) if math.isfinite(gap.largest) else None,
        "parity_tokens": gap.tokens,
        "parity_s": round(time.perf_counter() - began, 4),
    }


def _alarm(session: Session, first: Gap, again: Gap) -> None:
    gaps = {"gap": first.mean, "gap_after_snapshot": again.mean}
    facts = {key: value if math.isfinite(value) else None for key, value in gaps.items()}
    what = "the engine does not compute what was sent to it"
    session.run.event(NAME, "alarm", what=what, weight_version=session.step, limit=LIMIT, **facts)
    outcome = "still" if again.is_over else "helped:"
    session.watch.say(
        f"  [bold red]alarm[/] version {session.step}: {what}, {first.mean:.3g} nats/token from the exact model "
        f"(limit {LIMIT}); all weights sent again, {outcome} {again.mean:.3g}"
    )


def _spot_gap(session: Session, tensors: dict[str, Tensor]) -> Gap:
    recipe = session.run.recipe
    prompts = [prompt_ids(session.tokenizer, problem) for problem in session.task.heldout[:SPOT_PROMPTS]]
    sampling = Sampling(recipe.rl.parity_tokens, temperature=0.0)
    answers = [group[0] for group in session.engine.generate(prompts, sampling)]
    model = get_format(recipe.rl.rollout_format).build(recipe.model, tensors)
    return spot_gap(model, prompts, [(answer.tokens, answer.logprobs) for answer in answers])


def _host_state(model: Model) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}


def _save(session: Session) -> None:
    """Start to write a checkpoint; the state is copied before this returns."""
    extra = {"rng": rng_state(next(session.model.parameters()).device)}
    state = TrainingState(session.model.state_dict(), session.optimizer.state(), extra)
    session.checkpoints.save(session.step, state)


def _save_last(session: Session) -> SavedCheckpoint:
    _save(session)
    saved = session.checkpoints.finish()
    assert saved is not None
    return saved


def _report(
    session: Session,
    rollout: Rollout,
    rewards: Tensor,
    measures: dict[str, float | None],
    timing: dict[str, Any],
    counter: Counter,
) -> None:
    scored = [one for group in rollout.rewards for one in group]
    lengths = [len(completion.tokens) for _, completion in rollout.flat]
    accuracy = sum(one.accuracy for one in scored) / len(scored)
    length = sum(lengths) / len(lengths)
    session.run.event(
        NAME,
        "step",
        step=session.step,
        reward=round(rewards.mean().item(), 5),
        accuracy=round(accuracy, 5),
        format=round(sum(one.format for one in scored) / len(scored), 5),
        completion_tokens=round(length, 3),
        truncated=sum(completion.finish_reason == "length" for _, completion in rollout.flat) / len(lengths),
        weight_version=session.step,
        weight_sha256=session.weights_sha256,
        staleness=session.step - 1 - rollout.version,
        tokens=sum(lengths),
        tokens_per_s=round(sum(lengths) / rollout.seconds, 1),
        **{key: None if value is None else round(value, 7) for key, value in measures.items()},
        **timing,
    )
    gap = measures.get("mismatch_abs")
    status = f"accuracy {accuracy:.2f}  length {length:.0f}" + (f"  |Δlogp| {gap:.4f}" if gap is not None else "")
    counter.advance_to(session.step, status)


def _earlier_mismatches(run: RunFolder, step: int) -> list[float]:
    events = run.events(NAME, "step")
    return [
        event["mismatch_abs"] for event in events if event["step"] <= step and event.get("mismatch_abs") is not None
    ]


@dataclass(frozen=True)
class Evaluation:
    """Held-out results, problem by problem in the order of the task."""

    correct: list[bool]
    tokens: list[int]
    texts: list[str]
    greedy_correct: list[bool]

    @property
    def accuracy(self) -> float:
        return sum(self.correct) / len(self.correct)

    @property
    def mean_tokens(self) -> float:
        return sum(self.tokens) / len(self.tokens)


def _evaluate(session: Session, which: str, watch: Watch) -> Evaluation:
    """Held-out problems through the engine, sampled and greedy; stored, so that a continued run does not repeat it."""
    path = session.run.path / NAME / f"heldout-{which}.json"
    if path.exists():
        return Evaluation(**json.loads(path.read_text(encoding="utf-8")))
    watch.say(f"  held-out problems {which} RL")
    section = session.run.recipe.rl
    problems = session.task.heldout[: section.heldout_problems]
    prompts = [prompt_ids(session.tokenizer, problem) for problem in problems]
    seeds = [seeded("heldout", session.run.recipe.seed, problem.id).getrandbits(48) for problem in problems]

    began = time.perf_counter()
    sampled = session.engine.generate(prompts, Sampling(section.max_new_tokens, section.temperature), seeds)
    greedy = session.engine.generate(prompts, Sampling(section.max_new_tokens, temperature=0.0), seeds)
    texts = [session.tokenizer.decode(group[0].tokens) for group in sampled]
    result = Evaluation(
        correct=[session.reward.score(p, text).accuracy == 1.0 for p, text in zip(problems, texts, strict=True)],
        tokens=[len(group[0].tokens) for group in sampled],
        texts=texts,
        greedy_correct=[
            _score(session, problem, group)[0].accuracy == 1.0 for problem, group in zip(problems, greedy, strict=True)
        ],
    )
    write_atomic(path, json.dumps(result.__dict__).encode())
    session.run.event(
        NAME,
        "evaluate",
        which=which,
        problems=len(problems),
        accuracy=round(result.accuracy, 5),
        greedy_accuracy=round(sum(result.greedy_correct) / len(problems), 5),
        completion_tokens=round(result.mean_tokens, 3),
        seconds=round(time.perf_counter() - began, 3),
    )
    return result


def _record(
    session: Session,
    plan: PlanRecord,
    started: float,
    saved: SavedCheckpoint,
    before: Evaluation,
    after: Evaluation,
) -> RlRecord:
    run, section = session.run, session.run.recipe.rl
    away = plan.pool_of("rollout")
    rehearsed = run.recipe.pools[away].rehearsed
    count = len(before.correct)
    source = (
        f"{count} held-out problems, one sample each at temperature {section.temperature}, generated on pool {away}"
    )
    gain, low, high = paired_difference(before.correct, after.correct, 0.95)
    steps = run.events(NAME, "step")
    example = _telling_example(before, after)

    def figure(
        value: float, unit: str, origin: str = source, low: float | None = None, high: float | None = None
    ) -> Figure:
        return Figure.measured(value, unit, origin, rehearsed=rehearsed, low=low, high=high)

    def accuracy(evaluation: Evaluation) -> Figure:
        low, high = wilson_interval(evaluation.accuracy, count, 0.95)
        return figure(100 * evaluation.accuracy, "%", f"{source}, 95% Wilson interval", 100 * low, 100 * high)

    def mean_of(key: str) -> float:
        values = [event[key] for event in steps if event.get(key) is not None]
        return sum(values) / max(len(values), 1)

    per_step = f"mean over {len(steps)} steps, events.jsonl"
    return RlRecord(
        recipe_sha256=run.recipe.digest(),
        started=started,
        ended=time.time(),
        train_pool=plan.pool_of("train"),
        rollout_pool=away,
        rollout_rehearsed=rehearsed,
        algorithm=section.algorithm,
        steps=session.step,
        resumed_from=[event["from_step"] for event in run.events(NAME, "resume")],
        checkpoint=str(saved.folder.relative_to(run.path)),
        checkpoint_sha256=saved.sha256,
        weight_version=session.step,
        heldout_problems=count,
        accuracy_before=accuracy(before),
        accuracy_after=accuracy(after),
        accuracy_gain=figure(100 * gain, "points", f"{source}, paired by problem, 95% interval", 100 * low, 100 * high),
        thought_tokens_before=figure(before.mean_tokens, "tokens/completion"),
        thought_tokens_after=figure(after.mean_tokens, "tokens/completion"),
        figures={
            "greedy_accuracy_before": figure(
                100 * sum(before.greedy_correct) / count, "%", f"{count} held-out problems, greedy"
            ),
            "greedy_accuracy_after": figure(
                100 * sum(after.greedy_correct) / count, "%", f"{count} held-out problems, greedy"
            ),
            "mismatch_abs": figure(mean_of("mismatch_abs"), "nats/token", per_step),
            "update_bytes": figure(mean_of("update_bytes"), "B/step", per_step),
            "update_ratio": figure(100 * mean_of("update_ratio"), "% of a full update", per_step),
            **_parity_figures(steps, figure),
            "mismatch_k3": figure(mean_of("mismatch_k3"), "nats/token", per_step),
            "importance_clipped": figure(100 * mean_of("importance_clipped"), "%", per_step),
            "rollout_tokens_per_s": figure(mean_of("tokens_per_s"), "tokens/s", per_step),
        },
        sample_before=example[0],
        sample_after=example[1],
    )


def _parity_figures(steps: list[dict[str, Any]], figure: Callable[..., Figure]) -> dict[str, Figure]:
    """The chip's side of the gap, as the check of every version saw it; nothing if there was none."""
    gaps = [event["parity_gap"] for event in steps if event.get("parity_gap") is not None]
    if not gaps:
        return {}
    source = f"mean over {len(gaps)} versions, engine against the exact model of the format, events.jsonl"
    return {"parity_gap": figure(sum(gaps) / len(gaps), "nats/token", source)}


def _telling_example(before: Evaluation, after: Evaluation) -> tuple[str, str]:
    """One held-out problem as it was answered before and after: the first that RL turned from wrong to right."""
    turned = [i for i, (old, new) in enumerate(zip(before.correct, after.correct, strict=True)) if new and not old]
    index = turned[0] if turned else 0
    return before.texts[index], after.texts[index]
