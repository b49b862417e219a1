"""mxfp8: e4m3 values with one power-of-two scale per 32 inputs (OCP Microscaling), in compressed-tensors' layout.

Quantised: the modules that fp8 quantises, where their inputs are a multiple of 32; the others are listed in `ignore`. A
quantised module stores `weight` (float8_e4m3fn [out, in]) and `weight_scale` (uint8 [out, in / 32], E8M0: the scale is
2^(stored - 127)). What stays in float is stored in bf16, the routing bias in fp32.

From float weights and for activations the scale is 2^(floor(log2(max |x|)) - 8), and values beyond 448 saturate (OCP
Microscaling Formats MX v1.0, section 6.3, with emax = 8 for e4m3). So the greatest value of a block may lose up to an
eighth: 480 * 2^k becomes 448 * 2^k.

Blocks of DeepSeek's fp8 whose scale is a power of two are MXFP8 already: see `from_fp8_blocks`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from isthmus.errors import IsthmusError
from isthmus.formats import Layout
from isthmus.formats.fp8 import BLOCK as FP8_BLOCK
from isthmus.formats.fp8 import is_quantised as has_fp8_name
from isthmus.formats.fp8 import scale_of_rows
from isthmus.formats.parts.assemble import TensorByTensor, export_float, float_layout
from isthmus.formats.parts.float8 import E4M3, BlockLinear, quantise_blocks
from isthmus.formats.parts.names import dequantise_blocks
from isthmus.formats.parts.quantised import build_with
from isthmus.formats.parts.ranges import Calibration
from isthmus.model.model import Model
from isthmus.recipe.architecture import ModelSection

BLOCK, BIAS, EMAX = 32, 127, 8
_MANTISSA_BITS = 23


class Mxfp8(TensorByTensor):
    """e4m3 with a power-of-two scale per 32 inputs, of weights and of activations."""

    name = "mxfp8"
    dtype = "bfloat16"

    def export_one(
        self, name: str, tensor: Tensor, architecture: ModelSection, calibration: Calibration | None = None
    ) -> dict[str, Tensor]:
        if not is_quantised(name, tuple(tensor.shape)):
            return export_float(name, tensor, architecture, torch.bfloat16)
        values, scale = quantise_blocks(tensor.detach(), BLOCK, power_of_two_scale)
        return {name: values.contiguous(), f"{name}_scale": exponents(scale)}

    def layout(self, architecture: ModelSection) -> Layout:
        layout = float_layout(architecture, torch.bfloat16)
        for name, (_, shape) in list(layout.items()):
            if is_quantised(name, shape):
                layout[name] = (E4M3, shape)
                layout[f"{name}_scale"] = (torch.uint8, (shape[0], shape[1] // BLOCK))
        return layout

    def quantization_config(self, architecture: ModelSection) -> dict[str, Any] | None:
        return {
            "quant_method": "compressed-tensors",
            "format": "mxfp8-quantized",
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "kv_cache_scheme": None,
            "ignore": _float_modules(architecture),
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": _scheme(dynamic=False),
                    "input_activations": _scheme(dynamic=True),
                    "output_activations": None,
                }
            },
        }

    def recognises(self, config: dict[str, Any]) -> bool:
        found = config.get("quantization_config") or {}
        groups = list((found.get("config_groups") or {}).values())
        return (
            found.get("quant_method") == "compressed-tensors"
            and found.get("format") == "mxfp8-quantized"
            and len(groups) == 1
            and _fits(groups[0].get("weights"), _scheme(dynamic=False))
            and _fits(groups[0].get("input_activations"), _scheme(dynamic=True))
            and not groups[0].get("output_activations")
        )

    def build(self, architecture: ModelSection, tensors: dict[str, Tensor]) -> Model:
        def make(path: str, inputs: int, bias: bool) -> BlockLinear | None:
            stored = tensors.get(f"{path}.weight_scale")
            if stored is None:
                return None
            return BlockLinear(tensors[f"{path}.weight"], powers(stored), BLOCK, power_of_two_scale, bias=bias)

        return build_with(architecture, tensors, make)


def is_quantised(name: str, shape: tuple[int, ...]) -> bool:
    """Whether the weight of this published name and shape is stored in e4m3."""
    return has_fp8_name(name) and shape[1] % BLOCK == 0


def power_of_two_scale(amax: Tensor) -> Tensor:
    """2^(floor(log2(amax)) - 8), at least 2^-127, which a block of zeros gets too. amax and scale in fp32."""
    return powers(_exponent(amax).sub(EMAX).clamp(-BIAS, BIAS).add(BIAS))


def powers(stored: Tensor) -> Tensor:
    """E8M0 numbers as what they stand for, 2^(stored - 127) in fp32. 2^-127 is subnormal."""
    bits = stored.to(torch.int32) << _MANTISSA_BITS
    return torch.where(bits == 0, 1 << (_MANTISSA_BITS - 1), bits).view(torch.float32)


def exponents(scale: Tensor) -> Tensor:
    """Powers of two as E8M0 numbers, the inverse of `powers`."""
    return _exponent(scale).add(BIAS).to(torch.uint8)


def from_fp8_blocks(name: str, weight: Tensor, scale: Tensor, *, requantise: bool) -> tuple[Tensor, Tensor]:
    """A weight in DeepSeek's fp8 as MXFP8: e4m3 [M, K] and scales [ceil(M / 128), ceil(K / 128)] in fp32.

    Returns e4m3 values [M, K] and E8M0 scales [M, K / 32]. Where every scale is a power of two, the values stay as they
    are and each group of 32 gets the scale of its block: exactly the same numbers. Other scales do not exist in MXFP8.
    They raise IsthmusError naming the tensor, unless `requantise`, which rounds the dequantised weight a second time.
    """
    if weight.shape[1] % BLOCK:
        raise IsthmusError(
            f"{name} has {weight.shape[1]} inputs, and MXFP8 wants a multiple of {BLOCK}: keep it in fp8"
        )
    if not requantise:
        check_lossless(name, scale)
    if bool(_is_power_of_two(scale).all()):
        rows = scale_of_rows(exponents(scale), len(weight))
        return weight, rows.repeat_interleave(FP8_BLOCK // BLOCK, dim=1)[:, : weight.shape[1] // BLOCK].contiguous()
    plain = dequantise_blocks(weight, scale, (FP8_BLOCK, FP8_BLOCK))
    values, factors = quantise_blocks(plain, BLOCK, power_of_two_scale)
    return values.contiguous(), exponents(factors)


def check_lossless(name: str, scale: Tensor) -> None:
    """Raise IsthmusError naming the tensor if a scale of its fp8 blocks is no power of two that E8M0 has."""
    others = int((~_is_power_of_two(scale)).sum())
    if others:
        raise IsthmusError(
            f"{name}: {others} of its {scale.numel()} block scales are no powers of two, so MXFP8 cannot hold its "
            "numbers. Requantise it (isthmus convert --requantise), which rounds its weights a second time, or start "
            "from the unquantised checkpoint"
        )


def _exponent(x: Tensor) -> Tensor:
    """floor(log2(x)) of x >= 0 in int32, by its bits; -127 for 0 and what is below 2^-126."""
    return (x.float().view(torch.int32) >> _MANTISSA_BITS) - BIAS


def _is_power_of_two(scale: Tensor) -> Tensor:
    """Whether E8M0 has these fp32 numbers."""
    return (scale > 0) & (powers(_exponent(scale).add(BIAS).clamp(0, 2 * BIAS)) == scale)


def _float_modules(architecture: ModelSection) -> list[str]:
    """The modules that are not quantised. The router and the MTP layer's copy of the head are linear elsewhere."""
    names = []
    for name, (dtype, shape) in FORMAT.layout(architecture).items():
        if dtype != E4M3 and len(shape) == 2 and name.endswith(".weight") and "embed_tokens" not in name:
            names.append(name.removesuffix(".weight"))
    copies = [f"{name.removesuffix('eh_proj')}shared_head.head" for name in names if name.endswith("eh_proj")]
    return sorted({"lm_head", *names, *copies})


def _scheme(*, dynamic: bool) -> dict[str, Any]:
    return {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": "group",
        "group_size": BLOCK,
        "dynamic": dynamic,
        "scale_dtype": "torch.uint8",
    }


def _fits(scheme: dict[str, Any] | None, wanted: dict[str, Any]) -> bool:
    return scheme is not None and all(scheme.get(key) == value for key, value in wanted.items())


FORMAT = Mxfp8()
