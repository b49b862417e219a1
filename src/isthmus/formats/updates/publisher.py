"""Versions of weights on their way: who sends remembers a few deltas, who receives applies them in order.

Neither side knows how messages travel; they may be lost, doubled or overtake each other. Each message is one of
updates/delta.py: a delta from one version to the next, or a snapshot, which needs no base.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum

from torch import Tensor

from isthmus.formats.updates.delta import PART_BYTES, Codec, Header, WeightSet, WrongBase, apply, encode, read_message

KEEP_DELTAS = 8
MAX_EARLY = 64


@dataclass(frozen=True)
class Published:
    """One version as the sender has it. `delta` is the message from the version before, in parts; None at the first.

    `snapshot_due` says that this version should go out whole, whoever has the one before.
    """

    weights: WeightSet
    base: tuple[int, str] | None
    delta: list[bytes] | None
    snapshot_due: bool


class Publisher:
    """The sender's side: holds the last version, and the deltas of the last `keep` ones.

    A snapshot is due at the first version and at every `snapshot_every`-th after it.
    """

    def __init__(
        self, *, snapshot_every: int, keep: int = KEEP_DELTAS, codec: Codec = "zstd", part_bytes: int = PART_BYTES
    ):
        self.snapshot_every, self.part_bytes = snapshot_every, part_bytes
        self.codec: Codec = codec
        self.last: WeightSet | None = None
        self._published = 0
        self._deltas: deque[Published] = deque(maxlen=keep)

    def publish(self, version: int, tensors: dict[str, Tensor]) -> Published:
        """Take a new version. The tensors are copied: the trainer goes on changing its own."""
        before = self.last
        new = WeightSet.of(version, {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()})
        delta = encode(before, new, codec=self.codec, part_bytes=self.part_bytes) if before else None
        base = (before.version, before.sha256) if before else None
        published = Published(new, base, delta, self._published % self.snapshot_every == 0)
        self._published += 1
        self.last = new
        self._deltas.append(published)
        return published

    def messages_for(self, version: int | None, sha256: str | None) -> list[bytes]:
        """What brings a receiver with these weights to the last version, in order.

        That is a snapshot if it has none, or others than the remembered deltas begin with; nothing if it is there.
        """
        if self.last is None or (version, sha256) == (self.last.version, self.last.sha256):
            return []
        steps = list(self._deltas)
        for place, step in enumerate(steps):
            if step.base == (version, sha256):
                return [part for one in steps[place:] for part in one.delta or []]
        return self.snapshot()

    def snapshot(self) -> list[bytes]:
        """The last version whole, in parts."""
        assert self.last is not None, "publish a version first"
        return encode(None, self.last, codec=self.codec, part_bytes=self.part_bytes)


class State(StrEnum):
    """Where a receiver stands. `EMPTY`: it has no weights. `GAP`: something came that its weights do not lead to."""

    EMPTY = "empty"
    CURRENT = "current"
    GAP = "gap"


@dataclass
class Receiver:
    """The receiver's side.

        EMPTY   --snapshot-->  CURRENT
        CURRENT --delta from its version-->  CURRENT
        CURRENT --delta from a later version-->  GAP  (the message is kept)
        GAP     --what was missing, or a snapshot-->  CURRENT, and on through what was kept
        any     --what it already has, or older-->  as it was

    A message that is damaged, or that changes other weights of the same number, raises and changes nothing.
    """

    weights: WeightSet | None = None
    newest: int | None = None
    _early: dict[tuple[int | None, int, str], dict[int, tuple[Header, bytes]]] = field(default_factory=dict)

    @property
    def version(self) -> int | None:
        return self.weights.version if self.weights else None

    @property
    def state(self) -> State:
        if self.weights is None:
            return State.EMPTY
        behind = self.newest is not None and self.newest > self.weights.version
        return State.GAP if behind else State.CURRENT

    @property
    def needs(self) -> str | None:
        """What must be sent for it to go on; None if nothing is known to be missing."""
        if self.weights is None:
            return "a snapshot"
        if self.state is State.CURRENT:
            return None
        return f"what follows version {self.weights.version}, up to version {self.newest}, or a snapshot"

    def receive(self, payload: bytes) -> State:
        """Take one message or part. Raises DamagedFile or WrongBase; the weights are then as before."""
        header = read_message(payload).header
        if self.weights is not None and header.version <= self.weights.version:
            return self.state
        held = self.weights
        if held and header.base_version == held.version and header.base_sha256 != held.sha256:
            raise WrongBase(
                f"the delta to version {header.version} changes another version {held.version} than the one here; "
                "send a snapshot"
            )
        self._keep(header, payload)
        self.newest = max(header.version, self.newest or 0)
        self._advance()
        return self.state

    def _keep(self, header: Header, payload: bytes) -> None:
        key = (header.base_version, header.version, header.sha256)
        self._early.setdefault(key, {})[header.part] = (header, payload)
        while sum(map(len, self._early.values())) > max(MAX_EARLY, header.parts) and len(self._early) > 1:
            furthest = max((one for one in self._early if one != key), key=lambda one: one[1])
            del self._early[furthest]

    def _advance(self) -> None:
        while (ready := self._next()) is not None:
            parts = self._early.pop(ready)
            self.weights = apply(self.weights, [payload for _, payload in parts.values()])
        if self.weights is not None:
            version = self.weights.version
            self._early = {key: parts for key, parts in self._early.items() if key[1] > version}

    def _next(self) -> tuple[int | None, int, str] | None:
        """A whole message that can be applied now, the furthest one first."""
        whole = [key for key, parts in self._early.items() if len(parts) == next(iter(parts.values()))[0].parts]
        here = self.version
        usable = [key for key in whole if key[0] in (None, here) and (here is None or key[1] > here)]
        return max(usable, key=lambda key: key[1], default=None)
