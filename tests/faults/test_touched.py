"""Single faults in the files of a finished run: `isthmus inspect` names each, and no run goes on from it unseen."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from isthmus.chain import read_chain
from isthmus.cli import cli
from isthmus.errors import DamagedFile, IsthmusError
from isthmus.formats.files.bundle import write_bundle
from isthmus.model.model import Model
from isthmus.parity.seal import verify_seal, write_seal
from isthmus.recipe.read import load_recipe
from isthmus.records import HandoffRecord, Placement, PlanRecord, TextRecord
from isthmus.run import RunFolder
from isthmus.tools.inspect import check_run
from isthmus.trainer.checkpoint import CheckpointWriter, TrainingState, load_model_state
from tests.support.bundles import TinyTokenizer, passed
from tests.support.flow_recipe import RECIPE, REINFORCED, TAUGHT
from tests.support.small import tiny_architecture
from tests.support.touched import plant

FAULTS = 200
CHECKPOINT, BUNDLE = f"steps/{TAUGHT}/checkpoints/step-000002", "bundle/w8a8"


def header(run: RunFolder) -> dict:
    return {"recipe_sha256": run.recipe.digest(), "started": 1.0, "ended": 2.5}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> RunFolder:
    """A run with a plan, a step with its checkpoint, rollouts and answers of another, and a sealed bundle."""
    run = RunFolder.create(tmp_path_factory.mktemp("finished") / "run", load_recipe(RECIPE))
    run.event("plan", "start")
    placements = [Placement(stage=stage, pool="home", reason="here") for stage in ("train", "rollout", "serve")]
    run.write_record("plan", PlanRecord(**header(run), placements=placements, rejected=[], estimate={}))
    run.event("plan", "end", seconds=1.5)
    saved = None
    for step in (1, 2):
        run.event(TAUGHT, "step", step=step, loss=1.0 / step)
        weights = {"a": torch.full((3,), float(step)), "b": torch.randn(5)}
        writer = CheckpointWriter(run.step_folder(TAUGHT) / "checkpoints", 2, None)
        writer.save(step, TrainingState(weights, {"a/m": weights["a"] * 2}, {"rng": {"cpu": "00ff"}}))
        saved = writer.finish()
    assert saved is not None
    run.write_record(
        f"steps/{TAUGHT}/record",
        TextRecord(
            **header(run),
            step=TAUGHT,
            kind="sft",
            pool="home",
            started_from="model",
            steps=2,
            resumed_from=[],
            checkpoint=CHECKPOINT,
            checkpoint_sha256=saved.sha256,
            figures={},
        ),
    )
    for name in ("rollout-000002", "rollout-000004", "heldout-before", "heldout-after"):
        content = f'{{"{name}": [[1, 2, 3], [4.5, 1e-05]]}}'.encode()
        run.keep(run.step_folder(REINFORCED) / f"{name}.json", content, {"weights": "ab" * 32})
    state, folder = Model(tiny_architecture()).initialise(0).state_dict(), run.path / BUNDLE
    write_bundle(folder, "w8a8", state, tiny_architecture(), TinyTokenizer(0, 1))
    seal = write_seal(folder, **passed())
    handed = {"format": "w8a8", "verdict": "pass", "checks": [], "bundles": {"w8a8": BUNDLE}, "figures": {}}
    pools = {"source_pool": "home", "target_pool": "away"}
    run.write_record("parity", HandoffRecord(**header(run), **pools, **handed, seal_id=seal.id))
    run.event("handoff", "end", seconds=1.0)
    return run


def goes_on_unseen(folder: Path, touched: list[Path]) -> bool:
    """Whether a run, the next step and a server take the folder as it is, and say nothing."""
    names = {path.relative_to(folder).as_posix() for path in touched}
    if any(name.startswith(BUNDLE) for name in names):
        with pytest.raises(IsthmusError):
            verify_seal(folder / BUNDLE)
        return False
    try:
        run = RunFolder.open(folder)
        run.go_on()
        said = [event["what"] for event in run.events("run", "fallback")]
        if any(name in what for what in said for name in names):
            return False
        record = run.read_record(f"steps/{TAUGHT}/record", TextRecord)
        assert record is not None
        load_model_state(folder / record.checkpoint, record.checkpoint_sha256)
    except IsthmusError:
        return False
    # What is left are checkpoints before the last, and the optimiser's state, which `load_latest` verifies.
    return not all("/checkpoints/" in name for name in names)


def test_every_single_fault_is_named_and_none_is_continued_from_unseen(finished):
    folder, chance = finished.path, random.Random(11)
    assert check_run(folder).breaks == []
    whole = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    for _ in range(FAULTS):
        done = _, touched = plant(chance, list(whole))
        breaks = check_run(folder).breaks
        assert breaks, done
        named = [path for path in touched if any(_names(path, folder, line) for line in breaks)]
        assert named, (done, breaks)
        assert not goes_on_unseen(folder, touched), done
        for path, content in whole.items():
            if not path.exists() or path.read_bytes() != content:
                path.write_bytes(content)
    assert check_run(folder).breaks == []


def _names(path: Path, folder: Path, line: str) -> bool:
    return path.relative_to(folder).as_posix() in line or path.name in line


def test_inspect_says_which_file_and_what_to_do(finished):
    path = finished.step_folder(REINFORCED) / "rollout-000004.json"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"4.5", b"4.6"))
    try:
        result = CliRunner().invoke(cli, ["inspect", str(finished.path)])
        assert result.exit_code == 1 and "rollout-000004.json does not match" in " ".join(str(result.exception).split())
        with pytest.raises(DamagedFile, match=r"rollout-000004\.json.*Restore it; or delete it"):
            finished.go_on()
        with pytest.raises(DamagedFile, match="was changed"):
            finished.read_kept(path, "Or delete it")
    finally:
        path.write_bytes(content)


def test_a_run_folder_from_before_there_were_hashes_opens_with_a_note(finished, tmp_path):
    run = RunFolder.create(tmp_path / "old", finished.recipe)
    for name in ("files.json", "events.jsonl"):
        (run.path / name).unlink()
    (run.path / "events.jsonl").write_text('{"time": 1.0, "stage": "plan", "event": "start"}\n')
    (run.path / "plan.json").write_bytes((finished.path / "plan.json").read_bytes())
    checked = check_run(run.path)
    assert checked.breaks == [] and "before runs had hashes" in checked.notes[0]
    run.go_on()
    run.event("plan", "end")
    assert [event["event"] for event in run.events()] == ["start", "end"] and run.read_record("plan", PlanRecord)
    assert check_run(run.path).breaks == []
    (run.path / "events.jsonl").write_text((run.path / "events.jsonl").read_text().replace("1.0", "9.0"))
    assert "events.jsonl" in check_run(run.path).breaks[0], "what came before the chain is covered from then on"


@pytest.mark.parametrize("torn", [b'{"time": 1', b"\0" * 40])
def test_what_kill_9_tears_breaks_no_chain(finished, tmp_path, torn):
    run = RunFolder.create(tmp_path / "run", finished.recipe)
    run.event("plan", "start")
    for step in (1, 2):
        with (run.path / "events.jsonl").open("ab") as file:
            file.write(torn)
        assert run.breaks() == []
        RunFolder.open(run.path).go_on()
        run.event("taught", "step", step=step)
    assert [event.get("step") for event in run.events()] == [None, 1, 2] and run.breaks() == []
    assert read_chain((run.path / "events.jsonl").read_bytes()).problem is None


def test_a_writer_that_dies_between_a_file_and_the_list_leaves_a_run_that_goes_on(finished, tmp_path, monkeypatch):
    run = RunFolder.create(tmp_path / "run", finished.recipe)
    path = run.path / "notes.json"
    run.keep(path, b"old")
    for content, dies_at in ((b"new", "notes.json"), (b"newer", "files.json")):
        seen: list[str] = []
        replace = Path.replace

        def die(self, target, dies_at=dies_at, seen=seen, replace=replace):
            seen.append(target.name)
            if target.name == dies_at and seen != ["files.json"]:
                raise KeyboardInterrupt
            return replace(self, target)

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(Path, "replace", die)
            run.keep(path, content)
        assert run.breaks() == []
        assert run.read_kept(path, "") == (b"old" if dies_at == "notes.json" else b"newer")
        run.go_on()
        assert run.breaks() == [] and run.events("run", "fallback") == []


@pytest.mark.parametrize("gone", ["checksums.json", "config.json", "seal.json"])
def test_a_bundle_without_one_of_its_lists_is_missed(finished, tmp_path, gone):
    folder = shutil.copytree(finished.path, tmp_path / "run")
    (folder / BUNDLE / gone).unlink()
    assert any(BUNDLE in line for line in check_run(folder).breaks)
    shutil.rmtree(folder / BUNDLE)
    assert any(BUNDLE in line for line in check_run(folder).breaks)


def test_what_is_not_checked_is_said(finished, tmp_path):
    folder = shutil.copytree(finished.path, tmp_path / "run")
    assert check_run(folder).notes == []
    (folder / "steps" / TAUGHT / "engine.log").write_text("it said", encoding="utf-8")
    (note,) = check_run(folder).notes
    assert "not checked" in note and f"steps/{TAUGHT}/engine.log" in note


@pytest.mark.parametrize("noted", ["a record", "a checkpoint"])
def test_events_that_are_cut_at_their_end_are_missed(tmp_path, noted):
    """After each line: a step tells no line but those of its updates, until its record or a checkpoint notes them."""
    run = RunFolder.create(tmp_path / "run", load_recipe(RECIPE))
    run.event(TAUGHT, "start")
    for step in range(1, 6):
        run.event(TAUGHT, "step", step=step, loss=1.0 / step)
    if noted == "a record":
        placements = [Placement(stage=stage, pool="home", reason="here") for stage in ("train", "rollout", "serve")]
        run.write_record("plan", PlanRecord(**header(run), placements=placements, rejected=[], estimate={}))
    else:
        run.note_events()
    assert check_run(run.path).breaks == []
    path = run.path / "events.jsonl"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    assert len(lines) == 6
    for kept in range(6):
        path.write_bytes(b"".join(lines[:kept]))
        assert any("events.jsonl" in line for line in check_run(run.path).breaks), kept
        with pytest.raises(DamagedFile):
            run.go_on() if kept else run.event(TAUGHT, "step", step=6)
        run.note_events()
        assert check_run(run.path).breaks, "what comes later does not hide it"
    path.write_bytes(whole)
    assert check_run(run.path).breaks == []
    run.event(TAUGHT, "step", step=6)
    assert check_run(run.path).breaks == []
