"""What an engine says it holds of the weights that it was given, and what of it is wrong: the sentinel's first half.

Checksums are free of the engine's layout (vllm_plugin/checksums.py), so those of the trainer's own tensors must come
out of it. They cannot tell that an element lies where the engine's arithmetic does not look for it: for that there are
the log-probabilities of parity/engine.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from isthmus.engines.vllm_plugin.checksums import Piece, combined, tensor_sum

SHOWN = 8


@dataclass(frozen=True)
class Account:
    """Of the version in use; None if its processes hold several.

    `pieces` are those of all its processes, by the checkpoint's names. `unread` are tensors that no process could
    follow to a place of its own, `altered` what is not any more what it was when it was taken into use. `drafts`:
    another model guesses tokens, and should have been given what the main model has no place for.
    """

    version: int | None
    pieces: Mapping[str, Sequence[Piece]]
    unread: frozenset[str]
    altered: frozenset[str]
    drafts: bool

    @classmethod
    def of(cls, reports: Sequence[dict[str, Any]]) -> Account:
        """From the report of each process. Raises KeyError, TypeError or ValueError if one is none."""
        pieces: dict[str, list[Piece]] = {}
        for report in reports:
            for name, several in report["tensors"].items():
                pieces.setdefault(name, []).extend(Piece.read(one) for one in several)
        versions = {report["version"] for report in reports}
        unread = frozenset.intersection(*(frozenset(report["unread"]) for report in reports)) - pieces.keys()
        altered = frozenset(name for report in reports for name in report["altered"])
        drafts = any(report["drafts"] for report in reports)
        return cls(versions.pop() if len(versions) == 1 else None, pieces, unread, altered, drafts)


@dataclass(frozen=True)
class Findings:
    """What an account says of the tensors that were sent. `wrong` has a reason by name, `seen` counts the tensors with
    a checksum, `unseen` those that could not be compared."""

    wrong: dict[str, str]
    seen: int
    unseen: int

    @property
    def shown(self) -> str:
        """The first of what is wrong."""
        found = [f"{name} {why}" for name, why in sorted(self.wrong.items())]
        more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        return "; ".join(found[:SHOWN]) + more


class Sums:
    """Checksums of tensors that were sent, each taken once, however many engines are held against it."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.tensors = tensors
        self._known: dict[tuple[str, str], int] = {}

    def of(self, name: str, dtype: str) -> int:
        """Of a tensor as an engine holds it, in this dtype."""
        if (name, dtype) not in self._known:
            self._known[name, dtype] = tensor_sum(self.tensors[name].to(getattr(torch, dtype)))
        return self._known[name, dtype]


def compare(account: Account, version: int, tensors: Mapping[str, Tensor], sums: Sums | None = None) -> Findings:
    """Hold an account against what was sent as `version`. `sums` are of these tensors, for several accounts."""
    sums = sums or Sums(tensors)
    if account.version != version:
        held = "several versions" if account.version is None else f"version {account.version}"
        return Findings(dict.fromkeys(tensors, f"is of {held} instead of {version}"), 0, 0)
    wrong = dict.fromkeys(account.altered, "is not what it was when the engine took it into use")
    seen = unseen = 0
    for name, tensor in tensors.items():
        if name in account.unread and account.drafts:
            wrong.setdefault(name, "never followed: the model that guesses tokens was not given it")
        found = combined(account.pieces.get(name, ()), tensor.numel())
        if name not in account.pieces or found is None:
            unseen += 1
            if name not in account.pieces and name not in account.unread:
                wrong.setdefault(name, "is not among what the engine holds")
            elif name in account.pieces:
                wrong.setdefault(name, "is held in part, or in several ways")
            continue
        seen += 1
        if sums.of(name, found[0]) != found[1]:
            wrong.setdefault(name, "has other values than were sent")
    return Findings(wrong, seen, unseen)
