"""What a task is."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Protocol

from isthmus.recipe.section import Section, key
from isthmus.tasks.parts.problems import Problem


class TaskOptions(Section):
    """What every kind of task can be told."""

    system: str | None = key(None, "a system message before each prompt, in place of one that the data has")


class Task(Protocol):
    """A source of problems, of worked examples, and of judgements."""

    @property
    def about(self) -> str:
        """What it is, in a line for who watches; of the user's data, how it was understood."""
        ...

    @property
    def train(self) -> Sequence[Problem]: ...

    @property
    def heldout(self) -> Sequence[Problem]:
        """Problems that are never trained on."""
        ...

    def worked_example(self, problem: Problem, chance: random.Random) -> tuple[str, str] | None:
        """A chain of thought and an answer to learn from; None if there is none."""
        ...

    def accuracy(self, problem: Problem, completion: str) -> float | None:
        """How right a completion is, from 0 to 1; None if that could not be judged.

        It takes milliseconds whatever a model writes: nothing is computed that can grow.
        """
        ...

    def well_formed(self, problem: Problem, completion: str) -> bool:
        """Whether a completion has the form that it should have, be it right or wrong."""
        ...
