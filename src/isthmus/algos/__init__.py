"""RL algorithms. One file each, with its own `Config`, `advantages` and `loss`; the file name is the registration.

These files do not import torch when they are loaded, so that the desk can check an algorithm's options.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

from pydantic import ValidationError

from isthmus.errors import IsthmusError, suggestion
from isthmus.recipe.section import Section
from isthmus.recipe.steps import RlSection

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Loss:
    """`value` is what is differentiated; `clipped` the share of tokens whose ratio the algorithm cut off."""

    value: Tensor
    clipped: float


class Algorithm(Protocol):
    """The contract of a file in this folder."""

    Config: type[Section]

    def advantages(self, rewards: Tensor, config: Any) -> Tensor:
        """rewards [P, G] of P prompts with G samples each; returns [P, G]."""
        ...

    def loss(
        self, logprobs: Tensor, old: Tensor, advantages: Tensor, weights: Tensor, sample: Tensor, config: Any
    ) -> Loss:
        """All [N] over the N target tokens.

        The trainer's log-probabilities now and when the update began, the advantage of each token's sample, the
        off-policy weight, and the number of the sample.
        """
        ...


def algorithm_names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def get_algorithm(name: str) -> Algorithm:
    """The algorithm in the file of that name; raises IsthmusError with a suggestion if there is none."""
    names = algorithm_names()
    if name not in names:
        raise IsthmusError(f"unknown RL algorithm {name!r}{suggestion(name, names)}")
    return cast(Algorithm, importlib.import_module(f"{__name__}.{name}"))


def algorithm_config(section: RlSection) -> Any:
    """The algorithm's own options, checked. Raises IsthmusError that names the option and its neighbours."""
    config = get_algorithm(section.algorithm).Config
    try:
        return config.model_validate(section.options)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        known = ", ".join(sorted(config.model_fields))
        raise IsthmusError(
            f"step.{section.name}.options.{where}: {problem['msg']}; options of {section.algorithm}: {known}"
        ) from None
