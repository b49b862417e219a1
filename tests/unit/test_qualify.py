"""Verdicts and their evidence; each probe is also shown a planted fault."""

from __future__ import annotations

import dataclasses
import io
import math
import re
import time
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from isthmus.chips.rehearse import profile_of
from isthmus.chips.rehearse.dispatch import enforce
from isthmus.chips.rehearse.faults import FaultKind
from isthmus.chips.rehearse.tables import Profile, Status
from isthmus.errors import IsthmusError
from isthmus.launch.crew import Crew
from isthmus.probes import pilots
from isthmus.probes.compute import compute_threads, matmul_tflops, memory_gbs, time_each
from isthmus.probes.contract import Probe, Setting
from isthmus.probes.judge.rates import median_of, zero_failure_bound
from isthmus.probes.pilots import PILOT_S, PILOT_SAMPLES, full_batch, solve_pace
from isthmus.probes.static.operators import support_of
from isthmus.progress import Watch
from isthmus.recipe.read import load_recipe
from isthmus.records import Aspect, Evidence, Limit, Outcome, QualifyRecord, Verdict
from isthmus.run import RunFolder
from isthmus.stages import qualify
from isthmus.verdict import QUESTIONS, judge
from tests.support.flow_recipe import RECIPE, SMALL
from tests.support.traced import record_costs

AWAY = "ascend-910b-313t"
CPU = torch.device("cpu")
QUIET = Watch(Console(quiet=True))
AT_HOME = ('place.rollout=["home"]', 'place.serve=["home"]')


def small_run(path: Path, *overrides: str) -> RunFolder:
    small = {**SMALL, "qualify.budget": "60s"}
    chosen = load_recipe(RECIPE, (*(f"{key}={value}" for key, value in small.items()), *overrides))
    return RunFolder.create(path / "run", chosen)


def finding(needed_for: str, outcome: str) -> Evidence:
    return Evidence(name="x", aspect="software", needed_for=needed_for, outcome=outcome, detail="")


@pytest.mark.parametrize(
    ("serving", "both", "training", "verdict"),
    [
        ("pass", "pass", "pass", "fit"),
        ("pass", "pass", "unknown", "serve-only"),
        ("pass", "pass", "fail", "serve-only"),
        ("fail", "pass", "pass", "unfit"),
        ("pass", "fail", "pass", "unfit"),
        ("fail", "unknown", "unknown", "unfit"),
        ("unknown", "pass", "fail", "not enough evidence"),
        ("pass", "unknown", "pass", "not enough evidence"),
    ],
)
def test_the_verdict_follows_from_the_evidence(serving: Outcome, both: Outcome, training: Outcome, verdict: Verdict):
    evidence = [finding("serving", serving), finding("both", both), finding("training", training)]
    assert judge(evidence) == judge(evidence[::-1]) == verdict


def test_no_evidence_is_not_enough_evidence():
    assert judge([]) == "not enough evidence"
    assert judge([finding("training", "pass")]) == "not enough evidence"


@pytest.fixture(scope="module")
def qualified(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, dict[str, QualifyRecord]]:
    run = small_run(tmp_path_factory.mktemp("qualified"))
    return run, {record.pool: record for record in qualify.execute(run, QUIET)}


def test_the_present_pool_is_fit_and_its_figures_are_measured(qualified):
    home = qualified[1]["home"]
    assert home.verdict == "fit" and home.present and not home.rehearsed, home.reasons
    assert {item.aspect for item in home.evidence} == {"stability", "links", "software", "compute"}
    assert {figure.kind for figure in home.figures.values()} == {"measured", "declared"}
    declared = {name for name, figure in home.figures.items() if figure.kind == "declared"}
    assert "failure_rate_per_chip_hour" in declared and "sft_step_s" not in declared, "the prior is published"
    known = next(item for item in home.evidence if item.name == "known answers")
    assert known.samples > 0 and known.confidence == 0.95
    assert known.figures["known_answers_failure_rate"].high == pytest.approx(100 * (1 - 0.05 ** (1 / known.samples)))
    assert {score.aspect: score.outcome for score in home.scores} == dict.fromkeys(QUESTIONS, "pass")
    assert not home.skipped and not home.limits


def test_the_rehearsed_pool_is_at_best_serve_only_and_says_that_it_is_rehearsed(qualified):
    away = qualified[1]["away"]
    assert away.verdict == "serve-only" and away.rehearsed and not away.present and "rehearsed" in away.title
    unknown = {item.name for item in away.evidence if item.outcome == "unknown"}
    assert unknown == {"stability over time", "speed of links", "rates"}
    figures = [figure for item in away.evidence for figure in item.figures.values()] + list(away.figures.values())
    assert {figure.kind for figure in figures} == {"rehearsed", "declared"}
    assert {figure.kind for figure in away.figures.values()} == {"rehearsed"}


def test_the_coverage_is_of_this_models_own_work(qualified):
    away = qualified[1]["away"]
    serving, training = (
        next(i for i in away.evidence if i.name == f"operators of a {use}") for use in ("prompt", "training step")
    )
    assert serving.outcome == training.outcome == "pass"
    assert training.samples > serving.samples > 30


def test_pilots_measure_both_halves_of_the_run(qualified):
    home, away = qualified[1]["home"].figures, qualified[1]["away"].figures
    assert home["sft_step_s"].value > 0 and home["learn_token_s"].value > 0
    assert home["longest_completion_tokens"].value >= home["completion_tokens"].value > home["prompt_tokens"].value / 10
    assert away["engine_start_s"].value > away["crossing_s"].value > 0
    assert away["decode_step_s"].value + away["decode_token_s"].value > 0


def test_records_and_events_are_written_and_pilots_leave_no_weights(qualified):
    run = qualified[0]
    assert {event["pool"] for event in run.events("qualify", "end")} == {"home", "away"}
    assert all(run.read_record(f"qualify/{pool}", QualifyRecord) == qualified[1][pool] for pool in ("home", "away"))
    assert not list((run.path / "qualify").rglob("*.safetensors"))


def test_a_pool_with_a_record_is_not_measured_again(qualified):
    run = qualified[0]
    before = len(run.events("qualify"))
    assert {record.pool: record for record in qualify.execute(run, QUIET)} == qualified[1]
    assert len(run.events("qualify")) == before


def test_the_verdict_as_a_person_reads_it(qualified):
    console = Console(width=200)
    with console.capture() as capture:
        console.print(qualify.render(qualified[1]["away"]))
    text = capture.get()
    assert "rehearsed" in text and "serve-only" in text and "stability over time" in text and "decode token" in text


def test_a_pool_that_is_not_here_is_refused_before_anything_is_measured(tmp_path: Path):
    run = small_run(tmp_path, "pools.away.rehearsed=false")
    with pytest.raises(IsthmusError, match="rehearsed = true"):
        qualify.execute(run, QUIET)
    assert run.events() == []


def with_status(operator: str, status: Status) -> Profile:
    profile = profile_of(AWAY)
    row = dataclasses.replace(profile.operators[operator], status=status)
    return dataclasses.replace(profile, operators=MappingProxyType({**profile.operators, operator: row}))


@pytest.mark.parametrize(
    ("operator", "status", "verdict"),
    [
        ("aten::bmm", "none", "unfit"),
        ("aten::silu_backward", "none", "serve-only"),
        ("aten::topk", "fallback", "serve-only"),
    ],
)
def test_a_gap_in_the_operator_table_is_found(
    operator: str, status: Status, verdict: Verdict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(qualify, "profile_of", lambda _: with_status(operator, status))
    run = small_run(tmp_path, *AT_HOME)
    record = qualify.qualify_pool(run, "away", QUIET)
    training = next(item for item in record.evidence if item.name == "operators of a training step")
    assert record.verdict == verdict
    assert training.outcome == "fail" and operator in training.detail
    assert bool(run.events("qualify", "fallback")) == (status == "fallback")


def test_a_loss_that_is_not_finite_costs_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(qualify.Workload, "sft_step", lambda *_: math.nan)
    run = small_run(tmp_path, 'place.train=["home"]')
    record = qualify.qualify_pool(run, "home", QUIET)
    assert record.verdict == "serve-only" and any("pilot of training" in reason for reason in record.reasons)


def test_several_ranks_whose_links_nobody_measured_are_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(qualify, "live_probes", list)
    run = small_run(tmp_path, "pools.home.ranks=2")
    record = qualify.qualify_pool(run, "home", QUIET)
    assert record.verdict == "serve-only" and "links: no probe of links was run" in record.reasons


def fake_probe(name: str, aspect: Aspect, price: float, finds: tuple[FaultKind, ...], *evidence: Evidence) -> Probe:
    found = list(evidence) or [
        Evidence(name=name, aspect=aspect, needed_for="training", outcome="pass", detail="looked at")
    ]
    return Probe(name, aspect, "training", finds, lambda _: price, lambda *_: found)


def test_a_budget_leaves_probes_out_and_the_record_says_what_nobody_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    probes = [
        fake_probe("cheap", "stability", 1.0, ("hang",)),
        fake_probe("dear", "stability", 1000.0, ("crash",)),
        fake_probe("software", "software", 1.0, ("nan",)),
    ]
    monkeypatch.setattr(qualify, "live_probes", lambda: probes)
    run = small_run(tmp_path, *AT_HOME, 'place.train=["home"]', 'qualify.budget="100s"')
    (record,) = qualify.execute(run, QUIET)
    assert [one.probe for one in record.skipped] == ["dear"] and record.skipped[0].unseen == ["crash"]
    assert record.verdict == "fit", record.reasons
    stability = next(score for score in record.scores if score.aspect == "stability")
    assert stability.outcome == "pass" and stability.looked_for < 0.3
    assert any("dear" in event["what"] for event in run.events("qualify", "skipped"))


def test_a_finding_with_limits_is_a_fit_within_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    limit = Limit(setting="train.expert", most=2, reason="all-to-all breaks down")
    slow = Evidence(
        name="exchange", aspect="links", needed_for="training", outcome="fail", detail="slow", limits=[limit]
    )
    stable = fake_probe("stable", "stability", 1.0, ("hang",))
    monkeypatch.setattr(qualify, "live_probes", lambda: [stable, fake_probe("links", "links", 1.0, (), slow)])
    run = small_run(tmp_path, *AT_HOME, 'place.train=["home"]')
    (record,) = qualify.execute(run, QUIET)
    assert record.verdict == "fit with limits" and record.limits == [limit]


def test_ranks_that_crash_end_the_probing_and_no_pilot_runs_in_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def crash(crew: Crew, _setting: Setting) -> list[Evidence]:
        called = crew.call("tests.support.crew_work:die", {"who": 0}, deadline_s=30.0)
        detail = called.describe()
        return [Evidence(name="x", aspect="stability", needed_for="both", outcome="fail", detail=detail)]

    def probe(name: str) -> Probe:
        return Probe(name, "stability", "both", ("crash",), lambda _: 1.0, crash)

    monkeypatch.setattr(qualify, "live_probes", lambda: [probe("one"), probe("two"), probe("three")])
    record = qualify.qualify_pool(small_run(tmp_path, *AT_HOME), "home", QUIET)
    assert record.verdict == "unfit" and "killed by signal 9" in record.reasons[0]
    assert [one.probe for one in record.skipped] == ["three", "pilots of this run's own work"]
    assert "sft_step_s" not in record.figures


def test_a_fault_that_the_recipe_plants_in_a_rehearsed_pool_is_found(tmp_path: Path):
    run = small_run(tmp_path, "pools.away.ranks=2", 'pools.away.faults=["crash@rank=1,step=1"]', *AT_HOME)
    record = qualify.qualify_pool(run, "away", QUIET)
    assert record.verdict == "unfit"
    assert any(item.outcome == "fail" and 1 in item.ranks for item in record.evidence)


def test_only_prices_are_shown_where_they_are_asked_for(tmp_path: Path):
    console = Console(width=200, record=True, file=io.StringIO())
    assert qualify.execute(small_run(tmp_path), Watch(console), prices=True) == []
    away, home = re.split(r"\n(?=home)", console.export_text())
    assert "soak" in home and "known answers" in home and "looks for" in home
    assert re.match(r"home \(cpu\): \d+ probes, about \d+ s, and then pilots", home)
    assert away.startswith(f"away ({AWAY}, rehearsed): no probe asks ranks") and "looks for" not in away


def test_a_pool_that_no_stage_is_placed_on_is_refused_by_name(tmp_path: Path):
    with pytest.raises(IsthmusError, match=r"'hom'.*places away, home"):
        qualify.execute(small_run(tmp_path), QUIET, pools=["hom"])


@pytest.mark.long
def test_an_engine_that_does_not_start_costs_the_serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pilots, "write_bundle", lambda *_: None)
    record = qualify.qualify_pool(small_run(tmp_path, *AT_HOME), "home", QUIET)
    pilot = next(item for item in record.evidence if item.name == "pilot of the engine")
    assert record.verdict == "unfit" and pilot.outcome == "fail" and "not a bundle" in pilot.detail


def test_the_interval_of_a_median_is_that_of_its_order_statistics():
    median = median_of([float(n) for n in range(10, 0, -1)], confidence=0.95)
    assert (median.value, median.low, median.high) == (5.5, 2.0, 9.0)
    assert median.confidence == pytest.approx(1 - 2 * 11 / 1024)
    few = median_of([3.0, 1.0, 2.0], confidence=0.95)
    assert (few.low, few.high, few.confidence) == (1.0, 3.0, 0.75)


@given(samples=st.integers(1, 10_000), confidence=st.floats(0.5, 0.999))
def test_the_bound_is_the_rate_that_stays_unseen_with_the_remaining_chance(samples: int, confidence: float):
    bound = zero_failure_bound(samples, confidence)
    assert (1 - bound) ** samples == pytest.approx(1 - confidence)


def test_rates_are_positive_and_threads_are_put_back():
    before = torch.get_num_threads()
    with compute_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        assert all(rate > 0 for rate in (*matmul_tflops(CPU, 64, 3), *memory_gbs(CPU, 1, 3)))
    assert torch.get_num_threads() == before


@given(
    per_step=st.floats(1e-5, 1e-2),
    per_token=st.floats(1e-7, 1e-4),
    steps=st.tuples(st.integers(10, 60), st.integers(10, 60)),
)
def test_the_pace_is_solved_from_two_batches(per_step: float, per_token: float, steps: tuple[int, int]):
    runs = [(s, n, s * per_step + n * per_token) for s, n in zip(steps, (16 * steps[0], 200 * steps[1]), strict=True)]
    found = solve_pace(runs[0], runs[1])
    assert found == (pytest.approx(per_step, rel=1e-6), pytest.approx(per_token, rel=1e-6))


def test_noise_never_makes_a_pace_negative():
    assert solve_pace((48, 768, 2.0), (48, 9600, 1.0)) == (pytest.approx(1 / 48), 0.0)
    assert solve_pace((48, 768, 0.001), (48, 9600, 1.0)) == (0.0, pytest.approx(1 / 9600))


def test_a_slow_model_is_asked_for_fewer_samples_and_still_for_more_than_the_small_batch():
    few, many = PILOT_SAMPLES
    assert full_batch((48, 768, 0.0)) == full_batch((48, 768, 0.9)) == many
    assert full_batch((48, 768, 1000.0)) == 2 * few
    middle = full_batch((48, 768, 2.0))
    assert 2 * few < middle < many and middle % 8 == 0 and 2 * 2.0 * middle / few <= PILOT_S


def test_slow_work_is_timed_less_often_and_once_at_least():
    done: list[int] = []
    cpu = torch.device("cpu")
    assert len(time_each(lambda: (done.append(1), time.sleep(0.02)), cpu, 5, 1, most_s=0.01)) == 1 and len(done) == 2
    assert len(time_each(lambda: None, cpu, 5, 1)) == 5


def test_what_is_called_is_joined_with_the_table():
    called = {"aten::mm": {"float32"}, "aten::nextafter": {"float32"}, "aten::_to_copy": {"float32", "float64"}}
    found = support_of(called, profile_of(AWAY))
    assert found.operators["fallback"] == ("aten::nextafter",) and "aten::mm" in found.operators["native"]
    assert found.refused_dtypes == {"float64": ("aten::_to_copy",)}
    assert found.total == sum(found.count(status) for status in found.operators) == 3


def test_trace_and_rehearsal_see_the_same_operators():
    layer = torch.nn.Linear(4, 4)

    def work() -> None:
        layer.zero_grad()
        layer(torch.ones(2, 4)).softmax(-1).square().sum().backward()

    traced = record_costs(work, "cpu").operators()
    with enforce(AWAY) as rehearsal:
        work()
    assert set(traced) == set(rehearsal.tally.operators)
    assert sum(traced.values()) == sum(rehearsal.tally.calls.values())
