"""Does the mismatch of rollouts shrink where the learner sends each token to the experts that the engine sent it to?

    python -m benchmarks.router_replay [--steps N] [--prompts N] [--samples N]

The model of recipes/tiny.toml, after N steps of its supervised fine-tuning, in fp32. Our engine answers training prompts
at temperature 1 in each format and notes its experts. The learner (fp32) then gives log-probabilities of the same
tokens, routing by itself and as the engine did. `routed_otherwise` is the share of tokens that have another set of
experts in some layer.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.conditions import store
from isthmus.data.corpus import prompt_ids, run_tokenizer, sft_documents
from isthmus.data.tasks import load_task
from isthmus.engines import Sampling
from isthmus.engines.local import LocalEngine
from isthmus.formats.files.bundle import write_bundle
from isthmus.model.documents import Documents
from isthmus.model.model import Model
from isthmus.model.moe import Trace
from isthmus.recipe.read import load_recipe
from isthmus.recipe.schema import EngineOptions, Recipe
from isthmus.run import RunFolder
from isthmus.stages.rl.rollout import Rollout
from isthmus.stages.rl.samples import Samples
from isthmus.trainer.batch import pack
from isthmus.trainer.correction import mismatch
from isthmus.trainer.optimizer import Optimizer
from isthmus.trainer.step import target_logprobs, train_step

RECIPE = Path(__file__).parents[1] / "recipes" / "tiny.toml"
FORMATS = ("fp32", "bf16", "w8a8")


def trained(run: RunFolder, steps: int) -> Model:
    """By the recipe's supervised section, for so many steps."""
    recipe = run.recipe
    task = load_task(recipe)
    tokenizer = run_tokenizer(run, task)
    model = Model(recipe.model).initialise(recipe.seed)
    optimizer = Optimizer(model, recipe.sft.optimizer, steps)
    for step in range(steps):
        losses, _ = train_step(model, optimizer, pack(sft_documents(run, task, tokenizer, step)), recipe.sft, step)
        if step % 20 == 0:
            print(f"  step {step}: loss {losses.loss:.3f}", flush=True)
    return model.requires_grad_(False)


def answered(run: RunFolder, model: Model, name: str, folder: Path, prompts: int, samples: int) -> Rollout:
    """What the engine wrote in a format, with its experts."""
    task = load_task(run.recipe)
    tokenizer = run_tokenizer(run, task)
    asked = [prompt_ids(tokenizer, problem) for problem in task.train[:prompts]]
    write_bundle(folder, name, dict(model.state_dict()), run.recipe.model, tokenizer)
    sampling = Sampling(run.recipe.rl.max_new_tokens, n=samples, routes=True)
    options = EngineOptions(record_routes=True)
    with LocalEngine(folder, log=folder.with_suffix(".log"), options=options) as engine:
        return Rollout([], asked, engine.generate(asked, sampling, list(range(prompts))), [], 1.0)


def measured(recipe: Recipe, model: Model, rollout: Rollout) -> dict[str, Any]:
    count = len(rollout.flat)
    batch = Samples.of(rollout, range(count), torch.ones(count))
    assert batch.routes is not None
    routes = batch.routes.long().unflatten(-1, (-1, recipe.model.num_experts_per_tok))  # pyright: ignore
    with torch.no_grad():
        own, _ = target_logprobs(model, batch.batch, 1.0)
        replayed, _ = target_logprobs(model, batch.batch, 1.0, routes)
        trace = Trace()
        spans = Documents.of(batch.batch.document, recipe.model.num_attention_heads)
        model.hidden(batch.batch.tokens, batch.batch.positions, spans, trace=trace)
    engine = batch.at_targets(batch.engine)
    otherwise = _otherwise(trace, routes)
    known = (routes >= 0).all(-1).all(-1)
    found: dict[str, Any] = {"tokens": len(engine), "samples": count}
    found["routed_otherwise"] = otherwise[known].float().mean().item()
    for way, logprobs in (("own", own), ("replayed", replayed)):
        gap = mismatch(logprobs, engine)
        ratio = (logprobs - engine).exp()
        found[way] = {
            "mean_abs": gap.mean_abs,
            "max_abs": gap.max_abs,
            "k3": gap.k3,
            "beyond_1_percent": ((ratio - 1).abs() > 0.01).float().mean().item(),
        }
    pairs = zip(_by_sample(own, engine, batch), _by_sample(replayed, engine, batch), strict=True)
    shares = [after / before for before, after in pairs if before > 0]
    found["mean_abs_ratio"] = found["replayed"]["mean_abs"] / found["own"]["mean_abs"]
    found["median_ratio_of_samples"] = statistics.median(shares) if shares else None
    return found


def _otherwise(trace: Trace, routes: Tensor) -> Tensor:
    """[B, T], true where any layer has another set of experts."""
    own = torch.stack([routing.experts.view(routes.shape[0], routes.shape[1], -1) for routing in trace.routings], 2)
    return (own.sort(-1).values != routes.sort(-1).values).any(-1).any(-1)


def _by_sample(logprobs: Tensor, engine: Tensor, batch: Samples) -> list[float]:
    """Mean |difference| of each sample."""
    total = torch.zeros(batch.count).index_add(0, batch.sample, (logprobs - engine).abs())
    return (total / torch.bincount(batch.sample, minlength=batch.count)).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=4)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder.create(Path(folder) / "run", load_recipe(RECIPE, ()))
        model = trained(run, asked.steps)
        rows = {}
        for name in FORMATS:
            rollout = answered(run, model, name, Path(folder) / name, asked.prompts, asked.samples)
            rows[name] = measured(run.recipe, model, rollout)
            print(f"{name:5} {rows[name]}", flush=True)
    store("router_replay", {"asked": vars(asked), "formats": rows})


if __name__ == "__main__":
    main()
