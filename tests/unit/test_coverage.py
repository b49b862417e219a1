"""Coverage against the definitions of the formats, and against every way in which an exporter can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from isthmus.formats.calibration.rounding import gptq_round, sample_inputs
from isthmus.formats.files.bundle import read_bundle, write_bundle
from isthmus.model.digest import tensor_sha256
from isthmus.model.model import Model
from isthmus.parity.announced import Announced, odd_ones_out
from isthmus.parity.coverage import check_coverage
from isthmus.parity.manifest import check_manifest, identity, read_manifest, write_manifest
from isthmus.parity.steps import Misfit, compare_quantised
from tests.support.bundles import TinyTokenizer
from tests.support.small import tiny_architecture

ARCHITECTURE = tiny_architecture(hidden_size=16, num_attention_heads=2, v_head_dim=8)
EXPERT = "model.layers.1.mlp.experts.{}.{}.weight"
FORMATS = ("fp32", "bf16", "w8a8")
NOTHING = Announced({"quantization_config": {"quant_method": "none"}})


def weights(seed: int = 0) -> dict[str, Tensor]:
    """Weights with heavy tails, norms and biases that are not trivial."""
    state = Model(ARCHITECTURE).initialise(seed).state_dict()
    draw = torch.Generator().manual_seed(seed)
    return {name: t + 0.1 * torch.randn(t.shape, generator=draw) for name, t in state.items()}


@pytest.fixture(scope="module")
def source() -> dict[str, Tensor]:
    return weights()


@pytest.fixture(params=FORMATS)
def bundle(request, source, tmp_path) -> Path:
    write_bundle(tmp_path / "b", request.param, source, ARCHITECTURE, TinyTokenizer(0, 1))
    return tmp_path / "b"


@pytest.fixture
def w8a8(source, tmp_path) -> Path:
    write_bundle(tmp_path / "b", "w8a8", source, ARCHITECTURE, TinyTokenizer(0, 1))
    return tmp_path / "b"


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / "model.safetensors")


def test_a_healthy_bundle_accounts_for_every_tensor(source, bundle):
    entries, checks = check_coverage(source, bundle)
    assert [check.outcome for check in checks] == ["pass"], checks
    assert [entry.source for entry in entries] == list(source)
    fates = {entry.source: entry.fate for entry in entries}
    quantised = "quantised" if "w8a8" in checks[0].detail or "quantised" in checks[0].detail else "carried"
    assert fates["model.layers.1.mlp.experts.3.down_proj.weight"] == quantised
    assert fates["model.norm.weight"] == fates["lm_head.weight"] == "carried"
    assert check_coverage(source, read_bundle(bundle))[1] == checks
    stored = load_file(bundle / "model.safetensors")
    listed = [name for entry in entries for name in entry.stored]
    copies = {"model.layers.2.embed_tokens.weight", "model.layers.2.shared_head.head.weight"}
    assert sorted(listed) == sorted(stored.keys() - copies) and len(set(listed)) == len(listed)


def test_the_largest_error_is_that_of_rounding(source, w8a8):
    entries, checks = check_coverage(source, w8a8)
    stored = load_file(w8a8 / "model.safetensors")
    for entry in entries:
        if entry.fate == "quantised":
            name, scale = entry.source, stored[f"{entry.source}_scale"].double()
            exact = ((source[name].double() - stored[name].double() * scale).abs() / (scale / 2)).max().item()
            assert entry.error == pytest.approx(exact, abs=1e-4) and 0.5 < exact <= 1 + 1e-4
    assert checks[0].figure is not None and 0.9 < checks[0].figure.value <= 1 + 1e-4


def flip_lowest_bit(t: dict[str, Tensor], name: str) -> None:
    t[name][3, 5] ^= 1


def scale_of(t: dict[str, Tensor], name: str, change) -> None:
    t[f"{name}_scale"] = change(t[f"{name}_scale"])


def swap(t: dict[str, Tensor], one: str, other: str) -> None:
    for end in ("", "_scale"):
        t[one + end], t[other + end] = t[other + end], t[one + end]


def in_bf16(t: dict[str, Tensor], name: str, source: dict[str, Tensor]) -> None:
    t[name] = source[name].bfloat16()
    del t[f"{name}_scale"]


def stale(t: dict[str, Tensor], name: str, source: dict[str, Tensor]) -> None:
    old = source[name] * 0.999
    scale = old.abs().amax(1, keepdim=True) / 127
    t[name], t[f"{name}_scale"] = (old / scale).round().to(torch.int8), scale


DOWN, UP = EXPERT.format(3, "down_proj"), EXPERT.format(1, "up_proj")
O_PROJ = "model.layers.0.self_attn.o_proj.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
FAULTS = {
    "a flipped bit": (DOWN, lambda t, s: flip_lowest_bit(t, DOWN)),
    "the last scale row lost": (DOWN, lambda t, s: scale_of(t, DOWN, lambda scale: scale[:-1])),
    "the last scale zero": (DOWN, lambda t, s: t[f"{DOWN}_scale"][-1].zero_()),
    "scales floored to powers of two": (
        UP,
        lambda t, s: scale_of(t, UP, lambda scale: torch.exp2(torch.floor(torch.log2(scale)))),
    ),
    "scales that are only wide enough": (
        UP,
        lambda t, s: t.update(
            {UP: (s[UP] / (2 * t[f"{UP}_scale"])).round().to(torch.int8), f"{UP}_scale": 2 * t[f"{UP}_scale"]}
        ),
    ),
    "a square matrix transposed": (O_PROJ, lambda t, s: t.update({O_PROJ: t[O_PROJ].t().contiguous()})),
    "a layer left in bf16": (DOWN, lambda t, s: in_bf16(t, DOWN, s)),
    "stale weights": (UP, lambda t, s: stale(t, UP, s)),
    "the router's bias lost": (BIAS, lambda t, s: t[BIAS].zero_()),
    "the router's bias rounded": (BIAS, lambda t, s: t.update({BIAS: t[BIAS].bfloat16()})),
    "a norm missing": ("model.norm.weight", lambda t, s: t.pop("model.norm.weight")),
    "a norm of ones": ("model.norm.weight", lambda t, s: t["model.norm.weight"].fill_(1)),
    "a scale that is not finite": (DOWN, lambda t, s: t[f"{DOWN}_scale"][0].fill_(float("nan"))),
    "a stranger": ("model.layers.0.extra.weight", lambda t, s: t.update({"model.layers.0.extra.weight": t[DOWN]})),
    "an MTP head never synced": (
        "model.layers.2.shared_head.head.weight",
        lambda t, s: t["model.layers.2.shared_head.head.weight"].mul_(1.01),
    ),
    "kv_b_proj quantised": (
        "model.layers.0.self_attn.kv_b_proj.weight",
        lambda t, s: t.update({"model.layers.0.self_attn.kv_b_proj.weight": torch.ones(32, 12, dtype=torch.int8)}),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_refused_and_its_module_named(source, w8a8, fault):
    name, plant = FAULTS[fault]
    rewrite(w8a8, lambda tensors: plant(tensors, source))
    _, checks = check_coverage(source, w8a8)
    assert [(check.outcome, check.module) for check in checks] == [("fail", name.rpartition(".")[0])], checks


def test_swapped_experts_are_both_named_and_told_apart(source, w8a8):
    other = EXPERT.format(2, "down_proj")
    rewrite(w8a8, lambda tensors: swap(tensors, DOWN, other))
    _, checks = check_coverage(source, w8a8)
    assert {check.module for check in checks} == {DOWN.removesuffix(".weight"), other.removesuffix(".weight")}
    assert "holds the weights of expert 3" in checks[0].detail and "of expert 2" in checks[1].detail


def test_a_transposed_matrix_is_called_so(source, tmp_path):
    write_bundle(tmp_path / "b", "bf16", source, ARCHITECTURE, TinyTokenizer(0, 1))
    rewrite(tmp_path / "b", lambda t: t.update({O_PROJ: t[O_PROJ].t()}))
    _, checks = check_coverage(source, tmp_path / "b")
    assert "transposed" in checks[0].detail and checks[0].module == O_PROJ.removesuffix(".weight")


def test_weights_of_one_version_ago_are_refused_in_every_format(source, bundle):
    newer = {name: tensor + 1e-3 * torch.sign(tensor) for name, tensor in source.items()}
    entries, checks = check_coverage(newer, bundle)
    assert {check.outcome for check in checks} == {"fail"} and len(checks) <= 33
    assert {entry.fate for entry in entries} == {"unaccounted"} and "more tensors" in checks[-1].detail


def test_a_tied_head_may_be_dropped_and_another_may_not(tmp_path):
    tied = tiny_architecture(tie_word_embeddings=True)
    state = Model(tied).initialise(0).state_dict()
    write_bundle(tmp_path / "b", "bf16", state, tied, TinyTokenizer(0, 1))
    entries, checks = check_coverage(state, tmp_path / "b")
    head = next(entry for entry in entries if entry.source == "lm_head.weight")
    assert checks[0].outcome == "pass" and head.fate == "dropped" and "embed_tokens" in head.detail
    _, checks = check_coverage({**state, "lm_head.weight": state["lm_head.weight"] + 1}, tmp_path / "b")
    assert [check.module for check in checks] == ["lm_head"]


def test_copies_and_computed_tensors_may_be_dropped(source, w8a8):
    copies = {
        "model.layers.2.embed_tokens.weight": source["model.embed_tokens.weight"],
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),
    }
    entries, checks = check_coverage({**source, **copies}, read_bundle(w8a8))
    assert checks[0].outcome == "pass" and [entry.fate for entry in entries[-2:]] == ["dropped", "dropped"]
    wrong = {**source, "model.layers.2.embed_tokens.weight": -source["model.embed_tokens.weight"]}
    assert check_coverage(wrong, read_bundle(w8a8))[1][0].module == "model.layers.2.embed_tokens"


def test_the_source_may_be_read_tensor_by_tensor(source, w8a8):
    class Counting(dict):
        reads = 0

        def __getitem__(self, name):
            self.reads += 1
            return super().__getitem__(name)

    lazy = Counting(source)
    check_coverage(lazy, w8a8)
    copies = 2
    compared_twice = len(source)
    assert lazy.reads <= len(source) + copies + compared_twice


def test_merged_rows_are_followed(source, tmp_path):
    write_bundle(tmp_path / "b", "bf16", source, ARCHITECTURE, TinyTokenizer(0, 1))
    prefix = "model.layers.0.mlp"

    def merge(t):
        t[f"{prefix}.gate_up_proj.weight"] = torch.cat(
            [t.pop(f"{prefix}.gate_proj.weight"), t.pop(f"{prefix}.up_proj.weight")]
        )

    rewrite(tmp_path / "b", merge)
    entries, checks = check_coverage(source, tmp_path / "b")
    assert checks[0].outcome == "pass" and sum(entry.fate == "merged" for entry in entries) == 2
    rewrite(tmp_path / "b", lambda t: t[f"{prefix}.gate_up_proj.weight"][60].neg_())
    assert check_coverage(source, tmp_path / "b")[1][0].module == f"{prefix}.gate_proj"


def test_a_narrower_dtype_than_announced_is_refused(source, tmp_path):
    write_bundle(tmp_path / "b", "fp32", source, ARCHITECTURE, TinyTokenizer(0, 1))
    rewrite(tmp_path / "b", lambda t: t.update({DOWN: t[DOWN].bfloat16()}))
    checks = check_coverage(source, tmp_path / "b")[1]
    assert [check.module for check in checks] == [DOWN.removesuffix(".weight")]
    rounded = {**source, DOWN: source[DOWN].bfloat16().float()}
    assert check_coverage(rounded, tmp_path / "b")[1][0].outcome == "pass", "nothing is lost of numbers that bf16 holds"


def test_balanced_weights_are_compared_with_what_balancing_made_of_them(source, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    balanced = {**source, name: source[name] * 2.0}
    write_bundle(tmp_path / "b", "w8a8", balanced, ARCHITECTURE, TinyTokenizer(0, 1))
    assert check_coverage(source, tmp_path / "b")[1][0].module == name.removesuffix(".weight")
    entries, checks = check_coverage(source, tmp_path / "b", balance=lambda n, t: t * 2.0 if n == name else t)
    assert checks[0].outcome == "pass"
    assert [entry.source for entry in entries if "balanced" in entry.detail] == [name]


# Formats that stand beside X.weight, made by hand.

E4M3 = torch.float8_e4m3fn


def block_scales(weight: Tensor, block: int) -> Tensor:
    rows, columns = (-(-size // block) for size in weight.shape)
    parts = [[weight[i * block :][:block, j * block :][:, :block] for j in range(columns)] for i in range(rows)]
    return torch.tensor([[float(part.abs().max()) for part in row] for row in parts])


def wide(scale: Tensor, rows: int, columns: int, shape) -> Tensor:
    return scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: shape[0], : shape[1]]


def fp8(weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    scale = block_scales(weight, 128) / 448
    return (weight / wide(scale, 128, 128, weight.shape)).to(E4M3), {"weight_scale_inv": scale}


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).pow(3)


def test_fp8_blocks_with_a_partial_last_one():
    weight = drawn(576, 200)
    values, beside = fp8(weight)
    assert beside["weight_scale_inv"].shape == (5, 2)
    assert compare_quantised(weight, values, beside, NOTHING) == pytest.approx(1, abs=0.05)
    lost = compare_quantised(weight, values, {"weight_scale_inv": beside["weight_scale_inv"][:4]}, NOTHING)
    assert isinstance(lost, Misfit) and "[4, 2]" in lost.why and "[5, 2]" in lost.why
    floored = {"weight_scale_inv": torch.exp2(beside["weight_scale_inv"].log2().floor())}
    assert isinstance(compare_quantised(weight, values, floored, NOTHING), Misfit)
    again = (weight / wide(floored["weight_scale_inv"], 128, 128, weight.shape)).clamp(-448, 448).to(E4M3)
    assert isinstance(compare_quantised(weight, again, floored, NOTHING), Misfit), "values beyond 448 were clipped"
    flipped = values.view(torch.uint8).clone()
    flipped[300, 7] ^= 1
    assert isinstance(compare_quantised(weight, flipped.view(E4M3), beside, NOTHING), Misfit)


def test_fp8_scales_that_are_powers_of_two_if_announced():
    weight = drawn(256, 256)
    scale = torch.exp2((block_scales(weight, 128) / 448).log2().ceil())
    values = (weight / wide(scale, 128, 128, weight.shape)).to(E4M3)
    said = Announced({"quantization_config": {"quant_method": "fp8", "scale_fmt": "ue8m0"}})
    assert not isinstance(compare_quantised(weight, values, {"weight_scale_inv": scale}, said), Misfit)
    assert isinstance(compare_quantised(weight, values, {"weight_scale_inv": scale}, NOTHING), Misfit)
    exact = values.float() * wide(scale, 128, 128, weight.shape)
    assert compare_quantised(exact, values, {"weight_scale_inv": scale}, NOTHING) == 0, "what is exact needs no rule"


def test_mxfp8_by_either_rule_of_its_exponents():
    weight = drawn(64, 96)
    blocks = weight.unflatten(1, (-1, 32)).abs().amax(-1)
    for exponent in ((blocks / 448).log2().ceil(), blocks.log2().floor() - 8):
        values = (weight / wide(torch.exp2(exponent), 1, 32, weight.shape)).clamp(-448, 448).to(E4M3)
        scale = {"weight_scale": (exponent + 127).to(torch.uint8)}
        assert not isinstance(compare_quantised(weight, values, scale, NOTHING), Misfit)
        wrong = {"weight_scale": scale["weight_scale"] + 1}
        assert isinstance(compare_quantised(weight, values, wrong, NOTHING), Misfit)
        transposed = {"weight_scale": scale["weight_scale"].t().contiguous()}
        assert isinstance(compare_quantised(weight, values, transposed, NOTHING), Misfit)


def modelslim(weight: Tensor, bias: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    scale = weight.abs().amax(1, keepdim=True) / 127
    values, inputs, offset = (weight / scale).round().to(torch.int8), torch.tensor([0.03]), torch.tensor([-7.0])
    deq = (scale * inputs).flatten()
    return values, {
        "weight_scale": scale,
        "weight_offset": torch.zeros_like(scale),
        "input_scale": inputs,
        "input_offset": offset,
        "deq_scale": deq,
        "quant_bias": ((bias / deq).double() - values.double().sum(1) * -7.0).round().to(torch.int32),
    }


def test_modelslim_static_with_its_corrections():
    weight, bias = drawn(24, 40), drawn(24)
    values, beside = modelslim(weight, bias)
    assert not isinstance(compare_quantised(weight, values, beside, NOTHING, bias=bias), Misfit)
    as_fp16 = {**beside, "deq_scale": beside["deq_scale"].view(torch.int32).to(torch.int64)}
    assert not isinstance(compare_quantised(weight, values, as_fp16, NOTHING, bias=bias), Misfit)
    without = {part: tensor for part, tensor in beside.items() if part != "weight_scale"}
    assert not isinstance(compare_quantised(weight, values, without, NOTHING, bias=bias), Misfit)
    wrong = {
        "weight_offset": beside["weight_offset"] + 1,
        "input_scale": beside["input_scale"] * 2,
        "input_offset": beside["input_offset"] + 1,
        "deq_scale": beside["deq_scale"].roll(1),
        "quant_bias": beside["quant_bias"] + 3,
    }
    for part, tensor in wrong.items():
        found = compare_quantised(weight, values, {**beside, part: tensor}, NOTHING, bias=bias)
        assert isinstance(found, Misfit), part
    assert isinstance(compare_quantised(weight, values, {}, NOTHING), Misfit)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_modelslim_rounds_its_scales_up_to_the_models_dtype(dtype):
    weight = drawn(24, 40) / 100
    exact = weight.abs().amax(1, keepdim=True) / 127
    nearest = exact.to(dtype).float()
    step = torch.finfo(dtype).eps * torch.exp2(exact.log2().floor()).clamp_min(torch.finfo(dtype).smallest_normal)
    scale = torch.where(nearest >= exact, nearest, (nearest + step).to(dtype).float())
    said = Announced({"torch_dtype": str(dtype), "quantization_config": {"quant_method": "modelslim"}})

    def compare(scale: Tensor, announced: Announced) -> float | Misfit:
        values = (weight / scale).round().to(torch.int8)
        return compare_quantised(weight, values, {"weight_scale": scale}, announced)

    assert not isinstance(compare(scale, said), Misfit) and isinstance(compare(scale, NOTHING), Misfit)
    assert isinstance(compare((scale * 1.02).to(dtype).float(), said), Misfit), "wider than the next number"
    assert isinstance(compare(scale * (1 + 2**-14), said), Misfit), "no number of that dtype"


def gram_of(columns: int, seed: int = 0) -> Tensor:
    """Second moments of inputs that hang together, a few of them much larger than the others."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(columns, columns, generator=generator)
    mixed[:3] *= 20
    x = torch.randn(4 * columns, columns, generator=generator) @ mixed.T
    return x.T @ x / len(x)


def rounded_by_gptq(weight: Tensor, gram: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    scale = weight.abs().amax(1, keepdim=True) / 127
    return gptq_round(weight, scale, gram), {"weight_scale": scale}


@pytest.mark.parametrize("seed", range(8))
def test_compensated_rounding_is_judged_by_the_outputs_whatever_it_does_to_elements(seed):
    weight, gram = drawn(160, 64), gram_of(64, seed)
    values, beside = rounded_by_gptq(weight, gram)
    steps = (weight / beside["weight_scale"] - values).abs()
    assert steps.max() > 2, "elements are far from the nearest"
    assert isinstance(compare_quantised(weight, values, beside, NOTHING), Misfit)
    share = compare_quantised(weight, values, beside, NOTHING, inputs=sample_inputs(gram))
    assert not isinstance(share, Misfit)
    error, nearest = (w - weight for w in (values * beside["weight_scale"], nearest_weight(weight)))
    exact = (error @ gram * error).sum() / (nearest @ gram * nearest).sum()
    assert share == pytest.approx(float(exact), rel=0.5) and share < 0.9


def nearest_weight(weight: Tensor) -> Tensor:
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round() * scale


def swapped_rows(values: Tensor) -> None:
    values[[5, 6]] = values[[6, 5]]


def negated_row(values: Tensor) -> None:
    values[7] = -values[7]


def zeroed_row(values: Tensor) -> None:
    values[150] = 0


def lost_code(values: Tensor) -> None:
    values[9, 1] = -values[9, 1] - 64 if values[9, 1] >= 0 else -values[9, 1] + 64


def coarse_everywhere(values: Tensor) -> None:
    values.copy_((values.float() / 4).round().mul(4).clamp(-124, 124).to(values.dtype))


@pytest.mark.parametrize("fault", [swapped_rows, negated_row, zeroed_row, lost_code, coarse_everywhere])
def test_faults_of_compensated_rounding_are_found(fault):
    weight, gram = drawn(160, 64), gram_of(64)
    values, beside = rounded_by_gptq(weight, gram)
    fault(values)
    found = compare_quantised(weight, values, beside, NOTHING, inputs=sample_inputs(gram))
    assert isinstance(found, Misfit) and "as rounding to the nearest" in found.why


@pytest.mark.parametrize("inputs", [torch.zeros(16, 64), torch.full((16, 64), float("nan")), torch.ones(16, 63)])
def test_inputs_that_show_nothing_vouch_for_nothing(inputs):
    weight = drawn(16, 64)
    values, beside = rounded_by_gptq(weight, gram_of(64))
    assert isinstance(compare_quantised(weight, values, beside, NOTHING, inputs=inputs), Misfit)


def test_what_no_list_names_must_be_stored_as_its_kind():
    kinds = {f"model.layers.{i}.mlp.up_proj": i != 2 for i in range(4)} | {"model.layers.0.mlp.gate": False}
    said = Announced({"quantization_config": {"quant_method": "fp8"}})
    found = {name: said.quantised(f"model.layers.3.{name}") for name in ("mlp.up_proj", "eh_proj", "mlp.gate")}
    assert found == {"mlp.up_proj": True, "eh_proj": None, "mlp.gate": None}
    assert odd_ones_out(kinds) == {"model.layers.2.mlp.up_proj": False}


def test_modelslims_description_says_what_is_quantised():
    said = Announced({"quantization_config": {"quant_method": "modelslim", "a.weight": "W8A8", "b.weight": "FLOAT"}})
    assert (said.quantised("a"), said.quantised("b"), said.quantised("c")) == (True, False, None)


# The manifest.


def test_the_manifest_does_not_depend_on_sharding_or_order(source, tmp_path):
    found = []
    for shard_bytes in (1 << 30, 4000):
        folder = tmp_path / str(shard_bytes)
        write_bundle(folder, "w8a8", source, ARCHITECTURE, TinyTokenizer(0, 1), shard_bytes=shard_bytes)
        entries, _ = check_coverage(source, folder)
        found.append(write_manifest(folder, coverage=entries, architecture=ARCHITECTURE, parent="p"))
        assert check_manifest(folder)[0].outcome == "pass" and read_manifest(folder) == found[-1]
        read_bundle(folder)
    assert found[0].id == found[1].id
    assert found[0].source == identity((name, tensor_sha256(tensor)) for name, tensor in source.items())
    assert found[0].parent == "p" and found[0].format == "w8a8"
    assert found[0].architecture["rms_norm_eps"] == ARCHITECTURE.rms_norm_eps


def test_a_file_is_added_without_vouching_for_the_others(w8a8):
    path = w8a8 / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    write_manifest(w8a8)
    assert check_manifest(w8a8)[0].outcome == "fail", "the damage is older than the manifest"


def test_check_manifest_names_what_is_wrong(source, w8a8):
    write_manifest(w8a8)
    whole = (w8a8 / "model.safetensors").read_bytes()
    changes = {
        DOWN: lambda t: flip_lowest_bit(t, DOWN),
        "model.norm.weight": lambda t: t.pop("model.norm.weight"),
        "model.x.weight": lambda t: t.update({"model.x.weight": torch.zeros(2)}),
    }
    for name, change in changes.items():
        rewrite(w8a8, change)
        (check,) = check_manifest(w8a8)
        assert (check.outcome, check.module, check.layer) == ("fail", name.rpartition(".")[0], "files")
        assert name in check.detail
        (w8a8 / "model.safetensors").write_bytes(whole)
    tokenizer = (w8a8 / "tokenizer.json").read_text()
    (w8a8 / "tokenizer.json").write_text(tokenizer + " ")
    assert "tokenizer.json" in check_manifest(w8a8)[0].detail
    (w8a8 / "tokenizer.json").write_text(tokenizer)
    (w8a8 / "more").write_text("")
    assert "more" in check_manifest(w8a8)[0].detail
    (w8a8 / "more").unlink()
    manifest = json.loads((w8a8 / "manifest.json").read_text())
    (w8a8 / "manifest.json").write_text(json.dumps({**manifest, "parent": "another"}))
    assert "manifest.json does not match" in check_manifest(w8a8)[0].detail
    (w8a8 / "manifest.json").unlink()
    assert "no manifest.json" in check_manifest(w8a8)[0].detail
