"""A plain training loop of torch, of which each variant does one thing otherwise. It knows nothing of Isthmus."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

STEPS, ROWS, WIDTH, WORDS = 8, 8, 32, 40


def model_of(variant: str) -> nn.Sequential:
    torch.manual_seed(1 if variant == "weights" else 0)
    dropout = nn.Dropout(0.0 if variant in ("no-dropout", "ddp", "fsdp") else 0.1)
    layers = [nn.Linear(WIDTH, WIDTH), nn.GELU(), dropout, nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WORDS)]
    return nn.Sequential(nn.Embedding(WORDS, WIDTH), *layers)


def batches(variant: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    made = [torch.randint(0, WORDS, (ROWS, 12), generator=generator) for _ in range(STEPS)]
    if variant == "data-order":
        return made[:3] + made[3:][::-1]
    if variant == "data-position":
        return made[:3] + made[4:] + made[:1]
    if variant == "other-data":
        made[2] = made[2].clone()
        made[2][0, 0] += 1
    return made


def mine(batch: torch.Tensor) -> torch.Tensor:
    """The rows of this rank."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    return batch[rank::world]


def wrapped(model: nn.Module, variant: str) -> nn.Module:
    if variant in ("ddp", "fsdp"):
        torch.distributed.init_process_group("gloo")
    if variant == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if variant == "fsdp":
        fully_shard(model)
    return model


def loss_of(model: nn.Module, tokens: torch.Tensor, variant: str) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=variant == "precision"):
        return cross_entropy(model(tokens).flatten(0, 1).float(), tokens.roll(-1, 1).flatten())


def train(variant: str, checkpoint: Path | None = None, stop: int = STEPS) -> None:
    model = wrapped(model_of(variant), variant)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    if variant == "module":
        next(model.get_submodule("4").parameters()).register_hook(lambda gradient: gradient * 1.3)
    first = 0
    if checkpoint is not None and checkpoint.exists():
        saved = torch.load(checkpoint)
        first = saved["step"]
        model.load_state_dict(saved["model"])
        torch.set_rng_state(saved["random"])
        if variant != "moments":
            optimizer.load_state_dict(saved["optimizer"])
    for step, batch in list(enumerate(batches(variant)))[first:stop]:
        if variant == "learning-rate" and step == 4:
            optimizer.param_groups[0]["lr"] *= 1.1
        if variant == "random" and step == 3:
            torch.manual_seed(5)
        parts = 2 if variant == "accumulated" else 1
        for tokens in mine(batch).chunk(parts):
            (loss_of(model, tokens, variant) / parts).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        optimizer.step()
        optimizer.zero_grad()
    if checkpoint is not None:
        saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "random": torch.get_rng_state()}
        torch.save({**saved, "step": stop}, checkpoint)


if __name__ == "__main__":
    train(sys.argv[1], Path(sys.argv[2]) if sys.argv[2:] else None, int(sys.argv[3]) if sys.argv[3:] else STEPS)
