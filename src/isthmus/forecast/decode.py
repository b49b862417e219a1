"""Generation: how long a step of decoding takes, how many sequences fit, how long a batch of samples takes."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from isthmus.forecast.device import Device
from isthmus.forecast.setting import ModelShape

# Fitted to 1,037 measured decoding points of DeepSeek and Kimi on six devices (the sample of aiconfigurator-core 0.12,
# Apache-2.0; median error 20 %): shares of the peak bandwidth and of the dense peak that decoding reaches, and what
# starting a layer costs.
MEMORY_SHARE, COMPUTE_SHARE, START_MS_PER_LAYER = 0.7, 0.14, 0.12
PREFILL_SHARE = 0.25
"""Of the dense peak: SGLang 24 %, DeepSeek online 15 %, CloudMatrix384 33 % of INT8, by 2 FLOPs a parameter."""
MEMORY_FOR_CACHE = 0.9
"""Share of a device's memory that weights and cache may fill; servers keep the rest for activations."""
LENGTH_SPREAD = 1.0
"""Standard deviation of the logarithm of a completion's length. Assumed: reasoning models' thoughts."""
_SLICES = 24


@dataclass(frozen=True)
class Engine:
    """One serving engine: `devices` of a kind that hold the weights together.

    `weight_bytes` is per parameter, `cache_bytes` per token of a sequence over all layers.
    """

    model: ModelShape
    device: Device
    devices: int
    weight_bytes: float
    cache_bytes: float
    experts: float = 0.0

    @property
    def bandwidth(self) -> float:
        assert self.device.mem_bw_gbs is not None
        return self.devices * self.device.mem_bw_gbs * 1e9 * MEMORY_SHARE

    @property
    def compute(self) -> float:
        peak = self.device.narrow_peak if self.weight_bytes <= 1.0 else self.device.bf16_tflops
        assert peak is not None
        return self.devices * peak * 1e12

    def step_s(self, sequences: float, context: float) -> float:
        """Seconds of one decoding step of `sequences` that each have `context` tokens behind them."""
        reads = self._weights_read(sequences) + sequences * context * self.cache_bytes
        start = START_MS_PER_LAYER * 1e-3 * self.model.layers
        return reads / self.bandwidth + 2.0 * self.model.active * sequences / (self.compute * COMPUTE_SHARE) + start

    def prefill_s(self, tokens: float) -> float:
        """Seconds that prompts of `tokens` tokens together take."""
        return 2.0 * self.model.active * tokens / (self.compute * PREFILL_SHARE)

    def most_sequences(self, context: float) -> int:
        """Sequences of `context` tokens that fit beside the weights: the limit of admission. 0 if none does."""
        assert self.device.mem_gb is not None
        room = self.devices * self.device.mem_gb * 1e9 * MEMORY_FOR_CACHE - self.model.total * self.weight_bytes
        return max(0, int(room / (context * self.cache_bytes)))

    def _weights_read(self, sequences: float) -> float:
        """Bytes of the weights that a step reads: of the experts those that some token goes to."""
        model = self.model
        if not model.is_mixture or not self.experts:
            return model.total * self.weight_bytes
        touched = 1.0 - (1.0 - model.experts_per_token / self.experts) ** sequences
        routed = (model.total - model.active) / (1.0 - model.experts_per_token / self.experts)
        return (model.total - routed + routed * touched) * self.weight_bytes


def rollout_s(engine: Engine, samples: float, prompt: float, mean: float, longest: float) -> float:
    """Seconds until an engine has generated `samples` completions of `mean` tokens, none beyond `longest`.

    Lengths are log-normal, cut at `longest`; sequences leave as they end, so that the tail decodes almost alone. What
    does not fit beside the weights waits for a later wave.
    """
    limit = engine.most_sequences(prompt + mean)
    if limit == 0:
        return math.inf
    waves = max(1.0, samples / limit)
    together = samples / waves
    lengths = _lengths(together, mean, longest)
    seconds, done = 0.0, 0.0
    for index, length in enumerate(lengths):
        running = together * (1.0 - index / len(lengths))
        seconds += (length - done) * engine.step_s(running, prompt + (length + done) / 2.0)
        done = length
    return waves * (seconds + engine.prefill_s(together * prompt))


def _lengths(samples: float, mean: float, longest: float) -> list[float]:
    """Lengths at the middles of equal shares of the samples, and the longest of them at the end."""
    normal = statistics.NormalDist()
    middle = math.log(mean) - LENGTH_SPREAD**2 / 2.0
    shares = [(index + 0.5) / _SLICES for index in range(_SLICES - 1)] + [1.0 - 0.5 / max(samples, _SLICES)]
    return [min(longest, math.exp(middle + LENGTH_SPREAD * normal.inv_cdf(share))) for share in shares]
