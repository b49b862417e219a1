"""An engine behind a URL: our own, vLLM on any chip, or anything else with OpenAI's /v1/completions.

A server of another make must report the log-probabilities of the distribution it samples (vLLM:
`--logprobs-mode processed_logprobs`) and return token ids (vLLM 0.10.2 or later). It cannot take our weight updates.
"""

from __future__ import annotations

import http.client
import json
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

from isthmus.engines import Completion, EngineError, Sampling

TIMEOUT_S = 600.0


class HttpEngine:
    """Speaks to one server, with one connection per call."""

    def __init__(self, url: str, api_key: str | None = None, timeout_s: float = TIMEOUT_S):
        self.url, self.api_key, self.timeout_s = url, api_key, timeout_s
        self.model: str | None = None
        self.health: dict[str, Any] = {}
        self.version = 0

    def start(self, bundle_folder: Path) -> None:
        """Check that the server answers, and learn the name of its model. A remote server chose its bundle itself."""
        health = self._call("GET", "/health")
        self.health = health if isinstance(health, dict) else {}
        self.version = int(self.health.get("weight_version", 0))
        self.model = self._call("GET", "/v1/models")["data"][0]["id"]

    def generate(
        self, prompts: list[list[int]], sampling: Sampling, seeds: list[int] | None = None
    ) -> list[list[Completion]]:
        """One list of `sampling.n` completions per prompt, in order. `seeds` gives each prompt its own seed."""
        if not prompts:
            return []
        if seeds is not None and not self._is_isthmus:
            pairs = zip(prompts, seeds, strict=True)
            return [self._complete([prompt], sampling, {"seed": seed})[0] for prompt, seed in pairs]
        return self._complete(prompts, sampling, {"seed": sampling.seed} if seeds is None else {"seeds": seeds})

    def update(self, payload: bytes, version: int, sha256: str) -> None:
        """Swap the weights: `payload` as formats/wire.py packs it. If this fails, the old weights go on serving."""
        query = urlencode({"version": version, "sha256": sha256})
        answer = self._call("POST", f"/update_weights?{query}", payload, "application/octet-stream")
        self.version = answer["version"]

    def stop(self) -> None:
        """Nothing to free: a remote server goes on without us."""

    @property
    def _is_isthmus(self) -> bool:
        return self.health.get("engine") == "isthmus"

    def _complete(self, prompts: list[list[int]], sampling: Sampling, seed: dict[str, Any]) -> list[list[Completion]]:
        asked = {
            "model": self.model,
            "prompt": prompts,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "n": sampling.n,
            "logprobs": 0,
            "return_token_ids": True,
            **seed,
        }
        answer = self._call("POST", "/v1/completions", json.dumps(asked).encode(), "application/json")
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        if len(choices) != len(prompts) * sampling.n:
            raise EngineError(f"{self.url} gave {len(choices)} completions, {len(prompts) * sampling.n} were asked for")
        completions = [self._completion(choice) for choice in choices]
        return [completions[start : start + sampling.n] for start in range(0, len(completions), sampling.n)]

    def _completion(self, choice: dict[str, Any]) -> Completion:
        tokens, logprobs = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
        if tokens is None or logprobs is None or len(tokens) != len(logprobs):
            raise EngineError(
                f"{self.url} did not return token ids with their log-probabilities, which training needs; "
                "vLLM 0.10.2 or later does"
            )
        first, last = choice.get("weight_versions", (self.version, self.version))
        return Completion(tokens, logprobs, choice["finish_reason"], first, last)

    def _call(self, method: str, path: str, body: bytes | None = None, kind: str | None = None) -> Any:
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        if kind:
            headers["Content-Type"] = kind
        connection = self._connect()
        try:
            connection.request(method, urlsplit(self.url).path.rstrip("/") + path, body, headers)
            response = connection.getresponse()
            status, content = response.status, response.read()
        except (OSError, http.client.HTTPException) as error:
            raise EngineError(f"the engine at {self.url} does not answer ({error!r}).{self._explain()}") from error
        finally:
            connection.close()
        if status >= 300:
            raise EngineError(f"the engine at {self.url} refused {path} ({status}): {_reason(content)}")
        return json.loads(content) if content else None

    def _connect(self) -> http.client.HTTPConnection:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise EngineError(f"{self.url!r} is not the URL of an engine; write http://host:port")
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        return kind(parts.hostname, parts.port, timeout=self.timeout_s)

    def _explain(self) -> str:
        """More about why the server does not answer, where that is known."""
        return ""


def _reason(content: bytes) -> str:
    """The message of OpenAI's error object, or the beginning of whatever was sent."""
    try:
        return json.loads(content)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return content[:300].decode(errors="replace")
