"""Static W8A8 against numpy, compressed-tensors and transformers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig
from compressed_tensors.quantization.lifecycle.forward import quantize
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from isthmus.errors import IsthmusError
from isthmus.formats import get_format
from isthmus.formats.files.bundle import read_bundle, write_bundle
from isthmus.formats.parts import int8
from isthmus.formats.parts.int8 import quantise_rows, quantise_static
from isthmus.formats.parts.ranges import Calibration
from isthmus.formats.w8a8_static import StaticLinear
from tests.support.bundles import TinyTokenizer, trained_state
from tests.support.calibrated import calibrate
from tests.support.small import tiny_architecture as architecture
from tests.support.small_dense import dense_architecture, randomised

TOKENS = torch.randint(61, (2, 20), generator=torch.Generator().manual_seed(0))


def test_a_layer_equals_int64_and_saturates():
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(6, 1500, generator=generator) * 2, torch.randn(8, 1500, generator=generator)
    values, scale = quantise_rows(weight)
    input_scale = torch.tensor([3.0 / 127])
    found = StaticLinear(values.to(torch.int8), scale.flatten() * input_scale, input_scale)(x)
    integers = np.clip(np.rint(x.numpy() / input_scale.numpy()), -128, 127).astype(np.int64)
    assert (np.abs(x.numpy()) > 3.1).any() and integers.min() == -128
    sums = integers @ values.numpy().astype(np.int64).T
    assert np.array_equal(found.numpy(), sums.astype(np.float32) * (scale.flatten() * input_scale).numpy())


def test_compressed_tensors_quantises_the_same_inputs_and_reads_the_same_weights(tmp_path):
    arch, state = architecture(q_lora_rank=14), trained_state(architecture(q_lora_rank=14))
    known = calibrate(state, arch, TOKENS)
    write_bundle(tmp_path / "b", "w8a8_static", state, arch, TinyTokenizer(), calibration=known)
    config = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
    parsed = QuantizationConfig.model_validate(config)
    scheme = parsed.config_groups["group_0"]
    inputs = scheme.input_activations
    assert isinstance(inputs, QuantizationArgs)
    assert (inputs.strategy, inputs.dynamic, inputs.symmetric, inputs.num_bits) == ("tensor", False, True, 8)
    compressor = BaseCompressor.get_value_from_registry(parsed.format)
    stored = load_file(tmp_path / "b" / "model.safetensors")
    scaled = [name.removesuffix(".input_scale") for name in stored if name.endswith(".input_scale")]
    assert len(scaled) > 20
    x = torch.randn(9, 33, generator=torch.Generator().manual_seed(1)) * 3
    for path in scaled:
        pair = {part: stored[f"{path}.{part}"] for part in ("weight", "weight_scale")}
        plain = compressor.decompress(pair, scheme)["weight"]
        assert torch.equal(plain, pair["weight"].float() * pair["weight_scale"])
        scale = stored[f"{path}.input_scale"]
        theirs = quantize(x, scale, torch.zeros(1, dtype=torch.int8), inputs)
        assert torch.equal(quantise_static(x, scale), theirs)


def test_the_scale_covers_what_the_calibration_saw_and_experts_share_it():
    low, high = torch.tensor([-3.0, 0.0]), torch.tensor([1.0, 2.0])
    names = [f"model.layers.1.mlp.experts.{index}.up_proj" for index in range(3)]
    unseen = torch.full((2,), float("inf"))
    known = Calibration(
        {names[0]: low, names[1]: low * 2, names[2]: unseen}, dict.fromkeys(names[:2], high) | {names[2]: -unseen}
    )
    stored = [
        get_format("w8a8_static").export_one(f"{n}.weight", torch.ones(4, 2), architecture(), known) for n in names
    ]
    assert [one[f"{n}.input_scale"].item() for one, n in zip(stored, names, strict=True)] == [np.float32(6 / 127)] * 3
    with pytest.raises(
        IsthmusError, match=r"knows nothing of the inputs of model\.layers\.1\.mlp\.experts\.0\.down_proj"
    ):
        known.input_range("model.layers.1.mlp.experts.0.down_proj")


def quantise_rows_as_transformers(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """compressed-tensors divides by half of the whole range, 127.5, where vLLM and the emulator divide by 127."""
    scale = x.abs().amax(-1, keepdim=True) / 127.5
    return (x / scale).round().clamp(-128, 127), scale


@pytest.mark.parametrize("name", ["w8a8", "w8a8_static"])
def test_transformers_serves_the_bundle_and_agrees_with_the_emulator(tmp_path, monkeypatch, name):
    arch = dense_architecture(model_type="qwen2")
    state = randomised(arch, 0).state_dict()
    known = calibrate(state, arch, TOKENS)
    write_bundle(tmp_path / "b", name, state, arch, TinyTokenizer(), calibration=known)
    theirs, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "b", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["mismatched_keys"] and not info["unexpected_keys"]
    monkeypatch.setattr(int8, "quantise_rows", quantise_rows_as_transformers)
    with torch.no_grad():
        wanted = theirs.eval()(TOKENS).logits
        found = read_bundle(tmp_path / "b").build()(TOKENS)
        plain = get_format("bf16").build(arch, get_format("bf16").export(state, arch))(TOKENS)
    gap = (plain - wanted).norm()
    assert gap / wanted.norm() > 0.005 and (found - wanted).norm() < gap / 10
