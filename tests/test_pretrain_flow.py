"""Pretraining from a folder of text, as a user runs it: over ranks, killed, continued, and on through all stages."""

from __future__ import annotations

import json
import random
import shutil
import signal
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from isthmus.records import HandoffRecord, WeightsRecord, read_weights
from isthmus.run import RunFolder
from tests.support.flow_recipe import REINFORCED, TAUGHT, isthmus
from tests.support.ranks_recipe import RECIPE, kill_group, planned, start, stop_at, wait_until_nobody_works_on

BASE = """
[[step]]
name = "base"
kind = "pretrain"
folder = "corpus"
steps = 24
rows_per_step = 7
row_length = 48
checkpoint_every = 6

[step.optimizer]
name = "adamw"
learning_rate = 3e-3

"""
_FIRST = RECIPE.index("[[step]]")
PRETRAINED = RECIPE[:_FIRST] + BASE.lstrip() + RECIPE[_FIRST:].replace('from = "model"', 'from = "base"', 1)
WORDS = ("the", "a", "small", "red", "blue", "cat", "dog", "sees", "takes", "near", "under", "house", "and", "then")
LOSSES = ("loss", "mtp_loss", "balance_loss")
ONE_RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
"""What torchrun --nproc-per-node 1 puts into the environment."""


def write_corpus(folder: Path) -> None:
    chance = random.Random(0)
    folder.mkdir()
    for number in range(3):
        text = "\n\n".join(" ".join(chance.choices(WORDS, k=40)) for _ in range(60))
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")


def steps_of(folder: Path, name: str = "base") -> dict[int, dict]:
    return {seen["step"]: seen for seen in RunFolder.open(folder).events(name, "step")}


def record_of(folder: Path, name: str = TAUGHT) -> WeightsRecord:
    return read_weights(RunFolder.open(folder), name)


def assert_close(ours: dict[int, dict], theirs: dict[int, dict], steps: range, tolerance: float) -> None:
    for step in steps:
        for name in LOSSES:
            assert ours[step][name] == pytest.approx(theirs[step][name], abs=tolerance), (step, name)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pretrain")
    write_corpus(folder / "corpus")
    return folder


@pytest.fixture(scope="module")
def uninterrupted(base) -> Path:
    folder = planned(base / "uninterrupted", PRETRAINED, pools__home__ranks=2, sft__steps=4)
    train(folder)
    return folder


def train(folder: Path) -> str:
    """Both steps, one after the other; what they say."""
    said = ""
    for name in ("base", TAUGHT):
        result = isthmus("run", folder, "--only", name)
        assert result.returncode == 0, result.stderr
        said += result.stdout
    return said


@pytest.fixture(scope="module")
def killed(base) -> Path:
    """Two ranks that were killed in the middle of pretraining, after the checkpoint at step 12."""
    folder = planned(base / "killed", PRETRAINED, pools__home__ranks=2, sft__steps=4)
    assert stop_at(folder, 14, kill_group, "base")[0] == -signal.SIGKILL
    wait_until_nobody_works_on(folder)
    return folder


def test_pretraining_comes_first_and_learns(uninterrupted):
    seen, sft = steps_of(uninterrupted), steps_of(uninterrupted, TAUGHT)
    assert list(seen) == list(range(1, 25)) and list(sft) == [1, 2, 3, 4]
    assert seen[24]["loss"] < 0.75 * seen[1]["loss"]
    assert max(event["time"] for event in seen.values()) <= min(event["time"] for event in sft.values())
    assert {event["ranks"] for event in seen.values()} == {2}
    assert all(event["tokens"] == 7 * 48 for event in seen.values())


@pytest.mark.long
def test_a_killed_pretraining_ends_in_the_same_bytes(uninterrupted, killed, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(killed, folder)
    assert "continuing base from the checkpoint at step 12" in train(folder)
    assert record_of(folder, "base").resumed_from == [12] and record_of(folder).resumed_from == []
    for name in ("base", TAUGHT):
        assert record_of(folder, name).checkpoint_sha256 == record_of(uninterrupted, name).checkpoint_sha256
    assert record_of(folder).started_from == "base"
    assert record_of(folder).started_from_sha256 == record_of(uninterrupted, "base").checkpoint_sha256
    last = "steps/base/checkpoints/step-000024/manifest.json"
    assert (folder / last).read_bytes() == (uninterrupted / last).read_bytes()


def test_another_world_goes_on_with_the_same_losses(uninterrupted, killed, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(killed, folder)
    process = start(folder, "base", **ONE_RANK)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    ours = steps_of(folder)
    assert [ours[step]["ranks"] for step in (12, 13, 24)] == [2, 1, 1]
    assert_close(ours, steps_of(uninterrupted), range(13, 17), 1e-6)


def test_a_corpus_that_changed_is_refused_in_words(base, killed, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(killed, folder)
    file = base / "corpus" / "1.txt"
    before = file.read_bytes()
    file.write_bytes(before + b"one more sentence")
    try:
        result = isthmus("run", folder, "--only", "base")
    finally:
        file.write_bytes(before)
    assert result.returncode == 2 and not list(folder.rglob("record.json"))
    assert result.stderr.count("trained on other data") == 1 and "Traceback" not in result.stderr


@pytest.mark.long
def test_one_rank_runs_all_stages_and_shows_its_curves(base, uninterrupted, tmp_path):
    """Its pretraining is that of two ranks. Microbatches and recomputed activations do not change it."""
    recipe, folder = base / "one.toml", tmp_path / "run"
    recipe.write_text(PRETRAINED, encoding="utf-8")
    changed = (f"step.{TAUGHT}.steps=4", "train.tensorboard=true", "train.rows_per_microbatch=3")
    options = [word for change in (*changed, "train.activation_checkpointing=true") for word in ("--set", change)]
    for verb, *words in (("qualify", recipe, "--run", folder, *options), ("plan", folder)):
        assert isthmus(verb, *words).returncode == 0
    result = isthmus("run", folder, "--only", "base", "--profile")
    assert result.returncode == 0, result.stderr
    assert_close(steps_of(folder), steps_of(uninterrupted), range(1, 11), 1e-5)

    trace = folder / "profile" / "base.json"
    assert f"trace: {trace}" in result.stdout
    names = {event.get("name") for event in json.loads(trace.read_bytes())["traceEvents"]}
    assert {"aten::mm", "ProfilerStep#3"} <= names
    assert isthmus("run", folder, "--only", TAUGHT).returncode == 0
    for name, kind in (("base", "pretrain"), (TAUGHT, "sft")):
        curve = EventAccumulator(str(folder / "steps" / name / "tensorboard")).Reload().Scalars(f"{kind}/loss")
        expected = steps_of(folder, name)
        assert {point.step: pytest.approx(point.value) for point in curve} == {
            step: seen["loss"] for step, seen in expected.items()
        }

    result = isthmus("run", folder)
    assert result.returncode == 0, result.stderr
    run = RunFolder.open(folder)
    assert read_weights(run, REINFORCED).steps == 2
    assert run.require_record("parity", HandoffRecord, "handoff").verdict == "pass"
    assert (folder / "report.html").is_file()
