"""What recording a twin costs: CPU seconds of a training step with the recorder against the same step without.

    python -m benchmarks.twin [--pairs 8] [--steps 12]

The two run in turn, in processes of their own, so that both meet the same machine.
"""

from __future__ import annotations

import argparse
import multiprocessing
import multiprocessing.queues
import statistics
import tempfile
import time

import torch
from torch import nn

from benchmarks.conditions import store
from isthmus import twin

WIDTH, LAYERS, WORDS, ROWS, LENGTH = 256, 4, 4096, 8, 128


def seconds_per_step(steps: int, folder: str | None, answer: multiprocessing.queues.SimpleQueue) -> None:
    """The median CPU seconds of a step of a small transformer with AdamW, the first two left out."""
    torch.set_num_threads(1)
    if folder is not None:
        twin.start(folder)
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, batch_first=True)
    model = nn.Sequential(nn.Embedding(WORDS, WIDTH), nn.TransformerEncoder(layer, LAYERS), nn.Linear(WIDTH, WORDS))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    taken = []
    for _ in range(steps + 2):
        began = time.process_time()
        tokens = torch.randint(0, WORDS, (ROWS, LENGTH))
        nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        taken.append(time.process_time() - began)
    answer.put(statistics.median(taken[2:]))


def measured(steps: int, folder: str | None) -> float:
    context = multiprocessing.get_context("spawn")
    answer = context.SimpleQueue()
    process = context.Process(target=seconds_per_step, args=(steps, folder, answer))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"a measured process ended with exit code {process.exitcode}")
    return answer.get()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    ratios = []
    for pair in range(options.pairs):
        with tempfile.TemporaryDirectory() as folder:
            plain = measured(options.steps, None)
            recorded = measured(options.steps, folder)
        ratios.append(recorded / plain)
        print(
            f"pair {pair + 1} of {options.pairs}: {plain:.3f} s plain, {recorded / plain:.3f} times that recorded",
            flush=True,
        )
    found = {"ratios": ratios, "median": statistics.median(ratios), "steps": options.steps}
    print(f"a recorded step takes {found['median']:.3f} times a plain one (median of {options.pairs} pairs)")
    store("twin", found)


if __name__ == "__main__":
    main()
