"""What a sample is worth. One file per kind of reward: its name is its registration, its `Options` the keys of
`[rewards.NAME]`, and its `open(options)` the reward.

A reward that cannot judge a sample leaves it out: a time-out, an answer without a number, a NaN and an exception are
counted, and are never a zero that a model would learn from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import isfinite, nan
from typing import Any, Self

from isthmus.errors import IsthmusError
from isthmus.plugs import plug, plug_names, plug_options
from isthmus.recipe.section import Section
from isthmus.rewards.parts.contract import EachAlone as EachAlone
from isthmus.rewards.parts.contract import Judgement as Judgement
from isthmus.rewards.parts.contract import LeftOut as LeftOut
from isthmus.rewards.parts.contract import Reward as Reward
from isthmus.rewards.parts.contract import Sample as Sample
from isthmus.rewards.parts.contract import attempts

NO_ANSWER = LeftOut("no answer")


def reward_kinds() -> list[str]:
    return plug_names(__path__)


def reward_options_class(kind: str) -> type[Section]:
    """The section that has a kind's options. Raises IsthmusError with a suggestion for an unknown kind."""
    return plug(__name__, reward_kinds(), kind, "kind of reward").Options


def reward_options(kind: str, given: Mapping[str, Any], where: tuple[str, ...] = ()) -> Section:
    """The options of a reward, checked; `where` is the table that they stand in, for the message.

    Raises IsthmusError for an unknown kind and for options that it does not have.
    """
    return plug_options(reward_options_class(kind), given, where, f"a reward of kind {kind}")


def open_reward(kind: str, options: Section) -> Reward:
    """A reward at work, until it is closed. Raises IsthmusError for what it needs and does not find."""
    return plug(__name__, reward_kinds(), kind, "kind of reward").open(options)


def open_rewards(weights: Mapping[str, float], sections: Mapping[str, Mapping[str, Any]]) -> Rewards:
    """The rewards that a step weighs, at work until they are closed; `sections` are the tables [rewards.NAME]."""
    with ExitStack() as opened:
        rewards: dict[str, Reward] = {}
        for name in weights:
            rewards[name] = open_reward(*checked_reward(name, sections.get(name, {})))
            opened.callback(rewards[name].close)
        found = Rewards(rewards, weights)
        opened.pop_all()
    return found


def checked_reward(name: str, given: Mapping[str, Any]) -> tuple[str, Section]:
    """(kind, options) of a table [rewards.NAME]. Raises IsthmusError as `reward_options`."""
    options = dict(given)
    kind = options.pop("kind", name)
    return kind, reward_options(kind, options, ("rewards", name))


@dataclass(frozen=True)
class Scores:
    """What samples earned, in their order; all of it can be JSON.

    `values` has each reward's own, `totals` their weighted sums; None stands for a sample that is left out. `left_out`
    counts samples by the reward and the reason, `measures` is what the rewards tell of themselves.
    """

    values: dict[str, list[float | None]]
    totals: list[float | None]
    left_out: dict[str, int] = field(default_factory=dict)
    measures: dict[str, float] = field(default_factory=dict)

    @property
    def numbers(self) -> list[float]:
        """The totals, with NaN for samples that are left out."""
        return [nan if total is None else total for total in self.totals]

    @property
    def means(self) -> dict[str, float | None]:
        """Of each reward over the samples that it could judge; None if there is none."""
        return {name: _mean([value for value in values if value is not None]) for name, values in self.values.items()}

    def shown(self) -> dict[str, Any]:
        """For an event: the mean of each reward under its name, and what was left out if anything was."""
        means = {name: mean if mean is None else round(mean, 5) for name, mean in self.means.items()}
        left_out = {"samples_left_out": self.totals.count(None), "left_out": self.left_out} if self.left_out else {}
        return means | left_out | self.measures


class Rewards:
    """Several rewards by name, added up by their weights. A weight of 0 is a reward that is only watched."""

    def __init__(self, rewards: Mapping[str, Reward], weights: Mapping[str, float]):
        for name, weight in weights.items():
            if not isfinite(weight):
                raise IsthmusError(f"the weight of the reward {name!r} must be a finite number, not {weight}")
        self.rewards = {name: rewards[name] for name in weights}
        self.weights = dict(weights)

    def score(self, samples: Sequence[Sample]) -> Scores:
        """A sample that a reward with a weight could not judge has no total."""
        names = list(self.rewards)
        calls = [self.rewards[name].score for name in names]
        found = dict(zip(names, attempts(calls, [samples] * len(names)), strict=True))
        judged = {name: _judgements(name, found[name], len(samples)) for name in names}
        reasons = Counter(f"{name}: {one.reason}" for name in names for one in judged[name] if isinstance(one, LeftOut))
        values = {name: [_value(one) for one in judged[name]] for name in names}
        totals = [self._total({name: values[name][number] for name in names}) for number in range(len(samples))]
        measures = {key: value for reward in self.rewards.values() for key, value in reward.measures().items()}
        return Scores(values, totals, dict(reasons), measures)

    def close(self) -> None:
        with ExitStack() as stack:
            for reward in self.rewards.values():
                stack.callback(reward.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _total(self, values: Mapping[str, float | None]) -> float | None:
        total = 0.0
        for name, weight in self.weights.items():
            value = values[name]
            if weight and value is None:
                return None
            total += weight * (value or 0.0)
        return total


def _judgements(name: str, found: Sequence[Judgement] | LeftOut, count: int) -> list[float | LeftOut]:
    if isinstance(found, LeftOut):
        return [found] * count
    if len(found) != count:
        raise IsthmusError(f"the reward {name!r} gave {len(found)} values for {count} samples: one for each is wanted")
    return [_checked(one) for one in found]


def _checked(one: Judgement) -> float | LeftOut:
    if isinstance(one, LeftOut):
        return one
    if one is None:
        return NO_ANSWER
    if not isinstance(one, int | float):
        return LeftOut(f"{type(one).__name__} is no number")
    return float(one) if isfinite(one) else LeftOut("not a finite number")


def _value(one: float | LeftOut) -> float | None:
    return None if isinstance(one, LeftOut) else one


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
