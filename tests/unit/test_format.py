"""Formats against int64 arithmetic, the compressed-tensors library, transformers, and damage."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GenerationConfig

from isthmus.errors import DamagedFile, IsthmusError
from isthmus.formats import get_format
from isthmus.formats.files.bundle import read_bundle, write_bundle
from isthmus.formats.parts.int8 import exact_matmul, quantise_rows
from isthmus.formats.updates import wire
from isthmus.formats.w8a8 import W8A8Experts, W8A8Linear, is_quantised
from isthmus.model.model import Model
from isthmus.model.moe import Experts
from isthmus.recipe.architecture import DeepseekSection
from tests.support.bundles import TinyTokenizer, module_tree, rehash, trained_state
from tests.support.small import tiny_architecture as architecture


@pytest.fixture
def bundle_folder(tmp_path) -> Path:
    write_bundle(tmp_path / "bundle", "w8a8", trained_state(architecture()), architecture(), TinyTokenizer())
    return tmp_path / "bundle"


integers = st.sampled_from([1, 2, 3, 31, 96, 1023, 1024, 1025, 2048, 2500, 5000])


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9),
    length=integers,
    columns=st.integers(1, 9),
    batch=st.sampled_from([None, 3]),
    seed=st.integers(0, 10**6),
    extreme=st.booleans(),
)
def test_exact_matmul_equals_int64(rows, length, columns, batch, seed, extreme):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, length), (length, columns)]
    a, b = (
        torch.randint(-127, 128, shape if batch is None else (batch, *shape), generator=generator) for shape in shapes
    )
    if extreme:
        a, b = torch.full_like(a, 127), torch.full_like(b, -127)
    found = exact_matmul(a.float(), b.float())
    assert torch.equal(found, (a @ b).float())


floats = st.floats(-(2.0**127), 2.0**127, width=32) | st.floats(-(2.0**-120), 2.0**-120, width=32) | st.just(0.0)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(floats, min_size=3, max_size=3), min_size=1, max_size=5))
def test_quantised_rows_are_int8_and_close(rows):
    x = torch.tensor(rows)
    values, scale = quantise_rows(x)
    assert torch.equal(values, values.round()) and values.abs().max() <= 127
    assert torch.isfinite(scale).all() and scale.shape == (len(rows), 1)
    error = (values.double() * scale.double() - x.double()).abs()
    assert (error <= scale.double() * 0.5001).all()


def test_a_zero_row_stays_zero_through_a_quantised_layer():
    layer = W8A8Linear((torch.ones(4, 6, dtype=torch.int8), torch.ones(4, 1)))
    assert torch.equal(layer(torch.zeros(2, 6)), torch.zeros(2, 4))


def by_int64(x: torch.Tensor, values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """A quantised layer written out in float64 and int64: x [T, K], values [N, K], scale [N, 1]."""
    row_scale = (x.abs().max(dim=-1, keepdim=True).values / 127).clamp(min=1.2e-38)
    tokens = (x / row_scale).round().to(torch.int64)
    return ((tokens @ values.to(torch.int64).T).double() * scale.double().T * row_scale.double()).float()


def test_layer_with_a_long_sum_equals_int64():
    x, weight = torch.randn(7, 2300), torch.randn(5, 2300)
    values, scale = quantise_rows(weight)
    found = W8A8Linear((values.to(torch.int8), scale))(x)
    torch.testing.assert_close(found, by_int64(x, values, scale), rtol=3e-7, atol=0)


def test_a_row_does_not_depend_on_its_batch():
    values, scale = quantise_rows(torch.randn(40, 300))
    layer = W8A8Linear((values.to(torch.int8), scale))
    x = torch.randn(33, 300)
    assert torch.equal(torch.cat([layer(row[None]) for row in x]), layer(x))


def test_experts_equal_a_loop_with_int64():
    arch = architecture()
    torch.manual_seed(1)
    experts = Experts(arch)
    for weight in experts.parameters():
        torch.nn.init.normal_(weight)
    stored = []
    for index in range(arch.n_routed_experts):
        parts = {part: experts.state_dict()[f"{index}.{part}.weight"] for part in ("gate_proj", "up_proj", "down_proj")}
        stored.append({part: (quantise_rows(w)[0].to(torch.int8), quantise_rows(w)[1]) for part, w in parts.items()})
    counts = torch.arange(arch.n_routed_experts)  # the first expert has no token
    x = torch.randn(int(counts.sum()), arch.hidden_size)
    found = W8A8Experts(stored)(x, counts)
    for parts, mine, output in zip(stored, x.split(counts.tolist()), found.split(counts.tolist()), strict=True):
        inner = F.silu(by_int64(mine, *parts["gate_proj"])) * by_int64(mine, *parts["up_proj"])
        torch.testing.assert_close(output, by_int64(inner, *parts["down_proj"]), rtol=1e-5, atol=1e-5)


def fake_quantised(arch: DeepseekSection, tensors: dict[str, torch.Tensor]) -> Model:
    """The same numerics by another way: dequantised weights, and inputs that are rounded to their int8 grid."""
    weights = {
        name: tensor.float() * tensors[f"{name}_scale"] if is_quantised(name) else tensor.float()
        for name, tensor in tensors.items()
        if not name.endswith("_scale")
    }
    model = get_format("fp32").build(arch, weights)

    def round_input(_module, inputs):
        scale = (inputs[0].abs().amax(-1, keepdim=True) / 127).clamp(min=1.2e-38)
        return ((inputs[0] / scale).round() * scale,)

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and is_quantised(f"{name}.weight"):
            module.register_forward_pre_hook(round_input)
    return model


@pytest.mark.parametrize("limit", [None, 0.1])
def test_the_built_model_equals_fake_quantisation(limit):
    arch = architecture(first_k_dense_replace=2, q_lora_rank=14, swiglu_limit=limit)
    tensors = get_format("w8a8").export(trained_state(arch), arch)
    tokens = torch.randint(61, (3, 20), generator=torch.Generator().manual_seed(0))
    found = get_format("w8a8").build(arch, tensors)(tokens)
    reference = fake_quantised(arch, tensors)(tokens)
    unquantised = Model(arch)
    unquantised.load_state_dict(trained_state(arch))
    gap = (unquantised(tokens) - reference).abs().mean()
    assert (found - reference).abs().mean() < gap / 20


def test_what_is_quantised_and_what_is_not():
    arch = architecture(q_lora_rank=14)
    tensors = get_format("w8a8").export(trained_state(arch), arch)
    int8 = {".".join(name.split(".")[3:-1]) for name, tensor in tensors.items() if tensor.dtype == torch.int8}
    attention = {f"self_attn.{part}" for part in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj")}
    mlp = {f"mlp.{part}" for part in ("gate_proj", "up_proj", "down_proj")}
    shared = {name.replace("mlp.", "mlp.shared_experts.") for name in mlp}
    routed = {name.replace("mlp.", f"mlp.experts.{i}.") for name in mlp for i in range(4)}
    assert int8 == attention | mlp | shared | routed
    wide = {name.rsplit(".", 1)[1] for name, tensor in tensors.items() if tensor.dtype == torch.float32}
    assert wide == {"weight_scale", "e_score_correction_bias"}


def test_compressed_tensors_reads_the_config_and_the_weights(bundle_folder):
    config = json.loads((bundle_folder / "config.json").read_text())["quantization_config"]
    parsed = QuantizationConfig.model_validate(config)
    scheme = parsed.config_groups["group_0"]
    for side, strategy, dynamic in ((scheme.weights, "channel", False), (scheme.input_activations, "token", True)):
        assert (side.num_bits, side.type, side.symmetric) == (8, "int", True)
        assert (side.strategy, side.dynamic) == (strategy, dynamic)
    stored = load_file(bundle_folder / "model.safetensors")
    tree = module_tree(stored)
    apply_quantization_config(tree, parsed)
    chosen = {name for name, module in tree.named_modules() if getattr(module, "quantization_scheme", None)}
    assert chosen == {name.removesuffix(".weight") for name, tensor in stored.items() if tensor.dtype == torch.int8}
    compressor = BaseCompressor.get_value_from_registry(parsed.format)
    state = trained_state(architecture())
    for name in chosen:
        pair = {"weight": stored[f"{name}.weight"], "weight_scale": stored[f"{name}.weight_scale"]}
        plain = compressor.decompress(pair, scheme)["weight"]
        assert torch.equal(plain, pair["weight"].float() * pair["weight_scale"])
        assert ((plain - state[f"{name}.weight"]).abs() <= 0.5001 * pair["weight_scale"]).all()


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_transformers_loads_the_bundle_and_agrees(tmp_path, name):
    arch = architecture(q_lora_rank=14, n_group=2, topk_group=1, routed_scaling_factor=2.5)
    write_bundle(tmp_path / "b", name, trained_state(arch), arch, TinyTokenizer())
    theirs, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "b", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["mismatched_keys"]
    tokens = torch.randint(61, (2, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        reference = theirs.eval()(tokens).logits
        torch.testing.assert_close(read_bundle(tmp_path / "b").build()(tokens), reference, atol=1e-4, rtol=1e-4)
    assert GenerationConfig.from_pretrained(tmp_path / "b").eos_token_id == 5


def test_bundle_keeps_the_mtp_layers_copies_on_disk_only(bundle_folder):
    stored = load_file(bundle_folder / "model.safetensors")
    assert torch.equal(stored["model.layers.2.embed_tokens.weight"], stored["model.embed_tokens.weight"])
    assert torch.equal(stored["model.layers.2.shared_head.head.weight"], stored["lm_head.weight"])
    read = read_bundle(bundle_folder)
    assert set(stored) - set(read.tensors) == {
        "model.layers.2.embed_tokens.weight",
        "model.layers.2.shared_head.head.weight",
    }
    assert read.format == "w8a8" and read.architecture == architecture()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"])
def test_a_flipped_bit_is_found(bundle_folder, name):
    path = bundle_folder / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedFile, match=name):
        read_bundle(bundle_folder)


def test_a_truncated_a_missing_and_a_foreign_file_are_found(bundle_folder):
    weights = bundle_folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(DamagedFile, match=r"model\.safetensors"):
        read_bundle(bundle_folder)
    weights.unlink()
    with pytest.raises(DamagedFile, match=r"model\.safetensors is missing"):
        read_bundle(bundle_folder)
    weights.write_bytes(content)
    (bundle_folder / "modeling.py").write_text("")
    with pytest.raises(DamagedFile, match=r"modeling\.py"):
        read_bundle(bundle_folder)


def rewrite(folder: Path, change) -> None:
    """Change the tensors and make the file hashes fit again."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    rehash(folder)


CHANGES = {
    "missing lm_head.weight": lambda tensors: tensors.pop("lm_head.weight"),
    "missing model.embed_tokens.weight": lambda tensors: tensors.pop("model.embed_tokens.weight"),
    "unexpected model.extra.weight": lambda tensors: tensors.update({"model.extra.weight": torch.zeros(1)}),
    r"model.norm.weight is bfloat16\[31\] and should be bfloat16\[32\]": lambda tensors: tensors.update(
        {"model.norm.weight": tensors["model.norm.weight"][:31].clone()}
    ),
    r"o_proj.weight is float32.* and should be int8": lambda tensors: tensors.update(
        {"model.layers.0.self_attn.o_proj.weight": tensors["model.layers.0.self_attn.o_proj.weight"].float()}
    ),
    r"layers.2.embed_tokens.weight differs": lambda tensors: tensors["model.layers.2.embed_tokens.weight"].add_(1),
}


@pytest.mark.parametrize("message", CHANGES)
def test_tensors_that_do_not_fit_are_named(bundle_folder, message):
    rewrite(bundle_folder, CHANGES[message])
    with pytest.raises(DamagedFile, match=message):
        read_bundle(bundle_folder)


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_pickle_is_refused_and_not_run(bundle_folder, tmp_path):
    (bundle_folder / "model.safetensors").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    rehash(bundle_folder)
    with pytest.raises(DamagedFile, match="not a whole safetensors file"):
        read_bundle(bundle_folder)
    assert not (tmp_path / "sprung").exists()


def test_an_unknown_format_and_no_bundle_are_explained(tmp_path, bundle_folder):
    with pytest.raises(IsthmusError, match="did you mean 'w8a8'"):
        get_format("w8a")
    with pytest.raises(IsthmusError, match="not a bundle"):
        read_bundle(tmp_path)
    config = json.loads((bundle_folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 4
    (bundle_folder / "config.json").write_text(json.dumps(config))
    rehash(bundle_folder)
    with pytest.raises(IsthmusError, match="compressed-tensors"):
        read_bundle(bundle_folder)


def test_a_failed_write_leaves_the_old_bundle_and_nothing_else(bundle_folder):
    class FullDisk(TinyTokenizer):
        def save(self, folder: Path) -> None:
            raise OSError(28, "No space left on device")

    before = (bundle_folder / "checksums.json").read_bytes()
    (bundle_folder.parent / ".bundle.tmp").mkdir()
    with pytest.raises(IsthmusError, match="no space left"):
        write_bundle(bundle_folder, "bf16", trained_state(architecture(), 1), architecture(), FullDisk())
    assert (bundle_folder / "checksums.json").read_bytes() == before
    assert [path.name for path in bundle_folder.parent.iterdir()] == ["bundle"]
    write_bundle(bundle_folder, "bf16", trained_state(architecture(), 1), architecture(), TinyTokenizer())
    assert read_bundle(bundle_folder).format == "bf16"
    assert [path.name for path in bundle_folder.parent.iterdir()] == ["bundle"]


def test_the_wire_carries_tensors_and_refuses_other_bytes():
    tensors = get_format("w8a8").export(trained_state(architecture()), architecture())
    payload = wire.pack(tensors)
    assert payload == wire.pack(dict(reversed(tensors.items())))
    arrived = wire.unpack(payload, wire.digest(payload))
    assert arrived.keys() == tensors.keys()
    assert all(
        torch.equal(arrived[name], tensors[name]) and arrived[name].dtype == tensors[name].dtype for name in tensors
    )
    with pytest.raises(DamagedFile, match="SHA-256"):
        wire.unpack(payload[:-1] + bytes([payload[-1] ^ 1]), wire.digest(payload))
    with pytest.raises(DamagedFile, match="not a safetensors message"):
        wire.unpack(b"junk", wire.digest(b"junk"))
