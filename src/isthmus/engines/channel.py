"""How versions of the weights reach an engine: deltas where the engine takes them, and full snapshots every so often.

The sender keeps the last version that the engine confirmed. A delta that the engine refuses, because it has another
version than the sender thinks or because a message was lost, is followed at once by a full snapshot, and counted.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from isthmus.engines.remote import HttpEngine
from isthmus.engines.remote.transport import Refused
from isthmus.formats.delta import encode, hashes_of
from isthmus.formats.wire import digest, hash_of_hashes, pack

Kind = Literal["delta", "full"]


@dataclass(frozen=True)
class Sent:
    """One version on its way. `sha256` is `set_sha256` of its tensors; `fallback` says why a delta was not enough."""

    version: int
    kind: Kind
    bytes: int
    full_bytes: int
    sha256: str
    encode_s: float
    send_s: float
    fallback: str | None = None


class Channel:
    """Sends versions to one engine, in order. With `deltas` False, or an engine that takes none, all are full."""

    def __init__(self, engine: HttpEngine, *, deltas: bool = True, snapshot_every: int = 50):
        self.engine, self.snapshot_every = engine, snapshot_every
        self._deltas = deltas
        self._last: dict[str, Tensor] = {}
        self._hashes: dict[str, str] = {}
        self._version, self._since_snapshot = -1, 0

    def send(self, tensors: dict[str, Tensor], version: int) -> Sent:
        """Bring the engine to this version. Raises EngineError if it does not take even a full snapshot.

        The tensors are kept until the next call; the caller must not change them.
        """
        fallback = None
        if self._deltas and self._last and self._since_snapshot < self.snapshot_every and self.engine.takes_deltas:
            try:
                return self._send_delta(tensors, version)
            except Refused as error:
                fallback = str(error)
        return self._send_full(tensors, version, fallback)

    def _send_delta(self, tensors: dict[str, Tensor], version: int) -> Sent:
        began = time.perf_counter()
        payload, hashes = encode(
            self._last, tensors, base_version=self._version, version=version, old_hashes=self._hashes
        )
        return self._push("delta", payload, hashes, tensors, version, began, None)

    def _send_full(self, tensors: dict[str, Tensor], version: int, fallback: str | None) -> Sent:
        began = time.perf_counter()
        return self._push("full", pack(tensors), hashes_of(tensors), tensors, version, began, fallback)

    def _push(
        self,
        kind: Kind,
        payload: bytes,
        hashes: dict[str, str],
        tensors: dict[str, Tensor],
        version: int,
        began: float,
        fallback: str | None,
    ) -> Sent:
        encoded = time.perf_counter()
        self.engine.update(payload, version, digest(payload))
        sent = time.perf_counter()
        self._since_snapshot = self._since_snapshot + 1 if kind == "delta" else 0
        self._last, self._hashes, self._version = tensors, hashes, version
        return Sent(
            version=version,
            kind=kind,
            bytes=len(payload),
            full_bytes=sum(tensor.nbytes for tensor in tensors.values()),
            sha256=hash_of_hashes(hashes),
            encode_s=encoded - began,
            send_s=sent - encoded,
            fallback=fallback,
        )
