"""ModelSlim's layout against int64, numpy and the look-ups of the plugin that reads it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from isthmus.errors import DamagedFile, IsthmusError
from isthmus.formats import DESCRIPTION, get_format
from isthmus.formats.files.bundle import read_bundle, write_bundle
from isthmus.formats.modelslim import asymmetric, bit_pattern, from_bit_pattern, quant_bias, quantise_weight
from isthmus.formats.w8a8 import W8A8Linear
from isthmus.formats.w8a8_static import StaticLinear
from tests.support.bundles import TinyTokenizer, rehash, trained_state
from tests.support.calibrated import calibrate
from tests.support.small import tiny_architecture as architecture
from tests.support.small_dense import dense_architecture, randomised

TOKENS = torch.randint(61, (2, 20), generator=torch.Generator().manual_seed(0))
ARCHITECTURE = architecture(q_lora_rank=14)
STATE = trained_state(ARCHITECTURE)
Q_A = "model.layers.0.self_attn.q_a_proj"


@pytest.fixture
def folder(tmp_path) -> Path:
    known = calibrate(STATE, ARCHITECTURE, TOKENS)
    write_bundle(tmp_path / "b", "modelslim", STATE, ARCHITECTURE, TinyTokenizer(), calibration=known)
    return tmp_path / "b"


def described(folder: Path) -> dict:
    return json.loads((folder / DESCRIPTION).read_text())


@settings(max_examples=60, deadline=None)
@given(
    low=st.floats(-1000, 1000, width=32),
    span=st.floats(0.0009765625, 1000, width=32),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
)
def test_the_whole_range_fits_and_zero_is_exact(low, span, dtype):
    high = low + span
    scale, offset = asymmetric(low, high, dtype)
    assert torch.equal(scale.to(dtype).float(), scale)
    assert offset == offset.round() and -128 <= offset <= 127
    ends = torch.tensor([min(low, 0.0), 0.0, max(high, 0.0)])
    values = (ends / scale + offset).round()
    assert values.min() >= -128.5 and values.max() <= 128  # a scale that is barely rounded may leave half a step
    back = (values.clamp(-128, 127) - offset) * scale
    assert back[1] == 0 and ((back - ends).abs() <= scale * 1.01).all()


def test_weights_have_scales_of_the_models_dtype_and_lose_half_a_step():
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(0)).mul_(3).exp_()
    for dtype in (torch.bfloat16, torch.float16):
        values, scale = quantise_weight(weight, dtype)
        assert torch.equal(scale.to(dtype).float(), scale) and values.abs().max() <= 127
        assert ((values * scale - weight).abs() <= scale * 0.5001).all()


@pytest.mark.parametrize("inputs", [24, 2300])
def test_a_static_layer_equals_int64(inputs):
    generator = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(9, inputs, generator=generator), torch.randn(9, generator=generator)
    x = torch.randn(7, inputs, generator=generator) + 0.7
    values, scale = quantise_weight(weight, torch.bfloat16)
    input_scale, offset = asymmetric(x.min().item(), 2.0, torch.bfloat16)  # some inputs saturate
    deq_scale = input_scale * scale.flatten()
    addend = quant_bias(values, deq_scale, offset, bias)
    found = StaticLinear(values, deq_scale, input_scale, offset, addend)(x)
    integers = np.clip(np.rint(x.numpy() / input_scale.numpy() + offset.numpy()), -128, 127).astype(np.int64)
    folded = np.rint(bias.double().numpy() / deq_scale.double().numpy()).astype(np.int64)
    sums = integers @ values.numpy().astype(np.int64).T
    own = folded - values.numpy().astype(np.int64).sum(1) * int(offset)
    assert np.array_equal(addend.numpy(), own)
    assert np.array_equal(found.numpy(), (sums + own).astype(np.float32) * deq_scale.numpy())
    exact = x.clamp(max=2.0) @ weight.T + bias
    assert (found - exact).norm() / exact.norm() < 0.02


def test_the_bit_pattern_is_numpys():
    scale = torch.rand(50, generator=torch.Generator().manual_seed(0)) * 1e-3
    pattern = bit_pattern(scale)
    assert np.array_equal(pattern.numpy(), np.frombuffer(scale.numpy().tobytes(), np.int32).astype(np.int64))
    assert np.array_equal(pattern.numpy().astype(np.int32).view(np.float32), scale.numpy())
    assert torch.equal(from_bit_pattern(pattern), scale)


def test_a_model_of_fp16_stores_patterns_and_computes_what_it_stores(tmp_path):
    known = calibrate(STATE, ARCHITECTURE, TOKENS)
    write_bundle(tmp_path / "b", "modelslim_fp16", STATE, ARCHITECTURE, TinyTokenizer(), calibration=known)
    stored = load_file(tmp_path / "b" / "model.safetensors")
    pattern = stored[f"{Q_A}.deq_scale"]
    assert pattern.dtype == torch.int64 and stored["model.norm.weight"].dtype == torch.float16
    scale = stored[f"{Q_A}.input_scale"].numpy() * stored[f"{Q_A}.weight_scale"].numpy().ravel()
    assert np.array_equal(pattern.numpy().astype(np.int32).view(np.float32), scale)
    model = read_bundle(tmp_path / "b").build()
    layer = model.model.layers[0].self_attn.q_a_proj
    assert isinstance(layer, StaticLinear) and np.array_equal(layer.scale.numpy(), scale)
    assert json.loads((tmp_path / "b" / "config.json").read_text())["torch_dtype"] == "float16"


def test_types_are_those_of_the_published_recipe(folder):
    description, stored = described(folder), load_file(folder / "model.safetensors")
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert stored.keys() == description.keys() - {"version", "model_quant_type", "group_size"}
    of = {name: kind for name, kind in description.items() if name.startswith("model.layers.1.") and "weight" in name}
    static = {name.split(".")[-2] for name, kind in of.items() if kind == "W8A8"}
    dynamic = {name.split(".")[-2] for name, kind in of.items() if kind == "W8A8_DYNAMIC"}
    assert static == {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"}
    assert dynamic == {"gate_proj", "up_proj", "down_proj"}
    assert of["model.layers.1.self_attn.kv_b_proj.weight"] == of["model.layers.1.mlp.gate.weight"] == "FLOAT"
    assert description["model_quant_type"] == "W8A8"
    assert stored[f"{Q_A}.quant_bias"].dtype == torch.int32 and stored[f"{Q_A}.input_offset"].shape == (1,)
    assert not stored[f"{Q_A}.weight_offset"].any()


def test_the_plugins_look_ups_find_one_type_for_what_it_fuses(folder):
    """vllm-ascend's `get_linear_quant_type` with its table for deepseek_v3, and `is_layer_skipped_ascend`."""
    description = described(folder)
    fused = {
        "gate_up_proj": ["gate_proj", "up_proj"],
        "experts": ["experts.0.gate_proj", "experts.0.up_proj", "experts.0.down_proj"],
        "fused_qkv_a_proj": ["q_a_proj", "kv_a_proj_with_mqa"],
    }
    for prefix, kind in {
        "model.layers.0.self_attn.fused_qkv_a_proj": "W8A8",
        "model.layers.0.self_attn.o_proj": "W8A8",
        "model.layers.0.self_attn.kv_b_proj": "FLOAT",
        "model.layers.0.mlp.gate_up_proj": "W8A8_DYNAMIC",
        "model.layers.1.mlp.experts": "W8A8_DYNAMIC",
        "model.layers.1.mlp.shared_experts.gate_up_proj": "W8A8_DYNAMIC",
        "model.layers.2.mlp.experts": "W8A8_DYNAMIC",
        "model.layers.2.shared_head.head": "FLOAT",
        "lm_head": "FLOAT",
    }.items():
        head, _, last = prefix.rpartition(".")
        shards = [f"{head}.{part}" for part in fused[last]] if last in fused else [prefix]
        assert {description[f"{shard}.weight"] for shard in shards} == {kind}
        skipped = any(
            name.startswith(prefix) and name.endswith(".weight") and value == "FLOAT"
            for name, value in description.items()
        )
        assert last in fused or skipped == (kind == "FLOAT")


def change(folder: Path, **entries: str | None) -> None:
    description = described(folder)
    for name, kind in entries.items():
        description[name] = kind
    (folder / DESCRIPTION).write_text(json.dumps({name: kind for name, kind in description.items() if kind}))
    rehash(folder)


def test_the_reader_obeys_the_description(folder):
    path = folder / "model.safetensors"
    stored = load_file(path)
    layer = "model.layers.1.mlp.experts.0.down_proj"
    float_weight = STATE[f"{layer}.weight"].to(torch.bfloat16)
    for part in ("weight_scale", "weight_offset"):
        del stored[f"{layer}.{part}"]
    save_file({**stored, f"{layer}.weight": float_weight}, path, metadata={"format": "pt"})
    rehash(folder)
    with pytest.raises(DamagedFile, match=r"experts\.0\.down_proj\.weight is bfloat16.* and should be int8"):
        read_bundle(folder)
    change(folder, **{f"{layer}.weight": "FLOAT", f"{layer}.weight_scale": None, f"{layer}.weight_offset": None})
    model = read_bundle(folder).build()
    down = model.model.layers[1].mlp.experts.get_submodule("0.down_proj")
    assert type(down) is torch.nn.Linear and torch.equal(down.weight, float_weight.float())
    assert isinstance(model.model.layers[1].mlp.experts.get_submodule("1.down_proj"), W8A8Linear)


def test_a_description_that_cannot_be_followed_is_refused(folder):
    change(folder, **{f"{Q_A}.weight": "W4A8_DYNAMIC"})
    with pytest.raises(IsthmusError, match=r"modelslim.*W4A8_DYNAMIC"):
        read_bundle(folder)
    change(folder, **{f"{Q_A}.weight": None})
    with pytest.raises(DamagedFile, match=f"says nothing of {Q_A}.weight"):
        read_bundle(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = get_format("w8a8").quantization_config(ARCHITECTURE)
    (folder / "config.json").write_text(json.dumps(config))
    rehash(folder)
    with pytest.raises(DamagedFile, match="announces its quantisation twice"):
        read_bundle(folder)


def test_asymmetric_weights_are_refused(folder):
    tensors = read_bundle(folder).tensors
    tensors[f"{Q_A}.weight_offset"][0] = 1
    with pytest.raises(DamagedFile, match=rf"{Q_A}.weight_offset is not zero"):
        get_format("modelslim").build(ARCHITECTURE, tensors)


def test_a_projection_with_a_bias_is_dynamic_and_keeps_it():
    arch = dense_architecture(model_type="qwen2")
    state = randomised(arch, 0).state_dict()
    known = calibrate(state, arch, TOKENS)
    model = get_format("modelslim").build(arch, get_format("modelslim").export(state, arch, known))
    attention = model.model.layers[0].self_attn
    assert isinstance(attention.q_proj, W8A8Linear) and isinstance(attention.o_proj, StaticLinear)
    wanted = get_format("fp32").build(arch, state)(TOKENS)
    assert (model(TOKENS) - wanted).norm() / wanted.norm() < 0.2
    assert torch.equal(attention.q_proj.bias, state["model.layers.0.self_attn.q_proj.bias"].to(torch.bfloat16).float())


def test_both_types_agree_with_w8a8_where_nothing_saturates():
    tensors = get_format("modelslim_dynamic").export(STATE, ARCHITECTURE)
    found = get_format("modelslim_dynamic").build(ARCHITECTURE, tensors)(TOKENS)
    same = get_format("w8a8").build(
        ARCHITECTURE, {name: tensor for name, tensor in tensors.items() if not name.endswith("_offset")}
    )
    torch.testing.assert_close(found, same(TOKENS), rtol=1e-5, atol=1e-5)
