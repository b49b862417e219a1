"""modelslim: int8 in the layout of the ModelSlim quantiser, which vLLM's plugin for that vendor's chips reads.

`quant_model_description.json` gives the type of every tensor; config.json has no `quantization_config`. As in
ModelSlim's published recipe for DeepSeek-V3 the projections of attention are "W8A8", with one fixed asymmetric scale
for the inputs, and gate, up and down of every MLP and expert are "W8A8_DYNAMIC", with a scale per token. The rest is
"FLOAT": embeddings, output head, norms, router, kv_b_proj and eh_proj. A projection with a bias is dynamic.

"W8A16" has the weights of W8A8_DYNAMIC and inputs as they are: the chip multiplies with weight * weight_scale in the
dtype of the model. It stores weight_scale and weight_offset in that dtype, which tells it from W8A8_DYNAMIC. vLLM's
plugin runs it for linear modules, and not for routed experts (`quantization/methods/w8a16.py`, read in code).

All store weight (int8 [out, in]), weight_scale and weight_offset (fp32 [out, 1], the offsets zeros). W8A8 stores also
input_scale and input_offset (fp32 [1]), deq_scale [out] and quant_bias (int32 [out]):

    deq_scale = input_scale * weight_scale                      fp32; in a model of fp16 its bit pattern, as int64
    quant_bias = round(bias / deq_scale - input_offset * sum over inputs of weight)
    y = (sum over inputs of round(x / input_scale + input_offset) * weight, plus quant_bias) * deq_scale

(msmodelslim, `ascendv1_saver`). The plugin holds input_scale and weight_scale in the dtype of the model, so the scales
written here are numbers that this dtype has, the next one above.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.errors import DamagedFile
from isthmus.formats import DESCRIPTION, MODELSLIM, Layout
from isthmus.formats.parts.assemble import TensorByTensor, announced_dtype, export_float, float_layout
from isthmus.formats.parts.int8 import LARGEST, SMALLEST_SCALE
from isthmus.formats.parts.names import mtp_copies
from isthmus.formats.parts.quantised import build_with
from isthmus.formats.parts.ranges import Calibration, needed
from isthmus.formats.w8a8 import ATTENTION_PARTS, W8A8Linear, is_quantised
from isthmus.formats.w8a8_static import StaticLinear
from isthmus.model.model import Model
from isthmus.recipe.architecture import ModelSection

FLOAT, STATIC, DYNAMIC, WEIGHTS_ONLY = "FLOAT", "W8A8", "W8A8_DYNAMIC", "W8A16"
STATIC_PARTS = ("input_scale", "input_offset", "deq_scale", "quant_bias", "weight_scale", "weight_offset")
DYNAMIC_PARTS = ("weight_scale", "weight_offset")


class ModelSlim(TensorByTensor):
    """Int8 with the types of `described` by name of a weight. Where it is None the projections of attention are of type
    `attention`, and gate, up and down of MLPs and experts W8A8_DYNAMIC.
    """

    def __init__(self, name: str, dtype: torch.dtype, *, attention: str, described: dict[str, str] | None = None):
        self.name, self.dtype = name, str(dtype).removeprefix("torch.")
        self.needs_calibration = attention == STATIC
        self._dtype, self._attention, self._described = dtype, attention, described

    def export_one(
        self, name: str, tensor: Tensor, architecture: ModelSection, calibration: Calibration | None = None
    ) -> dict[str, Tensor]:
        kind = self._type(name, architecture)
        if kind == FLOAT:
            return export_float(name, tensor, architecture, self._dtype)
        path = name.removesuffix(".weight")
        values, scale = quantise_weight(tensor.detach().float(), self._dtype)
        kept = scale.to(self._scale_dtype(kind))
        stored = {"weight": values, "weight_scale": kept, "weight_offset": torch.zeros_like(kept)}
        if kind == STATIC:
            low, high = needed(calibration, self.name, "modelslim_dynamic").input_range(path)
            input_scale, offset = asymmetric(low, high, self._dtype)
            deq_scale = input_scale * scale.flatten()
            stored |= {"input_scale": input_scale, "input_offset": offset}
            stored["quant_bias"] = quant_bias(values, deq_scale, offset)
            stored["deq_scale"] = bit_pattern(deq_scale) if self._dtype == torch.float16 else deq_scale
        return {f"{path}.{part}": tensor for part, tensor in stored.items()}

    def layout(self, architecture: ModelSection) -> Layout:
        layout = float_layout(architecture, self._dtype)
        for name, (_, shape) in list(layout.items()):
            kind = self._type(name, architecture)
            if kind != FLOAT:
                layout[name] = (torch.int8, shape)
                layout |= self._parts(name.removesuffix(".weight"), kind, shape[0])
        return layout

    def _parts(self, path: str, kind: str, outputs: int) -> Layout:
        parts: Layout = dict.fromkeys(DYNAMIC_PARTS, (self._scale_dtype(kind), (outputs, 1)))
        if kind == STATIC:
            parts |= dict.fromkeys(("input_scale", "input_offset"), (torch.float32, (1,)))
            parts["quant_bias"] = (torch.int32, (outputs,))
            parts["deq_scale"] = (torch.int64 if self._dtype == torch.float16 else torch.float32, (outputs,))
        return {f"{path}.{part}": what for part, what in parts.items()}

    def _scale_dtype(self, kind: str) -> torch.dtype:
        return self._dtype if kind == WEIGHTS_ONLY else torch.float32

    def quantization_config(self, architecture: ModelSection) -> dict[str, Any] | None:
        return None

    def extra_files(self, architecture: ModelSection) -> dict[str, bytes]:
        """The description: the type of every stored tensor, the copies in the MTP layer included."""
        described = dict.fromkeys(mtp_copies(architecture), FLOAT)
        for name in self.layout(architecture):
            path, _, part = name.rpartition(".")
            weight = f"{path}.weight" if part in ("weight", *STATIC_PARTS) else name
            described[name] = self._type(weight, architecture)
        described |= {"version": "1.0.0", "model_quant_type": self._attention}
        return {DESCRIPTION: json.dumps({**described, "group_size": 0}, indent=2, sort_keys=True).encode() + b"\n"}

    def recognises(self, config: dict[str, Any]) -> bool:
        found = config.get("quantization_config") or {}
        if found.get("quant_method") != MODELSLIM or announced_dtype(config) != self.dtype:
            return False
        kinds = set(_described(found).values()) - {FLOAT, DYNAMIC}
        return kinds == {self._attention} - {DYNAMIC}

    def as_announced(self, config: dict[str, Any]) -> ModelSlim:
        return self.with_types(_described(config["quantization_config"]))

    def with_types(self, described: dict[str, str]) -> ModelSlim:
        """This format with a type for each weight by name."""
        return ModelSlim(self.name, self._dtype, attention=self._attention, described=described)

    def retyped(self, stored: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
        """What is stored of a W8A8_DYNAMIC weight as another type that has the same integers and scales."""
        return {n: t if n.endswith(".weight") else t.to(self._scale_dtype(kind)) for n, t in stored.items()}

    def build(self, architecture: ModelSection, tensors: dict[str, Tensor]) -> Model:
        """The tensors that are there say the type of each module."""

        def make(path: str, inputs: int, bias: bool) -> nn.Module | None:
            parts = {part: tensors.get(f"{path}.{part}") for part in ("weight", *STATIC_PARTS)}
            return _quantised_linear(path, parts, bias)

        return build_with(architecture, {**tensors, **_dequantised(tensors)}, make)

    def _type(self, name: str, architecture: ModelSection) -> str:
        if not name.endswith(".weight"):
            return FLOAT
        if self._described is None:
            return self._recipe_type(name, architecture)
        if name not in self._described:
            raise DamagedFile(f"{DESCRIPTION} says nothing of {name}")
        return self._described[name]

    def _recipe_type(self, name: str, architecture: ModelSection) -> str:
        if not is_quantised(name):
            return FLOAT
        part = name.split(".")[-2]
        has_bias = getattr(architecture, "output_bias" if part == "o_proj" else "input_bias", False)
        if part not in ATTENTION_PARTS or (self._attention == STATIC and has_bias):
            return DYNAMIC
        return self._attention


def quantise_weight(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """weight [out, in] in fp32 to symmetric int8 values, and scales [out, 1] in fp32 that `dtype` has."""
    scale = representable(weight.abs().amax(-1, keepdim=True).div_(LARGEST).clamp_min_(SMALLEST_SCALE), dtype)
    return torch.div(weight, scale).round_().to(torch.int8), scale


def asymmetric(low: float, high: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and offset, fp32 [1], of inputs from `low` to `high`: round(x / scale + offset) lies in [-128, 127].

    The offset is an integer, and 0 is represented exactly. `dtype` has the scale.
    """
    least, greatest = min(low, 0.0), max(high, 0.0)
    scale = representable(torch.tensor([(greatest - least) / 255]).clamp_min_(SMALLEST_SCALE), dtype)
    offset = (-LARGEST - 1 - torch.tensor([least]) / scale).round_().clamp_(-LARGEST - 1, LARGEST)
    return scale, offset


def representable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The least number of bf16 or fp16 that is not below each positive fp32 scale, in fp32."""
    rounded = scale.to(dtype)
    above = (rounded.view(torch.int16) + 1).view(dtype)
    return torch.where(rounded.float() < scale, above, rounded).float()


def quant_bias(values: Tensor, deq_scale: Tensor, offset: Tensor, bias: Tensor | None = None) -> Tensor:
    """What is added to the int32 sums: round(bias / deq_scale - offset * sum of weights), int32 [out].

    values int8 [out, in], deq_scale fp32 [out], offset fp32 [1], bias [out].
    """
    correction = values.sum(-1, dtype=torch.int64) * offset.to(torch.int64)
    rounded = 0 if bias is None else (bias.double() / deq_scale.double()).round_().to(torch.int64)
    return (rounded - correction).to(torch.int32)


def bit_pattern(scale: Tensor) -> Tensor:
    """The 32 bits of fp32 numbers as int64, as the chip's matrix product takes them in a model of fp16."""
    return scale.view(torch.int32).to(torch.int64)


def from_bit_pattern(scale: Tensor) -> Tensor:
    """The fp32 numbers of `bit_pattern`; fp32 is given back as it is."""
    return scale.to(torch.int32).view(torch.float32) if scale.dtype == torch.int64 else scale


def _is_weights_only(scale: Tensor | None) -> bool:
    return scale is not None and scale.dtype != torch.float32


def _dequantised(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of W8A16 modules in fp32."""
    found = {}
    for name, scale in tensors.items():
        if name.endswith(".weight_scale") and _is_weights_only(scale):
            weight = name.removesuffix("_scale")
            found[weight] = tensors[weight].float() * scale.float().to(tensors[weight].device)
    return found


def _quantised_linear(path: str, parts: dict[str, Tensor | None], bias: bool) -> nn.Module | None:
    weight, weight_offset = parts["weight"], parts["weight_offset"]
    if weight is None or weight.dtype != torch.int8:
        return None
    if weight_offset is not None and bool(weight_offset.any()):
        raise DamagedFile(f"{path}.weight_offset is not zero, and asymmetric weights are not read")
    if (deq_scale := parts["deq_scale"]) is not None:
        needs = [parts[part] for part in ("input_scale", "input_offset", "quant_bias")]
        input_scale, input_offset, addend = (tensor for tensor in needs if tensor is not None)
        return StaticLinear(weight, from_bit_pattern(deq_scale), input_scale, input_offset, addend)
    scale = parts["weight_scale"]
    if _is_weights_only(scale):
        return None
    assert scale is not None, "the layout has a weight_scale"
    return W8A8Linear((weight, scale), bias=bias)


def _described(found: dict[str, Any]) -> dict[str, str]:
    """The types by name of weight in a description."""
    return {name: kind for name, kind in found.items() if name.endswith(".weight")}


FORMAT = ModelSlim("modelslim", torch.bfloat16, attention=STATIC)
