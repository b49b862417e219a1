"""fp32: the reference. What it computes on the CPU defines what every other format is compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from isthmus.formats import Layout
from isthmus.formats.calibration.ranges import Calibration
from isthmus.formats.parts.assemble import TensorByTensor, announced_dtype, export_float, fill, float_layout, unfilled
from isthmus.model.model import Model
from isthmus.recipe.architecture import ModelSection


class Fp32(TensorByTensor):
    """Stores the trained weights as they are."""

    name = "fp32"
    dtype = "float32"

    def export_one(
        self, name: str, tensor: Tensor, architecture: ModelSection, calibration: Calibration | None = None
    ) -> dict[str, Tensor]:
        return export_float(name, tensor, architecture, torch.float32)

    def layout(self, architecture: ModelSection) -> Layout:
        return float_layout(architecture, torch.float32)

    def quantization_config(self, architecture: ModelSection) -> dict[str, Any] | None:
        return None

    def recognises(self, config: dict[str, Any]) -> bool:
        return announced_dtype(config) == self.dtype and not config.get("quantization_config")

    def build(self, architecture: ModelSection, tensors: dict[str, Tensor]) -> Model:
        return fill(unfilled(architecture), tensors)


FORMAT = Fp32()
