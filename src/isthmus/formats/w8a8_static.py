"""w8a8_static: int8 weights per output channel, int8 activations with one fixed scale, in compressed-tensors' layout.

The same modules as in w8a8. A quantised one stores `weight` (int8 [out, in]), `weight_scale` (fp32 [out, 1]) and
`input_scale` (fp32 [1]), the greatest input that the calibration saw / 127. Larger inputs saturate: that is the price
of not looking for each token's maximum at run time. The routed experts of a layer share their input scales.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from isthmus.formats import Layout
from isthmus.formats.parts.assemble import TensorByTensor, export_float, float_layout
from isthmus.formats.parts.int8 import LARGEST, SMALLEST_SCALE, exact_matmul, quantise_static, quantise_weight
from isthmus.formats.parts.quantised import QuantisedModule, build_with
from isthmus.formats.parts.ranges import Calibration, needed
from isthmus.formats.w8a8 import announces_int8, int8_config, int8_scheme, is_quantised
from isthmus.model.model import Model
from isthmus.recipe.architecture import ModelSection

ACTIVATIONS = int8_scheme("tensor", dynamic=False)


class W8A8Static(TensorByTensor):
    """Static W8A8, symmetric on both sides."""

    name = "w8a8_static"
    dtype = "bfloat16"
    needs_calibration = True

    def export_one(
        self, name: str, tensor: Tensor, architecture: ModelSection, calibration: Calibration | None = None
    ) -> dict[str, Tensor]:
        if not is_quantised(name):
            return export_float(name, tensor, architecture, torch.bfloat16)
        path = name.removesuffix(".weight")
        low, high = needed(calibration, self.name, "w8a8").input_range(path)
        input_scale = torch.tensor([max(-low, high, 0.0)]).div_(LARGEST).clamp_min_(SMALLEST_SCALE)
        values, scale = quantise_weight(tensor.detach())
        return {name: values, f"{name}_scale": scale, f"{path}.input_scale": input_scale}

    def layout(self, architecture: ModelSection) -> Layout:
        layout = float_layout(architecture, torch.bfloat16)
        for name in list(filter(is_quantised, layout)):
            _, shape = layout[name]
            layout[name] = (torch.int8, shape)
            layout[f"{name}_scale"] = (torch.float32, (shape[0], 1))
            layout[f"{name.removesuffix('.weight')}.input_scale"] = (torch.float32, (1,))
        return layout

    def quantization_config(self, architecture: ModelSection) -> dict[str, Any] | None:
        return int8_config(architecture, ACTIVATIONS)

    def recognises(self, config: dict[str, Any]) -> bool:
        return announces_int8(config, ACTIVATIONS)

    def build(self, architecture: ModelSection, tensors: dict[str, Tensor]) -> Model:
        def make(path: str, inputs: int, bias: bool) -> StaticLinear | None:
            input_scale = tensors.get(f"{path}.input_scale")
            if input_scale is None:
                return None
            scale = tensors[f"{path}.weight_scale"].flatten() * input_scale
            return StaticLinear(tensors[f"{path}.weight"], scale, input_scale, bias=bias)

        return build_with(architecture, tensors, make)


class StaticLinear(QuantisedModule):
    """A linear layer whose inputs are quantised with a fixed scale and offset.

    y = (int32 sum of input * weight, plus `addend`) * scale, and the float bias. `weight` [out, in] and `scale` [out]
    in fp32, `input_scale` and `input_offset` [1] in fp32, `addend` [out] in int32.
    """

    weight: Tensor
    scale: Tensor
    input_scale: Tensor
    input_offset: Tensor
    addend: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        input_scale: Tensor,
        input_offset: Tensor | None = None,
        addend: Tensor | None = None,
        *,
        bias: bool = False,
    ):
        super().__init__()
        offset = torch.zeros(1) if input_offset is None else input_offset.float()
        self.register_buffer("weight", weight.float(), persistent=False)
        self.register_buffer("scale", scale.float(), persistent=False)
        self.register_buffer("input_scale", input_scale.float(), persistent=False)
        self.register_buffer("input_offset", offset, persistent=False)
        self.register_buffer("addend", addend, persistent=False)
        self.register_buffer("bias", torch.zeros(len(weight)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        values = quantise_static(x, self.input_scale, self.input_offset)
        y = exact_matmul(values, self.weight.t(), self.addend).mul_(self.scale)
        return (y if self.bias is None else y.add_(self.bias)).to(x.dtype)


FORMAT = W8A8Static()
