"""An engine behind a URL: vLLM or SGLang on any chip, our own server, or anything with OpenAI's /v1/completions.

Which server answers is found out at the start; what it speaks is in the file of its name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from isthmus.engines import Completion, EngineError, Sampling
from isthmus.engines.account import Account
from isthmus.engines.remote.dialect import Dialect
from isthmus.engines.remote.isthmus import Isthmus
from isthmus.engines.remote.prepared import Prepared
from isthmus.engines.remote.recognise import recognise
from isthmus.engines.remote.transport import Transport
from isthmus.formats.files.golden import TokenScore

TIMEOUT_S = 600.0
START_WAIT_S = 60.0


class HttpEngine:
    """Speaks to one server. All of its errors are EngineErrors with the server's own words.

    `exchange` is a folder that this process writes and the server reads under the same path: servers of another make
    take new weights over HTTP only from such a folder. `start_wait_s` is how long a server may take to come up. The
    engines of a pool share one `prepared`.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        timeout_s: float = TIMEOUT_S,
        *,
        exchange: Path | None = None,
        start_wait_s: float = START_WAIT_S,
        prepared: Prepared | None = None,
    ):
        self.url, self.api_key, self.timeout_s = url, api_key, timeout_s
        self.exchange, self.start_wait_s = exchange, start_wait_s
        self._prepared = prepared or Prepared()
        self._bundle: Path | None = None
        self._dialect: Dialect | None = None

    def start(self, bundle_folder: Path) -> None:
        """Wait for the server, and find out which it is. A remote server chose its bundle itself; it is not told.

        A server of another make is asked for a few log-probabilities, and refused if they are not those of the
        distribution that it samples.
        """
        self._bundle, self._dialect = bundle_folder, None
        self._transport.wait_until_healthy(self.start_wait_s)
        with self._reading():
            dialect = self._recognised()
            dialect.check()
        self._dialect = dialect

    def generate(
        self, prompts: list[list[int]], sampling: Sampling, seeds: list[int] | None = None
    ) -> list[list[Completion]]:
        """One list of `sampling.n` completions per prompt, in order. `seeds` gives each prompt its own seed."""
        if not prompts:
            return []
        if sampling.routes and (names := self.cannot_tell_routes):
            raise EngineError(
                f"{names[0]} cannot tell the experts of its tokens, which router replay needs: set loss.router_replay "
                "= false in the step, or generate with an engine of isthmus that was started with --record-routes"
            )
        if (sampling.cuts or sampling.kept) and (names := self.cannot_tell_kept):
            raise EngineError(
                f"{names[0]} is not asked to leave tokens out and to tell which ones it kept: generate with an engine "
                "of isthmus, or set no top_p, top_k or min_p in the step"
            )
        with self._reading():
            return self._server.generate(prompts, sampling, seeds)

    def score(self, sequences: list[list[int]]) -> list[list[TokenScore]]:
        """What the model itself, at temperature 1, says of every token but the first of each sequence."""
        with self._reading():
            return self._server.score(sequences) if sequences else []

    def update(self, payload: bytes, version: int, sha256: str) -> None:
        """Swap the weights: `payload` as updates/wire.py packs it. A message that is damaged or does not fit changes
        nothing."""
        with self._reading():
            self._server.update(payload, version, sha256)

    @property
    def cannot_tell_kept(self) -> list[str]:
        """Its name and address, unless it is ours: others are not asked for the tokens that their draws kept."""
        return [] if isinstance(self._server, Isthmus) else [f"{self.server} at {self.url}"]

    @property
    def cannot_tell_routes(self) -> list[str]:
        """Its name and address, unless it is ours and notes them: others are not asked for the experts of a token."""
        told = isinstance(self._server, Isthmus) and self._server.tells_routes
        return [] if told else [f"{self.server} at {self.url}"]

    @property
    def takes_deltas(self) -> bool:
        """Whether the server takes what changed; others get all weights at every update."""
        return self._server.takes_deltas

    def update_delta(self, parts: Sequence[bytes], base_version: int, version: int, sha256: str) -> float:
        """Change the weights by the parts of a message of updates/delta.py; seconds from the last part to the end.

        Raises OtherBase if the server has other weights than those that it changes.
        """
        with self._reading():
            return self._server.update_delta(parts, base_version, version, sha256)

    def stage(self, payload: bytes, version: int, sha256: str) -> None:
        """Bring all weights of a version and check them; those in use go on until `switch`."""
        with self._reading():
            self._server.stage(payload, version, sha256)

    def stage_delta(self, parts: Sequence[bytes], base_version: int, version: int) -> None:
        """The same by what changes; raises OtherBase as `update_delta` does."""
        with self._reading():
            self._server.stage_delta(parts, base_version, version)

    def switch(self, version: int, sha256: str | None = None) -> None:
        """Use what was staged. `sha256`, if given, is `set_sha256` of the result."""
        with self._reading():
            self._server.switch(version, sha256)

    def check_exchange(self, form: str) -> None:
        """Raise EngineError if the server cannot take the weights of the bundle's model in this format."""
        with self._reading():
            self._server.check_exchange(form)

    def in_use(self) -> str | None:
        """What tells the weights in use from others, in the server's words; None where it does not tell."""
        with self._reading():
            return self._server.in_use()

    def accounts(self) -> list[tuple[str, Account]]:
        """What the server holds of the weights that it was given, with its URL; nothing where it does not tell."""
        with self._reading():
            found = self._server.account()
        return [] if found is None else [(self.url, found)]

    def probe(self, prompts: list[list[int]], sampling: Sampling) -> list[tuple[str, list[list[Completion]]]]:
        """As `generate`, with the URL."""
        return [(self.url, self.generate(prompts, sampling))]

    def answers(self, seconds: float) -> bool:
        """Whether the server says within so many seconds that it is healthy."""
        try:
            Transport(self.url, self.api_key, seconds).get("/health")
        except EngineError:
            return False
        return True

    @property
    def can_be_replaced(self) -> bool:
        """Whether one that does not answer any more can be started anew; those that others started cannot."""
        return False

    def stop(self) -> None:
        """Nothing to free: a remote server goes on without us."""

    @property
    def server(self) -> str:
        """Which server answers, with its version."""
        return f"{self._server.name} {self._server.release or 'of unknown version'}"

    @property
    def arithmetic(self) -> str | None:
        """The dtype in which the server computes, where that is known."""
        return self._server.arithmetic

    @property
    def bits(self) -> str | None:
        """What decides the last bit of what the server computes; None where that is not known, or the batch does."""
        return self._server.bits

    @property
    def version(self) -> int:
        """Version of the weights in use, as far as is known here."""
        return self._server.weights.version

    def _recognised(self) -> Dialect:
        return recognise(self._transport, self._bundle, self.exchange, self._prepared)

    @property
    def _transport(self) -> Transport:
        return Transport(self.url, self.api_key, self.timeout_s, self._explain)

    @property
    def _server(self) -> Dialect:
        if self._dialect is None:
            with self._reading():
                self._dialect = self._recognised()
        return self._dialect

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """What a server left out of an answer, or put in its place, is an error of that server."""
        try:
            yield
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise EngineError(f"the answer of the engine at {self.url} cannot be read: {error!r}") from error

    def _explain(self) -> str:
        """More about why the server does not answer, where that is known."""
        return ""
