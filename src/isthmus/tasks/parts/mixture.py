"""Several tasks at once, each drawn from by its weight."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence

from isthmus.errors import IsthmusError, suggestion
from isthmus.tasks.parts.contract import Task
from isthmus.tasks.parts.problems import Problem


class Mixture:
    """Tasks by name, with weights: a problem that is drawn is of a task by the weight, and any of it.

    `heldout_alone` says that nothing will be drawn, so that all weights may be 0.

    Raises IsthmusError for weights that are no weights.
    """

    def __init__(self, tasks: Mapping[str, Task], weights: Mapping[str, float], *, heldout_alone: bool = False):
        for name, weight in weights.items():
            if name not in tasks:
                raise IsthmusError(f"unknown task {name!r}{suggestion(name, tasks)}")
            if not (weight >= 0 and math.isfinite(weight)):
                raise IsthmusError(f"the weight of the task {name!r} must be a number that is not negative: {weight}")
        if not heldout_alone and not any(weights.values()):
            raise IsthmusError("no task has a weight above 0, so there is nothing to draw")
        self.tasks = {name: tasks[name] for name in weights}
        self.weights = dict(weights)
        for name in self._drawn:
            if not self.tasks[name].train:
                raise IsthmusError(f"the task {name!r} has no problems to train on; give it a weight of 0")

    def draw(self, chance: random.Random, count: int) -> list[Problem]:
        """`count` problems, some perhaps more than once. They depend on `chance` alone."""
        drawn = self._drawn
        if len(drawn) == 1:
            return chance.choices(self.tasks[drawn[0]].train, k=count)
        names = chance.choices(drawn, [self.weights[name] for name in drawn], k=count)
        return [chance.choice(self.tasks[name].train) for name in names]

    def of(self, problem: Problem) -> Task:
        """The task of a problem."""
        return self.tasks[problem.task]

    @property
    def heldout(self) -> dict[str, Sequence[Problem]]:
        """The held-out part of each task, also of one whose weight is 0."""
        return {name: task.heldout for name, task in self.tasks.items()}

    @property
    def _drawn(self) -> list[str]:
        return [name for name, weight in self.weights.items() if weight > 0]


def interleaved(parts: Mapping[str, Sequence[Problem]], count: int) -> list[Problem]:
    """The first problems of each part in turn, `count` at most."""
    most = max(map(len, parts.values()), default=0)
    rounds = (part[index] for index in range(min(most, count)) for part in parts.values() if index < len(part))
    return list(itertools.islice(rounds, count))
