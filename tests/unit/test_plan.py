"""Placement by verdict, and forecasts against counts made elsewhere."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from isthmus.errors import GateRefused, IsthmusError
from isthmus.forecast import duration
from isthmus.forecast.count import count_parameters, forward_flops, training_flops
from isthmus.model.documents import Documents
from isthmus.model.model import Model
from isthmus.progress import Watch
from isthmus.recipe.architecture import DeepseekSection
from isthmus.recipe.read import load_recipe
from isthmus.recipe.schema import Recipe
from isthmus.records import Candidate, PlanRecord, QualifyRecord, Verdict
from isthmus.run import Figure, RunFolder
from isthmus.stages import plan
from tests.support.flow_recipe import RECIPE, REINFORCED, TAUGHT, written

PACE = {
    "sft_step_s": 0.5,
    "learn_token_s": 1e-4,
    "prompt_tokens": 10.0,
    "completion_tokens": 20.0,
    "longest_completion_tokens": 50.0,
    "engine_start_s": 3.0,
    "crossing_s": 0.1,
    "decode_step_s": 1e-3,
    "decode_token_s": 1e-5,
}
DEEPSEEK_V3 = DeepseekSection(
    vocab_size=129280,
    hidden_size=7168,
    intermediate_size=18432,
    moe_intermediate_size=2048,
    num_hidden_layers=61,
    num_attention_heads=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    n_routed_experts=256,
    num_experts_per_tok=8,
    n_group=8,
    topk_group=4,
    first_k_dense_replace=3,
    max_position_embeddings=163840,
)
SHAPES = {
    "plain": {},
    "compressed queries, two dense layers": {"q_lora_rank": 20, "first_k_dense_replace": 2},
    "tied head, two shared experts": {"tie_word_embeddings": True, "n_shared_experts": 2},
    "no multi-token prediction": {"num_nextn_predict_layers": 0},
    "all dense": {"first_k_dense_replace": 3},
}


def recipe(*overrides: str) -> Recipe:
    """The tiny one; `sft` and `rl` in overrides stand for its steps."""
    return load_recipe(RECIPE, [f"{written(key)}={value}" for key, value in (one.split("=", 1) for one in overrides)])


def verdict(
    pool: str, verdict: Verdict, *, rehearsed: bool = False, pace: dict[str, float] | None = None
) -> QualifyRecord:
    figures = {
        name: Figure.measured(value, "s", "a pilot", rehearsed=rehearsed) for name, value in (pace or PACE).items()
    }
    return QualifyRecord(
        recipe_sha256="0" * 64,
        started=time.time() - 2,
        ended=time.time(),
        pool=pool,
        chip="cpu",
        present=not rehearsed,
        rehearsed=rehearsed,
        verdict=verdict,
        title=f"{pool}: {verdict}",
        reasons=[f"reason of {pool}"],
        evidence=[],
        figures=figures,
    )


def run_with(path: Path, chosen: Recipe, *records: QualifyRecord) -> RunFolder:
    run = RunFolder.create(path / "run", chosen)
    for record in records:
        run.write_record(f"qualify/{record.pool}", record)
    return run


def quiet() -> Watch:
    return Watch(Console(quiet=True))


def test_the_tiny_recipe_trains_at_home_and_runs_away(tmp_path: Path):
    run = run_with(tmp_path, recipe(), verdict("home", "fit"), verdict("away", "serve-only", rehearsed=True))
    record = plan.execute(run, quiet())
    assert [record.pool_of(stage) for stage in ("train", "rollout", "serve")] == ["home", "away", "away"]
    assert [(r.stage, r.pool) for r in record.rejected] == [("train", "away")]
    assert "rehears" in record.rejected[0].reason and "never vouch" in record.rejected[0].reason
    assert run.read_record("plan", PlanRecord) == record
    assert [event["event"] for event in run.events("plan")] == ["start", "end"]


@pytest.mark.parametrize("found", ["fit", "serve-only", "unfit", "not enough evidence"])
def test_a_rehearsal_never_vouches_for_training(found: Verdict):
    assert "rehears" in (plan.objection("train", verdict("away", found, rehearsed=True), recipe()) or "")


@pytest.mark.parametrize(
    ("stage", "found", "acceptable"),
    [
        ("train", "fit", True),
        ("train", "serve-only", False),
        ("rollout", "serve-only", True),
        ("serve", "serve-only", True),
        ("rollout", "unfit", False),
        ("serve", "not enough evidence", False),
    ],
)
def test_each_stage_needs_its_verdict(stage: str, found: Verdict, acceptable: bool):
    objection = plan.objection(stage, verdict("home", found), recipe())
    assert (objection is None) == acceptable
    assert objection is None or (found in objection and "reason of home" in objection)


def test_rollouts_are_not_planned_on_engines_elsewhere_that_cannot_do_what_a_step_asks():
    """Beside a pool that is here: the plan goes there, and nothing may move from there to those engines."""
    mixed = ("pools.far.chip=cpu", "pools.far.engines=['http://a:1']", "place.rollout=['far', 'home']")
    records = {pool: verdict(pool, "fit", rehearsed=pool == "away") for pool in ("home", "far", "away")}
    placements, rejected = plan.place(recipe(*mixed), records)
    assert {one.stage: one.pool for one in placements}["rollout"] == "far"
    placements, rejected = plan.place(
        recipe(*mixed, "evaluation.after=['cold-start']", "evaluation.format=bf16"), records
    )
    assert {one.stage: one.pool for one in placements}["rollout"] == "home"
    (far,) = [one for one in rejected if one.stage == "rollout"]
    assert not far.acceptable and "the same format in each" in far.reason


def test_an_acceptable_pool_later_in_the_order_is_rejected_by_the_order():
    chosen = recipe('place.rollout=["home", "away"]')
    qualified = {"home": verdict("home", "fit"), "away": verdict("away", "serve-only", rehearsed=True)}
    placements, rejected = plan.place(chosen, qualified)
    assert placements[1].pool == "home"
    assert next(r for r in rejected if r.stage == "rollout").reason.startswith("acceptable, but home")


def test_a_stage_without_a_pool_refuses_with_every_reason(tmp_path: Path):
    chosen = recipe('place.train=["away", "home"]')
    run = run_with(tmp_path, chosen, verdict("home", "unfit"), verdict("away", "serve-only", rehearsed=True))
    with pytest.raises(GateRefused) as caught:
        plan.execute(run, quiet())
    message = str(caught.value)
    assert caught.value.exit_code == 1 and "place.train" in message
    assert "rehearsed" in message and "reason of home" in message and 'chip = "cpu"' in message
    assert run.read_record("plan", PlanRecord) is None


def candidate(train: str, rollout: str, hours: float | None, *, chosen: bool = False, why: str = "") -> Candidate:
    figures = {
        name: Figure(value=value, unit=unit, kind="forecast", source="x")
        for name, value, unit in (("hours", hours, "h"), ("chip_hours", None, "chip-hours"), ("cost", None, "USD"))
    }
    return Candidate(train=train, rollout=rollout, chosen=chosen, why=why, **figures)


AIMED = (
    'pools.spare={chip="cpu"}', 'place.train=["home", "spare"]', 'place.rollout=["home", "spare"]',
    'place.serve=["home"]', 'aim.choose="time"',
)  # fmt: skip


def test_what_lost_by_the_aim_is_not_told_by_what_stands_against_the_pool_beside_it():
    """Spare may not train, and (spare, home) would have been the quickest: rollouts at home lost by their own time."""
    qualified = {"home": verdict("home", "fit"), "spare": verdict("spare", "serve-only")}
    candidates = [
        candidate("home", "home", 9.0, why="takes 9 h against 5"),
        candidate("home", "spare", 5.0, chosen=True),
        candidate("spare", "home", 1.0, why="spare: its verdict is `serve-only`"),
        candidate("spare", "spare", 1.0, why="spare: its verdict is `serve-only`"),
    ]
    placements, rejected = plan.place(recipe(*AIMED), qualified, candidates=candidates)
    assert [(one.stage, one.pool) for one in placements] == [("train", "home"), ("rollout", "spare"), ("serve", "home")]
    (home,) = [one for one in rejected if one.stage == "rollout"]
    assert home.acceptable and home.reason == "acceptable, and takes 9 h against 5"
    assert "the parity gate stands behind it" in placements[1].reason and "chosen by [aim]" in placements[1].reason


def test_an_aim_without_numbers_says_that_the_order_decided():
    qualified = {name: verdict(name, "fit") for name in ("home", "spare")}
    candidates = [
        candidate(one, other, None, chosen=(one, other) == ("home", "home"), why="no pilot")
        for one in qualified
        for other in qualified
    ]
    placements, _ = plan.place(recipe(*AIMED), qualified, candidates=candidates)
    told = {one.stage: "[aim] has no numbers to choose by: no pilot" in one.reason for one in placements}
    assert told == {"train": True, "rollout": True, "serve": False}


def test_a_missing_verdict_names_the_verb_to_run(tmp_path: Path):
    run = run_with(tmp_path, recipe(), verdict("home", "fit"))
    with pytest.raises(IsthmusError, match="isthmus qualify"):
        plan.execute(run, quiet())


def test_the_plan_does_not_load_torch():
    code = "import sys, isthmus.stages.plan, isthmus.forecast.count; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_plan_as_a_person_reads_it(tmp_path: Path):
    run = run_with(tmp_path, recipe(), verdict("home", "fit"), verdict("away", "serve-only", rehearsed=True))
    console = Console(width=200)
    with console.capture() as capture:
        console.print(plan.render(plan.execute(run, quiet())))
    text = capture.get()
    assert "not away" in text and "never vouch" in text and "P90" in text and "forecast" in text


def test_the_estimate_is_the_arithmetic_of_the_pilots():
    chosen = recipe(
        *("sft.steps=100", "rl.steps=10", "rl.prompts_per_step=4", "rl.samples_per_prompt=8", "rl.max_new_tokens=80"),
        *("rl.staleness=0", "rl.heldout_problems=300", "handoff.heldout_problems=100", "handoff.golden_prompts=5"),
    )
    found = duration.estimate(chosen, verdict("home", "fit"), verdict("away", "serve-only"))
    assert found[TAUGHT].value == pytest.approx(100 * 0.5)
    generate = 80 * 1e-3 + 32 * 30 * 1e-5  # longest 2 x 50 is cut to 80; the mean grows from 20 to 30
    learn = (4 * 10 + 32 * 30) * 1e-4  # each of 4 prompts is computed once for its samples
    answers = 2 * 80 * 1e-3 + 300 * 30 * 1e-5  # 300 problems need two rounds of 256 slots
    assert found[REINFORCED].value == pytest.approx(10 * (generate + learn + 0.1) + 4 * answers + 3.0)
    handoff = 80 * 1e-3 + 200 * 30 * 1e-5 + 3.0 + 5 * (10 + 40) * 1e-4
    assert found["handoff"].value == pytest.approx(handoff)
    for figure in found.values():
        assert figure.kind == "forecast" and figure.unit == "s" and figure.low < figure.value < figure.high


def test_overlapping_pools_wait_for_the_slower_one():
    pools = verdict("home", "fit"), verdict("away", "serve-only")
    alone, together = (duration.estimate(recipe(f"rl.staleness={n}"), *pools)[REINFORCED].value for n in (0, 1))
    slow = verdict("home", "fit", pace={**PACE, "learn_token_s": 0.0}), verdict("away", "serve-only")
    assert together < alone
    assert duration.estimate(recipe("rl.staleness=1"), *slow)[REINFORCED].value == pytest.approx(
        duration.estimate(recipe("rl.staleness=0"), *slow)[REINFORCED].value
    )


def test_without_a_pilot_the_estimate_is_unknown(tmp_path: Path):
    home = verdict("home", "fit", pace={"matmul_tflops": 1.0})
    run = run_with(tmp_path, recipe(), home, verdict("away", "serve-only", rehearsed=True))
    estimate = plan.execute(run, quiet()).estimate
    assert list(estimate) == ["qualify", TAUGHT, REINFORCED, "handoff", "total"]
    assert estimate[TAUGHT].value is None and estimate["total"].value is None
    assert estimate["qualify"].value == pytest.approx(4.0, abs=0.1) and estimate["qualify"].kind == "measured"


def test_the_total_is_a_forecast_and_adds_up(tmp_path: Path):
    run = run_with(tmp_path, recipe(), verdict("home", "fit"), verdict("away", "serve-only", rehearsed=True))
    estimate = plan.execute(run, quiet()).estimate
    parts = [estimate[stage].value for stage in ("qualify", TAUGHT, REINFORCED, "handoff")]
    assert estimate["total"].value == pytest.approx(sum(parts)) and estimate["total"].kind == "forecast"


def changed(changes: dict[str, object]) -> DeepseekSection:
    base = recipe().model.model_dump(by_alias=True, exclude={"preset"})
    return DeepseekSection(**{**base, **changes})


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_parameters_are_those_of_the_model(changes: dict[str, object]):
    architecture = changed(changes)
    assert count_parameters(architecture).total == sum(p.numel() for p in Model(architecture).parameters())


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_operations_are_those_that_torch_counts(changes: dict[str, object]):
    """Two documents of one length: their attention is plain products. torch does not count its fused attention."""
    architecture = changed(changes)
    model, tokens = Model(architecture).initialise(0), torch.zeros(2, 20, dtype=torch.long)
    documents = Documents.of(torch.tensor([[0], [1]]).expand(2, 20), architecture.num_attention_heads)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(tokens, mask=documents)
    assert forward_flops(architecture, context=20) * tokens.numel() == counter.get_total_flops()


def test_deepseek_v3_has_its_published_size():
    """671 B parameters, 37 B of them active (arXiv 2412.19437); 261 GFLOP per token at 4K (Megatron-Bridge)."""
    count = count_parameters(DEEPSEEK_V3)
    assert count.main / 1e9 == pytest.approx(671, abs=0.5) and count.active / 1e9 == pytest.approx(37.5, abs=0.5)
    assert training_flops(DEEPSEEK_V3, context=2048) / 1e9 == pytest.approx(261, rel=0.005)
