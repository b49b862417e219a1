"""What the model learns: problems with a checkable answer, split by hash into training and held-out."""

from __future__ import annotations

import hashlib
import importlib
import random
from dataclasses import dataclass
from typing import Protocol

from isthmus.data.chat_template import END_THINK, THINK
from isthmus.recipe.schema import DataSection, Recipe


@dataclass(frozen=True)
class Problem:
    """A prompt and what a right answer is. `facts` holds what a reward needs, `thought` a written chain of thought."""

    id: str
    prompt: str
    answer: str
    facts: tuple[int, ...] = ()
    thought: str = ""


class Task(Protocol):
    """A source of problems and of worked examples. Each file in `isthmus/data` with a `load` is one task."""

    reward: str
    train: list[Problem]
    heldout: list[Problem]

    def worked_example(self, problem: Problem, chance: random.Random) -> tuple[str, str]:
        """A chain of thought and an answer to learn from."""
        ...


def load_task(recipe: Recipe) -> Task:
    """The recipe's task; for one recipe always the same problems in the same order."""
    return load_section(recipe.data)


def load_section(section: DataSection) -> Task:
    """The task that [data] describes."""
    return importlib.import_module(f"isthmus.data.{section.task}").load(section)


def completion_text(thought: str, answer: str) -> str:
    """A completion as the model writes it: the prompt has already opened <think>."""
    return f"{thought}{END_THINK}\n\n{answer}"


def split_completion(text: str) -> tuple[str, str | None]:
    """(thought, answer) of a completion; the answer is None if the thinking was not closed exactly once."""
    thought, separator, answer = text.removeprefix(f"{THINK}\n").partition(END_THINK)
    if not separator or END_THINK in answer or THINK in answer:
        return thought, None
    return thought, answer.strip()


def is_heldout(problem_id: str, share: float) -> bool:
    """Whether a problem is held out: a property of its text alone, so that it never moves."""
    digest = hashlib.sha256(problem_id.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def split(problems: list[Problem], section: DataSection) -> tuple[list[Problem], list[Problem]]:
    """(training, held-out), the held-out part in the order of its hashes so that any prefix is a fair sample."""
    heldout = [problem for problem in problems if is_heldout(problem.id, section.heldout_share)]
    heldout.sort(key=lambda problem: hashlib.sha256(problem.id.encode()).digest())
    held = {problem.id for problem in heldout}
    return [problem for problem in problems if problem.id not in held], heldout


def seeded(*parts: object) -> random.Random:
    """A random generator that depends on the parts alone: the order of the data needs no state."""
    return random.Random(hashlib.sha256(repr(parts).encode()).digest())
