"""Dated export rules: the arithmetic against an oracle, each record by cases that it is about and that it is not."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from datetime import date
from importlib import resources
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from isthmus.chips import get_chip, load_chips
from isthmus.chips.trade import EFFECTS, TradeRecord, trade_facts
from isthmus.cli import cli
from isthmus.errors import GateRefused, IsthmusError
from isthmus.recipe.read import load_recipe
from isthmus.records import PlanRecord, Ruling
from isthmus.rules import Amount, Buyer, any_holds, judge, memory_bandwidth_density, notice, numbers_of
from isthmus.rules.conditions import either, every
from isthmus.run import RunFolder
from isthmus.stages import plan, report
from isthmus.tools import rules
from tests.support.flow_recipe import RECIPE
from tests.support.printed import printed
from tests.unit.test_plan import quiet, run_with, verdict

TODAY = date(2026, 6, 10)
AWAY = "ascend-910b-313t"


def rows() -> dict[str, dict[str, str]]:
    text = (resources.files("isthmus.chips") / "chips.csv").read_text(encoding="utf-8")
    return {row["slug"]: row for row in csv.DictReader(text.splitlines())}


def number(text: str) -> float | None:
    return float(text) if text else None


def oracle_tpp(row: dict[str, str], prefix: str = "") -> float | None:
    columns = {"bf16_tflops": 16, "fp8_tflops": 8, "int8_tops": 8, "fp4_tflops": 4}
    products = [float(text) * bits for column, bits in columns.items() if (text := row.get(prefix + column, ""))]
    return max(products, default=None)


def oracle_class(tpp: float | None, density: float | None) -> str:
    """ECCN 3A090.a and .b as they are printed, for chips of which both numbers, or a sufficient one, are known."""
    if tpp is None:
        return "unknown"
    if tpp >= 4800:
        return "3A090.a"
    if tpp < 1600:
        return "below 3A090"
    if density is None:
        return "unknown"
    if density >= 5.92:
        return "3A090.a"
    return "3A090.b" if density >= 3.2 or (tpp >= 2400 and density >= 1.6) else "below 3A090"


@pytest.mark.parametrize("slug", [slug for slug in rows() if slug != "cloudmatrix384"])
def test_the_class_of_every_chip_is_recomputed_from_its_facts(slug: str):
    row = rows()[slug]
    found = judge(slug, Buyer("CN", "CN"), TODAY)
    steps = {step.name: step for step in found.steps}
    tpp, area = oracle_tpp(row), number(row["die_mm2"])
    density = None if tpp is None or area is None else tpp / area
    assert (steps["tpp"].value, steps["pd"].value) == (tpp, density)
    assert steps["tpp"].low == (None if tpp is not None else oracle_tpp(row, "floor_"))
    assert found.export_class == oracle_class(tpp, density) == (row["eccn_calc"].split(" (")[0] or "unknown")
    if tpp is not None and row["tpp"]:
        assert tpp == pytest.approx(float(row["tpp"]), abs=0.5)
    if density is not None:
        assert density == pytest.approx(float(row["pd"]), abs=0.01)
    if row["vendor"] in ("NVIDIA", "AMD") and found.export_class == "3A090.a":
        inside = tpp is not None and tpp < 21000 and float(row["mem_bw_gbs"]) < 6500
        assert found.window == row["h200_2026_window"] == ("inside" if inside else "outside")
    else:
        assert found.window == ("unknown" if slug == "mi308x" else "none") and not row["h200_2026_window"]


@pytest.mark.parametrize(
    ("slug", "tpp", "density"),
    [
        ("a100-80gb-sxm", 4992, 6.04),
        ("h100-sxm", 15832, 19.45),
        ("h20", 2368, 2.9),
        ("ascend-910c-752t", 12032, 9.04),
        ("l20", 1912, 3.14),
    ],
)
def test_published_numbers_of_the_chips_that_the_rules_were_written_about(slug: str, tpp: float, density: float):
    amounts = numbers_of(get_chip(slug)).amounts
    assert amounts["tpp"].value == tpp and amounts["pd"].value == pytest.approx(density, abs=0.01)


def test_a_machine_is_classified_by_the_chips_in_it():
    found = judge("cloudmatrix384", Buyer("CN", "CN"), TODAY)
    assert found.export_class == "4A090.a" and found.steps == judge("ascend-910c-752t", Buyer("CN", "CN"), TODAY).steps


def test_memory_in_production_exceeds_the_limit_of_its_own_class():
    assert memory_bandwidth_density(460, 110) > 2 > memory_bandwidth_density(100, 110)


def test_what_is_not_known_is_unknown_in_the_table():
    lines = {line.split()[0]: line.split() for line in class_table().splitlines() if line.split()}
    assert lines["mi308x"][2:] == ["≥", "3,248", "unknown", "unknown", "unknown"]
    assert lines["b200-sxm"][2:] == ["36,000", "unknown", "3A090.a", "outside"]
    assert lines["mlu590"][2:5] == ["unknown", "unknown", "unknown"] and lines["cpu"][1] == "unknown"
    assert set(load_chips()) <= set(lines)


def class_table() -> str:
    result = CliRunner().invoke(cli, ["rules", "--as-of", str(TODAY)])
    assert result.exit_code == 0, result.output
    return result.output


@given(
    low=st.floats(0, 50),
    known=st.booleans(),
    limit=st.sampled_from([10.0, 20.0]),
    sign=st.sampled_from(["<", "<=", ">=", ">"]),
    rest=st.lists(st.floats(0, 100), min_size=1, max_size=8),
)
def test_an_unknown_number_is_never_decided_against_what_it_may_be(low, known, limit, sign, rest):
    """Whatever a floor decides holds for every value that it allows."""
    decided = Amount(low, None).compare(sign, limit) if known else Amount(None, low).compare(sign, limit)
    possible = [low] if known else [low, *(low + more for more in rest)]
    truths = {Amount(value).compare(sign, limit) for value in possible}
    assert decided is None or truths == {decided}
    assert Amount().compare(sign, limit) is None


def test_three_values_are_kleenes():
    assert [every((a, None)) for a in (True, None, False)] == [None, None, False]
    assert [either((a, None)) for a in (True, None, False)] == [True, None, None]
    with pytest.raises(ValueError, match="watts > 3"):
        any_holds(("watts > 3",), {"tpp": Amount(1.0)})


@dataclass(frozen=True)
class Case:
    """A chip, a parent, a site and a day, and what a record makes of them."""

    chip: str
    parent: str
    site: str
    day: str
    effect: str | None
    count: int | None = None
    funded: bool | None = None

    def ruling(self) -> Ruling:
        return judge(self.chip, Buyer(self.parent, self.site, self.count, self.funded), date.fromisoformat(self.day))


CASES: dict[str, list[Case]] = {
    "us-2022-10": [
        Case("a100-80gb-sxm", "CN", "CN", "2022-10-07", "denial"),
        Case("a800-80gb-sxm", "CN", "CN", "2022-10-07", None),
        Case("a100-80gb-sxm", "CN", "MY", "2022-10-07", None),
        Case("a100-80gb-sxm", "CN", "CN", "2023-11-17", None),
    ],
    "us-2023-parent": [
        Case("h800-sxm", "CN", "CN", "2023-11-17", "denial"),
        Case("h800-sxm", "CN", "CN", "2023-11-16", None),
        Case("h200-sxm", "CN", "MY", "2026-06-10", "denial"),
        Case("h200-sxm", "MO", "MO", "2026-06-10", "licence"),
        Case("h200-sxm", "US", "US", "2026-06-10", None),
        Case("h20", "CN", "CN", "2026-06-10", None),
        Case(AWAY, "CN", "CN", "2026-06-10", None),
    ],
    "us-2023-parent-b": [
        Case("mi308x", "CN", "CN", "2026-06-10", "licence"),
        Case("h20", "CN", "CN", "2026-06-10", None),
    ],
    "us-2023-consumer": [
        Case("rtx-4090", "CN", "CN", "2025-01-01", "licence"),
        Case("h100-sxm", "CN", "CN", "2025-01-01", None),
    ],
    "us-2023-site": [
        Case("h100-sxm", "US", "AE", "2026-06-10", "licence"),
        Case("h100-sxm", "US", "CN", "2026-06-10", "licence"),
        Case("h100-sxm", "US", "JP", "2026-06-10", None),
        Case("h100-sxm", "US", "IL", "2026-06-10", None),
        Case("h100-sxm", "CN", "AE", "2026-06-10", None),
    ],
    "us-2024-12-hbm": [
        Case("h20", "CN", "CN", "2024-12-02", "note"),
        Case("l20", "CN", "CN", "2026-06-10", None),
        Case("h20", "CN", "CN", "2024-12-01", None),
    ],
    "us-2025-01-foundry": [
        Case(AWAY, "CN", "CN", "2025-02-01", "note"),
        Case("h20", "CN", "CN", "2025-02-01", None),
    ],
    "us-2025-04-h20": [
        Case("h20", "CN", "MY", "2025-04-09", "licence"),
        Case("h20", "CN", "CN", "2025-04-08", None),
        Case("h20", "US", "US", "2026-06-10", None),
        Case("l20", "CN", "CN", "2026-06-10", None),
    ],
    "us-2025-04-alike": [
        Case("mi308x", "CN", "CN", "2025-04-09", "licence"),
        Case("l20", "CN", "CN", "2026-06-10", None),
        Case("h20", "CN", "CN", "2026-06-10", None),
        Case("h200-sxm", "CN", "CN", "2026-06-10", None),
    ],
    "us-2025-04-mi308": [
        Case("mi308x", "CN", "CN", "2025-04-15", "licence"),
        Case("mi308x", "CN", "CN", "2025-04-14", None),
        Case("mi300x", "CN", "CN", "2025-04-15", None),
    ],
    "us-2025-05-gp10": [
        Case(AWAY, "CN", "CN", "2025-05-13", "licence"),
        Case("ascend-910b1", "DE", "DE", "2026-06-10", "licence"),
        Case("ascend-910c-560t", "CN", "CN", "2026-06-10", "licence"),
        Case(AWAY, "CN", "CN", "2025-05-12", None),
        Case("ascend-950pr", "CN", "CN", "2026-06-10", None),
    ],
    "us-2025-05-gp10-others": [
        Case("ascend-950dt", "CN", "CN", "2026-06-10", "licence"),
        Case("mlu590", "CN", "CN", "2026-06-10", "licence"),
        Case(AWAY, "CN", "CN", "2026-06-10", None),
        Case("h100-sxm", "CN", "CN", "2026-06-10", None),
    ],
    "us-2025-07-promise": [
        Case("h20", "CN", "CN", "2025-07-15", "note"),
        Case("h20", "CN", "CN", "2025-08-11", None),
    ],
    "us-2025-08-share": [
        Case("mi308x", "CN", "CN", "2025-08-11", "note"),
        Case("h200-sxm", "CN", "CN", "2025-08-11", None),
    ],
    "us-2025-11-mi308": [
        Case("mi308x", "CN", "CN", "2025-11-30", "note"),
        Case("h20", "CN", "CN", "2025-11-30", None),
    ],
    "us-2025-12-h200": [
        Case("h200-sxm", "CN", "CN", "2025-12-08", "note"),
        Case("h200-sxm", "CN", "CN", "2026-01-15", None),
    ],
    "us-2026-01-window": [
        Case("h200-sxm", "CN", "CN", "2026-01-15", "licence"),
        Case("mi325x", "CN", "MO", "2026-06-10", "licence"),
        Case("h200-sxm", "CN", "MY", "2026-06-10", None),
        Case("h200-sxm", "RU", "CN", "2026-06-10", None),
        Case("b200-sxm", "CN", "CN", "2026-06-10", None),
        Case("h200-sxm", "CN", "CN", "2026-01-14", None),
    ],
    "us-2026-01-tariff": [
        Case("h200-sxm", "CN", "CN", "2026-01-15", "note"),
        Case("b200-sxm", "CN", "CN", "2026-01-15", None),
    ],
    "us-2026-01-bill": [
        Case("h200-sxm", "CN", "CN", "2026-01-21", "note"),
        Case("h20", "CN", "CN", "2026-01-21", None),
    ],
    "us-2026-05-cap": [
        Case("h200-sxm", "CN", "CN", "2026-05-14", "note"),
        Case("h200-sxm", "CN", "CN", "2026-05-14", "note", count=75000),
        Case("h200-sxm", "CN", "CN", "2026-05-14", "caution", count=75001),
        Case("mi325x", "CN", "CN", "2026-05-14", None, count=75001),
    ],
    "us-2026-05-outside": [
        Case("b200-sxm", "CN", "CN", "2026-05-15", "caution"),
        Case("h200-sxm", "CN", "CN", "2026-05-15", None),
    ],
    "us-2026-05-parent": [
        Case("h200-sxm", "CN", "MY", "2026-05-31", "licence"),
        Case("h200-sxm", "MY", "MY", "2026-05-31", None),
        Case("h200-sxm", "CN", "MY", "2026-05-30", None),
    ],
    "cn-2025-08-explain": [
        Case("h20", "CN", "CN", "2025-08-31", "caution"),
        Case("h20", "US", "CN", "2025-08-31", None),
        Case(AWAY, "CN", "CN", "2025-08-31", None),
    ],
    "cn-2025-11-state": [
        Case("h20", "CN", "CN", "2025-11-05", "caution", funded=True),
        Case("h20", "CN", "CN", "2025-11-05", None, funded=False),
        Case("h20", "CN", "MY", "2025-11-05", None, funded=True),
        Case(AWAY, "CN", "CN", "2025-11-05", None, funded=True),
    ],
    "cn-2026-01-customs": [
        Case("h200-sxm", "CN", "CN", "2026-01-20", "caution"),
        Case("h200-sxm", "CN", "HK", "2026-01-20", None),
    ],
    "cn-2026-01-caps": [
        Case("h20", "CN", "CN", "2026-01-15", "note"),
        Case(AWAY, "CN", "CN", "2026-01-15", None),
    ],
    "cn-2026-01-first": [
        Case("h200-sxm", "CN", "CN", "2026-01-28", "note"),
        Case("h20", "CN", "CN", "2026-01-28", None),
    ],
    "cn-2026-06-pause": [
        Case("h200-sxm", "CN", "CN", "2026-06-05", "caution"),
        Case("mi325x", "CN", "CN", "2026-06-05", None),
    ],
    "cn-2026-06-precedent": [
        Case("ascend-910c-752t", "CN", "CN", "2026-06-05", "note"),
        Case(AWAY, "CN", "CN", "2026-06-05", None),
    ],
}


def test_every_record_has_its_cases():
    assert set(CASES) == {record.id for record in trade_facts().records}


@pytest.mark.parametrize("record", sorted(CASES))
def test_a_record_is_about_what_it_says(record: str):
    for case in CASES[record]:
        found = {one.record: one.effect for one in case.ruling().findings}
        assert found.get(record) == case.effect, case


@pytest.mark.parametrize(
    ("case", "answer"),
    [
        (Case("h200-sxm", "CN", "CN", "2026-06-10", None), "licence"),
        (Case("h200-sxm", "CN", "MY", "2026-06-10", None), "refused"),
        (Case("b200-sxm", "CN", "CN", "2026-06-10", None), "refused"),
        (Case("rtx-4090", "CN", "MY", "2026-06-10", None), "licence"),
        (Case("h800-sxm", "CN", "CN", "2023-01-01", None), "nothing found"),
        (Case("h20", "CN", "CN", "2025-01-01", None), "nothing found"),
        (Case("h100-sxm", "US", "US", "2026-06-10", None), "nothing found"),
        (Case("l20", "CN", "CN", "2026-06-10", None, funded=False), "nothing found"),
        (Case("l20", "CN", "CN", "2026-06-10", None, funded=True), "caution"),
        (Case(AWAY, "CN", "CN", "2026-06-10", None), "licence"),
        (Case("mlu590", "CN", "CN", "2026-06-10", None), "unknown"),
        (Case("cpu", "CN", "CN", "2026-06-10", None), "unknown"),
    ],
)
def test_the_strictest_certain_record_is_the_answer(case: Case, answer: str):
    assert case.ruling().answer == answer


def test_before_the_first_rule_there_is_no_class():
    found = judge("a100-80gb-sxm", Buyer("CN", "CN"), date(2022, 10, 6))
    assert (found.export_class, found.answer, found.findings) == ("no class yet", "nothing found", [])


def test_the_country_of_every_maker_is_known():
    """A machine's own processor has no maker that a record is about."""
    makers = {chip.vendor for slug, chip in load_chips().items() if slug != "cpu"}
    assert makers == set(trade_facts().makers)


def test_a_chip_without_die_area_may_be_what_its_floor_allows():
    found = {one.record: one.certain for one in judge("mi308x", Buyer("CN", "CN"), TODAY).findings}
    assert found["us-2025-04-mi308"] and not found["us-2023-parent"] and not found["us-2023-parent-b"]


def test_what_was_not_looked_at_again_is_stale():
    found = {one.record: one.stale for one in judge("h200-sxm", Buyer("CN", "CN"), date(2026, 9, 1)).findings}
    assert found["us-2026-05-cap"] and not found["us-2026-01-window"]


def test_it_never_calls_itself_current():
    late, early = (judge("h20", Buyer("CN", "CN"), day) for day in (date(2026, 8, 4), date(2026, 1, 1)))
    for said in map(notice, (late, early)):
        assert "not current" in said and "not legal advice" in said and "2026-06-05" in said
    assert "60 days" in notice(late) and "days" not in notice(early)


def record(**changes: object) -> TradeRecord:
    given = trade_facts().records[0].model_dump() | changes
    return TradeRecord.model_validate(given)


@pytest.mark.parametrize(("kind", "most"), [("letter", 3), ("guidance", 2), ("press", 1), ("reported", 1)])
def test_the_press_warns_and_only_a_rule_or_a_letter_refuses(kind: str, most: int):
    assert record(kind=kind, effect=EFFECTS[most]).effect == EFFECTS[most]
    for effect in EFFECTS[most + 1 :]:
        with pytest.raises(ValidationError, match=f"kind {kind} cannot ask for {effect}"):
            record(kind=kind, effect=effect)


def test_every_record_is_dated_has_a_source_and_names_things_that_exist():
    facts, ids = trade_facts(), [one.id for one in trade_facts().records]
    assert len(ids) == len(set(ids)) and set(facts.machines) | set(facts.machines.values()) <= set(load_chips())
    for one in facts.records:
        assert one.since <= facts.ends and one.as_of <= facts.ends and one.what_zh != one.what
        assert set(one.relaxes) <= set(ids)
        named = facts.countries((*one.parents, *one.sites, *one.not_parents, *one.not_sites))
        assert all(len(code) == 2 for code in named), f"{one.id} names a group that is not there"
        assert not one.classes or set(one.classes) <= {"below 3A090", *(klass.name for klass in facts.classes)}


@pytest.mark.parametrize(("code", "answer"), [("UK", "GB"), ("EU", "one country"), ("China", "two letters")])
def test_what_is_no_country_is_an_error_that_says_what_to_write(code: str, answer: str):
    with pytest.raises(IsthmusError, match=answer):
        judge("h20", Buyer(code, "CN"), TODAY)
    with pytest.raises(IsthmusError, match="site"):
        judge("h20", Buyer("cn", code), TODAY)


def test_the_command_as_json_and_its_exit_code():
    asked = ["--as-of", "2026-06-10", "--buyer-parent", "cn", "--site", "my", "--json"]
    refused = CliRunner().invoke(cli, ["rules", "b200-sxm", *asked])
    said = json.loads(refused.output)
    assert refused.exit_code == 1 and said["answer"] == "refused" and "not legal advice" in said["notice"]
    assert (said["buyer_parent"], said["site"]) == ("CN", "MY")
    assert CliRunner().invoke(cli, ["rules", "h20", *asked]).exit_code == 0


def test_a_ruling_as_a_person_reads_it():
    text = printed(rules.render(judge("h20", Buyer("CN", "CN"), TODAY)))
    assert "148 x 16 (bf16) = 2,368" in text and "2,368 / 814 mm2 = 2.909" in text and "us-2025-04-h20" in text
    assert "Form 8-K" in text and "letter" in text and "not legal advice" in text


def test_a_chip_needs_a_buyer():
    result = CliRunner().invoke(cli, ["rules", "h20", "--as-of", "2026-06-10"])
    assert isinstance(result.exception, IsthmusError) and "--buyer-parent" in str(result.exception)


RULES = ("rules.as_of=2026-06-10", 'rules.buyer_parent="CN"', 'rules.site="CN"')


def planned(path: Path, *overrides: str) -> PlanRecord:
    chosen = load_recipe(RECIPE, overrides)
    run = run_with(path, chosen, verdict("home", "fit"), verdict("away", "serve-only", rehearsed=True))
    return plan.execute(run, quiet())


def test_a_plan_says_what_was_not_looked_at(tmp_path: Path):
    record = planned(tmp_path)
    assert record.rulings is None and "rules were not looked at" in " ".join(printed(plan.render(record)).split())


def test_a_plan_warns_of_what_needs_a_licence(tmp_path: Path):
    record = planned(tmp_path, *RULES)
    assert record.rulings is not None and record.rulings["away"].answer == "licence"
    reason = next(one.reason for one in record.placements if one.stage == "serve")
    assert "it needs a licence or an authorisation" in reason and "us-2025-05-gp10" in reason
    assert "not legal advice" in printed(plan.render(record)).replace("\n", " ")


def test_the_dossier_shows_what_binds_a_pool(tmp_path: Path):
    planned(tmp_path, *RULES)
    page = report.compose(report.read_dossier(RunFolder.open(tmp_path / "run")))
    assert "licence by guidance <code>us-2025-05-gp10</code>" in page and "not legal advice" in page


BLACKWELL = ('pools.away.chip="b200-sxm"', *RULES)


def test_a_plan_refuses_what_a_rule_forbids(tmp_path: Path):
    with pytest.raises(GateRefused, match=r"(?s)place\.rollout.*away \(cpu\).*us-2023-parent.*rules\.licences"):
        planned(tmp_path, *BLACKWELL)


def test_a_forbidden_pool_loses_to_one_that_is_allowed(tmp_path: Path):
    both = ('place.rollout=["away", "home"]', 'place.serve=["away", "home"]')
    record = planned(tmp_path, *BLACKWELL, *both)
    assert record.pool_of("serve") == "home"
    assert "a rule forbids it" in next(one.reason for one in record.rejected if one.stage == "serve")


def test_a_licence_in_hand_is_taken_at_the_buyers_word_and_said_so(tmp_path: Path):
    record = planned(tmp_path, *BLACKWELL, 'rules.licences={away="D1234567"}')
    reason = next(one.reason for one in record.placements if one.stage == "serve")
    assert record.pool_of("serve") == "away" and "'D1234567', which is not checked" in reason


def test_a_pool_can_stand_elsewhere(tmp_path: Path):
    record = planned(tmp_path, 'pools.away.chip="h200-sxm"', *RULES)
    assert record.pool_of("serve") == "away"
    with pytest.raises(GateRefused, match="at MY"):
        planned(tmp_path / "abroad", 'pools.away.chip="h200-sxm"', *RULES, 'rules.sites={away="MY"}')


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        ('rules.sites={afar="MY"}', "names the pool 'afar'; the recipe has"),
        ('rules.as_of="June"', "rules.as_of"),
        ('rules.country="CN"', "rules.country"),
    ],
)
def test_a_wrong_section_is_an_error(override: str, answer: str):
    with pytest.raises(IsthmusError, match=answer):
        load_recipe(RECIPE, (*RULES, override))


def test_a_country_is_checked_before_anything_runs():
    result = CliRunner().invoke(cli, ["run", "--dry-run", str(RECIPE), "--set", RULES[0], "--set", 'rules.site="UK"',
                                      "--set", RULES[1]])  # fmt: skip
    assert isinstance(result.exception, IsthmusError) and "write GB" in str(result.exception)
