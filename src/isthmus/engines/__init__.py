"""Engines: what generates text from a bundle. An engine lives in a process of its own and is spoken to over HTTP."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from isthmus.engines.account import Account
from isthmus.engines.kept import Kept
from isthmus.errors import IsthmusError


class EngineError(IsthmusError):
    """An engine refused a request, cannot be reached, or died; the message says which, with the engine's own words."""


class OtherBase(EngineError):
    """An engine has other weights than those that a delta changes: it needs all of them."""


class CannotFollow(EngineError):
    """An engine computes something else after an exchange of weights, which shows once: it must not be tried again."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Temperature 0 takes the likeliest token. `n` samples are drawn per prompt.

    `top_p`, `top_k` and `min_p` leave out unlikely tokens, as vLLM's do. With `routes` each sample comes with the
    experts that its tokens were sent to, with `kept` with the tokens that each draw was made among.
    """

    max_new_tokens: int
    temperature: float = 1.0
    seed: int = 0
    n: int = 1
    routes: bool = False
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    kept: bool = False

    @property
    def cuts(self) -> bool:
        """Whether tokens are left out."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0


@dataclass(frozen=True)
class Routes:
    """The experts [T - 1, R] of the T tokens of a prompt and its completion but the last, with R = layers * experts per
    token: base64 of `dtype`, uint8 or int16, little-endian."""

    shape: tuple[int, int]
    dtype: Literal["uint8", "int16"]
    data: str

    def array(self) -> NDArray[np.int16]:
        """[T - 1, R]."""
        numbers = np.frombuffer(base64.b64decode(self.data), dtype=np.dtype(self.dtype).newbyteorder("<"))
        return numbers.reshape(self.shape).astype(np.int16)


@dataclass(frozen=True)
class Completion:
    """One sample. `tokens` include the end token if the model wrote one.

    `logprobs` are those of the distribution that was sampled (at temperature 0: of the model's own distribution).
    `version` names the weights that wrote the first token; `last_version` those that wrote the last one, and differs
    if an update arrived in between. `versions` has runs (version, tokens) of it, where the engine tells them, `routes`
    the experts of each token and `kept` the tokens that each was drawn among, where they were asked for.
    """

    tokens: list[int]
    logprobs: list[float]
    finish_reason: str
    version: int
    last_version: int
    versions: list[tuple[int, int]] | None = None
    routes: Routes | None = None
    kept: Kept | None = None


class Engine(Protocol):
    """The contract of every engine. All methods raise EngineError with a reason."""

    def start(self, bundle_folder: Path) -> None:
        """Bring up an engine that serves this bundle, and return when it answers."""
        ...

    def generate(
        self, prompts: list[list[int]], sampling: Sampling, seeds: list[int] | None = None
    ) -> list[list[Completion]]:
        """One list of `sampling.n` completions per prompt, in order. `seeds` gives each prompt its own seed."""
        ...

    def update(self, payload: bytes, version: int, sha256: str) -> None:
        """Swap the weights: `payload` as updates/wire.py packs it. If this fails, the old weights go on serving."""
        ...

    @property
    def arithmetic(self) -> str | None:
        """The dtype in which the engine computes, fp32, bf16 or fp16, where that is known."""
        ...

    @property
    def bits(self) -> str | None:
        """What decides the last bit of what the engine computes, where that is known and the batch does not."""
        ...

    @property
    def cannot_tell_kept(self) -> list[str]:
        """The servers behind it that cannot leave tokens out and tell which ones they kept; none if all can."""
        ...

    @property
    def cannot_tell_routes(self) -> list[str]:
        """The servers behind it that cannot tell the experts of a token; none if all can."""
        ...

    @property
    def takes_deltas(self) -> bool:
        """Whether `update_delta` works with this engine."""
        ...

    def update_delta(self, parts: Sequence[bytes], base_version: int, version: int, sha256: str) -> float:
        """Change the weights by a message of updates/delta.py; `sha256` is `set_sha256` of the result.

        Returns the seconds that checking and taking into use took. Raises OtherBase if the engine has other weights
        than those it changes. If this fails, the old weights go on serving.
        """
        ...

    def accounts(self) -> list[tuple[str, Account]]:
        """What each engine behind this one holds of the weights that it was given, where it tells."""
        ...

    def probe(self, prompts: list[list[int]], sampling: Sampling) -> list[tuple[str, list[list[Completion]]]]:
        """As `generate`, of each engine behind this one."""
        ...

    def stop(self) -> None:
        """End the engine and free what it holds. Stopping twice is allowed."""
        ...
