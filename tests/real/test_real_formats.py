"""The first layers of the real model, with its outliers: the good formats are captured, verified and sealed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from isthmus.cli import cli
from isthmus.errors import GateRefused
from isthmus.formats.files.bundle import CONVERSION
from isthmus.parity.seal import verify_seal
from tests.support.bundles import rehash
from tests.support.real_model import first_layers, own_words

pytestmark = pytest.mark.real
ANSWERS = Path(__file__).with_name("answers.jsonl")
LAYERS, CHATS = 2, 4


def isthmus(*words: object) -> str:
    result = CliRunner().invoke(cli, [*map(str, words)], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "few.jsonl"
    path.write_text("\n".join(ANSWERS.read_text().splitlines()[:CHATS]) + "\n")
    return path


@pytest.fixture(scope="module")
def source(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return first_layers(smollm2, tmp_path_factory.mktemp("real") / "source", LAYERS)


@pytest.fixture(scope="module")
def balanced(source: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("real") / "balanced"
    isthmus("convert", source, out, "--format", "w8a8", "--calibrate", prompts, "--balance", "--rounding", "gptq")
    return out


def test_a_wrong_row_of_a_compensated_weight_is_found(source: Path, balanced: Path, prompts: Path) -> None:
    path, name = balanced / "model.safetensors", "model.layers.1.mlp.down_proj.weight"
    whole, stored = path.read_bytes(), load_file(path)
    values = stored[name].clone()
    values[17] = values[17].roll(1)
    save_file({**stored, name: values}, path, metadata={"format": "pt"})
    rehash(balanced)
    with pytest.raises(GateRefused, match=r"layers\.1\.mlp\.down_proj.*as much of the output of row 17"):
        isthmus("capture", balanced, "--source", source, "--prompts", prompts, "--max-mb", 1)
    path.write_bytes(whole)
    rehash(balanced)


def test_what_was_balanced_and_compensated_is_sealed(
    source: Path, balanced: Path, prompts: Path, tmp_path: Path
) -> None:
    beginnings = [json.loads(line)["tokens"][-16:] for line in prompts.read_text().splitlines()]
    words = own_words(source, tmp_path / "words.jsonl", beginnings)
    isthmus("capture", balanced, "--source", source, "--prompts", words, "--max-mb", 1)
    assert "sealed as" in isthmus("verify", balanced) and verify_seal(balanced)
    manifest = json.loads((balanced / "manifest.json").read_text())
    shares = [entry["error"] for entry in manifest["coverage"] if "GPTQ" in entry["detail"]]
    assert len(shares) == 7 * LAYERS and max(shares) < 1, "less lost than by rounding to the nearest"
    assert torch.tensor(shares).mean() < 0.9


def test_a_mixture_within_a_budget_of_the_real_model(source: Path, prompts: Path, tmp_path: Path) -> None:
    asked = ("--calibrate", prompts, "--calibrate-tokens", 128, "--budget", 1e-3)
    isthmus("convert", source, tmp_path / "b", "--for", "vllm-ascend", *asked)
    told = json.loads((tmp_path / "b" / CONVERSION).read_text())["mixture"]
    assert told["kl"] <= 1e-3 and 0.5 < told["work_of_bf16"] < 1 and len(told["modules"]) == 4 * LAYERS
