"""The seal against every kind of tampering."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small import tiny_architecture

from isthmus.errors import GateRefused, IsthmusError
from isthmus.formats.bundle import file_hashes, write_bundle
from isthmus.model.model import Model
from isthmus.parity.seal import verify_seal, write_seal
from isthmus.records import Check, HandoffRecord
from isthmus.run import Figure

ARCHITECTURE = tiny_architecture(vocab_size=31, hidden_size=16)


class TinyTokenizer:
    bos_id, eos_id = 0, 1

    def save(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")


def record(**changes) -> HandoffRecord:
    figure = Figure.measured(0.001, "nats/token", "a test", rehearsed=False)
    content = {
        "recipe_sha256": "r" * 64,
        "started": 0.0,
        "ended": 1.0,
        "source_pool": "home",
        "target_pool": "away",
        "format": "w8a8",
        "verdict": "pass",
        "checks": [Check(layer="tokens", name="mean KL", outcome="pass", figure=figure, limit=figure, detail="")],
        "bundles": {"w8a8": "bundle/w8a8"},
        "seal_id": None,
        "figures": {},
    }
    return HandoffRecord(**{**content, **changes})


@pytest.fixture
def bundle(tmp_path) -> Path:
    write_bundle(tmp_path / "b", "w8a8", Model(ARCHITECTURE).initialise(0).state_dict(), ARCHITECTURE, TinyTokenizer())
    return tmp_path / "b"


@pytest.fixture
def sealed(bundle) -> Path:
    write_seal(bundle, record(), checkpoint_sha256="c" * 64)
    return bundle


def test_a_sealed_bundle_verifies_and_says_where_it_comes_from(sealed):
    seal = verify_seal(sealed)
    assert seal.format == "w8a8" and seal.verdict == "pass" and "mean KL" in seal.checks
    assert seal.lineage.checkpoint_sha256 == "c" * 64 and seal.lineage.target_pool == "away"
    assert seal.tensors.keys() == load_file(sealed / "model.safetensors").keys()
    assert seal.files.keys() == {path.name for path in sealed.iterdir()} - {"seal.json"}
    assert len(seal.id) == 16 and int(seal.id, 16) >= 0
    assert verify_seal(sealed, expected_id=seal.id) == seal


def test_the_same_bundle_gets_the_same_seal_and_another_one_another(sealed):
    first = verify_seal(sealed)
    assert write_seal(sealed, record(), checkpoint_sha256="c" * 64).sha256 == first.sha256
    other = write_seal(sealed, record(), checkpoint_sha256="d" * 64)
    assert other.sha256 != first.sha256
    with pytest.raises(GateRefused, match=f"recorded {first.id}"):
        verify_seal(sealed, expected_id=first.id)


def test_tensor_hashes_do_not_depend_on_the_order_in_the_file(sealed):
    before = verify_seal(sealed).tensors
    tensors = load_file(sealed / "model.safetensors")
    (sealed / "model.safetensors").unlink()
    save_file(dict(reversed(tensors.items())), sealed / "model.safetensors", metadata={"order": "another"})
    (sealed / "checksums.json").write_text(json.dumps(file_hashes(sealed)))
    assert write_seal(sealed, record(), checkpoint_sha256="c" * 64).tensors == before


def test_no_seal_without_a_pass(bundle):
    with pytest.raises(GateRefused, match="refuse"):
        write_seal(bundle, record(verdict="refuse"), checkpoint_sha256="c" * 64)
    with pytest.raises(GateRefused, match="is not sealed"):
        verify_seal(bundle)
    with pytest.raises(GateRefused, match="no bundle"):
        verify_seal(bundle / "nowhere")


def every_byte_matters(path: Path) -> list[int]:
    size = path.stat().st_size
    return [0, size // 3, size // 2, size - 1]


def test_one_flipped_bit_anywhere_is_refused(sealed):
    for path in sorted(sealed.iterdir()):
        original = path.read_bytes()
        for place in every_byte_matters(path):
            changed = bytearray(original)
            changed[place] ^= 0x10
            path.write_bytes(changed)
            with pytest.raises(GateRefused, match=r"seal\.json|model\.safetensors|tensor|json"):
                verify_seal(sealed)
        path.write_bytes(original)
    verify_seal(sealed)


def test_a_flipped_weight_is_named(sealed):
    path = sealed / "model.safetensors"
    content = bytearray(path.read_bytes())
    header = int.from_bytes(content[:8], "little")
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    start, _ = json.loads(content[8 : 8 + header])[name]["data_offsets"]
    content[8 + header + start + 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(GateRefused, match=f"tensor {name} does not match"):
        verify_seal(sealed)


def rewritten(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_missing_added_and_reshaped_tensors_are_named(sealed):
    whole = (sealed / "model.safetensors").read_bytes()
    changes = {
        "tensor model.norm.weight is missing": lambda tensors: tensors.pop("model.norm.weight"),
        "tensor extra was added": lambda tensors: tensors.update(extra=torch.zeros(2)),
        "tensor lm_head.weight does not match": lambda t: t.update(
            {"lm_head.weight": t["lm_head.weight"].reshape(16, 31)}
        ),
    }
    for message, change in changes.items():
        rewritten(sealed, change)
        with pytest.raises(GateRefused, match=message):
            verify_seal(sealed)
        (sealed / "model.safetensors").write_bytes(whole)


def test_a_new_header_over_the_same_tensors_is_refused(sealed):
    rewritten(sealed, lambda tensors: None)
    with safe_open(sealed / "model.safetensors", "pt") as file:
        assert file.metadata() is None
    with pytest.raises(GateRefused, match="its header changed"):
        verify_seal(sealed)


def test_files_that_are_gone_new_or_cut_are_named(sealed):
    (sealed / "chat.jinja").write_text("{{ evil }}")
    with pytest.raises(GateRefused, match=r"chat\.jinja was added"):
        verify_seal(sealed)
    (sealed / "chat.jinja").unlink()
    content = (sealed / "model.safetensors").read_bytes()
    (sealed / "model.safetensors").write_bytes(content[:-7])
    with pytest.raises(GateRefused, match="not a whole safetensors file"):
        verify_seal(sealed)
    (sealed / "model.safetensors").unlink()
    with pytest.raises(GateRefused, match=r"model\.safetensors is missing"):
        verify_seal(sealed)


@pytest.mark.parametrize("key", ["verdict", "format", "tensors", "files", "lineage", "checks", "sha256", "torch"])
def test_an_edited_seal_is_refused(sealed, key):
    content = json.loads((sealed / "seal.json").read_text())
    if isinstance(content[key], dict):
        content[key].pop(next(iter(content[key])))
    else:
        content[key] = "refuse" if key == "verdict" else "0" * 64
    (sealed / "seal.json").write_text(json.dumps(content))
    with pytest.raises(GateRefused, match=r"seal\.json"):
        verify_seal(sealed)


def test_a_refusal_says_what_to_do(bundle):
    with pytest.raises(IsthmusError, match="isthmus handoff RUN") as caught:
        verify_seal(bundle)
    assert caught.value.exit_code == 1
