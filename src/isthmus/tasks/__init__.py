"""What a model learns: problems with a checkable answer, a part of them held out. One file per kind of task.

The file's name is its registration, its `Options` are the keys of `[tasks.NAME]`, and its `open(options)` is the task.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from isthmus.errors import IsthmusError
from isthmus.plugs import plug, plug_names, plug_options
from isthmus.recipe.schema import Recipe
from isthmus.recipe.steps import StepSection
from isthmus.tasks.parts.answers import answer_in as answer_in
from isthmus.tasks.parts.answers import is_same_answer as is_same_answer
from isthmus.tasks.parts.completions import completion_text as completion_text
from isthmus.tasks.parts.completions import split_completion as split_completion
from isthmus.tasks.parts.contract import Task as Task
from isthmus.tasks.parts.contract import TaskOptions as TaskOptions
from isthmus.tasks.parts.mixture import Mixture as Mixture
from isthmus.tasks.parts.mixture import interleaved as interleaved
from isthmus.tasks.parts.problems import Changed
from isthmus.tasks.parts.problems import Problem as Problem
from isthmus.tasks.parts.problems import seeded as seeded


def task_kinds() -> list[str]:
    return plug_names(__path__)


def task_options_class(kind: str) -> type[TaskOptions]:
    """The section that has a kind's options. Raises IsthmusError with a suggestion for an unknown kind."""
    return plug(__name__, task_kinds(), kind, "kind of task").Options


def task_options(kind: str, given: Mapping[str, Any], where: tuple[str, ...] = ()) -> TaskOptions:
    """The options of a task, checked; `where` is the table that they stand in, for the message.

    Raises IsthmusError for an unknown kind and for options that it does not have.
    """
    return plug_options(task_options_class(kind), given, where, f"a task of kind {kind}")


def open_task(kind: str, options: TaskOptions, name: str) -> Task:
    """The task of a kind, under a name that each of its problems then has. For the same options always the same
    problems in the same order. Raises IsthmusError for data that cannot be read."""
    return NamedTask(plug(__name__, task_kinds(), kind, "kind of task").open(options), name, options.system)


def load_tasks(recipe: Recipe) -> dict[str, Task]:
    """The recipe's tasks by name, in its order. Raises IsthmusError for options that a kind does not have, and for
    data that cannot be read."""
    return {name: open_task(*checked_task(name, given), name) for name, given in recipe.tasks.items()}


def tasks_of(recipe: Recipe, step: StepSection, tasks: Mapping[str, Task] | None = None) -> Mixture:
    """The tasks whose problems a step learns or answers, by its weights; all of the recipe's if it names none.

    `tasks` are those of the recipe, if they are open already. Raises IsthmusError as `load_tasks`.
    """
    tasks = load_tasks(recipe) if tasks is None else tasks
    named: Mapping[str, float] = getattr(step, "data", None) or getattr(step, "tasks", None) or {}
    weights = {name: weight for name, weight in named.items() if name in tasks}
    return Mixture(tasks, weights or dict.fromkeys(tasks, 1.0))


def checked_task(name: str, given: Mapping[str, Any]) -> tuple[str, TaskOptions]:
    """(kind, options) of a table [tasks.NAME]. Raises IsthmusError as `task_options`."""
    options = dict(given)
    kind = options.pop("kind", name)
    return kind, task_options(kind, options, ("tasks", name))


def check_task(name: str, given: Mapping[str, Any]) -> None:
    """Raise IsthmusError as `checked_task`, and for what the task names and its kind knows not to be there, as far as
    that shows without reading its data."""
    kind, options = checked_task(name, given)
    module = plug(__name__, task_kinds(), kind, "kind of task")
    if hasattr(module, "check"):
        try:
            module.check(options)
        except IsthmusError as error:
            raise IsthmusError(f"tasks.{name}: {error}") from None


class NamedTask:
    """A task whose problems know its name, and have the system message that its options ask for."""

    def __init__(self, task: Task, name: str, system: str | None):
        self.task, self.name, self.system = task, name, system

    @property
    def about(self) -> str:
        return self.task.about

    @property
    def train(self) -> Sequence[Problem]:
        return Changed(self.task.train, self._named)

    @property
    def heldout(self) -> Sequence[Problem]:
        return Changed(self.task.heldout, self._named)

    def worked_example(self, problem: Problem, chance: random.Random) -> tuple[str, str] | None:
        return self.task.worked_example(problem, chance)

    def accuracy(self, problem: Problem, completion: str) -> float | None:
        return self.task.accuracy(problem, completion)

    def well_formed(self, problem: Problem, completion: str) -> bool:
        return self.task.well_formed(problem, completion)

    def _named(self, problem: Problem) -> Problem:
        if self.system is None:
            return replace(problem, task=self.name)
        said = [message for message in problem.conversation if message["role"] != "system"]
        return replace(problem, task=self.name, messages=({"role": "system", "content": self.system}, *said))
