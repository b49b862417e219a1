"""transformers.generate as a contestant. Lines on standard input and output are those of worker.py.

    python benchmarks/rivals/transformers_worker.py BUNDLE THREADS

It has no continuous batching in `generate`: whatever waits when it is free becomes one batch.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList
from worker import serve

BATCH = 32


class Watch(StoppingCriteria):
    """Notes when the first token is there; never stops."""

    def __init__(self) -> None:
        self.first: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.first = self.first or time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Transformers:
    def __init__(self, folder: str, threads: int):
        torch.set_num_threads(threads)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def run(self, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        began = time.perf_counter()
        answers: list[dict[str, Any]] = [{} for _ in requests]
        waiting = sorted(range(len(requests)), key=lambda number: requests[number]["at"])
        while waiting:
            time.sleep(max(0.0, began + requests[waiting[0]]["at"] - time.perf_counter()))
            now = time.perf_counter() - began
            batch = [number for number in waiting[:BATCH] if requests[number]["at"] <= now]
            waiting = waiting[len(batch) :]
            watch = Watch()
            tokens = self.generate([requests[number] for number in batch], watch)
            end = time.perf_counter() - began
            assert watch.first is not None
            for number, row in zip(batch, tokens, strict=True):
                answers[number] = {"tokens": row, "first": watch.first - began, "end": end}
        return answers

    def generate(self, requests: list[dict[str, Any]], watch: Watch) -> list[list[int]]:
        """All prompts, and all answers, have one length in these measurements."""
        prompts = torch.tensor([request["prompt"] for request in requests])
        count = requests[0]["new_tokens"]
        with torch.inference_mode():
            found = self.model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=False,
                min_new_tokens=count,
                max_new_tokens=count,
                pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([watch]),
            )
        return found[:, prompts.shape[1] :].tolist()


if __name__ == "__main__":
    serve(Transformers(sys.argv[1], int(sys.argv[2])).run)
