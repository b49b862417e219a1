"""Rows of data in the shapes that people have, recognised by their columns.

| Shape | Columns |
|---|---|
| ours | `prompt` and `answer`, both texts; `thought` |
| verl | `prompt`, a conversation; `reward_model` with `ground_truth`; perhaps `data_source`, `ability`, `extra_info` |
| messages | `messages`, a conversation that ends with the answer, as for OpenAI's fine-tuning; perhaps `answer` |
| TRL | `prompt`, a text or a conversation; perhaps `completion`; any further columns, one of which has the answer |
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from isthmus.tasks.parts.completions import END_THINK, THINK, split_completion
from isthmus.tasks.parts.problems import Messages, Problem

OURS = ("prompt", "answer", "thought")
ANSWERS = ("answer", "solution", "ground_truth", "label")
"""Columns in which data sets for TRL have the answer, the first one that is there."""
ROLES = ("system", "developer", "user", "assistant")

Row = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """How rows with certain columns are read; `read` raises ValueError that says what is wrong with a row."""

    name: str
    read: Callable[[Row], Problem]


def shape_of(row: Row, answer_column: str | None = None) -> Shape:
    """The shape of a file by its first row; `answer_column` names the column that has the answer.

    Raises ValueError for columns of no shape.
    """
    columns = set(row)
    if "reward_model" in columns:
        return Shape("verl", _verl)
    if "messages" in columns:
        return Shape("messages", lambda one: _messages(one, answer_column or "answer"))
    if "prompt" not in columns:
        raise ValueError(f"its columns are {_listed(columns)}; known are {KNOWN}")
    if answer_column is None and columns <= set(OURS) and isinstance(row["prompt"], str):
        return Shape("ours", _ours)
    for column in sorted(columns - {*OURS, *ANSWERS, "completion"}):
        if meant := difflib.get_close_matches(column, OURS, n=1, cutoff=0.8):
            raise ValueError(f"unknown key {column!r}; did you mean {meant[0]!r}?")
    return Shape("TRL", lambda one: _trl(one, answer_column))


KNOWN = (
    "`prompt` with `answer` (ours), `prompt` with `reward_model` (verl), `messages` (OpenAI), `prompt` with any others "
    "(TRL)"
)


def _ours(row: Row) -> Problem:
    for key in ("prompt", "answer"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise ValueError(f"{key!r} must be a text that is not empty")
    if not isinstance(row.get("thought", ""), str):
        raise ValueError("'thought' must be a text")
    if unknown := sorted(set(row) - set(OURS)):
        raise ValueError(f"unknown key {unknown[0]!r}; known: {', '.join(sorted(OURS))}")
    return Problem(id=row["prompt"], prompt=row["prompt"], answer=row["answer"], thought=row.get("thought", ""))


def _verl(row: Row) -> Problem:
    judged = row.get("reward_model")
    if not isinstance(judged, Mapping):
        raise ValueError("'reward_model' must be an object with 'ground_truth'")
    if judged.get("style", "rule") != "rule":
        raise ValueError(f"reward_model.style is {judged['style']!r}: a rule alone can be judged here")
    answer = _answer(judged.get("ground_truth"), "reward_model.ground_truth")
    metadata = {key: row[key] for key in ("data_source", "ability", "extra_info") if key in row}
    return _asked(_conversation(row.get("prompt"), "prompt"), answer, metadata=metadata)


def _messages(row: Row, answer_column: str) -> Problem:
    messages = _conversation(row.get("messages"), "messages")
    thought = answer = ""
    if messages[-1]["role"] == "assistant":
        *asked, said = messages
        thought, answer = _said(said)
        messages = tuple(asked)
    if row.get(answer_column) is not None:
        answer = _answer(row[answer_column], answer_column)
    if not messages:
        raise ValueError("'messages' has an answer and no question")
    return _asked(messages, answer, thought)


def _trl(row: Row, answer_column: str | None) -> Problem:
    column = answer_column or next((name for name in ANSWERS if row.get(name) is not None), None)
    if answer_column is not None and row.get(answer_column) is None:
        raise ValueError(f"there is no answer in the column {answer_column!r}; the columns are {_listed(set(row))}")
    thought, answer = _completion(row["completion"]) if row.get("completion") is not None else ("", "")
    if column is not None:
        answer = _answer(row[column], column)
    if isinstance(row.get("thought"), str):
        thought = row["thought"]
    prompt = row.get("prompt")
    if isinstance(prompt, str) and not prompt.strip():
        raise ValueError("'prompt' is empty")
    messages = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else _conversation(prompt, "prompt")
    used = {"prompt", "completion", "thought", column}
    return _asked(messages, answer, thought, {key: value for key, value in row.items() if key not in used})


def asked_problem(messages: list[Row], metadata: Row) -> Problem:
    """The problem of a conversation. Raises ValueError for one that is no single question to a model without tools."""
    return _asked(_conversation(messages, "the prompt"), "", metadata=metadata)


def _asked(messages: Messages, answer: str, thought: str = "", metadata: Row | None = None) -> Problem:
    """The problem of a conversation, which is kept where it is more than one question."""
    if messages[-1]["role"] != "user":
        raise ValueError(f"the conversation ends with {messages[-1]['role']!r}, and not with a question of the user")
    prompt = messages[-1]["content"]
    alone = len(messages) == 1
    name = prompt if alone else json.dumps([message["content"] for message in messages], ensure_ascii=False)
    kept = () if alone else messages
    return Problem(name, prompt, answer, thought=thought, messages=kept, metadata=_as_json(metadata or {}))


def _conversation(value: Any, key: str) -> Messages:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{key!r} must be a list of messages, each with 'role' and 'content'")
    for message in value:
        if not isinstance(message, Mapping) or message.get("role") is None:
            raise ValueError(f"{key!r} has a message without a role: {message!r}")
        if message["role"] not in ROLES or message.get("tool_calls"):
            raise ValueError(f"{key!r} calls tools, which single answers are not: role {message['role']!r}")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"{key!r} has a message whose content is no text: {message!r}")
    if value[-1]["role"] == "user" and not value[-1]["content"].strip():
        raise ValueError(f"{key!r} ends with an empty question")
    kept = ("role", "content", "reasoning_content")
    return tuple({key: message[key] for key in kept if message.get(key) is not None} for message in value)


def _completion(value: Any) -> tuple[str, str]:
    if isinstance(value, str):
        return _said({"content": value})
    messages = _conversation(value, "completion")
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise ValueError("'completion' must be a text or one message of the assistant")
    return _said(messages[0])


def _said(message: Mapping[str, Any]) -> tuple[str, str]:
    """(thought, answer) of a message of the assistant."""
    content = message["content"]
    if "reasoning_content" in message:
        return message["reasoning_content"], content.strip()
    if END_THINK not in content:
        return "", content.strip()
    thought, answer = split_completion(content.removeprefix(THINK).removeprefix("\n"))
    if answer is None:
        raise ValueError("the thinking of the assistant is not closed exactly once")
    return thought, answer


def _answer(value: Any, key: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        raise ValueError(f"{key!r} must be a text or a number, not {value!r}")
    return str(value)


def _as_json(row: Row) -> Row:
    """Further columns as JSON can hold them; what it cannot is written out."""
    return json.loads(json.dumps(row, default=str))


def _listed(columns: set[str]) -> str:
    return ", ".join(map(repr, sorted(columns))) or "none"
