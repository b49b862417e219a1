"""Calibration, balancing, rounding: against what hooks see, the unbalanced function, and by their purpose."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from isthmus.errors import DamagedFile, IsthmusError
from isthmus.formats import get_format
from isthmus.formats.calibration.balance import balance, find_balance
from isthmus.formats.calibration.calibrate import calibrate
from isthmus.formats.calibration.kept import KeptTensors
from isthmus.formats.calibration.rounding import gptq_round, round_with_calibration, sample_inputs
from isthmus.formats.files.basis import BALANCE, ROUNDING, Conversion, read_conversion
from isthmus.formats.parts import pieces
from isthmus.formats.parts.int8 import quantise_rows
from isthmus.formats.parts.pieces import streamed
from isthmus.formats.parts.ranges import Calibration
from isthmus.model.model import Model, causal_mask
from isthmus.recipe.architecture import ModelSection
from tests.support.drawn import architectures, dense_architectures
from tests.support.plain import mtp_logits
from tests.support.small import architecture, tiny_architecture
from tests.support.small_dense import dense_architecture

EXAMPLES = settings(max_examples=25, derandomize=True, deadline=None, database=None)


def outlier_state(arch: ModelSection, seed: int) -> dict[str, Tensor]:
    """Norm gains and rows with a few channels that are much larger than the others, as in trained models."""
    generator = torch.Generator().manual_seed(seed)
    state = {name: tensor.clone() for name, tensor in Model(arch).initialise(seed).state_dict().items()}
    for name, tensor in state.items():
        if "norm" in name:
            tensor *= torch.where(torch.rand(tensor.shape, generator=generator) < 0.1, 20.0, 1.0)
        elif name.endswith("bias"):
            tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
    return state


def build(state: dict[str, Tensor], arch: ModelSection) -> Model:
    return get_format("fp32").build(arch, get_format("fp32").export(state, arch))


def sequences(arch: ModelSection, count: int = 6, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(arch.vocab_size, (count, 14), generator=generator).tolist()


@torch.no_grad()
def outputs(model: Model, tokens: Tensor) -> Tensor:
    hidden = model.hidden(tokens)
    parts = [model.logits(hidden).flatten()]
    if model.mtp_layer is not None:
        positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
        parts.append(mtp_logits(model, hidden, tokens, positions, causal_mask(tokens.shape[1])).flatten())
    return torch.cat(parts)


ANY = st.one_of(architectures(), *map(dense_architectures, ("qwen2", "llama", "qwen3", "mistral", "qwen3_moe")))


@EXAMPLES
@given(arch=ANY, limit=st.sampled_from([None, 0.3]), seed=st.integers(0, 99))
def test_a_balanced_model_computes_the_same_function(arch: ModelSection, limit: float | None, seed: int):
    if "swiglu_limit" in type(arch).model_fields:
        arch = arch.model_copy(update={"swiglu_limit": limit})
    state = outlier_state(arch, seed)
    calibration = calibrate(build(state, arch), sequences(arch))
    balanced = balance(state, arch, calibration)
    changed = [name for name in state if not torch.equal(state[name], balanced[name])]
    assert any(name.endswith("input_layernorm.weight") for name in changed)
    assert not any("embed" in name or "lm_head" in name for name in changed)
    tokens = torch.tensor(sequences(arch, seed=seed + 1))
    wanted, found = outputs(build(state, arch), tokens), outputs(build(balanced, arch), tokens)
    assert torch.equal(found, wanted), "factors are powers of two, so no product and no sum is rounded differently"


@settings(EXAMPLES, max_examples=8)
@given(arch=ANY, seed=st.integers(0, 99))
def test_what_was_seen_of_the_balanced_model_follows_from_the_plain_one(arch: ModelSection, seed: int):
    state = outlier_state(arch, seed)
    plain = calibrate(build(state, arch), sequences(arch), gram=True)
    found = find_balance(state, arch, plain)
    again = calibrate(build(dict(found.state(state)), arch), sequences(arch), gram=True)
    known = found.calibration(plain)
    for name in ("low", "high", "gram"):
        mine, wanted = getattr(known, name), getattr(again, name)
        assert mine.keys() == wanted.keys()
        assert all(torch.equal(mine[path], wanted[path]) for path in wanted if path not in plain.unseen)
    assert (known.tokens, known.unseen) == (again.tokens, again.unseen)


def test_moments_of_the_balanced_model_are_read_one_at_a_time():
    asked: list[str] = []

    class Noted(dict[str, Tensor]):
        def __getitem__(self, path: str) -> Tensor:
            asked.append(path)
            return super().__getitem__(path)

    arch = dense_architecture("qwen2")
    state = outlier_state(arch, 0)
    plain = calibrate(build(state, arch), sequences(arch), gram=True)
    known = find_balance(state, arch, plain).calibration(replace(plain, gram=Noted(plain.gram)))
    assert not asked and len(known.gram) == len(plain.gram)
    path = "model.layers.0.mlp.down_proj"
    assert not torch.equal(known.gram[path], plain.gram[path]), "its inputs are balanced"
    assert asked == [path]


@pytest.mark.parametrize("arch", [dense_architecture("qwen2"), tiny_architecture(vocab_size=61, q_lora_rank=14)])
def test_the_change_of_basis_comes_back_from_the_file(tmp_path, arch: ModelSection):
    state, folder = outlier_state(arch, 0), tmp_path
    calibration = calibrate(build(state, arch), sequences(arch), gram=True)
    made = Conversion(find_balance(state, arch, calibration), {"a": torch.ones(2, 3), "b": torch.ones(2, 3)})
    for name, content in made.files().items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    found = read_conversion(folder)
    for name, tensor in state.items():
        assert torch.equal(found.balance.apply(name, tensor), made.balance.apply(name, tensor))
    assert found.inputs.keys() == {"a", "b"} and torch.equal(found.inputs["b"], torch.ones(2, 3))
    assert len(load_file(folder / ROUNDING)) == 1, "what modules share is stored once"
    assert not list(folder.glob("*.safetensors")), "engines would take these for weights"


def test_a_conversion_that_cannot_be_read_is_said(tmp_path):
    assert not read_conversion(tmp_path).balance and not read_conversion(tmp_path).inputs
    (tmp_path / "conversion").mkdir()
    save_file(
        {"a": torch.full((4,), 99, dtype=torch.int8)}, tmp_path / BALANCE, {"rows": "{}", "columns": '{"w": "a"}'}
    )
    with pytest.raises(DamagedFile, match="no factors that balancing makes"):
        read_conversion(tmp_path)
    (tmp_path / BALANCE).write_bytes(b"no")
    with pytest.raises(DamagedFile, match="cannot be read"):
        read_conversion(tmp_path)
    (tmp_path / BALANCE).unlink()
    (tmp_path / "conversion.json").write_text('{"balance_alpha": 0.5}')
    with pytest.raises(DamagedFile, match=r"has no conversion/balance\.safetensors"):
        read_conversion(tmp_path)


def mean_kl(state: dict[str, Tensor], stored: dict[str, Tensor], arch: ModelSection) -> float:
    tokens = torch.tensor(sequences(arch, 8, seed=9))
    with torch.no_grad():
        p = build(state, arch)(tokens).double().log_softmax(-1)
        q = get_format("w8a8").build(arch, stored)(tokens).double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


def test_balancing_lowers_what_int8_costs():
    arch = architecture(vocab_size=97, q_lora_rank=20, initializer_range=0.12)
    plain = balanced_kl = 0.0
    for seed in range(3):
        state = outlier_state(arch, seed)
        calibration = calibrate(build(state, arch), sequences(arch, 32))
        plain += mean_kl(state, get_format("w8a8").export(state, arch), arch)
        balanced_kl += mean_kl(state, get_format("w8a8").export(balance(state, arch, calibration), arch), arch)
    assert balanced_kl < 0.6 * plain


def test_rounding_keeps_format_and_scales_and_lowers_the_error_of_the_products():
    arch = architecture(vocab_size=97, q_lora_rank=20, initializer_range=0.12)
    state = outlier_state(arch, 0)
    calibration = calibrate(build(state, arch), sequences(arch, 32), gram=True)
    plain = get_format("w8a8").export(state, arch)
    stored = dict(plain)
    names = round_with_calibration(stored, state, calibration)
    assert names == [name for name in plain if plain[name].dtype == torch.int8] and stored.keys() == plain.keys()
    before = after = 0.0
    for name in names:
        gram, scale = calibration.gram[name.removesuffix(".weight")].double(), plain[f"{name}_scale"].double()
        for values, one in ((plain[name], 0), (stored[name], 1)):
            error = values.double() * scale - state[name].double()
            lost = (error @ gram * error).sum().item()
            before, after = (before + lost, after) if one == 0 else (before, after + lost)
    assert after < 0.7 * before


@pytest.mark.parametrize("seed", range(6))
def test_rounding_to_the_inputs_loses_less_of_the_output(seed):
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(40, 40, generator=generator)
    x = torch.randn(500, 40, generator=generator) @ mixed
    weight = torch.randn(16, 40, generator=generator)
    nearest, scale = quantise_rows(weight)
    values = gptq_round(weight, scale, x.T @ x / len(x))
    assert values.dtype == torch.int8 and values.abs().max() <= 127

    def lost(q: Tensor) -> float:
        return (x @ (q * scale - weight).T).norm().item()

    assert lost(values.float()) < 0.8 * lost(nearest)


@pytest.mark.parametrize("seed", range(6))
def test_no_row_loses_more_of_the_output_than_rounding_to_the_nearest(seed):
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(24, 24, generator=generator) * torch.logspace(0, 3, 24)
    weight = torch.randn(400, 24, generator=generator)
    gram = (mixed @ mixed.T).double()
    nearest, scale = quantise_rows(weight)
    values = gptq_round(weight, scale, gram)

    def lost(q: Tensor) -> Tensor:
        error = q.double() * scale - weight
        return (error @ gram * error).sum(1)

    assert bool((lost(values) <= lost(nearest) * (1 + 1e-9)).all())


@pytest.mark.parametrize("seed", range(4))
def test_sampled_inputs_have_the_moments_of_the_gram(seed):
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(12, 12, generator=generator)
    gram, error = mixed @ mixed.T, torch.randn(3000, 12, generator=generator)
    found = (error @ sample_inputs(gram).T).square().sum(1).mean()
    assert found == pytest.approx(float((error @ gram * error).sum(1).mean()), rel=0.6)
    assert torch.equal(sample_inputs(gram), sample_inputs(gram.clone()))


def test_inputs_that_do_not_hang_together_are_rounded_to_the_nearest():
    weight = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    nearest, scale = quantise_rows(weight)
    assert torch.equal(gptq_round(weight, scale, torch.eye(12)).float(), nearest)


def test_ranges_and_moments_are_those_of_the_inputs():
    arch = tiny_architecture(vocab_size=61)
    model = build(outlier_state(arch, 1), arch)
    text, seen = sequences(arch, 5), {}
    calibration = calibrate(model, text, gram=True)
    path = "model.layers.0.self_attn.o_proj"
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _m, inputs: seen.setdefault("x", inputs[0]))
    model(torch.tensor(text))
    handle.remove()
    x = seen["x"].flatten(0, 1)
    torch.testing.assert_close(calibration.low[path], x.amin(0))
    torch.testing.assert_close(calibration.high[path], x.amax(0))
    torch.testing.assert_close(calibration.gram[path], x.T @ x / len(x), rtol=1e-4, atol=1e-4)
    assert calibration.tokens == 5 * 14
    linears = {name.removesuffix(".weight") for name in get_format("w8a8").export(model.state_dict(), arch)}
    quantised = {name.removesuffix("_scale").removesuffix(".weight") for name in linears if name.endswith("_scale")}
    assert quantised <= calibration.high.keys(), "every module that int8 replaces has a range"


def test_an_expert_that_no_token_reached_takes_the_range_of_its_layer_and_is_named():
    arch = tiny_architecture(vocab_size=61, n_routed_experts=4, num_experts_per_tok=1)
    state = outlier_state(arch, 1)
    state["model.layers.1.mlp.gate.e_score_correction_bias"] = torch.tensor([0.0, 0.0, 0.0, -9.0])
    calibration = calibrate(build(state, arch), sequences(arch))
    path = "model.layers.1.mlp.experts.3.down_proj"
    assert path in calibration.unseen
    others = [calibration.high[f"model.layers.1.mlp.experts.{i}.down_proj"] for i in range(3)]
    assert torch.equal(calibration.high[path], torch.stack(others).amax(0))


def test_no_text_is_no_calibration():
    arch = tiny_architecture()
    with pytest.raises(IsthmusError, match="needs text"):
        calibrate(build(outlier_state(arch, 0), arch), [])
    state = outlier_state(arch, 0)
    with pytest.raises(IsthmusError, match="gram=True"):
        round_with_calibration({}, state, calibrate(build(state, arch), sequences(arch)))


def test_rounding_refuses_a_format_that_stores_sums_of_its_integers():
    stored = {"a.weight": torch.zeros(2, 2, dtype=torch.int8), "a.weight_scale": torch.ones(2, 1)}
    stored["a.quant_bias"] = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(IsthmusError, match="quant_bias"):
        round_with_calibration(stored, {"a.weight": torch.ones(2, 2)}, Calibration({}, {}, {"a": torch.eye(2)}))


@pytest.mark.parametrize("lent", [False, True])
def test_a_model_in_pieces_is_calibrated_like_a_whole_one(lent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    arch = architecture(n_routed_experts=32, topk_group=1)
    state, texts = outlier_state(arch, 3), [*sequences(arch, 9), [1, 2, 3], [4, 5, 6]]
    whole = calibrate(build(state, arch), texts, gram=True)
    monkeypatch.setattr(pieces, "WHOLE_EXPERTS", 0 if lent else pieces.WHOLE_EXPERTS)
    found = calibrate(streamed(arch, state, get_format("fp32").build), texts, gram=True)
    assert found.unseen and (found.unseen, found.tokens) == (whole.unseen, whole.tokens)
    for one, other in ((found.low, whole.low), (found.high, whole.high), (found.gram, whole.gram)):
        assert set(one) == set(other) and all(torch.equal(one[path], other[path]) for path in other)


@pytest.mark.parametrize("in_memory", [0, 1 << 20])
def test_kept_tensors_come_back_as_they_were_put_away(in_memory: int) -> None:
    kept = KeptTensors(in_memory)
    given = {"a": torch.randn(3, 4), "b": torch.arange(7), "c": torch.randn(2, 2).bfloat16(), "d": torch.empty(0, 3)}
    for name, tensor in given.items():
        kept[name] = tensor
    kept["a"] = given["a"] = torch.randn(3, 4)
    assert list(kept) == list(given) and all(torch.equal(kept[name], tensor) for name, tensor in given.items())
    kept["b"].zero_()
    assert torch.equal(kept["b"], given["b"])
    with pytest.raises(AssertionError, match="is kept as"):
        kept["a"] = torch.zeros(2)
