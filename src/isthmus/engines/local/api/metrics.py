"""Prometheus metrics: vLLM's names, labels and buckets where the meaning is the same, so that its dashboards work.

Ours say isthmus. prometheus_client appends `_total` to the names of counters, here as in vLLM. What the server's own
canaries generate is not counted as requests.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from isthmus.engines.local.api.service import STATES, Service
from isthmus.engines.local.api.visit import Visit
from isthmus.engines.local.core.core import Core
from isthmus.engines.local.core.scheduler import Finished, Token

# The buckets of vllm/v1/metrics/loggers.py.
# fmt: off
FIRST_TOKEN_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)
TOKEN_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)
REQUEST_S = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)
# fmt: on
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
SAMPLES = (1, 2, 5, 10, 20)
_ENGINE = "0"


class Metrics:
    """The metrics of one server, in a registry of their own. Follows visits."""

    def __init__(self, service: Service, log_failed: Callable[[], bool] = lambda: False):
        self.registry = CollectorRegistry()
        self._model_name = service.identity.model
        core = service.core
        self._gauge("vllm:num_requests_running", "Samples that run", lambda: core.running)
        self._gauge("vllm:num_requests_waiting", "Samples in the line", lambda: core.waiting)
        self._gauge("vllm:kv_cache_usage_perc", "Share of the cache in use; 1 is all", lambda: core.cache_usage)
        self._gauge("isthmus:access_log_failed", "1: the access log cannot be written any more", log_failed)
        self.registry.register(_CoreCounters(core, self._model_name))
        self.prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens of answered prompts")
        self.generation_tokens = self._counter("vllm:generation_tokens", "Generated tokens")
        self._success = self._labelled("vllm:request_success", "Finished samples", "finished_reason")
        self._rejections = self._labelled("vllm:admission_rejections", "Requests that were turned away", "reason")
        lengths = _one_two_five(core.length)
        self._prompt_lengths = self._histogram("vllm:request_prompt_tokens", "Prompt tokens of a sample", lengths)
        self._lengths = self._histogram("vllm:request_generation_tokens", "Generated tokens of a sample", lengths)
        self._longest = self._histogram(
            "vllm:request_max_num_generation_tokens", "Generated tokens of the longest sample of a prompt", lengths
        )
        self._asked_samples = self._histogram("vllm:request_params_n", "Samples asked for of a prompt", SAMPLES)
        self._asked_tokens = self._histogram(
            "vllm:request_params_max_tokens", "Tokens that a sample might have had", lengths
        )
        self._computed = self._histogram(
            "vllm:request_prefill_kv_computed_tokens", "Prompt tokens that were not in the prefix cache", lengths
        )
        self._step_tokens = self._histogram("vllm:iteration_tokens_total", "Tokens of an engine step", STEP_TOKENS)
        self._first_token = self._histogram(
            "vllm:time_to_first_token_seconds", "From arrival to the first token", FIRST_TOKEN_S
        )
        self._between_tokens = self._histogram(
            "vllm:inter_token_latency_seconds",
            "Between two tokens of a streamed sample; of others the mean, once each",
            TOKEN_S,
        )
        self._per_token = self._histogram(
            "vllm:request_time_per_output_token_seconds", "Mean time between the tokens of a sample", TOKEN_S
        )
        self._queue_time = self._histogram("vllm:request_queue_time_seconds", "From arrival until it runs", REQUEST_S)
        self._prefill_time = self._histogram(
            "vllm:request_prefill_time_seconds", "From when it runs to the first token", REQUEST_S
        )
        self._decode_time = self._histogram(
            "vllm:request_decode_time_seconds", "From the first to the last token", REQUEST_S
        )
        self._run_time = self._histogram("vllm:request_inference_time_seconds", "While it runs", REQUEST_S)
        self._total = self._histogram("vllm:e2e_request_latency_seconds", "From arrival to the last token", REQUEST_S)
        self._add_own(service)
        core.steps.observers.append(self._step_tokens.observe)

    def _add_own(self, service: Service) -> None:
        core, identity = service.core, service.identity
        self._gauge("isthmus:weight_version", "Version of the weights in use", lambda: core.version)
        self.weight_updates = self._counter("isthmus:weight_updates", "Weight updates that were taken")
        self.refused_updates = self._counter("isthmus:refused_weight_updates", "Messages of updates that were refused")
        self._gauge("isthmus:unsealed", "1 if no seal vouches for the bundle", lambda: identity.seal is None)
        state = Gauge(
            "isthmus:bundle_state",
            "1 for what the bundle was when it was loaded, and who signed its seal",
            ["model_name", "engine", "state", "signer"],
            registry=self.registry,
        )
        for name in STATES:
            signer = identity.signer or "" if name == identity.state else ""
            state.labels(self._model_name, _ENGINE, name, signer).set(name == identity.state)
        self._gauge(
            "isthmus:sealed_weights", "1 while the weights in use are the sealed ones", lambda: service.is_sealed
        )
        names = ("seal", "format", "pool", "rehearsed")
        info = Gauge("isthmus:seal_info", "What is served", ["model_name", "engine", *names], registry=self.registry)
        info.labels(self._model_name, _ENGINE, *(getattr(identity, name) or "" for name in names)).set(1)
        self.canary_drift = self._plain_gauge("isthmus:canary_drift", "Largest drift of the last canary, nats")
        self.canary_drift.set(float("nan"))
        self.canary_alarm = self._plain_gauge("isthmus:canary_alarm", "1 while the last canary was beyond its bound")
        self.canary_runs = self._labelled("isthmus:canary_runs", "Canaries by what they found", "outcome")
        self.rollbacks = self._counter("isthmus:rollbacks", "Returns to the sealed bundle after a canary's alarm")
        ProcessCollector(registry=self.registry)

    def token(self, visit: Visit, token: Token) -> None:
        """Called from the engine's thread."""
        now = time.perf_counter()
        before = visit.last_token_s.get(token.choice)
        visit.last_token_s[token.choice] = now
        if before is not None:
            self._between_tokens.observe(now - before)

    def finished(self, visit: Visit, sample: Finished) -> None:
        """Called from the engine's thread."""
        self._success.labels(self._model_name, _ENGINE, sample.finish_reason).inc()
        self.generation_tokens.inc(len(sample.tokens))
        prompt, choice = divmod(sample.choice, visit.n)
        if choice == 0:
            self.prompt_tokens.inc(len(visit.prompts[prompt]))
        self._note_prompt(visit, sample, prompt)
        if not sample.tokens:
            return
        self._prompt_lengths.observe(len(visit.prompts[prompt]))
        self._lengths.observe(len(sample.tokens))
        self._asked_tokens.observe(visit.request.max_new_tokens if visit.request else len(sample.tokens))
        self._computed.observe(len(visit.prompts[prompt]) - sample.cached_tokens)
        self._queue_time.observe(sample.queued_s)
        self._prefill_time.observe(max(0.0, sample.first_token_s - sample.queued_s))
        self._decode_time.observe(max(0.0, sample.elapsed_s - sample.first_token_s))
        self._run_time.observe(max(0.0, sample.elapsed_s - sample.queued_s))
        self._first_token.observe(sample.first_token_s)
        self._total.observe(sample.elapsed_s)
        if len(sample.tokens) > 1:
            mean = (sample.elapsed_s - sample.first_token_s) / (len(sample.tokens) - 1)
            self._per_token.observe(mean)
            if not visit.stream:
                self._between_tokens.observe(mean)

    def _note_prompt(self, visit: Visit, sample: Finished, prompt: int) -> None:
        """When the last sample of a prompt has ended: the visit has the earlier ones."""
        earlier = [len(one.tokens) for one in visit.samples if one.choice // visit.n == prompt]
        if len(earlier) == visit.n - 1:
            self._longest.observe(max([len(sample.tokens), *earlier]))
            self._asked_samples.observe(visit.n)

    def rejected(self, reason: str) -> None:
        """A request was turned away by a limit."""
        self._rejections.labels(self._model_name, _ENGINE, reason).inc()

    def canary_ran(self, outcome: str) -> None:
        self.canary_runs.labels(self._model_name, _ENGINE, outcome).inc()

    def page(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def _gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        self._plain_gauge(name, text).set_function(read)

    def _plain_gauge(self, name: str, text: str) -> Gauge:
        gauge = Gauge(name, text, ["model_name", "engine"], registry=self.registry)
        return gauge.labels(self._model_name, _ENGINE)

    def _counter(self, name: str, text: str) -> Counter:
        counter = Counter(name, text, ["model_name", "engine"], registry=self.registry)
        return counter.labels(self._model_name, _ENGINE)

    def _labelled(self, name: str, text: str, label: str) -> Counter:
        return Counter(name, text, ["model_name", "engine", label], registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(name, text, ["model_name", "engine"], buckets=buckets, registry=self.registry)
        return histogram.labels(self._model_name, _ENGINE)


class _CoreCounters(Collector):
    """The counters that the core keeps itself, read when the page is asked for."""

    NAMES = {
        "vllm:prefix_cache_queries": ("prefix_queries", "Prompt tokens looked up in the prefix cache"),
        "vllm:prefix_cache_hits": ("prefix_hits", "Prompt tokens found in the prefix cache"),
        "vllm:num_preemptions": ("preemptions", "Samples that gave their cache to others and waited again"),
        "vllm:spec_decode_num_draft_tokens": ("draft_tokens", "Tokens that were drafted"),
        "vllm:spec_decode_num_accepted_tokens": ("accepted_draft_tokens", "Drafted tokens that were kept"),
        "isthmus:engine_steps": ("steps", "Steps of the engine"),
    }

    def __init__(self, core: Core, model_name: str):
        self._core, self._labels = core, [model_name, _ENGINE]

    def collect(self) -> Iterator[CounterMetricFamily]:
        for name, (counter, text) in self.NAMES.items():
            family = CounterMetricFamily(name, text, labels=["model_name", "engine"])
            family.add_metric(self._labels, getattr(self._core.counters, counter))
            yield family


def _one_two_five(largest: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50, ... up to `largest`."""
    return tuple(m * 10**e for e in range(len(str(largest))) for m in (1, 2, 5) if m * 10**e <= largest)
