"""The paper for an authority: its numbers by hand, two languages from one record, and nothing that nobody said."""

from __future__ import annotations

import re
import string
from pathlib import Path
from typing import Any, get_args

import pytest
from click.testing import CliRunner
from rich.console import Console

from isthmus import records
from isthmus.chips.trade import Effect, RecordKind, trade_facts
from isthmus.cli import cli
from isthmus.errors import DamagedFile, IsthmusError
from isthmus.progress import Watch
from isthmus.recipe.read import load_recipe
from isthmus.records import Limit, QualifyRecord
from isthmus.report_page.acts import ActKind
from isthmus.report_page.justify.gather import gather
from isthmus.report_page.justify.record import Gap, JustifyRecord, Objection, Side
from isthmus.report_page.justify.words import LANGUAGES, Words, glossary
from isthmus.report_page.justify.write import write
from isthmus.rules import BELOW, UNDEFINED, UNKNOWN
from isthmus.run import Figure, Kind, RunFolder
from isthmus.tools import justify
from tests.support.flow_recipe import RECIPE, TAUGHT
from tests.support.justified import justified_run

CELL = re.compile(r'<td class="n"[^>]*>(.*?)</td>')
NUMBER = re.compile(r"\d[\d,.]*(?<![,.])")


def pages(record: JustifyRecord) -> dict[str, str]:
    return {language: write(record, language) for language in LANGUAGES}


def plain(page: str) -> str:
    return " ".join(re.sub(r"<style>.*?</style>|<[^>]+>", " ", page, flags=re.S).split())


def test_the_shares_are_those_of_the_hours_that_chips_were_held(tmp_path: Path):
    """512 chips for 48 h and 96 h, 1,024 chips for 96 h and 1 h; 10, 16 and 18 million tokens."""
    record = gather(justified_run(tmp_path / "run"), "CN")
    hours = {act.kind: act.chip_hours.value for act in record.acts if act.chip_hours is not None}
    assert hours == {"sft": 512 * 48, "learn": 512 * 96, "rollout": 1024 * 96, "handoff": 1024}
    sides = {one.side: one for one in record.sides}
    foreign, domestic = 512 * 144, 1024 * 97
    assert sides["foreign"].chip_hours_share == pytest.approx(foreign / (foreign + domestic))
    assert sides["domestic"].chip_hours_share == pytest.approx(domestic / (foreign + domestic))
    assert sides["foreign"].tokens_share == pytest.approx(26 / 44)
    assert all(one.money is None and one.money_share is None for one in record.sides)


def test_what_is_asked_is_the_use_of_foreign_chips(tmp_path: Path):
    record = gather(justified_run(tmp_path / "run"), "CN")
    asked = plain(write(record, "en"))
    assert "Leave to use 512 × H800 SXM (pool home, maker in the United States)" in asked
    assert [(case.kind, case.pool.pool) for case in record.cases] == [("sft", "home"), ("learn", "home")]


def test_for_the_other_authority_the_other_chips_are_foreign(tmp_path: Path):
    record = gather(justified_run(tmp_path / "run"), "US")
    assert {case.kind for case in record.cases} == {"rollout", "handoff", "serve"}
    assert {act.side for act in record.acts if act.pool == "home"} == {"domestic"}


def test_an_authority_whose_chips_no_pool_has_reads_that_nothing_was_tried(tmp_path: Path):
    record = gather(justified_run(tmp_path / "run"), "DE")
    assert "no domestic pool" in record.gaps and all(not case.trials for case in record.cases)
    assert "No domestic chip was tried" in plain(write(record, "en"))


def with_limits(run: RunFolder) -> None:
    found = run.require_record("qualify/away", QualifyRecord, "qualify")
    limit = Limit(setting="train.precision", excluded=["fp32", "bf16"], reason="as found")
    run.write_record("qualify/away", found.model_copy(update={"verdict": "fit with limits", "limits": [limit]}))


def as_fit(run: RunFolder) -> None:
    found = run.require_record("qualify/away", QualifyRecord, "qualify")
    run.write_record("qualify/away", found.model_copy(update={"verdict": "fit"}))


@pytest.mark.parametrize(
    ("objection", "overrides", "change"),
    [
        ("verdict", (), None),
        ("rehearsed", ("pools.away.rehearsed=true",), None),
        ("limits", (), with_limits),
        ("order", (), as_fit),
        ("not listed", ('place.train=["home"]',), None),
    ],
)
def test_what_stands_against_the_domestic_pool_is_said(
    tmp_path: Path, objection: str, overrides: tuple[str, ...], change
):
    run = justified_run(tmp_path / "run", *overrides)
    if change is not None:
        change(run)
    record = gather(run, "CN")
    assert {trial.objection for case in record.cases for trial in case.trials} == {objection}
    assert Words("en").term("objection", objection) in write(record, "en").replace("&#39;", "'")


def test_a_domestic_pool_that_a_rule_forbids_is_said_to_be_forbidden(tmp_path: Path):
    """Seen from the United States: the chip that is made there may not be sold to this owner."""
    home = ('pools.home={chip="b200-sxm", count=8, ranks=1}', "rules.licences={}")
    host = ('pools.host={chip="cpu"}', 'place={train=["host"], rollout=["away"], serve=["away", "home"]}')
    record = gather(justified_run(tmp_path / "run", *home, *host), "US")
    serving = next(case for case in record.cases if case.kind == "serve")
    assert [trial.objection for trial in serving.trials] == ["rule"]
    assert serving.trials[0].rule is not None and "us-2023-parent" in serving.trials[0].rule
    assert "A rule forbids the domestic pool" in plain(write(record, "en"))


def test_evidence_carries_its_kinds_and_what_stands_against_it(tmp_path: Path):
    trial = gather(justified_run(tmp_path / "run"), "CN").cases[0].trials[0]
    found = {one.aspect: (one.outcome, one.kinds, one.against) for one in trial.outcome}
    assert found == {
        "stability": ("fail", ["measured"], ["soak"]),
        "links": ("pass", ["measured"], []),
        "software": ("fail", [], ["refused dtypes", "a probe of tomorrow"]),
    }


PRICED = ("aim.prices={home=2.0, away=0.5}",)


def test_nothing_is_said_of_time_and_money_that_no_record_has(tmp_path: Path):
    run = justified_run(tmp_path / "run")
    (run.path / "forecast.json").unlink()
    record = gather(run, "CN")
    assert {"no forecast", "no money"} <= set(record.gaps)
    assert all(case.money is None and trial.seconds is None for case in record.cases for trial in case.trials)


def ends(figure: Figure) -> list[float]:
    """P10, P50 and P90."""
    assert figure.low is not None and figure.value is not None and figure.high is not None
    return [figure.low, figure.value, figure.high]


def test_the_plans_forecast_is_told_of_both_sides_with_intervals(tmp_path: Path):
    """Hours x chips are chip-hours, and these x the price are money: by hand, of each end; and the page has them."""
    record = gather(justified_run(tmp_path / "run", *PRICED), "CN")
    assert "no forecast" not in record.gaps
    (case,) = (one for one in record.cases if one.kind == "sft")
    (trial,) = case.trials
    for one, chips, price in ((case, 512, 2.0), (trial, 1024, 0.5)):
        assert one.seconds is not None and one.chip_hours is not None and one.money is not None
        for seconds, held, money in zip(*map(ends, (one.seconds, one.chip_hours, one.money)), strict=True):
            assert held == pytest.approx(seconds / 3600 * chips) and money == pytest.approx(held * price)
        assert ends(one.seconds) == sorted(set(ends(one.seconds))) and one.money.unit == "USD"
    price = next(flip.at for flip in case.flips if flip.what == "price")
    assert case.chip_hours is not None and trial.chip_hours is not None
    assert price.value == pytest.approx(ends(trial.chip_hours)[1] / ends(case.chip_hours)[1])
    english, chinese = plain(write(record, "en")), plain(write(record, "zh"))
    assert "Chip-hours:" in english and "over its forecast" in english
    assert "芯片小时：" in chinese and "与预测之比" in chinese


def test_a_forecast_that_was_changed_is_an_error_that_says_so(tmp_path: Path):
    run = justified_run(tmp_path / "run")
    (run.path / "forecast.json").write_text('{"stages": []}')
    with pytest.raises(DamagedFile, match="was changed"):
        gather(run, "CN")


def test_what_it_would_take_on_a_rehearsed_pool_is_not_known(tmp_path: Path):
    record = gather(justified_run(tmp_path / "run", "pools.away.rehearsed=true", *PRICED), "CN")
    assert all(trial.seconds is None and trial.money is None for case in record.cases for trial in case.trials)
    assert "no forecast" in record.gaps


def test_what_was_rehearsed_is_never_shown_as_measured(tmp_path: Path):
    record = gather(justified_run(tmp_path / "run", "pools.away.rehearsed=true"), "CN")
    away = [figure for act in record.acts if act.pool == "away" for figure in (act.chip_hours, act.tokens) if figure]
    assert away and {figure.kind for figure in away} == {"rehearsed"}
    assert "rehearsed" in record.gaps and ", rehearsed)" in write(record, "en")


def test_an_unfinished_run_shows_the_plans_estimate_as_a_forecast(tmp_path: Path):
    run = justified_run(tmp_path / "run", finished=False)
    stored = run.require_record("plan", records.PlanRecord, "plan")
    expected = Figure(value=7200.0, low=3600.0, high=10800.0, unit="s", kind="forecast", source="pilots")
    run.write_record("plan", stored.model_copy(update={"estimate": {TAUGHT: expected}}))
    record = gather(run, "CN")
    hours = {act.kind: act.chip_hours for act in record.acts}
    assert hours["sft"] is not None and (hours["sft"].kind, hours["sft"].value) == ("forecast", 1024.0)
    assert (hours["sft"].low, hours["sft"].high) == (512.0, 1536.0) and hours["learn"] is None
    assert "unfinished" in record.gaps and all(one.chip_hours_share is None for one in record.sides)


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [(-2.5, -0.06, "[−2.5, −0.06] (measured). The loss is beyond chance"), (-2.5, 0.4, "one of 2.5 points is not")],
)
def test_a_loss_is_said_in_words(tmp_path: Path, low: float, high: float, words: str):
    record = gather(justified_run(tmp_path / "run"), "CN")
    assert record.gate is not None
    lost = Figure(value=-1.3, low=low, high=high, unit="points", kind="measured", source="the task")
    changed = record.model_copy(update={"gate": record.gate.model_copy(update={"accuracy": lost})})
    assert words in plain(write(changed, "en"))


def test_who_signed_is_what_the_seal_says(tmp_path: Path):
    key = "ed25519:" + "ab" * 32
    signed = gather(justified_run(tmp_path / "signed", signer=key), "CN")
    assert key in write(signed, "en") and key in write(signed, "zh") and "not signed" not in signed.gaps
    unsigned = gather(justified_run(tmp_path / "unsigned"), "CN")
    assert "not signed" in unsigned.gaps and "nobody signed it" in write(unsigned, "en")


def test_it_is_looked_at_again_when_the_first_binding_record_expires(tmp_path: Path):
    run = justified_run(tmp_path / "run", "rules.state_funded=false")
    case = gather(run, "CN").cases[0]
    expiries = {one.id: one.expires for one in trade_facts().records}
    assert case.because == "us-2025-05-gp10" and case.look_again == expiries["us-2025-05-gp10"]
    assert "by 2026-12-05" in plain(write(gather(run, "CN"), "en"))


def test_both_languages_say_the_same_numbers_of_one_record(tmp_path: Path):
    run = justified_run(tmp_path / "run", *PRICED)
    told = pages(gather(run, "CN"))
    numbers = {language: [NUMBER.findall(cell) for cell in CELL.findall(page)] for language, page in told.items()}
    assert numbers["en"] == numbers["zh"] and sum(map(len, numbers["en"])) > 8
    assert told == pages(gather(run, "CN")), "equal records give equal pages"


CHINESE = re.compile(r"[\u4e00-\u9fff]")


def test_every_word_is_there_in_both_languages_with_the_same_slots():
    for table, terms in glossary().items():
        for key, known in terms.items():
            assert set(known) == set(LANGUAGES), f"{table}.{key}"
            slots = [{name for _, name, _, _ in string.Formatter().parse(known[one]) if name} for one in LANGUAGES]
            assert slots[0] == slots[1], f"{table}.{key}"
            said = re.sub(r"\{\w+\}", "", known["zh"])
            words = table != "class" and re.search(r"[A-Za-z]{4}", re.sub(r"\{\w+\}", "", known["en"]))
            assert CHINESE.search(said) or not words, f"{table}.{key} is not Chinese"


@pytest.mark.parametrize(
    ("table", "values"),
    [
        ("side", get_args(Side)),
        ("act", get_args(ActKind)),
        ("objection", get_args(Objection)),
        ("gap", get_args(Gap)),
        ("kind", get_args(Kind)),
        ("verdict", get_args(records.Verdict)),
        ("outcome", get_args(records.AspectOutcome)),
        ("aspect", get_args(records.Aspect)),
        ("answer", get_args(records.RuleAnswer)),
        ("effect", get_args(Effect)),
        ("record_kind", get_args(RecordKind)),
        ("window", get_args(records.Ruling.model_fields["window"].annotation)),
        ("class", (BELOW, UNDEFINED, UNKNOWN, *(one.name for one in trade_facts().classes))),
    ],
)
def test_every_value_of_the_record_has_a_word(table: str, values: tuple[Any, ...]):
    assert set(values) <= set(glossary()[table])


def test_chinese_has_no_english_but_names(tmp_path: Path):
    """What stands in Latin letters are names, codes and units; what has no word is marked as English."""
    page = write(gather(justified_run(tmp_path / "run"), "CN"), "zh")
    assert '<span lang="en">a probe of tomorrow</span>' in page
    bare = plain(re.sub(r'<span lang="en">.*?</span>', "", page))
    assert not re.search(r"(?:[A-Za-z]{2,}[ ,.;]+){3,}[A-Za-z]{2,}", bare), "four English words in a row"
    assert len(CHINESE.findall(bare)) > 400


def test_what_others_wrote_is_escaped(tmp_path: Path):
    hostile = '<script>alert("x")</script>'
    run = justified_run(tmp_path / "run", f"rules.licences={{home='{hostile}'}}", signer=hostile)
    found = run.require_record("qualify/away", QualifyRecord, "qualify")
    worse = [one.model_copy(update={"name": hostile}) for one in found.evidence]
    run.write_record("qualify/away", found.model_copy(update={"evidence": worse}))
    for page in pages(gather(run, "CN")).values():
        assert "<script" not in page and "&lt;script&gt;" in page


def test_the_command_writes_one_record_and_a_page_for_each_language(tmp_path: Path):
    run = justified_run(tmp_path / "run")
    result = CliRunner().invoke(cli, ["justify", str(run.path)])
    assert result.exit_code == 0, result.output
    record = run.require_record("justify", JustifyRecord, "justify")
    assert (run.path / "justify-en.html").read_text() == write(record, "en")
    assert (run.path / "justify-zh.html").read_text() == write(record, "zh")
    (run.path / "justify-en.html").unlink()
    assert CliRunner().invoke(cli, ["justify", str(run.path), "--lang", "zh"]).exit_code == 0
    assert not (run.path / "justify-en.html").exists()


@pytest.mark.parametrize("name", ["steps/taught/rollout-000001.json", "events.jsonl"])
def test_no_paper_is_made_of_a_run_that_was_touched(tmp_path: Path, name: str):
    run = justified_run(tmp_path / "run")
    (run.path / "steps/taught").mkdir(parents=True)
    run.keep(run.path / "steps/taught/rollout-000001.json", b'{"reward": 0.5}')
    path = run.path / name
    path.write_bytes(path.read_bytes().replace(b"0", b"1", 1))
    with pytest.raises(DamagedFile, match=f"{path.name}.*no paper is made of it"):
        justify.execute(run, Watch(Console(quiet=True)))
    assert not list(run.path.glob("justify*"))


def test_without_rules_somebody_has_to_say_who_asks(tmp_path: Path):
    run = RunFolder.create(tmp_path / "run", load_recipe(RECIPE))
    result = CliRunner().invoke(cli, ["justify", str(run.path)])
    assert isinstance(result.exception, IsthmusError) and "--authority CC" in str(result.exception)
    result = CliRunner().invoke(cli, ["justify", str(run.path), "--authority", "CN"])
    assert isinstance(result.exception, IsthmusError) and "isthmus plan" in str(result.exception)
