"""fp8: the layout of DeepSeek's published checkpoints, e4m3 weights with one scale per block of 128x128.

Quantised, as in those checkpoints: all projections of attention, kv_b_proj included, and gate, up and down of every MLP
and expert. In float: embeddings, output head, norms, biases, router and eh_proj. A quantised module stores `weight`
(float8_e4m3fn [M, K]) and `weight_scale_inv` (fp32 [ceil(M / 128), ceil(K / 128)]), the factor that gives the weight
back (github.com/deepseek-ai/DeepSeek-V3, README_WEIGHTS.md). A last block may be partial: 576 rows are 4.5 blocks.
What stays in float is stored in bf16, the routing bias in fp32.

The model built here computes as float8.py defines, with inputs in blocks of 128 per token. The absorbed form of
attention multiplies the dequantised kv_b_proj into its neighbours, as DeepSeek's `inference/model.py` does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from isthmus.formats import Layout
from isthmus.formats.parts.assemble import TensorByTensor, export_float, float_layout
from isthmus.formats.parts.float8 import E4M3, BlockLinear, full_range_scale, to_e4m3
from isthmus.formats.parts.names import SCALE
from isthmus.formats.parts.quantised import build_with
from isthmus.formats.parts.ranges import Calibration
from isthmus.formats.w8a8 import ATTENTION_PARTS, MLP_PARTS
from isthmus.model.model import Model
from isthmus.recipe.architecture import ModelSection

BLOCK = 128
PARTS = frozenset((*MLP_PARTS, *ATTENTION_PARTS, "kv_b_proj"))


class Fp8(TensorByTensor):
    """e4m3 with a scale per block of 128x128 weights and per 128 inputs of a token."""

    name = "fp8"
    dtype = "bfloat16"

    def export_one(
        self, name: str, tensor: Tensor, architecture: ModelSection, calibration: Calibration | None = None
    ) -> dict[str, Tensor]:
        if not is_quantised(name):
            return export_float(name, tensor, architecture, torch.bfloat16)
        values, scale = quantise_weight(tensor.detach().float())
        return {name: values, f"{name}{SCALE}": scale}

    def layout(self, architecture: ModelSection) -> Layout:
        layout = float_layout(architecture, torch.bfloat16)
        for name in list(filter(is_quantised, layout)):
            _, shape = layout[name]
            layout[name] = (E4M3, shape)
            layout[f"{name}{SCALE}"] = (torch.float32, tuple(-(-size // BLOCK) for size in shape))
        return layout

    def quantization_config(self, architecture: ModelSection) -> dict[str, Any] | None:
        return {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [BLOCK, BLOCK],
        }

    def recognises(self, config: dict[str, Any]) -> bool:
        """`scale_fmt`, which later checkpoints have, asks for another rule of the scales of activations."""
        found = config.get("quantization_config") or {}
        return (
            found.get("quant_method") == "fp8"
            and found.get("activation_scheme") == "dynamic"
            and found.get("fmt") == "e4m3"
            and found.get("weight_block_size") == [BLOCK, BLOCK]
            and found.get("scale_fmt") is None
        )

    def build(self, architecture: ModelSection, tensors: dict[str, Tensor]) -> Model:
        def make(path: str, inputs: int, bias: bool) -> BlockLinear | None:
            scale = tensors.get(f"{path}.weight{SCALE}")
            if scale is None:
                return None
            values = tensors[f"{path}.weight"]
            return BlockLinear(values, scale_of_rows(scale, len(values)), BLOCK, full_range_scale, bias=bias)

        return build_with(architecture, tensors, make)


def is_quantised(name: str) -> bool:
    """Whether the weight of this published name is stored in e4m3."""
    *_, module, part = ("", "", *name.split("."))
    return part == "weight" and module in PARTS


def quantise_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [M, K] in fp32 to e4m3 values [M, K] and the scale of each block, max |w| / 448."""
    rows, columns = weight.shape
    padded = F.pad(weight, (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
    scale = full_range_scale(blocks.abs().amax((1, 3)))
    values = to_e4m3(blocks / scale[:, None, :, None]).flatten(2, 3).flatten(0, 1)
    return values[:rows, :columns].contiguous(), scale


def scale_of_rows(scale: Tensor, rows: int) -> Tensor:
    """The scales [ceil(M / 128), B] of blocks as scales [M, B] of rows."""
    return scale.repeat_interleave(BLOCK, dim=0)[:rows]


FORMAT = Fp8()
