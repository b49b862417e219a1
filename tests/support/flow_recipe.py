"""The tiny recipe made smaller, for tests that run whole stages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "tiny.toml"

SMALL = {
    "model.hidden_size": 32,
    "model.intermediate_size": 64,
    "model.moe_intermediate_size": 24,
    "model.num_hidden_layers": 2,
    "data.teacher_give_up": 0.9,
    "sft.steps": 80,
    "sft.batch_size": 24,
    "sft.checkpoint_every": 15,
    "rl.steps": 12,
    "rl.prompts_per_step": 4,
    "rl.samples_per_prompt": 4,
    "rl.max_new_tokens": 40,
    "rl.checkpoint_every": 2,
    "rl.heldout_problems": 40,
    "handoff.golden_prompts": 8,
    "handoff.heldout_problems": 40,
    "handoff.max_accuracy_drop": 0.3,
    "qualify.matmul_size": 128,
    "qualify.memory_mib": 4,
    "qualify.repeats": 3,
    "qualify.pilot_steps": 2,
    "qualify.soak_s": 1.0,
    "qualify.budget": "5s",
}


def settings(**changes: object) -> list[str]:
    """--set options of the small recipe; dots in names are written as two underscores."""
    merged = {**SMALL, **{name.replace("__", "."): value for name, value in changes.items()}}
    return [word for name, value in merged.items() for word in ("--set", f"{name}={value}")]


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "isthmus", *map(str, words)]


def isthmus(*words: object, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own and capture what a user would read."""
    environment = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(command(*words), capture_output=True, text=True, timeout=timeout, env=environment, cwd=ROOT)
