"""Rule rewards. One file per reward; its name is its registration, its `score` the contract."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Protocol, cast

from isthmus.data.tasks import Problem


@dataclass(frozen=True)
class Reward:
    """Each part is 0 or 1: `accuracy` of the answer, `format` of the completion."""

    accuracy: float
    format: float

    def total(self, format_weight: float) -> float:
        return self.accuracy + format_weight * self.format


class RewardModule(Protocol):
    def score(self, problem: Problem, completion: str) -> Reward:
        """What a completion is worth, in milliseconds whatever a model writes: nothing is computed that can grow."""
        ...


def get_reward(name: str) -> RewardModule:
    """The reward in the file of that name."""
    return cast(RewardModule, importlib.import_module(f"isthmus.rewards.{name}"))
