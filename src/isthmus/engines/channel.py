"""What brings each version of the weights to one engine: a delta where it has the version before, else all of them.

Which of the two it was is never left open: `Sent.kind` says it, and a delta that had to be replaced is told.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from isthmus.engines import Engine, OtherBase
from isthmus.formats.updates.delta import WeightSet
from isthmus.formats.updates.publisher import Published, Publisher
from isthmus.formats.updates.shared_layout import SharedWriter
from isthmus.formats.updates.version_folder import VersionWriter
from isthmus.formats.updates.wire import digest, pack

Kind = Literal["full", "snapshot", "delta", "fallback"]
"""`full`: deltas are off, or the engine takes none. `snapshot`: one was due. `fallback`: the engine refused a delta."""


@dataclass(frozen=True)
class Sent:
    """One version on its way. `sha256` is `set_sha256` of its tensors. Bytes, and seconds.

    `apply_s` is what the engine took for a delta from its last part to its use; in other kinds it is part of `send_s`.
    """

    version: int
    sha256: str
    kind: Kind
    sent_bytes: int
    full_bytes: int
    encode_s: float
    send_s: float
    apply_s: float | None

    def shown(self) -> dict[str, Any]:
        """For an event."""
        return {
            "update_kind": self.kind,
            "update_bytes": self.sent_bytes,
            "update_full_bytes": self.full_bytes,
            "update_ratio": round(self.sent_bytes / self.full_bytes, 5),
            "update_encode_s": round(self.encode_s, 4),
            "update_send_s": round(self.send_s, 4),
            "update_apply_s": None if self.apply_s is None else round(self.apply_s, 4),
        }


class Channel:
    """To one engine. With `deltas` off every version is sent whole. `folder` receives the same versions."""

    def __init__(
        self,
        engine: Engine,
        *,
        deltas: bool,
        snapshot_every: int,
        folder: VersionWriter | SharedWriter | None = None,
        tell: Callable[..., None],
    ):
        self.engine, self.deltas, self.folder, self.tell = engine, deltas, folder, tell
        self.fallbacks = 0
        self._publisher = Publisher(snapshot_every=snapshot_every)
        self._has: tuple[int, str] | None = None
        self._uses_deltas = deltas and engine.takes_deltas
        if deltas and not engine.takes_deltas:
            tell("fallback", what="full weights at every update", why="this engine takes no deltas")

    def send(self, version: int, tensors: dict[str, Tensor]) -> Sent:
        """Bring a version to the engine, and into the folder. Raises EngineError if the engine takes neither form."""
        began = time.perf_counter()
        published = self._publish(version, tensors)
        encoded = time.perf_counter() - began
        sent = self._send(published, encoded)
        self._has = (version, published.weights.sha256)
        if self.folder is not None:
            self.folder.write(published)
        return sent

    def send_whole(self, kind: Kind = "snapshot") -> Sent:
        """Send the last version again, all of it."""
        assert self._publisher.last is not None, "send a version first"
        return self._whole(self._publisher.last, kind, 0.0)

    def take_up(self, engine: Engine) -> None:
        """Bring the last version, all of it, to an engine that takes the place of another. Raises EngineError."""
        self._has, self._uses_deltas = None, self.deltas and engine.takes_deltas
        if (last := self._publisher.last) is not None:
            payload = pack(last.tensors)
            engine.update(payload, last.version, digest(payload))
            self._has = (last.version, last.sha256)

    def _publish(self, version: int, tensors: dict[str, Tensor]) -> Published:
        if self._uses_deltas or (self.deltas and self.folder is not None):
            return self._publisher.publish(version, tensors)
        self._publisher.last = WeightSet.of(version, dict(tensors))
        return Published(self._publisher.last, None, None, True)

    def _send(self, published: Published, encode_s: float) -> Sent:
        delta, base, weights = published.delta, published.base, published.weights
        if not self._uses_deltas:
            return self._whole(weights, "full", encode_s)
        if delta is None or base is None or published.snapshot_due or base != self._has:
            return self._whole(weights, "snapshot", encode_s)
        began = time.perf_counter()
        try:
            applied = self.engine.update_delta(delta, base[0], weights.version, weights.sha256)
        except OtherBase as error:
            self.fallbacks += 1
            self.tell("fallback", what=f"all weights of version {weights.version} instead of a delta", why=str(error))
            return self._whole(weights, "fallback", encode_s)
        size, seconds = sum(map(len, delta)), time.perf_counter() - began
        return Sent(
            weights.version, weights.sha256, "delta", size, weights.nbytes, encode_s, seconds - applied, applied
        )

    def _whole(self, weights: WeightSet, kind: Kind, encode_s: float) -> Sent:
        began = time.perf_counter()
        payload = pack(weights.tensors)
        sha256 = digest(payload)
        packed = time.perf_counter()
        self.engine.update(payload, weights.version, sha256)
        seconds = time.perf_counter() - packed
        encode_s += packed - began
        return Sent(weights.version, weights.sha256, kind, len(payload), weights.nbytes, encode_s, seconds, None)


def writer(folder: Path | None, format_name: str, layout: str) -> VersionWriter | SharedWriter | None:
    """The folder that a recipe names, if it does, in one of its layouts."""
    if folder is None:
        return None
    return SharedWriter(folder) if layout == "shared" else VersionWriter(folder, format_name)
