"""mxfp8 against exact fractions, the OCP rule written out, compressed-tensors, and fp8 blocks."""

from __future__ import annotations

import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from safetensors.torch import load_file

from isthmus.errors import IsthmusError
from isthmus.formats import get_format
from isthmus.formats.files.bundle import write_bundle
from isthmus.formats.fp8 import quantise_weight
from isthmus.formats.mxfp8 import exponents, from_fp8_blocks, power_of_two_scale, powers
from isthmus.formats.parts.float8 import BlockLinear, quantise_blocks
from isthmus.formats.parts.names import dequantise_blocks
from tests.support.bundles import TinyTokenizer, module_tree, trained_state
from tests.support.e4m3 import decoded, heavy
from tests.support.small import tiny_architecture as architecture

ARCHITECTURE = architecture(moe_intermediate_size=32, intermediate_size=96, q_lora_rank=32)


def test_scales_follow_the_ocp_rule():
    points = [0.0, 1.0, 1.999, 2.0, 447.9, 448.0, 480.0, 511.9, 512.0, 1e-38, 1e-30, 3e38, 1.5 * 2.0**-118]
    found = power_of_two_scale(torch.tensor(points))
    for point, scale in zip(points, found.tolist(), strict=True):
        exact = -127 if point == 0 else max(math.frexp(np.float32(point))[1] - 1 - 8, -127)
        assert scale == 2.0**exact
    every = torch.arange(255, dtype=torch.uint8)
    assert powers(every).tolist() == [2.0 ** (stored - 127) for stored in range(255)]
    assert torch.equal(exponents(powers(every)), every)


def test_values_beyond_448_saturate():
    row = torch.zeros(1, 32)
    row[0, :4] = torch.tensor([500.0, -511.0, 448.0, 300.0])
    values, scale = quantise_blocks(row, 32, power_of_two_scale)
    assert scale.item() == 1.0
    assert decoded(values)[0, :4].tolist() == [448.0, -448.0, 448.0, 288.0]


def test_the_layer_equals_exact_fractions():
    values, scale = quantise_blocks(heavy(5, 96), 32, power_of_two_scale)
    layer, x = BlockLinear(values, scale, 32, power_of_two_scale), heavy(3, 96, seed=1)
    inputs, factors = quantise_blocks(x, 32, power_of_two_scale)
    a, b, found = decoded(inputs), decoded(values), layer(x)
    for row in range(3):
        for column in range(5):
            total = np.float32(0)
            for index in range(3):
                span = range(32 * index, 32 * index + 32)
                exact = sum((Fraction(a[row, k]) * Fraction(b[column, k]) for k in span), Fraction(0))
                scaled = np.float32(float(exact)) * np.float32(factors[row, index]) * np.float32(scale[column, index])
                total = scaled if index == 0 else np.float32(total + scaled)
            assert found[row, column].item() == total.item()


def test_compressed_tensors_reads_the_config_and_the_same_weights(tmp_path):
    write_bundle(tmp_path / "b", "mxfp8", trained_state(ARCHITECTURE), ARCHITECTURE, TinyTokenizer())
    config = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
    parsed = QuantizationConfig.model_validate(config)
    scheme = parsed.config_groups["group_0"]
    for side, dynamic in ((scheme.weights, False), (scheme.input_activations, True)):
        assert (side.num_bits, side.type, side.group_size) == (8, "float", 32)
        assert (side.strategy, side.dynamic, side.scale_dtype) == ("group", dynamic, torch.uint8)
    stored = load_file(tmp_path / "b" / "model.safetensors")
    tree = module_tree(stored)
    apply_quantization_config(tree, parsed)
    chosen = {name for name, module in tree.named_modules() if getattr(module, "quantization_scheme", None)}
    scaled = {name.removesuffix("_scale") for name in stored if name.endswith(".weight_scale")}
    assert {f"{name}.weight" for name in chosen} == scaled and len(scaled) > 20
    compressor = BaseCompressor.get_value_from_registry(parsed.format)
    model = get_format("mxfp8").build(
        ARCHITECTURE, {name: tensor for name, tensor in stored.items() if "layers.2.embed" not in name}
    )
    for name in chosen:
        pair = {"weight": stored[f"{name}.weight"], "weight_scale": stored[f"{name}.weight_scale"]}
        plain = compressor.decompress(pair, scheme)["weight"]
        assert torch.equal(plain.float(), model.get_submodule(name).weight), name


def test_modules_with_other_widths_stay_in_float():
    arch = architecture(moe_intermediate_size=24, intermediate_size=96, q_lora_rank=32)
    layout, config = get_format("mxfp8").layout(arch), get_format("mxfp8").quantization_config(arch)
    assert config is not None
    down = "model.layers.1.mlp.experts.0.down_proj"
    assert layout[f"{down}.weight"][0] == torch.bfloat16 and down in config["ignore"]
    assert layout["model.layers.1.mlp.experts.0.gate_proj.weight"][0] == torch.float8_e4m3fn


def fp8_block(power_of_two: bool) -> tuple[torch.Tensor, torch.Tensor]:
    values, scale = quantise_weight(heavy(160, 288))
    return values, powers(exponents(scale)) if power_of_two else scale


def test_fp8_blocks_with_powers_of_two_cross_exactly():
    values, scale = fp8_block(power_of_two=True)
    found, stored = from_fp8_blocks("w", values, scale, requantise=False)
    layer = BlockLinear(found, powers(stored), 32, power_of_two_scale)
    assert stored.shape == (160, 9) and torch.equal(layer.weight, dequantise_blocks(values, scale, (128, 128)))
    again, _ = quantise_blocks(layer.weight, 32, power_of_two_scale)
    assert not torch.equal(again.float(), found.float())  # which quantising the float weights would not have done


def test_other_scales_are_refused_and_requantised_only_when_asked():
    values, scale = fp8_block(power_of_two=False)
    with pytest.raises(IsthmusError, match=r"model\.x\.weight: 6 of its 6 block scales .*Requantise"):
        from_fp8_blocks("model.x.weight", values, scale, requantise=False)
    for odd in (0.0, float("inf"), float("nan"), 2.0**-128, -1.0):
        scale = fp8_block(power_of_two=True)[1]
        scale[1, 2] = odd
        with pytest.raises(IsthmusError, match="1 of its 6"):
            from_fp8_blocks("w", values, scale, requantise=False)
    values, scale = fp8_block(power_of_two=False)
    found, stored = from_fp8_blocks("w", values, scale, requantise=True)
    plain = dequantise_blocks(values, scale, (128, 128))
    back = BlockLinear(found, powers(stored), 32, power_of_two_scale).weight
    greatest = plain.unflatten(1, (-1, 32)).abs().amax(-1, keepdim=True).expand(-1, -1, 32).flatten(1)
    assert ((back - plain).abs() <= greatest / 8).all() and (back - plain).norm() < 0.04 * plain.norm()
    with pytest.raises(IsthmusError, match="multiple of 32"):
        from_fp8_blocks("w", values[:, :40], scale[:, :1], requantise=True)
