"""What a model's own text shows about the inputs of its linear modules: what static scales and rounding are fitted to.

Shapes: K inputs of a module.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Calibration:
    """By the path of a linear module in the published names, such as `model.layers.3.self_attn.o_proj`; all fp32.

    `low` and `high` [K] are the least and the greatest input of each channel. `gram` [K, K], where it was asked for, is
    the mean of x xᵀ over the inputs. `tokens` is how many tokens were looked at, `unseen` the experts'
    modules that none of them reached.
    """

    low: dict[str, Tensor]
    high: dict[str, Tensor]
    gram: dict[str, Tensor] = field(default_factory=dict)
    tokens: int = 0
    unseen: tuple[str, ...] = ()
