"""Seconds of a step of GRPO, ours against TRL 1.16's: rollout, rewards, update, crossing, in one run, in turns.

    python -m benchmarks.grpo --rival PYTHON [--shapes dense spread experts] [--steps 9] [--threads 1]

PYTHON is that of an environment with TRL 1.16, transformers and a torch like ours. Both start from one checkpoint,
which has random weights, and sample at temperature 1 until the end token or a limit; the end token has the same chance
at every place, so that lengths are known. Neither looks ahead: samples are of the newest weights. Ours is the shipped
step (`isthmus.stages.steps.rl`), with its engine in a process of its own, weights that cross as deltas in fp32, and its
check of what the engine computes; TRL generates with transformers. A step of one and a step of the other alternate, and
the order changes. CPU time is of all processes of each, wall time of one that has the machine to itself.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.conditions import store
from benchmarks.processes import ROOT, cpu_seconds, ended
from isthmus.data.corpus import prompt_ids
from isthmus.data.tokenizer import Tokenizer
from isthmus.formats.files.bundle import write_bundle
from isthmus.model.model import Model
from isthmus.progress import Watch
from isthmus.recipe.architecture import ModelSection, parse_architecture
from isthmus.recipe.read import load_recipe
from isthmus.run import RunFolder
from isthmus.stages import plan, qualify
from isthmus.tasks import load_tasks
from tests.support.presets import preset_architecture

HERE = Path(__file__).parent
PROMPTS, SAMPLES, LEARNING_RATE = 32, 8, 1e-6
WARM_UP = 2
DENSE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 400,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 384,
    "rope_theta": 100.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
RECIPE = """
name = "grpo"
model = {{ from = "{checkpoint}" }}
pools.home = {{ chip = "cpu", threads = {threads} }}
place = {{ train = ["home"], rollout = ["home"], serve = ["home"] }}
tasks.letters = {{ kind = "jsonl", train_file = "{train}", heldout_file = "{heldout}" }}
qualify = {{ matmul_size = 128, memory_mib = 4, repeats = 3, pilot_steps = 2, soak_s = 0.1 }}

[[step]]
name = "{step}"
kind = "rl"
rewards = {{ accuracy = 1.0 }}
steps = 10000
prompts_per_step = {prompts}
samples_per_prompt = {samples}
max_new_tokens = {limit}
rollout_format = "fp32"
heldout_problems = 8
checkpoint_every = 10000
optimizer = {{ name = "adamw", learning_rate = {learning_rate}, betas = [0.9, 0.999] }}
"""
STEP = "reinforced"


@dataclass(frozen=True)
class Shape:
    """What a step has to do: `limit` tokens for each sample at most; `ends` is the chance of the end token."""

    about: str
    architecture: ModelSection
    limit: int
    ends: float = 0.0
    aim: float = 1.0


def shapes() -> dict[str, Shape]:
    dense, experts = parse_architecture(DENSE), preset_architecture("r-nano", num_nextn_predict_layers=0)
    return {
        "dense": Shape("a dense model of 0.9 M parameters, samples of 33 tokens", dense, 33, aim=1.5),
        "spread": Shape("the same, lengths that spread, a quarter of 256 in the mean", dense, 256, 4 / 256, aim=3.0),
        "experts": Shape("r-nano without its MTP layer, samples of 33 tokens", experts, 33, aim=5.0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rival", required=True, help="python of an environment with TRL 1.16")
    parser.add_argument("--shapes", nargs="*", choices=list(shapes()), default=list(shapes()))
    parser.add_argument("--steps", type=int, default=9, help="measured steps of each, after two to warm up")
    parser.add_argument("--threads", type=int, default=1, help="compute threads of a process")
    options = parser.parse_args()
    found = {}
    for name in options.shapes:
        with tempfile.TemporaryDirectory() as scratch:
            found[name] = measure(shapes()[name], Path(scratch), options.rival, options.steps, options.threads)
        show(name, shapes()[name], found[name])
    conditions = {"prompts": PROMPTS, "samples": SAMPLES, "steps": options.steps, "threads": options.threads}
    store("grpo", {**conditions, "rival": versions(options.rival), "shapes": found})


def versions(python: str) -> dict[str, str]:
    names = ("trl", "transformers", "torch", "accelerate")
    code = f"import json; from importlib.metadata import version; print(json.dumps({{n: version(n) for n in {names}}}))"
    return json.loads(subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout)


def measure(shape: Shape, scratch: Path, rival: str, steps: int, threads: int) -> dict[str, Any]:
    """Steps of both in turns: medians of each, and of the ratio of neighbours."""
    commands = prepared(shape, scratch, rival, threads)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    with ExitStack() as opened:
        both = {
            name: opened.enter_context(contestant(one, scratch / f"{name}.log", threads))
            for name, one in commands.items()
        }
        for number in range(WARM_UP + steps):
            for name in both if number % 2 else reversed(both):
                rows[name].append(one_step(both[name]))
    measured = {name: found[WARM_UP:] for name, found in rows.items()}
    return {
        "about": shape.about,
        "parameters": sum(one.numel() for one in Model(shape.architecture).parameters()),
        "limit": shape.limit,
        "aim": shape.aim,
        **{name: told(found) for name, found in measured.items()},
        **{f"{kind}_ratio": ratio(measured, kind) for kind in ("cpu_s", "seconds")},
    }


def ratio(rows: dict[str, list[dict[str, Any]]], kind: str) -> dict[str, float]:
    """Of TRL's steps to ours, neighbour by neighbour."""
    ratios = sorted(t[kind] / o[kind] for o, t in zip(rows["isthmus"], rows["trl"], strict=True))
    return {"median": statistics.median(ratios), "low": ratios[0], "high": ratios[-1]}


def told(rows: list[dict[str, Any]]) -> dict[str, Any]:
    median = statistics.median
    parts = {name for row in rows for name in row["parts"]}
    known = {name: median(row["parts"].get(name, 0.0) for row in rows) for name in sorted(parts)}
    return {
        "seconds": median(row["seconds"] for row in rows),
        "cpu_s": median(row["cpu_s"] for row in rows),
        "cpu_s_of_parts": known | {"other": median(row["cpu_s"] - sum(row["parts"].values()) for row in rows)},
        "tokens_per_sample": statistics.mean(row["tokens"] / row["samples"] for row in rows),
        "each": [{"seconds": row["seconds"], "cpu_s": row["cpu_s"]} for row in rows],
    }


def prepared(shape: Shape, scratch: Path, rival: str, threads: int) -> dict[str, list[str]]:
    """Checkpoint, prompts and a planned run; and the commands that then work on them."""
    texts = [f"Write {index % 89 + 10} words, and {index * 37 % 97 + 3} of them short." for index in range(512)]
    tokenizer = Tokenizer.train(texts, shape.architecture.vocab_size)
    model = Model(shape.architecture).initialise(0)
    set_ends(model, tokenizer.eos_id, shape.ends)
    checkpoint = scratch / "checkpoint"
    write_bundle(checkpoint, "fp32", model.state_dict(), shape.architecture, tokenizer)
    files = {name: scratch / f"{name}.jsonl" for name in ("train", "heldout")}
    for path, own in zip(files.values(), (texts[:-32], texts[-32:]), strict=True):
        path.write_text("".join(json.dumps({"prompt": text, "answer": "a"}) + "\n" for text in own))
    recipe = scratch / "recipe.toml"
    names = {"prompts": PROMPTS, "samples": SAMPLES, "learning_rate": LEARNING_RATE, "step": STEP, "limit": shape.limit}
    recipe.write_text(RECIPE.format(checkpoint=checkpoint, threads=threads, **files, **names))
    run = RunFolder.create(scratch / "run", load_recipe(recipe))
    for stage in (qualify, plan):
        stage.execute(run, Watch(quiet=True))
    prompts = scratch / "prompts.jsonl"
    problems = load_tasks(run.recipe)["letters"].train
    rows = [{"text": tokenizer.chat_text(one.conversation), "tokens": prompt_ids(tokenizer, one)} for one in problems]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = scratch / "options.json"
    options.write_text(json.dumps({**names, "threads": threads, "seed": 0}))
    return {
        "isthmus": [sys.executable, "-m", "benchmarks.grpo_step", str(run.path), STEP],
        "trl": [rival, str(HERE / "rivals" / "trl_grpo.py"), str(checkpoint), str(prompts), str(options)],
    }


@torch.no_grad()
def set_ends(model: Model, end: int, chance: float) -> None:
    """Give the end token this chance at every place, in place; 0 stands for never.

    The first coordinate of the stream is 1 for every token, no layer adds to it, and the end token's row of the head
    reads it alone: its logit is nearly the same everywhere.
    """
    embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
    embedding[:, 0] = 1.0
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter[0] = 0.0
        elif name.endswith("experts.down"):
            parameter[:, 0] = 0.0
    head[:, 0] = 0.0
    head[end] = 0.0
    tokens = torch.randint(len(head), (8, 64), generator=torch.Generator().manual_seed(0))
    states = model.model.norm(model.hidden(tokens))
    others = _log_sum_of_others(states @ head.T, end)
    wanted = others + math.log(chance / (1 - chance)) if chance else -30.0
    head[end, 0] = wanted / states[..., 0].mean()


def _log_sum_of_others(logits: Tensor, end: int) -> float:
    """The mean over places of the logarithm of what all tokens but the end have together."""
    left_out = logits.clone()
    left_out[..., end] = float("-inf")
    return left_out.logsumexp(-1).mean().item()


@contextmanager
def contestant(command: list[str], log: Path, threads: int) -> Iterator[subprocess.Popen[str]]:
    """A trainer at its first step, in a session of its own."""
    left_out = {} if command[0] == sys.executable else {"PYTHONPATH"}
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    pipe = subprocess.PIPE
    with log.open("w") as errors:
        process = subprocess.Popen(
            command,
            stdin=pipe,
            stdout=pipe,
            stderr=errors,
            text=True,
            cwd=ROOT,
            start_new_session=True,
            env=environment,
        )
    with ended(process):
        try:
            _answer(process)
        except RuntimeError as error:
            raise SystemExit(f"{error}:\n{log.read_text()[-4000:]}") from None
        yield process


def one_step(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What a step took, with the CPU time of all processes of the trainer."""
    assert process.stdin is not None
    before = cpu_seconds(process.pid)
    process.stdin.write("step\n")
    process.stdin.flush()
    answer = _answer(process)
    return answer | {"cpu_s": cpu_seconds(process.pid) - before}


def _answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"{process.args} ended")  # pyright: ignore
    return json.loads(line)


def show(name: str, shape: Shape, found: dict[str, Any]) -> None:
    print(
        f"{name}: {shape.about}; TRL / ours {_spoken(found['cpu_s_ratio'])} in CPU time, "
        f"{_spoken(found['seconds_ratio'])} in wall time (aim {shape.aim:g})"
    )
    for who in ("isthmus", "trl"):
        one = found[who]
        parts = ", ".join(f"{part} {seconds:.3f}" for part, seconds in one["cpu_s_of_parts"].items())
        times = f"{one['seconds']:.3f} s, CPU {one['cpu_s']:.3f} s, {one['tokens_per_sample']:.1f} tokens"
        print(f"  {who:8} {times}; {parts}")


def _spoken(one: dict[str, float]) -> str:
    return f"{one['median']:.2f}x [{one['low']:.2f}, {one['high']:.2f}]"


if __name__ == "__main__":
    main()
