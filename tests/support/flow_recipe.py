"""The tiny recipe made smaller, for tests that run whole stages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "tiny.toml"

_SMALL = {
    "model__hidden_size": 32,
    "model__intermediate_size": 64,
    "model__moe_intermediate_size": 24,
    "model__num_hidden_layers": 2,
    "data__teacher_give_up": 0.9,
    "sft__steps": 80,
    "sft__batch_size": 24,
    "sft__checkpoint_every": 15,
    "rl__steps": 12,
    "rl__prompts_per_step": 4,
    "rl__samples_per_prompt": 4,
    "rl__max_new_tokens": 40,
    "rl__checkpoint_every": 2,
    "rl__heldout_problems": 40,
    "handoff__golden_prompts": 8,
    "handoff__heldout_problems": 40,
    "handoff__max_accuracy_drop": 0.3,
    "qualify__matmul_size": 128,
    "qualify__memory_mib": 4,
    "qualify__repeats": 3,
    "qualify__pilot_steps": 2,
    "qualify__soak_s": 1.0,
    "qualify__budget": "5s",
}


TAUGHT, REINFORCED = "cold-start", "reasoning"
"""The steps of the recipe."""
_WRITTEN = {"data": "tasks.countdown", "sft": f"step.{TAUGHT}", "rl": f"step.{REINFORCED}"}


def written(name: str) -> str:
    """A key as the recipe has it: `sft`, `rl` and `data` stand for its steps and its task, two underscores for dots."""
    first, *rest = name.replace("__", ".").split(".")
    return ".".join([_WRITTEN.get(first, first), *rest])


SMALL = {written(name): value for name, value in _SMALL.items()}


def settings(**changes: object) -> list[str]:
    """--set options of the small recipe; names as `written` reads them."""
    merged = {**SMALL, **{written(name): value for name, value in changes.items()}}
    return [word for name, value in merged.items() for word in ("--set", f"{name}={value}")]


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "isthmus", *map(str, words)]


def isthmus(*words: object, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own and capture what a user would read."""
    environment = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(command(*words), capture_output=True, text=True, timeout=timeout, env=environment, cwd=ROOT)
