"""TRL's losses and gradients on a small input that is written out here.

    python benchmarks/rivals/trl_losses.py > tests/unit/trl_losses.json     # in an environment that has TRL 1.16

The trainers' own `compute_loss` runs on log-probabilities that stand for a model's, in float64: three samples with
2, 1 and 2 tokens, and what else it takes, in `WRITTEN`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
import trl
from torch import Tensor
from trl.trainer.distillation_trainer import ChunkedDivergenceFunction  # pyright: ignore

WRITTEN = {
    "lengths": [2, 1, 2],
    "advantages": [2.0, -1.0, -1.0],
    "old": [[-0.5, -1.25], [-0.75], [-2.0, -0.25]],
    "ratios": [[1.5, 0.9], [0.5], [1.1, 0.7]],
    "weights": [[1.0, 0.5], [2.0], [1.0, 1.5]],
    "reference": [[-1.0, -1.0], [-1.0], [-1.5, -1.5]],
    "engine_less_now": [[1.0, 1.0], [0.3], [0.1, 0.2]],
    "longest": 8,
    "student_logits": [0.5, -1.0, 2.0, 0.0],
    "teacher_logits": [1.0, 0.25, -0.5, 0.75],
}
CASES: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo", "weighted": True},
    "dapo": {"loss_type": "dapo", "weighted": True, "epsilon_high": 0.28},
    "dr_grpo": {"loss_type": "dr_grpo", "weighted": True},
    "cispo": {"loss_type": "cispo", "weighted": True, "epsilon_high": 1.2},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_high": 0.1},
    "kl": {"loss_type": "dapo", "epsilon_high": 0.28, "beta": 0.3},
    "kl_times_ratio": {"loss_type": "dapo", "epsilon_high": 0.28, "beta": 0.3, "use_bias_correction_kl": True},
    "off_policy_mask": {
        "loss_type": "dapo",
        "weighted": True,
        "epsilon_high": 0.28,
        "off_policy_mask_threshold": 0.2,
    },
}


class OneProcess:
    num_processes, sync_gradients, is_main_process = 1, True, True

    def gather(self, values: Tensor) -> Tensor:
        return values

    def reduce(self, values: Tensor, reduction: str) -> Tensor:
        return values


def padded(rows: list[list[float]], filler: float = 0.0) -> Tensor:
    width = max(WRITTEN["lengths"])
    return torch.tensor([row + [filler] * (width - len(row)) for row in rows], dtype=torch.float64)


MASK = padded([[1.0] * length for length in WRITTEN["lengths"]])
OLD = padded(WRITTEN["old"])
NOW = OLD + padded(WRITTEN["ratios"], 1.0).log()


def trainer(kind: type, weighted: bool = False, use_bias_correction_kl: bool = False, **changes: Any) -> Any:
    """A trainer that holds what its loss reads, and nothing else."""
    given = type("Given", (kind,), {"_get_per_token_logps_and_entropies": lambda self, *_, **__: self.given})
    made = given.__new__(given)
    made.args = SimpleNamespace(delta=None, use_bias_correction_kl=use_bias_correction_kl, steps_per_generation=1)
    fields = {
        "model": SimpleNamespace(training=True),
        "accelerator": OneProcess(),
        "top_entropy_quantile": 1.0,
        "aux_loss_enabled": False,
        "off_policy_mask_threshold": None,
        "importance_sampling_level": "token",
        "beta": 0.0,
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "use_vllm": weighted,
        "vllm_importance_sampling_correction": weighted,
        "current_gradient_accumulation_steps": 1,
        "max_completion_length": WRITTEN["longest"],
        "_entropy_bonus_enabled": False,
        "_metrics": defaultdict(lambda: defaultdict(list)),
    }
    for name, value in {**fields, **changes}.items():
        setattr(made, name, value)
    return made


def loss_of(made: Any, **inputs: Tensor) -> dict[str, Any]:
    now = NOW.clone().requires_grad_()
    made.given = now, torch.zeros_like(now), None
    ids = torch.zeros(MASK.shape, dtype=torch.long)
    prompt = {"prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1] + 1}
    completion = {"completion_ids": ids, "completion_mask": MASK.long()}
    advantages = torch.tensor(WRITTEN["advantages"], dtype=torch.float64)
    loss = made.compute_loss(None, {**prompt, **completion, "advantages": advantages, **inputs})
    loss.backward()
    assert now.grad is not None
    return {"loss": loss.item(), "gradient": now.grad[MASK.bool()].tolist()}


def grpo(**changes: Any) -> dict[str, Any]:
    return loss_of(
        trainer(trl.GRPOTrainer, **changes),
        old_per_token_logps=OLD,
        num_items_in_batch=MASK.sum(),
        importance_sampling_ratio=padded(WRITTEN["weights"]),
        ref_per_token_logps=padded(WRITTEN["reference"]),
        sampling_per_token_logps=NOW + padded(WRITTEN["engine_less_now"]),
    )


def rloo() -> dict[str, Any]:
    made = trainer(trl.RLOOTrainer, epsilon_low=0.3, epsilon_high=0.4)
    return loss_of(made, old_logps=(OLD * MASK).sum(1))


def reverse_kl() -> dict[str, Any]:
    """Of one place, over the whole vocabulary; the gradient is that of the student's logits."""
    student, teacher = (
        torch.tensor(WRITTEN[f"{who}_logits"], dtype=torch.float64)[None, None] for who in ("student", "teacher")
    )
    student.requires_grad_()
    head = torch.eye(student.shape[-1], dtype=torch.float64)
    rows = [values[0] for values in (student, teacher)]
    divergence, _ = ChunkedDivergenceFunction.apply(
        rows[0], head, None, rows[1], head, None, 1.0, 1.0, 1.0, None, 1.0, None
    )
    loss = divergence.sum()
    loss.backward()
    assert student.grad is not None
    return {"loss": loss.item(), "gradient": student.grad.flatten().tolist()}


if __name__ == "__main__":
    found = {name: grpo(**changes) for name, changes in CASES.items()}
    found |= {"rloo": rloo(), "reverse_kl": reverse_kl()}
    print(json.dumps({"trl": trl.__version__, "written": WRITTEN, "found": found}, indent=1))
