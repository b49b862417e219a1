"""A recipe whose training is spread over ranks, its plan, and ways to start, stop and look at what runs."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from isthmus.recipe.read import load_recipe
from isthmus.records import Placement, PlanRecord
from isthmus.run import RunFolder
from tests.support.flow_recipe import ROOT, TAUGHT, command, written

RECIPE = """
name = "ranks"

[model]
preset = "r-nano"
hidden_size = 32
intermediate_size = 64
moe_intermediate_size = 24
num_hidden_layers = 2

[pools.home]
chip = "cpu"
threads = 1

[place]
train = ["home"]
rollout = ["home"]
serve = ["home"]

[tasks.countdown]
teacher_give_up = 0.9

[qualify]
matmul_size = 64
memory_mib = 1
repeats = 3
pilot_steps = 2

[[step]]
name = "cold-start"
kind = "sft"
from = "model"
steps = 24
batch_size = 16
checkpoint_every = 6

[step.optimizer]
name = "adamw"
learning_rate = 3e-3

[[step]]
name = "reasoning"
kind = "rl"
from = "cold-start"
steps = 2
prompts_per_step = 4
samples_per_prompt = 4
max_new_tokens = 24
heldout_problems = 12

[step.optimizer]
name = "adamw"
learning_rate = 1e-4

[handoff]
golden_prompts = 6
heldout_problems = 12
max_mean_kl = 0.1
min_top1_agreement = 0.8
max_accuracy_drop = 0.6
"""


def planned(folder: Path, text: str = RECIPE, **changes: object) -> Path:
    """A run folder that only lacks training; names of keys as `flow_recipe.written` reads them."""
    recipe_file = folder.with_suffix(".toml")
    recipe_file.write_text(text, encoding="utf-8")
    overrides = [f"{written(name)}={value}" for name, value in changes.items()]
    run = RunFolder.create(folder, load_recipe(recipe_file, overrides))
    places = [Placement(stage=stage, pool="home", reason="the only one") for stage in ("train", "rollout", "serve")]
    record = PlanRecord(
        recipe_sha256=run.recipe.digest(), started=0, ended=0, placements=places, rejected=[], estimate={}
    )
    run.write_record("plan", record)
    return folder


def start(folder: Path, name: str = TAUGHT, **environment: str) -> subprocess.Popen[str]:
    """A step of FOLDER in a session of its own, where Ctrl-C is not ignored."""
    return subprocess.Popen(
        command("run", folder, "--only", name),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
        env={**os.environ, "COLUMNS": "200", **environment},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def stop_at(folder: Path, step: int, stop: Callable[[subprocess.Popen[str]], None], name: str) -> tuple[int, str]:
    """Train until the events of the step `name` show update `step`, then stop it in some way: (exit code, errors)."""
    process, run = start(folder, name), RunFolder.open(folder)
    deadline = time.monotonic() + 120
    while max((seen["step"] for seen in run.events(name, "step")), default=0) < step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    stop(process)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def kill_group(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGKILL)


def interrupt_group(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGINT)


def kill_second_rank(process: subprocess.Popen[str]) -> None:
    (rank,) = [pid for pid in children(process.pid) if b"RANK=1" in environment_of(pid)]
    os.kill(rank, signal.SIGKILL)


def children(parent: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def environment_of(pid: int) -> list[bytes]:
    return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")


def working_on(folder: Path) -> list[int]:
    """Processes whose command line names a folder."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
        except OSError:
            continue
        if str(folder).encode() in words:
            found.append(int(entry.name))
    return found


def wait_until_nobody_works_on(folder: Path) -> None:
    deadline = time.monotonic() + 20
    while working_on(folder):
        assert time.monotonic() < deadline, working_on(folder)
        time.sleep(0.05)
