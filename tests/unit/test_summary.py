"""The first screen of the dossier: sentences against the records that they are about."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from isthmus.records import Check, CheckOutcome, HandoffRecord
from isthmus.report_page import numbers
from isthmus.report_page.summary import gate_in_words, lost
from isthmus.run import Figure, RunFolder
from isthmus.stages import report
from tests.support.justified import justified_run

TASK = "w8a8: accuracy, target minus reference"


def handed_off(*checks: Check) -> HandoffRecord:
    return HandoffRecord(
        recipe_sha256="0" * 64,
        started=0.0,
        ended=1.0,
        source_pool="home",
        target_pool="away",
        format="w8a8",
        verdict="pass",
        checks=list(checks),
        bundles={},
        seal_id=None,
        figures={},
    )


def answered(value: float, low: float | None = None, high: float | None = None, unit: str = "points") -> HandoffRecord:
    figure = Figure(value=value, low=low, high=high, unit=unit, kind="rehearsed", source="1,000 problems")
    return handed_off(Check(layer="task", name=TASK, outcome="pass", figure=figure, detail="paired"))


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (answered(-1.3, -2.5, -0.06), "(rehearsed) (95 % interval −2.5 to −0.06): a loss beyond chance"),
        (answered(-0.4, -1.2, 0.5), "no loss beyond chance, and one of 1.2 points is not excluded"),
        (answered(2.0, 0.5, 3.0), "Nothing: +2.0 points"),
        (answered(-0.013, -0.025, -0.0006, unit="share"), "−1.3 points"),
        (answered(-1.0), "−1.0 points of accuracy on the task (rehearsed)."),
        (handed_off(), "the task was not answered"),
        (None, "has not crossed"),
    ],
)
def test_what_the_crossing_lost_is_said_in_words(record: HandoffRecord | None, words: str):
    assert words in lost(record)


def check(name: str, outcome: CheckOutcome) -> Check:
    return Check(layer="config", name=name, outcome=outcome, detail="as found")


def test_the_gate_names_only_what_did_not_hold():
    many = [check(f"good {number}", "pass") for number in range(28)]
    assert gate_in_words(handed_off(*many)) == "28 of 28 checks held."
    said = gate_in_words(handed_off(*many, check("a", "caution"), check("a", "caution"), check("b", "fail")))
    assert said.startswith("28 of 31 checks held") and "good" not in said
    assert said.count("a known risk that was not measured") == 1 and "b: failed" in said


def test_a_bound_reads_as_one():
    bound = Figure(value=707.9, low=0.0, high=707.9, unit="failures/chip-hour", kind="measured", source="a soak")
    assert numbers.quantity(bound) == "at most 707.9\u00a0failures/chip-hour" and numbers.interval(bound) == ""
    seen = Figure(value=3.0, low=1.0, high=9.0, unit="failures/chip-hour", kind="measured", source="a soak")
    assert numbers.quantity(seen).startswith("3") and numbers.interval(seen) == "1 to 9"


def first_screen(run: RunFolder) -> dict[str, str]:
    page = report.compose(report.read_dossier(run))
    rows = re.findall(r"<div><dt>([^<]+)</dt><dd>(.*?)</dd></div>", page[: page.index('class="lead"')])
    return {asked: re.sub(r"<[^>]+>", "", answer).replace("\u00a0", " ") for asked, answer in rows}


def test_the_first_screen_of_a_finished_run(tmp_path: Path):
    """512 chips held for 144 h and 1,024 for 97 h; the loss and the missing signature are those of the records."""
    told = first_screen(justified_run(tmp_path / "run"))
    assert list(told) == ["Decision", "Time", "Cost", "Risk", "Lost in the crossing", "Allowed", "Who says so"]
    assert "Training on home, rollouts on away" in told["Decision"] and "No training on away" in told["Decision"]
    assert "73,728 chip-hours on home (measured), 99,328 chip-hours on away (measured)" in told["Cost"]
    assert "145 h 00 min (measured)" in told["Time"]
    assert "a loss beyond chance" in told["Lost in the crossing"] and "not signed" in told["Who says so"]
    assert "home: it needs a licence" in told["Allowed"] and "D1234567" in told["Allowed"].replace("&#39;", "'")


def test_the_first_screen_of_a_run_that_has_only_begun(tmp_path: Path):
    told = first_screen(justified_run(tmp_path / "run", "pools.away.rehearsed=true", finished=False))
    assert told["Cost"] == "No chip has been held yet." and "has not crossed" in told["Lost in the crossing"]
    assert "away is rehearsed" in told["Risk"] and "Nobody yet" in told["Who says so"]


def test_details_are_folded_and_what_did_not_pass_is_not(tmp_path: Path):
    page = report.compose(report.read_dossier(justified_run(tmp_path / "run")))
    assert page.count("<details>") >= 5 and "<details open" not in page
    folded = re.findall(r"<details>.*?</details>", page, flags=re.S)
    pools = page[page.index('<section id="pools">') : page.index('<section id="plan">')]
    seen = re.sub(r"<details>.*?</details>", "", pools, flags=re.S)
    assert "Soak" in seen and "Pairs of ranks" not in seen and any("Pairs of ranks" in one for one in folded)
