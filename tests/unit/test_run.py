"""The run folder and its figures: kinds that hold, writes that are whole or nothing, events that survive a kill."""

from __future__ import annotations

import errno
import json
import os
import stat
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from isthmus.errors import DamagedFile, IsthmusError
from isthmus.recipe.read import parse_recipe
from isthmus.recipe.schema import Recipe, content_digest
from isthmus.records import PlanRecord
from isthmus.run import Figure, RunFolder, sha256_file, write_atomic

KINDS = ("measured", "declared", "forecast", "rehearsed")


def recipe(**changes) -> Recipe:
    optimizer = {"name": "adamw", "learning_rate": 1e-3}
    tree = {
        "name": "small",
        "model": {"preset": "r-nano"},
        "pools": {"home": {"chip": "cpu"}, "away": {"chip": "cpu", "rehearsed": True}},
        "place": {"train": ["home"], "rollout": ["away"], "serve": ["away"]},
        "step": [
            {"name": "taught", "kind": "sft", "steps": 4, "optimizer": optimizer},
            {"name": "reinforced", "kind": "rl", "from": "taught", "steps": 2, "optimizer": optimizer},
        ],
    }
    return parse_recipe({**tree, **changes})


def plan(run: RunFolder) -> PlanRecord:
    figure = Figure(value=3.0, unit="s", kind="forecast", source="a guess", low=2.0, high=5.0)
    return PlanRecord(
        recipe_sha256=run.recipe.digest(),
        started=1.0,
        ended=2.5,
        placements=[],
        rejected=[],
        estimate={"taught": figure},
    )


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", recipe())


def figure(kind: str, value: float | None = 1.0) -> Figure:
    return Figure(value=value, unit="s", kind=kind, source="somewhere")  # type: ignore[arg-type]


def test_a_number_read_off_a_rehearsed_pool_is_rehearsed():
    assert Figure.measured(1.0, "s", "clock", rehearsed=True).kind == "rehearsed"
    assert Figure.measured(1.0, "s", "clock", rehearsed=False).kind == "measured"


@given(kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=5))
def test_a_derived_figure_is_measured_only_if_all_it_comes_from_is(kinds: list[str]):
    derived = Figure.derived(1.0, "s", "sum", *(figure(kind) for kind in kinds))
    assert (derived.kind == "measured") == (set(kinds) == {"measured"})
    assert ("rehearsed" in kinds) == (derived.kind == "rehearsed")
    assert derived.kind in kinds


def test_a_derived_figure_needs_its_inputs():
    with pytest.raises(ValueError, match="needs the figures"):
        Figure.derived(1.0, "s", "thin air")


def test_the_kind_of_a_figure_cannot_be_changed():
    rehearsed = figure("rehearsed")
    with pytest.raises(ValidationError, match="frozen"):
        rehearsed.kind = "measured"  # type: ignore[misc]
    with pytest.raises(TypeError, match="kind of a figure cannot be changed"):
        rehearsed.model_copy(update={"kind": "measured"})
    with pytest.raises(TypeError, match="kind of a figure cannot be changed"):
        rehearsed.copy(update={"kind": "measured"})
    assert rehearsed.model_copy(update={"value": 2.0}).kind == "rehearsed"


def test_a_copied_figure_is_checked_like_a_new_one():
    for update in ({"value": float("nan")}, {"source": ""}, {"unknown": 1}):
        with pytest.raises(ValidationError):
            figure("measured").model_copy(update=update)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("end", ["value", "low", "high"])
def test_a_figure_is_finite_or_unknown(end: str, value: float):
    with pytest.raises(ValidationError, match="finite or unknown"):
        Figure(**{"value": 1.0, "unit": "s", "kind": "measured", "source": "x", end: value})


@pytest.mark.parametrize("changes", [{"source": ""}, {"kind": "assumed"}, {"colour": "red"}])
def test_a_figure_has_a_source_and_one_of_the_four_kinds(changes: dict):
    with pytest.raises(ValidationError):
        Figure(**{"value": 1.0, "unit": "s", "kind": "measured", "source": "x", **changes})


@pytest.mark.parametrize("kind", KINDS)
def test_a_printed_figure_says_its_kind(kind: str):
    assert f"({kind})" in str(figure(kind))
    assert str(figure(kind, value=None)).startswith("unknown")


def test_a_figure_keeps_its_kind_through_a_record_on_disk(run: RunFolder):
    run.write_record("plan", plan(run))
    read = run.read_record("plan", PlanRecord)
    assert read == plan(run)
    assert read is not None
    assert read.seconds == 1.5
    assert read.estimate["taught"].kind == "forecast"


def break_sync(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fail(_descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "no space left"), (errno.EDQUOT, "no space left"), (errno.EROFS, "cannot be written")],
)
def test_a_failed_write_leaves_the_old_content_and_nothing_else(tmp_path: Path, monkeypatch, number: int, words: str):
    target = tmp_path / "record.json"
    write_atomic(target, b"old")
    break_sync(monkeypatch, number)
    with pytest.raises(IsthmusError, match=words) as caught:
        write_atomic(target, b"new")
    assert str(target) in str(caught.value)
    assert target.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["record.json"]


def test_a_write_that_is_interrupted_before_the_rename_leaves_the_old_content(tmp_path: Path, monkeypatch):
    target = tmp_path / "record.json"
    write_atomic(target, b"old")

    def interrupt(_descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(target, b"new")
    assert target.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["record.json"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_an_event_on_a_full_disk_is_a_clear_error(run: RunFolder):
    (run.path / "events.jsonl").unlink()
    (run.path / "events.jsonl").symlink_to("/dev/full")
    with pytest.raises(IsthmusError, match="no space left"):
        run.event("taught", "start")


def test_the_new_content_is_on_the_disk_before_its_name_and_the_name_after(tmp_path: Path, monkeypatch):
    """Order of the system calls: flush of the file, rename, flush of the folder."""
    calls: list[str] = []
    sync, replace = os.fsync, Path.replace

    def note_sync(descriptor: int) -> None:
        calls.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        sync(descriptor)

    def note_replace(self: Path, target: Path) -> Path:
        calls.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "replace", note_replace)
    write_atomic(tmp_path / "record.json", b"content")
    assert calls == ["file", "rename", "folder"]


def test_a_record_that_is_missing_or_damaged_is_named(run: RunFolder):
    assert run.read_record("plan", PlanRecord) is None
    with pytest.raises(IsthmusError, match=r"plan\.json is missing; first run: isthmus plan"):
        run.require_record("plan", PlanRecord, "plan")
    run.write_record("plan", plan(run))
    (run.path / "plan.json").write_text('{"placements": []}', encoding="utf-8")
    with pytest.raises(DamagedFile, match=r"plan\.json is not what was written.*Delete it to run its stage again"):
        run.read_record("plan", PlanRecord)


def test_a_folder_of_an_older_version_opens_and_an_edited_one_does_not(run: RunFolder):
    stored = json.loads((run.path / "recipe.json").read_text())
    del stored["recipe"]["serve"]["thinking"]
    older = {"recipe": stored["recipe"], "sha256": content_digest(stored["recipe"])}
    (run.path / "recipe.json").write_text(json.dumps(older))
    assert RunFolder.open(run.path).recipe == run.recipe
    older["recipe"]["seed"] += 1
    (run.path / "recipe.json").write_text(json.dumps(older))
    with pytest.raises(DamagedFile, match="it was edited"):
        RunFolder.open(run.path)


def test_events_come_back_in_order_and_by_stage(run: RunFolder):
    began = time.time()
    run.event("taught", "start", pool="home")
    run.event("reinforced", "start", pool="away")
    run.event("taught", "fallback", what="x", why="y")
    assert [(entry["stage"], entry["event"]) for entry in run.events()] == [
        ("taught", "start"),
        ("reinforced", "start"),
        ("taught", "fallback"),
    ]
    assert [entry["event"] for entry in run.events("taught")] == ["start", "fallback"]
    assert [entry["stage"] for entry in run.events(event="start")] == ["taught", "reinforced"]
    assert all(began - 1 <= entry["time"] <= time.time() + 1 for entry in run.events())


def test_of_events_that_repeat_a_step_the_last_counts(run: RunFolder):
    for attempt, steps in enumerate([(1, 2, 3), (2, 3, 4)]):
        for step in steps:
            run.event("taught", "step", step=step, loss=10 * attempt + step)
    run.event("reinforced", "step", step=2, loss=99)
    assert [(entry["step"], entry["loss"]) for entry in run.events("taught", "step")] == [
        (1, 1),
        (2, 12),
        (3, 13),
        (4, 14),
    ]
    assert [entry["loss"] for entry in run.events("reinforced", "step")] == [99]


def test_equal_events_without_a_step_are_all_kept(run: RunFolder):
    run.event("taught", "start")
    run.event("taught", "start")
    assert len(run.events("taught", "start")) == 2


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_torn_line_is_left_out_and_does_not_swallow_the_next(run: RunFolder, cut: int):
    run.event("taught", "step", step=1)
    run.event("taught", "step", step=2)
    log = run.path / "events.jsonl"
    log.write_bytes(log.read_bytes()[:-cut])
    run.event("taught", "step", step=3)
    kept = [entry["step"] for entry in run.events("taught", "step")]
    assert kept == ([1, 2, 3] if cut == 1 else [1, 3])


def test_events_survive_bytes_that_were_never_written(run: RunFolder):
    """After a power loss a file may end in zero bytes where its length was stored before its content."""
    run.event("taught", "step", step=1)
    with (run.path / "events.jsonl").open("ab") as log:
        log.write(b"\0" * 64)
    run.event("taught", "step", step=2)
    assert [entry["step"] for entry in run.events("taught", "step")] == [1, 2]


def test_an_event_that_is_not_json_is_refused_before_it_is_written(run: RunFolder):
    with pytest.raises(ValueError, match="JSON"):
        run.event("taught", "step", step=1, loss=float("nan"))
    assert run.events() == []


def test_create_continues_a_run_of_the_same_recipe(run: RunFolder):
    run.event("taught", "start")
    again = RunFolder.create(run.path, recipe())
    assert again.recipe == run.recipe
    assert len(again.events()) == 1


def test_create_refuses_another_recipe_and_names_the_difference(run: RunFolder):
    other = recipe(seed=5, pools={"home": {"chip": "cpu", "count": 2}, "away": {"chip": "cpu", "rehearsed": True}})
    with pytest.raises(
        IsthmusError, match=r"belongs to another recipe \(different pools\.home\.count, seed\)"
    ) as caught:
        RunFolder.create(run.path, other)
    assert "--run" in str(caught.value), "it says what to do instead"
    assert RunFolder.open(run.path).recipe == run.recipe


def test_the_difference_of_a_step_is_named_by_the_step(run: RunFolder):
    tree = recipe().model_dump(by_alias=True, exclude={"model"}, exclude_none=True)
    tree["step"][0]["steps"], tree["step"][1]["from"] = 5, "model"
    with pytest.raises(IsthmusError, match=r"different step\.reinforced\.from, step\.taught\.steps\)"):
        RunFolder.create(run.path, recipe(step=tree["step"]))


def test_open_gives_back_the_recipe_without_the_files_it_came_from(tmp_path: Path):
    source = tmp_path / "checkpoint"
    source.mkdir()
    config = recipe().model.model_dump(exclude={"preset", "from_", "rope_scaling"}) | {"model_type": "deepseek_v3"}
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    made = RunFolder.create(tmp_path / "run", recipe(model={"from": str(source)}))
    (source / "config.json").unlink()
    assert RunFolder.open(tmp_path / "run").recipe == made.recipe


def test_an_edited_recipe_is_detected(run: RunFolder):
    stored = run.path / "recipe.json"
    content = json.loads(stored.read_text(encoding="utf-8"))
    content["recipe"]["step"][0]["steps"] += 1
    stored.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(DamagedFile, match="does not match its hash: it was edited"):
        RunFolder.open(run.path)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"recipe": 3}', '{"sha256": "0"}'])
def test_a_recipe_file_of_another_shape_is_an_error_for_the_user(run: RunFolder, content: str):
    (run.path / "recipe.json").write_text(content, encoding="utf-8")
    with pytest.raises(IsthmusError):
        RunFolder.open(run.path)


def test_open_says_what_a_run_folder_is(tmp_path: Path):
    with pytest.raises(IsthmusError, match=r"not a run folder: it has no recipe\.json"):
        RunFolder.open(tmp_path)


def test_create_below_a_file_is_an_error_for_the_user(tmp_path: Path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(IsthmusError, match="file"):
        RunFolder.create(tmp_path / "file" / "run", recipe())
    with pytest.raises(IsthmusError, match="file"):
        RunFolder.create(tmp_path / "file", recipe())


def test_the_hash_of_a_file_is_the_published_one(tmp_path: Path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_file(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
