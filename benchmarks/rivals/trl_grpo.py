"""TRL's GRPOTrainer, one step on each request. Lines on standard input and output are those of steps.py.

    python benchmarks/rivals/trl_grpo.py CHECKPOINT PROMPTS.jsonl OPTIONS.json    # in an environment that has TRL 1.16

It generates with transformers, as TRL does where no vLLM is: then the weights cross to nobody. A line of PROMPTS has
the `text` of a prompt, and `tokens`, which its tokenizer must make of it. OPTIONS are those of `benchmarks.grpo`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from steps import OnRequest, early_letters
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

STEPS = 10_000
SCORED = "_generate_and_score_completions"
"""The trainer's method that makes samples and their advantages."""


class Gate(TrainerCallback):
    def __init__(self, requests: OnRequest):
        self.requests = requests

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.requests.before_step()


def reward(completions: list[str], **_: Any) -> list[float]:
    return [early_letters(completion) for completion in completions]


def config(options: dict[str, Any], folder: Path) -> GRPOConfig:
    return GRPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=options["prompts"] * options["samples"],
        num_generations=options["samples"],
        max_completion_length=options["limit"],
        temperature=1.0,
        top_k=0,
        beta=0.0,
        loss_type="grpo",
        learning_rate=options["learning_rate"],
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        gradient_checkpointing=False,
        max_steps=STEPS,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=options["seed"],
    )


def main() -> None:
    checkpoint, prompts, options = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(Path(sys.argv[3]).read_text())
    torch.set_num_threads(options["threads"])
    requests = OnRequest()
    words = AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    for row in rows:
        assert words(row["text"], add_special_tokens=False)["input_ids"] == row["tokens"], "another tokenizer"
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=config(options, prompts.parent),
        train_dataset=Dataset.from_list([{"prompt": row["text"]} for row in rows]),
        processing_class=words,
        callbacks=[Gate(requests)],
    )
    observe(trainer, requests)
    print(f"trl {trl.__version__}", file=sys.stderr)
    trainer.train()


def observe(trainer: Any, requests: OnRequest) -> None:
    """Time the parts of a step, and tell how long its samples were."""
    watch = requests.watch
    watch.wrap(trainer, "_generate", "rollout")
    watch.wrap(trainer, "_calculate_rewards", "rewards")
    watch.wrap(trainer, "_get_per_token_logps_and_entropies", "log-probabilities")
    watch.wrap(trainer, "training_step", "update")
    generated = getattr(trainer, SCORED)

    def scored(inputs: Any) -> Any:
        found = generated(inputs)
        requests.found = {"tokens": int(found["completion_mask"].sum()), "samples": len(found["completion_mask"])}
        return found

    setattr(trainer, SCORED, scored)


if __name__ == "__main__":
    main()
