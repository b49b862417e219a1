"""What a user loses when a process is killed, a disk is full, or a file is damaged: nothing that was checkpointed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from isthmus.records import RlRecord, TrainRecord
from isthmus.run import RunFolder
from isthmus.trainer.checkpoint import load_model_state
from tests.support.flow_recipe import RECIPE, ROOT, command, isthmus, settings


@pytest.fixture(scope="module")
def planned(tmp_path_factory) -> Path:
    """A run folder with its qualification and its plan, and nothing trained."""
    folder = tmp_path_factory.mktemp("faults") / "run"
    assert isthmus("qualify", RECIPE, "--run", folder, *settings()).returncode == 0
    assert isthmus("plan", folder).returncode == 0
    return folder


@pytest.fixture(scope="module")
def uninterrupted(planned) -> Path:
    folder = planned.parent / "uninterrupted"
    shutil.copytree(planned, folder)
    for verb in ("train", "rl"):
        result = isthmus(verb, folder)
        assert result.returncode == 0, result.stdout + result.stderr
    return folder


def kill_at_step(folder: Path, verb: str, step: int, sent: signal.Signals) -> subprocess.Popen:
    """Start a stage and signal it as soon as its events show `step`."""
    process = subprocess.Popen(
        command(verb, folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    run = RunFolder.open(folder)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        steps = run.events(verb, "step")
        if steps and steps[-1]["step"] >= step:
            break
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(sent)
    process.wait(timeout=30)
    return process


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 16
    path.write_bytes(content)


def final_weights(folder: Path, stage: str, record_type) -> dict:
    record = RunFolder.open(folder).read_record(stage, record_type)
    return load_model_state(folder / record.checkpoint, record.checkpoint_sha256)


@pytest.mark.parametrize(
    ("verb", "step", "damaged", "record_type"), [("train", 40, False, TrainRecord), ("rl", 7, True, RlRecord)]
)
def test_kill_9_continues_to_the_same_weights(uninterrupted, tmp_path, verb, step, damaged, record_type):
    """From the newest checkpoint, or, if that is damaged, from the one before."""
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    for name in ["rl.json", "rl", "checkpoints/rl"] + (["train.json", "checkpoints/train"] if verb == "train" else []):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    events = (folder / "events.jsonl").read_text().splitlines(keepends=True)
    dropped = ('"stage": "rl"',) if verb == "rl" else ('"stage": "rl"', '"stage": "train"')
    (folder / "events.jsonl").write_text("".join(line for line in events if not any(word in line for word in dropped)))

    kill_at_step(folder, verb, step, signal.SIGKILL)
    assert not (folder / f"{verb}.json").exists()
    newest, before = sorted((folder / "checkpoints" / verb).glob("step-*"))[:-3:-1]
    if damaged:
        flip_bit(newest / "optimizer-00000.safetensors")
    result = isthmus(verb, folder)
    assert result.returncode == 0, result.stdout + result.stderr

    run = RunFolder.open(folder)
    resumed = run.read_record(verb, record_type).resumed_from
    assert resumed == [int((before if damaged else newest).name.removeprefix("step-"))]
    named = [event["what"] for event in run.events(verb, "fallback") if newest.name in event["what"]]
    assert len(named) == damaged and all("does not match its hash" in what for what in named)
    steps = [event["step"] for event in run.events(verb, "step")]
    assert steps == list(range(1, steps[-1] + 1))
    ours, straight = (final_weights(place, verb, record_type) for place in (folder, uninterrupted))
    for name, tensor in straight.items():
        assert tensor.equal(ours[name]), name


def test_a_killed_trainer_leaves_no_engine_behind(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    (folder / "rl.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "rl")
    (folder / "events.jsonl").unlink()
    process = kill_at_step(folder, "rl", 1, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and session_members(process.pid):
        time.sleep(0.1)
    assert not session_members(process.pid)


def session_members(session: int) -> list[int]:
    """Processes that are alive in a session."""
    members = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                members.append(int(entry.name))
    return members


def test_ctrl_c_says_how_to_go_on(planned, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(planned, folder)
    process = kill_at_step(folder, "train", 3, signal.SIGINT)
    message = process.stderr.read()
    assert process.returncode == 130
    assert f"isthmus train {folder}" in message and "Traceback" not in message


def test_a_flipped_bit_in_a_checkpoint_stops_the_next_stage(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    shutil.rmtree(folder / "checkpoints" / "rl")
    (folder / "rl.json").unlink()
    record = RunFolder.open(folder).read_record("train", TrainRecord)
    flip_bit(folder / record.checkpoint / "model-00000.safetensors")
    result = isthmus("rl", folder)
    assert result.returncode == 1
    assert "does not match its hash" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_is_a_message_and_no_half_written_file(planned, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"this machine mounts no tmpfs: {mounted.stderr.strip()}")
    try:
        shutil.copytree(planned, small / "run")
        result = isthmus("train", small / "run")
        assert result.returncode == 2
        assert "no space left" in result.stderr and "Traceback" not in result.stderr
        assert not list((small / "run").rglob("*.tmp"))
        assert not (small / "run" / "train.json").exists()
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("run", "recipes/tny.toml"), "no recipe at"),
        (("run", RECIPE, "--set", "sft.step=3"), "did you mean 'steps'"),
        (("run", RECIPE, "--set", "pools.away.chip=ascend-910b-313"), "did you mean"),
        (("run", RECIPE, "--set", "pools.away.rehearsed=false"), "rehearsed = true"),
        (("chips", "h8000"), "did you mean"),
        (("train", "nowhere"), "no recipe at"),
        (("frobnicate",), "No such command"),
    ],
)
def test_wrong_usage_is_a_clear_message_and_exit_code_2(words, message, tmp_path):
    extra = ("--run", tmp_path / "run") if words[0] == "run" else ()
    result = isthmus(*words, *extra)
    assert result.returncode == 2
    assert message in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()
