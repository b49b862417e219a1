"""A drill: rehearsed pools may train, faults are drawn as counted, and nothing of it can pass for real."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import tomllib
from collections import Counter

import pytest
from click.testing import CliRunner
from pydantic import ValidationError

from isthmus.chips import fault_weights
from isthmus.chips.rehearse.inject import Injector
from isthmus.cli import cli
from isthmus.errors import GateRefused, IsthmusError
from isthmus.pools import get_pool
from isthmus.progress import Watch
from isthmus.recipe.drill import DrillSection
from isthmus.recipe.read import parse_recipe
from isthmus.records import DrillRecord, Placement, PlanRecord, QualifyRecord, TextRecord
from isthmus.report_page.acts import acts_of
from isthmus.run import Figure, RunFolder
from isthmus.stages import handoff, report
from isthmus.stages.plan import objection
from isthmus.stages.steps.drilled import Drill, drawn, faults_of
from isthmus.tools import drill as replays
from tests.support.flow_recipe import ROOT
from tests.unit.test_timeline import GO, met

CONTENT = tomllib.loads((ROOT / "recipes" / "r2-drill.toml").read_text(encoding="utf-8"))
DRILL = parse_recipe(CONTENT)
RUN = parse_recipe({key: value for key, value in CONTENT.items() if key != "drill"})
STEP = "cold-start"


def test_faults_come_as_often_as_was_counted_and_on_average_as_late_as_asked():
    section = DrillSection(updates_between_faults=20)
    found = [drawn(section, STEP, attempt, 100, 2) for attempt in range(4000)]
    kinds = Counter(one.kind for one in found if one is not None)
    for kind, share in fault_weights()["stability"].items():
        assert abs(kinds[kind] / 4000 - share) < 4 * (share * (1 - share) / 4000) ** 0.5 + 1e-3
    later = [one.step - 101 for one in found if one is not None and one.step is not None]
    assert min(later) >= 0 and abs(sum(later) / len(later) - 19.5) < 1.5
    assert {one.rank for one in found if one is not None} == {0, 1}


def test_a_drill_goes_wrong_in_the_same_way_twice_and_otherwise_with_another_seed():
    def ten(seed: int) -> list[str]:
        return [str(drawn(DrillSection(seed=seed, updates_between_faults=9), STEP, one, 0, 1)) for one in range(10)]

    assert ten(1) == ten(1) != ten(2)


def test_a_fault_by_hand_strikes_once_and_a_standing_one_stays(tmp_path):
    pools = {**CONTENT["pools"], "away": {**CONTENT["pools"]["away"], "faults": ["nan@rank=0,step=3", "hang@rank=1"]}}
    run = RunFolder.create(tmp_path / "run", parse_recipe({**CONTENT, "pools": pools, "drill": {"seed": 0}}))

    def left() -> list[str]:
        return [str(one) for one in faults_of(run, STEP, get_pool(run.recipe, "away"), DrillSection())]

    assert left() == ["nan@rank=0,step=3", "hang@rank=1"]
    for fault in left():
        run.event(STEP, "planted", fault=fault, update=3, pool="away")
    assert left() == ["hang@rank=1"]


def test_a_rehearsed_pool_may_train_in_a_drill_alone():
    record = QualifyRecord(
        recipe_sha256="0", started=0, ended=0, pool="away", chip="ascend-910b-313t", present=False, rehearsed=True,
        verdict="serve-only", title="", reasons=[], evidence=[], figures={},
    )  # fmt: skip
    assert objection("train", record, DRILL) is None
    assert "never vouch" in (objection("train", record, RUN) or "")


def test_a_record_of_a_drill_holds_no_measured_figure():
    fields = {
        "recipe_sha256": "0", "started": 0, "ended": 0, "step": STEP, "kind": "sft", "pool": "home", "drill": True,
        "started_from": "model", "steps": 1, "resumed_from": [], "checkpoint": "c", "checkpoint_sha256": "0",
    }  # fmt: skip
    figures = {real: {"loss": Figure.measured(1.0, "nats", "x", rehearsed=not real)} for real in (True, False)}
    TextRecord(**fields, figures=figures[False])
    with pytest.raises(ValidationError, match="figures of a drill are rehearsed; loss"):
        TextRecord(**fields, figures=figures[True])


def test_a_drill_is_not_handed_off(tmp_path):
    run = RunFolder.create(tmp_path / "run", DRILL)
    with pytest.raises(GateRefused, match="not sealed for use"):
        handoff.execute(run, Watch(quiet=True))
    assert not (run.path / "bundle").exists()


def test_inspect_checks_the_files_of_a_drill_and_asks_for_no_hand_off(tmp_path):
    run = moved_drill(tmp_path / "run")
    (run.path / "steps" / STEP / "record.json").unlink()
    run.forget(run.path / "steps" / STEP / "record.json")
    found = CliRunner().invoke(cli, ["inspect", str(run.path)])
    assert found.exit_code == 0 and "it is a drill" in found.output and "first run" not in found.output
    told = CliRunner().invoke(cli, ["inspect", str(run.path), "--json"])
    assert told.exit_code == 0 and json.loads(told.output)["breaks"] == []
    compared = CliRunner().invoke(cli, ["inspect", str(run.path), "--diff", str(run.path)])
    assert isinstance(compared.exception, IsthmusError) and "no bundle to compare" in str(compared.exception)
    (run.path / "plan.json").write_text("{}")
    assert isinstance(CliRunner().invoke(cli, ["inspect", str(run.path)]).exception, GateRefused)


def test_a_drill_and_a_run_are_not_taken_for_each_other(tmp_path):
    run = RunFolder.create(tmp_path / "run", RUN)
    found = CliRunner().invoke(cli, ["drill", str(run.path)])
    assert isinstance(found.exception, IsthmusError) and "no drill" in str(found.exception)


def moved_drill(folder) -> RunFolder:
    """Three updates on away, and the third again on home from the checkpoint of update 2."""
    run = RunFolder.create(folder, DRILL)
    places = [Placement(stage="train", pool="away", reason="first"), Placement(stage="serve", pool="home", reason="")]
    run.write_record(
        "plan", PlanRecord(recipe_sha256="0", started=0, ended=0, placements=places, rejected=[], estimate={})
    )
    run.event(STEP, "start", pool="away")
    for update in (1, 2, 3):
        run.event(STEP, "step", step=update, tokens=10)
    now = time.time()
    run.write_record(
        f"steps/{STEP}/incidents/0001",
        met(1, now, 4, "revert", to_pool="home", gate=GO).model_copy(update={"step": STEP}),
    )
    run.event(STEP, "incident", number=1)
    run.event(STEP, "start", pool="home")
    run.event(STEP, "resume", from_step=2)
    run.event(STEP, "step", step=3, tokens=10)
    run.event(STEP, "end", seconds=5.0)
    figure = Figure.measured(1.0, "nats", "x", rehearsed=True)
    run.write_record(
        f"steps/{STEP}/record",
        TextRecord(
            recipe_sha256="0", started=now, ended=now, step=STEP, kind="sft", pool="home", drill=True, steps=3,
            started_from="model", resumed_from=[2], checkpoint="c", checkpoint_sha256="0" * 64,
            figures={"loss": figure},
        ),
    )  # fmt: skip
    return run


def test_the_dossier_says_that_it_moved_what_was_lost_and_what_each_pool_took(tmp_path):
    run = moved_drill(tmp_path / "run")
    page = report.compose(report.read_dossier(run))
    head = page[page.index("<h1>") : page.index("</h1>")]
    assert "cold-start moved to home after update 2. 2 of 5 updates were made again" in head
    assert 'trains on <em class="home">away</em>' in page and 'It moved to <em class="home">home</em>' in page
    plan = run.read_record("plan", PlanRecord)
    assert plan is not None
    trained = [one for one in acts_of(run, plan) if one.name == STEP]
    assert [(one.pool, one.whole) for one in trained] == [("away", False), ("home", False)]
    assert trained[1].seconds is not None and trained[1].seconds.value == 5.0


def test_of_two_faults_of_one_kind_the_one_that_struck_is_told_and_the_other_still_comes(tmp_path):
    faults = ["nan@rank=0,step=3", "nan@rank=0,step=50"]
    pools = {**CONTENT["pools"], "away": {**CONTENT["pools"]["away"], "faults": faults}}
    run = RunFolder.create(tmp_path / "run", parse_recipe({**CONTENT, "pools": pools, "drill": {"seed": 0}}))
    away, section = get_pool(run.recipe, "away"), DrillSection()
    planted = faults_of(run, STEP, away, section)
    drill = Drill(run, STEP, away, planted, Injector(planted, 0, armed=False))
    drill.injector.note(planted[0], "struck")
    drill.tell()
    assert [event["fault"] for event in run.events(STEP, "planted")] == ["nan@rank=0,step=3"]
    assert [str(fault) for fault in faults_of(run, STEP, away, section)] == ["nan@rank=0,step=50"]


def test_a_policy_is_the_same_drill_with_other_budgets():
    for policy, (reverts, least) in {"persist": (0, 1000), "at-once": (DRILL.supervise.reverts, 0)}.items():
        other = replays.with_policy(DRILL, policy)
        assert (other.supervise.reverts, other.supervise.restarts >= least) == (reverts, True)
        assert (other.supervise.restarts == 0) == (policy == "at-once")
        assert other.drill is not None and DRILL.drill is not None and other.drill.seed == DRILL.drill.seed
        assert other.drill.replay == [] and other.pools == DRILL.pools and other.step == DRILL.step


def test_policies_are_played_beside_the_drill_and_one_that_does_not_end_is_told_as_that(tmp_path, monkeypatch):
    run, seen = moved_drill(tmp_path / "run"), []
    for pool in run.recipe.pools:
        record = QualifyRecord(
            recipe_sha256=run.recipe.digest(), started=0, ended=0, pool=pool, chip="cpu", present=True, rehearsed=False,
            verdict="fit", title="", reasons=[], evidence=[], figures={},
        )  # fmt: skip
        run.write_record(f"qualify/{pool}", record)

    def play(folder, most):
        other = RunFolder.open(folder)
        assert other.read_record("qualify/home", QualifyRecord) is not None
        seen.append((folder.name, other.recipe.supervise.reverts, most > 0))
        other.event(STEP, "start", pool="away")
        other.event(STEP, "step", step=1)
        return "did not end within 9 s" if folder.name == "persist" else ""

    monkeypatch.setattr(replays, "play", play)
    replays.replay(run, Watch(quiet=True))
    assert seen == [("persist", 0, True), ("at-once", 1, True)]
    record = run.read_record("drill", DrillRecord)
    assert record is not None
    told = {one.policy: (one.updates, one.begun, one.lost, one.ended, one.moved_to) for one in record.policies}
    assert told["as it went"] == (3, 5, 2, True, "home")
    assert told["restart, then stop"] == (2, 4, 2, False, None)
    assert told["persist"] == (1, 1, 0, False, None)
    assert {one.seconds.kind for one in record.policies} == {"rehearsed"}
    page = report.compose(report.read_dossier(run))
    assert "did not end within 9 s" in page and "stopped where the drill moved to home" in page
    replays.replay(run, Watch(quiet=True))
    assert len(seen) == 2, "what was played is not played again"


def test_a_policy_that_takes_too_long_is_ended(tmp_path, monkeypatch):
    program = "import time; print('begun', flush=True); time.sleep(60)"
    popen = subprocess.Popen
    monkeypatch.setattr(replays.subprocess, "Popen", lambda _, **how: popen([sys.executable, "-c", program], **how))
    began = time.monotonic()
    assert replays.play(tmp_path, 0.5).startswith("did not end within")
    assert time.monotonic() - began < 20
