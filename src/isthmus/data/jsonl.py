"""The user's own task: one JSON object per line with `prompt`, `answer` and, for supervised tuning, `thought`."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isthmus.data.json_lines import read_objects
from isthmus.data.tasks import Problem
from isthmus.errors import IsthmusError
from isthmus.recipe.schema import DataSection

_KEYS = {"prompt", "answer", "thought"}


@dataclass
class JsonlTask:
    """Problems from two files; the worked example is the one that is written there."""

    train: list[Problem]
    heldout: list[Problem]
    reward: str = "exact"

    def worked_example(self, problem: Problem, chance: random.Random) -> tuple[str, str]:
        return problem.thought, problem.answer


def load(section: DataSection) -> JsonlTask:
    """Read both files. Raises IsthmusError that names the file and the line of the first fault."""
    assert section.train_file is not None and section.heldout_file is not None
    train, heldout = read_problems(section.train_file), read_problems(section.heldout_file)
    shared = {problem.prompt for problem in train} & {problem.prompt for problem in heldout}
    if shared:
        raise IsthmusError(
            f"{section.heldout_file}: {len(shared)} prompts are also in {section.train_file}, e.g. {min(shared)!r}"
        )
    return JsonlTask(train, heldout)


def load_heldout(path: Path) -> JsonlTask:
    """A task of one file that nothing is trained on. Raises IsthmusError as `load` does."""
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
