"""Versions of the weights through a folder on shared storage, for pools that cannot reach each other.

    000000.full          all tensors (formats/wire.py)
    000001.delta         what changed since 000000 (formats/delta.py)
    latest.json          every version that can still be taken, the newest last; written after its file

A follower takes the deltas in order from the version that it has. If one is missing or damaged, it waits for the next
full snapshot, or begins at the newest one that is there. Files before the last but one snapshot are removed.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from isthmus.errors import DamagedFile, IsthmusError
from isthmus.formats.delta import apply, encode, hashes_of
from isthmus.formats.wire import check_digest, digest, hash_of_hashes, pack, unpack
from isthmus.run import write_atomic

LATEST = "latest.json"
SNAPSHOTS_KEPT = 2


@dataclass(frozen=True)
class Entry:
    """A version in the folder. `sha256` is that of its file, `set_sha256` that of the tensors that come out."""

    version: int
    base_version: int | None
    kind: Literal["full", "delta"]
    file: str
    bytes: int
    sha256: str
    set_sha256: str


class Publisher:
    """Writes versions into a folder. A new publisher begins with a full snapshot."""

    def __init__(self, folder: Path, *, snapshot_every: int = 50):
        self.folder, self.snapshot_every = folder, snapshot_every
        folder.mkdir(parents=True, exist_ok=True)
        self._entries = read_entries(folder)
        self._last: dict[str, Tensor] = {}
        self._hashes: dict[str, str] = {}
        self._since_snapshot = 0

    def publish(self, tensors: dict[str, Tensor], version: int) -> Entry:
        """Write a version; the tensors are kept until the next call and must not change."""
        is_full = not self._last or self._since_snapshot >= self.snapshot_every
        if is_full:
            payload, hashes, base = pack(tensors), hashes_of(tensors), None
        else:
            base = self._entries[-1].version
            payload, hashes = encode(self._last, tensors, base_version=base, version=version, old_hashes=self._hashes)
        kind: Literal["full", "delta"] = "full" if is_full else "delta"
        entry = Entry(
            version, base, kind, f"{version:06d}.{kind}", len(payload), digest(payload), hash_of_hashes(hashes)
        )
        write_atomic(self.folder / entry.file, payload)
        self._entries = [*self._entries, entry]
        kept = _kept(self._entries)
        write_atomic(self.folder / LATEST, json.dumps([asdict(one) for one in kept], indent=1).encode() + b"\n")
        for old in self._entries[: -len(kept)]:
            (self.folder / old.file).unlink(missing_ok=True)
        self._entries = kept
        self._last, self._hashes = tensors, hashes
        self._since_snapshot = 0 if is_full else self._since_snapshot + 1
        return entry


class Follower:
    """Follows a folder: `tensors` are those of `version`, or empty before the first one.

    `skipped` counts the versions that could not be taken in order because a file was missing or damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.version: int | None = None
        self.tensors: dict[str, Tensor] = {}
        self.skipped = 0
        self._hashes: dict[str, str] = {}

    @property
    def behind(self) -> int:
        """How many published versions are newer than what is here."""
        return sum(self.version is None or entry.version > self.version for entry in read_entries(self.folder))

    def advance(self) -> bool:
        """Take the next version, if there is one that can be taken. What is damaged is passed over, and counted."""
        newer = [e for e in read_entries(self.folder) if self.version is None or e.version > self.version]
        following = next((entry for entry in newer if entry.base_version == self.version is not None), None)
        if following is not None and self._take(following):
            return True
        snapshots = [entry for entry in newer if entry.kind == "full"]
        for entry in reversed(snapshots):
            if self._take(entry):
                self.skipped += sum(one.version < entry.version for one in newer)
                return True
        return False

    def _take(self, entry: Entry) -> bool:
        try:
            payload = (self.folder / entry.file).read_bytes()
            check_digest(payload, entry.sha256)
            if entry.kind == "full":
                tensors = unpack(payload, entry.sha256)
                hashes = hashes_of(tensors)
            else:
                tensors, hashes = apply(payload, self.tensors, self._hashes)
            if hash_of_hashes(hashes) != entry.set_sha256:
                raise DamagedFile(f"{entry.file} does not give the tensors that were published")
        except (DamagedFile, FileNotFoundError):
            return False
        self.tensors, self._hashes, self.version = tensors, hashes, entry.version
        return True


def read_entries(folder: Path) -> list[Entry]:
    """What is published, oldest first; empty before the first version. Raises IsthmusError if it cannot be read."""
    path = folder / LATEST
    if not path.is_file():
        return []
    try:
        return [Entry(**entry) for entry in json.loads(path.read_bytes())]
    except (ValueError, TypeError) as error:
        raise IsthmusError(
            f"{path} is no list of versions: {error}. Is this the folder that a run publishes to?"
        ) from None


def _kept(entries: list[Entry]) -> list[Entry]:
    """From the last but one snapshot on."""
    places = [place for place, entry in enumerate(entries) if entry.kind == "full"]
    return entries[places[-SNAPSHOTS_KEPT] :] if len(places) >= SNAPSHOTS_KEPT else entries
