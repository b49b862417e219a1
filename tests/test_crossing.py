"""The crossing between two machines, as a user runs it: convert, capture, copy, verify, serve; and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from isthmus.engines.local import LocalEngine
from isthmus.errors import DamagedFile
from isthmus.formats.files.bundle import CHECKSUMS, file_hashes, read_bundle
from isthmus.parity.engine import BITS
from isthmus.parity.seal import read_verdict, verify_seal
from isthmus.recipe.schema import EngineOptions
from tests.support.engine_bundle import write_small_bundle
from tests.support.flow_recipe import isthmus


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "bf16"
    write_small_bundle(folder, "bf16")
    return folder


@pytest.fixture(scope="module")
def carried(source: Path) -> Path:
    """A bundle as it leaves the source's machine."""
    folder = source.parent / "w8a8"
    converted = isthmus("convert", source, folder, "--format", "w8a8")
    assert converted.returncode == 0, converted.stderr
    assert "not sealed" in converted.stdout and f"isthmus capture {folder}" in converted.stdout.replace("\n", " ")
    captured = isthmus("capture", folder, "--source", source, "--synthetic")
    assert captured.returncode == 0, captured.stderr
    return folder


def arrived(carried: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(carried, tmp_path / "arrived"))


def test_a_bundle_that_arrives_whole_is_verified_sealed_and_inspected(carried, tmp_path):
    folder = arrived(carried, tmp_path)
    assert "unsealed" in isthmus("inspect", folder).stdout
    verified = isthmus("verify", folder, "--device", "cpu", "--dtype", "bf16")
    assert verified.returncode == 0, verified.stdout + verified.stderr
    seal, verdict = verify_seal(folder), read_verdict(folder)
    assert verdict is not None and verdict.verdict == "pass" and seal.lineage.target_pool == "cpu in bf16"
    assert {check.layer for check in verdict.checks} >= {"files", "config", "modules", "tokens"}
    shown = isthmus("inspect", folder, "--json")
    assert shown.returncode == 0 and json.loads(shown.stdout)["state"] == "sealed"
    again = isthmus("verify", folder)
    assert again.returncode == 2 and "sealed already" in again.stderr


def flip(folder: Path, tensor: str) -> None:
    """One bit of a stored tensor, with checksums that fit."""
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    header = int.from_bytes(content[:8], "little")
    start, _ = json.loads(content[8 : 8 + header])[tensor]["data_offsets"]
    content[8 + header + start + 7] ^= 4
    path.write_bytes(content)
    (folder / CHECKSUMS).write_text(json.dumps(file_hashes(folder)))


def test_a_bundle_that_changed_on_the_way_is_refused_and_the_tensor_named(carried, tmp_path):
    folder = arrived(carried, tmp_path)
    tensor = "model.layers.1.self_attn.o_proj.weight"
    flip(folder, tensor)
    refused = isthmus("verify", folder, "--device", "cpu")
    assert refused.returncode == 1 and tensor.removesuffix(".weight") in refused.stderr
    assert not (folder / "seal.json").exists()
    verdict = read_verdict(folder)
    assert verdict is not None and verdict.verdict == "refuse"
    assert verdict.culprit == tensor.removesuffix(".weight")
    served = isthmus("serve", folder, "--port", "0")
    assert served.returncode == 1 and "refused" in served.stderr


def test_a_refusal_does_not_make_damage_look_whole(carried, tmp_path):
    folder = arrived(carried, tmp_path)
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    assert isthmus("verify", folder, "--device", "cpu").returncode == 1
    (folder / "verdict.json").unlink()
    with pytest.raises(DamagedFile):
        read_bundle(folder)


def test_a_bundle_that_is_not_what_its_source_became_is_not_captured(source, carried, tmp_path):
    folder = arrived(carried, tmp_path)
    flip(folder, "model.layers.0.mlp.down_proj.weight")
    refused = isthmus("capture", folder, "--source", source, "--synthetic")
    assert refused.returncode == 1 and "model.layers.0.mlp.down_proj" in refused.stderr


def test_a_bundle_without_golden_inputs_is_told_what_to_do(source, tmp_path):
    folder = tmp_path / "w8a8"
    assert isthmus("convert", source, folder, "--format", "w8a8").returncode == 0
    refused = isthmus("verify", folder, "--device", "cpu")
    assert refused.returncode == 1 and "isthmus capture" in refused.stdout + refused.stderr


def test_an_engine_is_verified_by_its_url_and_one_with_other_weights_refused(carried, tmp_path):
    folder, other = arrived(carried, tmp_path), tmp_path / "other"
    write_small_bundle(other, "w8a8", seed=5)
    with LocalEngine(other, log=tmp_path / "other.log") as engine:
        refused = isthmus("verify", folder, "--url", engine.url, "--api-key", engine.api_key)
    assert refused.returncode == 1 and "engine against healthy twins" in refused.stderr
    (folder / "verdict.json").unlink()
    (folder / CHECKSUMS).write_text(json.dumps(file_hashes(folder)))
    options = EngineOptions(batch_invariant=True)
    with LocalEngine(carried, log=tmp_path / "engine.log", options=options) as engine:
        verified = isthmus("verify", folder, "--url", engine.url, "--api-key", engine.api_key)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert verify_seal(folder).lineage.target_pool.startswith("isthmus ")
    verdict = read_verdict(folder)
    assert verdict is not None
    bits = next(check for check in verdict.checks if check.name == BITS)
    assert (bits.outcome, bits.figure.value, bits.limit.value) == ("pass", 0, 0)
