"""The data sets of reasoning-gym: problems that a seed generates, each with a checker of its own."""

from __future__ import annotations

import importlib
import importlib.util
import random
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any

from pydantic import Field

from isthmus.errors import IsthmusError, suggestion
from isthmus.recipe.section import Count, Seconds, Whole, key
from isthmus.recipe.steps import Problems
from isthmus.tasks.parts.answers import Place, answer_in
from isthmus.tasks.parts.completions import split_completion
from isthmus.tasks.parts.contract import TaskOptions
from isthmus.tasks.parts.problems import Problem
from isthmus.tasks.parts.worker import Worker, WorkerFailed

HELDOUT_SEEDS = 1 << 24
"""How far the held-out seeds are from those of training: a problem is made of the sum of seed and index alone."""


class Options(TaskOptions):
    """A data set of reasoning-gym; `options` are the data set's own."""

    dataset: str = Field(description="name of the data set, such as basic_arithmetic")
    problems: Count = key(2000, "problems to train on", lt=HELDOUT_SEEDS)
    heldout_problems: Problems = key(500, "problems that are never trained on", lt=HELDOUT_SEEDS)
    seed: Whole = key(0, "what the problems depend on", ge=0)
    options: dict[str, Any] = key({}, "options of the data set")
    answer_place: Place = key("whole", "where an answer stands: all after the thinking, \\boxed{}, <answer> or ####")
    deadline: Seconds = key(5.0, "for the checker on one answer; what takes longer is left out", gt=0)


@dataclass(frozen=True)
class Part:
    """Problems of consecutive seeds."""

    name: str
    seed: int
    size: int


class ReasoningGym:
    """Trains on no question that is held out, also where the data set makes it of another seed."""

    def __init__(self, options: Options, gym: ModuleType):
        self.options, self.gym = options, gym
        self.parts = {
            "train": Part("train", options.seed, options.problems),
            "heldout": Part("heldout", options.seed + HELDOUT_SEEDS, options.heldout_problems),
        }
        first = self._question("train", 0, "")
        self.worker = Worker("isthmus.tasks.parts.gym:score", options.deadline, first)

    @property
    def about(self) -> str:
        return f"reasoning-gym: {self.options.dataset}, {self.options.problems} problems of seed {self.options.seed}"

    @cached_property
    def train(self) -> list[Problem]:
        held = {problem.prompt for problem in self.heldout}
        return [problem for problem in self._problems("train") if problem.prompt not in held]

    @cached_property
    def heldout(self) -> list[Problem]:
        """Each question once."""
        return list({problem.prompt: problem for problem in self._problems("heldout")}.values())

    def worked_example(self, problem: Problem, chance: random.Random) -> tuple[str, str] | None:
        """The answer; how to come to it is not in the data."""
        if not problem.answer:
            return None
        written = {"boxed": "\\boxed{%s}", "tag": "<answer>%s</answer>", "hashes": "#### %s", "whole": "%s"}
        return "", written[self.options.answer_place] % problem.answer

    def accuracy(self, problem: Problem, completion: str) -> float | None:
        answer = self._answer(completion)
        if answer is None:
            return 0.0
        try:
            return self.worker.call(*self._question(problem.metadata["part"], problem.metadata["index"], answer))
        except WorkerFailed:
            return None

    def well_formed(self, problem: Problem, completion: str) -> bool:
        return self._answer(completion) is not None

    def _answer(self, completion: str) -> str | None:
        _, text = split_completion(completion)
        return answer_in(text, self.options.answer_place) if text else None

    def _question(self, name: str, index: int, answer: str) -> tuple[Any, ...]:
        """For the checker, on the answer to a problem of a part."""
        part, given = self.parts[name], sorted(self.options.options.items())
        return self.options.dataset, part.seed, part.size, given, index, answer

    def _problems(self, name: str) -> list[Problem]:
        part = self.parts[name]
        items = self.gym.data_set(self.options.dataset, part.seed, part.size, self.options.options)
        return [
            Problem(
                id=item["question"],
                prompt=item["question"],
                answer="" if item["answer"] is None else str(item["answer"]),
                metadata={"part": name, "index": index},
            )
            for index, item in enumerate(items[index] for index in range(part.size))
        ]


def check(options: Options) -> None:
    """Raises IsthmusError for a data set or an option that reasoning-gym does not have, where it is installed."""
    if importlib.util.find_spec("reasoning_gym") is not None:
        _library(options)


def open(options: Options) -> ReasoningGym:
    """Raises IsthmusError without reasoning-gym, and for a data set or an option that it does not have."""
    return ReasoningGym(options, _library(options))


def _library(options: Options) -> ModuleType:
    """What has the data sets, once it is known that it has this one."""
    try:
        gym = importlib.import_module("isthmus.tasks.parts.gym")
    except ModuleNotFoundError as error:
        raise IsthmusError(
            f"the task kind reasoning-gym needs {error.name}: pip install 'isthmus[reasoning-gym]'"
        ) from None
    name = options.dataset
    if name not in gym.names():
        raise IsthmusError(f"reasoning-gym has no data set {name!r}{suggestion(name, gym.names())}")
    try:
        gym.data_set(name, options.seed, 1, options.options)
    except (TypeError, ValueError, AssertionError) as error:
        raise IsthmusError(f"reasoning-gym's {name} refuses its options: {error}") from None
    return gym
