"""Thresholds: a small language, rules that make sense, and what they say about figures."""

from __future__ import annotations

import csv
import dataclasses
import re
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.chips import load_chips
from isthmus.errors import IsthmusError
from isthmus.pools import get_pool
from isthmus.probes import live_probes, pilots
from isthmus.probes.contract import Setting
from isthmus.probes.findings import Findings
from isthmus.probes.judge import thresholds
from isthmus.probes.judge.thresholds import (
    METRICS,
    Rule,
    apply_thresholds,
    check_sanity,
    load_thresholds,
    package_thresholds,
    read_rules,
)
from isthmus.recipe.read import load_recipe
from isthmus.run import Figure
from tests.support.flow_recipe import RECIPE

CHIPS = load_chips()
UPSTREAM = list(csv.DictReader((Path(__file__).parent / "upstream_floors.csv").read_text().splitlines()))
HEADER = "chip,metric,ranks,at_least,rule,conditions,source"


def rules(*lines: str) -> tuple[Rule, ...]:
    return read_rules("\n".join([HEADER, *lines]), "own.csv", CHIPS)


def measured(value: float | None, unit: str = "GB/s", low: float | None = None, high: float | None = None) -> Figure:
    return Figure(value=value, unit=unit, kind="measured", source="a test", low=low, high=high)


UNJUDGED = [("mi308x", "matmul_fp8_tflops"), ("mi308x", "matmul_int8_tops")]


def absolute() -> list[Rule]:
    return [rule for rule in package_thresholds() if not rule.relative]


# The language.


@pytest.mark.parametrize(
    ("metric", "text", "expected"),
    [
        ("memory_gbs", ">= 2212500 MB/s", (">=", 2212.5, False)),
        ("memory_gbs", ">= 2.2125 TB/s", (">=", 2212.5, False)),
        ("all_reduce_bus_gbs", ">=400 Gb/s", (">=", 50.0, False)),
        ("matmul_bf16_tflops", ">= 6e5 GFLOPS", (">=", 600.0, False)),
        ("latency_8k_p99_us", "<= 0.04 ms", ("<=", 40.0, False)),
        ("step_s", "<= 2 x peers' median", ("<=", 2.0, True)),
        ("memory_gbs", ">= 0.75 x peers' median", (">=", 0.75, True)),
    ],
)
def test_a_rule_is_read_in_the_unit_of_its_metric(metric: str, text: str, expected: tuple[str, float, bool]):
    (rule,) = rules(f"*,{metric},,,{text},,a test")
    assert (rule.direction, pytest.approx(rule.value), rule.relative) == expected


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("h100-sxm,memory_gbs,,,__import__('os').abort(),,x", r"is not a rule; write `>= 228 GB/s`"),
        ("h100-sxm,memory_gbs,,,> 2000 GB/s,,x", "is not a rule"),
        ("h100-sxm,memory_gbs,,,>= nan GB/s,,x", "is not a rule"),
        ("h100-sxm,memory_gbs,,,>= -3 GB/s,,x", "is not a rule"),
        ("h100-sxm,memory_gbs,,,>= 2000,,x", "is not a rule"),
        ("h100-sxm,memory_gbs,,,>= 0 GB/s,,x", "holds for every chip, or for none"),
        ("h100-sxm,memory_gbs,,,>= 20 TFLOPS,,x", "the unit 'TFLOPS' does not fit; write one of MB/s, GB/s"),
        ("h100-sxm,memory_gb,,,>= 20 GB/s,,x", "unknown metric 'memory_gb'; did you mean 'memory_gbs'"),
        ("h100,memory_gbs,,,>= 20 GB/s,,x", "unknown chip 'h100'"),
        ("h100-sxm,memory_gbs,,,>= 2000 GB/s,,", "has no source"),
        ("h100-sxm,all_reduce_bus_gbs,many,,>= 2000 GB/s,,x", "ranks must be a number above 0, or empty, not 'many'"),
        ("h100-sxm,all_reduce_bus_gbs,1.5,,>= 2000 GB/s,,x", "ranks must be a whole number"),
        ("h100-sxm,latency_8k_p99_us,,3,<= 20 us,,x", "has no size"),
    ],
)
def test_a_wrong_line_is_refused_with_its_place_and_what_to_write(line: str, why: str):
    with pytest.raises(IsthmusError, match=rf"own.csv:2: .*{why}"):
        rules(line)


def test_a_file_of_another_kind_is_refused(tmp_path: Path):
    with pytest.raises(IsthmusError, match="its first line must be chip,metric,ranks"):
        read_rules("a,b\n1,2\n", "own.csv", CHIPS)
    with pytest.raises(IsthmusError, match="cannot be read"):
        load_thresholds(tmp_path / "absent.csv")


# Sanity.


def test_every_rule_of_the_package_makes_sense_and_has_a_source():
    assert check_sanity(package_thresholds(), CHIPS) == []
    assert all(rule.source for rule in package_thresholds())


def test_of_the_floors_published_for_known_chips_exactly_the_slips_are_found():
    lines = [f"{row['chip']},memory_gbs,,,>= {row['mb_s']} MB/s,id {row['id']},{row['source']}" for row in UPSTREAM]
    flagged = {one.partition(" on ")[0]: one for one in check_sanity(rules(*lines), CHIPS)}
    assert set(flagged) == {f"memory_gbs >= {value} GB/s" for value in ("137.5", "122.25", "2.333")}
    slip = flagged["memory_gbs >= 2.333 GB/s"]
    assert "no plausible chip fails it: plausible is 960 to 4,800 GB/s, from 4,800 GB/s declared for h200-sxm" in slip
    assert "own.csv:" in slip and "diag-skus.yaml.in" in slip


def test_memory_floors_of_the_package_are_those_published():
    published = {row["id"]: float(row["mb_s"]) / 1000 for row in UPSTREAM}
    ours = [rule for rule in absolute() if rule.metric == "memory_gbs"]
    assert len(ours) == 7
    for rule in ours:
        (sku,) = re.findall(r"0.75 x one measurement; .*?id (\w+)", rule.conditions)
        assert rule.value == published[sku]


@pytest.mark.parametrize("rule", [one for one in absolute() if (one.chip, one.metric) not in UNJUDGED], ids=str)
@pytest.mark.parametrize("factor", [1000.0, 1 / 1000])
def test_a_slip_of_the_unit_in_any_rule_is_found(rule: Rule, factor: float):
    slipped = dataclasses.replace(rule, value=rule.value * factor)
    (problem,) = check_sanity([slipped], CHIPS, beside=package_thresholds())
    assert ("no plausible chip passes it" if factor > 1 else "no plausible chip fails it") in problem
    assert rule.source in problem and str(slipped) in problem


def test_two_rules_of_the_mi308x_alone_nobody_can_judge():
    """No fact is declared of it that they could be held against, and no other chip has a rule of their kind."""
    beside = package_thresholds()
    slipped = [dataclasses.replace(rule, value=rule.value * 1000) for rule in absolute()]
    silent = [rule for rule in slipped if check_sanity([rule], CHIPS, beside=beside) == []]
    assert [(rule.chip, rule.metric) for rule in silent] == UNJUDGED


def test_a_floor_above_the_declared_peak_is_found_and_one_below_is_not():
    peak = CHIPS["h100-sxm"].mem_bw_gbs
    assert peak is not None and peak.value == 3350
    (problem,) = check_sanity(rules("h100-sxm,memory_gbs,,,>= 3351 GB/s,,x"), CHIPS)
    assert "no plausible chip passes it" in problem and "3,350 GB/s declared for h100-sxm" in problem
    assert check_sanity(rules("h100-sxm,memory_gbs,,,>= 3349 GB/s,,x"), CHIPS) == []


def test_links_are_judged_by_what_the_ranks_can_use():
    assert check_sanity(rules("h100-sxm,all_reduce_bus_gbs,8,,>= 480 GB/s,added up in the switch,x"), CHIPS) == []
    assert len(check_sanity(rules("h100-sxm,all_gather_bus_gbs,8,,>= 480 GB/s,,x"), CHIPS)) == 1
    assert check_sanity(rules("mi300x,peer_copy_gbs,,,>= 44 GB/s,one link of seven,x"), CHIPS) == []
    assert len(check_sanity(rules("h100-sxm,peer_copy_gbs,,,>= 44 GB/s,through a switch,x"), CHIPS)) == 1
    assert check_sanity(rules("h100-sxm,all_reduce_bus_gbs,64,,>= 40 GB/s,through the network,x"), CHIPS) == []
    assert len(check_sanity(rules("h100-sxm,all_reduce_bus_gbs,8,,>= 40 GB/s,inside a node,x"), CHIPS)) == 1


def test_a_rule_for_any_chip_must_tell_some_of_them_apart():
    assert check_sanity(rules("*,memory_gbs,,,>= 2000 GB/s,,x"), CHIPS) == []
    assert len(check_sanity(rules("*,memory_gbs,,,>= 5 GB/s,,x"), CHIPS)) == 1
    assert len(check_sanity(rules("*,memory_gbs,,,>= 5000000 GB/s,,x"), CHIPS)) == 1


@pytest.mark.parametrize(
    ("rule", "why"),
    [
        (">= 1.2 x peers' median", "the median chip itself fails"),
        (">= 0.01 x peers' median", "no plausible chip fails it"),
        ("<= 0.9 x peers' median", "the median chip itself fails"),
        ("<= 50 x peers' median", "no plausible chip fails it"),
    ],
)
def test_multiples_of_the_median_that_none_or_all_pass_are_found(rule: str, why: str):
    (problem,) = check_sanity(rules(f"*,step_s,,,{rule},,x"), CHIPS)
    assert why in problem


def test_a_floor_above_a_ceiling_is_found():
    pair = rules("h20,memory_gbs,,,>= 2000 GB/s,,x", "h20,memory_gbs,,,<= 1500 GB/s,,y")
    (problem,) = check_sanity(pair, CHIPS)
    assert "none passes this and" in problem


def test_where_nothing_is_declared_other_chips_rules_are_the_measure():
    lone = rules("ascend-910b-313t,host_device_gbs,,,>= 0.02 GB/s,,x")
    assert check_sanity(lone, CHIPS) == []
    (problem,) = check_sanity(lone, CHIPS, beside=package_thresholds())
    assert "other chips' thresholds are about 48 GB/s" in problem


def test_the_constants_hold_for_the_tables():
    singles = [chip for slug, chip in CHIPS.items() if slug != "cloudmatrix384"]
    for name in ("bf16_tflops", "fp8_tflops", "int8_tops", "mem_bw_gbs", "scaleup_gbs_uni"):
        known = [figure.value for chip in singles if (figure := getattr(chip, name)) and figure.value]
        middle = statistics.median(known)
        assert max(middle / min(known), max(known) / middle) < thresholds.MOST_APART
    peaks = {slug: chip.mem_bw_gbs.value for slug, chip in CHIPS.items() if chip.mem_bw_gbs}
    shares = sorted(float(row["mb_s"]) / 1000 / peaks[row["chip"]] for row in UPSTREAM)
    assert [round(one, 4) for one in shares[:3]] == [0.0005, 0.0365, 0.0674]
    assert round(shares[3], 2) == 0.33


def test_a_file_that_makes_no_sense_is_refused_with_all_that_is_wrong(tmp_path: Path):
    path = tmp_path / "own.csv"
    path.write_text(
        f"{HEADER}\nh200-sxm,memory_gbs,,,>= 2333 MB/s,,slip\nh20,memory_gbs,,,>= 9 TB/s,,dream\n"
        "h20,matmul_bf16_tflops,,,>= 100 TFLOPS,,fine\n"
    )
    with pytest.raises(IsthmusError, match=r"(?s)make no sense.*source: slip.*source: dream") as caught:
        load_thresholds(path)
    assert "fine" not in str(caught.value)


def test_a_file_takes_the_place_of_the_packages_rules_it_names(tmp_path: Path):
    path = tmp_path / "own.csv"
    path.write_text(f"{HEADER}\nh20,memory_gbs,,,>= 3000 GB/s,measured here,our pool\n")
    own = load_thresholds(path)
    assert [rule.value for rule in own if (rule.chip, rule.metric) == ("h20", "memory_gbs")] == [3000]
    assert len(own) == len(load_thresholds()) == len(package_thresholds())


# Applying.


def test_figures_of_a_chip_are_judged_by_its_rules():
    own = rules("h20,memory_gbs,,,>= 3000 GB/s,copy,ours", "h100-sxm,memory_gbs,,,>= 2500 GB/s,copy,ours")
    (good,) = apply_thresholds({"memory_gbs": measured(3200)}, "h20", own).evidence
    (bad,) = apply_thresholds({"memory_gbs": measured(2800)}, "h20", own).evidence
    (other,) = apply_thresholds({"memory_gbs": measured(2800)}, "h100-sxm", own).evidence
    assert (good.outcome, bad.outcome, other.outcome) == ("pass", "fail", "pass")
    assert (bad.aspect, bad.needed_for, bad.name) == ("compute", "both", "threshold: memory_gbs >= 3,000 GB/s")
    assert "2,800 GB/s (measured)" in bad.detail and "3,000 GB/s (declared)" in bad.detail and "ours" in bad.detail
    assert bad.figures["memory_gbs_threshold"].value == 3000
    assert apply_thresholds({"matmul_tflops": measured(1, "TFLOPS")}, "h20", own) == ([], {})


@given(
    value=st.floats(1e-3, 1e6),
    wide=st.floats(0, 1),
    limit=st.floats(1e-2, 1e5),
    floor=st.booleans(),
    milli=st.booleans(),
)
def test_an_interval_passes_or_fails_only_as_a_whole(value: float, wide: float, limit: float, floor: bool, milli: bool):
    low, high = value * (1 - wide / 2), value * (1 + wide / 2)
    unit, scale = ("ms", 1e-3) if milli else ("us", 1.0)
    figure = measured(value * scale, unit, low * scale, high * scale)
    rule = dataclasses.replace(
        rules("*,latency_8k_p99_us,,,<= 1 us,,x")[0], value=limit, direction=">=" if floor else "<="
    )
    (found,) = apply_thresholds({"latency_8k_p99_us": figure}, "cpu", [rule]).evidence
    shift = 1000.0 if milli else 1.0
    inside = [sample * scale * shift for sample in (low, value, high)]
    keeps = [one >= limit if floor else one <= limit for one in inside]
    assert found.outcome == ("pass" if all(keeps) else "unknown" if keeps[0] or keeps[2] else "fail")


def test_an_unknown_figure_is_not_a_pass():
    (found,) = apply_thresholds(
        {"memory_gbs": measured(None)}, "h20", rules("h20,memory_gbs,,,>= 3000 GB/s,,x")
    ).evidence
    assert found.outcome == "unknown"


def test_a_rehearsed_figure_says_nothing_about_the_chip_but_is_compared_with_its_peers():
    figure = Figure.measured(1.0, "GB/s", "a rehearsal", rehearsed=True)
    own = rules("h20,memory_gbs,,,>= 3000 GB/s,,x", "*,memory_gbs,,,>= 0.75 x peers' median,,x")
    (found,), aside = apply_thresholds({"memory_gbs": figure}, "h20", own, peers={"memory_gbs": [2.0, 2.1, 1.9]})
    assert found.outcome == "fail" and found.figures["memory_gbs_threshold"].kind == "rehearsed"
    assert found.figures["memory_gbs_threshold"].value == pytest.approx(1.5)
    ((reason, left),) = aside.items()
    assert "the figure is rehearsed" in reason and left == [own[0]]


def test_a_rule_holds_only_under_its_conditions():
    own = rules("h100-sxm,all_reduce_bus_gbs,8,16384,>= 460 GB/s,,x")
    figures = {"all_reduce_bus_gbs": measured(100)}
    (found,), aside = apply_thresholds(figures, "h100-sxm", own, ranks=8, sizes={"all_reduce_bus_gbs": 16384})
    assert not aside
    assert found.outcome == "fail"
    for other, why in [
        ({"ranks": 4, "sizes": {"all_reduce_bus_gbs": 16384}}, "the figure is of 4 ranks"),
        ({"sizes": {"all_reduce_bus_gbs": 16384}}, "an unknown number of ranks"),
        ({"ranks": 8, "sizes": {"all_reduce_bus_gbs": 64}}, "from 16384 MiB on each rank, and the figure is of 64"),
        ({"ranks": 8}, "of unknown size"),
    ]:
        evidence, aside = apply_thresholds(figures, "h100-sxm", own, **other)
        assert evidence == [] and list(aside.values()) == [list(own)]
        assert why in next(iter(aside))


def test_a_median_needs_peers():
    own = rules("*,step_s,,,<= 2 x peers' median,,x")
    slow = {"step_s": measured(2.5, "s")}
    (found,) = apply_thresholds(slow, "cpu", own, peers={"step_s": [1.0, 1.1, 0.9]}).evidence
    assert (found.outcome, found.aspect) == ("fail", "stability")
    for few, known in (({}, 1), ({"step_s": [1.0]}, 2)):
        evidence, aside = apply_thresholds(slow, "cpu", own, peers=few)
        assert evidence == [] and list(aside.values()) == [list(own)]
        assert f"from 3 chips of known rate on (here {known})" in next(iter(aside))


def test_who_compares_peers_where_a_rule_cannot_is_a_probe_that_does():
    """The one that is named for a metric exists, asks several ranks, and looks for what is slow."""
    probes = {probe.name: probe for probe in live_probes()}
    for name, metric in METRICS.items():
        figure = measured(1.0, metric.unit)
        direction = "<=" if metric.unit in ("us", "s") else ">="
        own = rules(f"*,{name},,,{direction} {'2' if direction == '<=' else '0.75'} x peers' median,,x")
        (reason,) = apply_thresholds({name: figure}, "cpu", own).aside
        told = probes[re.findall(r"the probe `([a-z ]+)` looks", reason)[0]]
        assert told.min_ranks > 1 and {"slow-rank", "slow-link"} & {*told.finds}


def test_a_pool_is_told_which_thresholds_say_nothing_about_it_each_reason_once(tmp_path: Path):
    recipe = load_recipe(RECIPE, ("pools.home.ranks=2",))
    setting = Setting(recipe, get_pool(recipe, "home"), CHIPS["cpu"], None, "cpu", tmp_path, tmp_path)
    found = Findings(setting)
    found.figures |= {"memory_gbs": measured(10.0), "matmul_tflops": measured(1.0, "TFLOPS")}
    pilots.hold_against_thresholds(found, {"memory_gbs": 64.0, "matmul_tflops": 512.0})
    (aside,) = found.evidence
    assert (aside.name, aside.outcome, aside.samples) == ("thresholds left aside", "pass", 2)
    assert aside.detail.count("the probe `stragglers` looks for what is slower than the rest") == 1
    assert "memory_gbs >= 0.75 x peers' median" in aside.detail and "matmul_tflops >= 0.75" in aside.detail


def test_the_field_rules_find_a_chip_below_three_quarters_of_its_peers():
    peers = {"memory_gbs": [100.0, 101.0, 99.0]}
    for value, outcome in [(76.0, "pass"), (74.0, "fail")]:
        (found,) = apply_thresholds({"memory_gbs": measured(value)}, "cpu", load_thresholds(), peers).evidence
        assert found.outcome == outcome


def test_every_metric_has_a_known_unit_and_every_declared_fact_exists():
    for name, metric in METRICS.items():
        assert rules(f"*,{name},,,>= 5 {metric.unit},,a test")[0].value == 5.0, name
        assert metric.declared is None or metric.declared in CHIPS["h100-sxm"].figures()
