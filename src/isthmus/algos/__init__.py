"""RL algorithms. One file each, with its own `Config`, `advantages` and `loss`; the file name is the registration.

What a loss may have beside an algorithm's own formula stands in `loss` of the step, is checked here, and is computed
once for all algorithms in `trainer/correction.py`. These files do not import torch when they are loaded, so that the
desk can check an algorithm's options.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, cast

from pydantic import ValidationError

from isthmus.errors import IsthmusError, suggestion
from isthmus.recipe.architecture import MixtureSection, ModelSection
from isthmus.recipe.section import Section
from isthmus.recipe.steps import RlSection

if TYPE_CHECKING:
    from torch import Tensor

Aggregation = Literal["token-mean", "sample-mean", "constant"]
"""How losses of tokens become one: all tokens weigh the same; all samples; or each token 1 / (samples * longest)."""


class Options(Section):
    """Base of an algorithm's `Config`: what else the learner must know of the algorithm."""

    learns_from: ClassVar[Literal["rewards", "teacher"]] = "rewards"
    """With "teacher" `Tokens.teacher` is there, and equal rewards are no reason to leave a group out."""

    compares: ClassVar[Literal["group", "batch"]] = "group"
    """What a reward is held against. With "batch" a group of equal rewards teaches too."""

    def aggregated(self) -> Aggregation:
        """How the losses of tokens become one, those of the shared terms too."""
        return "token-mean"

    def refuses(self) -> Mapping[str, str]:
        """Keys of the step's `loss` that the algorithm cannot honour, and why. All but their defaults are refused."""
        return {}

    def reward_kl(self) -> float:
        """Weight of the KL to the weights that the step began with, taken off the reward of each token. Where it is not
        0 the algorithm has `token_advantages` too, and its `advantages` are rewards."""
        return 0.0

    def rollouts_at_most(self) -> int:
        """Rollouts that may be made for one step until there are enough groups of unequal rewards."""
        return 1


@dataclass(frozen=True)
class Scores:
    """Of P prompts with G samples each: `rewards` [P, G], NaN where a sample is left out; `lengths` [P, G], tokens."""

    rewards: Tensor
    lengths: Tensor


@dataclass(frozen=True)
class Totals:
    """Denominators of a whole update, whatever part of it is at hand.

    `tokens` and `samples` are those that are learnt from. `rolled_tokens` and `rolled_samples` have those too whose
    advantage is zero, but not what was left out. `longest` is the limit on a completion, in tokens.
    """

    tokens: int
    samples: int
    rolled_tokens: int
    rolled_samples: int
    longest: int


@dataclass(frozen=True)
class Tokens:
    """The tokens that an update learns from, or a part of them with whole samples; all [N] over the tokens.

    `logprobs` are the trainer's now, with their gradient; `old` the trainer's when the update began; `engine` those of
    the rollout engine: all of the distribution that was sampled, temperature included. `advantages` are those of each
    token's sample. `weights` are the off-policy weights, detached: 0 for a token that must not be learnt from. `sample`
    numbers the sample of each token, from 0 to `samples` - 1. `reference` and `teacher` are log-probabilities of the
    same tokens, where there is such a model.
    """

    logprobs: Tensor
    old: Tensor
    engine: Tensor
    advantages: Tensor
    weights: Tensor
    sample: Tensor
    samples: int
    totals: Totals
    reference: Tensor | None = None
    teacher: Tensor | None = None

    def summed(self, values: Tensor) -> Tensor:
        """Sums [samples] of values [N]."""
        return values.new_zeros(self.samples).index_add(0, self.sample, values)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each sample, [samples]; 0 for a sample of which none is here."""
        return self.summed(self.logprobs.new_ones(len(self.sample)))


@dataclass
class Loss:
    """`value` is this part's share of the whole update's loss: parts are added. `clipped` counts the tokens whose ratio
    the algorithm cut off."""

    value: Tensor
    clipped: float


class Algorithm(Protocol):
    """The contract of a file in this folder."""

    Config: type[Options]

    def advantages(self, scores: Scores, config: Any) -> Tensor:
        """[P, G], finite. A sample that is left out, or alone in its group, gets an exact zero."""
        ...

    def loss(self, tokens: Tokens, config: Any) -> Loss:
        """What is differentiated. Denominators are those of `tokens.totals`."""
        ...


class OfTokens(Protocol):
    """What the file of an algorithm has beside it whose options have a `reward_kl`."""

    def token_advantages(self, returns: Sequence[Tensor], total: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Advantages of tokens, of the `returns` [N] of several updates: all that comes after a token, its own reward
        included. `total` sums a small tensor over all ranks, each of which has returns of its own."""
        ...


def algorithm_names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.ispkg)


def get_algorithm(name: str) -> Algorithm:
    """The algorithm in the file of that name; raises IsthmusError with a suggestion if there is none."""
    names = algorithm_names()
    if name not in names:
        raise IsthmusError(f"unknown RL algorithm {name!r}{suggestion(name, names)}")
    return cast(Algorithm, importlib.import_module(f"{__name__}.{name}"))


def algorithm_config(section: RlSection, model: ModelSection | None = None) -> Any:
    """The algorithm's own options, checked, and `loss` of the step with them, against the model too if it is given.

    Raises IsthmusError that names the option and its neighbours, or the key that the algorithm cannot honour.
    """
    config = get_algorithm(section.algorithm).Config
    try:
        options = config.model_validate(section.options)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        known = ", ".join(sorted(config.model_fields))
        raise IsthmusError(
            f"step.{section.name}.options.{where}: {problem['msg']}; options of {section.algorithm}: {known}"
        ) from None
    for name, why in options.refuses().items():
        if getattr(section.loss, name) != type(section.loss).model_fields[name].default:
            raise IsthmusError(f"step.{section.name}.loss.{name}: {section.algorithm} cannot honour it, for {why}")
    if (section.teacher is not None) != (options.learns_from == "teacher"):
        what = "needs a teacher: name a step or a url" if section.teacher is None else "learns from rewards alone"
        raise IsthmusError(f"step.{section.name}.teacher: {section.algorithm} {what}")
    if section.teacher is not None and section.teacher.url is not None and section.temperature != 1:
        raise IsthmusError(
            f"step.{section.name}.teacher: a server scores at temperature 1, and the step samples at "
            f"{section.temperature:g}; sample at 1, or take a step as teacher"
        )
    if section.loss.router_replay and model is not None and not isinstance(model, MixtureSection):
        where = f"step.{section.name}.loss.router_replay"
        raise IsthmusError(f"{where}: a dense model has no experts, and so no routes to take over")
    return options
