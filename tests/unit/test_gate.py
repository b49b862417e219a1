"""What the gate makes of a figure, layer by layer: at its limit, on either side of it, and where nothing is told."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from isthmus.cli import main
from isthmus.engines.local.api.canary import drift_of
from isthmus.engines.local.core.scheduler import Finished
from isthmus.errors import GateRefused
from isthmus.formats.files.bundle import write_bundle
from isthmus.formats.files.golden import GoldenAnswer
from isthmus.model.model import Model
from isthmus.parity import gate
from isthmus.parity.capture import CaptureOptions, capture, synthetic_prompts
from isthmus.parity.cost import FormatCost, check_cost
from isthmus.parity.coverage import check_coverage
from isthmus.parity.gate import (
    COST,
    at_least,
    at_most,
    check_kl,
    check_list,
    check_summary,
    check_top1,
    declared,
    judge,
    reach,
    refusal,
    shown,
)
from isthmus.parity.lint import lint_config
from isthmus.parity.manifest import write_manifest
from isthmus.parity.paired import PairedAccuracy
from isthmus.parity.replay import LIMIT as FLOORS
from isthmus.parity.replay import Floors, Measure, Replay
from isthmus.parity.seal import read_verdict, standing, write_seal
from isthmus.parity.tokens import TokenParity, interval_of_mean
from isthmus.parity.verify import DISTANCE, LOSS, Limits, Target, check_modules, verify_bundle, write_verdict
from isthmus.records import Check
from isthmus.tools import verify
from tests.support.bundles import TinyTokenizer
from tests.support.printed import printed
from tests.support.small import tiny_architecture

LAYERS = ("files", "coverage", "config", "modules", "tokens", "engine", "task")
ARCHITECTURE = tiny_architecture()
BUDGET = 0.01
ABOVE, BELOW = math.nextafter(BUDGET, 1), math.nextafter(BUDGET, 0)
NOT_FINITE = (math.nan, math.inf, -math.inf)


@pytest.mark.parametrize(
    ("value", "interval", "outcome"),
    [
        (BUDGET, (BELOW, BUDGET), "pass"),
        (BELOW, (0.0, BELOW), "pass"),
        (0.005, (0.002, ABOVE), "unknown"),
        (BUDGET, (BUDGET, ABOVE), "unknown"),
        (ABOVE, (0.002, 0.02), "fail"),
        (0.03, (0.004, 0.06), "fail"),
        (0.03, (0.02, 0.06), "fail"),
        (BUDGET, None, "pass"),
        (BELOW, None, "pass"),
        (ABOVE, None, "fail"),
        (math.nan, (0.0, BELOW), "unknown"),
        (0.005, (math.nan, math.nan), "unknown"),
        (0.005, (0.002, math.nan), "unknown"),
        (0.005, (-math.inf, BELOW), "unknown"),
        (math.nan, None, "unknown"),
        (math.inf, None, "fail"),
        (-math.inf, None, "unknown"),
    ],
)
def test_an_upper_limit_holds_for_the_whole_interval(value, interval, outcome):
    assert at_most(BUDGET, value, interval, samples=9) == outcome
    mirrored = (-interval[1], -interval[0]) if interval else None
    assert at_least(-BUDGET, -value, mirrored, samples=9) == outcome


@pytest.mark.parametrize("samples", [0, 1])
def test_a_mean_of_one_sample_never_passes(samples):
    assert at_most(BUDGET, 0.0, samples=samples) == "unknown"
    assert at_most(BUDGET, ABOVE, samples=samples) == "fail"
    assert at_least(BUDGET, 1.0, samples=samples) == "unknown"


@given(st.floats(), st.floats(), st.floats(), st.floats(0), st.floats(0, 9), st.integers(0, 5) | st.none())
def test_what_passes_is_all_within_and_a_wider_interval_never_helps(limit, value, low, width, wider, samples):
    high = low + width
    outcome = at_most(limit, value, (low, high), samples=samples)
    if outcome == "pass":
        assert max(value, low, high) <= limit and samples not in (0, 1)
        assert all(map(math.isfinite, (value, low, high)))
    else:
        assert at_most(limit, value, (low - wider, high + wider), samples=samples) != "pass"
    assert at_most(limit, value, (low, high), samples=1) != "pass"


AMOUNT = st.floats(0, 1)


@given(AMOUNT, AMOUNT, AMOUNT, st.integers(2, 200), st.integers(1, 200), st.floats(0.5, 0.999))
def test_fewer_samples_of_one_mean_and_interval_are_never_easier_to_pass(mean, below, above, few, more, confidence):
    interval = (mean - below, mean + above)
    wide, narrow = (reach(mean, interval, count, confidence) for count in (few, few + more))
    assert wide is not None and narrow is not None
    assert wide[0] <= narrow[0] <= interval[0] + 1e-9 and interval[1] - 1e-9 <= narrow[1] <= wide[1]
    assert reach(mean, interval, 1, confidence) is None


@pytest.mark.parametrize(("count", "confidence"), [(2, 0.95), (4, 0.95), (8, 0.9), (64, 0.95)])
def test_the_reach_of_few_samples_is_students(count, confidence):
    """Of a normal interval it makes Student's, with the deviation over n - 1: scipy's own distributions say so."""
    deviation, tail = 0.3, (1 + confidence) / 2
    normal = stats.norm.ppf(tail) * deviation / math.sqrt(count)
    found = reach(1.0, (1.0 - normal, 1.0 + normal), count, confidence)
    expected = stats.t.ppf(tail, count - 1) * deviation / math.sqrt(count - 1)
    assert found == pytest.approx((1.0 - expected, 1.0 + expected), rel=1e-12)


@pytest.mark.parametrize(("count", "share"), [(2, 0.05), (4, 0.02), (8, 0.01)])
def test_a_bundle_three_times_over_its_budget_does_not_pass_by_few_sequences(count, share):
    """KL of a sequence drawn log-normal, its mean three times the budget: what luck of the draw may let pass."""
    chance = torch.Generator().manual_seed(count)
    passed = 0
    for _ in range(400):
        drawn = torch.randn(count, generator=chance, dtype=torch.float64).sub(0.5).exp() * 3 * BUDGET
        interval = interval_of_mean(drawn, torch.arange(count), count, 0.95)
        passed += kl(tokens(drawn.mean().item(), interval, count)).outcome == "pass"
    assert passed <= share * 400


def test_the_same_sequence_many_times_is_one_sample():
    found = tokens(0.001, (0.001, 0.001), sequences=8)
    assert kl(found).outcome == "pass" and kl(replace(found, distinct=1)).outcome == "unknown"


def test_more_samples_of_one_kind_come_to_pass():
    chance = torch.Generator().manual_seed(0)
    drawn = torch.rand(4096, generator=chance).double() ** 4
    highs = []
    for count in (4, 16, 64, 256, 1024, 4096):
        centred = drawn[:count] - drawn[:count].mean() + 0.2
        found = interval_of_mean(centred, torch.arange(count), count, 0.95)
        assert found is not None
        highs.append(found[1])
    assert all(earlier > later for earlier, later in pairwise(highs))


def tokens(mean: float, interval, sequences: int = 8, top1: float = 1.0) -> TokenParity:
    said = (torch.zeros(2, 80), torch.zeros(2, 80, dtype=torch.long))
    return TokenParity(sequences, 80, mean, interval, mean, top1, 0, 0, 0.0, 0, 0, sequences, *said)


def kl(found: TokenParity) -> Check:
    return check_kl("mean KL", found, declared(BUDGET, "nats/token", "a test"), "a test", "because", rehearsed=False)


@pytest.mark.parametrize(
    ("found", "outcome", "has_figure"),
    [
        (tokens(BUDGET, (0.002, BUDGET)), "pass", True),
        (tokens(BELOW, (0.002, BELOW)), "pass", True),
        (tokens(ABOVE, (0.002, ABOVE)), "fail", True),
        (tokens(0.005, (0.002, 0.02)), "unknown", True),
        (tokens(0.03, (0.002, 0.09)), "fail", True),
        (tokens(0.001, None, sequences=1), "unknown", True),
        (tokens(math.nan, None, sequences=0), "unknown", False),
        (tokens(math.inf, (math.nan, math.nan)), "fail", False),
    ],
)
def test_tokens(found, outcome, has_figure):
    check = kl(found)
    assert (check.layer, check.outcome, check.figure is not None) == ("tokens", outcome, has_figure)


@pytest.mark.parametrize(
    ("share", "sequences", "outcome"),
    [
        (0.9, 8, "pass"),
        (math.nextafter(0.9, 0), 8, "fail"),
        (1.0, 1, "unknown"),
        (math.nan, 0, "unknown"),
    ],
)
def test_first_choices(share, sequences, outcome):
    found = tokens(0.0, (0.0, 0.0), sequences, share)
    assert check_top1("top-1", found, 0.9, "a test", "a test", rehearsed=False).outcome == outcome


@pytest.mark.parametrize(
    ("difference", "low", "problems", "outcome"),
    [
        (0.0, -0.05, 100, "pass"),
        (0.0, math.nextafter(-0.05, -1), 100, "unknown"),
        (-0.05, -0.08, 100, "unknown"),
        (math.nextafter(-0.05, -1), -0.08, 100, "fail"),
        (0.0, 0.0, 1, "unknown"),
    ],
)
def test_the_task(difference, low, problems, outcome):
    found = PairedAccuracy(problems, problems, 0.5, 0.5, 0, 0, 1.0, difference, low, 0.1, 0.95)
    assert found.verdict(0.05) == outcome


def replay(value: float) -> Replay:
    return Replay([Measure("model.layers.0.mlp", None, "mlp", value)], Floors({"mlp": 1.0}))


@pytest.mark.parametrize(
    ("value", "outcome"),
    [(FLOORS, "pass"), (0.0, "pass"), (math.nextafter(FLOORS, 4), "fail"), (math.inf, "fail"), (math.nan, "fail")],
)
def test_modules(value, outcome):
    (check,) = check_modules(replay(value), Target())
    assert check.outcome == outcome and (check.module is None) == (outcome == "pass")


def cost(value: float, interval: tuple[float, float] | None, sequences: int = 64) -> FormatCost:
    return FormatCost(
        kl=value,
        kl_interval=interval,
        top1=0.99,
        trained_perplexity=2.0,
        perplexity=2.1,
        tokens=640,
        sequences=sequences,
    )


@pytest.mark.parametrize(
    ("found", "outcome"),
    [
        (cost(0.01, (0.009, 0.011)), "pass"),
        (cost(0.01, (0.009, 0.021)), "unknown"),
        (cost(0.01, (0.009, 0.011), sequences=1), "unknown"),
        (cost(0.01, (0.008, 0.012), sequences=2), "unknown"),
        (cost(math.nextafter(0.02, 1), (0.02, 0.021)), "fail"),
        (cost(math.inf, (math.inf, math.inf)), "fail"),
        (cost(math.nan, None), "unknown"),
    ],
)
def test_what_the_format_costs(found, outcome):
    limit = declared(0.02, "nats/token", "the test")
    assert check_cost(found, "w8a8", "prompts", limit, 0.95).outcome == outcome


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return Model(ARCHITECTURE).initialise(0).state_dict()


@pytest.fixture
def bundle(tmp_path, state) -> Path:
    folder = tmp_path / "b"
    write_bundle(folder, "w8a8", state, ARCHITECTURE, TinyTokenizer())
    return folder


def test_coverage_of_nothing_is_no_coverage(bundle, state):
    entries, checks = check_coverage({}, bundle)
    assert not entries and all(map(gate.refuses, checks))
    name = "model.layers.0.self_attn.o_proj.weight"
    broken = state | {name: torch.full_like(state[name], math.nan)}
    for compensated in ({}, {name.removesuffix(".weight"): torch.ones(4, state[name].shape[1])}):
        assert any(map(gate.refuses, check_coverage(broken, bundle, compensated=compensated)[1]))


def test_a_configuration_without_a_source_is_unknown_and_a_risk_of_the_chip_is_a_caution(bundle):
    (first, *_) = lint_config(bundle)
    assert first.outcome == "unknown" and gate.refuses(first)
    risks = [check for check in lint_config(bundle, ARCHITECTURE, "ascend-910b-313t") if check.outcome != "pass"]
    assert {check.outcome for check in risks} == {"caution"} and not any(map(gate.refuses, risks))


@pytest.fixture
def ended(monkeypatch, capsys):
    """Runs the command line as a user does: the exit code, and what stands on stderr."""
    monkeypatch.setattr("signal.signal", lambda *_: None)

    def run(*words: object) -> tuple[object, str]:
        monkeypatch.setattr("sys.argv", ["isthmus", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code, capsys.readouterr().err

    return run


def finding(layer: str, outcome: str) -> Check:
    return Check.model_validate({"layer": layer, "name": "a question", "outcome": outcome, "detail": "no answer"})


@pytest.mark.parametrize("layer", LAYERS)
def test_no_layer_may_be_unknown(layer, bundle):
    checks = [finding(layer, "pass"), finding(layer, "caution")]
    assert judge(checks, target="cpu", rehearsed=False, started=0.0).verdict == "pass"
    for outcome in ("unknown", "fail"):
        assert judge([*checks, finding(layer, outcome)], target="cpu", rehearsed=False, started=0.0).verdict == "refuse"
        with pytest.raises(GateRefused, match="a question: no answer"):
            write_seal(bundle, verdict="pass", checks=[finding(layer, outcome)])
    passing = judge(checks, target="cpu", rehearsed=False, started=0.0)
    write_verdict(bundle, passing.model_copy(update={"checks": [*checks, finding(layer, "unknown")]}))
    with pytest.raises(GateRefused, match="a question: no answer"):
        write_seal(bundle, verdict="pass")
    assert not (bundle / "seal.json").exists()


@pytest.mark.parametrize("layer", LAYERS)
def test_verify_seals_nothing_that_a_layer_could_not_tell(layer, bundle, ended, monkeypatch):
    checks = [finding("files", "pass"), finding(layer, "unknown")]
    found = judge(checks, target="cpu", rehearsed=False, started=0.0)
    monkeypatch.setattr(verify, "verify_bundle", lambda *_args, **_options: found)
    code, told = ended("verify", bundle)
    assert code == 1 and "a question: no answer" in told
    said = read_verdict(bundle)
    assert said is not None and said.verdict == "refuse" and not (bundle / "seal.json").exists()


def test_verify_with_one_golden_sequence_ends_with_1_and_without_a_seal(bundle, state, ended):
    entries, _ = check_coverage(state, bundle)
    capture(bundle, state, [list(range(2, 14))])
    write_manifest(bundle, coverage=entries, architecture=ARCHITECTURE)
    code, told = ended("verify", bundle, "--device", "cpu")
    assert code == 1 and "not shown to be within" in told
    said = read_verdict(bundle)
    assert said is not None
    assert [c.name for c in said.checks if c.outcome != "pass"] == [COST, DISTANCE, LOSS]
    assert not (bundle / "seal.json").exists()


@pytest.mark.parametrize("checks", [[], [finding("modules", "caution")]], ids=["nothing", "a caution"])
def test_what_shows_nothing_does_not_pass(checks, bundle):
    assert judge(checks, target="cpu", rehearsed=False, started=0.0).verdict == "refuse"
    with pytest.raises(GateRefused, match="check passed"):
        write_seal(bundle, verdict="pass", checks=checks)


def test_a_seal_on_a_doubt_is_no_seal(bundle, monkeypatch):
    found = [finding("files", "pass"), finding("tokens", "unknown")]
    write_verdict(
        bundle,
        judge(found[:1], target="cpu", rehearsed=False, started=0.0).model_copy(update={"checks": found}),
    )
    with monkeypatch.context() as patch:
        patch.setattr("isthmus.parity.seal.shows_enough", lambda _checks: True)
        write_seal(bundle, verdict="pass", checks=found)
    assert standing(bundle).state == "refused"


def captured(bundle: Path, state: dict[str, torch.Tensor]) -> Path:
    entries, _ = check_coverage(state, bundle)
    capture(bundle, state, synthetic_prompts(ARCHITECTURE.vocab_size, 8, 10), CaptureOptions(synthetic=True))
    write_manifest(bundle, coverage=entries, architecture=ARCHITECTURE)
    return bundle


@pytest.mark.parametrize("layer", ["coverage", "tokens", "engine", "task"])
def test_verify_does_not_seal_what_another_gate_refused_and_it_cannot_look_at(layer, bundle, state, ended):
    refused = judge([finding(layer, "fail")], target="the pool away", rehearsed=False, started=0.0)
    write_verdict(captured(bundle, state), refused)
    code, told = ended("verify", bundle, "--device", "cpu")
    assert code == 1 and "found on the pool away, not looked at again" in told
    assert not (bundle / "seal.json").exists()


def test_verify_looks_again_at_modules_and_seals_what_is_mended(bundle, state, ended):
    refused = judge([finding("modules", "fail")], target="a broken target", rehearsed=False, started=0.0)
    write_verdict(captured(bundle, state), refused)
    assert not ended("verify", bundle, "--device", "cpu")[0]
    assert (bundle / "seal.json").exists()


def test_an_output_that_is_no_number_is_refused_with_the_module(bundle, state):
    """The healthy twin of such a bundle has no number either: what it costs is not granted."""
    name = "model.layers.1.self_attn.o_proj"
    values = state[f"{name}.weight"].clone()
    values[0, 0] = math.nan
    write_bundle(bundle, "bf16", state | {f"{name}.weight": values}, ARCHITECTURE, TinyTokenizer())
    found = verify_bundle(captured(bundle, state), limits=Limits())
    assert found.verdict == "refuse"
    assert {check.outcome for check in found.checks if check.layer == "tokens"} == {"fail"}


def test_a_refusal_says_what_was_found_and_where_the_fault_is():
    failed = kl(tokens(0.03, (0.002, 0.09)))
    text = refusal("it is refused.", [failed, kl(tokens(0.005, (0.002, 0.02))), finding("config", "caution")], "m", "o")
    first, outside, between, last = text.splitlines()
    assert first == "it is refused." and last == "The fault is in m, operator o."
    assert "0.03 [0.002, 0.09] nats/token (measured) is outside the limit 0.01" in outside
    assert "0.005 [0.002, 0.02] nats/token (measured) is not shown to be within the limit 0.01" in between


def test_the_table_shows_every_check_and_why_one_did_not_pass():
    rows = [shown(check) for check in (finding("config", "caution"), kl(tokens(0.03, (0.002, 0.09))))]
    assert rows[0]["found"] == "no answer" and str(rows[1]["found"]).endswith("; because")
    page = printed(check_list("parity", rows))
    assert all(part in page for part in ("caution", "config", "a question", "no answer", "fail", "because"))


def test_the_summary_counts_what_passed_and_shows_what_it_cost_and_what_did_not_pass():
    passed = [finding("modules", "pass").model_copy(update={"name": f"quiet {number}"}) for number in range(12)]
    cost = kl(tokens(0.001, (0.0005, 0.002))).model_copy(update={"name": f"bf16: {COST}"})
    unsure = finding("tokens", "unknown").model_copy(update={"name": "a doubt"})
    page = printed(check_summary("parity", [*passed, cost, finding("config", "caution"), unsure], "runs/x"))
    assert "12 of modules" in page and "quiet" not in page
    assert COST in page and "0.001" in page and "a doubt" in page
    assert "caution: known" in page and "unknown: not enough" in page and "isthmus inspect runs/x" in page
    assert "unknown: not enough" not in printed(check_summary("parity", passed, "runs/x"))


@pytest.mark.parametrize("logprobs", [[math.nan, -1.0], [-0.5, math.nan]])
def test_a_canary_that_gets_no_number_has_drifted(logprobs):
    golden = GoldenAnswer(prompt=[1], tokens=[4, 5], logprobs=[-0.5, -1.0], margins=[0.01, 0.01])
    for written in ([4, 5], [4, 6]):
        assert drift_of(golden, Finished(0, written, logprobs, [], "length", 0, 0, 0.0, 0.0)) == math.inf
