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

from isthmus.chain import Entry, Ledger
from isthmus.cli import cli
from isthmus.errors import DamagedFile, GateRefused, IsthmusError
from isthmus.formats.files.bundle import file_hashes, write_bundle
from isthmus.model.model import Model
from isthmus.parity.seal import verify_seal, write_seal
from isthmus.progress import Watch
from isthmus.recipe.read import load_recipe
from isthmus.records import HandoffRecord, PlanRecord, QualifyRecord, TextRecord, read_weights
from isthmus.run import RunFolder, sha256_file
from isthmus.tools import collect, steps
from isthmus.trainer.checkpoint import CheckpointWriter, TrainingState, load_model_state
from tests.support.bundles import TinyTokenizer, passed
from tests.support.flow_recipe import ROOT, isthmus
from tests.support.ranks_recipe import RECIPE
from tests.support.small import tiny_architecture

GUIDE = ROOT / "docs" / "apart.md"
FAR = RECIPE.replace("[place]", '[pools.away]\nchip = "h20"\n\n[place]').replace(
    'serve = ["home"]', 'serve = ["away", "home"]'
)
_WITHOUT_RL = FAR[: FAR.index('[[step]]\nname = "reasoning"')] + FAR[FAR.index("[handoff]") :]
REHEARSED = _WITHOUT_RL.replace('chip = "h20"', 'chip = "ascend-910b-313t"\nrehearsed = true\nthreads = 1').replace(
    "[qualify]", '[qualify]\nbudget = "2s"\nsoak_s = 1.0'
)
QUIET = Watch(quiet=True)
SMALL = tiny_architecture(vocab_size=31, hidden_size=16)


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


@pytest.mark.parametrize("own", [[], ["the machine was busy"], ["it rained"]])
def test_a_disturbed_record_that_was_copied_along_keeps_nothing_back(tmp_path: Path, home: RunFolder, own: list[str]):
    """The run has a good record of that pool since, the same one, or another that is disturbed."""
    qualified(home, "home", disturbed=["the machine was busy"])
    whole = RunFolder.open(Path(shutil.copytree(home.path, tmp_path / "whole")))
    qualified(whole, "away")
    if own != ["the machine was busy"]:
        qualified(home, "home", disturbed=own)
    before = (home.path / "qualify" / "home.json").read_bytes()
    collect.execute([whole.path], home, QUIET)
    assert home.read_record("qualify/away", QualifyRecord) is not None
    assert (home.path / "qualify" / "home.json").read_bytes() == before and home.breaks() == []


def handed_off(run: RunFolder, **fields: object) -> RunFolder:
    """A run with a bundle that its gate refused, or with one that it sealed if `fields` say so."""
    folder = run.path / "bundle" / "w8a8"
    write_bundle(folder, "w8a8", Model(SMALL).initialise(0).state_dict(), SMALL, TinyTokenizer(0, 1))
    record = HandoffRecord(
        recipe_sha256=run.recipe.digest(),
        started=1.0,
        ended=2.0,
        source_pool="home",
        target_pool="away",
        format="w8a8",
        verdict="refuse",
        checks=[],
        bundles={"w8a8": "bundle/w8a8"},
        seal_id=None,
        figures={},
    )
    if fields.get("verdict") == "pass":
        fields = {"seal_id": write_seal(folder, **passed()).id, **fields}
    run.write_record("parity", record.model_copy(update=fields))
    return run


def test_a_refused_handoff_that_was_copied_along_is_left_alone_with_its_bundle(tmp_path: Path, home: RunFolder):
    handed_off(home)
    whole = RunFolder.open(Path(shutil.copytree(home.path, tmp_path / "whole")))
    bundle = content(home.path / "bundle")
    collect.execute([qualified(whole, "away").path], home, QUIET)
    (take,) = home.events("collect", "take")
    assert take["what"] == "qualify away"
    before = content(home.path)
    assert not any(find.new for find in collect.execute([whole.path], home, QUIET))
    assert content(home.path) == before and bundle and content(home.path / "bundle") == bundle


def test_a_refused_handoff_gives_way_to_a_result_and_not_to_another_refusal(
    tmp_path: Path, home: RunFolder, away: RunFolder
):
    handed_off(home)
    assert "done twice" in refused(home, handed_off(away, culprit="model.layers.0").path)
    shutil.rmtree(away.path / "bundle")
    collect.execute([handed_off(away, verdict="pass").path], home, QUIET)
    record = home.read_record("parity", HandoffRecord)
    assert record is not None and verify_seal(home.path / "bundle" / "w8a8", record.seal_id)
    assert home.breaks() == []


@pytest.mark.parametrize(
    "name",
    ["qualify/away/../../../precious.txt", "qualify/away/../../plan.json", "qualify/away/./x", "qualify/away//x"],
)
def test_a_name_that_leads_out_of_the_folder_is_refused(tmp_path: Path, home: RunFolder, away: RunFolder, name: str):
    copy = RunFolder(Path(shutil.copytree(away.path, tmp_path / "disk" / "away")), home.recipe)
    (tmp_path / "precious.txt").write_text("mine")
    (home.path / "plan.json").write_text("mine")
    (copy.path / name).write_text("theirs")
    entry = Entry(sha256=sha256_file(copy.path / name))
    lists(copy, name, entry)
    said = refused(home, copy.path, kind=DamagedFile)
    assert str(copy.path) in said and name in said
    with pytest.raises(DamagedFile, match=re.escape(repr(name))):
        home.receive(name, copy.path / name, entry)
    assert (tmp_path / "precious.txt").read_text() == (home.path / "plan.json").read_text() == "mine"


def lists(run: RunFolder, name: str, entry: Entry) -> None:
    """Enter a name that no run enters, in a list that matches its own hash."""
    path = run.path / "files.json"
    path.write_bytes(Ledger.from_bytes(path.read_bytes(), path).entered(name, entry).to_bytes())


def trained(run: RunFolder, checkpoint: str = "steps/cold-start/checkpoints/step-000001") -> Path:
    """A run with the step `cold-start`, whose record names `checkpoint`; returns the folder where it truly lies."""
    writer = CheckpointWriter(run.path / "steps" / "cold-start" / "checkpoints", 1, None)
    writer.save(1, TrainingState(model={"w": torch.ones(3)}, optimizer={}, extra={}))
    saved = writer.finish()
    assert saved is not None
    record = TextRecord(
        recipe_sha256=run.recipe.digest(),
        started=1.0,
        ended=2.0,
        step="cold-start",
        kind="sft",
        pool="home",
        started_from="model",
        steps=1,
        resumed_from=[],
        checkpoint=checkpoint,
        checkpoint_sha256=saved.sha256,
        figures={},
    )
    run.write_record("steps/cold-start/record", record)
    return saved.folder


@pytest.mark.parametrize("checkpoint", ["../precious", "qualify", "/absolute", "steps/cold-start/../../qualify"])
def test_weights_outside_the_folder_of_their_act_are_refused(
    tmp_path: Path, home: RunFolder, away: RunFolder, checkpoint: str
):
    """The record names a whole checkpoint, which lies where the run has something else."""
    copy = RunFolder(Path(shutil.copytree(away.path, tmp_path / "disk" / "away")), home.recipe)
    named = str(tmp_path / "disk" / "x") if checkpoint == "/absolute" else checkpoint
    folder = trained(copy, named)
    shutil.copytree(folder, copy.path / named, dirs_exist_ok=True)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "mine").write_text("mine")
    said = refused(home, copy.path, kind=DamagedFile)
    assert str(copy.path / "steps" / "cold-start" / "record.json") in said and named in said
    assert content(tmp_path / "precious") == {str(tmp_path / "precious" / "mine"): b"mine"}


def test_weights_in_the_place_of_a_listed_file_are_refused(home: RunFolder, away: RunFolder):
    home.keep(home.path / "steps" / "cold-start" / "incidents" / "001.json", b"{}")
    shutil.copytree(trained(away, "steps/cold-start/incidents"), away.path / "steps" / "cold-start" / "incidents")
    assert "001.json" in refused(home, away.path, kind=DamagedFile)


def test_a_bundle_outside_the_folder_of_bundles_is_refused(home: RunFolder, away: RunFolder):
    handed_off(away, verdict="pass", bundles={"w8a8": "qualify/w8a8"})
    shutil.copytree(away.path / "bundle" / "w8a8", away.path / "qualify" / "w8a8")
    assert "'qualify/w8a8'" in refused(home, away.path, kind=DamagedFile)


def test_of_a_checkpoint_only_the_files_of_its_manifest_are_taken(home: RunFolder, away: RunFolder):
    folder = trained(away)
    (folder / "notes.txt").write_text("not of the checkpoint")
    collect.execute([away.path], home, QUIET)
    record = read_weights(home, "cold-start")
    taken = home.path / record.checkpoint
    assert sorted(path.name for path in taken.iterdir()) == ["manifest.json", "model-00000.safetensors"]
    assert load_model_state(taken, record.checkpoint_sha256)["w"].tolist() == [1.0, 1.0, 1.0]


def linked(path: Path, target: Path) -> Path:
    """A link to a file; what lies in its place moves to the target."""
    if path.exists():
        path.rename(target)
    else:
        target.write_text("secret")
    path.symlink_to(target)
    return path


@pytest.mark.parametrize("name", ["notes.txt", "model-00000.safetensors", "manifest.json"])
def test_a_link_in_a_checkpoint_is_refused(tmp_path: Path, home: RunFolder, away: RunFolder, name: str):
    link = linked(trained(away) / name, tmp_path / "secret")
    assert f"{link} is a link" in refused(home, away.path, kind=DamagedFile)


def test_a_link_to_a_checkpoint_is_refused(tmp_path: Path, home: RunFolder, away: RunFolder):
    link = linked(trained(away).parent, tmp_path / "elsewhere")
    assert f"{link} is a link" in refused(home, away.path, kind=DamagedFile)


def test_a_link_in_a_bundle_is_refused_though_its_seal_holds(home: RunFolder, away: RunFolder):
    folder = handed_off(away, verdict="pass").path / "bundle" / "w8a8"
    weights = folder / "model.safetensors"
    weights.rename(folder / "again.safetensors")
    weights.symlink_to("again.safetensors")
    (folder / "checksums.json").write_text(json.dumps(file_hashes(folder)))
    record = away.read_record("parity", HandoffRecord)
    assert record is not None
    away.write_record("parity", record.model_copy(update={"seal_id": write_seal(folder, **passed()).id}))
    assert f"{weights} is a link" in refused(home, away.path, kind=DamagedFile)


@pytest.mark.parametrize("name", ["qualify/away/failures/matmul/failure.json", "qualify/away/failures", "qualify"])
def test_a_link_to_a_listed_file_is_refused(tmp_path: Path, home: RunFolder, away: RunFolder, name: str):
    link = linked(away.path / name, tmp_path / "elsewhere")
    assert f"{link} is a link" in refused(home, away.path, kind=DamagedFile)
    listed = "qualify/away/failures/matmul/failure.json"
    with pytest.raises(DamagedFile, match=f"{link} is a link"):
        home.receive(listed, away.path / listed, away.entries[listed])


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
