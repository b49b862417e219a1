"""The exchange of weights in a running engine: in one message, or in chunks that are gathered and taken together.

Nothing of an update is visible before it is finished. What fails on the way leaves the weights in use as they are, and
`info` says what became of it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from isthmus.engines.local.api.protocol import ApiError
from isthmus.engines.local.api.service import Service, check_finite, compare_layouts, layout_of
from isthmus.engines.vllm_plugin.checksums import same_bits, whole_piece
from isthmus.errors import DamagedFile, IsthmusError
from isthmus.formats import get_format
from isthmus.formats.updates.delta import Header, WrongBase, check_base, decode, is_message, read_message
from isthmus.formats.updates.wire import digest, set_sha256, unpack
from isthmus.model.digest import tensor_sha256

Mode = Literal["full", "delta"]
IDLE_S = 600.0
LARGEST_HEADER = 128 << 20


@dataclass
class Staging:
    """An update on its way: the tensors that have arrived, and the hashes of the messages that brought them."""

    version: int
    mode: Mode
    base_version: int
    base_revision: int
    touched: float
    tensors: dict[str, Tensor] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    chunks: list[str] = field(default_factory=list)
    announced: Header | None = None
    """What the messages of elements say of the update; one may say that no tensor changed."""
    parts: set[int] = field(default_factory=set)


class WeightUpdates:
    """Everything that changes the weights of a service, one change at a time. Methods raise IsthmusError or ApiError.

    An update that hears nothing for `idle_s` seconds is given up, so that a sender that died holds no memory.
    """

    def __init__(self, service: Service, *, idle_s: float = IDLE_S, clock: Callable[[], float] = time.monotonic):
        self.service, self.idle_s = service, idle_s
        self.last: dict[str, Any] | None = None
        self._clock, self._lock = clock, threading.Lock()
        self._staging: Staging | None = None
        self._hashes: tuple[int, dict[str, str]] | None = None

    @property
    def largest_message(self) -> int:
        """Bytes beyond which no message of an update is: all weights in use, and room for a header."""
        return sum(one.numel() * one.element_size() for one in self.service.tensors.values()) + LARGEST_HEADER

    def start(
        self,
        version: int,
        mode: Mode = "full",
        *,
        base_version: int | None = None,
        format_name: str | None = None,
        abort: bool = False,
    ) -> dict[str, Any]:
        """Open a staging area for `version`. With `abort` an update that is still open is given up first.

        A delta names the version it is based on, which must be the one in use.
        """
        service = self.service
        with self._lock:
            self._expire()
            if self._staging is not None and not abort:
                raise _conflict(
                    f"an update to version {self._staging.version} is open; finish it, or start with abort=true",
                    "update_open",
                )
            if format_name is not None and format_name != service.identity.format:
                raise ApiError(f"this server has {service.identity.format} weights, not {format_name}", param="format")
            if version == service.core.version:
                raise _conflict(f"version {version} is in use; give the new weights another number", "version_in_use")
            if mode == "delta" and base_version is None:
                raise ApiError("a delta needs base_version, the version that it changes", param="base_version")
            if base_version is not None:
                self._require_base(base_version)
            self._give_up("a new update was started")
            base = service.core.version
            self._staging = Staging(version, mode, base, service.revision, self._clock())
            return self._status(self._staging)

    def add(self, payload: bytes, sha256: str, version: int | None = None) -> dict[str, Any]:
        """Take one message of the open update: whole tensors (updates/wire.py), or in a delta update what changed in
        them (updates/delta.py). The same message again changes nothing.

        A message that is damaged, or a tensor that does not fit, is refused; the update stays open for a better one.
        """
        with self._lock:
            staging = self._open(version)
            if sha256 in staging.chunks and digest(payload) == sha256:
                return self._status(staging)
            header: Header | None = None
            if is_message(payload):
                header, tensors = self._changed(staging, payload, sha256)
            else:
                tensors = unpack(payload, sha256)
            layout = self.service.layout
            known = {name: layout[name] for name in tensors if name in layout}
            compare_layouts(known, layout_of(tensors))
            check_finite(tensors)
            for name, tensor in tensors.items():
                if name in staging.tensors and not torch.equal(staging.tensors[name], tensor):
                    raise _conflict(
                        f"{name} arrived before with other values; abort this update and start again", "tensor_conflict"
                    )
            staging.tensors |= tensors
            if header is not None:
                staging.hashes |= {entry.name: entry.sha256 for entry in header.entries}
                staging.announced = staging.announced or header
                staging.parts.add(header.part)
            staging.chunks.append(sha256)
            return self._status(staging)

    def finish(self, version: int, sha256: str | None = None) -> dict[str, Any]:
        """Check what has arrived, build the model and take it into use between two steps.

        `sha256`, if given, is `set_sha256` of all weights as they will be in use. A finish that is repeated because its
        answer was lost is answered again. If tensors are missing, the update stays open; if the weights are wrong, it
        is given up.
        """
        with self._lock:
            if self._staging is None and self._was_finished(version, sha256):
                return self._taken()
            staging = self._open(version)
            if staging.base_revision != self.service.revision:
                self._give_up("the weights in use changed under it")
                raise _conflict("the weights in use changed since this update was started", "wrong_base")
            self._require_coverage(staging)
            tensors = {**self.service.tensors, **staging.tensors}
            kept = self._hashes_in_use() if staging.mode == "delta" else {}
            arrived = {name: staging.hashes.get(name) or tensor_sha256(one) for name, one in staging.tensors.items()}
            hashes = {**kept, **arrived}
            found = set_sha256(hashes)
            for wanted in (sha256, staging.announced and staging.announced.sha256):
                if wanted is not None and found != wanted:
                    self._give_up(f"its SHA-256 was {found[:16]}..., {wanted[:16]}... was announced")
                    raise DamagedFile(
                        f"the weights have the SHA-256 {found[:16]}..., {wanted[:16]}... was announced; "
                        "the update is given up and the old weights go on"
                    )
            self._take(tensors, version, found)
            self._hashes = (self.service.revision, hashes)
            return self._taken()

    def abort(self) -> dict[str, Any]:
        """Give up the open update, if there is one."""
        with self._lock:
            self._give_up("it was aborted")
            return {"version": self.service.core.version, "last_update": self.last}

    def at_once(self, payload: bytes, version: int, sha256: str) -> dict[str, Any]:
        """A whole update in one message, outside a started one."""
        with self._lock:
            self._expire()
            if self._staging is not None:
                raise _conflict(
                    f"an update to version {self._staging.version} is open; finish or abort it first", "update_open"
                )
            self._take(unpack(payload, sha256), version, sha256)
            return {"version": version, "sha256": sha256}

    def replace(self, restore: Callable[[], None], reason: str) -> None:
        """Run `restore`, which puts other weights into the service, while no update does."""
        with self._lock:
            self._give_up(reason)
            restore()
            self.last = {"version": self.service.core.version, "outcome": "restored", "reason": reason}

    def knows(self, version: int) -> bool:
        """Whether the open update is that to `version`."""
        staging = self._staging
        return staging is not None and staging.version == version

    def info(self) -> dict[str, Any]:
        """The weights in use, the open update, and what became of the last one."""
        with self._lock:
            self._expire()
            service = self.service
            return {
                "version": service.core.version,
                "sha256": service.weights_sha256,
                "format": service.identity.format,
                "tensors": len(service.layout),
                "sealed": service.is_sealed,
                "update": self._status(self._staging) if self._staging else None,
                "last_update": self.last,
            }

    def checksums(self) -> dict[str, Any]:
        """Of every stored tensor in use, taken now; and what of the model that computes is not made of them."""
        with self._lock:
            service = self.service
            model = service.core.runner.model
            again = get_format(service.identity.format).build(service.architecture, dict(service.tensors)).state_dict()
            altered = [name for name, one in model.state_dict().items() if not same_bits(one, again[name])]
            tensors = {name: [whole_piece(one).shown()] for name, one in service.tensors.items()}
            version = service.core.version
        return {"version": version, "tensors": tensors, "unread": [], "altered": altered, "drafts": False}

    def expire(self) -> None:
        """Give up an update whose sender is silent for too long."""
        with self._lock:
            self._expire()

    def _changed(self, staging: Staging, payload: bytes, sha256: str) -> tuple[Header, dict[str, Tensor]]:
        """The header of a message of elements, and its tensors. What it changes must be the weights in use."""
        if digest(payload) != sha256:
            raise DamagedFile(f"the delta that arrived does not have the SHA-256 {sha256[:16]}...; send it again")
        message = read_message(payload)
        header = message.header
        if staging.mode != "delta" or header.base_version is None:
            raise ApiError("what changed in the tensors is taken in an update with mode=delta and a base_version")
        if (header.version, header.base_version) != (staging.version, staging.base_version):
            raise _conflict(
                f"the delta leads from version {header.base_version} to {header.version}, the open update from "
                f"{staging.base_version} to {staging.version}",
                "wrong_version",
            )
        try:
            check_base(header, self.service.core.version, set_sha256(self._hashes_in_use()))
        except WrongBase as error:
            raise _conflict(str(error), "wrong_base") from None
        _check_part(header, staging)
        return header, decode(message, self.service.tensors)

    def _hashes_in_use(self) -> dict[str, str]:
        """The hash of every tensor in use, computed once for each exchange of weights."""
        revision = self.service.revision
        if self._hashes is None or self._hashes[0] != revision:
            self._hashes = (revision, {name: tensor_sha256(one) for name, one in self.service.tensors.items()})
        return self._hashes[1]

    def _take(self, tensors: dict[str, Tensor], version: int, sha256: str) -> None:
        try:
            self.service.exchange(tensors, version, sha256)
        except IsthmusError as error:
            self._staging = None
            self.last = {"version": version, "outcome": "refused", "reason": str(error)}
            raise
        self._staging = None
        self.last = {"version": version, "outcome": "finished", "reason": None}

    def _open(self, version: int | None) -> Staging:
        self._expire()
        staging = self._staging
        if staging is None:
            because = f" (the last one, to version {self.last['version']}: {self.last['outcome']})" if self.last else ""
            raise _conflict(f"no update is open{because}; begin with POST /start_weight_update", "no_update")
        if version is not None and version != staging.version:
            raise _conflict(f"the open update is to version {staging.version}, not {version}", "wrong_version")
        staging.touched = self._clock()
        return staging

    def _require_base(self, base_version: int) -> None:
        if base_version != self.service.core.version:
            raise _conflict(
                f"the update is based on version {base_version}, and version {self.service.core.version} is in use; "
                "send a full update",
                "wrong_base",
            )

    def _require_coverage(self, staging: Staging) -> None:
        missing = sorted(self.service.layout.keys() - staging.tensors.keys())
        if staging.mode == "full" and missing:
            more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
            raise _conflict(f"these tensors have not arrived: {', '.join(missing[:4])}{more}", "incomplete")
        if staging.announced is not None and len(staging.parts) < staging.announced.parts:
            lacking = next(part for part in range(staging.announced.parts) if part not in staging.parts)
            came = f"{len(staging.parts)} of {staging.announced.parts} parts have arrived"
            raise _conflict(f"{came}; part {lacking} has not", "incomplete")
        if not staging.tensors and staging.announced is None:
            raise _conflict("no tensor has arrived", "incomplete")

    def _was_finished(self, version: int, sha256: str | None) -> bool:
        last = self.last or {}
        return (
            (last.get("version"), last.get("outcome")) == (version, "finished")
            and self.service.core.version == version
            and sha256 in (None, self.service.weights_sha256)
        )

    def _taken(self) -> dict[str, Any]:
        return {"version": self.service.core.version, "sha256": self.service.weights_sha256}

    def _give_up(self, reason: str) -> None:
        if self._staging is not None:
            self.last = {"version": self._staging.version, "outcome": "abandoned", "reason": reason}
            self._staging = None

    def _expire(self) -> None:
        if self._staging is not None and self._clock() - self._staging.touched > self.idle_s:
            self._give_up(f"its sender was silent for {self.idle_s:g} s")

    def _status(self, staging: Staging) -> dict[str, Any]:
        return {
            "version": staging.version,
            "mode": staging.mode,
            "base_version": staging.base_version,
            "tensors": len(staging.tensors),
            "missing": len(self.service.layout) - len(staging.tensors) if staging.mode == "full" else 0,
            "chunks": list(staging.chunks),
        }


def _check_part(header: Header, staging: Staging) -> None:
    """Raise ApiError if a part is none, or one of another message than those before it."""
    first = staging.announced or header
    if not 0 <= header.part < header.parts:
        raise ApiError(f"the delta says that it is part {header.part} of {header.parts}")
    if (header.parts, header.sha256, header.base_sha256) != (first.parts, first.sha256, first.base_sha256):
        raise _conflict("the delta is a part of another update than the parts before it", "wrong_part")


def _conflict(message: str, code: str) -> ApiError:
    return ApiError(message, status=409, code=code)
