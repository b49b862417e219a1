"""Files as editors write them: a byte-order mark is skipped, a line ends at a newline alone and is counted so."""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from isthmus.data.pretrain import sample_texts
from isthmus.data.tokenizer import Tokenizer
from isthmus.engines.local.api.keys import Keyring
from isthmus.engines.local.api.service import read_examples
from isthmus.errors import IsthmusError
from isthmus.lines import csv_rows, lines_of
from isthmus.parity.signing import new_key, read_trusted
from isthmus.probes.judge.thresholds import COLUMNS, load_thresholds
from isthmus.recipe.architecture import read_architecture
from isthmus.recipe.read import load_recipe
from isthmus.tasks.jsonl import read_file

NO_ENDS = "one\u2028two\u2029three\x85four\x0bfive\x0csix\x1cseven\x1eeight"
"""Where `str.splitlines` ends lines and JSON, CSV and TOML do not."""
BOM = codecs.BOM_UTF8
RECIPE = Path(__file__).parents[2] / "recipes" / "tiny.toml"


def problem(**fields: str) -> bytes:
    return json.dumps({"prompt": NO_ENDS, "answer": "4", **fields}, ensure_ascii=False).encode()


def problems(folder: Path) -> object:
    path = folder / "problems.jsonl"
    path.write_bytes(BOM + problem() + b"\r\n\r\n" + problem(answer=NO_ENDS) + b"\n")
    return [(one.prompt, one.answer) for one in read_file(path).problems] == [(NO_ENDS, "4"), (NO_ENDS, NO_ENDS)]


def corpus(folder: Path) -> object:
    row = json.dumps({"text": NO_ENDS}, ensure_ascii=False).encode()
    (folder / "a.jsonl").write_bytes(BOM + b"\n" + row + b"\r\n")
    (folder / "b.txt").write_bytes(BOM + NO_ENDS.encode())
    return sorted(sample_texts(folder, 10**6)) == [NO_ENDS, NO_ENDS]


def keys(folder: Path) -> object:
    path = folder / "keys"
    path.write_bytes(BOM + b"alice sk-a\r\n# bob\xc2\x85 and others\nbob sk-b\n")
    path.chmod(0o600)
    return [key.name for key in Keyring.load(path, {}).keys] == ["alice", "bob"]


def trusted(folder: Path) -> object:
    public, path = new_key(folder / "gate.pem"), folder / "trusted"
    path.write_bytes(BOM + f"{public} the gate{NO_ENDS}\r\n".encode())
    return read_trusted(path) == [public]


def thresholds(folder: Path) -> object:
    path, source = folder / "own.csv", f"ours{NO_ENDS.replace(chr(10), '')}"
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([COLUMNS, ("h20", "memory_gbs", "", "", ">= 3000 GB/s", "copy", source)])
    return load_thresholds(path)[0].source == source


def recipe(folder: Path) -> object:
    path = folder / "own.toml"
    path.write_bytes(BOM + b"# one\xe2\x80\xa8two\r\n" + RECIPE.read_bytes())
    return load_recipe(path).digest() == load_recipe(RECIPE).digest()


def config(folder: Path) -> object:
    content = json.dumps(
        {"model_type": "llama", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8}
        | {"num_hidden_layers": 1, "num_attention_heads": 1, "rms_norm_eps": 1e-6, "max_position_embeddings": 8}
    )
    (folder / "config.json").write_bytes(BOM + content.encode())
    return read_architecture(folder)["hidden_size"] == 8


def tokenizer(folder: Path) -> object:
    made = Tokenizer.train(["a"], 270)
    made.save(folder)
    path = folder / "tokenizer_config.json"
    path.write_bytes(BOM + path.read_bytes())
    return Tokenizer.load(folder).config() == made.config()


def examples(folder: Path) -> object:
    (folder / "examples.json").write_bytes(BOM + json.dumps([NO_ENDS], ensure_ascii=False).encode())
    return read_examples(folder) == [NO_ENDS]


@pytest.mark.parametrize(
    "reads",
    [problems, corpus, keys, trusted, thresholds, recipe, config, tokenizer, examples],
    ids=lambda one: one.__name__,
)
def test_a_mark_is_skipped_and_lines_end_at_newlines_alone(reads: Callable[[Path], object], tmp_path: Path):
    assert reads(tmp_path)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (BOM + problem() + b"\r\n\n" + b"{oops}\n", 3),
        (problem() * 1 + b"\n" + b"\xff\n", 2),
        (BOM + b"\n\n" + problem() + b"\n[]", 4),
    ],
)
def test_the_line_that_is_named_is_the_line_of_an_editor(content: bytes, line: int, tmp_path: Path):
    path = tmp_path / "problems.jsonl"
    path.write_bytes(content)
    with pytest.raises(IsthmusError, match=rf"problems\.jsonl:{line}: "):
        read_file(path)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.jsonl").write_bytes(content.replace(b'"prompt"', b'"text"'))
    with pytest.raises(IsthmusError, match=rf"a\.jsonl:{line}: "):
        list(sample_texts(corpus, 10**6))


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_a_file_in_utf_16_says_so(encoding: str, tmp_path: Path):
    path = tmp_path / "problems.jsonl"
    path.write_bytes(("\ufeff" + problem().decode()).encode(encoding))
    with pytest.raises(IsthmusError, match=r"problems\.jsonl is not UTF-8 text: .*UTF-16: save it as UTF-8"):
        load_recipe(path)
    with pytest.raises(IsthmusError, match=r":1: not UTF-8 text: .*UTF-16: save it as UTF-8"):
        read_file(path)


def test_lines_and_rows_of_a_text():
    assert lines_of("a\nb\r\n\nc\x85d") == ["a", "b", "", "c\x85d"] and lines_of("") == []
    assert csv_rows(f'a,b\r\n"x\ny",{NO_ENDS}\r\n') == [{"a": "x\ny", "b": NO_ENDS}]
