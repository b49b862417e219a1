"""What a format costs: how far its exact emulator is from the trained model, on golden sequences.

It is measured where both models are, by `isthmus capture`, and travels in the bundle. It is no property of a chip.
"""

from __future__ import annotations

import math

from pydantic import BaseModel, ConfigDict

from isthmus.model.model import Model
from isthmus.parity.gate import COST, at_most, finite, reach
from isthmus.parity.tokens import GoldenSequence, TokenParity, compare_tokens
from isthmus.records import Check
from isthmus.run import Figure

UNIT = "nats/token"


class FormatCost(BaseModel):
    """KL(trained || emulator) in nats per completion token, its mean with its interval at 95 % over the sequences.

    `top1` is the share of tokens with the trained model's first choice. A perplexity is exp of the mean negative
    log-probability of the completion tokens. `sequences` counts distinct ones.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    kl: float
    kl_interval: tuple[float, float] | None
    top1: float
    trained_perplexity: float
    perplexity: float
    tokens: int
    sequences: int

    def __str__(self) -> str:
        return (
            f"top-1 {self.top1:.2%}, perplexity {self.trained_perplexity:.4g} as trained and {self.perplexity:.4g} "
            f"in the format, {self.tokens} tokens of {self.sequences} sequences"
        )


def measure_cost(trained: Model, emulator: Model, sequences: list[GoldenSequence]) -> tuple[FormatCost, TokenParity]:
    """The cost, and the comparison that it is of: trained model and emulator on the completion tokens."""
    found = compare_tokens(trained, emulator, sequences)
    return cost_of(found), found


def cost_of(found: TokenParity) -> FormatCost:
    """What a comparison of the trained model with the emulator says."""
    trained, emulated = (math.exp(min(-part, 700.0)) for part in found.logprobs.mean(-1).tolist())
    return FormatCost(
        kl=found.mean_kl,
        kl_interval=found.kl_interval,
        top1=found.top1_agreement,
        trained_perplexity=trained,
        perplexity=emulated,
        tokens=found.tokens,
        sequences=found.distinct,
    )


def check_cost(cost: FormatCost, format_name: str, origin: str, limit: Figure, confidence: float) -> Check:
    """Whether the cost that a bundle tells is within the limit."""
    assert limit.value is not None
    interval = reach(cost.kl, cost.kl_interval, cost.sequences, confidence)
    source = f"trained model against the exact emulator of {format_name}, golden sequences: {origin}"
    return Check(
        layer="tokens",
        name=COST,
        outcome=at_most(limit.value, cost.kl, interval, samples=cost.sequences),
        figure=finite(cost.kl, UNIT, source, rehearsed=False, interval=cost.kl_interval),
        limit=limit,
        detail=str(cost),
    )
