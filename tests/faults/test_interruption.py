"""What a user loses when a process is killed, a disk is full, or a file is damaged: nothing that was checkpointed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from isthmus.records import read_weights
from isthmus.run import RunFolder
from isthmus.trainer.checkpoint import load_model_state
from tests.support.flow_recipe import RECIPE, REINFORCED, ROOT, TAUGHT, command, isthmus, settings


@pytest.fixture(scope="module")
def planned(tmp_path_factory) -> Path:
    """A run folder with its qualification and its plan, and nothing trained."""
    folder = tmp_path_factory.mktemp("faults") / "run"
    assert isthmus("qualify", RECIPE, "--run", folder, *settings()).returncode == 0
    assert isthmus("plan", folder).returncode == 0
    return folder


@pytest.fixture(scope="module")
def taught(planned) -> Path:
    return done_after(planned, TAUGHT)


@pytest.fixture(scope="module")
def reinforced(taught) -> Path:
    return done_after(taught, REINFORCED)


def done_after(folder: Path, name: str) -> Path:
    """A copy of a run folder in which one more step is done, undisturbed."""
    copy = folder.parent / name
    shutil.copytree(folder, copy)
    result = isthmus("run", copy, "--only", name)
    assert result.returncode == 0, result.stdout + result.stderr
    return copy


def kill_at_step(folder: Path, name: str, step: int, sent: signal.Signals) -> subprocess.Popen:
    """Start a step and signal it as soon as its events show `step`."""
    process = subprocess.Popen(
        command("run", folder, "--only", name),
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
        steps = run.events(name, "step")
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


def final_weights(folder: Path, name: str) -> dict:
    record = read_weights(RunFolder.open(folder), name)
    return load_model_state(folder / record.checkpoint, record.checkpoint_sha256)


@pytest.mark.parametrize(
    ("before_it", "after_it", "name", "step", "damaged"),
    [
        pytest.param("planned", "taught", TAUGHT, 40, False, marks=pytest.mark.long),
        ("taught", "reinforced", REINFORCED, 7, True),
    ],
)
def test_kill_9_continues_to_the_same_weights(request, tmp_path, before_it, after_it, name, step, damaged):
    """From the newest checkpoint, or, if that is damaged, from the one before."""
    folder, uninterrupted = tmp_path / "run", request.getfixturevalue(after_it)
    shutil.copytree(request.getfixturevalue(before_it), folder)
    kill_at_step(folder, name, step, signal.SIGKILL)
    assert not (folder / "steps" / name / "record.json").exists()
    newest, before = sorted((folder / "steps" / name / "checkpoints").glob("step-*"))[:-3:-1]
    if damaged:
        flip_bit(newest / "optimizer-00000.safetensors")
    result = isthmus("run", folder, "--only", name)
    assert result.returncode == 0, result.stdout + result.stderr

    run = RunFolder.open(folder)
    resumed = read_weights(run, name).resumed_from
    assert resumed == [int((before if damaged else newest).name.removeprefix("step-"))]
    named = [event["what"] for event in run.events(name, "fallback") if newest.name in event["what"]]
    assert len(named) == damaged and all("does not match its hash" in what for what in named)
    steps = [event["step"] for event in run.events(name, "step")]
    assert steps == list(range(1, steps[-1] + 1))
    ours, straight = (final_weights(place, name) for place in (folder, uninterrupted))
    for key, tensor in straight.items():
        assert tensor.equal(ours[key]), key


def test_a_killed_trainer_leaves_no_engine_behind(taught, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(taught, folder)
    process = kill_at_step(folder, REINFORCED, 1, signal.SIGKILL)
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
    process = kill_at_step(folder, TAUGHT, 3, signal.SIGINT)
    message = process.stderr.read()
    assert process.returncode == 130
    assert f"isthmus run {folder} --only {TAUGHT}" in message and "Traceback" not in message


def test_a_flipped_bit_in_a_checkpoint_stops_the_next_stage(taught, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(taught, folder)
    record = read_weights(RunFolder.open(folder), TAUGHT)
    flip_bit(folder / record.checkpoint / "model-00000.safetensors")
    result = isthmus("run", folder, "--only", REINFORCED)
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
        result = isthmus("run", small / "run", "--only", TAUGHT)
        assert result.returncode == 2
        assert "no space left" in result.stderr and "Traceback" not in result.stderr
        assert not list((small / "run").rglob("*.tmp"))
        assert not list((small / "run").rglob("record.json"))
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("run", "recipes/tny.toml"), "no recipe at"),
        (("run", RECIPE, "--set", "step.cold-start.step=3"), "did you mean 'steps'"),
        (("run", RECIPE, "--set", "pools.away.chip=ascend-910b-313"), "did you mean"),
        (("run", RECIPE, "--set", "pools.away.rehearsed=false"), "rehearsed = true"),
        (("chips", "h8000"), "did you mean"),
        (("qualify", "nowhere"), "no recipe at"),
        (("train", "nowhere"), "isthmus run RUN --only NAME"),
        (("run", RECIPE, "--set", "sft.steps=3"), "step.NAME.steps=3"),
        (("run", RECIPE, "--only", "resoning"), "did you mean 'reasoning'"),
        (("frobnicate",), "No such command"),
    ],
)
def test_wrong_usage_is_a_clear_message_and_exit_code_2(words, message, tmp_path):
    extra = ("--run", tmp_path / "run") if words[0] == "run" else ()
    result = isthmus(*words, *extra)
    assert result.returncode == 2
    assert message in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()
