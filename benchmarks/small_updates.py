"""What bf16 makes of small updates of a real model: the share that is undone, and what it costs.

    python -m benchmarks.small_updates [--rates 1e-6 1e-5] [--steps N]

SmolLM2-135M-Instruct (tests/support/real_model.py), whose weights are bf16, is trained in fp32 as reinforcement does:
AdamW, one of its own answers at a step (tests/real/answers.jsonl, the first half), praised and blamed in turn.
Then the masters are rounded to the nearest and at random, and KL(masters || rounded) is measured on the other half,
beside KL(masters || start): what is lost if nothing of the training arrives.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.conditions import store
from benchmarks.real_formats import Chat, chats, compare, log_probabilities, trained_model
from isthmus.formats import get_format
from isthmus.formats.parts.stochastic import round_stochastically
from isthmus.model.model import Model
from isthmus.parity.undone import measure_updates
from tests.support.real_model import real_checkpoint

BETAS = (0.9, 0.95)


def train(model: Model, asked: list[Chat], rate: float, steps: int) -> None:
    """In place: each step raises or lowers the likelihood of one answer."""
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=BETAS, weight_decay=0.0)
    for step in range(steps):
        tokens = torch.tensor([asked[step % len(asked)].tokens])
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits[0], tokens[0, 1:]) * (1.0 if step % 2 == 0 else -1.0)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.requires_grad_(False)


def with_weights(model: Model, state: Mapping[str, Tensor]) -> Model:
    fp32 = get_format("fp32")
    wide = {name: tensor.float() for name, tensor in state.items()}
    return fp32.build(model.architecture, fp32.export(wide, model.architecture))


def measure(rate: float, steps: int) -> dict[str, Any]:
    asked = chats()
    half = len(asked) // 2
    model = trained_model(real_checkpoint())
    start = {name: tensor.detach().bfloat16() for name, tensor in model.state_dict().items()}
    train(model, asked[:half], rate, steps)
    masters = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    reference = [log_probabilities(model, chat) for chat in asked[half:]]
    candidates = {
        "start": start,
        "nearest": {name: tensor.bfloat16() for name, tensor in masters.items()},
        "stochastic": {name: round_stochastically(tensor, 0, name) for name, tensor in masters.items()},
    }
    found: dict[str, Any] = {}
    for name, state in candidates.items():
        updates = measure_updates(start, masters, state)
        found[name] = {"undone": updates.share, **compare(reference, with_weights(model, state), asked[half:])}
        found["changed"] = updates.changed / max(updates.elements, 1)
        print(f"rate {rate:g}  {name:10} undone {updates.share:6.1%}  KL {found[name]['kl']:.3g}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rates", nargs="*", type=float, default=[1e-6, 1e-5])
    parser.add_argument("--steps", type=int, default=24)
    options = parser.parse_args()
    rates = {f"{rate:g}": measure(rate, options.steps) for rate in options.rates}
    store("small_updates", {"steps": options.steps, "rates": rates})


if __name__ == "__main__":
    main()
