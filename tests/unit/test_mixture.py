"""Mixtures of types: prices against models quantised by hand, the order against all mixtures there are, the budget."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isthmus.errors import IsthmusError
from isthmus.formats import DESCRIPTION, get_format
from isthmus.formats.files.bundle import CONVERSION, read_bundle
from isthmus.formats.mixing.mixture import Priced, Unit, choose_mixture, order_steps, units_of
from isthmus.formats.modelslim import DYNAMIC, FLOAT, WEIGHTS_ONLY, ModelSlim
from isthmus.model.model import Model
from isthmus.parity.seal import verify_seal
from isthmus.recipe.architecture import ModelSection
from tests.support.small import architecture
from tests.support.small_dense import dense_architecture
from tests.unit.test_convert import calibration_file, checkpoint, convert, invoke, shaken

DENSE = dense_architecture("qwen2", vocab_size=300)
DEEPSEEK = architecture(vocab_size=300, q_lora_rank=14)
KINDS = (DYNAMIC, WEIGHTS_ONLY, FLOAT)
ROWS = torch.randint(300, (3, 50), generator=torch.Generator().manual_seed(0)).tolist()


def mixed() -> ModelSlim:
    chosen = get_format("modelslim_mixed")
    assert isinstance(chosen, ModelSlim)
    return chosen


def in_bf16(arch: ModelSection) -> dict[str, Tensor]:
    """Weights that bf16 holds, as published ones."""
    return {name: tensor.bfloat16().float() for name, tensor in shaken(arch, 1).state_dict().items()}


@torch.no_grad()
def distance(trained: Model, other: Model, rows: list[list[int]]) -> float:
    """Mean KL per token in float64."""
    sums = [
        (p.exp() * (p - q)).sum()
        for row in rows
        for p, q in [[model(torch.tensor([row])).double().log_softmax(-1) for model in (trained, other)]]
    ]
    return float(sum(sums)) / sum(map(len, rows))


def test_units_are_what_servers_run_as_one():
    units = {unit.path: unit for unit in units_of(mixed(), DENSE, KINDS)}
    attention = units["model.layers.1.self_attn.qkv_proj"]
    assert {name.split(".")[-2] for name in attention.weights} == {"q_proj", "k_proj", "v_proj"}
    assert {name.split(".")[-2] for name in units["model.layers.0.mlp.gate_up_proj"].weights} == {
        "gate_proj",
        "up_proj",
    }
    assert attention.kinds == KINDS and attention.size == (40 + 20 + 20) * 40 and len(units) == 2 * 4
    units = {unit.path: unit for unit in units_of(mixed(), DEEPSEEK, KINDS)}
    experts = units["model.layers.1.mlp.experts"]
    assert len(experts.weights) == 3 * DEEPSEEK.n_routed_experts and WEIGHTS_ONLY not in experts.kinds
    assert "model.layers.1.self_attn.fused_qkv_a_proj" in units
    assert max(unit.layer for unit in units.values()) == DEEPSEEK.num_hidden_layers - 1, "not the MTP layer"


@pytest.mark.parametrize("arch", [DENSE, DEEPSEEK], ids=["dense", "experts"])
def test_the_price_of_a_module_is_what_it_costs_alone(arch: ModelSection):
    state = in_bf16(arch)
    found = choose_mixture(state, arch, mixed(), KINDS, ROWS, 100.0)
    assert set(found.kinds) == {DYNAMIC} and found.work < 0.55 * found.work_of_float
    trained = get_format("fp32").build(arch, get_format("fp32").export(state, arch))
    for one in found.priced[::3]:
        for kind in one.unit.kinds[:-1]:
            types = dict.fromkeys(found.types, FLOAT) | dict.fromkeys(one.unit.weights, kind)
            alone = mixed().with_types(types)
            other = alone.build(arch, alone.export(state, arch))
            assert one.kl[kind] == pytest.approx(distance(trained, other, ROWS), rel=2e-2, abs=1e-6)
    whole = mixed().with_types(found.types)
    other = whole.build(arch, whole.export(state, arch))
    assert found.kl == pytest.approx(distance(trained, other, ROWS), rel=1e-3)


PRICES = st.lists(st.tuples(st.integers(1, 9), st.floats(0, 1), st.floats(0, 1), st.booleans()), min_size=1, max_size=4)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(prices=PRICES)
def test_after_every_step_no_other_mixture_costs_less_for_as_much_work(prices):
    priced = []
    for index, (size, kl, share, is_linear) in enumerate(prices):
        unit = Unit(f"model.layers.{index}.x", (), KINDS if is_linear else (DYNAMIC, FLOAT), size)
        priced.append(Priced(unit, {DYNAMIC: kl, WEIGHTS_ONLY: kl * share, FLOAT: 0.0}))

    def cost(kinds) -> tuple[int, float]:
        pairs = list(zip(priced, kinds, strict=True))
        return sum(p.unit.work(kind) for p, kind in pairs), sum(p.kl[kind] for p, kind in pairs)

    every = [cost(kinds) for kinds in itertools.product(*(p.unit.kinds for p in priced))]
    kinds = [p.unit.kinds[0] for p in priced]
    for step in [None, *order_steps(priced)]:
        if step is not None:
            kinds[step.place] = step.kind
        work, kl = cost(kinds)
        assert kl <= min(other for much, other in every if much <= work) + 1e-9
    assert set(kinds) == {FLOAT}


def test_a_budget_is_kept_with_the_least_work_and_sealed(tmp_path: Path):
    checkpoint(tmp_path / "c", shaken(DENSE, 1))
    file = calibration_file(tmp_path)
    works, before = [], None
    trained = read_trained(tmp_path / "c")
    for budget in (1.0, 2e-3, 1e-4):
        said = convert(
            tmp_path / "c", tmp_path / "b", "--format", "modelslim_mixed", "--calibrate", file, "--budget", budget
        )
        told = json.loads((tmp_path / "b" / CONVERSION).read_text())["mixture"]
        bundle = read_bundle(tmp_path / "b")
        measured = distance(trained, bundle.build(), calibration_rows(file))
        assert measured <= budget * 1.001 and told["kl"] == pytest.approx(measured, rel=1e-2, abs=1e-7)
        works.append(told["work_of_bf16"])
        assert "what modules cost alone" in said and "nats/token to the trained model" in said
        types = json.loads((tmp_path / "b" / DESCRIPTION).read_text())
        for one in told["modules"]:
            layer = one["module"].rpartition(".")[0]
            if one["module"].endswith("qkv_proj"):
                assert {types[f"{layer}.{part}_proj.weight"] for part in "qkv"} == {one["type"]}
        assert before is None or works[-1] > before
        before = works[-1]
    assert works[0] == 0.5
    invoke("capture", tmp_path / "b", "--source", tmp_path / "c", "--synthetic", "--max-mb", 1)
    assert "sealed as" in invoke("verify", tmp_path / "b", "--max-mean-kl", 0.5) and verify_seal(tmp_path / "b")


def calibration_rows(file: Path) -> list[list[int]]:
    return [json.loads(line)["tokens"] for line in file.read_text().splitlines()]


def read_trained(folder: Path) -> Model:
    convert(folder, folder.with_name("trained"), "--format", "bf16")
    return read_bundle(folder.with_name("trained")).build()


def test_balanced_mixtures_of_float_and_int8_are_sealed(tmp_path: Path):
    checkpoint(tmp_path / "c", shaken(DEEPSEEK, 1))
    options = ("--format", "modelslim_dynamic", "--calibrate", calibration_file(tmp_path), "--balance")
    convert(tmp_path / "c", tmp_path / "b", *options, "--budget", 1e-3, "--rounding", "gptq")
    types = json.loads((tmp_path / "b" / DESCRIPTION).read_text())
    assert {types[name] for name in types if name.endswith("_proj.weight")} == {FLOAT, DYNAMIC}
    assert read_bundle(tmp_path / "b").format == "modelslim_dynamic"
    invoke("capture", tmp_path / "b", "--source", tmp_path / "c", "--synthetic", "--max-mb", 1)
    assert "sealed as" in invoke("verify", tmp_path / "b", "--max-mean-kl", 0.5)


def test_a_budget_that_bf16_itself_exceeds_is_said(tmp_path: Path):
    checkpoint(tmp_path / "c", shaken(DENSE, 1), torch.float32)
    options = ("--format", "modelslim_dynamic", "--calibrate", calibration_file(tmp_path))
    with pytest.raises(IsthmusError, match=r"every module in bf16 the model is .* nats from the trained one"):
        convert(tmp_path / "c", tmp_path / "b", *options, "--budget", 1e-12)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--format", "w8a8", "--budget", "0.1", "--calibrate", "x"], "w8a8 is none of: use modelslim_dynamic"),
        (["--format", "modelslim_mixed", "--budget", "0.1"], "--budget needs to see what the model computes"),
        (["--for", "sglang", "--budget", "0.1", "--calibrate", "x"], "which sglang does not read"),
        (
            ["--for", "sglang", "--format", "modelslim"],
            "sglang does not read modelslim of a qwen2 model; it",
        ),
        (["--for", "vllm-ascend", "--format", "fp8"], "vllm-ascend does not read fp8"),
        ([], "--format NAME, or who is to read it, --for SERVER"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, arguments, words):
    checkpoint(tmp_path / "c", Model(DENSE).initialise(0))
    with pytest.raises(IsthmusError, match=words):
        convert(tmp_path / "c", tmp_path / "b", *arguments)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("server", "name"), [("vllm-ascend", "modelslim_dynamic"), ("vllm", "w8a8"), ("sglang", "w8a8")]
)
def test_a_server_gets_what_it_reads(tmp_path: Path, server: str, name: str):
    checkpoint(tmp_path / "c", Model(DENSE).initialise(0))
    convert(tmp_path / "c", tmp_path / "b", "--for", server)
    assert read_bundle(tmp_path / "b").format == name


def test_fused_experts_want_dynamic_scales(tmp_path: Path):
    checkpoint(tmp_path / "c", Model(DEEPSEEK).initialise(0))
    with pytest.raises(IsthmusError, match="vllm does not read w8a8_static of a deepseek_v3 model"):
        convert(tmp_path / "c", tmp_path / "b", "--for", "vllm", "--format", "w8a8_static", "--calibrate", "x")
