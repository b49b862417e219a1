"""What a pool serves: prompts and answers per second, how many sequences at once, and what a million tokens costs."""

from __future__ import annotations

from dataclasses import dataclass

from isthmus.forecast.decode import Engine
from isthmus.forecast.pace import Pool, engine_of, unknown_rates
from isthmus.forecast.work import StepWork, Work

PROMPT, ANSWER = 2048.0, 1024.0
"""Tokens of a request, where nothing is known of the requests. Assumed."""
FASTEST_TOKEN_S = 0.05
"""Seconds between two tokens of an answer that a reader is given at most: as CloudMatrix384 and DeepSeek report."""


@dataclass(frozen=True)
class Serving:
    """A pool that serves. Rates are tokens/s of the whole pool; `sequences` run at once on all of its engines.

    `token_ms` is the time between two tokens at that load; `bound` says what limits it: "memory" (the cache is full),
    "speed" (more would be slower than `FASTEST_TOKEN_S`). None where it cannot serve, and `why`.
    """

    pool: str
    chips: int
    engine_chips: int | None = None
    sequences: int | None = None
    bound: str = ""
    token_ms: float | None = None
    answer_tokens_per_s: float | None = None
    prompt_tokens_per_s: float | None = None
    cost_per_million: float | None = None
    why: str = ""


def serving_of(work: Work, pool: Pool) -> Serving:
    """What a pool serves of the last step's model, at the admission limit: as many sequences as fit and stay fast."""
    model = work.steps[-1].model
    context = min(PROMPT + ANSWER, float(model.max_position_embeddings))
    answer = context * ANSWER / (PROMPT + ANSWER)
    asked = StepWork(
        "serve", "sample", model, 1, 1.0, context, context - answer, answer, answer, format=work.serve_format
    )
    name, chips = pool.name, pool.work.count
    if (unknown := unknown_rates(pool)) is not None:
        return Serving(name, chips, why=unknown)
    engine = engine_of(asked, pool.device, chips)
    if engine is None:
        return Serving(name, chips, why=f"{chips} x {pool.device.mem_gb:g} GB do not hold weights and a cache")
    limit = engine.most_sequences(context)
    running = _admitted(engine, limit, context)
    if running == 0:
        return Serving(name, chips, engine.devices, why="one sequence alone is slower than 50 ms a token")
    engines = chips // engine.devices
    step = engine.step_s(running, context)
    # Decoding waits for the prompts of those that take the place of finished ones.
    prompts = engine.prefill_s(context - answer) / answer * running
    answers = engines * running / (step + prompts)
    price = pool.facts.price
    return Serving(
        pool=name,
        chips=chips,
        engine_chips=engine.devices,
        sequences=running * engines,
        bound="memory" if running == limit else "speed",
        token_ms=1e3 * (step + prompts),
        answer_tokens_per_s=answers,
        prompt_tokens_per_s=answers * (context - answer) / answer,
        cost_per_million=None if price is None else 1e6 * price * chips / 3600.0 / answers,
    )


def _admitted(engine: Engine, limit: int, context: float) -> int:
    """The most sequences, `limit` at most, whose tokens come within `FASTEST_TOKEN_S`, by bisection."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if engine.step_s(middle, context) <= FASTEST_TOKEN_S else (low, middle - 1)
    return low
