"""The seal of a bundle: what was verified, tensor by tensor and file by file, and what the verification said.

A seal finds damage, mixed-up files and bundles that no gate has passed. It is no signature: who can write the bundle
can write another seal, and then its id differs from the one in the run's parity.json.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from isthmus import __version__
from isthmus.errors import DamagedFile, GateRefused
from isthmus.formats.bundle import SEAL, file_hashes, read_bundle
from isthmus.formats.published import StoredTensors
from isthmus.model.digest import tensor_sha256
from isthmus.records import HandoffRecord
from isthmus.run import write_atomic


class Lineage(BaseModel):
    """Where the weights come from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    checkpoint_sha256: str
    recipe_sha256: str
    source_pool: str
    target_pool: str


class Seal(BaseModel):
    """The content of seal.json. Hashes are SHA-256, hexadecimal; `sha256` is that of everything else in here.

    The hash of a tensor covers its type, shape and values, so the tensor part does not depend on order or sharding.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    format: str
    tensors: dict[str, str]
    files: dict[str, str]
    verdict: Literal["pass"]
    checks: dict[str, str]
    lineage: Lineage
    isthmus: str
    torch: str
    sha256: str = ""

    @property
    def id(self) -> str:
        """The first 16 digits of the seal's hash: enough to tell seals apart."""
        return self.sha256[:16]

    def canonical_sha256(self) -> str:
        """The hash of the canonical manifest: JSON with sorted keys and no spaces, without `sha256` itself."""
        content = self.model_dump(mode="json", exclude={"sha256"})
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_seal(bundle_folder: Path, record: HandoffRecord, *, checkpoint_sha256: str) -> Seal:
    """Seal a bundle that passed. Raises GateRefused if the record's verdict is not `pass`."""
    if record.verdict != "pass":
        raise GateRefused(f"{bundle_folder} is not sealed: the parity verdict is {record.verdict!r}")
    bundle = read_bundle(bundle_folder)
    lineage = Lineage(
        checkpoint_sha256=checkpoint_sha256,
        recipe_sha256=record.recipe_sha256,
        source_pool=record.source_pool,
        target_pool=record.target_pool,
    )
    seal = Seal(
        format=bundle.format,
        tensors=_tensor_hashes(bundle_folder),
        files=file_hashes(bundle_folder, without=(SEAL,)),
        verdict=record.verdict,
        checks={check.name: f"{check.outcome}: {check.figure}" for check in record.checks},
        lineage=lineage,
        isthmus=__version__,
        torch=torch.__version__,
    )
    seal = seal.model_copy(update={"sha256": seal.canonical_sha256()})
    write_atomic(bundle_folder / SEAL, seal.model_dump_json(indent=2).encode() + b"\n")
    return seal


def verify_seal(bundle_folder: Path, expected_id: str | None = None) -> Seal:
    """Check a bundle against its seal. Raises GateRefused naming the file or tensor that is missing, added or changed.

    With `expected_id`, the id in the run's parity.json, a bundle that was sealed again is refused too.
    """
    seal = _read_seal(bundle_folder)
    if expected_id is not None and seal.id != expected_id:
        raise _refusal(
            bundle_folder, f"its seal is {seal.id}, the hand-off recorded {expected_id}: it is another bundle"
        )
    found = file_hashes(bundle_folder, without=(SEAL,))
    for name, sha256 in seal.files.items():
        if name not in found:
            raise _refusal(bundle_folder, f"{name} is missing")
        if found[name] != sha256:
            raise _refusal(bundle_folder, _what_changed(bundle_folder, name, seal))
    if added := sorted(found.keys() - seal.files.keys()):
        raise _refusal(bundle_folder, f"{added[0]} was added after sealing")
    if (changed := _changed_tensor(_tensor_hashes(bundle_folder), seal.tensors)) is not None:
        raise _refusal(bundle_folder, changed)
    return seal


def _read_seal(bundle_folder: Path) -> Seal:
    path = bundle_folder / SEAL
    if not bundle_folder.is_dir():
        raise GateRefused(f"there is no bundle at {bundle_folder}; `isthmus handoff RUN` writes one")
    if not path.is_file():
        raise GateRefused(
            f"{bundle_folder} is not sealed: no parity gate has passed it. `isthmus handoff RUN` checks and seals it"
        )
    try:
        seal = Seal.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first: Any = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise _refusal(bundle_folder, f"{SEAL} cannot be read ({where}: {first['msg']})") from None
    if seal.canonical_sha256() != seal.sha256:
        raise _refusal(bundle_folder, f"{SEAL} does not match its own hash: it was edited")
    return seal


def _what_changed(bundle_folder: Path, name: str, seal: Seal) -> str:
    if not name.endswith(".safetensors"):
        return f"{name} does not match its hash"
    try:
        changed = _changed_tensor(_tensor_hashes(bundle_folder), seal.tensors)
    except DamagedFile as error:
        return str(error)
    return changed or f"{name} does not match its hash, though its tensors do: its header changed"


def _changed_tensor(found: dict[str, str], sealed: dict[str, str]) -> str | None:
    for name, sha256 in sealed.items():
        if name not in found:
            return f"the tensor {name} is missing"
        if found[name] != sha256:
            return f"the tensor {name} does not match its hash"
    added = sorted(found.keys() - sealed.keys())
    return f"the tensor {added[0]} was added after sealing" if added else None


def _tensor_hashes(bundle_folder: Path) -> dict[str, str]:
    with StoredTensors(bundle_folder) as stored:
        return {name: tensor_sha256(stored.read(name)) for name in sorted(stored.names)}


def _refusal(bundle_folder: Path, reason: str) -> GateRefused:
    return GateRefused(
        f"{bundle_folder} is refused: {reason}. "
        "Repeat `isthmus handoff RUN`, or copy the bundle again from where it was sealed"
    )
