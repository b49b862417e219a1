"""The user's own task: one JSON object per line with `prompt`, `answer` and, for supervised tuning, `thought`."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from isthmus.errors import IsthmusError
from isthmus.lines import read_objects
from isthmus.tasks.parts.answers import is_same_answer
from isthmus.tasks.parts.completions import split_completion
from isthmus.tasks.parts.contract import TaskOptions
from isthmus.tasks.parts.problems import Problem

_KEYS = {"prompt", "answer", "thought"}


class Options(TaskOptions):
    """Problems in files of the user."""

    train_file: Path = Field(description="lines with `prompt`, `answer` and, for supervised tuning, `thought`")
    heldout_file: Path = Field(description="such lines that are never trained on")


@dataclass
class JsonlTask:
    """Problems from two files; the worked example is the one that is written there."""

    train: list[Problem]
    heldout: list[Problem]

    def worked_example(self, problem: Problem, chance: random.Random) -> tuple[str, str]:
        return problem.thought, problem.answer

    def accuracy(self, problem: Problem, completion: str) -> float:
        """1 if the answer is the expected one, as a number if both are numbers, else as a text without outer space."""
        _, answer = split_completion(completion)
        return float(bool(answer) and is_same_answer(answer, problem.answer))

    def well_formed(self, problem: Problem, completion: str) -> bool:
        """The thinking is closed once, and something follows."""
        return bool(split_completion(completion)[1])


def open(options: Options) -> JsonlTask:
    """Read both files. Raises IsthmusError that names the file and the line of the first fault."""
    train, heldout = read_problems(options.train_file), read_problems(options.heldout_file)
    shared = {problem.prompt for problem in train} & {problem.prompt for problem in heldout}
    if shared:
        raise IsthmusError(
            f"{options.heldout_file}: {len(shared)} prompts are also in {options.train_file}, e.g. {min(shared)!r}"
        )
    return JsonlTask(train, heldout)


def load_heldout(path: Path) -> JsonlTask:
    """A task of one file that nothing is trained on. Raises IsthmusError as `open` does."""
    return JsonlTask([], read_problems(path))


def read_problems(path: Path) -> list[Problem]:
    """The problems of one file, in order."""
    problems = [_problem(where, row) for where, row in read_objects(path, "data")]
    if not problems:
        raise IsthmusError(f"{path} holds no problems")
    return problems


def _problem(where: str, row: dict[str, Any]) -> Problem:
    for key in ("prompt", "answer"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise IsthmusError(f"{where}: {key!r} must be a text that is not empty")
    if not isinstance(row.get("thought", ""), str):
        raise IsthmusError(f"{where}: 'thought' must be a text")
    if unknown := sorted(set(row) - _KEYS):
        raise IsthmusError(f"{where}: unknown key {unknown[0]!r}; known: {', '.join(sorted(_KEYS))}")
    return Problem(id=row["prompt"], prompt=row["prompt"], answer=row["answer"], thought=row.get("thought", ""))
