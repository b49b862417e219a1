"""The real model for the test of the gate: its own answers are its prompts, and its older version is one step away."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

from tests.support.gate_models import PROMPT_TOKENS, PROMPTS, RandomModel, one_step_earlier
from tests.support.real_model import first_layers, real_checkpoint, trained_state

ANSWERS = Path(__file__).parents[1] / "real" / "answers.jsonl"


@dataclass(frozen=True)
class RealModel(RandomModel):
    """`texts` are token ids of chats with the model."""

    texts: list[list[int]]

    def prompts(self, salt: int = 0) -> list[list[int]]:
        """Stretches of the texts, others for each salt."""
        draw = random.Random(f"stretches {self.seed} {salt}")
        chosen = draw.sample(self.texts, PROMPTS)
        starts = [draw.randrange(max(1, len(text) - PROMPT_TOKENS)) for text in chosen]
        return [text[start : start + PROMPT_TOKENS] for text, start in zip(chosen, starts, strict=True)]


def real_model(seed: int, layers: int | None, scratch: Path) -> RealModel:
    """SmolLM2-135M-Instruct, or its first layers, with prompts and an older version by `seed`."""
    folder = real_checkpoint()
    if layers is not None:
        folder = first_layers(folder, scratch, layers)
    architecture, state = trained_state(folder)
    texts = [json.loads(line)["tokens"] for line in ANSWERS.read_text().splitlines()]
    return RealModel(seed, architecture, state, one_step_earlier(state, seed), texts)
