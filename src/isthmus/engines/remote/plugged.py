"""vLLM with our plug-in (engines/vllm_plugin), started with `--weight-transfer-config '{"backend": "isthmus"}'`.

A version is written in the shared layout, pulled and verified by the engine while it goes on generating, and switched
to while it is paused. If anything is wrong the old weights serve on.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from isthmus.engines import CannotFollow, EngineError, OtherBase
from isthmus.engines.account import Account
from isthmus.engines.remote.dialect import Exchange, staged_update
from isthmus.engines.remote.shelf import Shelf
from isthmus.engines.remote.transport import Refused, Transport
from isthmus.engines.remote.vllm import Vllm
from isthmus.engines.vllm_plugin import BACKEND
from isthmus.errors import IsthmusError
from isthmus.formats.updates.delta import WeightSet
from isthmus.formats.updates.shared_layout import version_folder, write_version

DTYPES = {"torch.float32": "fp32", "torch.bfloat16": "bf16", "torch.float16": "fp16"}
LOOK_S = 0.05
ABORT = {"update_info": {"abort": True}}


class PluggedVllm(Vllm):
    """`config` is what `/server_info` says of it."""

    name = "vLLM with the plug-in of isthmus"
    takes_deltas = True

    def __init__(
        self,
        transport: Transport,
        model: str,
        folder: str | None,
        release: str | None,
        exchange: Exchange,
        config: dict[str, Any],
    ):
        super().__init__(transport, model, folder, release, exchange)
        self.arithmetic = DTYPES.get(str((config.get("model_config") or {}).get("dtype")))
        self._shelf = Shelf(exchange.folder, transport.url)
        self._used: WeightSet | None = None
        self._brought: tuple[WeightSet, Path] | None = None

    def update_delta(self, parts: Sequence[bytes], base_version: int, version: int, sha256: str) -> float:
        return staged_update(self, parts, base_version, version, sha256)

    def stage(self, payload: bytes, version: int, sha256: str) -> None:
        with _said_as_engine_error():
            new = self._exchange.prepared.whole(payload, version, sha256)
        self._bring(None, new)

    def stage_delta(self, parts: Sequence[bytes], base_version: int, version: int) -> None:
        used, held = self._used, {state["version"] for state in self._states()}
        if used is None or used.version != base_version or held != {base_version}:
            raise OtherBase(f"the engine at {self._transport.url} has version {held}, and {base_version} is changed")
        with _said_as_engine_error():
            new = self._exchange.prepared.changed(used, parts)
        self._bring(used, new)

    def switch(self, version: int, sha256: str | None) -> None:
        assert self._brought is not None, "stage a version first"
        (new, folder), self._brought = self._brought, None
        if sha256 is not None and new.sha256 != sha256:
            raise EngineError(f"version {version} has the SHA-256 {new.sha256[:16]}..., {sha256[:16]}... was announced")
        self._control("/pause?mode=keep")
        try:
            self._finish(version)
        finally:
            # Whatever happened, the engine must not stay paused; if it cannot resume, the first error is the reason.
            with contextlib.suppress(EngineError):
                self._control("/resume")
        self._used, self.weights.version = new, version
        self._shelf.keep_only(folder)

    def check_exchange(self, form: str) -> None:
        """A model of the right kind, where its folder is here. Nothing has to be shared with it."""
        if self._exchange.folder is not None:
            super().check_exchange(form)

    def account(self) -> Account | None:
        return Account.of(self._ask_workers("report"))

    def _bring(self, base: WeightSet | None, new: WeightSet) -> None:
        shelf = self._shelf.folder

        def write() -> Path:
            return write_version(shelf, base, new, compression="zlib")

        with _said_as_engine_error():
            folder = self._exchange.prepared.written((base, new), version_folder(shelf, new.version), write)
        self._begin()
        self._control("/update_weights", {"update_info": {"source": self._shelf.source(folder)}})
        end, states = time.monotonic() + self._transport.timeout_s, self._states()
        while any(state["state"] == "pulling" for state in states):
            if time.monotonic() > end:
                raise EngineError(f"{self._transport.url} did not read version {new.version} in time")
            time.sleep(LOOK_S)
            states = self._states()
        if failed := [state["error"] for state in states if state["state"] != "ready"]:
            self._give_up()
            raise EngineError(f"{self._transport.url} does not take version {new.version}: {failed[0]}")
        self._brought = (new, folder)

    def _begin(self) -> None:
        """Open vLLM's session of an update; one that a trainer left open, which died, is closed first."""
        try:
            self._control("/start_weight_update")
        except Refused:
            self._give_up()
            self._control("/start_weight_update")

    def _give_up(self) -> None:
        """The engine answers this with an error, which is what ends the session."""
        with contextlib.suppress(Refused):
            self._control("/update_weights", ABORT)

    def _finish(self, version: int) -> None:
        try:
            self._control("/finish_weight_update", {"weight_version": str(version)})
        except Refused as error:
            self._give_up()
            if len({state["version"] for state in self._states()}) > 1:
                raise CannotFollow(f"{error} Some of its processes have version {version}: restart it") from error
            raise EngineError(f"{error} Its old weights serve on") from error
        answer = self._control("/reset_prefix_cache?reset_running_requests=true")
        if answer is not None and not answer.get("success", True):
            raise EngineError(f"{self._transport.url} has the new weights but kept its prefix cache: restart it")

    def _states(self) -> list[dict[str, Any]]:
        return self._ask_workers("state")

    def _ask_workers(self, what: str) -> list[dict[str, Any]]:
        """What each process of the engine says."""
        answer = self._control("/collective_rpc", {"method": "isthmus_weights", "kwargs": {"ask": what}})
        found = (answer or {}).get("results")
        if not found or not all(isinstance(one, dict) for one in found):
            raise EngineError(f"{self._transport.url} does not say which weights it has: {answer}")
        return found


def is_plugged(config: dict[str, Any]) -> bool:
    """Whether a vLLM of this configuration has the plug-in."""
    return (config.get("weight_transfer_config") or {}).get("backend") == BACKEND


@contextlib.contextmanager
def _said_as_engine_error():
    try:
        yield
    except (IsthmusError, OSError) as error:
        raise EngineError(f"the new weights cannot be handed over: {error}") from error
