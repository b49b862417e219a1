"""Tokens per second and memory of supervised training, against transformers with the same weights, data and optimiser.

    python -m benchmarks.train [--models r-nano r-100m] [--threads 2]

Each contender runs in a process of its own, in turns, and its best step counts. The documents are the tiny recipe's
worked examples, or for larger models random ones; the loss is on the answers only. transformers runs twice: padded, as
its users' default collators do, and packed into rows of 256 tokens or more with a block mask and own positions.
It has neither multi-token prediction nor the balance loss, so both are off. The losses of the first step must agree.
With an accelerator, r-1b is trained in bf16 there, and the share of the matrix rate that was measured in the same run
is printed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.conditions import store
from isthmus.data.corpus import Document, run_tokenizer, sft_documents
from isthmus.forecast.count import training_flops
from isthmus.model.config import hf_config
from isthmus.model.model import Model
from isthmus.probes.compute import matmul_tflops
from isthmus.recipe.practice import stream, taught
from isthmus.recipe.read import load_recipe
from isthmus.recipe.schema import TrainSection
from isthmus.recipe.steps import OptimizerSection, SftSection
from isthmus.run import RunFolder
from isthmus.tasks import load_tasks, seeded, tasks_of
from isthmus.trainer.batch import pack
from isthmus.trainer.mesh import Ranks, open_ranks
from isthmus.trainer.observe import peak_memory
from isthmus.trainer.optimizer import Optimizer
from isthmus.trainer.parallel import distribute
from isthmus.trainer.step import train_step
from tests.support.plain import document_mask
from tests.support.presets import preset_architecture

ROOT = Path(__file__).parents[1]
STEPS, ROUNDS = 4, 2
OPTIMIZER = OptimizerSection(name="adamw", learning_rate=1e-4, gradient_clip=1.0)
SECTION = SftSection(
    name="taught", kind="sft", steps=1000, optimizer=OPTIMIZER, mtp_weight=0.0, balance_alpha=0.0, bias_update_speed=0.0
)
TOKENS = {"r-nano": 0, "r-100m": 2048, "r-1b": 65536}
"""Tokens of a step; 0 takes the tiny recipe's own batch."""


def architecture(preset: str) -> Any:
    return preset_architecture(preset, num_nextn_predict_layers=0)


def documents(preset: str) -> list[Document]:
    """Random documents have lengths between an eighth and all of 512 tokens, a third of them the prompt."""
    if TOKENS[preset] == 0:
        with tempfile.TemporaryDirectory() as scratch:
            run = RunFolder.create(Path(scratch) / "run", load_recipe(ROOT / "recipes" / "tiny.toml"))
            recipe, step = run.recipe, taught(run.recipe)
            tokenizer = run_tokenizer(run, list(load_tasks(recipe).values()))
            chance = seeded(stream(recipe, step.name), recipe.seed, 0)
            return sft_documents(tasks_of(recipe, step), tokenizer, recipe.model, step.batch_size, chance)
    generator = torch.Generator().manual_seed(0)
    vocabulary, made, total = architecture(preset).vocab_size, [], 0
    while total < TOKENS[preset]:
        length = int(torch.randint(64, 513, (), generator=generator))
        made.append(Document(torch.randint(vocabulary, (length,), generator=generator).tolist(), length // 3))
        total += length
    return made


def ours(preset: str, device: torch.device, ranks: Ranks) -> Callable[[], float]:
    model = Model(architecture(preset)).initialise(0).to(device)
    if ranks.grouped:
        distribute(model, ranks, TrainSection(), torch.bfloat16)
    optimizer = Optimizer(model, OPTIMIZER, SECTION.steps)
    batch = pack(documents(preset))
    return lambda: train_step(model, optimizer, batch, SECTION, 0, ranks)[0].loss


def theirs(preset: str, device: torch.device, *, packed: bool) -> Callable[[], float]:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(**hf_config(architecture(preset), dtype="float32", bos_token_id=0, eos_token_id=1))
    with tempfile.TemporaryDirectory() as folder:
        _save_published(preset, Path(folder), config)
        model = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    inputs = {name: tensor.to(device) for name, tensor in (_packed if packed else _padded)(documents(preset)).items()}

    def step() -> float:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu"):
            loss = model(**inputs, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


def _save_published(preset: str, folder: Path, config: Any) -> None:
    from safetensors.torch import save_file

    state = Model(architecture(preset)).initialise(0).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    config.save_pretrained(folder)


def _padded(items: list[Document]) -> dict[str, Tensor]:
    width = max(len(item.tokens) for item in items)
    tokens, labels = torch.zeros(len(items), width, dtype=torch.long), torch.full((len(items), width), -100)
    for row, item in enumerate(items):
        length = len(item.tokens)
        tokens[row, :length] = torch.tensor(item.tokens)
        labels[row, item.prompt_length : length] = tokens[row, item.prompt_length : length]
    lengths = torch.tensor([len(item.tokens) for item in items])
    return {
        "input_ids": tokens,
        "labels": labels,
        "attention_mask": (torch.arange(width) < lengths[:, None]).long(),
    }


def _packed(items: list[Document]) -> dict[str, Tensor]:
    batch = pack(items, 256)
    return {
        "input_ids": batch.tokens,
        "labels": batch.tokens.masked_fill(~batch.target_mask, -100),
        "attention_mask": document_mask(batch.document),
        "position_ids": batch.positions,
    }


def measure(contender: str, preset: str, threads: int, answers: Any) -> None:
    """In a process of its own: loss of the first step; wall and CPU seconds of the best later ones; peak MiB."""
    torch.set_num_threads(threads)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    on_chip = preset == "r-1b" and accelerator is not None
    device = torch.device(accelerator.type if on_chip and accelerator else "cpu")
    with open_ranks(device.type, grouped=on_chip and contender == "isthmus") as ranks:
        if contender == "isthmus":
            step = ours(preset, ranks.device, ranks)
        else:
            step = theirs(preset, device, packed=contender == "transformers, packed")
        first, walls, works = step(), [], []
        for _ in range(STEPS):
            began, busy = time.perf_counter(), time.process_time()
            step()
            walls.append(time.perf_counter() - began)
            works.append(time.process_time() - busy)
    memory = peak_memory(device)
    assert memory is not None
    answers.put({"loss": first, "seconds": min(walls), "cpu_seconds": min(works), "memory_mib": memory / 2**20})


def compare(preset: str, threads: int) -> dict[str, Any]:
    contenders = ("isthmus", "transformers, packed", "transformers, padded")
    found: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    context = multiprocessing.get_context("spawn")
    for _ in range(ROUNDS):
        for name in contenders:
            answers = context.Queue()
            process = context.Process(target=measure, args=(name, preset, threads, answers))
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(f"{name} failed on {preset}")
            found[name].append(answers.get())
    tokens = sum(len(item.tokens) for item in documents(preset))
    rows = {}
    for name, tries in found.items():
        rows[name] = {key: min(one[key] for one in tries) for key in tries[0]}
        rows[name]["tokens_per_s"] = tokens / rows[name]["seconds"]
    losses = [row["loss"] for row in rows.values()]
    assert max(losses) - min(losses) < 1e-3 * max(losses) or preset == "r-1b", losses
    _print(preset, tokens, rows)
    return {"tokens_per_step": tokens, **rows}


def _print(preset: str, tokens: int, rows: dict[str, dict[str, float]]) -> None:
    print(f"\n{preset}: {tokens:,} tokens a step")
    print(f"{'':24} {'tokens/s':>12} {'isthmus is':>12} {'by CPU time':>12} {'memory MiB':>12} {'first loss':>12}")
    for name, row in rows.items():
        wall, busy = (row[key] / rows["isthmus"][key] for key in ("seconds", "cpu_seconds"))
        rates = f"{row['tokens_per_s']:>12,.0f} {wall:>11.2f}x {busy:>11.2f}x"
        print(f"{name:24} {rates} {row['memory_mib']:>12,.0f} {row['loss']:>12.5f}")


def share_of_matmul(result: dict[str, Any]) -> float:
    """The training rate in model operations over the rate of one large bf16 product, measured in this run."""
    device = torch.accelerator.current_accelerator()
    assert device is not None
    batch = pack(documents("r-1b"))
    flops = training_flops(architecture("r-1b"), batch.mean_context) * result["isthmus"]["tokens_per_s"]
    rate = max(matmul_tflops(device, 8192, 10, torch.bfloat16))
    print(f"share of the measured matmul rate ({rate:,.0f} TFLOPS): {flops / rate / 1e12:.1%}")
    return flops / rate / 1e12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    default = ["r-nano", "r-100m", *(["r-1b"] if torch.accelerator.is_available() else [])]
    parser.add_argument("--models", nargs="+", choices=TOKENS, default=default)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    results = {preset: compare(preset, options.threads) for preset in options.models}
    if "r-1b" in results and torch.accelerator.is_available():
        results["r-1b"]["share_of_matmul"] = share_of_matmul(results["r-1b"])
    store("train", {"threads": options.threads, "steps": STEPS, "rounds": ROUNDS, "models": results})


if __name__ == "__main__":
    main()
