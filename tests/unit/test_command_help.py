"""The help of the command itself: what a run goes through, apart from what stands beside it."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest
from click.testing import CliRunner

from isthmus.cli import cli


def test_the_help_tells_the_stages_in_their_order_from_the_tools():
    shown = CliRunner().invoke(cli, ["--help"]).output
    stages, tools = (
        re.findall(r"^  (\w+) +\S", part, re.MULTILINE) for part in shown.partition("Stages:")[2].split("Tools:")
    )
    assert stages == ["run", "qualify", "plan", "steps", "handoff", "report", "serve"]
    assert sorted([*stages, *tools]) == sorted(cli.commands)


@pytest.mark.parametrize("verb", ["train", "rl"])
def test_a_kind_of_step_is_told_how_steps_are_run(verb: str):
    answer = CliRunner().invoke(cli, [verb, "runs/tiny"])
    assert answer.exit_code == 2 and "isthmus run RUN --only NAME" in answer.output


def test_a_mistyped_verb_is_answered_with_the_nearest():
    answer = CliRunner().invoke(cli, ["qualfy"])
    assert answer.exit_code == 2 and "'qualify'" in answer.output


def said_on_a_terminal(columns: int, *arguments: str) -> list[str]:
    """The lines that a command prints on a terminal of so many columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    command = [sys.executable, "-m", "isthmus", *arguments]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    said = b""
    try:
        while part := os.read(ours, 65536):
            said += part
    except OSError:
        pass
    finally:
        os.close(ours)
    process.wait()
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", said.decode()).splitlines()


def test_an_error_is_broken_between_words(tmp_path):
    message = f"isthmus: {tmp_path} is not a run folder: it has no recipe.json. Start one with: isthmus run RECIPE"
    lines = said_on_a_terminal(40, "report", str(tmp_path))
    assert len(lines) > 2 and " ".join(line.strip() for line in lines) == message
    assert all(len(line) <= 40 or str(tmp_path) in line for line in lines)


def test_the_chips_fit_a_terminal_of_80_columns():
    lines = said_on_a_terminal(80, "chips")
    assert max(map(len, lines)) <= 80 and not any("\u2026" in line for line in lines)
    assert len(lines) < 50 and sum("ascend-910b-313t" in line for line in lines) == 1
