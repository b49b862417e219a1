"""bf16: what DeepSeek's users convert to first, and what transformers, vLLM and SGLang load without a quantiser.

The weights are rounded to bf16, except the routing bias (fp32 in the published checkpoints as well). The model built
here computes with these rounded weights in fp32: rounding of activations belongs to the chip, not to the format.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from isthmus.formats import Layout
from isthmus.formats.calibration.ranges import Calibration
from isthmus.formats.parts.assemble import TensorByTensor, announced_dtype, export_float, fill, float_layout, unfilled
from isthmus.model.model import Model
from isthmus.recipe.architecture import ModelSection


class Bf16(TensorByTensor):
    """Stores weights in bf16, rounded to the nearest."""

    name = "bf16"
    dtype = "bfloat16"

    def export_one(
        self, name: str, tensor: Tensor, architecture: ModelSection, calibration: Calibration | None = None
    ) -> dict[str, Tensor]:
        return export_float(name, tensor, architecture, torch.bfloat16)

    def layout(self, architecture: ModelSection) -> Layout:
        return float_layout(architecture, torch.bfloat16)

    def quantization_config(self, architecture: ModelSection) -> dict[str, Any] | None:
        return None

    def recognises(self, config: dict[str, Any]) -> bool:
        return announced_dtype(config) == self.dtype and not config.get("quantization_config")

    def build(self, architecture: ModelSection, tensors: dict[str, Tensor]) -> Model:
        return fill(unfilled(architecture), {name: tensor.float() for name, tensor in tensors.items()})


FORMAT = Bf16()
