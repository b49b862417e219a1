"""What a reward is, and what becomes of one that fails."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from isthmus.errors import IsthmusError
from isthmus.tasks import Problem, Task, split_completion

Given = TypeVar("Given")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Sample:
    """A completion of a problem: `tokens` of the `limit` that it could have; `finished` if it ended by itself."""

    problem: Problem
    task: Task
    text: str
    tokens: int
    limit: int
    finished: bool

    @property
    def thought(self) -> str:
        return split_completion(self.text)[0]

    @property
    def answer(self) -> str | None:
        """None if the thinking was not closed exactly once."""
        return split_completion(self.text)[1]


@dataclass(frozen=True)
class LeftOut:
    """Why a sample could not be judged, in a few words that are the same for the same cause."""

    reason: str


Judgement = float | LeftOut | None
"""What a sample is worth; None is a sample that could not be judged, without a reason."""


class Reward(ABC):
    """Judges samples. What it raises leaves all samples of the call out, unless it is an IsthmusError."""

    @abstractmethod
    def score(self, samples: Sequence[Sample]) -> Sequence[Judgement]:
        """What each sample is worth, in their order."""

    def measures(self) -> dict[str, float]:
        """What it tells of itself, since it was opened; the names are unique among rewards."""
        return {}

    def close(self) -> None:
        """Stop what it started."""
        return


class EachAlone(Reward):
    """A reward that judges each sample for itself, `at_once` of them at a time; what `judge` raises leaves out one."""

    at_once = 1

    @abstractmethod
    def judge(self, sample: Sample) -> Judgement: ...

    def score(self, samples: Sequence[Sample]) -> Sequence[Judgement]:
        return attempts([self.judge] * len(samples), samples, self.at_once)


def attempts(
    calls: Sequence[Callable[[Given], Result]], given: Sequence[Given], at_once: int = 1
) -> list[Result | LeftOut]:
    """The result of each call, or the kind of the exception that it raised. Raises IsthmusError if one did."""
    with ThreadPoolExecutor(max_workers=at_once) as pool:
        futures = [pool.submit(call, one) for call, one in zip(calls, given, strict=True)]
    return [_outcome(future) for future in futures]


def _outcome(future: Future[Result]) -> Result | LeftOut:
    error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, IsthmusError) or not isinstance(error, Exception):
        raise error
    return LeftOut(type(error).__name__)
