"""The weights of one engine process: what serves, what was brought beside it, and what is said of both.

Nothing here knows vLLM: `Make` is how a model of its kind is built, filled and finished.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .checksums import Piece, tensor_sum
from .layout import Unusable, read_version
from .trace import Ledger, Tracing, expected_pieces
from .transplant import Misfit, Transplant


class Make(Protocol):
    """How a model of the engine's kind comes to be."""

    def build(self) -> nn.Module:
        """A model of the same make as the serving one, without weights."""
        ...

    def load(self, model: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Let its own loaders fill it from a checkpoint's tensors."""
        ...

    def finish(self, model: nn.Module) -> None:
        """What the engine computes of loaded weights before it serves."""
        ...


@dataclass
class Staged:
    """A version on its way: `state` is pulling, ready or failed."""

    version: int | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    error: str | None = None
    thread: threading.Thread | None = None

    @property
    def state(self) -> str:
        if self.thread is not None and self.thread.is_alive():
            return "pulling"
        return "ready" if self.error is None else "failed"


@dataclass(frozen=True)
class Held:
    """What serves since the last switch.

    `pieces` of each tensor of the checkpoint were found before anything was computed of the weights; `direct` are the
    parameters in which they still can be. `sums` are the checksums of all that was made of the weights, by its path.
    """

    version: int
    ledger: Ledger
    pieces: dict[str, list[Piece]]
    direct: set[str]
    unread: list[str]
    sums: dict[str, int]
    transplant: Transplant


class Standing:
    """The weights of the model `live`. `graphs` says whether recorded graphs know its addresses."""

    def __init__(self, live: nn.Module, make: Make, *, graphs: bool):
        self.live, self.make, self.graphs = live, make, graphs
        self.staged: Staged | None = None
        self.held: Held | None = None
        self.checkpoint: dict[str, Tensor] = {}
        self.version: int | None = None

    def stage(self, source: str) -> None:
        """Begin to pull a version; what serves goes on. What was staged before is dropped."""
        staged = Staged()
        staged.thread = threading.Thread(target=self._pull, args=(staged, source), daemon=True)
        self.staged = staged
        staged.thread.start()

    def _pull(self, staged: Staged, source: str) -> None:
        try:
            staged.version, staged.tensors = read_version(source, self.version, self.checkpoint)
        except Unusable as error:
            staged.error = str(error)
        except BaseException as error:
            staged.error = repr(error)
            raise

    def drop(self) -> None:
        """Give up what was staged."""
        self.staged = None

    def switch(self) -> None:
        """Serve what was staged. Raises Unusable or Misfit if that cannot be; then the old weights serve on."""
        staged, self.staged = self.staged, None
        if staged is None or staged.thread is None:
            raise Unusable("no version was staged")
        staged.thread.join()
        if staged.error is not None or staged.version is None:
            raise Unusable(staged.error or "nothing was read")
        transplant, ledger, pieces = self._loaded(staged.tensors)
        sums = {path: tensor_sum(tensor) for path, (_, tensor) in transplant.brought().items()}
        transplant.exchange()
        try:
            _must_hold(transplant, sums)
        except BaseException:
            transplant.exchange()
            raise
        direct = _direct(ledger, pieces, {path: tensor for path, (_, tensor) in transplant.held().items()})
        unread = sorted(staged.tensors.keys() - ledger.names)
        self.held = Held(staged.version, ledger, pieces, direct, unread, sums, transplant)
        self.version, self.checkpoint = staged.version, staged.tensors
        transplant.release()

    def _loaded(self, tensors: dict[str, Tensor]) -> tuple[Transplant, Ledger, dict[str, list[Piece]]]:
        """A fresh model with these weights, found to hold what they say."""
        fresh = self.make.build()
        transplant = Transplant(self.live, fresh, graphs=self.graphs)
        transplant.begin()
        parameters = dict(fresh.named_parameters())
        whole = {name: _own(tensor) for name, tensor in tensors.items()}
        with torch.no_grad(), Tracing(whole, parameters | dict(fresh.named_buffers())) as tracing:
            self.make.load(fresh, whole.items())
        ledger = Ledger(tracing.copies)
        if empty := sorted(parameters.keys() - ledger.parameters):
            raise Misfit(f"the version has nothing for {empty[0]} of this model")
        pieces = ledger.pieces(parameters | dict(fresh.named_buffers()))
        for name, found in pieces.items():
            if found != expected_pieces(found, whole[name]):
                raise Misfit(f"{name} came out of this model's own loader as something else")
        with torch.no_grad():
            self.make.finish(fresh)
        transplant.end()
        return transplant, ledger, pieces

    def report(self) -> dict[str, Any]:
        """The version in use; what is held of every tensor of the checkpoint, with checksums that are taken now where
        its elements can be read.

        `unread` are those of which nothing could be followed into this model; `altered` those of which something is not
        what it was after the switch, or the place itself where no tensor is known for it."""
        held = self.held
        if held is None:
            return {"version": None, "tensors": {}, "unread": [], "altered": []}
        now = held.transplant.held()
        direct = held.ledger.pieces({path: now[path][1] for path in held.direct if path in now})
        pieces = held.pieces | direct
        tensors = {name: [one.shown() for one in found] for name, found in sorted(pieces.items())}
        altered = {name for name, found in direct.items() if found != held.pieces[name]}
        for path in held.sums.keys() - held.direct:
            if path not in now or tensor_sum(now[path][1]) != held.sums[path]:
                altered |= (held.ledger.of_module(now[path][0]) if path in now else set()) or {path}
        return {"version": held.version, "tensors": tensors, "unread": held.unread, "altered": sorted(altered)}

    def state(self) -> dict[str, Any]:
        """The version in use, and what is staged."""
        staged = self.staged
        found = {"version": self.version, "staged": None, "state": "none", "error": None}
        if staged is None:
            return found
        return found | {"staged": staged.version, "state": staged.state, "error": staged.error}


def _must_hold(transplant: Transplant, sums: dict[str, int]) -> None:
    """Raise Misfit unless the serving model has what the fresh one had."""
    now = transplant.held()
    for path, one in sums.items():
        if path not in now or tensor_sum(now[path][1]) != one:
            raise Misfit(f"{path} of the serving model did not take what was brought")


def _direct(ledger: Ledger, pieces: dict[str, list[Piece]], now: dict[str, Tensor]) -> set[str]:
    """The parameters that still hold the elements of the checkpoint where the loaders put them."""
    found = set()
    for parameter in ledger.parameters:
        tensor, part = now.get(parameter), ledger.part(parameter)
        if tensor is not None and part.fits(tensor):
            read = part.pieces({parameter: tensor})
            if all(one in pieces[name] for name, several in read.items() for one in several):
                found.add(parameter)
    return found


def _own(tensor: Tensor) -> Tensor:
    """Contiguous, and alone in its storage, so that the storage says which tensor it is."""
    alone = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if alone else tensor.contiguous().clone()
