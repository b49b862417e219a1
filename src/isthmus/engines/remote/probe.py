"""Whether a server reports the log-probabilities of the distribution that it samples.

No server says so over HTTP in normal operation, so it is measured. With logits x, the distribution at temperature T has
log p_T(i) = x_i / T - log sum_j exp(x_j / T). Between two tokens the difference at T = 2 is therefore half of that at
T = 1; a server that reports the model's own distribution gives the same difference twice. Log-probabilities are also
normalised, which logits are not: log p_2(i) - log p_1(i) / 2 = -log sum_j p_1(j)^(1/2) < 0, and 0 for logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from isthmus.engines import EngineError

PROBE_PROMPTS = [[token] * 4 for token in range(1, 9)]
TOP = 5
_TEMPERATURE = 2.0
_SMALLEST_SPREAD = 0.02
_TOLERANCE = 0.15

Tops = list[dict[int, float]]


def distance(one: Tops, other: Tops) -> float:
    """Mean absolute difference of the log-probabilities of tokens that both have."""
    shared = [(a[token], b[token]) for a, b in zip(one, other, strict=True) for token in a.keys() & b.keys()]
    return sum(abs(a - b) for a, b in shared) / len(shared) if shared else math.inf


def check_logprobs(url: str, top_logprobs: Callable[[float], Tops], remedy: str) -> None:
    """Raise EngineError unless the likeliest tokens after PROBE_PROMPTS behave as above. `top_logprobs` asks the server
    for them at a temperature, one dict by token id for each prompt."""
    widest: tuple[float, float, float] = (0.0, 0.0, 0.0)
    for plain, tempered in zip(top_logprobs(1.0), top_logprobs(_TEMPERATURE), strict=True):
        shared = sorted(plain.keys() & tempered.keys(), key=lambda token: plain[token])
        if len(shared) >= 2:
            low, high = shared[0], shared[-1]
            normaliser = tempered[high] - plain[high] / _TEMPERATURE
            widest = max(widest, (plain[high] - plain[low], tempered[high] - tempered[low], normaliser))
    spread, tempered_spread, normaliser = widest
    if spread < _SMALLEST_SPREAD:
        raise EngineError(
            f"{url} does not show whether its log-probabilities are those of the sampled distribution: it gave none of "
            "alternative tokens, or all alike"
        )
    if abs(tempered_spread / spread - 1 / _TEMPERATURE) > _TOLERANCE or normaliser > -1e-4:
        raise EngineError(
            f"{url} reports log-probabilities that are not those of the distribution it samples: two tokens "
            f"{spread:.3f} apart at temperature 1 are {tempered_spread:.3f} apart at {_TEMPERATURE:g}, "
            f"{spread / _TEMPERATURE:.3f} would be right. Training corrects with them: {remedy}"
        )
