"""fp8 against exact fractions, the published rule of dequantisation, and the reader of published checkpoints."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from isthmus.formats import get_format
from isthmus.formats.files.bundle import read_bundle, write_bundle
from isthmus.formats.files.published import Checkpoint, StoredTensors
from isthmus.formats.fp8 import quantise_weight, scale_of_rows
from isthmus.formats.parts.float8 import BlockLinear, block_matmul, full_range_scale, quantise_blocks, to_e4m3
from isthmus.formats.parts.names import dequantise_blocks
from isthmus.model.model import Model
from tests.support.e4m3 import TABLE, decoded, heavy
from tests.support.engine_bundle import small_tokenizer
from tests.support.small import GrowingCache
from tests.support.small import tiny_architecture as architecture
from tests.support.small_dense import dense_architecture, randomised


def test_each_of_the_256_codes_means_what_the_standard_says():
    """OCP 8-bit floating point: two codes are no numbers, and zero has a sign."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).repeat(40, 1)
    found = dequantise_blocks(codes, torch.ones(1, 2), (128, 128))
    assert np.array_equal(found.numpy(), np.tile(TABLE, (40, 1)), equal_nan=True)
    assert torch.equal(found[0].signbit(), torch.arange(256) >= 128)


def test_rounding_is_to_the_nearest_even_and_saturates():
    finite = np.sort(np.unique(TABLE[np.isfinite(TABLE)]))
    middles = (finite[1:] + finite[:-1]) / 2
    points = torch.tensor(np.concatenate((finite, middles, middles * (1 + 1e-6), [449.0, 464.1, 1e9, -500.0])))
    clamped = np.clip(points.float().numpy().astype(np.float64), -448, 448)
    gaps = np.abs(finite[None] - clamped[:, None])
    nearest = gaps == gaps.min(1, keepdims=True)
    even = {float(TABLE[code]) for code in range(0, 256, 2)}
    found = decoded(to_e4m3(points.float()))
    for value, choices in zip(found.tolist(), (finite[row].tolist() for row in nearest), strict=True):
        assert value in choices and (len(choices) == 1 or value in even)
    assert (nearest.sum(1) == 2).sum() >= len(finite) - 1


@pytest.mark.parametrize("length", [1, 127, 128, 300])
def test_the_product_equals_exact_fractions_block_by_block(length):
    x, x_scale = quantise_blocks(heavy(3, length), 128, full_range_scale)
    w, w_scale = quantise_blocks(heavy(4, length, seed=1), 128, full_range_scale)
    found = block_matmul(x, x_scale, w, w_scale, 128)
    a, b = decoded(x), decoded(w)
    for row in range(3):
        for column in range(4):
            total = np.float32(0)
            for index, start in enumerate(range(0, length, 128)):
                span = range(start, min(start + 128, length))
                exact = sum((Fraction(a[row, k]) * Fraction(b[column, k]) for k in span), Fraction(0))
                part = np.float32(exact.numerator / exact.denominator)
                scaled = part * np.float32(x_scale[row, index]) * np.float32(w_scale[column, index])
                total = scaled if index == 0 else np.float32(total + scaled)
            assert found[row, column].item() == total.item()


def test_a_row_does_not_depend_on_its_batch():
    values, scale = quantise_blocks(heavy(40, 300), 128, full_range_scale)
    layer, x = BlockLinear(values, scale, 128, full_range_scale), heavy(33, 300, seed=2)
    assert torch.equal(torch.cat([layer(row[None]) for row in x]), layer(x))


def published_dequantisation(weight: torch.Tensor, scale: torch.Tensor) -> np.ndarray:
    """weight * weight_scale_inv of its 128x128 block, as README_WEIGHTS.md says."""
    rows, columns = weight.shape
    wide = np.kron(scale.numpy(), np.ones((128, 128), np.float32))[:rows, :columns]
    return decoded(weight).astype(np.float32) * wide


@pytest.mark.parametrize("shape", [(576, 200), (128, 128), (129, 257), (5, 3)])
def test_partial_blocks_come_back_within_half_a_step(shape):
    weight = heavy(*shape)
    values, scale = quantise_weight(weight)
    assert scale.shape == tuple(-(-size // 128) for size in shape)
    back = published_dequantisation(values, scale)
    step = np.maximum(
        np.abs(back) * 2**-4, np.kron(scale.numpy(), np.ones((128, 128)))[: shape[0], : shape[1]] * 2**-10
    )
    assert (np.abs(back - weight.numpy()) <= step * 1.001).all()
    for row in range(0, shape[0], 128):
        for column in range(0, shape[1], 128):
            block = weight[row : row + 128, column : column + 128]
            assert scale[row // 128, column // 128] == block.abs().max() / 448
    assert torch.equal(scale_of_rows(scale, shape[0])[-1], scale[-1])


def test_the_layer_dequantises_by_the_published_rule_and_multiplies_it():
    values, scale = quantise_weight(heavy(576, 200) / 1000)
    layer = BlockLinear(values, scale_of_rows(scale, 576), 128, full_range_scale)
    plain = published_dequantisation(values, scale)
    assert np.array_equal(layer.weight.numpy(), plain)
    x = heavy(6, 200, seed=3)
    inputs, factors = quantise_blocks(x, 128, full_range_scale)
    rounded = decoded(inputs) * factors.repeat_interleave(128, 1)[:, :200].double().numpy()
    np.testing.assert_allclose(layer(x).numpy(), rounded @ plain.astype(np.float64).T, rtol=1e-4, atol=1e-4)


def test_quantised_are_the_modules_of_the_published_checkpoints():
    arch = architecture(q_lora_rank=14)
    tensors = get_format("fp8").export(Model(arch).initialise(0).state_dict(), arch)
    found = {".".join(name.split(".")[3:-1]) for name, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn}
    parts = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
    mlp = {"gate_proj", "up_proj", "down_proj"}
    groups = ["mlp", "mlp.shared_experts", *(f"mlp.experts.{index}" for index in range(4))]
    assert found == {f"self_attn.{part}" for part in parts} | {f"{group}.{part}" for group in groups for part in mlp}


def test_training_reads_what_serving_reads(tmp_path):
    arch = architecture(hidden_size=160, intermediate_size=136)
    write_bundle(tmp_path / "b", "fp8", Model(arch).initialise(0).state_dict(), arch, small_tokenizer())
    stored = load_file(tmp_path / "b" / "model.safetensors")
    with StoredTensors(tmp_path / "b") as opened:
        read = dict(Checkpoint(opened, arch).tensors())
    seen = 0
    for name, tensor in read.items():
        if f"{name}_scale_inv" in stored:
            seen += 1
            assert np.array_equal(tensor.numpy(), published_dequantisation(stored[name], stored[f"{name}_scale_inv"]))
    assert seen > 20


def test_the_absorbed_form_in_bf16_runs_with_the_dequantised_kv_b_proj(tmp_path):
    arch = architecture()
    tensors = get_format("fp8").export(Model(arch).initialise(0).state_dict(), arch)
    model = get_format("fp8").build(arch, tensors)
    name = "model.layers.0.self_attn.kv_b_proj.weight"
    plain = published_dequantisation(tensors[name], tensors[f"{name}_scale_inv"])
    assert np.array_equal(model.model.layers[0].self_attn.kv_b_proj.weight.numpy(), plain)
    tokens = torch.arange(12)[None]
    half = get_format("fp8").build(arch, tensors).to(torch.bfloat16)
    wanted, found = (m.hidden(tokens, caches=[GrowingCache(), GrowingCache()]) for m in (model, half))
    assert found.dtype == torch.bfloat16
    assert (found.float() - wanted).norm() / wanted.norm() < 0.1


def test_power_of_two_scales_of_activations_are_not_taken_for_ours():
    config = {"torch_dtype": "bfloat16", "quantization_config": get_format("fp8").quantization_config(architecture())}
    assert get_format("fp8").recognises(config)
    config["quantization_config"]["scale_fmt"] = "ue8m0"
    assert not get_format("fp8").recognises(config)


def test_a_bundle_says_what_it_is(tmp_path):
    arch = architecture()
    write_bundle(tmp_path / "b", "fp8", Model(arch).initialise(0).state_dict(), arch, small_tokenizer())
    assert read_bundle(tmp_path / "b").format == "fp8"


def test_transformers_dequantises_the_same_weights(tmp_path):
    """Without a GPU it turns fp8 into bf16. Whole blocks only: it splits 160 rows with two scales into twice 80."""
    arch = dense_architecture(hidden_size=256, intermediate_size=384)
    write_bundle(tmp_path / "b", "fp8", randomised(arch, 0).state_dict(), arch, small_tokenizer())
    theirs, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "b", dtype=torch.bfloat16, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values())
    loaded, model = theirs.state_dict(), read_bundle(tmp_path / "b").build()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, BlockLinear)}
    assert len(layers) == 14
    for name, layer in layers.items():
        torch.testing.assert_close(loaded[f"{name}.weight"].float(), layer.weight, rtol=2**-7, atol=0)
