"""Damaged files put before every reader: each is refused with a message that names it, and never with a traceback."""

from __future__ import annotations

import base64
import contextlib
import copy
import json
import random
import shutil
from pathlib import Path

import pytest

from isthmus.chips.wheel import tables
from isthmus.data.shards import TokenShards
from isthmus.data.tokenizer import Tokenizer
from isthmus.engines.local.api.access_log import AccessLog
from isthmus.engines.local.api.keys import Keyring
from isthmus.engines.local.api.service import read_examples
from isthmus.errors import IsthmusError
from isthmus.forecast.calibrate import read_file
from isthmus.formats.files.basis import read_conversion
from isthmus.formats.files.bundle import read_bundle
from isthmus.formats.files.golden import read_golden
from isthmus.formats.files.published import StoredTensors
from isthmus.formats.files.sliced import read_slice
from isthmus.formats.updates.version_folder import read_versions
from isthmus.lines import read_json_object, read_objects
from isthmus.parity import signing
from isthmus.parity.capture import GoldenSet
from isthmus.parity.manifest import read_manifest
from isthmus.parity.seal import read_verdict, verify_seal
from isthmus.parity.signing import read_trusted
from isthmus.probes.judge import thresholds
from isthmus.recipe.architecture import read_architecture
from isthmus.recipe.read import load_recipe
from isthmus.records import PlanRecord
from isthmus.rewards import judge
from isthmus.run import RunFolder
from isthmus.supervise.twins import compare, read_twin
from isthmus.tools import follow, validate_forecast
from isthmus.tools.case import read_case
from isthmus.trainer import checkpoint_files
from tests.support.engine_bundle import write_small_bundle

CASES, REARRANGED = 22, 12
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
LAYOUT = {"dtype": "uint16", "eos_id": 0, "vocab_size": 9}
TWIN = [
    {"kind": "header", "rank": 0, "world": 1},
    {"kind": "state", "when": "before", "count": 0, "updates": 0, "squares": {"parameters": {"a": 1.0}}},
    {"kind": "modules", "names": ["a"]},
    {
        "kind": "step",
        "count": 1,
        "batch": "0f",
        "losses": [1.0],
        "squares": [2.0],
        "options": [{"dtypes": ["torch.float32"], "updates": 0, "groups": [{"lr": 0.1}]}],
        "random": {},
        "autocast": "off",
    },
]
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
    "model.safetensors.index.json": {"weight_map": {"lm_head.weight": "model.safetensors"}},
    "object.json": {"a": [1, {"b": "c"}]},
    "special_tokens_map.json": {"unk_token": "<unk>"},
    "old/chat_template.json": {"chat_template": TEMPLATE},
    "conversion.json": {"source": "a", "balance_alpha": 0.5, "rounding": "gptq"},
    "slice.json": {"source": "a", "layers": [0, 1], "lengths": [3]},
    "golden/replay.json": {"sequences": [[1, 2]], "prompts": [1]},
    "manifest.json": {"format": "fp32", "tensors": {}},
    "verdict.json": {"verdict": "pass"},
    "seal.json": {"sha256": "a"},
    "score/ab/abcd.json": {"score": 0.5, "model": "a"},
    "case.json": {"title": "a", "function": "isthmus.probes.calls.f", "arguments": {}, "files": [], "ranks": 1},
    "shards/a.json": LAYOUT,
    "checkpoint/manifest.json": {"sha256": "a", "manifest": {"tensors": {}}},
}
LINES = {"rows.jsonl": [{"prompt": "a"}, {"tokens": [1, 2]}], "twin/rank-00000-0000.jsonl": TWIN}
TEXTS = {
    "recipe.toml": (Path(__file__).parents[2] / "recipes" / "tiny.toml").read_text(),
    "chat/chat_template.jinja": TEMPLATE,
    "tiktoken/tiktoken.model": "".join(f"{base64.b64encode(bytes([one])).decode()} {one}\n" for one in range(256)),
    "tiktoken/code.py": r"class A:\n    pat_str = r'[a-z]+'\n",
    "thresholds.csv": ",".join(thresholds.COLUMNS) + "\nany,link_bandwidth,,,>= 1 GB/s,,a\n",
    "operators.csv": ",".join(tables.COLUMNS) + "\naten::add,native,,,,,a\n",
    "published.csv": ",".join((*validate_forecast.COLUMNS, *validate_forecast.MORE_COLUMNS)) + "\n" + "1," * 14 + "1\n",
    "keys": "alice sk-1\nsk-2\n",
    "trusted": f"ed25519:{'0a' * 32} ours\n",
    "private.pem": "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIA==\n-----END PRIVATE KEY-----\n",
    "engine-key": "sk-root\n",
}
"""Files as they should be; what a test of their readers holds whole is written by what writes them."""
RUN = ("recipe.json", "events.jsonl", "files.json", "plan.json")


def read_run(folder: Path) -> None:
    run = RunFolder.open(folder / "run")
    run.events()
    run.read_record("plan", PlanRecord)


def read_shards(folder: Path) -> TokenShards:
    return TokenShards(folder / "shards", [folder / "shards" / "a.bin"], Tokenizer.load(folder), 1 << 20)


def private(path: Path) -> Path:
    path.chmod(0o700 if path.is_dir() else 0o600)
    return path


READERS = {
    "config.json": lambda folder: (read_bundle(folder, check_files=False), read_architecture(folder)),
    "tokenizer.json": Tokenizer.load,
    "tokenizer_config.json": Tokenizer.load,
    "special_tokens_map.json": Tokenizer.load,
    "generation_config.json": Tokenizer.load,
    "old/chat_template.json": lambda folder: Tokenizer.load(folder / "old"),
    "chat/chat_template.jinja": lambda folder: Tokenizer.load(folder / "chat"),
    "tiktoken/tiktoken.model": lambda folder: Tokenizer.load(folder / "tiktoken"),
    "tiktoken/code.py": lambda folder: Tokenizer.load(folder / "tiktoken"),
    "model.safetensors": lambda folder: read_bundle(folder, check_files=False),
    "model.safetensors.index.json": lambda folder: StoredTensors(folder).__enter__(),
    "checksums.json": read_bundle,
    "examples.json": read_examples,
    "golden.json": read_golden,
    "golden/replay.json": GoldenSet,
    "manifest.json": read_manifest,
    "verdict.json": read_verdict,
    "seal.json": verify_seal,
    "slice.json": read_slice,
    "conversion.json": read_conversion,
    "latest.json": read_versions,
    "calibration.json": lambda folder: read_file(folder / "calibration.json"),
    "rows.jsonl": lambda folder: list(read_objects(folder / "rows.jsonl", "data")),
    "recipe.toml": lambda folder: load_recipe(folder / "recipe.toml"),
    "object.json": lambda folder: read_json_object(folder / "object.json"),
    "score/ab/abcd.json": lambda folder: judge.kept_score(folder / "score" / "ab" / "abcd.json"),
    "case.json": lambda folder: read_case(folder / "case.json"),
    "twin/rank-00000-0000.jsonl": lambda folder: compare(read_twin(folder / "twin"), read_twin(folder / "twin")),
    "shards/a.json": lambda folder: read_shards(folder),
    "checkpoint/manifest.json": lambda folder: checkpoint_files.read_manifest(folder / "checkpoint"),
    "checkpoint/model.safetensors": lambda folder: checkpoint_files.verify_file(
        folder / "checkpoint", checkpoint_files.Manifest.model_construct(tensors={}), "model.safetensors"
    ),
    "thresholds.csv": lambda folder: thresholds.load_thresholds(folder / "thresholds.csv"),
    "operators.csv": lambda folder: tables.read_table(folder / "operators.csv"),
    "published.csv": lambda folder: validate_forecast.read_rows(folder / "published.csv"),
    "keys": lambda folder: Keyring.load(private(folder / "keys"), {}),
    "trusted": lambda folder: read_trusted(folder / "trusted"),
    "private.pem": lambda folder: signing.load_key(private(folder / "private.pem")),
    "engine-key": lambda folder: follow.read_key(folder / "engine-key"),
    **{f"run/{name}": read_run for name in RUN},
}
"""The reader of each file, given the folder that it lies in."""
FORGIVING = ("tiktoken/code.py", "chat/chat_template.jinja", "trusted", "engine-key", "keys")
"""Files of which nearly any text is one that may be meant."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged") / "small"
    write_small_bundle(folder)
    texts = {name: json.dumps(content) for name, content in WHOLE.items()}
    texts |= {name: "".join(json.dumps(line) + "\n" for line in lines) for name, lines in LINES.items()}
    for name, text in (texts | TEXTS).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, folder / "chat" / name)
        shutil.copy(folder / name, folder / "old" / name)
    shutil.copy(folder / "tokenizer_config.json", folder / "tiktoken")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "old" / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": None}))
    (folder / "shards" / "a.bin").write_bytes(bytes(20))
    shutil.copy(folder / "model.safetensors", folder / "checkpoint")
    run = RunFolder.create(folder / "run", load_recipe(folder / "recipe.toml"))
    made = {"recipe_sha256": run.recipe.digest(), "started": 1.0, "ended": 2.0}
    run.write_record("plan", PlanRecord(placements=[], rejected=[], estimate={}, **made))
    run.event("plan", "end", seconds=1.0)
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


def rearranged(whole: bytes, seed: int) -> list[bytes]:
    """A JSON file, or one of JSON lines, in which something is of another kind or left out; none of other files."""
    try:
        lines = [json.loads(line) for line in ([whole] if b"\n{" not in whole.strip() else whole.splitlines())]
    except ValueError:
        return []
    draw, found = random.Random(seed), []
    for _ in range(REARRANGED):
        changed = copy.deepcopy(lines)
        places = list(places_in(changed))[len(changed) == 1 :]
        if not places:
            return []
        holder, key = draw.choice(places)
        other = draw.choice([None, [], {}, 7, -1, "x", True, [[]], {"a": {}}, 1e308, "left out"])
        if other == "left out" and isinstance(holder, dict):
            del holder[key]
        else:
            holder[key] = other
        found.append(b"\n".join(json.dumps(line).encode() for line in changed) + b"\n")
    return found


def places_in(value):
    """Where something stands in a value: the list or object, and the index or key."""
    for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(inner, dict | list):
            yield from places_in(inner)


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_refused_by_its_name_and_without_a_traceback(bundle, tmp_path, name):
    folder = tmp_path / "copy"
    shutil.copytree(bundle, folder)
    beside = {"model.safetensors.index.json", "conversion.json"} - {name}
    for other in beside:
        (folder / other).unlink()
    whole, refused, seed = (folder / name).read_bytes(), 0, sum(name.encode())
    for content in damages(whole, seed) + rearranged(whole, seed):
        (folder / name).write_bytes(content)
        refused += refusal_names(READERS[name], folder, name)
    (folder / name).unlink()
    (folder / name).mkdir()
    refusal_names(READERS[name], folder, name)
    assert refused >= (CASES // 3 if name not in FORGIVING else 1), "the damage is not seen"


def test_more_than_300_damaged_files_are_put_before_the_readers(bundle):
    files = {name: (bundle / name).read_bytes() for name in READERS}
    assert sum(len(damages(whole, 0)) + len(rearranged(whole, 0)) for whole in files.values()) > 300


def refusal_names(read, folder: Path, name: str) -> bool:
    """Whether a reader refuses; its message must then name the file or the folder that it lies in."""
    try:
        found = read(folder)
    except IsthmusError as error:
        assert str(folder) in str(error) or name.rpartition("/")[2] in str(error), error
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
