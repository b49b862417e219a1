"""Tokens per second of the local engine against transformers.generate, on the same weights, in one run.

    python -m benchmarks.rollout

Random r-nano weights; the prompt and the number of new tokens are fixed, and no sequence stops early. The engine is
timed through its HTTP contract, as the RL stage uses it; transformers runs in this process. One compute thread each.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from benchmarks.conditions import store
from isthmus.data.corpus import prompt_ids, run_tokenizer
from isthmus.engines import Sampling
from isthmus.engines.local import LocalEngine
from isthmus.formats.files.bundle import write_bundle
from isthmus.model.model import Model
from isthmus.recipe.read import load_recipe
from isthmus.run import RunFolder
from isthmus.tasks import load_tasks

ROOT = Path(__file__).parents[1]
NEW_TOKENS, REPEATS = 96, 3
BATCHES = (1, 32, 256)


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        run = RunFolder.create(Path(scratch) / "run", load_recipe(ROOT / "recipes" / "tiny.toml"))
        task = load_tasks(run.recipe)["countdown"]
        tokenizer = run_tokenizer(run, [task])
        model = Model(run.recipe.model).initialise(0)
        with torch.no_grad():
            # The end token must not be drawn: every sequence then has the same length in every engine.
            model.lm_head.weight[tokenizer.eos_id] = 0.0
        prompts = [prompt_ids(tokenizer, problem) for problem in task.train[: max(BATCHES)]]
        width = min(map(len, prompts))
        prompts = [prompt[:width] for prompt in prompts]
        folders = {name: Path(scratch) / name for name in ("fp32", "w8a8")}
        for name, folder in folders.items():
            write_bundle(folder, name, model.state_dict(), run.recipe.model, tokenizer)
        rates = {name: engine_rates(folder, prompts, Path(scratch)) for name, folder in folders.items()}
        rates["transformers"] = transformers_rates(folders["fp32"], prompts)
    print(f"{'batch':>6} " + " ".join(f"{name:>14}" for name in rates) + f" {'fp32 / transformers':>20}")
    for index, batch in enumerate(BATCHES):
        ratio = rates["fp32"][index] / rates["transformers"][index]
        print(f"{batch:>6} " + " ".join(f"{rate[index]:>10,.0f} t/s" for rate in rates.values()) + f" {ratio:>19.1f}x")
    store("rollout", {"new_tokens": NEW_TOKENS, "batches": BATCHES, "tokens_per_s": rates})


def engine_rates(folder: Path, prompts: list[list[int]], scratch: Path) -> list[float]:
    with LocalEngine(folder, threads=1, log=scratch / "engine.log") as engine:
        return [rate(lambda b=batch: count(engine, prompts[:b]), batch) for batch in BATCHES]


def count(engine: LocalEngine, prompts: list[list[int]]) -> int:
    return sum(len(group[0].tokens) for group in engine.generate(prompts, Sampling(NEW_TOKENS, temperature=1.0)))


def transformers_rates(folder: Path, prompts: list[list[int]]) -> list[float]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def generate(batch: int) -> int:
        tokens = torch.tensor(prompts[:batch])
        options = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "do_sample": True, "top_k": 0}
        with torch.inference_mode():
            out = model.generate(tokens, attention_mask=torch.ones_like(tokens), pad_token_id=0, **options)
        return out[:, tokens.shape[1] :].numel()

    return [rate(lambda b=batch: generate(b), batch) for batch in BATCHES]


def rate(generate, batch: int) -> float:
    """Tokens per second, the best of a few repeats after one warm-up."""
    generate()
    best = 0.0
    for _ in range(REPEATS):
        began = time.perf_counter()
        tokens = generate()
        best = max(best, tokens / (time.perf_counter() - began))
    return best


if __name__ == "__main__":
    main()
