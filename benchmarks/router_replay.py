"""Does the mismatch of rollouts shrink where the learner sends each token to the experts that the engine sent it to?

    python -m benchmarks.router_replay [--steps N] [--prompts N] [--samples N]

The model of recipes/tiny.toml after N updates of its supervised fine-tuning, in fp32. Our engine answers prompts at
temperature 1 in each format and notes its experts. The learner (fp32) then gives log-probabilities of the same
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
from isthmus.data.corpus import prompt_ids, sft_documents
from isthmus.engines import Sampling
from isthmus.engines.local import LocalEngine
from isthmus.formats.files.bundle import write_bundle
from isthmus.model.documents import Documents
from isthmus.model.model import Model
from isthmus.model.moe import Trace
from isthmus.recipe.read import load_recipe
from isthmus.recipe.schema import EngineOptions
from isthmus.rewards import Scores
from isthmus.run import RunFolder
from isthmus.stages.steps.data import learnt, some_problems, tokenizer_of
from isthmus.stages.steps.rl.rollout import Rollout
from isthmus.stages.steps.rl.samples import Samples
from isthmus.stages.steps.step import StepRun
from isthmus.tasks import seeded
from isthmus.trainer.batch import pack
from isthmus.trainer.correction import mismatch
from isthmus.trainer.optimizer import Optimizer
from isthmus.trainer.step import target_logprobs, train_step

RECIPE, STEP, TOKENS = Path(__file__).parents[1] / "recipes" / "tiny.toml", "cold-start", 160
FORMATS = ("fp32", "bf16", "w8a8")


def trained(work: StepRun[Any], steps: int) -> Model:
    """As the supervised step does, for so many updates."""
    examples, tokenizer, section, seed = learnt(work), tokenizer_of(work), work.section, work.recipe.seed
    model = Model(work.architecture).initialise(seed)
    optimizer = Optimizer(model, section.optimizer, steps)
    for step in range(steps):
        chance = seeded(work.stream, seed, step)
        documents = sft_documents(examples, tokenizer, work.architecture, section.batch_size, chance)
        losses, _ = train_step(model, optimizer, pack(documents), section, step)
        if step % 20 == 0:
            print(f"  step {step}: loss {losses.loss:.3f}", flush=True)
    return model.requires_grad_(False)


def answered(work: StepRun[Any], model: Model, name: str, folder: Path, prompts: int, samples: int) -> Rollout:
    """What the engine wrote in a format, with its experts."""
    tokenizer = tokenizer_of(work)
    asked = [prompt_ids(tokenizer, problem) for problem in some_problems(learnt(work), prompts)]
    write_bundle(folder, name, dict(model.state_dict()), work.architecture, tokenizer)
    sampling = Sampling(TOKENS, n=samples, routes=True)
    options = EngineOptions(record_routes=True)
    with LocalEngine(folder, log=folder.with_suffix(".log"), options=options) as engine:
        return Rollout([], asked, engine.generate(asked, sampling, list(range(prompts))), Scores([], [], {}), 1.0)


def measured(model: Model, rollout: Rollout) -> dict[str, Any]:
    count, architecture = len(rollout.flat), model.architecture
    batch = Samples.of(rollout, range(count), torch.ones(count))
    assert batch.routes is not None
    routes = batch.routes.long().unflatten(-1, (-1, architecture.num_experts_per_tok))  # pyright: ignore
    with torch.no_grad():
        own, _ = target_logprobs(model, batch.batch, 1.0)
        replayed, _ = target_logprobs(model, batch.batch, 1.0, routes)
        trace = Trace()
        spans = Documents.of(batch.batch.document, architecture.num_attention_heads)
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
        work = StepRun.of(run, STEP)
        model = trained(work, asked.steps)
        rows = {}
        for name in FORMATS:
            rollout = answered(work, model, name, Path(folder) / name, asked.prompts, asked.samples)
            rows[name] = measured(model, rollout)
            print(f"{name:5} {rows[name]}", flush=True)
    store("router_replay", {"asked": vars(asked), "formats": rows})


if __name__ == "__main__":
    main()
