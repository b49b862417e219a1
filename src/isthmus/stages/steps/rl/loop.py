"""Reinforcement learning with verifiable rewards across two pools: one generates, the other learns.

At every step the trainer's weights cross to the rollout engine in its format, with a version and a hash. With
`staleness = k` the engine generates the samples of the next k steps while the trainer learns from this one's: both
pools work at once, and samples are up to k versions old. With `update_while_writing` new weights reach samples that are
being written, and each token has a version of its own. Importance weights correct for all of that, and for the engine's
numerics, because the engine tells the probability with which it drew each token.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from isthmus.chips import device_of
from isthmus.engines.elsewhere import check_telling
from isthmus.errors import TooSlow
from isthmus.launch.beats import beat
from isthmus.launch.local import run_ranks
from isthmus.pools import Pool
from isthmus.progress import Watch
from isthmus.recipe.schema import EngineOptions
from isthmus.recipe.steps import RlSection
from isthmus.records import RlRecord
from isthmus.rewards import open_rewards
from isthmus.stages.steps.data import some_problems, tokenizer_of
from isthmus.stages.steps.drilled import Drill
from isthmus.stages.steps.generate import bundle_of
from isthmus.stages.steps.rl.beside import Beside
from isthmus.stages.steps.rl.crew import Crew
from isthmus.stages.steps.rl.crossing import SPOT_PROMPTS, Crossing, DriftAlarm
from isthmus.stages.steps.rl.engines import Engines, Placed
from isthmus.stages.steps.rl.evaluation import Comparison, evaluate
from isthmus.stages.steps.rl.learner import Learner
from isthmus.stages.steps.rl.rollouts import Replay, Rollouts
from isthmus.stages.steps.rl.state import State
from isthmus.stages.steps.step import StepRun
from isthmus.supervise.gate import COUNT
from isthmus.supervise.guard import Guard
from isthmus.supervise.signals.no_beat import ROLLOUT, UNLIMITED
from isthmus.tasks import tasks_of
from isthmus.trainer.mesh import check_layout, launched_world, open_ranks

PARTS = ("train_s", "wait_s", "sync_s")
"""Seconds of a step, in the order in which it spends them, after those of its rollout."""


def execute(work: StepRun[RlSection], watch: Watch) -> RlRecord:
    """Train from the last checkpoint of the step, or from the weights that it starts from, to its number of updates.

    A pool with several ranks learns on all of them, started here or by torchrun; the first one has the engine.
    """
    home = work.home
    check_layout(work.architecture, work.recipe.train, launched_world() or home.ranks)
    if home.ranks > 1 and launched_world() is None:
        run_ranks("steps", work.run.path, {"name": work.name}, home.ranks, work.folder / "ranks")
    else:
        torch.set_num_threads(threads_of(work, home))
        drill = Drill.of(work.run, work.name, home, int(os.environ.get("RANK", "0")))
        with open_ranks(device_of(home), grouped=False) as ranks:
            crew = Crew(ranks)
            if ranks.is_first:
                _lead(work, crew, watch, drill)
            else:
                follow(work, crew, watch, drill)
            ranks.wait()
    return work.run.require_record(f"steps/{work.name}/record", RlRecord, "run")


def threads_of(work: StepRun[RlSection], home: Pool) -> int:
    """Of one rank, on the host."""
    threads = home.shared_threads if work.section.staleness else home.threads
    return max(1, threads // (launched_world() or 1))


def follow(work: StepRun[RlSection], crew: Crew, watch: Watch, drill: Drill | None = None) -> None:
    """What other ranks than the first do: their part of each update, and of what is written."""
    state = State.open(work, crew, lambda _: None)
    guard = Guard(work.run, work.name, work.place, crew.ranks, watch)
    learner = Learner(state, Beside.of(state), guard, drill)
    beat(UNLIMITED, 0)
    with guard.watching(), learner.under_way():
        crew.follow(state.orders() | learner.orders() | {"leave": _end})


def _lead(work: StepRun[RlSection], crew: Crew, watch: Watch, drill: Drill | None) -> None:
    started, plan, start = time.time(), work.plan, work.start
    work.event(
        "start",
        pool=work.place.pool,
        rollout_pool=work.away.name,
        start=start.name,
        ranks=crew.ranks.world,
    )
    beat(UNLIMITED, 0)
    guard = Guard(work.run, work.name, work.place, crew.ranks, watch)
    with crew.leading(), open_shores(work, plan, crew, watch, guard, drill) as shores:
        before = evaluate(work, shores.rollouts, "before", shores.crossing.weights_sha256, watch.say)
        with guard.watching(), shores.learner.under_way():
            learn(shores, watch)
        beat(UNLIMITED, 0)
        saved = shores.state.save_last()
        after = evaluate(work, shores.rollouts, "after", shores.crossing.weights_sha256, watch.say)
    record = Comparison(work, before, after).record(started, saved)
    work.run.write_record(f"steps/{work.name}/record", record)
    work.event("end", seconds=round(record.seconds, 3))
    watch.say(f"  held-out accuracy {record.accuracy_before} -> {record.accuracy_after}, gain {record.accuracy_gain}")


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
    section, tell = state.work.section, state.work.event
    drift, guard = DriftAlarm(section.drift_budget, section.steps, tell), learner.guard
    attempt = len(state.work.events("start"))
    beat(ROLLOUT, state.step)
    with watch.count(state.work.name, section.steps) as counter:
        counter.advance_to(state.step)
        rollouts.restore(state.step)
        while state.step < section.steps:
            began = time.perf_counter()
            state.seed()
            rollout = rollouts.take(state.step)
            clock = [time.perf_counter()]
            rewards = rollout.totals
            advantages = learner.advantages(rollout, rewards)
            scored = learner.scores(rollout, rewards, advantages)
            if state.saved_at is not None and state.step - state.saved_at < COUNT:
                rollouts.keep(state.step, Replay(rollout, scored, attempt), crossing.weights_sha256)
            learnt = learner.update(rollout, rewards, advantages, scored)
            state.step += 1
            beat(ROLLOUT, state.step)
            clock.append(time.perf_counter())
            rollouts.wait()
            begun_with = crossing.weights_sha256
            clock.append(time.perf_counter())
            crossed = crossing.send()
            clock.append(time.perf_counter())

            drift.look(state.step, state.mismatches, counter.say)
            seconds = dict(zip(PARTS, (round(end - begin, 4) for begin, end in pairwise(clock)), strict=True))
            seen = {"weight_version": state.step, "weight_sha256": crossing.weights_sha256}
            seen |= {
                "reward": _mean(rewards),
            }
            seen |= rollout.lags(state.step - 1)
            seen |= rollout.shown() | learnt.measures
            tell("step", step=state.step, **seen, **crossed, **seconds, **learnt.recorded())
            counter.advance_to(state.step, _status(seen))
            if guard is not None:
                guard.after(state.step, time.perf_counter() - began)
                beat(ROLLOUT, state.step)
            if section.evaluate_every and state.step % section.evaluate_every == 0 and state.step < section.steps:
                beat(UNLIMITED, state.step)
                evaluate(state.work, rollouts, f"step-{state.step}", crossing.weights_sha256, counter.say)
                beat(ROLLOUT, state.step)
            leaves = guard is not None and guard.wants_to_leave
            if state.step < section.steps and (state.step % section.checkpoint_every == 0 or leaves):
                rollouts.store(state.step, begun_with)
                state.save()
                state.work.run.note_events()
            if guard is not None and leaves and state.step < section.steps:
                _leave(state, guard)


def _leave(state: State, guard: Guard) -> None:
    """End with all ranks, once the checkpoint is on the disk. Raises KeyboardInterrupt or TooSlow."""
    state.crew.order("finish")
    state.checkpoints.finish()
    slow = None if guard.too_slow is None else guard.too_slow.detail
    state.crew.order("leave", slow, state.step)
    _end(slow, state.step)


def _end(slow: str | None, step: int) -> None:
    if slow is not None:
        raise TooSlow(slow)
    raise KeyboardInterrupt(f"asked to stop by SIGTERM; saved after update {step}")


def _mean(rewards: Tensor) -> float | None:
    """Of the samples that could be judged; None if there is none."""
    judged = rewards[~rewards.isnan()]
    return round(judged.mean().item(), 5) if len(judged) else None


def _status(seen: dict[str, Any]) -> str:
    accuracy = f"accuracy {seen['accuracy']:.2f}  " if seen.get("accuracy") is not None else ""
    status = f"{accuracy}length {seen['completion_tokens']:.0f}"
    return f"{status}  |Δlogp| {seen['mismatch_abs']:.4f}" if "mismatch_abs" in seen else status


@contextmanager
def open_shores(
    work: StepRun[RlSection],
    plan: Placed,
    crew: Crew,
    watch: Watch,
    guard: Guard | None = None,
    drill: Drill | None = None,
) -> Iterator[Shores]:
    """Both pools at work: the learner where it stopped, and an engine that has its weights."""
    recipe, section = work.recipe, work.section
    tasks, tokenizer = tasks_of(recipe, section), tokenizer_of(work)
    options = EngineOptions(record_routes=section.loss.router_replay)
    state = State.open(work, crew, watch.say)
    learner = Learner(state, Beside.of(state), guard, drill)
    bundle = bundle_of(work, state.weights(), section.rollout_format, tokenizer)
    with (
        open_rewards(section.rewards, recipe.rewards) as rewards,
        Engines(work, plan, bundle, options, watch, lambda: (state.step + 1, state.saved_at or 0)).opened() as engine,
        ThreadPoolExecutor(max_workers=1) as background,
    ):
        check_telling(work.name, section.loss, engine)
        rollouts = Rollouts(work, tasks, tokenizer, rewards, engine, background, lambda: engine.pool.name)
        crossing = Crossing(state, engine, rollouts.prompts(some_problems(tasks, SPOT_PROMPTS)), watch.say)
        work.event("crossing", weight_version=state.step, **crossing.send())
        yield Shores(state, rollouts, learner, crossing)
