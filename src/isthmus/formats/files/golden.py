"""Golden answers in a bundle: prompts with what the bundle's own model answers greedily, for a server to check itself.

They lie in golden.json, which the seal covers and which other engines do not read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from isthmus.errors import DamagedFile
from isthmus.formats import get_format
from isthmus.formats.files.bundle import CHECKSUMS, Bundle, file_hashes
from isthmus.model.model import Model
from isthmus.run import write_atomic

GOLDEN = "golden.json"
PROMPTS, TOKENS = 8, 16
WHOLE_BYTES = 1 << 30
"""Weights in fp32 up to which a model is built whole, which is faster than making it anew for every token."""


class TokenScore(NamedTuple):
    """What a model, whatever computes it, says of a given token: its log-probability, and the likeliest token's."""

    logprob: float
    best: int
    best_logprob: float


class GoldenAnswer(BaseModel):
    """The likeliest continuation of a prompt, token by token.

    `logprobs` are the model's log-probabilities of its tokens, `margins` by how many nats each was preferred to the
    next: where a margin is small, other numerics may choose the other token.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    margins: list[float]

    @model_validator(mode="after")
    def _complete(self) -> GoldenAnswer:
        if not self.prompt or not len(self.tokens) == len(self.logprobs) == len(self.margins) > 0:
            raise ValueError("a prompt and as many logprobs and margins as tokens are needed")
        return self


class Golden(BaseModel):
    """The content of golden.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: str
    answers: list[GoldenAnswer]


def make_golden(bundle: Bundle, prompts: list[list[int]], ends: Collection[int]) -> Golden:
    """Answer up to PROMPTS prompts with up to TOKENS tokens each by the bundle's model, every step from scratch.

    An answer ends after one of `ends`. A model of more than WHOLE_BYTES is in memory piece by piece.
    """
    shapes = [shape for _, shape in get_format(bundle.format).layout(bundle.architecture).values()]
    model = bundle.build() if 4 * sum(map(math.prod, shapes)) <= WHOLE_BYTES else bundle.stream()
    room = bundle.architecture.max_position_embeddings
    chosen = [prompt for prompt in prompts if 0 < len(prompt) < room][:PROMPTS]
    found: list[tuple[list[int], list[float], list[float]]] = [([], [], []) for _ in chosen]
    for _ in range(TOKENS):
        rows = [
            row
            for row, (prompt, (tokens, *_)) in enumerate(zip(chosen, found, strict=True))
            if not (tokens and tokens[-1] in ends) and len(prompt) + len(tokens) < room
        ]
        if not rows:
            break
        for row, logprobs in zip(rows, _next([chosen[row] + found[row][0] for row in rows], model), strict=True):
            (first, second), (token, _) = logprobs.topk(2)
            for values, value in zip(found[row], (int(token), float(first), float(first - second)), strict=True):
                values.append(value)  # pyright: ignore[reportArgumentType]
    answers = [
        GoldenAnswer(prompt=prompt, tokens=tokens, logprobs=logprobs, margins=margins)
        for prompt, (tokens, logprobs, margins) in zip(chosen, found, strict=True)
        if tokens
    ]
    return Golden(format=bundle.format, answers=answers)


def write_golden(folder: Path, golden: Golden) -> None:
    """Put golden answers into a bundle that is not sealed yet, and their hash into its checksums."""
    write_atomic(folder / GOLDEN, golden.model_dump_json().encode() + b"\n")
    hashes = json.dumps(file_hashes(folder), sort_keys=True, indent=2)
    write_atomic(folder / CHECKSUMS, hashes.encode() + b"\n")


def read_golden(folder: Path) -> Golden | None:
    """The golden answers of a bundle, None if it has none. Raises DamagedFile if they cannot be read."""
    path = folder / GOLDEN
    if not path.is_file():
        return None
    try:
        return Golden.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise DamagedFile(f"{path} cannot be read: {error}") from None


def _next(sequences: list[list[int]], model: Model) -> torch.Tensor:
    """Log-probabilities [B, V] of what follows each sequence. Padding stands behind, where no token looks."""
    longest = max(map(len, sequences))
    padded = torch.tensor([sequence + [0] * (longest - len(sequence)) for sequence in sequences])
    last = torch.tensor([len(sequence) - 1 for sequence in sequences])
    with torch.inference_mode():
        hidden = model.hidden(padded)[torch.arange(len(sequences)), last]
        return model.logits(hidden).float().log_softmax(-1)
