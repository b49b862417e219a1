"""Versions of weights on their way: who sends them keeps the last one, and what each version changes of it.

How messages travel is not known here. Each is one of updates/delta.py, or the version is sent whole.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from isthmus.formats.updates.delta import WeightSet, encode


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
    """The sender's side. A snapshot is due at the first version and at every `snapshot_every`-th after it."""

    def __init__(self, *, snapshot_every: int):
        self.snapshot_every = snapshot_every
        self.last: WeightSet | None = None
        self._published = 0

    def publish(self, version: int, tensors: dict[str, Tensor]) -> Published:
        """Take a new version. The tensors are copied: the trainer goes on changing its own."""
        before = self.last
        new = WeightSet.of(version, {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()})
        delta = encode(before, new) if before else None
        base = (before.version, before.sha256) if before else None
        published = Published(new, base, delta, self._published % self.snapshot_every == 0)
        self._published += 1
        self.last = new
        return published
