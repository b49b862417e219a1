"""The help of the command itself: what a run goes through, apart from what stands beside it."""

from __future__ import annotations

import re

from click.testing import CliRunner

from isthmus.cli import cli


def test_the_help_tells_the_stages_in_their_order_from_the_tools():
    shown = CliRunner().invoke(cli, ["--help"]).output
    stages, tools = (
        re.findall(r"^  (\w+) +\S", part, re.MULTILINE) for part in shown.partition("Stages:")[2].split("Tools:")
    )
    assert stages == ["run", "qualify", "plan", "train", "rl", "handoff", "report", "serve"]
    assert sorted([*stages, *tools]) == sorted(cli.commands)


def test_a_mistyped_verb_is_answered_with_the_nearest():
    answer = CliRunner().invoke(cli, ["qualfy"])
    assert answer.exit_code == 2 and "'qualify'" in answer.output
