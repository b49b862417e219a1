"""lm-eval's log-likelihoods through the API against its own `hf` backend on the same checkpoint; run it from the repository's root.

    isthmus convert CHECKPOINT bundle --format bf16
    isthmus serve bundle --allow-unsealed &
    pip install "lm_eval[api]" torch transformers        # an environment of its own
    python -m examples.clients.lm_eval.compare CHECKPOINT http://127.0.0.1:8000

It prints the largest difference, and exits with 1 if that is beyond `BOUND`.
"""

from __future__ import annotations

import os
import sys
import urllib.request
import json
from pathlib import Path

BOUND = 1e-4
TASK = "isthmus_small"


def log_likelihoods(model: str, arguments: dict[str, object]) -> dict[tuple[str, str], tuple[float, bool]]:
    """By (question, choice): the log-likelihood of the choice, and whether greedy decoding writes it."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    tasks = TaskManager(include_path=str(Path(__file__).parent), include_defaults=False)
    found = simple_evaluate(
        model=model, model_args=arguments, tasks=[TASK], task_manager=tasks, log_samples=True, bootstrap_iters=0
    )
    assert found is not None
    print(f"{model}: accuracy {found['results'][TASK]['acc,none']:.3f}")
    by_choice = {}
    for sample in found["samples"][TASK]:
        for choice, answer in zip(sample["doc"]["choices"], sample["filtered_resps"], strict=True):
            by_choice[sample["doc"]["question"], choice] = (float(answer[0]), bool(answer[1]))
    return by_choice


def main(checkpoint: str, url: str) -> int:
    with urllib.request.urlopen(f"{url}/v1/models") as answer:
        name = json.load(answer)["data"][0]["id"]
    theirs = log_likelihoods("hf", {"pretrained": checkpoint, "dtype": "float32", "device": "cpu", "batch_size": 1})
    ours = log_likelihoods(
        "local-completions",
        {"model": name, "base_url": f"{url}/v1/completions", "tokenizer": checkpoint, "tokenized_requests": True},
    )
    assert ours.keys() == theirs.keys() and len(ours) > 8
    largest = max(abs(ours[key][0] - theirs[key][0]) for key in theirs)
    greedy = sum(ours[key][1] != theirs[key][1] for key in theirs)
    print(f"{len(theirs)} log-likelihoods: largest difference {largest:.2e} nats; greedy or not differs in {greedy}")
    return int(largest > BOUND or greedy > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
