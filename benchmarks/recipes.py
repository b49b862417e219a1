"""False alarms of the qualification on recipes that differ: architectures, sizes, optimisers, rates, data, precision.

    python -m benchmarks.recipes                          # 60 recipes: an hour on two busy cores
    python -m benchmarks.recipes --quick                  # 3 recipes, and no result is stored
    python -m benchmarks.recipes --first 30 --count 30 --keep part.jsonl    # a part of them
    python -m benchmarks.recipes --join one.jsonl other.jsonl               # parts as one result

Each recipe is drawn from its number: a family, tiny sizes, AdamW or Muon, a rate from 1e-5 to 0.3 with and without
warm-up, clipping, batches, one of four kinds of data, fp32 or bf16, one or two ranks. Every tenth has a rate at which
no model learns, and most of those end in numbers that are not finite. The pool is this machine's CPU, which is healthy,
so each finding that fails is a false alarm. Every probe of a default qualification looks but for the comparison of
compiled code, which does not depend on the recipe, and so do the pilots of training and generation. `own` counts
recipes of which the soak says that they make their numbers jump or end by themselves: without the repetition on a
trusted chip these would be false alarms.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.conditions import conditions, store
from isthmus.chips import get_chip
from isthmus.launch.crew import Crew
from isthmus.parity.paired import wilson_interval
from isthmus.pools import get_pool
from isthmus.probes import PRELOAD, live_probes, pilots
from isthmus.probes.asking import ask
from isthmus.probes.budget import choose
from isthmus.probes.contract import Setting
from isthmus.probes.findings import Findings
from isthmus.probes.workload import Workload
from isthmus.recipe.read import parse_recipe
from isthmus.recipe.schema import Recipe
from isthmus.run import RunFolder

LEFT_OUT, CONFIDENCE = "eager against compiled", 0.95
SOAK_S = 12.0
FAMILIES = ("deepseek_v3", "llama", "mistral", "qwen2", "qwen3", "qwen3_moe")
OWN = "The recipe's own"


@dataclass
class Trial:
    """One recipe, and what a healthy pool was said to be. `alarms` and `unknown` are names of findings."""

    number: int
    family: str
    optimizer: str
    rate: float
    data: str
    precision: str
    ranks: int
    alarms: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    details: list[str] = field(default_factory=list)
    own: bool = False
    steps: int = 0
    seconds: float = 0.0
    commit: str = ""


def draw(number: int, folder: Path) -> tuple[Recipe, Trial]:
    """A recipe by its number; its data lies in `folder`."""
    chance = random.Random(number)
    family = FAMILIES[number % len(FAMILIES)]
    rate = 10.0 ** chance.uniform(-5.0, -0.5) if number % 10 != 9 else 10.0 ** chance.uniform(1.0, 6.0)
    name = chance.choice(["adamw", "muon"])
    optimizer: dict[str, Any] = {
        "name": name,
        "learning_rate": rate,
        "warmup_steps": chance.choice([0, 0, 5, 20]),
        "gradient_clip": chance.choice([0.2, 1.0, 1.0, 1e9]),
        "weight_decay": chance.choice([0.0, 0.1]),
        "betas": chance.choice([[0.9, 0.95], [0.9, 0.999], [0.8, 0.9]]),
    }
    if name == "muon":
        optimizer["matrix_learning_rate"] = 10.0 ** chance.uniform(-3.0, -0.5)
    kind, data = _data(chance, folder)
    precision, ranks = chance.choice(["fp32", "fp32", "bf16"]), chance.choice([1, 1, 2])
    tree: dict[str, Any] = {
        "name": f"recipe-{number}",
        "seed": number,
        "model": _model(family, chance),
        "pools": {"home": {"chip": "cpu", "count": ranks, "ranks": ranks}},
        "place": {stage: ["home"] for stage in ("train", "rollout", "serve")},
        "tasks": {kind.replace(" ", "-"): data},
        "train": {"precision": precision, "activation_checkpointing": chance.random() < 0.2},
        "qualify": {"soak_s": SOAK_S, "matmul_size": 128, "memory_mib": 4, "repeats": 3, "pilot_steps": 2},
        "step": [
            {
                "name": "taught",
                "kind": "sft",
                "steps": chance.choice([40, 400, 4000]),
                "batch_size": chance.choice([2, 4, 8]),
                "optimizer": optimizer,
            },
            {
                "name": "reinforced",
                "kind": "rl",
                "from": "taught",
                "steps": 4,
                "max_new_tokens": 32,
                "optimizer": {"name": "adamw", "learning_rate": 1e-4},
            },
        ],
    }
    return parse_recipe(tree), Trial(number, family, name, rate, kind, precision, ranks)


def _model(family: str, chance: random.Random) -> dict[str, Any]:
    hidden = chance.choice([32, 48, 64, 96])
    heads = chance.choice([2, 4])
    model: dict[str, Any] = {
        "model_type": family,
        "vocab_size": chance.choice([280, 320, 512]),
        "hidden_size": hidden,
        "intermediate_size": chance.choice([48, 128, 200]),
        "num_hidden_layers": chance.choice([1, 2, 3]),
        "num_attention_heads": heads,
        "max_position_embeddings": 1024,
        "rope_theta": chance.choice([1e4, 1e6]),
        "rms_norm_eps": chance.choice([1e-5, 1e-6]),
        "initializer_range": chance.choice([0.006, 0.02, 0.05]),
        "tie_word_embeddings": chance.random() < 0.4,
    }
    mixture = {"moe_intermediate_size": chance.choice([16, 24, 48]), "num_experts_per_tok": chance.choice([1, 2])}
    if family == "deepseek_v3":
        latent = {"q_lora_rank": chance.choice([None, 16]), "kv_lora_rank": 16, "qk_nope_head_dim": 16}
        groups = chance.choice([{"n_group": 1, "topk_group": 1}, {"n_group": 2, "topk_group": 1}])
        model |= {**latent, **groups, **mixture, "qk_rope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 8}
        model |= {"num_nextn_predict_layers": chance.choice([0, 1]), "routed_scaling_factor": 2.5}
        model |= {"scoring_func": chance.choice(["sigmoid", "softmax"])}
        return {name: value for name, value in model.items() if value is not None}
    model |= {"num_key_value_heads": chance.choice([1, heads])}
    if family == "mistral":
        model |= {"sliding_window": 32}
    if family == "llama":
        model |= {"attention_bias": chance.random() < 0.5}
    if family == "qwen3_moe":
        model |= {**mixture, "num_experts": 6, "norm_topk_prob": chance.random() < 0.5}
    return model


def _data(chance: random.Random, folder: Path) -> tuple[str, dict[str, Any]]:
    """Countdown as teachers of several kinds write it, or lines of one's own: sums, copies, one line over and over."""
    kind = chance.choice(["countdown", "sums", "copies", "one line"])
    if kind == "countdown":
        return kind, {"teacher_give_up": chance.choice([0.35, 0.9]), "largest": chance.choice([6, 12, 20])}

    def line(place: int) -> dict[str, str]:
        a, b = chance.randrange(100), chance.randrange(100)
        if kind == "sums":
            return {"prompt": f"{place}: {a} + {b} =", "thought": f"{a} and {b}", "answer": str(a + b)}
        text = "all the same " if kind == "one line" else "".join(chance.choice("abcdef ") for _ in range(60))
        return {
            "prompt": f"{place}: say {text if kind == 'copies' else ''}again",
            "thought": text,
            "answer": text or ".",
        }

    files = {"train_file": folder / "train.jsonl", "heldout_file": folder / "heldout.jsonl"}
    for number, path in enumerate(files.values()):
        lines = [line(1000 * number + place) for place in range(200)]
        path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    return kind, {"kind": "jsonl", **{name: str(path) for name, path in files.items()}}


def qualify(number: int) -> Trial:
    """One recipe on this machine's CPU."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        recipe, trial = draw(number, Path(scratch))
        run, pool = RunFolder.create(Path(scratch) / "run", recipe), get_pool(recipe, "home")
        folder = run.path / "qualify" / "home"
        setting = Setting(recipe, pool, get_chip("cpu"), None, "cpu", run.path, folder, recipe.qualify.stall_s)
        probes = [probe for probe, _ in choose(live_probes(), setting, None).chosen if probe.name != LEFT_OUT]
        with Crew(pool.ranks, preload=PRELOAD) as crew:
            evidence = [item for answer in ask(crew, setting, probes) for item in answer.evidence or ()]
        found, work = Findings(setting), Workload(run, torch.device("cpu"))
        pilots.generation(found, work, None)
        pilots.training(found, work)
        evidence += found.evidence
    trial.alarms = [item.name for item in evidence if item.outcome == "fail"]
    trial.unknown = [item.name for item in evidence if item.outcome == "unknown"]
    trial.own = any(OWN in item.detail for item in evidence)
    shown = [item for item in evidence if item.outcome != "pass" or OWN in item.detail]
    trial.details = [f"{item.name}: {item.detail.replace(scratch, '')[:600]}" for item in shown]
    trial.steps = next((item.samples for item in evidence if item.name == "soak"), 0)
    trial.seconds, trial.commit = time.monotonic() - began, conditions()["commit"]
    return trial


def summary(done: list[Trial]) -> dict[str, Any]:
    """How many recipes have a false alarm, in all and by group, with Wilson's interval."""

    def share(trials: list[Trial]) -> str:
        hits = sum(bool(trial.alarms) for trial in trials)
        low, high = wilson_interval(hits / len(trials), len(trials), CONFIDENCE)
        return f"{hits}/{len(trials)} [{100 * low:.1f}, {100 * high:.1f}] %"

    groups = {
        key: sorted({str(getattr(one, key)) for one in done}) for key in ("family", "optimizer", "data", "precision")
    }
    return {
        "recipes": len(done),
        "false_alarms": share(done),
        "false_alarms_by_finding": dict(Counter(name for trial in done for name in trial.alarms)),
        "recipes_without_an_answer": sum(bool(trial.unknown) and not trial.alarms for trial in done),
        "recipes_whose_own_numbers_jump_or_end": sum(trial.own for trial in done),
        "by_group": {
            f"{key} {value}": share([one for one in done if str(getattr(one, key)) == value])
            for key, values in groups.items()
            for value in values
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=0, help="number of the first recipe")
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--minutes", type=float, help="end, and store what there is, after this time")
    parser.add_argument("--keep", type=Path, help="add each trial to this file; store no result")
    parser.add_argument("--join", type=Path, nargs="+", help="run nothing; store the trials of these files as a result")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    began, done = time.monotonic(), list[Trial]()
    if arguments.join is not None:
        done = [Trial(**json.loads(line)) for part in arguments.join for line in part.read_text().splitlines()]
    for number in range(arguments.first, arguments.first + (3 if arguments.quick else arguments.count)):
        if arguments.join is not None or (arguments.minutes and time.monotonic() - began > 60.0 * arguments.minutes):
            break
        done.append(qualify(number))
        if arguments.keep is not None:
            with arguments.keep.open("a") as lines:
                lines.write(json.dumps(asdict(done[-1])) + "\n")
        one = done[-1]
        print(
            f"{number} {one.family} {one.optimizer} {one.rate:.2g} {one.data}: {one.alarms or 'no alarm'}", flush=True
        )
    found = summary(done)
    print(json.dumps(found, indent=2))
    if not arguments.quick and arguments.keep is None:
        store("recipes", {"soak_s": SOAK_S, **found, "trials": [asdict(trial) for trial in done]})


if __name__ == "__main__":
    main()
