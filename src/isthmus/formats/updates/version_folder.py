"""Versions of weights in a folder that sender and follower share, for pools that cannot reach each other.

    latest.json                     what there is, in order; written last, removed from first
    versions/000007.delta           a message of updates/delta.py, its parts one after the other
    snapshots/000000.safetensors    all tensors of a version

Every file appears whole or not at all. What lies between the snapshots that are kept is never removed, so a follower
that has any version since the older one of them finds its way.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from isthmus.errors import DamagedFile, IsthmusError
from isthmus.formats.updates.delta import WeightSet, apply, split_messages
from isthmus.formats.updates.publisher import Published
from isthmus.formats.updates.wire import digest, pack, unpack
from isthmus.lines import read_json_object
from isthmus.run import write_atomic

LATEST = "latest.json"
KEEP_SNAPSHOTS = 2


@dataclass(frozen=True)
class StoredFile:
    """A file by its path in the folder, with its SHA-256 and its size in bytes."""

    path: str
    sha256: str
    size: int


@dataclass(frozen=True)
class StoredVersion:
    """A version in the folder. `sha256` is `set_sha256` of its tensors, `base_sha256` of what its delta changes."""

    version: int
    sha256: str
    base_sha256: str | None
    delta: StoredFile | None
    snapshot: StoredFile | None


class Lost(DamagedFile):
    """A file of the folder is missing or damaged."""


class VersionWriter:
    """The sender's side. A folder that has versions already goes on with a snapshot: what others hold is not known."""

    def __init__(self, folder: Path, format_name: str, keep_snapshots: int = KEEP_SNAPSHOTS):
        self.folder, self.format_name, self.keep_snapshots = folder, format_name, keep_snapshots

    def write(self, published: Published) -> StoredVersion:
        """Add a version, and remove what no follower needs any more."""
        versions = read_versions(self.folder, self.format_name) if (self.folder / LATEST).exists() else []
        weights, delta, snapshot = published.weights, None, None
        follows = bool(versions) and published.base == (versions[-1].version, versions[-1].sha256)
        if published.delta is not None and follows:
            delta = self._write(f"versions/{weights.version:06d}.delta", b"".join(published.delta))
        if delta is None or published.snapshot_due:
            snapshot = self._write(f"snapshots/{weights.version:06d}.safetensors", pack(weights.tensors))
        base = published.base[1] if published.base is not None and delta is not None else None
        entry = StoredVersion(weights.version, weights.sha256, base, delta, snapshot)
        kept = self._needed([*(one for one in versions if one.version < weights.version), entry])
        content = {"format": self.format_name, "versions": [asdict(one) for one in kept]}
        write_atomic(self.folder / LATEST, json.dumps(content, indent=1).encode())
        self._remove_others(kept)
        return entry

    def _write(self, name: str, content: bytes) -> StoredFile:
        write_atomic(self.folder / name, content)
        return StoredFile(name, digest(content), len(content))

    def _needed(self, versions: list[StoredVersion]) -> list[StoredVersion]:
        """Everything from the oldest snapshot that is kept."""
        places = [place for place, one in enumerate(versions) if one.snapshot is not None]
        return versions[places[-min(self.keep_snapshots, len(places))] :]

    def _remove_others(self, kept: list[StoredVersion]) -> None:
        named = {file.path for one in kept for file in (one.delta, one.snapshot) if file is not None}
        for kind in ("versions/*.delta", "snapshots/*.safetensors"):
            for path in self.folder.glob(kind):
                if str(path.relative_to(self.folder)) not in named:
                    path.unlink(missing_ok=True)


def read_versions(folder: Path, format_name: str | None = None) -> list[StoredVersion]:
    """What there is, in order. Raises IsthmusError if nothing is, or if it has another format; DamagedFile."""
    path = folder / LATEST
    if not path.is_file():
        raise IsthmusError(f"{folder} has no {LATEST}: nothing has been published there yet")
    try:
        content = read_json_object(path, DamagedFile)
        found = content["format"]
        versions = [_stored_version(one) for one in content["versions"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedFile(f"{path} cannot be read: {error!r}") from None
    if not versions or (format_name is not None and found != format_name):
        raise IsthmusError(f"{folder} holds versions in format {found}, not {format_name}; publish to another folder")
    return versions


def read_snapshot(folder: Path, stored: StoredVersion) -> WeightSet:
    """All weights of a version. Raises Lost if its file is missing or damaged, DamagedFile if it is another version."""
    assert stored.snapshot is not None
    weights = WeightSet.of(stored.version, unpack(_read(folder, stored.snapshot), stored.snapshot.sha256))
    if weights.sha256 != stored.sha256:
        raise DamagedFile(f"{folder / stored.snapshot.path} holds other weights than {LATEST} says")
    return weights


def read_delta(folder: Path, stored: StoredVersion) -> list[bytes]:
    """The parts of the message that leads to a version. Raises Lost if its file is missing or damaged."""
    assert stored.delta is not None
    return split_messages(_read(folder, stored.delta))


def next_versions(versions: list[StoredVersion], weights: WeightSet | None) -> list[StoredVersion] | None:
    """The versions that come after these weights. None if they are none of those in the folder."""
    if weights is None:
        return None
    for place, one in enumerate(versions):
        if (one.version, one.sha256) == (weights.version, weights.sha256):
            return versions[place + 1 :]
    return None


def advance(folder: Path, weights: WeightSet | None, versions: list[StoredVersion]) -> tuple[WeightSet, list[bytes]]:
    """One version further: the weights, and the message that led there (empty if it was a snapshot).

    The delta is taken where these weights are its base, else the newest readable snapshot. Raises Lost if neither can
    be read: a later snapshot will help.
    """
    following = next_versions(versions, weights)
    problem: Lost | None = None
    if following and following[0].delta is not None and weights is not None:
        try:
            parts = read_delta(folder, following[0])
            return apply(weights, parts), parts
        except Lost as error:
            problem = error
    for stored in reversed(versions if following is None else following):
        if stored.snapshot is not None:
            try:
                return read_snapshot(folder, stored), []
            except Lost as error:
                problem = error
    raise problem or Lost(f"{folder} has no snapshot that can be read")


def _read(folder: Path, stored: StoredFile) -> bytes:
    try:
        content = (folder / stored.path).read_bytes()
    except FileNotFoundError:
        raise Lost(f"{folder / stored.path} is missing") from None
    if digest(content) != stored.sha256:
        raise Lost(f"{folder / stored.path} does not match its hash in {LATEST}")
    return content


def _stored_version(values: dict) -> StoredVersion:
    files = {key: StoredFile(**values[key]) if values[key] else None for key in ("delta", "snapshot")}
    for file in files.values():
        if file is not None and (Path(file.path).is_absolute() or ".." in Path(file.path).parts):
            raise ValueError(f"{file.path} leads out of the folder")
    return StoredVersion(values["version"], values["sha256"], values["base_sha256"], files["delta"], files["snapshot"])
