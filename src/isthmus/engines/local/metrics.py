"""Prometheus metrics: vLLM's names where the meaning is the same, so that its dashboards work; ours say isthmus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from isthmus.engines.local.engine import Core
from isthmus.engines.local.scheduler import Finished

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self, core: Core, model_name: str):
        self.registry = CollectorRegistry()
        self._model_name = model_name
        self._gauge("vllm:num_requests_running", "Samples in a slot", lambda: core.running)
        self._gauge("vllm:num_requests_waiting", "Samples in the line", lambda: core.waiting)
        self._gauge("vllm:kv_cache_usage_perc", "Used slots; 1 is all", lambda: core.running / core.slots)
        self._gauge("isthmus:weight_version", "Version of the weights in use", lambda: core.version)
        self.prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens of answered prompts")
        self.generation_tokens = self._counter("vllm:generation_tokens", "Generated tokens")
        self.weight_updates = self._counter("isthmus:weight_updates", "Weight updates that were taken")
        self.refused_updates = self._counter("isthmus:refused_weight_updates", "Weight updates that were refused")
        self._success = Counter(
            "vllm:request_success", "Finished samples", ["model_name", "finished_reason"], registry=self.registry
        )
        self._first_token = self._histogram("vllm:time_to_first_token_seconds", "From arrival to the first token")
        self._total = self._histogram("vllm:e2e_request_latency_seconds", "From arrival to the last token")
        core.observers.append(self._finished)

    def _finished(self, sample: Finished) -> None:
        """Called from the engine's thread."""
        self._success.labels(self._model_name, sample.finish_reason).inc()
        self.generation_tokens.inc(len(sample.tokens))
        if sample.tokens:
            self._first_token.observe(sample.first_token_s)
            self._total.observe(sample.elapsed_s)

    def page(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def _gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        gauge = Gauge(name, text, ["model_name"], registry=self.registry)
        gauge.labels(self._model_name).set_function(read)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, ["model_name"], registry=self.registry).labels(self._model_name)

    def _histogram(self, name: str, text: str) -> Histogram:
        histogram = Histogram(name, text, ["model_name"], buckets=_SECONDS, registry=self.registry)
        return histogram.labels(self._model_name)
