"""Damaged files put before every reader: each is refused with a message that names it, and never with a traceback."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from pathlib import Path

import pytest

from isthmus.data.tokenizer import Tokenizer
from isthmus.engines.local.api.access_log import AccessLog
from isthmus.engines.local.api.service import read_examples
from isthmus.errors import IsthmusError
from isthmus.forecast.calibrate import read_file
from isthmus.formats.files.bundle import read_bundle
from isthmus.formats.files.golden import read_golden
from isthmus.formats.files.published import StoredTensors
from isthmus.formats.updates.version_folder import read_versions
from isthmus.lines import read_json_object, read_objects
from isthmus.recipe.architecture import read_architecture
from isthmus.recipe.read import load_recipe
from tests.support.engine_bundle import write_small_bundle

CASES = 22
WHOLE = {
    "latest.json": {
        "format": "fp32",
        "versions": [{"version": 1, "sha256": "a", "base_sha256": None, "delta": None, "snapshot": None}],
    },
    "examples.json": ["Use 1, 2 and 3 to reach 6."],
    "golden.json": {
        "format": "fp32",
        "answers": [{"prompt": [1], "tokens": [2], "logprobs": [-1.0], "margins": [1.0]}],
    },
    "calibration.json": {"home": {}},
    "rows.jsonl": {"question": "a", "answer": "b"},
    "model.safetensors.index.json": {"weight_map": {"lm_head.weight": "model.safetensors"}},
}
READERS = {
    "config.json": lambda folder: (read_bundle(folder, check_files=False), read_architecture(folder)),
    "tokenizer.json": Tokenizer.load,
    "tokenizer_config.json": Tokenizer.load,
    "special_tokens_map.json": Tokenizer.load,
    "model.safetensors": lambda folder: read_bundle(folder, check_files=False),
    "model.safetensors.index.json": lambda folder: StoredTensors(folder).__enter__(),
    "checksums.json": read_bundle,
    "examples.json": read_examples,
    "golden.json": read_golden,
    "latest.json": read_versions,
    "calibration.json": lambda folder: read_file(folder / "calibration.json"),
    "rows.jsonl": lambda folder: list(read_objects(folder / "rows.jsonl", "data")),
    "recipe.toml": lambda folder: load_recipe(folder / "recipe.toml"),
    "object.json": lambda folder: read_json_object(folder / "object.json"),
}
"""The reader of each file, given the folder that it lies in."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged") / "small"
    write_small_bundle(folder)
    for name, content in WHOLE.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "object.json").write_text('{"a": [1, {"b": "c"}]}')
    (folder / "special_tokens_map.json").write_text('{"unk_token": "<unk>"}')
    (folder / "recipe.toml").write_text('name = "a"\n[model]\npreset = "r-nano"\n')
    return folder


def damages(whole: bytes, seed: int) -> list[bytes]:
    """The content of a file, damaged in as many ways as there are cases."""
    draw = random.Random(seed)
    found = [b"", b"[" * 100_000, b'{"a":' * 100_000, b"[]", b"null", b"7", b'"text"', bytes(64), b"\xff\xfe{\x00}\x00"]
    found += [b'{"a": [}', whole + whole, whole[::-1], b"{}", b'{"\\ud800": 1}', b"[[]]", b"[null]"]
    while len(found) < CASES:
        content = bytearray(whole)
        if draw.random() < 0.5:
            content = content[: draw.randrange(len(content))]
        else:
            for _ in range(draw.randint(1, 8)):
                content[draw.randrange(min(len(content), 4096))] = draw.randrange(256)
        found.append(bytes(content))
    return found


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_refused_by_its_name_and_without_a_traceback(bundle, tmp_path, name):
    folder = tmp_path / "copy"
    shutil.copytree(bundle, folder)
    if name != "model.safetensors.index.json":
        (folder / "model.safetensors.index.json").unlink()
    whole, refused = (folder / name).read_bytes(), 0
    for content in damages(whole, sum(name.encode())):
        (folder / name).write_bytes(content)
        refused += refusal_names(READERS[name], folder, name)
    (folder / name).unlink()
    (folder / name).mkdir()
    refusal_names(READERS[name], folder, name)
    assert refused >= CASES // 3, "the damage is not seen"


def refusal_names(read, folder: Path, name: str) -> bool:
    """Whether a reader refuses; its message must then name the file or the folder that it lies in."""
    try:
        found = read(folder)
    except IsthmusError as error:
        assert str(folder) in str(error) or name in str(error), error
        return True
    with contextlib.suppress(AttributeError):
        found.__exit__(None, None, None)
    return False


def test_a_full_disk_ends_the_access_log_with_one_message(caplog):
    log = AccessLog("/dev/full")
    for _ in range(3):
        log.event("resume")
    assert log.failure is not None and "No space left" in log.failure
    said = [record.message for record in caplog.records]
    assert said == [f"{log.failure}; nothing more is logged until a restart"]
