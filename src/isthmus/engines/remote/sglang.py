"""SGLang, read in 0.5.23.

`/generate` takes token ids and a list of sampling options, one per sample. `meta_info.output_token_logprobs` holds
`[logprob, token id, text]`, after the temperature unless the server runs with SGLANG_RETURN_ORIGINAL_LOGPROB. Seeds
are honoured with `--enable-deterministic-inference` alone. `meta_info.weight_version` is the version at the end of a
sample, `weight_versions` the spans `{version, start, end}` of its tokens. `logprob_start_len` 0 scores the
prompt too: `input_token_logprobs` and `input_top_logprobs`, with nothing for its first token.

Weights: `/update_weights_from_disk` reads a folder that the server sees. It waits for running requests to end, drops
the prefix cache and sets the version. Where loading fails, 0.5.23 takes its own way back from the path of the *new*
weights, so the last good folder is asked for again from here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from isthmus.engines import Completion, EngineError, Sampling
from isthmus.engines.remote.dialect import Exchange, Weights, WholeWeights, prompt_seeds, spread_seed
from isthmus.engines.remote.openai import finish_reason
from isthmus.engines.remote.probe import PROBE_PROMPTS, TOP, check_logprobs
from isthmus.engines.remote.transport import Refused, Transport
from isthmus.formats.files.golden import TokenScore


class SgLang(WholeWeights):
    """`facts` is what `/server_info` said."""

    name = "SGLang"

    def __init__(self, transport: Transport, facts: dict[str, Any], exchange: Exchange):
        self._transport, self._facts, self._exchange = transport, facts, exchange
        self.release: str | None = facts.get("version")
        self.weights = Weights()
        self._staged: Path | None = None
        model = self._model_info()
        self._served = model.get("model_path")
        self.weights.told(model.get("weight_version"))

    def check(self) -> None:
        """Seeds must be honoured, and the log-probabilities be those of the distribution that is sampled."""
        if not self._facts.get("enable_deterministic_inference"):
            raise EngineError(
                f"the SGLang server at {self._transport.url} ignores seeds: start it with "
                "--enable-deterministic-inference"
            )
        remedy = "start SGLang without SGLANG_RETURN_ORIGINAL_LOGPROB in its environment"
        check_logprobs(self._transport.url, self._top_logprobs, remedy)

    def generate(self, prompts: list[list[int]], sampling: Sampling, seeds: list[int] | None) -> list[list[Completion]]:
        """One request. Each sample is an entry with its own seed: SGLang would give all `n` of one entry the same."""
        options = [
            self._options(sampling.max_new_tokens, sampling.temperature, spread_seed(seed, choice))
            for seed in prompt_seeds(prompts, sampling, seeds)
            for choice in range(sampling.n)
        ]
        before = self.weights.version
        asked = [prompt for prompt in prompts for _ in range(sampling.n)]
        answers = self._generate(asked, options)
        found = [self._completion(answer, sampling.max_new_tokens, before) for answer in answers]
        return [found[start : start + sampling.n] for start in range(0, len(found), sampling.n)]

    def score(self, sequences: list[list[int]]) -> list[list[TokenScore]]:
        options = [self._options(1, 1.0, 0)] * len(sequences)
        answers = self._generate(sequences, options, logprob_start_len=0, top_logprobs_num=1)
        return [self._scores(answer["meta_info"], tokens) for answer, tokens in zip(answers, sequences, strict=True)]

    def update(self, payload: bytes, version: int, sha256: str) -> None:
        self.stage(payload, version, sha256)
        self.switch(version, None)

    def stage(self, payload: bytes, version: int, sha256: str) -> None:
        self._staged = self._exchange.write(payload, version, sha256)

    def switch(self, version: int, sha256: str | None) -> None:
        assert self._staged is not None, "stage a version first"
        folder, self._staged = self._staged, None
        try:
            self._load(str(folder), str(version))
        except EngineError as error:
            raise self._go_back(error) from error
        self.weights.version, self._served = version, str(folder)
        self._exchange.keep_only(folder)

    def check_exchange(self, form: str) -> None:
        self._exchange.check(self._transport.url, self._served)

    def in_use(self) -> str | None:
        return self._model_info().get("weight_version")

    def _load(self, folder: str, version: str) -> None:
        ask = {"model_path": folder, "weight_version": version, "flush_cache": True}
        answer = self._transport.post("/update_weights_from_disk", ask)
        if not answer.get("success"):
            raise EngineError(f"{self._transport.url} did not take the new weights: {answer.get('message')}")

    def _go_back(self, error: EngineError) -> EngineError:
        """Ask for the last good weights again, and say what became of it."""
        if self._served is None:
            return EngineError(f"{error} Which weights it served before is not known: restart it")
        try:
            self._load(self._served, str(self.weights.version))
        except EngineError as again:
            return EngineError(f"{error} Going back to {self._served} failed too: {again} Restart it")
        return EngineError(f"{error} The weights of {self._served} serve again")

    def _generate(self, prompts: list[list[int]], options: list[dict[str, Any]], **more: Any) -> list[dict[str, Any]]:
        ask = {"input_ids": prompts, "sampling_params": options, "return_logprob": True, **more}
        answers = self._transport.post("/generate", ask)
        if not isinstance(answers, list) or len(answers) != len(prompts):
            raise EngineError(f"{self._transport.url} did not give one completion for each of {len(prompts)} prompts")
        return answers

    def _completion(self, answer: dict[str, Any], limit: int, before: int) -> Completion:
        facts = answer["meta_info"]
        scored = facts.get("output_token_logprobs")
        if scored is None:
            raise EngineError(f"{self._transport.url} did not return log-probabilities, which training needs")
        reason = finish_reason(self._transport, facts["finish_reason"]["type"], len(scored), limit)
        first, last = self._versions(facts, before)
        return Completion([step[1] for step in scored], [step[0] for step in scored], reason, first, last)

    def _scores(self, facts: dict[str, Any], tokens: list[int]) -> list[TokenScore]:
        own, tops = facts.get("input_token_logprobs") or [], facts.get("input_top_logprobs") or []
        if [step[1] for step in own] != tokens or len(tops) != len(tokens):
            raise EngineError(f"{self._transport.url} did not return the log-probabilities of its prompt")
        pairs = zip(own[1:], tops[1:], strict=True)
        return [TokenScore(step[0], top[0][1], top[0][0]) for step, top in pairs]

    def _versions(self, facts: dict[str, Any], before: int) -> tuple[int, int]:
        spans = facts.get("weight_versions")
        if spans:
            return Weights(before).told(spans[0]["version"]), self.weights.told(spans[-1]["version"])
        return before, self.weights.told(facts.get("weight_version"))

    def _top_logprobs(self, temperature: float) -> list[dict[int, float]]:
        options = [self._options(1, temperature, 0)] * len(PROBE_PROMPTS)
        answers = self._generate(PROBE_PROMPTS, options, top_logprobs_num=TOP)
        tops = [answer["meta_info"]["output_top_logprobs"][0] for answer in answers]
        return [{token: value for value, token, *_ in top} for top in tops]

    def _options(self, tokens: int, temperature: float, seed: int) -> dict[str, Any]:
        return {"max_new_tokens": tokens, "temperature": temperature, "sampling_seed": seed}

    def _model_info(self) -> dict[str, Any]:
        """`/model_info`, which older releases have under another name."""
        try:
            return self._transport.get("/model_info")
        except Refused as error:
            if error.status != 404:
                raise
        return self._transport.get("/get_model_info")
