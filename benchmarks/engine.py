"""Output tokens per second and time to the first token of our engine and its rivals, on one checkpoint, in one run.

    ISTHMUS_VLLM_PYTHON=... ISTHMUS_LLAMA_PYTHON=... python -m benchmarks.engine [--threads 1 2] [--quick]

A random deepseek_v3 of 13.5 M parameters in fp32; 64 tokens in, 128 out, greedy, the same prompts for all, none twice.
The row of the end token in the output head is zero, so that it is never the likeliest and every answer has its length;
the tokens of each engine are held against our model's own choice. Servers (ours, vLLM) are timed from a client over
HTTP, one request per prompt; llama.cpp and transformers in a process of their own without HTTP. Warmed up; rates are
the best of the repeats, times to the first token the median of all. Under the Poisson load all get the same arrivals,
at shares of what the reference engine (vLLM, or ours where vLLM is absent) does at batch 32. Then, for our engine
alone, what its options change.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.conditions import store
from benchmarks.rivals.contestants import RIVALS, Contestant, Isthmus, NotInstalled
from benchmarks.rivals.load import Answer, Prompts, Request, between_tokens_s, first_token_s, tokens_per_second
from isthmus.data.tokenizer import Tokenizer
from isthmus.engines.local.core.options import DEFAULT_OPTIONS
from isthmus.formats.files.bundle import read_bundle, write_bundle
from isthmus.model.model import Model, causal_mask
from isthmus.recipe.architecture import DeepseekSection
from isthmus.recipe.schema import EngineOptions
from tests.support.plain import mtp_logits

ARCHITECTURE = DeepseekSection(
    vocab_size=8192,
    hidden_size=256,
    intermediate_size=768,
    moe_intermediate_size=192,
    num_hidden_layers=4,
    num_attention_heads=8,
    kv_lora_rank=128,
    qk_nope_head_dim=32,
    qk_rope_head_dim=32,
    v_head_dim=32,
    n_routed_experts=16,
    num_experts_per_tok=4,
    max_position_embeddings=512,
    num_nextn_predict_layers=0,
    initializer_range=0.05,
)
PROMPT, NEW = 64, 128
BATCHES = (1, 8, 32)
SHARES = (0.5, 0.8)
ARRIVALS = 40
REPEATS, REPEAT_BUDGET_S = 2, 20.0
VOCABULARY = range(8, ARCHITECTURE.vocab_size)
NEAR_TIE = 0.05
"""Logits this close may change places in another order of summation, whole experts among them."""
LEAST_AGREEMENT = 0.99
BRANCH = 0.003


@dataclass(frozen=True)
class Option:
    """One way to run our engine: its options, a temperature, a bundle, and how many tokens all prompts share."""

    name: str
    engine: EngineOptions = DEFAULT_OPTIONS
    temperature: float = 0.0
    bundle: str = "fp32"
    shared: int = 0
    prompt: int = PROMPT


OPTIONS = (
    Option("plain"),
    Option("w8a8", bundle="w8a8"),
    Option("drawn at temperature 1", temperature=1.0),
    Option("batch-invariant", EngineOptions(batch_invariant=True)),
    Option(
        "320 tokens in, 256 of them shared, no prefix cache", EngineOptions(prefix_cache=False), shared=256, prompt=320
    ),
    Option("320 tokens in, 256 of them shared, prefix cache", shared=256, prompt=320),
    Option("MTP layer that mostly agrees, no drafts", bundle="agreeing"),
    Option("MTP layer that mostly agrees, drafts", EngineOptions(speculate=True), bundle="agreeing"),
)


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    batches: tuple[int, ...] = BATCHES
    shares: tuple[float, ...] = SHARES
    new: int = NEW
    repeats: int = REPEATS
    arrivals: int = ARRIVALS


QUICK = Plan(batches=(1, 4), shares=(0.5,), new=8, repeats=1, arrivals=6)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="compute threads, one run for each")
    parser.add_argument("--quick", action="store_true", help="a few tokens of everything, stored nowhere")
    options = parser.parse_args()
    plan, console = QUICK if options.quick else Plan(), Console()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        facts = write_bundles(folder)
        runs = {str(threads): measure(folder, threads, plan, console) for threads in options.threads}
    if not options.quick:
        store("engine", {"model": facts, "prompt_tokens": PROMPT, "new_tokens": NEW, "threads": runs})


def write_bundles(folder: Path) -> dict[str, Any]:
    """The checkpoint in fp32 and w8a8, and one with an MTP layer; what describes them."""
    tokenizer = Tokenizer.train(["one text"], 300)
    model = without_end(Model(ARCHITECTURE).initialise(0), tokenizer.eos_id)
    for name in ("fp32", "w8a8"):
        write_bundle(folder / name, name, model.state_dict(), ARCHITECTURE, tokenizer)
    agreeing = without_end(agreeing_model(), tokenizer.eos_id)
    write_bundle(folder / "agreeing", "fp32", agreeing.state_dict(), agreeing.architecture, tokenizer)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {
        "parameters": parameters,
        "architecture": ARCHITECTURE.model_dump(mode="json", exclude={"from_"}),
        "accepted_drafts_of_the_agreeing_model": accepted_share(agreeing),
    }


def without_end(model: Model, eos_id: int) -> Model:
    with torch.no_grad():
        model.lm_head.weight[eos_id] = 0.0
    return model.eval().requires_grad_(False)


def agreeing_model() -> Model:
    """A model with an MTP layer whose drafts are mostly right, as a trained one's are, at the cost of any other.

    Its layers add little to the embedding of the last token, and its MTP layer passes on the embedding half of its
    input, so that both see nearly the same state.
    """
    architecture = ARCHITECTURE.model_copy(update={"num_nextn_predict_layers": 1})
    model = Model(architecture).initialise(0)
    layer = model.mtp_layer
    assert layer is not None
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "experts.down")):
                weight *= BRANCH
        layer.eh_proj.weight[:] = torch.eye(architecture.hidden_size, 2 * architecture.hidden_size)
    return model


def accepted_share(model: Model) -> float:
    """How often the draft for the token after next is what the model itself takes there, both greedy."""
    requests = Prompts(99, 256, VOCABULARY).batch(4, 0)
    tokens = torch.tensor([request.prompt for request in requests])
    positions = torch.arange(tokens.shape[1]).unsqueeze(0)
    with torch.inference_mode():
        hidden = model.hidden(tokens)
        drafted = mtp_logits(model, hidden, tokens, positions, causal_mask(tokens.shape[1])).argmax(-1)
        own = model.logits(hidden).argmax(-1)
    return (own[:, 1:] == drafted).float().mean().item()


def measure(folder: Path, threads: int, plan: Plan, console: Console) -> dict[str, Any]:
    """All contestants and all options with this number of threads."""
    found: dict[str, Any] = {}
    capacity: float | None = None
    for kind in (RIVALS[0], Isthmus, *RIVALS[1:]):
        contestant = kind(folder / "fp32", folder, threads)
        try:
            with contestant:
                console.print(f"[dim]{kind.name}, {threads} thread(s)[/]")
                found[kind.name] = batches(contestant, plan) | agreement(contestant, folder, plan)
                capacity = capacity or found[kind.name]["batches"][max(plan.batches)]["tokens_per_s"] / plan.new
                found[kind.name]["poisson"] = under_load(contestant, plan, capacity)
        except NotInstalled as missing:
            found[kind.name] = {"absent": str(missing)}
    show(found, threads, plan, console)
    rows = {option.name: with_option(option, folder, threads, plan) for option in OPTIONS}
    show_options(rows, threads, plan, console)
    return {"contestants": found, "requests_per_s_of_the_reference": capacity, "options": rows}


def batches(contestant: Contestant, plan: Plan, prompt: int = PROMPT, shared: int = 0) -> dict[str, Any]:
    """At each batch size: tokens per second of whole answers and of streamed ones, and the time to the first token."""
    prompts = Prompts(0, prompt, VOCABULARY, shared)
    rows = {}
    for size in plan.batches:
        timed(contestant, prompts.batch(size, min(16, plan.new)), streamed=True)
        whole = repeat(contestant, prompts, size, plan, streamed=False)
        streamed = repeat(contestant, prompts, size, plan, streamed=True)
        rows[size] = {
            "tokens_per_s": max(tokens_per_second(answers) for _, answers in whole),
            "streamed_tokens_per_s": max(tokens_per_second(answers) for _, answers in streamed),
            "first_token_s": median(first_token_s(requests, answers, 50) for requests, answers in streamed),
        }
    return {"batches": rows}


def repeat(
    contestant: Contestant, prompts: Prompts, size: int, plan: Plan, streamed: bool
) -> list[tuple[list[Request], list[Answer]]]:
    """A few runs, fewer where one takes long."""
    found, began = [], time.monotonic()
    while len(found) < plan.repeats and (not found or time.monotonic() - began < REPEAT_BUDGET_S):
        requests = prompts.batch(size, plan.new)
        found.append((requests, timed(contestant, requests, streamed)))
    return found


def timed(contestant: Contestant, requests: list[Request], streamed: bool) -> list[Answer]:
    answers = contestant.run(requests, streamed)
    for request, answer in zip(requests, answers, strict=True):
        if len(answer.tokens) != request.new_tokens:
            raise RuntimeError(f"{contestant.name} gave {len(answer.tokens)} tokens, not {request.new_tokens}")
    return answers


def under_load(contestant: Contestant, plan: Plan, capacity: float) -> dict[str, Any]:
    """Requests that come by chance, at shares of `capacity` (requests per second); the same ones for every engine."""
    rows = {}
    for share in plan.shares:
        requests = Prompts(1, PROMPT, VOCABULARY).poisson(plan.arrivals, plan.new, share * capacity)
        answers = timed(contestant, requests, streamed=True)
        rows[share] = {
            "requests_per_s": share * capacity,
            "tokens_per_s": tokens_per_second(answers),
            "first_token_p50_s": first_token_s(requests, answers, 50),
            "first_token_p90_s": first_token_s(requests, answers, 90),
            "between_tokens_p50_s": between_tokens_s(answers),
        }
    return rows


def agreement(contestant: Contestant, folder: Path, plan: Plan) -> dict[str, Any]:
    """The share of tokens that our model takes too, near ties included. RuntimeError if it is another model."""
    requests = Prompts(2, PROMPT, VOCABULARY).batch(8, plan.new)
    answers = timed(contestant, requests, streamed=False)
    tokens = torch.tensor([request.prompt + answer.tokens for request, answer in zip(requests, answers, strict=True)])
    with torch.inference_mode():
        logits = read_bundle(folder / "fp32").build()(tokens)[:, PROMPT - 1 : -1]
    taken = logits.gather(-1, tokens[:, PROMPT:].unsqueeze(-1)).squeeze(-1)
    share = (logits.amax(-1) - taken <= NEAR_TIE).float().mean().item()
    if share < LEAST_AGREEMENT:
        raise RuntimeError(f"{contestant.name} computes another model: {share:.1%} of its tokens are the likeliest")
    return {"agreement": share}


def with_option(option: Option, folder: Path, threads: int, plan: Plan) -> dict[str, Any]:
    """Our engine with one option."""
    with Isthmus(folder / option.bundle, folder, threads, option.temperature, option.engine) as engine:
        return batches(engine, plan, option.prompt, option.shared)


def show(found: dict[str, Any], threads: int, plan: Plan, console: Console) -> None:
    present = {name: facts for name, facts in found.items() if "absent" not in facts}
    rivals = [name for name in present if name != Isthmus.name]
    table = Table(title=f"output tokens/s, {threads} thread(s)", title_justify="left")
    table.add_column("batch", justify="right")
    for name in present:
        table.add_column(name, justify="right")
    for name in rivals:
        table.add_column(f"ours / {name}", justify="right", style="bold")
    for size in plan.batches:
        rate = {name: facts["batches"][size]["tokens_per_s"] for name, facts in present.items()}
        ratios = [f"{rate[Isthmus.name] / rate[name]:.2f}x" for name in rivals]
        table.add_row(str(size), *(f"{value:,.0f}" for value in rate.values()), *ratios)
    console.print(table)
    console.print(_first_tokens(present, plan, threads))
    for name, facts in found.items():
        if "absent" in facts:
            console.print(f"{name} is {facts['absent']}")


def _first_tokens(present: dict[str, Any], plan: Plan, threads: int) -> Table:
    table = Table(title=f"time to the first token, ms, {threads} thread(s)", title_justify="left")
    table.add_column("load")
    for name in present:
        table.add_column(name, justify="right")
    for size in plan.batches:
        waits = (facts["batches"][size]["first_token_s"] for facts in present.values())
        table.add_row(f"batch {size}", *(f"{1000 * wait:,.0f}" for wait in waits))
    for share in plan.shares:
        rows = [facts["poisson"][share] for facts in present.values()]
        label = f"Poisson, {rows[0]['requests_per_s']:.2f} requests/s"
        for name, key in (("p50", "first_token_p50_s"), ("p90", "first_token_p90_s")):
            table.add_row(f"{label}, {name}", *(f"{1000 * row[key]:,.0f}" for row in rows))
    return table


def show_options(rows: dict[str, Any], threads: int, plan: Plan, console: Console) -> None:
    table = Table(title=f"options of our engine: output tokens/s, {threads} thread(s)", title_justify="left")
    table.add_column("option")
    for size in plan.batches:
        table.add_column(f"batch {size}", justify="right")
    for name, facts in rows.items():
        table.add_row(name, *(f"{facts['batches'][size]['tokens_per_s']:,.0f}" for size in plan.batches))
    console.print(table)


if __name__ == "__main__":
    main()
