"""The seal against every kind of tampering."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from isthmus.errors import DamagedFile, GateRefused, IsthmusError
from isthmus.formats.files.bundle import file_hashes, read_bundle, write_bundle
from isthmus.model.model import Model
from isthmus.parity.manifest import add_file, canonical_sha256, write_manifest
from isthmus.parity.seal import Seal, standing, verify_seal, write_seal
from isthmus.parity.signing import new_key, public_key, read_trusted
from isthmus.records import ParityVerdict
from tests.support.bundles import TinyTokenizer, passed
from tests.support.small import tiny_architecture

ARCHITECTURE = tiny_architecture(vocab_size=31, hidden_size=16)


def verdict(outcome: str = "pass") -> bytes:
    """The content of a verdict.json."""
    found = ParityVerdict(
        verdict=outcome,  # pyright: ignore[reportArgumentType]
        target="npu0",
        rehearsed=False,
        checks=[],
        ledger=[],
        culprit="model.layers.1.mlp" if outcome == "refuse" else None,
        operator=None,
        isthmus="0",
        torch="0",
        started=0.0,
        ended=1.0,
    )
    return found.model_dump_json().encode()


@pytest.fixture
def bundle(tmp_path) -> Path:
    write_bundle(
        tmp_path / "b", "w8a8", Model(ARCHITECTURE).initialise(0).state_dict(), ARCHITECTURE, TinyTokenizer(0, 1)
    )
    return tmp_path / "b"


@pytest.fixture
def sealed(bundle) -> Path:
    write_seal(bundle, **passed())
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
    assert write_seal(sealed, **passed()).sha256 == first.sha256
    other = write_seal(sealed, **passed("d"))
    assert other.sha256 != first.sha256
    with pytest.raises(GateRefused, match=f"recorded {first.id}"):
        verify_seal(sealed, expected_id=first.id)


def test_tensor_hashes_do_not_depend_on_the_order_in_the_file(sealed):
    before = verify_seal(sealed).tensors
    tensors = load_file(sealed / "model.safetensors")
    (sealed / "model.safetensors").unlink()
    save_file(dict(reversed(tensors.items())), sealed / "model.safetensors", metadata={"order": "another"})
    (sealed / "checksums.json").write_text(json.dumps(file_hashes(sealed)))
    assert write_seal(sealed, **passed()).tensors == before


def test_no_seal_without_a_pass(bundle):
    with pytest.raises(GateRefused, match="refuse"):
        write_seal(bundle, **passed(verdict="refuse"))
    with pytest.raises(GateRefused, match="is not sealed"):
        verify_seal(bundle)
    with pytest.raises(GateRefused, match="no bundle"):
        verify_seal(bundle / "nowhere")


def plant_empty_folder(bundle):
    (bundle / "extra").mkdir()


def plant_folder_of_files(bundle):
    (bundle / "more" / "deep").mkdir(parents=True)
    (bundle / "more" / "deep" / "a.py").write_text("1")


def plant_pipe(bundle):
    os.mkfifo(bundle / "pipe")


def plant_link_to_a_folder(bundle):
    (bundle / "all").symlink_to(bundle)


def plant_link_that_leads_nowhere(bundle):
    (bundle / "gone").symlink_to("nothing")


def move_weights_out(bundle):
    weights = bundle / "model.safetensors"
    weights.rename(bundle.parent / "elsewhere.safetensors")
    weights.symlink_to(bundle.parent / "elsewhere.safetensors")


STRANGERS = {
    plant_empty_folder: "extra is an empty folder",
    plant_folder_of_files: "more/deep/a.py",
    plant_pipe: "pipe is neither a file nor a folder",
    plant_link_to_a_folder: "all is a link to what is no file",
    plant_link_that_leads_nowhere: "gone is a link that leads nowhere",
    move_weights_out: "model.safetensors is a link out of the bundle",
}


@pytest.mark.parametrize("plant", STRANGERS, ids=lambda plant: plant.__name__)
def test_what_no_hash_covers_is_seen(bundle, plant):
    """Before it is sealed, when it is read, by its seal, and by whoever inspects it."""
    write_seal(bundle, **passed())
    plant(bundle)
    found = standing(bundle)
    assert found.state == "tampered" and STRANGERS[plant] in found.reason
    (bundle / "seal.json").unlink()
    for read in (read_bundle, lambda folder: write_seal(folder, **passed())):
        with pytest.raises(DamagedFile, match=STRANGERS[plant]):
            read(bundle)


def test_a_link_to_a_file_of_the_bundle_is_that_file(bundle):
    weights = bundle / "model.safetensors"
    weights.rename(bundle / "again.safetensors")
    weights.symlink_to("again.safetensors")
    (bundle / "checksums.json").write_text(json.dumps(file_hashes(bundle)))
    write_seal(bundle, **passed())
    assert standing(bundle).state == "sealed"


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


EDITABLE = [
    "verdict",
    "format",
    "content",
    "tensors",
    "files",
    "lineage",
    "checks",
    "sha256",
    "torch",
    "parent",
    "manifest",
]


@pytest.mark.parametrize("key", EDITABLE)
def test_an_edited_seal_is_refused(sealed, key):
    content = json.loads((sealed / "seal.json").read_text())
    if isinstance(content[key], dict):
        content[key].popitem()
    else:
        content[key] = "refuse" if key == "verdict" else "0" * 64
    (sealed / "seal.json").write_text(json.dumps(content))
    with pytest.raises(GateRefused, match=r"seal\.json"):
        verify_seal(sealed)


def test_a_refusal_says_what_to_do(bundle):
    with pytest.raises(IsthmusError, match="isthmus handoff RUN") as caught:
        verify_seal(bundle)
    assert caught.value.exit_code == 1


def resealed(folder: Path, **changes) -> Seal:
    """The seal with some of its fields changed and its own hash made right, as a forger would write it."""
    seal = Seal.model_validate_json((folder / "seal.json").read_bytes()).model_copy(update=changes)
    seal = seal.model_copy(update={"sha256": seal.canonical_sha256()})
    (folder / "seal.json").write_text(seal.model_dump_json())
    return seal


def test_the_content_id_names_format_and_tensors_whatever_the_files(tmp_path):
    state, seals = Model(ARCHITECTURE).initialise(0).state_dict(), []
    for shard_bytes in (1 << 30, 3000):
        folder = tmp_path / str(shard_bytes)
        write_bundle(folder, "w8a8", state, ARCHITECTURE, TinyTokenizer(0, 1), shard_bytes=shard_bytes)
        write_manifest(folder, parent="f" * 16)
        seals.append(write_seal(folder, **passed()))
    one, other = seals
    assert one.content == other.content and one.manifest == other.manifest and one.files != other.files
    assert one.parent == other.parent == "f" * 16 and one.sha256 != other.sha256
    assert one.content == canonical_sha256({"format": "w8a8", "tensors": one.tensors})


def test_a_signed_seal_is_trusted_by_who_knows_the_key(bundle, tmp_path):
    key, stranger = tmp_path / "keys" / "gate.pem", tmp_path / "other.pem"
    public, other = new_key(key), new_key(stranger)
    assert key.stat().st_mode & 0o777 == 0o600 and public == public_key(key) != other
    with pytest.raises(IsthmusError, match="never written over"):
        new_key(key)
    seal = write_seal(bundle, **passed(), sign_key=key)
    assert verify_seal(bundle, seal.id, trusted=[other, public]).signer == public
    assert verify_seal(bundle).signer == public
    with pytest.raises(GateRefused, match="not trusted"):
        verify_seal(bundle, trusted=[other])
    with pytest.raises(GateRefused, match="not trusted"):
        verify_seal(bundle, trusted=[])


def test_an_unsigned_seal_is_refused_by_who_trusts_someone(sealed, tmp_path):
    public = new_key(tmp_path / "gate.pem")
    with pytest.raises(GateRefused, match="is not signed"):
        verify_seal(sealed, trusted=[public])
    assert standing(sealed, trusted=[public]).state == "untrusted" and standing(sealed).state == "sealed"


def test_a_signature_cannot_be_stripped_swapped_or_moved(bundle, tmp_path):
    keys = tmp_path / "gate.pem", tmp_path / "other.pem"
    public, other = (new_key(key) for key in keys)
    signed = write_seal(bundle, **passed(), sign_key=keys[0])
    written = (bundle / "seal.json").read_text()
    stripped = json.loads(written)
    del stripped["signature"]
    (bundle / "seal.json").write_text(json.dumps(stripped))
    with pytest.raises(GateRefused, match="no signature"):
        verify_seal(bundle)
    resealed(bundle, signer=None, signature=None)
    with pytest.raises(GateRefused, match="is not signed"):
        verify_seal(bundle, trusted=[public])
    with pytest.raises(GateRefused, match="another bundle"):
        verify_seal(bundle, expected_id=signed.id)
    (bundle / "seal.json").write_text(written)
    resealed(bundle, signer=other)
    with pytest.raises(GateRefused, match="is not that of"):
        verify_seal(bundle, trusted=[public, other])
    (bundle / "seal.json").write_text(written)
    resealed(bundle, checks={"mean KL": "pass: 0"})
    with pytest.raises(GateRefused, match="is not that of"):
        verify_seal(bundle)
    resealed(bundle, signature="zz")
    with pytest.raises(GateRefused, match="is not that of"):
        verify_seal(bundle)


def test_changed_content_under_an_old_signature_is_refused(bundle, tmp_path):
    public = new_key(tmp_path / "gate.pem")
    write_seal(bundle, **passed(), sign_key=tmp_path / "gate.pem")
    rewritten(bundle, lambda tensors: tensors["model.norm.weight"].mul_(2))
    (bundle / "checksums.json").write_text(json.dumps(file_hashes(bundle)))
    with pytest.raises(GateRefused, match="does not match"):
        verify_seal(bundle, trusted=[public])
    resealed(bundle, files=file_hashes(bundle, without=("seal.json",)))
    with pytest.raises(GateRefused, match="is not that of"):
        verify_seal(bundle, trusted=[public])


def test_a_chain_of_parents(tmp_path):
    parent = None
    for step in range(3):
        folder = tmp_path / str(step)
        write_bundle(
            folder, "bf16", Model(ARCHITECTURE).initialise(step).state_dict(), ARCHITECTURE, TinyTokenizer(0, 1)
        )
        seal = write_seal(folder, **passed(), parent=parent)
        assert seal.parent == parent == verify_seal(folder).parent
        parent = seal.id
    forged = resealed(tmp_path / "2", parent="0" * 16)
    assert forged.id != parent
    with pytest.raises(GateRefused, match="another bundle"):
        verify_seal(tmp_path / "2", expected_id=parent)


def test_the_seal_covers_the_verdict_and_never_seals_a_refusal(bundle):
    add_file(bundle, "verdict.json", verdict("refuse"))
    with pytest.raises(GateRefused, match="refuse"):
        write_seal(bundle, **passed())
    assert standing(bundle).state == "refused" and "model.layers.1.mlp" in standing(bundle).reason
    add_file(bundle, "verdict.json", verdict())
    seal = write_seal(bundle, **passed())
    assert seal.verdict_sha256 == seal.files["verdict.json"] and standing(bundle).state == "sealed"
    (bundle / "verdict.json").write_bytes(verdict() + b" ")
    assert standing(bundle).state == "tampered"
    (bundle / "verdict.json").write_bytes(verdict("refuse"))
    assert standing(bundle).state == "refused"
    (bundle / "verdict.json").write_bytes(b"{")
    assert standing(bundle).state == "tampered"


def test_nothing_that_was_damaged_before_is_sealed(bundle):
    write_manifest(bundle)
    whole = (bundle / "model.safetensors").read_bytes()
    rewritten(bundle, lambda tensors: tensors["model.norm.weight"].mul_(2))
    with pytest.raises(GateRefused, match="nothing is sealed"):
        write_seal(bundle, **passed())
    (bundle / "checksums.json").write_text(json.dumps(file_hashes(bundle)))
    with pytest.raises(GateRefused, match=r"model\.norm\.weight does not match its hash of manifest"):
        write_seal(bundle, **passed())
    (bundle / "model.safetensors").write_bytes(whole)
    (bundle / "checksums.json").write_text(json.dumps(file_hashes(bundle)))
    write_seal(bundle, **passed())


def test_standing_says_what_a_bundle_is(bundle):
    assert standing(bundle).state == "unsealed"
    seal = write_seal(bundle, **passed())
    assert standing(bundle).seal == seal and standing(bundle, refused=True).state == "refused"
    assert standing(bundle, expected_id="0" * 16).state == "tampered"
    (bundle / "tokenizer.json").write_text("[]")
    found = standing(bundle)
    assert found.state == "tampered" and found.seal is None and "tokenizer.json" in found.reason
    with pytest.raises(GateRefused, match="no bundle"):
        standing(bundle / "nowhere")


def test_keys_that_others_read_or_that_are_none_are_refused(tmp_path):
    key, listed = tmp_path / "gate.pem", tmp_path / "trusted"
    public = new_key(key)
    key.chmod(0o640)
    with pytest.raises(IsthmusError, match="chmod 600"):
        public_key(key)
    key.chmod(0o600)
    key.write_text("no key")
    with pytest.raises(IsthmusError, match="is no private key"):
        public_key(key)
    with pytest.raises(IsthmusError, match="isthmus key new"):
        public_key(tmp_path / "nowhere")
    listed.write_text(f"# who may seal\n\n{public} the gate in Shenzhen\n")
    assert read_trusted(listed) == [public]
    for wrong, message in (("ed25519:00\n", "is no public key"), ("# none\n", "nothing could be trusted")):
        listed.write_text(wrong)
        with pytest.raises(IsthmusError, match=message):
            read_trusted(listed)
