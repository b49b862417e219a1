"""The static tier: its trace against real runs, exact counts and FSDP2; its join and rules against hand examples."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from isthmus.chips import get_chip
from isthmus.chips.rehearse import Profile, profile_of
from isthmus.chips.rehearse.fused import FusedTables, ShapeRule, fused_tables_of
from isthmus.chips.rehearse.tables import Status
from isthmus.chips.wheel import software_of
from isthmus.cli import cli
from isthmus.errors import IsthmusError
from isthmus.forecast.count import forward_flops, training_flops
from isthmus.formats.parts.assemble import unfilled
from isthmus.model.model import Model
from isthmus.probes.static.check import (
    StaticCoverage,
    amount,
    finding_of,
    held_rules,
    join,
    needs_of,
    sites_of,
    static_coverage,
    static_findings,
)
from isthmus.probes.static.costs import (
    ALL_REDUCE,
    ALL_TO_ALL,
    ATTENTION,
    BACKWARD,
    Call,
    CostRecorder,
    Costs,
)
from isthmus.probes.static.sites import KINDS, Site
from isthmus.probes.static.trace import (
    Layout,
    Options,
    full_rows,
    optimizer_costs,
    serving_costs,
    step_costs,
    training_costs,
)
from isthmus.progress import Watch
from isthmus.recipe.architecture import ModelSection
from isthmus.recipe.schema import Recipe, TrainSection
from isthmus.recipe.steps import OptimizerSection, SftSection
from isthmus.records import Use
from isthmus.tools.coverage import CoverageReport, OperatorTable, as_dictionary, examine, execute, recipe_of, show
from isthmus.trainer.mesh import Ranks
from isthmus.trainer.optimizer import Optimizer
from isthmus.trainer.parallel import distribute, materialise
from isthmus.trainer.parts import initialise
from isthmus.trainer.step import accumulate_gradients
from tests.support.small import architecture, tiny_architecture
from tests.support.small_dense import dense_architecture, qwen3_moe_architecture
from tests.support.traced import record_costs
from tests.support.traffic import Traffic
from tests.support.vendor_wheel import FALLBACK, KERNELS, compile_library, vendor_library, write_wheel
from tests.support.worlds import in_world

CHIP = "ascend-910b-313t"
ADAMW = OptimizerSection(name="adamw", learning_rate=1e-3)
MUON = OptimizerSection(name="muon", learning_rate=1e-3, matrix_learning_rate=1e-2)
ROWS, LENGTH = 2, 24
MODELS: dict[str, ModelSection] = {
    "mixture": architecture(v_head_dim=20),
    "dense": dense_architecture(),
    "qwen3": dense_architecture("qwen3", head_dim=12),
    "mistral": dense_architecture("mistral", sliding_window=LENGTH),
    "qwen3_moe": qwen3_moe_architecture(mlp_only_layers=[0]),
}
"""Values as wide as keys, so that nothing is filled up in front of attention."""


def on_meta(model: ModelSection) -> Model:
    with torch.device("meta"):
        return Model(model)


def sft(optimizer: OptimizerSection = ADAMW) -> SftSection:
    return SftSection(name="taught", kind="sft", steps=1, optimizer=optimizer)


def recipe_with(model: ModelSection, **changes: Any) -> Recipe:
    """A recipe around an architecture, which a preset's place takes."""
    base = recipe_of("r-nano", CHIP, None, ())
    return base.model_copy(update={"model": model, **changes})


@pytest.mark.parametrize("name", MODELS)
def test_forward_flops_are_those_of_the_exact_counts(name: str):
    model, tokens = on_meta(MODELS[name]), torch.zeros(ROWS, LENGTH, dtype=torch.long, device="meta")
    costs = record_costs(lambda: model(tokens))
    assert costs.flops == ROWS * LENGTH * forward_flops(MODELS[name], LENGTH)


def meta_step(model: ModelSection, rows: int = ROWS, length: int = LENGTH, **options: Any) -> Costs:
    batch = full_rows(rows, length)
    return step_costs(on_meta(model), batch, sft(), CostRecorder(), every_layer=False, **options)


@pytest.mark.parametrize("name", MODELS)
def test_a_steps_flops_are_three_forward_passes(name: str):
    """Less what the output head does not see: the last position of a row, two of multi-token prediction."""
    a = MODELS[name]
    unseen = 1 + (2 if a.num_nextn_predict_layers else 0)
    expected = LENGTH * training_flops(a, LENGTH) - 6 * unseen * a.hidden_size * a.vocab_size
    assert meta_step(a).flops == ROWS * expected


@pytest.mark.parametrize("name", MODELS)
def test_a_step_on_the_meta_device_issues_what_a_real_step_issues(name: str):
    """On rows that are long enough for one kernel of attention on either device; torch's own counter sees as many
    operations. A real router gives each expert another share, which changes sizes alone."""
    model, length = MODELS[name].model_copy(update={"max_position_embeddings": 300}), 280
    real, batch = Model(model).initialise(0), full_rows(ROWS, length)
    with FlopCounterMode(display=False) as counter:
        found = step_costs(real, batch, sft(), CostRecorder("cpu"), every_layer=True)
    traced = meta_step(model, length=length)
    assert traced.operators() == found.operators()
    assert {call.dtypes for call in traced.calls} == {call.dtypes for call in found.calls}
    assert traced.flops == found.flops == counter.get_total_flops()


@pytest.mark.parametrize(
    ("model", "optimizer", "recompute"),
    [
        (architecture(num_hidden_layers=6, first_k_dense_replace=2), MUON, True),
        (architecture(num_hidden_layers=4, first_k_dense_replace=0, num_nextn_predict_layers=0), ADAMW, False),
        (dense_architecture(num_hidden_layers=4), MUON, False),
    ],
    ids=["mixture", "all sparse", "dense"],
)
def test_layers_that_are_multiplied_cost_what_all_of_them_cost(
    model: ModelSection, optimizer: OptimizerSection, recompute: bool
):
    expert = 2 if hasattr(model, "n_routed_experts") else 1
    section = TrainSection(expert=expert, activation_checkpointing=recompute)
    recipe = recipe_with(model, step=[sft(optimizer)], train=section)
    layout = Layout.of(model, section, 4)
    few, all_layers = (training_costs(recipe, layout, Options(every_layer=every)) for every in (False, True))
    for part in few:
        assert few[part].calls == all_layers[part].calls, part
        assert few[part].collectives == all_layers[part].collectives, part
    served, all_served = (serving_costs(recipe, Options(every_layer=every)) for every in (False, True))
    assert served["prefill"].calls == all_served["prefill"].calls
    assert served["decode"].calls == all_served["decode"].calls


def test_more_layers_cost_more():
    """So that the comparison above compares something."""
    shallow, deep = (meta_step(architecture(num_hidden_layers=n)) for n in (2, 6))
    assert deep.operators()["aten::mm"] > 2 * shallow.operators()["aten::mm"]


LAYOUTS = ({"expert": 2}, {"expert": 2, "replicate": 2})
WORLD = 4


def sharded_steps(rank: int) -> list[list[tuple[str, int, float]]]:
    return [sharded_step(rank, WORLD, options) for options in LAYOUTS]


def sharded_step(rank: int, world: int, options: dict[str, int]) -> list[tuple[str, int, float]]:
    """The collectives of a real step of FSDP2 in bf16 over gloo, with those of losses and of the norm left out."""
    section = TrainSection(**options)  # pyright: ignore[reportArgumentType]
    ranks = Ranks(rank, world, torch.device("cpu"), grouped=True)
    model = unfilled(tiny_architecture())
    distribute(model, ranks, section, torch.bfloat16)
    materialise(model, ranks.device)
    initialise(model, 0)
    optimizer = Optimizer(model, ADAMW, 1, ranks, section.replicate)
    with Traffic() as traffic:
        accumulate_gradients(model, optimizer, full_rows(1, 16), sft(), ranks)
    small = [one for one in traffic.collectives if one.kind == ALL_REDUCE and one.ranks == world and one.payload < 600]
    return [(one.kind, one.ranks, one.sent) for one in traffic.collectives if one not in small]


@pytest.mark.long
def test_the_collectives_of_a_layout_are_those_that_fsdp2_issues():
    """What a rank of a real world sends, by kind and size of group; the real router decides what goes to whom."""
    for options, found in zip(LAYOUTS, in_world(WORLD, sharded_steps)[0], strict=True):
        section = TrainSection(**options)  # pyright: ignore[reportArgumentType]
        recipe = recipe_with(tiny_architecture(), train=section, step=[sft()])
        costs = training_costs(recipe, Layout.of(recipe.model, section, WORLD), Options())
        expected: Counter[tuple[str, int, float]] = Counter()
        for one, count in (costs["model"] + costs["sharding"]).collectives.items():
            expected[one.kind, one.ranks, one.sent] += count
        assert _but_exchanges(expected) == _but_exchanges(Counter(found)), options
        assert sum(expected.values()) == len(found)


def _but_exchanges(sent: Counter[tuple[str, int, float]]) -> dict[tuple[str, int, float], int]:
    return {key: count for key, count in sent.items() if key[0] != ALL_TO_ALL}


def test_the_optimizer_updates_the_shard_of_a_rank():
    """AdamW reads parameter, gradient and two moments and writes three of them: 28 bytes per number that a rank has."""
    a = tiny_architecture()
    whole = sum(parameter.numel() for parameter in on_meta(a).parameters())
    for ranks in (1, 2, 4):
        costs = optimizer_costs(a, sft(ADAMW), Layout(ranks=ranks), every_part=False)
        (update,) = [call for call in costs.calls if call.operator == "aten::_fused_adamw_"]
        assert update.bytes >= 28 * whole / ranks
        assert update.bytes <= 32 * whole / ranks + 4096


TWO = Costs(
    Counter(
        {
            Call("aten::mm", ("bfloat16",), ((8, 8),), 3 * 10**12, 10): 2,
            Call("aten::add.Tensor", ("bfloat16",), ((8, 8),), 0, 4 * 10**9): 1,
        }
    )
)
"""By hand at 300 TFLOPS and 1,000 GB/s: 2 x 10 ms for the products, 4 ms for the addition."""


def with_statuses(profile: Profile, **statuses: Status) -> Profile:
    changed = {
        name: dataclasses.replace(row, status=statuses.get(name.removeprefix("aten::").replace(".", "_"), row.status))
        for name, row in profile.operators.items()
    }
    return dataclasses.replace(profile, operators=MappingProxyType(changed))


def chip_with(tflops: float | None, gbs: float | None):
    chip = get_chip(CHIP)
    assert chip.bf16_tflops and chip.mem_bw_gbs
    peak = None if tflops is None else chip.bf16_tflops.model_copy(update={"value": tflops})
    bandwidth = None if gbs is None else chip.mem_bw_gbs.model_copy(update={"value": gbs})
    return dataclasses.replace(chip, bf16_tflops=peak, mem_bw_gbs=bandwidth)


def test_shares_of_time_by_hand():
    found = join("training", "two operators", TWO, chip_with(300.0, 1000.0), profile_of(CHIP))
    assert found.seconds == pytest.approx(0.024)
    assert [(row.operator, round(row.shares["time"], 6)) for row in found.rows] == [
        ("aten::mm", round(20 / 24, 6)),
        ("aten::add.Tensor", round(4 / 24, 6)),
    ]
    assert found.headline() == "100.0% of the time native"
    assert found.rows[0].unrepeatable and not found.rows[1].unrepeatable


def test_a_planted_fallback_and_a_planted_gap_change_the_shares():
    chip, profile = chip_with(300.0, 1000.0), profile_of(CHIP)
    slow = join("training", "two operators", TWO, chip, with_statuses(profile, add_Tensor="fallback"))
    assert slow.share("fallback") == pytest.approx(4 / 24)
    assert "16.7% in operators that fall back" in slow.headline()
    assert finding_of(slow).outcome == "fail" and not slow.impossible
    gap = join("training", "two operators", TWO, chip, with_statuses(profile, mm="none"))
    assert gap.share("none") == pytest.approx(20 / 24)
    assert gap.impossible == ["aten::mm is missing"]
    served = finding_of(join("serving", "two operators", TWO, chip, with_statuses(profile, add_Tensor="fallback")))
    assert served.outcome == "pass" and "on the host's CPU, silently: aten::add.Tensor" in served.detail


def test_without_a_peak_there_are_no_shares_of_time():
    found = join("training", "two operators", TWO, chip_with(None, 1000.0), profile_of(CHIP))
    assert found.basis == "flops" and found.seconds is None
    assert "time" not in found.rows[0].shares
    assert found.rows[0].shares["flops"] == 1.0
    assert found.rows[1].shares["bytes"] == pytest.approx(1.0)
    assert any("no shares of time" in source for source in found.sources)


def test_without_a_peak_arithmetic_comes_first_and_then_bytes():
    """Most of a step's operators do no arithmetic that torch counts: their order, and what is lost, is in the bytes."""
    sizes = {"aten::cat": 10, "aten::add.Tensor": 40, "aten::mul.Tensor": 30, "aten::bmm": 20}
    calls = {Call(name, ("bfloat16",), ((8,),), 10**9 * (name == "aten::bmm"), size): 1 for name, size in sizes.items()}
    profile = with_statuses(profile_of(CHIP), mul_Tensor="fallback")
    found = join("training", "four operators", Costs(Counter(calls)), chip_with(None, 1000.0), profile)
    assert [row.operator.removeprefix("aten::") for row in found.rows] == ["bmm", "add.Tensor", "mul.Tensor", "cat"]
    assert found.headline() == (
        "100.0% of the arithmetic and 70.0% of the bytes moved native; 0.0% and 30.0% in operators that fall back"
    )
    figures = finding_of(found).figures
    assert figures["fallback_operators"].value == 1 and figures["fallback_share"].value == 0
    assert figures["fallback_share_of_bytes"].value == pytest.approx(30.0)
    assert [line.split() for line in shown(found, 80).splitlines() if line.startswith("aten::add")] == [
        ["aten::add.Tensor", "native", "0.00", "40.00", "1"]
    ]


def shown(what: StaticCoverage | CoverageReport, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    if isinstance(what, CoverageReport):
        show(what, console)
    else:
        console.print(OperatorTable(what))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def reports() -> dict[str, CoverageReport]:
    """A chip with fused operators and rules, one with neither, and one whose peak nobody published."""
    return {
        chip: execute("r-nano", Watch(quiet=True), chip=chip, ranks=4, as_json=True, overrides=("train.expert=2",))
        for chip in (CHIP, "h20", "mi308x")
    }


@pytest.mark.parametrize("width", [40, 80, 100, 200])
def test_names_of_operators_are_never_broken(reports: dict[str, CoverageReport], width: int):
    """Every word that begins as an operator does is one."""
    for report in reports.values():
        text = shown(report, width)
        names = {row.operator for use in report.uses for row in use.rows} | {"aten::_fused_adamw_"}
        words = {word.strip(",") for word in text.split() if word.startswith("aten::")}
        assert words <= {name.split(" ")[0] for name in names}
        assert {row.operator.split(" ")[0] for use in report.uses for row in use.rows[:12]} <= words
        assert max(map(len, text.splitlines())) <= max(width, 80)
        assert ("dtypes" in text.split()) == (width >= 100)


def test_what_there_is_nothing_to_say_about_is_left_out(reports: dict[str, CoverageReport]):
    bare, ruled = shown(reports["h20"], 100), shown(reports[CHIP], 100)
    assert "documented rules" not in bare and "no table of fused operators of H20" in bare
    assert not re.search(r"\b0 more operators", bare + ruled)
    count, kept = (len([one for one in reports[CHIP].rules if one.holds >= held]) for held in (False, True))
    assert f"documented rules on shapes: {kept} of {count} are kept, not these" in ruled and kept < count
    assert "npu::npu_moe_gating_top_k wants experts_per_group > 2 (here 2)" in ruled
    listed = " ".join(ruled.split())
    assert listed.count("not deterministic by default aten::") == 3, "told once of all operators of a use"


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (1.83e12, "B", "1.83 TB"),
        (41.3e9, "B", "41.3 GB"),
        (119_000, "B", "119 kB"),
        (6, "B", "6.00 B"),
        (9.34, "s", "9.34 s"),
        (0.159, "s", "159 ms"),
        (4.76e-6, "s", "4.76 us"),
        (1234, "s", "1,234 s"),
    ],
)
def test_amounts_by_hand(value: float, unit: str, text: str):
    assert amount(value, unit) == text


def test_a_refused_dtype_makes_a_use_impossible():
    call = Call("aten::add.Tensor", ("float64",), ((4,),), 0, 96)
    found = join("training", "one operator", Costs(Counter({call: 1})), get_chip(CHIP), profile_of(CHIP))
    assert found.impossible == ["float64 is refused (aten::add.Tensor)"]
    assert found.rows[0].refused == ("float64",)


def test_bytes_by_hand():
    """Inputs once, outputs once; in place both; views nothing; of a table the rows that are taken."""
    x, y = torch.ones(4, 8), torch.ones(4, 8)
    table, index = torch.ones(100, 8), torch.tensor([1, 2, 3])

    def moved(work: Any) -> int:
        return record_costs(work, "cpu").bytes

    assert moved(lambda: x + y) == 3 * 128
    assert moved(lambda: x.add_(y)) == 3 * 128
    assert moved(lambda: x.copy_(y)) == 2 * 128
    assert moved(lambda: x.t()) == 0
    assert moved(lambda: x.expand(2, 4, 8)) == 0
    assert moved(lambda: torch.empty(4, 8)) == 0
    assert moved(lambda: table.index_select(0, index)) == 2 * 96 + 24
    assert moved(lambda: table.index_copy_(0, index, torch.ones(3, 8))) == 96 + (3 * 96 + 24)
    assert moved(lambda: torch.ones(1, 8).expand(4, 8) + y) == 32 + (32 + 2 * 128)


def test_whole_attention_counts_what_its_parts_count_forward():
    query = torch.zeros(2, 3, 16, 8, device="meta", requires_grad=True)

    def attend() -> None:
        torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True).sum().backward()

    whole, parts = record_costs(attend, whole_attention=ATTENTION), record_costs(attend)
    assert whole.operators()[ATTENTION] == whole.operators()[ATTENTION + BACKWARD] == 1
    forward = [call.flops for call in whole.calls if call.operator == ATTENTION]
    assert forward == [2 * 2 * (2 * 3 * 16 * 16 * 8)]
    assert parts.flops == 3 * forward[0]
    assert not whole.operators()["aten::bmm"] and parts.operators()["aten::bmm"]


def rule(text: str, quantity: str = "size", where: str = "") -> ShapeRule:
    return ShapeRule("op", "both", ("router",), where, "x", quantity, text, "", "documented", "hand")


@pytest.mark.parametrize(
    ("text", "size", "holds"),
    [
        ("<= 768", 768, True),
        ("<= 768", 769, False),
        ("< 896", 896, False),
        (">= 1", 1, True),
        ("> 2", 2, False),
        ("== 64", 64, True),
        ("== 64", 128, False),
        ("multiple_of 16", 192, True),
        ("multiple_of 16", 200, False),
        ("multiple_of other", 24, True),
        ("divides other", 4, True),
        ("divides other", 5, False),
        ("<= other", 9, False),
        ("one_of 1 2 4", 4, True),
        ("one_of 1 2 4", 3, False),
    ],
)
def test_rules_by_hand(text: str, size: int, holds: bool):
    assert rule(text).holds({"size": size, "other": 8}) is holds


def test_a_rule_with_a_condition_is_about_what_keeps_to_it():
    one = rule("one_of 1 2", where="other == 8")
    assert one.holds({"size": 3, "other": 8}) is False
    assert one.holds({"size": 3, "other": 9}) is None
    assert one.is_about("router", "serving") and not one.is_about("attention", "serving")
    training = dataclasses.replace(one, use="training")
    assert training.is_about("router", "training") and not training.is_about("router", "serving")


def traced(recipe: Recipe, ranks: int = 1, chip: str = CHIP) -> list[StaticCoverage]:
    recipe = recipe.model_copy(update={"train": TrainSection(expert=min(ranks, 64))})
    layout = Layout.of(recipe.model, recipe.train, ranks)
    return static_coverage(recipe, get_chip(chip), profile_of(chip), layout)


def needs(preset: str, use: Any, ranks: int = 1, chip: str = CHIP, **model: Any):
    recipe = recipe_of(preset, chip, ranks, tuple(f"model.{key}={value}" for key, value in model.items()))
    return needs_in(traced(recipe, ranks, chip), use, chip)


def needs_in(found: list[StaticCoverage], use: Any, chip: str = CHIP):
    return {one.need: one for one in needs_of(sites_of(found, use), get_chip(chip), profile_of(chip), use)}


def test_what_the_vendor_made_for_deepseek_v3_takes_deepseek_v3():
    """Kernels whose rules name this model's sizes must take it, and what has no backward must not train it."""
    found = traced(recipe_of("deepseek-v3", CHIP, 64, ()), 64)
    training, serving = needs_in(found, "training"), needs_in(found, "serving")
    assert all(not need.broken for need in serving.values())
    assert training["attention"].usable[0].operator == "npu::npu_fusion_attention"
    assert not training["grouped matmul"].usable and training["grouped matmul"].unusable
    assert not training["gating"].usable
    assert "W8A8" not in training and "cross entropy" not in serving
    assert serving["dispatch and combine"].usable


@pytest.mark.parametrize(
    ("change", "operator"),
    [
        ({"qk_rope_head_dim": 128}, "npu::npu_interleave_rope"),
        ({"q_lora_rank": 1024}, "npu::npu_mla_prolog_v2"),
        ({"kv_lora_rank": 256}, "npu::npu_fused_infer_attention_score"),
        ({"num_attention_heads": 96}, "npu::npu_mla_prolog_v2"),
        ({"num_experts_per_tok": 17}, "npu::npu_moe_distribute_dispatch_v2"),
        ({"hidden_size": 7200 - 16}, "npu::npu_moe_distribute_dispatch_v2"),
    ],
    ids=str,
)
def test_a_model_that_breaks_a_rule_does_without_the_kernel(change: dict[str, int], operator: str):
    found = needs("deepseek-v3", "serving", 64, **change)
    (broken,) = [need for need in found.values() if operator in need.broken]
    assert operator not in [one.operator for one in broken.usable]


MIXTURE = tiny_architecture(num_attention_heads=6, q_lora_rank=20)
GROUPED = dense_architecture(num_attention_heads=28, num_key_value_heads=4, hidden_size=112)
RULES = [rule for chip in (CHIP, "ascend-910c-752t") for rule in fused_tables_of(chip).rules]


@pytest.fixture(scope="module")
def met() -> dict[str, dict[Use, tuple[Site, ...]]]:
    """The sites that the traces of a mixture with latent attention and of a grouped-query model met, by use."""
    traces = {"mixture": traced(recipe_with(MIXTURE), 2), "grouped": traced(recipe_with(GROUPED))}
    uses: tuple[Use, ...] = ("training", "serving")
    return {name: {use: sites_of(found, use) for use in uses} for name, found in traces.items()}


def sizes(sites: tuple[Site, ...], kind: str) -> list[dict[str, float]]:
    return [dict(site.sizes) for site in sites if site.kind == kind]


def test_sites_have_the_sizes_of_the_tensors_that_pass_them(met: Any):
    a, mixture, grouped = MIXTURE, met["mixture"], met["grouped"]
    latent = {"query_heads": 6, "latent_dim": a.kv_lora_rank, "rope_dim": a.qk_rope_head_dim}
    assert sizes(mixture["serving"], "latent attention") == [latent]
    (router,) = sizes(mixture["training"], "router")
    assert (router["experts"], router["experts_per_token"]) == (a.n_routed_experts, a.num_experts_per_tok)
    (exchange,) = sizes(mixture["serving"], "exchange of tokens")
    assert (exchange["ranks"], exchange["tokens"]) == (2, recipe_with(a).serve.max_batch)
    assert {one["query_heads"] for one in sizes(mixture["training"], "attention")} == {6}
    found = sizes(grouped["serving"], "attention")
    heads = {"query_heads": 28, "key_heads": 4, "query_groups": 7, "head_dim": 4, "value_dim": 4}
    assert found == [{**heads, "tokens": one["tokens"]} for one in found] and found
    assert {one["rope_dim"] for one in sizes(grouped["serving"], "rotation of halves")} == {4}


def test_a_model_has_no_sites_of_what_it_does_not_have(met: Any):
    kinds = {name: {site.kind for use in uses.values() for site in use} for name, uses in met.items()}
    mixture_only = {"latent attention", "latent projections", "rotation of pairs", "router", "experts"}
    assert kinds["mixture"] - kinds["grouped"] == {*mixture_only, "shared experts", "exchange of tokens"}
    assert kinds["grouped"] - kinds["mixture"] == {"rotation of halves"}
    assert kinds["mixture"] | kinds["grouped"] == set(KINDS)


@pytest.mark.parametrize("one", dict.fromkeys(RULES), ids=lambda one: f"{one.operator} {one.quantity} {one.rule}")
def test_a_rule_is_held_against_what_it_is_about_and_against_nothing_else(one: ShapeRule, met: Any):
    """Every rule meets a model that has what it is about; of a model that lacks it nothing is said."""
    use: Use = "serving" if one.use == "serving" else "training"
    rule = dataclasses.replace(one, where="")
    told = {name for name, uses in met.items() if held_rules([rule], uses[use], use)}
    latent = one.operator.endswith("attention_score") and (one.where or one.quantity in ("latent_dim", "rope_dim"))
    mixture = latent or re.search("moe|mla|interleave|alltoallv|dynamic_quant", one.operator + one.note)
    grouped = ({"head_dim", "query_groups"} & {one.quantity} and one.use == "serving") or '"half"' in one.note
    assert told == ({"mixture"} if mixture else {"grouped"} if grouped else {"mixture", "grouped"})
    assert one.source and one.standing
    for kind in one.sites:
        words = [one.quantity, one.rule.split()[1], *one.where.split()[:1]]
        assert all(word in KINDS[kind] for word in words if word[0].isalpha())


@pytest.mark.parametrize("heads", [9, 28])
def test_heads_of_grouped_queries_are_not_held_to_a_rule_of_latent_attention(heads: int):
    """The operator takes latent attention with 1, 2, 4, ... 128 heads alone, and grouped queries with up to 256."""
    operator = "npu::npu_fused_infer_attention_score"
    keys = {9: 3, 28: 4}[heads]
    grouped = dense_architecture(
        num_attention_heads=heads, num_key_value_heads=keys, head_dim=128, hidden_size=128 * heads
    )
    attention = needs_in(traced(recipe_with(grouped)), "serving")["attention"]
    assert [one.operator for one in attention.usable] == [operator] and not attention.unusable
    latent = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}
    mixture = architecture(num_attention_heads=heads, **latent)
    refused = needs_in(traced(recipe_with(mixture)), "serving")["attention"]
    assert {one.quantity for one in refused.broken[operator]} == {"query_heads"}
    kept = needs_in(traced(recipe_with(architecture(num_attention_heads=8, **latent))), "serving")["attention"]
    assert operator in [one.operator for one in kept.usable]


def test_a_grouped_query_model_is_told_of_no_operator_of_latent_attention():
    report = examine(recipe_with(GROUPED), get_chip(CHIP), software_of(profile_of(CHIP), None, None), 1)
    text = shown(report, 200)
    assert "mla" not in text and "interleave" not in text and "latent" not in text and "moe" not in text
    assert {one.site.kind for one in report.rules} <= {"attention", "rotation of halves", "loss"}
    told = as_dictionary(report)["rules"]
    assert all(one["about"]["kind"] in one["sites"] and one["quantity"] in one["about"] for one in told)


def test_a_family_without_tables_has_no_fused_operators():
    assert fused_tables_of("cpu") == FusedTables()


def test_findings_of_a_small_recipe():
    findings = {
        one.name: one for one in static_findings(recipe_with(tiny_architecture()), get_chip(CHIP), profile_of(CHIP))
    }
    training = findings["operators of a training step"]
    assert training.outcome == "pass" and training.needed_for == "training"
    share = training.figures["native_share"].value
    assert share is not None and 90 < share <= 100
    (limit,) = {str(limit.excluded): limit for limit in findings["refused dtypes"].limits}.values()
    assert limit.setting == "train.precision" and limit.excluded == ["fp8"]


def test_the_verb_prints_a_verdict_and_json():
    done = CliRunner().invoke(cli, ["coverage", "r-nano", "--chip", CHIP, "--json"], standalone_mode=False)
    assert done.exception is None, done.exception
    report = json.loads(done.output)
    assert report["trains"] and report["rehearsed"]
    assert sum(report["uses"][0]["shares"].values()) == pytest.approx(1.0)
    assert report["verdict"]["training"].startswith("possible. a training step: ")
    assert all(rule["source"] and rule["here"] == rule["about"][rule["quantity"]] for rule in report["rules"])
    done = CliRunner().invoke(cli, ["coverage", "r-nano", "--chip", CHIP], standalone_mode=False)
    assert "training: possible a training step: " in " ".join(done.output.split())


def test_a_layout_that_does_not_divide_fails_training_and_is_refused_by_the_verb():
    recipe = recipe_with(tiny_architecture(), train=TrainSection(expert=3))
    found = {one.name: one for one in static_findings(recipe, get_chip(CHIP), profile_of(CHIP), ranks=3)}
    assert found["layout"].outcome == "fail" and "train.expert = 3" in found["layout"].detail
    with pytest.raises(IsthmusError, match=r"train\.expert = 3.* as it does 3 or 6$"):
        execute("r-nano", Watch(quiet=True), chip=CHIP, ranks=4, as_json=True, overrides=("train.expert=3",))
    with pytest.raises(IsthmusError, match=r"train\.expert = 3 does not divide"):
        execute("r-nano", Watch(quiet=True), chip=CHIP, ranks=3, as_json=True, overrides=("train.expert=3",))


def test_a_grouped_product_counts_as_its_parts_do():
    """For chips that have one kernel for all experts: the same arithmetic in fewer calls."""
    a = architecture(hidden_size=64, moe_intermediate_size=32)
    recipe, layout = recipe_with(a, step=[sft()]), Layout()
    parts, grouped = (training_costs(recipe, layout, Options(grouped=one))["model"] for one in (False, True))
    assert grouped.operators()["aten::_grouped_mm"] == 6 * 3, (
        "two products, forward and twice backward, in two layers and in multi-token prediction"
    )
    assert grouped.flops == parts.flops


def test_an_unknown_target_is_refused():
    with pytest.raises(IsthmusError, match=r"no preset; did you mean 'deepseek-v3'\?$"):
        recipe_of("deepsek-v3", CHIP, None, ())


def test_a_chip_without_tables_is_refused_with_those_that_have_them():
    with pytest.raises(IsthmusError, match=f"no tables of what the software of cpu supports.*{CHIP}"):
        execute("r-nano", Watch(quiet=True), chip="cpu", ranks=None, as_json=True)


@pytest.mark.skipif(not shutil.which("cc"), reason="reading a wheel needs a C compiler")
def test_a_wheel_takes_the_place_of_the_table(tmp_path: Path):
    """The small wheel has kernels for mm and add: what is not made of other operators falls back, and fails training.

    An installation without any of the symbols that the wheel is linked with makes it impossible.
    """
    wheel = write_wheel(tmp_path / "torch_npu-small.whl", vendor_library(tmp_path, KERNELS + FALLBACK))
    report = execute("r-nano", Watch(quiet=True), chip=CHIP, ranks=None, as_json=True, wheel=wheel)
    rows = {row.operator: row for row in report.uses[0].rows}
    assert rows["aten::mm"].status == rows["aten::add.Tensor"].status == "native"
    assert rows["aten::mul.Tensor"].status == "fallback"
    assert rows["aten::scatter.value"].cautions, "what the vendor documents is kept"
    assert any("changed from native to fallback" in note for note in report.software.notes)
    assert report.trains and report.verdict("training").startswith("possible, but not fit: every step is waiting for")
    assert report.verdict("serving").startswith("possible, waiting for the host's CPU in ")
    library = compile_library("long other(void) { return 0; }", tmp_path / "cann" / "libother.so")
    broken = dataclasses.replace(report, software=software_of(profile_of(CHIP), wheel, library.parent))
    assert not broken.trains and "the import fails" in broken.verdict("training")


def test_a_wheel_for_a_chip_of_another_vendor_is_refused(tmp_path: Path):
    with pytest.raises(IsthmusError, match="has other software"):
        software_of(dataclasses.replace(profile_of(CHIP), chip="h20"), tmp_path / "x.whl", None)
