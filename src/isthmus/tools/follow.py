"""Follow: bring the versions that a trainer writes into a shared folder to an engine, in order and checked by hash.

For pools that cannot reach each other: `publish = FOLDER` of an `rl` step writes the folder, this reads it beside the
engine and keeps nothing on the disk. After a crash, or where a file was lost, it goes on from the newest snapshot that
is whole.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from isthmus.engines import OtherBase
from isthmus.engines.remote import HttpEngine
from isthmus.engines.remote.transport import Unreachable
from isthmus.errors import IsthmusError
from isthmus.formats.updates.delta import WeightSet
from isthmus.formats.updates.version_folder import LATEST, Lost, StoredVersion, advance, next_versions, read_versions
from isthmus.formats.updates.wire import digest, pack
from isthmus.lines import read_text
from isthmus.progress import Watch

NAME = "follow"
POLL_S = 1.0


@dataclass
class Follower:
    """Between a folder and an engine. `held` are the weights as the folder has them, `has` what the engine took."""

    folder: Path
    engine: HttpEngine
    say: Callable[[str], None]
    held: WeightSet | None = None
    has: tuple[int, str] | None = None

    def catch_up(self) -> int:
        """Bring the engine to the newest version; how many versions it still lacks because their files are lost.

        Raises EngineError if the engine refuses a version, IsthmusError if the folder has none.
        """
        versions = read_versions(self.folder)
        while next_versions(versions, self.held) != []:
            before = self.held
            try:
                self.held, parts = advance(self.folder, self.held, versions)
            except Lost as error:
                self._push_held(versions)
                return self._wait(error, versions)
            if parts and before is not None and self.has == (before.version, before.sha256):
                self._push_delta(before, self.held, parts, versions)
        self._push_held(versions)
        return 0

    def forget_engine(self) -> None:
        """The engine was away and may have come back with other weights: it gets all of them next."""
        self.has = None

    def _push_held(self, versions: list[StoredVersion]) -> None:
        """Bring the engine level with what is held here, if it is not."""
        if self.held is not None and self.has != (self.held.version, self.held.sha256):
            self._push_whole(self.held, versions, "snapshot")

    def _push_delta(
        self, before: WeightSet, weights: WeightSet, parts: list[bytes], versions: list[StoredVersion]
    ) -> None:
        if not self.engine.takes_deltas:
            self._push_whole(weights, versions, "put together from a delta")
            return
        began = time.perf_counter()
        try:
            self.engine.update_delta(parts, before.version, weights.version, weights.sha256)
        except OtherBase as error:
            self.say(f"  the engine has other weights than version {before.version}: {error}")
            self._push_whole(weights, versions, "snapshot instead of a delta")
            return
        self._pushed(weights, versions, "delta", sum(map(len, parts)), began)

    def _push_whole(self, weights: WeightSet, versions: list[StoredVersion], what: str) -> None:
        began = time.perf_counter()
        payload = pack(weights.tensors)
        self.engine.update(payload, weights.version, digest(payload))
        self._pushed(weights, versions, what, len(payload), began)

    def _pushed(self, weights: WeightSet, versions: list[StoredVersion], what: str, size: int, began: float) -> None:
        self.has = (weights.version, weights.sha256)
        left = len(next_versions(versions, weights) or [])
        behind = f", {left} behind" if left else ""
        self.say(
            f"  version {weights.version}  {what}, {size:,} of {weights.nbytes:,} bytes, "
            f"{time.perf_counter() - began:.2f} s{behind}"
        )

    def _wait(self, error: Lost, versions: list[StoredVersion]) -> int:
        here = self.held.version if self.held else None
        following = next_versions(versions, self.held)
        behind = len(versions if following is None else following)
        self.say(f"  {behind} behind at version {here}: {error}. Waiting for the next snapshot")
        return behind


def execute(
    folder: Path,
    watch: Watch,
    *,
    engine: str,
    api_key_file: Path | None = None,
    bundle: Path | None = None,
    exchange: Path | None = None,
    once: bool = False,
) -> None:
    """Follow `folder` until interrupted, or with `once` until the engine has what is there now.

    `bundle` and `exchange` are for servers that read weights from storage. Raises IsthmusError; with `once` also if the
    newest version cannot be put together.
    """
    server = HttpEngine(engine, read_key(api_key_file), exchange=exchange)
    server.start(bundle if bundle is not None else folder)
    watch.say(f"  following {folder} for {server.server} at {engine}")
    follower = Follower(folder, server, watch.say)
    if once:
        if behind := follower.catch_up():
            raise Lost(f"{folder}: {behind} versions cannot be read; wait for the next snapshot and try again")
        return
    seen: tuple[int, int] | None = None
    while True:
        found = _changed(folder)
        if found is not None and (found != seen or follower.has is None):
            try:
                follower.catch_up()
                seen = found
            except Unreachable as error:
                follower.forget_engine()
                watch.say(f"  {error} It is asked again")
        time.sleep(POLL_S)


def _changed(folder: Path) -> tuple[int, int] | None:
    """Which `latest.json` there is; None if there is none yet."""
    try:
        facts = (folder / LATEST).stat()
    except FileNotFoundError:
        return None
    return facts.st_mtime_ns, facts.st_ino


def read_key(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        key = read_text(path).strip()
    except OSError as error:
        raise IsthmusError(f"--api-key-file {path} cannot be read: {error}") from None
    if not key or len(key.split()) != 1:
        raise IsthmusError(f"--api-key-file {path} must hold the admin key of the engine and nothing else")
    return key
