"""Reinforcement learning with verifiable rewards across two pools: one generates, the other learns.

At every step the trainer's weights cross to the rollout engine in its format, with a version and a hash. With
`staleness = 1` the engine generates the next step's samples while the trainer learns from this one's: both pools work
at once, and samples are one version old. Truncated importance sampling corrects for that and for the engine's numerics.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from isthmus.chips import device_of
from isthmus.data.corpus import run_tokenizer
from isthmus.data.tokenizer import Tokenizer
from isthmus.engines.local import LocalEngine, report_kernels
from isthmus.formats.files.bundle import write_bundle
from isthmus.pools import Pool, get_pool
from isthmus.progress import Watch
from isthmus.records import PlanRecord, RlRecord, TrainRecord
from isthmus.rewards import Rewards, open_reward, reward_options
from isthmus.run import RunFolder
from isthmus.stages.rl.crossing import SPOT_PROMPTS, Crossing, DriftAlarm
from isthmus.stages.rl.evaluation import Comparison, evaluate
from isthmus.stages.rl.learner import Learner
from isthmus.stages.rl.rollout import Rollouts
from isthmus.stages.rl.state import NAME, State
from isthmus.tasks import load_task

PARTS = ("train_s", "wait_s", "sync_s")
"""Seconds of a step, in the order in which it spends them, after those of its rollout."""


def execute(run: RunFolder, watch: Watch) -> RlRecord:
    """Train from the last RL checkpoint, or from the supervised one, to the recipe's number of steps."""
    started = time.time()
    plan = run.require_record("plan", PlanRecord, "plan")
    train = run.require_record("train", TrainRecord, "train")
    run.event(NAME, "start", pool=plan.pool_of("train"), rollout_pool=plan.pool_of("rollout"))
    with open_shores(run, plan, train, watch) as shores:
        before = evaluate(run, shores.rollouts, "before", watch.say)
        learn(shores, watch)
        saved = shores.state.save_last()
        after = evaluate(run, shores.rollouts, "after", watch.say)
    record = Comparison(run, plan, before, after).record(started, saved)
    run.write_record(NAME, record)
    run.event(NAME, "end", seconds=round(record.seconds, 3))
    watch.say(f"  held-out accuracy {record.accuracy_before} -> {record.accuracy_after}, gain {record.accuracy_gain}")
    return record


@dataclass(frozen=True)
class Shores:
    """Who takes part: `rollouts` on one pool, `state` and `learner` on the other, and the `crossing` between them."""

    state: State
    rollouts: Rollouts
    learner: Learner
    crossing: Crossing


def learn(shores: Shores, watch: Watch) -> None:
    """The steps that are left, each as in GRPO (DeepSeekMath, arXiv 2402.03300, algorithm 1): sample, reward, compute
    advantages, update; then the new weights cross."""
    state, rollouts, learner, crossing = shores.state, shores.rollouts, shores.learner, shores.crossing
    section, tell = state.run.recipe.rl, partial(state.run.event, NAME)
    drift = DriftAlarm(section.drift_budget, section.steps, tell)
    with watch.count("RL", section.steps) as counter:
        counter.advance_to(state.step)
        rollouts.restore(state.step)
        while state.step < section.steps:
            rollout = rollouts.take(state.step)
            clock = [time.perf_counter()]
            rewards = rollout.totals
            advantages = learner.advantages(rewards)
            measures = learner.update(rollout, advantages)
            state.step += 1
            clock.append(time.perf_counter())
            rollouts.wait()
            clock.append(time.perf_counter())
            crossed = crossing.send()
            clock.append(time.perf_counter())

            drift.look(state.step, state.mismatches, counter.say)
            seconds = dict(zip(PARTS, (round(end - begin, 4) for begin, end in pairwise(clock)), strict=True))
            seen = {"weight_version": state.step, "weight_sha256": crossing.weights_sha256}
            seen |= {"reward": round(rewards.mean().item(), 5), "staleness": state.step - 1 - rollout.version}
            seen |= rollout.shown() | measures
            tell("step", step=state.step, **seen, **crossed, **seconds)
            counter.advance_to(state.step, _status(seen))
            if state.step % section.checkpoint_every == 0 and state.step < section.steps:
                rollouts.store(state.step)
                state.save()


def _status(seen: dict[str, Any]) -> str:
    status = f"accuracy {seen['accuracy']:.2f}  length {seen['completion_tokens']:.0f}"
    return f"{status}  |Δlogp| {seen['mismatch_abs']:.4f}" if "mismatch_abs" in seen else status


@contextmanager
def open_shores(run: RunFolder, plan: PlanRecord, train: TrainRecord, watch: Watch) -> Iterator[Shores]:
    """Both pools at work: the learner where it stopped, and an engine that has its weights."""
    recipe = run.recipe
    home, away = (get_pool(recipe, plan.pool_of(stage)) for stage in ("train", "rollout"))
    if home.ranks > 1:
        run.event(NAME, "fallback", what=f"one of {home.ranks} ranks learns", why="RL does not spread over ranks")
    torch.set_num_threads(home.shared_threads if recipe.rl.staleness else home.threads)
    task = load_task(recipe)
    tokenizer = run_tokenizer(run, task)
    state = State.open(run, train, torch.device(device_of(home)), watch.say)
    with _open_engine(state, away, tokenizer) as engine, ThreadPoolExecutor(max_workers=1) as background:
        weights = {"accuracy": 1.0, "format": recipe.rl.format_reward}
        rewards = Rewards({name: open_reward(name, reward_options(name, {})) for name in weights}, weights)
        rollouts = Rollouts(run, task, tokenizer, rewards, engine, background)
        crossing = Crossing(state, engine, rollouts.prompts([*task.heldout, *task.train][:SPOT_PROMPTS]), watch.say)
        run.event(NAME, "crossing", weight_version=state.step, **crossing.send())
        yield Shores(state, rollouts, Learner(state), crossing)


@contextmanager
def _open_engine(state: State, pool: Pool, tokenizer: Tokenizer) -> Iterator[LocalEngine]:
    folder, recipe = state.run.path / NAME, state.run.recipe
    bundle = folder / "rollout-bundle"
    write_bundle(bundle, recipe.rl.rollout_format, state.weights(), recipe.model, tokenizer)
    threads = pool.shared_threads if recipe.rl.staleness else pool.threads
    rehearse = pool.chip if pool.rehearsed else None
    with LocalEngine(bundle, threads=threads, rehearse=rehearse, log=folder / "engine.log") as engine:
        report_kernels(partial(state.run.event, NAME), engine.kernels)
        yield engine
