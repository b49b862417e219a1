"""Stages run in copies of a run folder and are brought back; the guide's commands, as it has them, on two machines."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from isthmus.cli import cli
from isthmus.errors import DamagedFile, GateRefused, IsthmusError
from isthmus.parity.seal import verify_seal
from isthmus.progress import Watch
from isthmus.recipe.read import load_recipe
from isthmus.records import PlanRecord, QualifyRecord, read_weights
from isthmus.run import RunFolder
from isthmus.tools import collect, steps
from isthmus.trainer.checkpoint import load_model_state
from tests.support.flow_recipe import ROOT, isthmus
from tests.support.ranks_recipe import RECIPE

GUIDE = ROOT / "docs" / "apart.md"
FAR = RECIPE.replace("[place]", '[pools.away]\nchip = "h20"\n\n[place]').replace(
    'serve = ["home"]', 'serve = ["away", "home"]'
)
_WITHOUT_RL = FAR[: FAR.index('[[step]]\nname = "reasoning"')] + FAR[FAR.index("[handoff]") :]
REHEARSED = _WITHOUT_RL.replace('chip = "h20"', 'chip = "ascend-910b-313t"\nrehearsed = true\nthreads = 1').replace(
    "[qualify]", '[qualify]\nbudget = "2s"\nsoak_s = 1.0'
)
QUIET = Watch(quiet=True)


def run_of(folder: Path, text: str = FAR) -> RunFolder:
    recipe = folder.with_suffix(".toml")
    recipe.write_text(text, encoding="utf-8")
    return RunFolder.create(folder, load_recipe(recipe))


def qualified(run: RunFolder, pool: str, reason: str = "fine", **fields: object) -> RunFolder:
    """A run in which a pool was examined: its record, a case and its events."""
    run.event("qualify", "start", pool=pool)
    run.event("qualify", "skipped", what=f"soak on {pool} (h20)", why="dear")
    run.keep(run.path / "qualify" / pool / "failures" / "matmul" / "failure.json", reason.encode())
    record = QualifyRecord(
        recipe_sha256=run.recipe.digest(),
        started=1.0,
        ended=2.0,
        pool=pool,
        chip=run.recipe.pools[pool].chip,
        present=True,
        rehearsed=False,
        verdict="serve-only",
        title=pool,
        reasons=[reason],
        evidence=[],
    )
    run.write_record(f"qualify/{pool}", record.model_copy(update=fields))
    run.event("qualify", "end", pool=pool, seconds=1.0, verdict="serve-only")
    return run


@pytest.fixture
def home(tmp_path: Path) -> RunFolder:
    return qualified(run_of(tmp_path / "home"), "home")


@pytest.fixture
def away(tmp_path: Path, home: RunFolder) -> RunFolder:
    (tmp_path / "away").mkdir()
    shutil.copy(home.path / "recipe.json", tmp_path / "away")
    return qualified(RunFolder.open(tmp_path / "away"), "away")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(home: RunFolder, *folders: Path, kind: type[IsthmusError] = IsthmusError) -> str:
    """What the refusal says, and that nothing was written."""
    before = content(home.path)
    with pytest.raises(kind) as caught:
        collect.execute(folders, home, QUIET)
    assert content(home.path) == before
    return str(caught.value)


def test_a_record_its_case_and_its_events_come_back_whole(home: RunFolder, away: RunFolder):
    collect.execute([away.path], home, QUIET)
    record = home.read_record("qualify/away", QualifyRecord)
    assert record is not None and record.verdict == "serve-only"
    for name in ("qualify/away.json", "qualify/away/failures/matmul/failure.json"):
        assert (home.path / name).read_bytes() == (away.path / name).read_bytes()
        assert home.entries[name] == away.entries[name]
    assert home.breaks() == []
    told = [event for event in home.events("qualify") if "link" in event]
    assert [event["event"] for event in told] == ["start", "skipped", "end"]
    assert [event["time"] for event in told] == [event["time"] for event in away.events("qualify")]
    assert {event["link"] for event in told} == set(away.chain.ends.values())
    (take,) = home.events("collect", "take")
    assert take["what"] == "qualify away"
    for name in ("files.json", "events.jsonl"):
        assert (home.path / take["evidence"] / name).read_bytes() == (away.path / name).read_bytes()


def test_what_is_there_already_is_left_alone(home: RunFolder, away: RunFolder):
    collect.execute([away.path], home, QUIET)
    before = content(home.path)
    assert [find.new for find in collect.execute([away.path], home, QUIET)] == [{}]
    assert content(home.path) == before


def test_a_copy_of_the_whole_run_brings_only_what_is_new(tmp_path: Path, home: RunFolder):
    shutil.copytree(home.path, tmp_path / "whole")
    home.event("qualify", "start", pool="home")  # home goes on meanwhile
    collect.execute([qualified(RunFolder.open(tmp_path / "whole"), "away").path], home, QUIET)
    told = [event for event in home.events("qualify") if "link" in event]
    assert {event.get("pool") for event in told if event["event"] != "skipped"} == {"away"}


@pytest.mark.parametrize("stopped_at", range(4))
def test_a_collection_that_was_stopped_is_finished_by_the_next(
    home: RunFolder, away: RunFolder, stopped_at: int, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        count = iter(range(100))

        def write(self: RunFolder, stage: str, event: str, **fields: object) -> None:
            if next(count) == stopped_at:
                raise KeyboardInterrupt
            original(self, stage, event, **fields)

        original = RunFolder.event
        patch.setattr(RunFolder, "event", write)
        with pytest.raises(KeyboardInterrupt):
            collect.execute([away.path], home, QUIET)
    assert home.read_record("qualify/away", QualifyRecord) is None
    collect.execute([away.path], home, QUIET)
    links = [event["link"] for event in home.events("qualify") if "link" in event]
    assert len(links) == len(set(links)) == 3 and home.breaks() == []
    assert home.read_record("qualify/away", QualifyRecord) is not None


def test_another_recipe_is_refused_with_the_keys_that_differ(tmp_path: Path, home: RunFolder):
    other = qualified(run_of(tmp_path / "other", FAR.replace("steps = 24", "steps = 25")), "away")
    assert "step.cold-start.steps" in refused(home, other.path)


def test_a_record_of_another_recipe_in_the_right_folder_is_refused(tmp_path: Path, home: RunFolder, away: RunFolder):
    other = qualified(run_of(tmp_path / "other", FAR.replace("steps = 24", "steps = 25")), "away")
    record = other.read_record("qualify/away", QualifyRecord)
    assert record is not None
    away.write_record("qualify/away", record)  # entered by the means of the folder itself
    assert "another recipe" in refused(home, away.path, kind=DamagedFile)


def test_the_record_of_another_pool_is_refused(home: RunFolder, away: RunFolder):
    qualified(away, "home")
    record = away.read_record("qualify/home", QualifyRecord)
    assert record is not None
    away.write_record("qualify/away", record)
    assert "pool 'home', renamed" in refused(home, away.path, kind=DamagedFile)


@pytest.mark.parametrize("name", ["qualify/away.json", "qualify/away/failures/matmul/failure.json"])
def test_a_touched_file_is_refused_by_name(home: RunFolder, away: RunFolder, name: str):
    (away.path / name).write_bytes((away.path / name).read_bytes().replace(b"fine", b"good"))
    assert name in refused(home, away.path, kind=DamagedFile)


def test_touched_or_cut_events_are_refused(home: RunFolder, away: RunFolder):
    path = away.path / "events.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"dear", b"long"))
    assert "line 2" in refused(home, away.path, kind=DamagedFile)
    path.write_bytes(whole[: whole.rindex(b"\n", 0, -1) + 1])
    assert "events.jsonl" in refused(home, away.path, kind=DamagedFile)


@pytest.mark.parametrize("name", ["files.json", "events.jsonl"])
def test_a_folder_without_its_list_or_events_is_refused(home: RunFolder, away: RunFolder, name: str):
    (away.path / name).unlink()
    assert name in refused(home, away.path, kind=DamagedFile)


def test_a_case_that_did_not_arrive_is_missed(home: RunFolder, away: RunFolder):
    shutil.rmtree(away.path / "qualify" / "away")
    assert "failure.json is missing" in refused(home, away.path, kind=DamagedFile)


def test_a_file_that_is_touched_while_it_is_copied_is_not_kept(home: RunFolder, away: RunFolder):
    name = "qualify/away.json"
    entry = away.entries[name].model_copy(update={"sha256": "0" * 64})
    with pytest.raises(DamagedFile, match="does not match"):
        home.receive(name, away.path / name, entry)
    assert not (home.path / name).exists() and name not in home.entries
    home.go_on()
    assert home.breaks() == []


def test_a_pool_recorded_twice_is_refused_unless_it_is_the_same(tmp_path: Path, home: RunFolder, away: RunFolder):
    shutil.copytree(away.path, tmp_path / "same")
    (tmp_path / "third").mkdir()
    shutil.copy(home.path / "recipe.json", tmp_path / "third")
    other = qualified(RunFolder.open(tmp_path / "third"), "away", reason="slow links")
    said = refused(home, away.path, other.path)
    assert str(away.path) in said and str(other.path) in said
    collect.execute([away.path, tmp_path / "same"], home, QUIET)
    assert "done twice" in refused(home, other.path)


def test_a_disturbed_record_gives_way_and_is_not_taken(home: RunFolder, away: RunFolder):
    qualified(home, "away", reason="loaded", disturbed=["the machine was busy"])
    collect.execute([away.path], home, QUIET)
    record = home.read_record("qualify/away", QualifyRecord)
    assert record is not None and record.reasons == ["fine"] and home.breaks() == []


def test_a_disturbed_record_is_to_be_made_again_where_it_was_made(home: RunFolder, away: RunFolder):
    qualified(away, "away", disturbed=["the machine was busy"])
    assert "the machine was busy" in refused(home, away.path)


def test_the_run_itself_and_an_empty_copy_are_refused(tmp_path: Path, home: RunFolder):
    assert "the run itself" in refused(home, home.path)
    (tmp_path / "bare").mkdir()
    shutil.copy(home.path / "recipe.json", tmp_path / "bare")
    assert "files.json" in refused(home, tmp_path / "bare", kind=DamagedFile)


def test_a_copy_that_is_being_written_is_not_read(home: RunFolder, away: RunFolder):
    with collect.writing_run(away.path):
        assert "is being written" in refused(home, away.path)


def test_only_pools_that_a_command_still_needs_have_to_be_here(home: RunFolder, away: RunFolder):
    assert steps.wanted(home, ["qualify", "plan", "handoff"]) == {"away"}
    said = isthmus("run", home.path, "--until", "plan")
    assert said.returncode == 2 and "h20" in said.stderr and "isthmus collect" in said.stderr
    brought = isthmus("collect", away.path, "--run", home.path)
    assert brought.returncode == 0 and "qualify away" in brought.stdout, brought.stderr
    assert steps.wanted(home, ["qualify", "plan"]) == set()
    planned = isthmus("run", home.path, "--until", "plan")
    assert "pool 'away' wants" not in planned.stderr


def blocks() -> list[tuple[str, str]]:
    """Machine and commands of each numbered section of the guide."""
    sections = re.findall(r"^## \d\. (At home|Away): .*?\n(.*?)(?=^## )", GUIDE.read_text(), re.DOTALL | re.MULTILINE)
    return [
        (title.split()[-1].lower(), "\n".join(line[4:] for line in text.splitlines() if line.startswith("    ")))
        for title, text in sections
    ]


@pytest.mark.long
def test_the_guide_walks_from_a_recipe_to_a_sealed_bundle(tmp_path: Path):
    programs, disk = tmp_path / "bin", tmp_path / "disk"
    for folder in (programs, disk, tmp_path / "home", tmp_path / "away"):
        folder.mkdir()
    (programs / "isthmus").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m isthmus "$@"\n')
    (programs / "isthmus").chmod(0o755)
    (tmp_path / "home" / "recipe.toml").write_text(REHEARSED)
    path = os.pathsep.join((str(programs), os.environ["PATH"]))
    environment = {**os.environ, "COLUMNS": "200", "PATH": path, "DISK": str(disk)}
    found = blocks()
    assert [machine for machine, _ in found] == ["home", "away", "home", "away", "home"]
    for machine, commands in found:
        done = subprocess.run(
            ["bash", "-euxc", commands], cwd=tmp_path / machine, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{machine}: {commands}\n{done.stdout}{done.stderr}"
    run, away = (RunFolder.open(tmp_path / machine / "run") for machine in ("home", "away"))
    parity = json.loads((run.path / "parity.json").read_text())
    assert parity["verdict"] == "pass" and parity["target_pool"] == "away"
    assert verify_seal(run.path / parity["bundles"]["w8a8"]).id == parity["seal_id"]
    assert run.breaks() == [] and parity["seal_id"] in (run.path / "report.html").read_text()
    a_spoilt_bundle_is_refused(run, away)
    weights_come_with_their_step(run, tmp_path / "third")


def a_spoilt_bundle_is_refused(run: RunFolder, away: RunFolder) -> None:
    (run.path / "parity.json").unlink()
    run.go_on()
    spoilt = away.path / "bundle" / "w8a8" / "model.safetensors"
    spoil(spoilt)
    assert "w8a8" in refused(run, away.path, kind=GateRefused)
    spoil(spoilt)
    collect.execute([away.path], run, QUIET)
    assert run.read_record("parity", collect.HandoffRecord) is not None


def weights_come_with_their_step(run: RunFolder, third: Path) -> None:
    """A run that has the recipe alone gets plan, checkpoint and bundle of one that has them all."""
    third.mkdir()
    shutil.copy(run.path / "recipe.json", third)
    other = RunFolder.open(third)
    record = read_weights(run, "cold-start")
    (spoilt,) = (run.path / record.checkpoint).glob("model-*.safetensors")
    spoil(spoilt)
    assert spoilt.name in refused(other, run.path, kind=DamagedFile)
    spoil(spoilt)
    collect.execute([run.path], other, QUIET)
    ours, theirs = (load_model_state(one.path / record.checkpoint, record.checkpoint_sha256) for one in (other, run))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert other.read_record("plan", PlanRecord) == run.read_record("plan", PlanRecord)


def spoil(file: Path) -> None:
    """Flip the last bit; twice is not at all."""
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))


def test_the_command_is_listed():
    assert "collect" in cli.commands
