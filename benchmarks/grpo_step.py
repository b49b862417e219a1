"""The shipped step of RL, one rollout and its update on each request: our side of benchmarks/grpo.py.

    python -m benchmarks.grpo_step RUN STEP

Lines on standard input and output are those of rivals/steps.py. The answer to a problem is judged by the reward that
the rival has; nothing else is changed.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.rivals.steps import OnRequest, early_letters
from isthmus.engines.channel import Channel
from isthmus.progress import Watch
from isthmus.rewards import Rewards
from isthmus.run import RunFolder
from isthmus.stages import steps
from isthmus.stages.steps.rl.crossing import Crossing
from isthmus.stages.steps.rl.learner import Learner
from isthmus.stages.steps.rl.rollouts import Rollouts
from isthmus.tasks import Problem
from isthmus.tasks.jsonl import JsonlTask


def main() -> None:
    requests = OnRequest(processor_time)
    observe(requests)
    steps.execute(RunFolder.open(Path(sys.argv[1])), Watch(quiet=True), name=sys.argv[2])


def processor_time() -> float:
    """Of this process and of those that it has started, which are the engine's."""
    own = str(os.getpid())
    children = [path for path in Path("/proc").glob("[0-9]*/stat") if _parent(path) == own]
    tasks = [task for child in children for task in child.parent.glob("task/*/schedstat")]
    return time.process_time() + sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


def _parent(stat: Path) -> str:
    try:
        return stat.read_text().rpartition(")")[2].split()[1]
    except OSError:
        return ""


def judged(self: JsonlTask, problem: Problem, completion: str) -> float | None:
    return early_letters(completion)


def observe(requests: OnRequest) -> None:
    """Hold each step until it is asked for, time its parts, and tell how long its samples were."""
    watch = requests.watch
    JsonlTask.accuracy = judged
    watch.wrap(Rollouts, "generate", "rollout")
    watch.wrap(Rewards, "score", "rewards")
    watch.wrap(Learner, "_logprobs", "log-probabilities")
    watch.wrap(Learner, "update", "update")
    watch.wrap(Crossing, "send", "crossing")
    watch.wrap(Crossing, "_check", "check of the engine")
    watch.wrap(Channel, "send", "crossing")
    take = Rollouts.take

    def taken(self: Rollouts, step: int) -> Any:
        requests.before_step()
        rollout = take(self, step)
        requests.found = {"tokens": sum(len(one.tokens) for _, one in rollout.flat), "samples": len(rollout.flat)}
        return rollout

    Rollouts.take = taken


if __name__ == "__main__":
    main()
