"""Problems, as every task has them, and how they are split and drawn without a state."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

Messages = tuple[dict[str, Any], ...]
"""A conversation as OpenAI's API has it: each message with a `role` and a `content`."""


@dataclass(frozen=True)
class Problem:
    """A prompt and what a right answer is. All of it can be JSON.

    `facts` and `metadata` hold what the task needs to judge an answer, `thought` a written chain of thought. `messages`
    is the conversation that is to be answered, where it is more than the prompt; `task` the name of the problem's task.
    """

    id: str
    prompt: str
    answer: str
    facts: tuple[int, ...] = ()
    thought: str = ""
    messages: Messages = field(default=(), hash=False)
    metadata: dict[str, Any] = field(default_factory=dict, hash=False)
    task: str = ""

    @property
    def conversation(self) -> list[dict[str, Any]]:
        """What is to be answered, for a chat template."""
        return list(self.messages) or [{"role": "user", "content": self.prompt}]


class Changed(Sequence[Problem]):
    """Problems of which each is changed when it is asked for."""

    def __init__(self, problems: Sequence[Problem], change: Callable[[Problem], Problem]):
        self.problems, self.change = problems, change

    def __len__(self) -> int:
        return len(self.problems)

    @overload
    def __getitem__(self, index: int) -> Problem: ...

    @overload
    def __getitem__(self, index: slice) -> list[Problem]: ...

    def __getitem__(self, index: int | slice) -> Problem | list[Problem]:
        if isinstance(index, slice):
            return [self.change(self.problems[one]) for one in range(*index.indices(len(self)))]
        return self.change(self.problems[index])


def is_heldout(problem_id: str, share: float) -> bool:
    """Whether a problem is held out: a property of its text alone, so that it never moves."""
    return int.from_bytes(_digest(problem_id)[:8], "big") < share * 2**64


def split(problems: Iterable[Problem], heldout_share: float) -> tuple[list[Problem], list[Problem]]:
    """(training, held-out), the held-out part in the order of its hashes so that any prefix is a fair sample."""
    train: list[Problem] = []
    heldout: list[Problem] = []
    for problem in problems:
        (heldout if is_heldout(problem.id, heldout_share) else train).append(problem)
    return train, sorted(heldout, key=lambda problem: _digest(problem.id))


def seeded(*parts: object) -> random.Random:
    """A random generator that depends on the parts alone: the order of the data needs no state."""
    return random.Random(hashlib.sha256(repr(parts).encode()).digest())


def _digest(problem_id: str) -> bytes:
    return hashlib.sha256(problem_id.encode()).digest()
