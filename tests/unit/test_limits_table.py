"""The table of limits in docs/api.md says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from isthmus.data import template_limits
from isthmus.engines.local.api import answers, host, intake, measure, protocol
from isthmus.engines.local.core import grammar

API = Path(__file__).parents[2] / "docs" / "api.md"
LIMITS = {
    "Bytes of a body": [intake.MAX_BODY_BYTES],
    "Bytes of all bodies that are not read yet": [intake.MAX_UNFINISHED_BYTES],
    "Keys in a body": [measure.MAX_KEYS],
    "Values in a body": [measure.MAX_VALUES],
    "Lists and objects in a body": [measure.MAX_CONTAINERS],
    "Levels of nesting in a body": [measure.MAX_NESTING],
    "Levels of nesting in a schema, or in `metadata`": [protocol.MAX_DEPTH],
    "Samples of a request": [protocol.MAX_SAMPLES],
    "Tools": [protocol.MAX_TOOLS],
    "Stop strings, and characters in each": [protocol.MAX_STOPS, protocol.MAX_STOP_CHARACTERS],
    "Entries of `logit_bias` and of `stop_token_ids`": [protocol.MAX_BIASES],
    "Alternatives to a token (`top_logprobs`, `logprobs`)": [protocol.MAX_TOP_LOGPROBS],
    "Characters of a grammar, or of what becomes one": [grammar.MAX_GRAMMAR_CHARACTERS],
    "Characters of a regular expression": [grammar.MAX_REGEX_CHARACTERS],
    "States of a grammar's lexer": [grammar.LIMITS.max_lexer_states],
    "Seconds for a chat template": [template_limits.RENDER_S],
    "Characters that a chat template makes": [template_limits.MOST_CHARACTERS],
    "Events that wait for a client that does not read": [answers.MOST_UNREAD, answers.MOST_UNREAD_OF_CHOICE],
    "Seconds for the line and headers of a request": [host.REQUEST_S],
    "Seconds for a body": [intake.BODY_S],
    "Seconds in which a client reads nothing of its answer": [host.UNREAD_S],
}


@pytest.fixture(scope="module")
def rows() -> dict[str, list[str]]:
    section = API.read_text().partition("## Limits")[2].partition("\n## ")[0]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    return {line[0]: line[1:] for line in lines[1:]}


def test_each_limit_is_listed_and_nothing_else(rows):
    assert rows.keys() == LIMITS.keys()


@pytest.mark.parametrize("name", LIMITS)
def test_the_numbers_are_those_of_the_code(rows, name):
    assert numbers(rows[name][0]) == LIMITS[name]


def test_what_is_read_on_of_a_refused_body_is_said(rows):
    assert host.MAX_DISCARDED_BYTES in numbers(rows["Bytes of a body"][1])


def numbers(text: str) -> list[int]:
    return [int(found.replace(",", "")) for found in re.findall(r"\d[\d,]*(?<!,)", text)]
