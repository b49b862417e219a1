"""Our own server: one request for all prompts with a seed each, versions with each choice, weights in the request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from urllib.parse import urlencode

from isthmus.engines import Completion, EngineError, OtherBase, Routes, Sampling
from isthmus.engines.account import Account
from isthmus.engines.kept import Kept
from isthmus.engines.remote.dialect import Weights, staged_update
from isthmus.engines.remote.openai import completions_of, model_id, score_prompts
from isthmus.engines.remote.transport import Refused, Transport
from isthmus.formats.files.golden import TokenScore
from isthmus.formats.updates.wire import digest

BYTES = "application/octet-stream"


class Isthmus:
    """Reports by construction the log-probabilities of the distribution that it samples."""

    name = "isthmus"
    arithmetic: str | None = "fp32"
    takes_deltas = True
    release: str | None = None

    def __init__(self, transport: Transport, health: dict[str, Any]):
        self._transport = transport
        self._model = model_id(health.get("model"), transport)
        self.bits: str | None = health.get("bits")
        self.tells_routes = bool(health.get("records_routes"))
        self.weights = Weights(int(health.get("weight_version", 0)))
        self._again: tuple[bytes, int, str] | None = None

    def check(self) -> None:
        """Nothing to find out."""

    def generate(self, prompts: list[list[int]], sampling: Sampling, seeds: list[int] | None) -> list[list[Completion]]:
        asked = {
            "model": self._model,
            "prompt": prompts,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "n": sampling.n,
            "logprobs": 0,
            "return_token_ids": True,
            **({"return_routed_experts": True} if sampling.routes else {}),
            **({"top_p": sampling.top_p, "top_k": sampling.top_k, "min_p": sampling.min_p} if sampling.cuts else {}),
            **({"return_sampling_mask": True} if sampling.kept else {}),
            **({"seed": sampling.seed} if seeds is None else {"seeds": seeds}),
        }
        answer = self._transport.post("/v1/completions", asked)
        count = len(prompts) * sampling.n
        found = completions_of(self._transport, answer, count, sampling.max_new_tokens, _versions)
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        found = [_with_origins(one, choice) for one, choice in zip(found, choices, strict=True)]
        return [found[start : start + sampling.n] for start in range(0, len(found), sampling.n)]

    def score(self, sequences: list[list[int]]) -> list[list[TokenScore]]:
        return score_prompts(self._transport, self._model, sequences)

    def update(self, payload: bytes, version: int, sha256: str) -> None:
        """The weights travel in the body; they take over between two steps, or are refused and change nothing."""
        query = urlencode({"version": version, "sha256": sha256})
        answer = self._transport.call("POST", f"/update_weights?{query}", payload, BYTES)
        self.weights.version = int(answer["version"])

    def update_delta(self, parts: Sequence[bytes], base_version: int, version: int, sha256: str) -> float:
        """A staged update; what was sent of it is given up if a part is refused."""
        return staged_update(self, parts, base_version, version, sha256)

    def stage(self, payload: bytes, version: int, sha256: str) -> None:
        """A version that has the number of the one in use cannot be staged: it is brought at the switch."""
        self._again = None
        try:
            self._send({"version": version, "abort": "true"}, [(payload, sha256)], version)
        except Refused as error:
            if error.code != "version_in_use":
                raise
            self._again = (payload, version, sha256)

    def stage_delta(self, parts: Sequence[bytes], base_version: int, version: int) -> None:
        self._again = None
        start = {"version": version, "mode": "delta", "base_version": base_version, "abort": "true"}
        self._send(start, [(part, digest(part)) for part in parts], version)

    def switch(self, version: int, sha256: str | None) -> None:
        if self._again is not None:
            again, self._again = self._again, None
            self.update(*again)
            return
        query = urlencode({"version": version} | ({} if sha256 is None else {"sha256": sha256}))
        with self._given_up_if_refused():
            answer = self._transport.post(f"/finish_weight_update?{query}")
        self.weights.version = int(answer["version"])

    def check_exchange(self, form: str) -> None:
        """The routes for weights, the key for them, and the format."""
        url = self._transport.url
        try:
            facts = self._transport.get("/weight_info")
        except Refused as error:
            if error.status not in (401, 403, 404):
                raise
            raise EngineError(
                f"the engine at {url} does not let us change its weights ({error.status}): start it with --admin and a "
                "key in ISTHMUS_ADMIN_KEY, and name a file with that key as api_key_file of its pool"
            ) from error
        if facts["format"] != form:
            raise EngineError(f"the engine at {url} serves weights in {facts['format']}, and the step brings {form}")

    def in_use(self) -> str | None:
        facts = self._transport.get("/weight_info")
        return f"version {facts['version']} with SHA-256 {facts['sha256']}"

    def account(self) -> Account | None:
        """None without the right to ask for it."""
        try:
            return Account.of([self._transport.get("/weight_checksums")])
        except Refused as error:
            if error.status not in (401, 403, 404):
                raise
        return None

    def _send(self, start: dict[str, Any], messages: Sequence[tuple[bytes, str]], version: int) -> None:
        with self._given_up_if_refused():
            self._transport.post(f"/start_weight_update?{urlencode(start)}")
            for content, sha256 in messages:
                query = urlencode({"sha256": sha256, "version": version})
                self._transport.call("POST", f"/update_weights?{query}", content, BYTES)

    @contextmanager
    def _given_up_if_refused(self) -> Iterator[None]:
        try:
            yield
        except Refused as error:
            self._transport.post("/abort_weight_update")
            if error.code == "wrong_base":
                raise OtherBase(str(error)) from error
            raise


def _with_origins(completion: Completion, choice: dict[str, Any]) -> Completion:
    """With the version and the experts of each token, and what it was drawn among, where the server told them."""
    runs, routes = choice.get("token_versions"), choice.get("routed_experts")
    told = choice.get("sampling_mask")
    kept = None if told is None else Kept(int(told["draws"]), int(told["vocabulary"]), str(told["data"]))
    if kept is not None:
        kept.check(completion.tokens)
    return replace(
        completion,
        versions=None if runs is None else [(version, tokens) for version, tokens in runs],
        routes=None if routes is None else Routes(tuple(routes["shape"]), routes["dtype"], routes["data"]),
        kept=kept,
    )


def _versions(choice: dict[str, Any]) -> tuple[int, int]:
    first, last = choice["weight_versions"]
    return first, last
