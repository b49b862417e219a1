"""The user's prompts: what a line may be, and which line is wrong."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.data.prompts import PromptFile
from isthmus.data.tokenizer import Tokenizer
from isthmus.errors import IsthmusError
from isthmus.tasks.jsonl import read_file

VOCABULARY = 400
TOKENIZER = Tokenizer.train(["a text of some words, and one more"], 300)
TOKENS = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=20)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
LINE_ENDS_ELSEWHERE = "one\u2028two\u2029three\x85four\x0bfive\x0c\x1c\x1d\x1e."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tokenizer")
    TOKENIZER.save(made)
    return made


def file_of(content: bytes) -> Path:
    with tempfile.NamedTemporaryFile(suffix=".jsonl", prefix="mine", delete=False) as file:
        file.write(content)
    return Path(file.name)


def sequences(content: str | bytes, folder: Path = Path("nowhere"), most: int | None = None) -> list[list[int]]:
    path = file_of(content.encode() if isinstance(content, str) else content)
    try:
        return PromptFile(path, folder, VOCABULARY).sequences(most)
    finally:
        path.unlink()


@given(st.lists(TOKENS, min_size=1, max_size=6), st.sampled_from(["\n", "\r\n", "\n\n", "\n \t\r\n"]), st.booleans())
def test_tokens_come_back_as_they_were_written(rows: list[list[int]], end: str, ended: bool):
    content = end.join(json.dumps({"tokens": row, "id": "\u2028"}, ensure_ascii=False) for row in rows)
    assert sequences(content + end * ended) == rows


@given(prompt=TEXT, completion=TEXT, mark=st.sampled_from([b"", b"\xef\xbb\xbf"]), escaped=st.booleans())
def test_texts_come_back_from_their_tokens(folder: Path, prompt: str, completion: str, mark: bytes, escaped: bool):
    row = {"prompt": prompt + "!", "completion": completion, "answer": None}
    content = mark + json.dumps(row, ensure_ascii=escaped).encode()
    [tokens] = sequences(content, folder)
    assert TOKENIZER.decode(tokens, skip_special=False) == prompt + "!" + completion


@given(st.lists(TOKENS, min_size=1, max_size=6), st.integers(1, 60))
def test_a_limit_takes_the_first_tokens_of_the_file(rows: list[list[int]], most: int):
    found = sequences("\n".join(json.dumps({"tokens": row}) for row in rows), most=most)
    joined = [token for row in rows for token in row]
    assert [token for row in found for token in row] == joined[:most]
    assert all(given[: len(row)] == row for given, row in zip(rows, found, strict=False))


def test_a_completion_follows_its_prompt_token_by_token_as_in_generation(folder: Path):
    rows = [{"prompt": "a text of "}, {"prompt": "a text of ", "completion": "some words"}]
    alone, together = sequences("\n".join(map(json.dumps, rows)), folder)
    assert alone == TOKENIZER.encode("a text of ")
    assert together == alone + TOKENIZER.encode("some words")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"tokens": [1.9, 2]}', r"`tokens` must hold integers alone, and holds 1\.9"),
        ('{"tokens": [1.0]}', r"holds 1\.0"),
        ('{"tokens": [1e3]}', r"holds 1000\.0"),
        ('{"tokens": ["7"]}', "holds '7'"),
        ('{"tokens": [true]}', "holds True"),
        ('{"tokens": [null]}', "holds None"),
        ('{"tokens": [[1]]}', r"holds \[1\]"),
        ('{"tokens": "12"}', "must be a list of integers, not '12'"),
        ('{"tokens": null}', "must be a list of integers, not None"),
        ('{"tokens": []}', "has no tokens"),
        ('{"tokens": [-1]}', "-1 is not among the tokens of the model, which go from 0 to 399"),
        ('{"tokens": [400]}', "400 is not among"),
        ('{"tokens": [1], "prompt": "a"}', "`tokens` and `prompt` in one line: keep one"),
        ('{"tokens": [1], "completion": "a"}', "`tokens` and `completion` in one line"),
        ('{"completion": "a"}', "a line must be"),
        ("{}", "a line must be"),
        ('{"prompt": 3}', "`prompt` must be a text, not 3"),
        ('{"prompt": null}', "`prompt` must be a text, not None"),
        ('{"prompt": "a", "completion": ["b"]}', r"`completion` must be a text, not \['b'\]"),
        ('{"prompt": ""}', "has no tokens"),
        ('{"prompt": "a\\ud800"}', "half of a surrogate pair at character 1"),
        ("[1]", "a line must be an object, not list"),
        ('{"tokens": [1]} {"tokens": [2]}', "not valid JSON: Extra data at column 17"),
        ('{"tokens": [1', "not valid JSON"),
        ("\u2028", "not valid JSON"),
        ("[" * 100_000, "not valid JSON: nested too deeply"),
        ('{"tokens": [' + "9" * 5000 + "]}", "digits"),
        (b'{"prompt": "\xff"}', "not UTF-8 text: invalid start byte"),
    ],
)
def test_a_wrong_line_is_named(folder: Path, line: str | bytes, message: str):
    content = b'{"tokens": [1]}\n\n' + (line.encode() if isinstance(line, str) else line) + b'\n{"tokens": [2]}\n'
    with pytest.raises(IsthmusError, match=r"mine.*\.jsonl:3: .*" + message):
        sequences(content, folder)


@pytest.mark.parametrize("content", ["", "\n", " \r\n\t\n"])
def test_a_file_without_a_sequence_is_an_error(content: str):
    with pytest.raises(IsthmusError, match=r'is empty: a line is \{"tokens"'):
        sequences(content)


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path):
    with pytest.raises(IsthmusError, match=r"no prompts file at .*absent\.jsonl"):
        PromptFile(tmp_path / "absent.jsonl", tmp_path).sequences()
    with pytest.raises(IsthmusError, match=r"cannot be read: Is a directory"):
        PromptFile(tmp_path, tmp_path).sequences()


def test_tokens_need_no_tokenizer_and_no_known_vocabulary(tmp_path: Path):
    path = tmp_path / "tokens.jsonl"
    path.write_text('{"tokens": [123456789]}')
    assert PromptFile(path, tmp_path / "nowhere").sequences() == [[123456789]]


@pytest.mark.parametrize("key", ["prompt", "answer", "thought"])
def test_the_task_of_ones_own_files_ends_its_lines_at_line_feeds_alone(tmp_path: Path, key: str):
    row = {"prompt": "a", "answer": "b", "thought": "c", key: LINE_ENDS_ELSEWHERE}
    path = tmp_path / "train.jsonl"
    escaped = json.dumps(row, ensure_ascii=False).encode()
    path.write_bytes(b"\xef\xbb\xbf" + escaped + b"\r\n" + escaped)
    assert [getattr(problem, key) for problem in read_file(path).problems] == [LINE_ENDS_ELSEWHERE] * 2
