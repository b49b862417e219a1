"""The first minutes of a newcomer: from a fresh clone to the chat page, in the two commands that the README gives."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.support.flow_recipe import ROOT

WITHIN_S = 480.0
"""On two cores that nothing else uses, installation included."""
PAGE = "http://127.0.0.1:8000/"
NOT_A_NEWCOMERS = ("VIRTUAL_ENV", "PYTHONPATH", "OMP_NUM_THREADS", "MAKEFLAGS", "MAKELEVEL", "PYTEST_ADDOPTS")


def chat_page(server: subprocess.Popen[bytes]) -> str:
    """The page, once the server answers."""
    while server.poll() is None:
        try:
            with urllib.request.urlopen(PAGE, timeout=5) as answer:
                return answer.read().decode()
        except urllib.error.URLError:
            time.sleep(0.2)
    raise AssertionError(f"make serve ended with {server.returncode}")


@pytest.mark.long
def test_a_fresh_clone_chats_after_two_commands(tmp_path: Path):
    clone = tmp_path / "isthmus"
    environment = {name: value for name, value in os.environ.items() if name not in NOT_A_NEWCOMERS}
    subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    began = time.monotonic()
    subprocess.run(["make", "run"], cwd=clone, env=environment, check=True)
    server = subprocess.Popen(["make", "serve"], cwd=clone, env=environment, start_new_session=True)
    try:
        page = chat_page(server)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()
    assert "<title>" in page and time.monotonic() - began < WITHIN_S
