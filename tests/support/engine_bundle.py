"""A small bundle with random weights, and what the tests of engines do with it."""

from __future__ import annotations

import torch

from isthmus.data.tokenizer import END_THINK, Tokenizer
from isthmus.engines.local.core.core import Core
from isthmus.engines.local.core.scheduler import Finished, Request
from isthmus.formats.files.bundle import write_bundle
from isthmus.model.model import Model
from isthmus.recipe.architecture import DeepseekSection
from tests.support import small

TEXTS = ["Use 3, 4 and 5 to reach 23.", "3 + 4 * 5 = 23, the answer is found", "wörter: naïve café ✓ ✗"] * 3


def architecture(**changes) -> DeepseekSection:
    base = {"vocab_size": 300, "max_position_embeddings": 96, "initializer_range": 0.15}
    return small.architecture(**{**base, **changes})


def small_model(seed: int = 0, **changes) -> Model:
    return Model(architecture(**changes)).initialise(seed).eval().requires_grad_(False)


def small_tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 300)


def thinking_model(tokenizer: Tokenizer, seed: int = 0) -> Model:
    """A random model that closes its thinking often."""
    model = small_model(seed)
    end = tokenizer.encode(END_THINK)[0]
    model.lm_head.weight[end] *= 3
    return model


def write_small_bundle(folder, format_name="fp32", seed=0):
    tokenizer = small_tokenizer()
    model = thinking_model(tokenizer, seed)
    write_bundle(folder, format_name, model.state_dict(), model.architecture, tokenizer)
    return model, tokenizer


def run_core(core: Core, *requests: Request) -> None:
    """Step a core that has no thread until its requests are done."""
    for request in requests:
        core.submit(request)
    with torch.inference_mode():
        core.step()
        while core.running or core.waiting:
            core.step()


def ask(prompts, max_new_tokens, **options) -> tuple[Request, list]:
    """A request and the list that its events go to."""
    events: list = []
    return Request(prompts, events.append, max_new_tokens, **options), events


def finished(events) -> list[Finished]:
    """The ends among events, in order of choice."""
    return sorted((event for event in events if isinstance(event, Finished)), key=lambda event: event.choice)
