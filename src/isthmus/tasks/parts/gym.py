"""The data sets of reasoning-gym, and its checkers, which may hang and are called in a worker process."""

from __future__ import annotations

from functools import cache
from typing import Any

import reasoning_gym
from reasoning_gym.factory import DATASETS

DataSet = Any


def data_set(name: str, seed: int, size: int, options: dict[str, Any]) -> DataSet:
    """Raises KeyError for an unknown name; TypeError, ValueError or AssertionError for options that it refuses."""
    if name not in DATASETS:
        raise KeyError(name)
    return reasoning_gym.create_dataset(name, seed=seed, size=size, **options)


def names() -> list[str]:
    return sorted(DATASETS)


def score(name: str, seed: int, size: int, options: list[list[Any]], index: int, answer: str) -> float:
    """What the data set's own checker gives an answer to its problem of that index, from 0 to 1."""
    problems = _kept(name, seed, size, tuple((key, _hashable(value)) for key, value in options))
    return float(problems.score_answer(answer, problems[index]))


@cache
def _kept(name: str, seed: int, size: int, options: tuple[tuple[str, Any], ...]) -> DataSet:
    return data_set(name, seed, size, {key: _plain(value) for key, value in options})


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    return list(map(_plain, value)) if isinstance(value, tuple) else value
