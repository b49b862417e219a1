"""What the hand-off needs of engines and rewards, without processes and without a trained model."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from isthmus.engines import Completion, Sampling
from isthmus.formats.files.bundle import read_bundle


class SampledHere:
    """An engine without a process: the bundle's own model, one sequence after the other."""

    kernels = "native"

    def __init__(self, folder: Path, *, log: Path, threads: int = 1, rehearse: str | None = None):
        self.bundle = read_bundle(folder)
        self.model, self.rehearsed = self.bundle.build(), rehearse is not None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def generate(self, prompts, sampling: Sampling, seeds: list[int]) -> list[list[Completion]]:
        asked = [(prompt, seed + n) for prompt, seed in zip(prompts, seeds, strict=True) for n in range(sampling.n)]
        written: dict[int, Completion] = {}
        for length in {len(prompt) for prompt, _ in asked}:
            rows = [row for row, (prompt, _) in enumerate(asked) if len(prompt) == length]
            written |= zip(rows, self.sample([asked[row] for row in rows], sampling), strict=True)
        ordered = [written[row] for row in range(len(asked))]
        return [ordered[start : start + sampling.n] for start in range(0, len(ordered), sampling.n)]

    @torch.no_grad()
    def sample(self, asked: list[tuple[list[int], int]], sampling: Sampling) -> list[Completion]:
        draws = [random.Random(seed) for _, seed in asked]
        tokens = torch.tensor([prompt for prompt, _ in asked])
        found = [Completion([], [], "length", 0, 0) for _ in asked]
        for _ in range(sampling.max_new_tokens):
            rows = (self.model(tokens)[:, -1] / sampling.temperature).log_softmax(-1)
            uniform = torch.tensor([[draw.random()] for draw in draws])
            taken = (rows.exp().cumsum(-1) < uniform).sum(-1).clamp(max=rows.shape[1] - 1)
            for one, token, row in zip(found, taken.tolist(), rows, strict=True):
                one.tokens.append(token)
                one.logprobs.append(float(row[token]))
            tokens = torch.cat((tokens, taken[:, None]), dim=1)
        return found


def odd_is_right(task: object, problem: object, completion: str) -> float:
    """A task's `accuracy` that a model without training reaches half of the time."""
    return float(len(completion) % 2)
