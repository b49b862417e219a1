"""Taskset packages of verifiers 1.x (`verifiers.v1`), as the Environments Hub has them, with their own rewards.

Those that want one answer to one question are taken; tools, several turns, containers and environments of several
models are refused by name. The package is loaded, and its rewards are computed, in a process of its own.
"""

from __future__ import annotations

import importlib.util
import json
import random
from functools import cached_property
from typing import Any

from pydantic import Field

from isthmus.errors import IsthmusError
from isthmus.recipe.section import Count, Seconds, Share, key
from isthmus.tasks.parts.completions import split_completion
from isthmus.tasks.parts.contract import TaskOptions
from isthmus.tasks.parts.problems import Problem, split
from isthmus.tasks.parts.shapes import asked_problem
from isthmus.tasks.parts.worker import START_S, Worker, WorkerFailed

FUNCTIONS = "isthmus.tasks.parts.taskset"


class Options(TaskOptions):
    """A taskset that is installed; `options` are its own configuration."""

    taskset: str = Field(description="id of the taskset: the name of its package, or owner/name of the hub")
    problems: Count = key(2000, "tasks that are read, the first ones")
    heldout_share: Share = key(0.1, "share of them that is never trained on, chosen by hash", gt=0)
    options: dict[str, Any] = key({}, "options of the taskset")
    deadline: Seconds = key(10.0, "for the rewards of one answer; what takes longer is left out", gt=0)


class Taskset:
    def __init__(self, options: Options):
        self.options = options
        self.given = (options.taskset, json.dumps({"id": options.taskset, **options.options}), options.problems)
        self.worker = Worker(f"{FUNCTIONS}:score", options.deadline, first=(*self.given, 0, ""))

    @property
    def about(self) -> str:
        return f"verifiers: {self.options.taskset}, {len(self._read)} tasks with the rewards of the package"

    @property
    def train(self) -> list[Problem]:
        return self._split[0]

    @property
    def heldout(self) -> list[Problem]:
        return self._split[1]

    def worked_example(self, problem: Problem, chance: random.Random) -> None:
        """A taskset has rewards, and no examples."""
        return

    def accuracy(self, problem: Problem, completion: str) -> float | None:
        """The taskset's rewards, added up by their weights; None if they could not be computed."""
        _, answer = split_completion(completion)
        if answer is None:
            return 0.0
        try:
            return self.worker.call(*self.given, problem.metadata["index"], answer)
        except WorkerFailed:
            return None

    def well_formed(self, problem: Problem, completion: str) -> bool:
        return bool(split_completion(completion)[1])

    def read(self) -> None:
        """Load the taskset now. Raises IsthmusError if it cannot be loaded, or is not for single answers."""
        assert self._read

    @cached_property
    def _split(self) -> tuple[list[Problem], list[Problem]]:
        return split(self._read, self.options.heldout_share)

    @cached_property
    def _read(self) -> list[Problem]:
        reader = Worker(f"{FUNCTIONS}:problems", START_S)
        try:
            said = reader.call(*self.given)
        except WorkerFailed as error:
            raise IsthmusError(f"the taskset {self.options.taskset!r} cannot be loaded: {error.said}") from None
        finally:
            reader.close()
        if "refused" in said:
            raise IsthmusError(
                f"the taskset {self.options.taskset!r} is not for single answers: {said['refused']}. Tasks with tools "
                "or several turns are not trained on here"
            )
        return [self._problem(index, one["messages"]) for index, one in enumerate(said["problems"])]

    def _problem(self, index: int, messages: list[dict[str, Any]]) -> Problem:
        try:
            return asked_problem(messages, metadata={"index": index})
        except ValueError as error:
            raise IsthmusError(f"task {index} of the taskset {self.options.taskset!r}: {error}") from None


def open(options: Options) -> Taskset:
    """Raises IsthmusError without verifiers, and for a taskset that is not installed, or not for single answers."""
    if importlib.util.find_spec("verifiers") is None:
        raise IsthmusError("the task kind verifiers needs the library: pip install 'isthmus[verifiers]'")
    taskset = Taskset(options)
    taskset.read()
    return taskset
