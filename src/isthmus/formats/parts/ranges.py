"""What a model's own text shows about the inputs of its linear modules: what static scales and rounding are fitted to.

Shapes: K inputs of a module.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from isthmus.errors import IsthmusError

_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class Calibration:
    """By the path of a linear module in the published names, such as `model.layers.3.self_attn.o_proj`; all fp32.

    `low` and `high` [K] are the least and the greatest input of each channel. `gram` [K, K], where it was asked for, is
    the mean of x xᵀ over the inputs, read when it is asked for. `tokens` is how many tokens were looked at, `unseen`
    the experts' modules that none of them reached.
    """

    low: dict[str, Tensor]
    high: dict[str, Tensor]
    gram: Mapping[str, Tensor] = field(default_factory=dict)
    tokens: int = 0
    unseen: tuple[str, ...] = ()

    def input_range(self, path: str) -> tuple[float, float]:
        """Least and greatest input of a module. The routed experts of a layer have one range between them.

        So an expert that no token reached has one too. Raises IsthmusError if nothing is known of the module.
        """
        try:
            return self._ranges[_EXPERT.sub(".experts.*.", path)]
        except KeyError:
            raise IsthmusError(
                f"the calibration knows nothing of the inputs of {path}: it saw {self.tokens} tokens and "
                f"{len(self.low)} modules. Calibrate the model that is exported, with more text"
            ) from None

    @cached_property
    def _ranges(self) -> dict[str, tuple[float, float]]:
        ranges: dict[str, tuple[float, float]] = {}
        for path, low in self.low.items():
            least, greatest = low.min().item(), self.high[path].max().item()
            if math.isfinite(least) and math.isfinite(greatest):
                name = _EXPERT.sub(".experts.*.", path)
                before = ranges.get(name, (least, greatest))
                ranges[name] = min(least, before[0]), max(greatest, before[1])
        return ranges


def needed(calibration: Calibration | None, format_name: str, instead: str) -> Calibration:
    """The calibration, or an IsthmusError that says what to do without one."""
    if calibration is None:
        raise IsthmusError(
            f"format {format_name} has static scales of activations and needs a calibration, which there is none of "
            f"here; use the format {instead}, or calibrate the model"
        )
    return calibration
