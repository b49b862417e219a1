"""OpenAI's /v1/completions with vLLM's extensions: prompts as token ids, token ids and log-probabilities back."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from isthmus.engines import Completion, EngineError, Sampling
from isthmus.engines.remote.dialect import Weights, WholeWeights, prompt_seeds
from isthmus.engines.remote.probe import PROBE_PROMPTS, TOP, check_logprobs
from isthmus.engines.remote.transport import Transport
from isthmus.formats.files.golden import TokenScore

CONNECTIONS = 64
SCORED_AT_ONCE = 16
_TOKEN_ID = "token_id:"


class OpenAi(WholeWeights):
    """A server that is not known by name. Its weights cannot be exchanged."""

    name = "a server with OpenAI's API"
    processed = "report log-probabilities after the temperature"

    def __init__(self, transport: Transport, model: str, release: str | None = None):
        self._transport, self._model, self.release = transport, model, release
        self.weights = Weights()

    def check(self) -> None:
        """The log-probabilities must be those of the distribution that is sampled."""
        check_logprobs(self._transport.url, self._top_logprobs, self.processed)

    def generate(self, prompts: list[list[int]], sampling: Sampling, seeds: list[int] | None) -> list[list[Completion]]:
        """One request per prompt, many at a time: a seed belongs to a request, and the server batches them."""
        own = prompt_seeds(prompts, sampling, seeds)
        with ThreadPoolExecutor(min(CONNECTIONS, len(prompts))) as pool:
            return list(pool.map(partial(self._complete, sampling), prompts, own))

    def score(self, sequences: list[list[int]]) -> list[list[TokenScore]]:
        return score_prompts(self._transport, self._model, sequences)

    def update(self, payload: bytes, version: int, sha256: str) -> None:
        raise EngineError(
            f"the server at {self._transport.url} is none whose weights isthmus can exchange; use vLLM, SGLang or "
            "isthmus for RL"
        )

    def stage(self, payload: bytes, version: int, sha256: str) -> None:
        self.update(payload, version, sha256)

    def switch(self, version: int, sha256: str | None) -> None:
        raise AssertionError("nothing was staged")

    def check_exchange(self, form: str) -> None:
        raise EngineError(
            f"the server at {self._transport.url} is none whose weights isthmus can exchange; use vLLM, SGLang "
            "or isthmus"
        )

    def in_use(self) -> str | None:
        return None

    def _complete(self, sampling: Sampling, prompt: list[int], seed: int) -> list[Completion]:
        asked = self._request(
            [prompt], sampling.max_new_tokens, sampling.temperature, n=sampling.n, seed=seed, logprobs=0
        )
        before = self.weights.version
        answer = self._transport.post("/v1/completions", asked)
        return completions_of(
            self._transport, answer, sampling.n, sampling.max_new_tokens, lambda _: (before, self.weights.version)
        )

    def _top_logprobs(self, temperature: float) -> list[dict[int, float]]:
        asked = self._request(PROBE_PROMPTS, 1, temperature, seed=0, logprobs=TOP, return_tokens_as_token_ids=True)
        answer = self._transport.post("/v1/completions", asked)
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        return [_first_top(choice) for choice in choices]

    def _request(self, prompts: list[list[int]], tokens: int, temperature: float, **more: Any) -> dict[str, Any]:
        return {
            "model": self._model,
            "prompt": prompts,
            "max_tokens": tokens,
            "temperature": temperature,
            "return_token_ids": True,
            **more,
        }


def score_prompts(transport: Transport, model: str, sequences: list[list[int]]) -> list[list[TokenScore]]:
    """The sequences as prompts, with vLLM's `prompt_logprobs`, a few at a time."""
    found: list[list[TokenScore]] = []
    for start in range(0, len(sequences), SCORED_AT_ONCE):
        batch = sequences[start : start + SCORED_AT_ONCE]
        asked = {"model": model, "prompt": batch, "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 1}
        answer = transport.post("/v1/completions", asked)
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        if len(choices) != len(batch):
            raise EngineError(f"{transport.url} gave {len(choices)} completions, {len(batch)} were asked for")
        found += [_scores(transport, choice, tokens) for choice, tokens in zip(choices, batch, strict=True)]
    return found


def _scores(transport: Transport, choice: dict[str, Any], tokens: list[int]) -> list[TokenScore]:
    """Of each token but the first. Each place lists its own token and the likeliest one, by token id."""
    places = choice.get("prompt_logprobs")
    if not isinstance(places, list) or len(places) != len(tokens):
        raise EngineError(f"{transport.url} does not score prompts: it has no prompt_logprobs, as vLLM and isthmus do")
    found = []
    for token, place in zip(tokens[1:], places[1:], strict=True):
        values = {int(name): float(entry["logprob"]) for name, entry in place.items()}
        best = max(values, key=lambda name: values[name])
        found.append(TokenScore(values[token], best, values[best]))
    return found


def completions_of(
    transport: Transport, answer: Any, count: int, limit: int, versions: Callable[[dict[str, Any]], tuple[int, int]]
) -> list[Completion]:
    """The choices of an answer in order. Raises EngineError if they are not `count` whole samples of up to `limit`
    tokens."""
    found = answer.get("choices") if isinstance(answer, dict) else None
    choices = sorted(found or [], key=lambda choice: choice["index"])
    if len(choices) != count:
        raise EngineError(f"{transport.url} gave {len(choices)} completions, {count} were asked for")
    return [_completion(transport, choice, limit, *versions(choice)) for choice in choices]


def model_id(known: str | None, transport: Transport) -> str:
    """The name of the served model."""
    return known if known is not None else transport.get("/v1/models")["data"][0]["id"]


def _completion(transport: Transport, choice: dict[str, Any], limit: int, first: int, last: int) -> Completion:
    tokens, logprobs = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
    if tokens is None or logprobs is None or len(tokens) != len(logprobs):
        raise EngineError(
            f"{transport.url} did not return token ids with their log-probabilities, which training needs; "
            "vLLM 0.10.2 or later does"
        )
    reason = finish_reason(transport, choice["finish_reason"], len(tokens), limit)
    return Completion(tokens, logprobs, reason, first, last)


def finish_reason(transport: Transport, reason: str, tokens: int, limit: int) -> str:
    """ "stop" or "length". Raises EngineError for a sample that the server gave up or cut before `limit` tokens."""
    if reason not in ("stop", "length"):
        raise EngineError(f"{transport.url} ended a sample with {reason!r}: it was not finished, so it is no sample")
    if reason == "length" and tokens < limit:
        raise EngineError(
            f"{transport.url} cut a sample after {tokens} of {limit} tokens: prompt and answer together are longer "
            "than its longest sequence"
        )
    return reason


def _first_top(choice: dict[str, Any]) -> dict[int, float]:
    """Log-probabilities of the likeliest first tokens, by token id."""
    top = ((choice.get("logprobs") or {}).get("top_logprobs") or [{}])[0]
    return {int(name.removeprefix(_TOKEN_ID)): value for name, value in top.items() if name.startswith(_TOKEN_ID)}
