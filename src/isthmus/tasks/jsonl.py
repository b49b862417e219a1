"""The user's own problems, in JSON Lines or Parquet, in the shapes that people have: `parts/shapes.py` lists them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from isthmus.errors import IsthmusError
from isthmus.lines import read_objects
from isthmus.recipe.section import Share, key
from isthmus.tasks.parts.answers import Place, answer_in, is_same_answer
from isthmus.tasks.parts.completions import split_completion
from isthmus.tasks.parts.contract import TaskOptions
from isthmus.tasks.parts.problems import Problem, split
from isthmus.tasks.parts.shapes import shape_of

PARQUET = ".parquet"
_BATCH = 1024


class Options(TaskOptions):
    """Problems in files of the user, JSON Lines or Parquet: `prompt` and `answer`, verl's fields, TRL's, `messages`."""

    train_file: Path = Field(description="problems to train on; *.parquet is Parquet, anything else JSON Lines")
    heldout_file: Path | None = key(None, "problems that are never trained on")
    heldout_share: Share | None = key(None, "share of train_file that is held out, where there is no heldout_file")
    answer_column: str | None = key(None, "the column that has the answer; found by its name if absent")
    answer_place: Place = key("whole", "where an answer stands: all after the thinking, \\boxed{}, <answer> or ####")

    @model_validator(mode="after")
    def _held_out_once(self) -> Self:
        if (self.heldout_file is None) == (self.heldout_share is None):
            raise ValueError("give heldout_file or heldout_share, one of them")
        return self


@dataclass(frozen=True)
class ProblemFile:
    """A file of problems in one shape."""

    path: Path
    shape: str
    problems: list[Problem]

    @property
    def about(self) -> str:
        return f"{self.path.name}: {len(self.problems)} problems in the shape of {self.shape}"


@dataclass
class JsonlTask:
    """Problems that were read; the worked example is the one that is written there."""

    train: list[Problem]
    heldout: list[Problem]
    place: Place = "whole"
    about: str = field(default="")

    def worked_example(self, problem: Problem, chance: random.Random) -> tuple[str, str] | None:
        return (problem.thought, problem.answer) if problem.answer else None

    def accuracy(self, problem: Problem, completion: str) -> float | None:
        """1 if the answer is the expected one, as a number if both are numbers, else as a text without outer space.

        None where the data has no answer.
        """
        if not problem.answer:
            return None
        answer = self._answer(completion)
        expected = answer_in(problem.answer, self.place) or problem.answer
        return float(answer is not None and is_same_answer(answer, expected))

    def well_formed(self, problem: Problem, completion: str) -> bool:
        """The thinking is closed once, and an answer stands in its place."""
        return self._answer(completion) is not None

    def _answer(self, completion: str) -> str | None:
        _, text = split_completion(completion)
        return answer_in(text, self.place) if text else None


def open(options: Options) -> JsonlTask:
    """Read the files. Raises IsthmusError that names the file and the line of the first fault."""
    read = read_file(options.train_file, options.answer_column)
    if options.heldout_file is None:
        assert options.heldout_share is not None
        train, heldout = split(read.problems, options.heldout_share)
        return JsonlTask(train, heldout, options.answer_place, f"{read.about}, {len(heldout)} of them held out")
    held = read_file(options.heldout_file, options.answer_column)
    shared = {problem.prompt for problem in read.problems} & {problem.prompt for problem in held.problems}
    if shared:
        raise IsthmusError(
            f"{options.heldout_file}: {len(shared)} prompts are also in {options.train_file}, e.g. {min(shared)!r}"
        )
    return JsonlTask(read.problems, held.problems, options.answer_place, f"{read.about}; {held.about}")


def load_heldout(path: Path) -> JsonlTask:
    """A task of one file that nothing is trained on. Raises IsthmusError as `open` does."""
    read = read_file(path)
    return JsonlTask([], read.problems, about=read.about)


def read_file(path: Path, answer_column: str | None = None) -> ProblemFile:
    """The problems of one file, in order, all in the shape of the first. Raises IsthmusError with the line at fault."""
    rows = _parquet_rows(path) if path.suffix == PARQUET else read_objects(path, "data")
    problems: list[Problem] = []
    shape = None
    for where, row in rows:
        try:
            shape = shape or shape_of(row, answer_column)
            problems.append(shape.read(row))
        except ValueError as error:
            raise IsthmusError(f"{where}: {error}") from None
    if shape is None:
        raise IsthmusError(f"{path} holds no problems")
    return ProblemFile(path, shape.name, problems)


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(`file: row N`, row) from 1, without columns that are null in it."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise IsthmusError(f"{path} is Parquet, which pyarrow reads: pip install 'isthmus[parquet]'") from None
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", _without_null(row)
    except FileNotFoundError:
        raise IsthmusError(f"no data file at {path}") from None
    except (ArrowException, OSError) as error:
        raise IsthmusError(f"the data file {path} cannot be read: {error}") from None


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_null(one) for key, one in value.items() if one is not None}
    return [_without_null(one) for one in value] if isinstance(value, list) else value
