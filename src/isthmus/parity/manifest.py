"""The canonical manifest of a bundle: what crosses, tensor by tensor, and where each source tensor went.

Tensor hashes cover type, shape and values (model/digest.py), so the manifest of one and the same content is one and the
same however it is sharded or ordered. It is written where the weights are, travels in the bundle, and is checked where
the chip is.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from isthmus import __version__
from isthmus.errors import DamagedFile, IsthmusError
from isthmus.formats import recognise_format
from isthmus.formats.files.bundle import CHECKSUMS, SEAL, architecture_of, file_hashes, read_config, read_object
from isthmus.formats.files.published import StoredTensors
from isthmus.model.digest import tensor_sha256
from isthmus.recipe.architecture import ModelSection
from isthmus.records import Check, Part
from isthmus.run import explain_io_errors, fsync_folder, sha256_file, write_atomic

MANIFEST = "manifest.json"
NAME = "tensors and files match the manifest"
Fate = Literal["carried", "quantised", "merged", "dropped", "unaccounted"]


class Entry(Part):
    """What became of one source tensor: the stored tensors that hold it, or why it is not stored.

    `sha256` is the hash of the source tensor. `error` is the largest error of an element as a share of what rounding
    may cost it (half a step of its own scale), or, where GPTQ rounded, that of the outputs as a share of what rounding
    to the nearest costs them; None where nothing was quantised. `detail` is the reason of a dropped one, and says what
    is out of the ordinary in others.
    """

    source: str
    sha256: str
    fate: Fate
    stored: tuple[str, ...] = ()
    error: float | None = None
    detail: str = ""


class Manifest(BaseModel):
    """The content of manifest.json. Hashes are SHA-256, hexadecimal.

    `source` is the identity of the source's weights: `identity` of the hashes of all its tensors, None where the
    weights were not at hand. `architecture` holds the keys of `[model]`. `parent` is the id of the seal of the bundle
    that this one follows.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    format: str
    architecture: dict[str, Any]
    tensors: dict[str, str]
    source: str | None
    coverage: tuple[Entry, ...]
    parent: str | None
    isthmus: str
    torch: str

    @property
    def id(self) -> str:
        """SHA-256 of the canonical form: JSON with sorted keys and no spaces."""
        return canonical_sha256(self.model_dump(mode="json"))


def write_manifest(
    bundle_folder: Path,
    *,
    coverage: Sequence[Entry] = (),
    architecture: ModelSection | None = None,
    parent: str | None = None,
) -> Manifest:
    """Put the manifest into a bundle that is not sealed yet, and its hash into the checksums.

    `architecture` is that of the source, against which config.json is checked later; that of config.json if absent.
    One tensor is in memory at a time.
    """
    config = read_config(bundle_folder)
    manifest = Manifest(
        format=recognise_format(config).name,
        architecture=architecture_fields(architecture or architecture_of(bundle_folder, config)),
        tensors=tensor_hashes(bundle_folder),
        source=identity((entry.source, entry.sha256) for entry in coverage) if coverage else None,
        coverage=tuple(coverage),
        parent=parent,
        isthmus=__version__,
        torch=torch.__version__,
    )
    add_file(bundle_folder, MANIFEST, manifest.model_dump_json(indent=1).encode() + b"\n")
    return manifest


def read_manifest(bundle_folder: Path) -> Manifest:
    """The manifest of a bundle. Raises IsthmusError if it has none, DamagedFile if it cannot be read."""
    path = bundle_folder / MANIFEST
    if not path.is_file():
        raise IsthmusError(f"{bundle_folder} has no {MANIFEST}: `isthmus capture BUNDLE --source SOURCE` writes it")
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise DamagedFile(f"{path} cannot be read: {error}") from None


def check_manifest(bundle_folder: Path) -> list[Check]:
    """Whether a bundle holds the files of its checksums and the tensors of its manifest: one check of layer "files".

    It names the first tensor or file that is wrong, missing or one too many.
    """
    try:
        manifest = read_manifest(bundle_folder)
        problem = _wrong_tensor(bundle_folder, manifest) or _wrong_file(bundle_folder)
    except IsthmusError as error:
        return [_check("fail", str(error), None)]
    if problem is not None:
        return [_check("fail", *problem)]
    count = len(manifest.tensors)
    return [_check("pass", f"{count} tensors and the files around them are those of manifest {manifest.id[:16]}", None)]


def add_file(bundle_folder: Path, name: str, content: bytes) -> None:
    """Put a file into a bundle that is not sealed yet, and its hash into the checksums.

    The hashes of the other files stay as they are recorded, so a file that was damaged meanwhile is still found.
    """
    write_atomic(bundle_folder / name, content)
    _record(bundle_folder, name, hashlib.sha256(content).hexdigest())


def move_file(bundle_folder: Path, name: str, written: Path, sha256: str) -> None:
    """`add_file` of a file with that hash that was written elsewhere on the same file system."""
    path = bundle_folder / name
    with explain_io_errors(path):
        path.parent.mkdir(exist_ok=True)
        with written.open("rb") as file:
            os.fsync(file.fileno())
        written.replace(path)
        fsync_folder(path.parent)
    _record(bundle_folder, name, sha256)


def _record(bundle_folder: Path, name: str, sha256: str) -> None:
    path = bundle_folder / CHECKSUMS
    recorded = read_checksums(bundle_folder) if path.is_file() else file_hashes(bundle_folder)
    write_atomic(path, json.dumps({**recorded, name: sha256}, sort_keys=True, indent=2).encode() + b"\n")


def tensor_hashes(bundle_folder: Path) -> dict[str, str]:
    """The hash of each stored tensor by name, sorted; one tensor is in memory at a time."""
    with StoredTensors(bundle_folder) as stored:
        hashes = {name: tensor_sha256(stored.read(name)) for name in stored.names}
    return dict(sorted(hashes.items()))


def first_difference(found: dict[str, str], listed: dict[str, str]) -> tuple[str, str] | None:
    """What is wrong with the first tensor that differs from its listed hash, and its module; None if none does."""
    for name, sha256 in listed.items():
        if name not in found:
            return f"the tensor {name} is missing", module_of(name)
        if found[name] != sha256:
            return f"the tensor {name} does not match its hash", module_of(name)
    added = sorted(found.keys() - listed.keys())
    return (f"the tensor {added[0]} was added", module_of(added[0])) if added else None


def module_of(name: str) -> str:
    """The path of the module that a tensor belongs to."""
    return name.rpartition(".")[0] or name


def identity(hashes: Iterable[tuple[str, str]]) -> str:
    """SHA-256 of a set of tensors: over a line `NAME HASH` for each in the order of names, as in updates/wire.py."""
    lines = [f"{name} {sha256}\n" for name, sha256 in sorted(hashes)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def canonical_sha256(content: Any) -> str:
    """SHA-256 of JSON with sorted keys and no spaces."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def architecture_fields(architecture: ModelSection) -> dict[str, Any]:
    """An architecture as the keys of `[model]`, without where it was taken from."""
    return architecture.model_dump(mode="json", exclude={"preset", "from_"})


def _wrong_tensor(bundle_folder: Path, manifest: Manifest) -> tuple[str, str] | None:
    return first_difference(tensor_hashes(bundle_folder), manifest.tensors)


def _wrong_file(bundle_folder: Path) -> tuple[str, None] | None:
    recorded = read_checksums(bundle_folder)
    there = {str(path.relative_to(bundle_folder)) for path in bundle_folder.rglob("*") if path.is_file()}
    for name, sha256 in recorded.items():
        if name not in there:
            return f"{name} is missing", None
        if sha256_file(bundle_folder / name) != sha256:
            return f"{name} does not match its hash", None
    added = sorted(there - recorded.keys() - {CHECKSUMS, SEAL})
    return (f"{added[0]} does not belong to this bundle", None) if added else None


def read_checksums(bundle_folder: Path) -> dict[str, str]:
    """The hash of each file by its path, as recorded. Raises DamagedFile if the bundle has no checksums.json."""
    if not (bundle_folder / CHECKSUMS).is_file():
        raise DamagedFile(f"{bundle_folder} has no {CHECKSUMS}: it was not copied whole")
    return read_object(bundle_folder / CHECKSUMS)


def _check(outcome: Literal["pass", "fail"], detail: str, module: str | None) -> Check:
    return Check(layer="files", name=NAME, outcome=outcome, detail=detail, module=module)
