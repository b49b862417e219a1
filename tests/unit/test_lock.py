"""One writer: a second one is told who the first is, and what a dead one left is taken over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from isthmus.errors import IsthmusError
from isthmus.lock import NAME, STALE_S, writing_bundle, writing_run
from tests.support.flow_recipe import RECIPE, isthmus

HOLD = """
import sys, time
from pathlib import Path
from isthmus.lock import writing_run
with writing_run(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    """Another process that holds the lock of a run folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_the_second_writer_is_told_who_the_first_is_and_a_dead_ones_lock_is_taken_over(tmp_path: Path):
    process = holder(tmp_path)
    try:
        with pytest.raises(IsthmusError, match=f"process {process.pid} on ") as caught, writing_run(tmp_path):
            pass
        assert caught.value.exit_code == 2
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (tmp_path / NAME).exists(), "kill -9 leaves the lock"
    with writing_run(tmp_path):
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_of_another_machine_counts_as_long_as_it_is_touched(tmp_path: Path):
    with writing_run(tmp_path):
        owner = json.loads((tmp_path / NAME).read_text())
    (tmp_path / NAME).write_text(json.dumps({**owner, "place": "another kernel", "host": "far"}))
    with pytest.raises(IsthmusError, match=" on far "), writing_run(tmp_path):
        pass
    long_ago = time.time() - 2 * STALE_S
    os.utime(tmp_path / NAME, (long_ago, long_ago))
    with writing_run(tmp_path):
        pass


def test_a_process_of_the_same_number_is_another_one(tmp_path: Path):
    with writing_run(tmp_path):
        owner = json.loads((tmp_path / NAME).read_text())
    (tmp_path / NAME).write_text(json.dumps({**owner, "born": "1"}))
    with writing_run(tmp_path):
        pass


@pytest.mark.parametrize("content", ["{", "[" * 100_000])
def test_what_is_no_lock_of_ours_is_taken_away(tmp_path: Path, content: str):
    (tmp_path / NAME).write_text(content)
    with writing_run(tmp_path):
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()


def test_a_bundle_has_its_lock_beside_it_where_it_counts_as_no_file_of_the_bundle(tmp_path: Path):
    with writing_bundle(tmp_path / "bundle"):
        assert [path.name for path in tmp_path.iterdir()] == [f".bundle{NAME}"]
        with pytest.raises(IsthmusError, match="is being written by process"), writing_bundle(tmp_path / "bundle"):
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_second_run_of_the_same_folder_ends_with_exit_code_2_and_changes_nothing(tmp_path: Path):
    process = holder(tmp_path / "run")
    try:
        refused = isthmus("run", RECIPE, "--run", tmp_path / "run")
    finally:
        process.kill()
        process.wait()
    assert refused.returncode == 2 and f"process {process.pid}" in refused.stderr
    kept = [NAME, "events.jsonl", "files.json", "recipe.json"]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == kept
