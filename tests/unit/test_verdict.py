"""From evidence to a verdict, and from a verdict to what a plan may do."""

from __future__ import annotations

import itertools

import pytest

from isthmus.chips import fault_weights, looked_for
from isthmus.chips.rehearse.faults import FAULT_KINDS
from isthmus.errors import GateRefused
from isthmus.recipe.read import load_recipe, parse_recipe
from isthmus.recipe.schema import Recipe
from isthmus.records import Evidence, Limit, Outcome, QualifyRecord, Skipped, Verdict
from isthmus.run import Figure
from isthmus.stages import plan
from isthmus.verdict import ROLLOUT_FORMAT, broken_limits, compare, describe_limit, judge, limits_of, outcome_of, scores
from tests.support.flow_recipe import RECIPE

EP_8 = Limit(setting="train.expert", most=8, reason="all-to-all falls to a third beyond 8 ranks")
NO_BF16 = Limit(setting="train.precision", excluded=["bf16"], reason="bf16 products lose half of their bits")
RANK_3 = Limit(setting="pool.ranks", excluded=["3"], reason="its sums are wrong")
NO_W8A8 = Limit(setting="handoff.format", excluded=["w8a8"], reason="no int8 kernel", needed_for="serving")


def finding(needed_for: str, outcome: Outcome, *limits: Limit, aspect: str = "software") -> Evidence:
    return Evidence(
        name="x", aspect=aspect, needed_for=needed_for, outcome=outcome, detail="because", limits=list(limits)
    )


def record(verdict: Verdict, *limits: Limit, pool: str = "home", rehearsed: bool = False) -> QualifyRecord:
    evidence = [finding("both", "pass"), finding("training", "fail", *limits)] if limits else [finding("both", "pass")]
    return QualifyRecord(
        recipe_sha256="0" * 64,
        started=0.0,
        ended=1.0,
        pool=pool,
        chip="cpu",
        present=not rehearsed,
        rehearsed=rehearsed,
        verdict=verdict,
        title="",
        reasons=["a reason"],
        evidence=evidence,
        limits=limits_of(evidence),
        figures={"matmul_tflops": Figure.measured(2.0, "TFLOPS", "a probe", rehearsed=rehearsed)},
        scores=scores(evidence, [("software", "fallback")], []),
    )


def recipe(*overrides: str) -> Recipe:
    return load_recipe(RECIPE, ('place.rollout=["home"]', 'place.serve=["home"]', *overrides))


def test_a_failure_that_limits_describe_leaves_a_pool_fit_within_them():
    assert judge([finding("both", "pass"), finding("training", "fail", EP_8)]) == "fit with limits"
    assert (
        judge([finding("both", "pass"), finding("training", "fail", EP_8), finding("training", "fail")]) == "serve-only"
    )
    assert judge([finding("serving", "fail", NO_W8A8), finding("training", "pass")]) == "fit with limits"
    assert judge([finding("serving", "fail", NO_W8A8), finding("training", "fail")]) == "serve-only"


def test_a_pass_with_a_limit_is_still_a_pass():
    assert judge([finding("both", "pass", EP_8)]) == "fit"


def test_more_bad_news_never_makes_a_verdict_better():
    order = ["unfit", "not enough evidence", "serve-only", "fit with limits", "fit"]
    pieces = [finding(use, out, *limits) for use in ("serving", "training", "both") for out, limits in NEWS]
    for first, second, third in itertools.product(pieces, repeat=3):
        if third.outcome == "pass":
            continue
        fewer, more = judge([first, second]), judge([first, second, third])
        if fewer == "not enough evidence" and not any(i.needed_for in ("serving", "both") for i in (first, second)):
            continue  # the third is the first that says anything about serving
        assert order.index(more) <= order.index(fewer), (first, second, third)


NEWS = [("pass", ()), ("fail", ()), ("fail", (EP_8,)), ("unknown", ())]


def test_the_weights_of_each_question_are_shares_of_known_kinds_of_faults():
    for aspect, kinds in fault_weights().items():
        assert sum(kinds.values()) == pytest.approx(1.0)
        assert set(kinds) <= set(FAULT_KINDS), aspect
    assert set(fault_weights()) == {"stability", "links", "software"}
    assert looked_for("stability", FAULT_KINDS) == pytest.approx(1.0)
    # Llama 3: of 419 interruptions 377 are none of the network's, and 300 of those are a chip or host that fails.
    assert looked_for("stability", ["crash", "crash"]) == pytest.approx(300 / 377, abs=1e-3)


def test_a_score_says_what_share_of_the_faults_was_looked_for():
    evidence = [finding("both", "pass"), finding("training", "fail", EP_8, aspect="links")]
    gone = [Skipped(probe="soak", aspect="stability", price_s=30.0, why="over the budget", unseen=["crash"])]
    found = {score.aspect: score for score in scores(evidence, [("links", "slow-link"), ("links", "hang")], gone)}
    assert found["software"].outcome == "pass" and found["software"].looked_for == 0.0
    assert found["links"].outcome == "limited" and found["links"].looked_for == pytest.approx(49 / 95)
    assert found["stability"].outcome == "unknown" and found["stability"].skipped == 1


@pytest.mark.parametrize(
    ("limit", "overrides", "says"),
    [
        (EP_8, (), None),
        (EP_8, ("train.expert=16", "pools.home.count=16", "model.n_routed_experts=16"), "train.expert is 16, and 8 is"),
        (NO_BF16, (), None),
        (NO_BF16, ('train.precision="bf16"',), "train.precision is bf16, which is excluded"),
        (Limit(setting="train.precision", excluded=["fp32"], reason="x"), (), "train.precision is fp32"),
        (RANK_3, ("pools.home.count=4",), "rank 3 is not to be used"),
        (Limit(setting="qualify.repeats", least=100, reason="x"), (), "qualify.repeats is 10, and 100 is the least"),
    ],
)
def test_the_plan_reads_limits(limit: Limit, overrides: tuple[str, ...], says: str | None):
    chosen = recipe(*overrides)
    broken = broken_limits([limit], chosen, "home", "training")
    qualified = {"home": record("fit with limits", limit), "away": record("serve-only", pool="away", rehearsed=True)}
    if says is None:
        assert not broken
        placements, _ = plan.place(chosen, qualified)
        assert placements[0].pool == "home" and describe_limit(limit) in placements[0].reason
    else:
        assert len(broken) == 1 and says in broken[0]
        with pytest.raises(GateRefused, match=says):
            plan.place(chosen, qualified)


def test_a_limit_binds_its_own_use_alone():
    chosen = recipe()
    assert broken_limits([NO_W8A8], chosen, "home", "serving")
    assert not broken_limits([NO_W8A8], chosen, "home", "training")


def test_a_limit_about_nothing_is_an_error():
    with pytest.raises(KeyError, match=r"train\.exprt"):
        broken_limits([Limit(setting="train.exprt", most=8, reason="x")], recipe(), "home", "training")


def test_two_pools_side_by_side():
    rows = dict(compare([record("fit with limits", EP_8), record("serve-only", pool="away", rehearsed=True)]))
    assert rows["verdict"] == ["fit with limits", "serve-only"] and rows["evidence"] == ["measured", "rehearsed"]
    assert rows["limits"] == ["train.expert <= 8", "none"]
    assert rows["matmul_tflops"] == ["2 TFLOPS (measured)", "2 TFLOPS (rehearsed)"]
    assert rows["software"][0].startswith("limited, 1 of 2")


def test_nothing_known_is_unknown():
    assert outcome_of([]) == "unknown"


def test_a_limit_on_the_format_of_samples_is_held_against_every_step_that_samples():
    steps = [step("taught", "sft"), step("one", "rl", "taught", rollout_format="bf16")]
    limit = Limit(setting=ROLLOUT_FORMAT, excluded=["w8a8"], reason="int8 is wrong there", needed_for="serving")
    assert broken_limits([limit], recipe_of(steps), "home", "serving") == []
    steps.append(step("two", "rl", "one", rollout_format="w8a8"))
    (broken,) = broken_limits([limit], recipe_of(steps), "home", "serving")
    assert "rollout_format is w8a8" in broken and "int8 is wrong there" in broken


def step(name: str, kind: str, start: str = "model", **keys: str) -> dict[str, object]:
    optimizer = {"name": "adamw", "learning_rate": 1e-3}
    return {"name": name, "kind": kind, "from": start, "steps": 1, "optimizer": optimizer, **keys}


def recipe_of(steps: list[dict[str, object]]) -> Recipe:
    place = {stage: ["home"] for stage in ("train", "rollout", "serve")}
    tree = {"name": "x", "model": {"preset": "r-nano"}, "pools": {"home": {"chip": "cpu"}}, "place": place}
    return parse_recipe({**tree, "step": steps})
