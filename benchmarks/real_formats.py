"""What each format costs a real model: KL to the trained one, in nats per token, on the model's own answers.

    python -m benchmarks.real_formats [--layers N] [--only NAME ...]
    python -m benchmarks.real_formats --answer          # writes tests/real/answers.jsonl anew

The model is SmolLM2-135M-Instruct (tests/support/real_model.py). tests/real/answers.jsonl holds two dozen chat prompts
with answers that it gave, sampled once; the first half calibrates, and the answers of the other half are what the KL is
measured on.
Every bundle is written by `isthmus convert`, as a user would, and its exact emulator is compared with the trained
weights in fp32. The interval is a bootstrap over sequences. bf16 is the yardstick.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.conditions import store
from isthmus.formats import get_format
from isthmus.formats.files.bundle import read_bundle
from isthmus.formats.files.published import weight_files
from isthmus.model.model import Model
from isthmus.progress import Watch
from isthmus.tools.convert import Options, execute
from tests.support.real_model import first_layers, real_checkpoint, trained_state

ANSWERS = Path(__file__).parents[1] / "tests" / "real" / "answers.jsonl"
BALANCED, GPTQ = {"balance": True}, {"rounding": "gptq"}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bf16": ("bf16", {}),
    "w8a8": ("w8a8", {}),
    "w8a8, balanced": ("w8a8", BALANCED),
    "w8a8, balanced, gptq": ("w8a8", BALANCED | GPTQ),
    "w8a8_static": ("w8a8_static", {}),
    "modelslim_dynamic": ("modelslim_dynamic", {}),
    "modelslim_mixed": ("modelslim_mixed", {}),
    "modelslim_mixed, balanced": ("modelslim_mixed", BALANCED),
    "modelslim": ("modelslim", {}),
    "modelslim, balanced": ("modelslim", BALANCED),
    "fp8": ("fp8", {}),
    "mxfp8": ("mxfp8", {}),
    "mixed, budget 0.005": ("modelslim_mixed", {"budget": 0.005, "calibrate_tokens": 512}),
}
NEEDS_CALIBRATION = ("w8a8_static", "modelslim")
RESAMPLES = 2000


@dataclass(frozen=True)
class Chat:
    """Tokens of a prompt and its answer, which begins at `answer_at`."""

    tokens: list[int]
    answer_at: int


def chats() -> list[Chat]:
    read = (json.loads(line) for line in ANSWERS.read_text().splitlines())
    return [Chat(one["tokens"], one["answer_at"]) for one in read]


def trained_model(folder: Path) -> Model:
    return get_format("fp32").build(*trained_state(folder))


@torch.inference_mode()
def log_probabilities(model: Model, chat: Chat) -> Tensor:
    """Of each token of an answer, [T, V] in fp32."""
    hidden = model.hidden(torch.tensor([chat.tokens]))[0, chat.answer_at - 1 : -1]
    return model.logits(hidden).float().log_softmax(-1)


@torch.inference_mode()
def compare(reference: list[Tensor], model: Model, asked: list[Chat]) -> dict[str, float]:
    """Mean KL(trained || model) per token with a 95 % interval over sequences, and the share of equal first choices."""
    sums, counts, same = [], [], 0
    for wanted, chat in zip(reference, asked, strict=True):
        found = log_probabilities(model, chat)
        sums.append((wanted.exp() * (wanted - found)).sum(-1).double().sum())
        counts.append(len(wanted))
        same += int((wanted.argmax(-1) == found.argmax(-1)).sum())
    total, tokens = torch.stack(sums), torch.tensor(counts, dtype=torch.float64)
    picks = torch.randint(len(asked), (RESAMPLES, len(asked)), generator=torch.Generator().manual_seed(0))
    drawn = (total[picks].sum(1) / tokens[picks].sum(1)).sort().values
    return {
        "kl": float(total.sum() / tokens.sum()),
        "kl_low": float(drawn[int(0.025 * RESAMPLES)]),
        "kl_high": float(drawn[int(0.975 * RESAMPLES)]),
        "top1": same / int(tokens.sum()),
    }


def measure(source: Path, name: str, calibration: Path, reference: list[Tensor], asked: list[Chat]) -> dict[str, float]:
    format_name, options = VARIANTS[name]
    if options or format_name in NEEDS_CALIBRATION:
        options = {"calibrate": calibration, **options}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "bundle"
        execute(source, out, Options(format_name, **options), Watch(quiet=True))
        seconds = time.monotonic() - began
        size = sum(path.stat().st_size for path in weight_files(out))
        found = compare(reference, read_bundle(out).build(), asked)
    return {**found, "megabytes": size / 1e6, "seconds_to_convert": seconds}


def answer(folder: Path, tokens: int = 96) -> None:
    """Let the model answer the prompts of `ANSWERS` anew."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    words = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    asked = [json.loads(line)["question"] for line in ANSWERS.read_text().splitlines()]
    asking = [[{"role": "user", "content": prompt}] for prompt in asked]
    given = words.apply_chat_template(
        asking, add_generation_prompt=True, return_tensors="pt", padding=True, return_dict=True
    )
    torch.manual_seed(0)
    found = model.generate(**given, max_new_tokens=tokens, do_sample=True, temperature=0.8, top_k=0)
    lines = []
    for prompt, row, mask in zip(asked, found.tolist(), given["attention_mask"].tolist(), strict=True):
        kept = row[mask.index(1) :]
        end = kept.index(words.eos_token_id, sum(mask)) + 1 if words.eos_token_id in kept[sum(mask) :] else len(kept)
        lines.append(json.dumps({"question": prompt, "answer_at": sum(mask), "tokens": kept[:end]}))
    ANSWERS.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, help="the first layers alone")
    parser.add_argument("--only", nargs="*", choices=list(VARIANTS))
    parser.add_argument("--answer", action="store_true")
    options = parser.parse_args()
    source = real_checkpoint()
    if options.answer:
        answer(source)
        return
    asked = chats()
    half = len(asked) // 2
    measured = asked[half:]
    with tempfile.TemporaryDirectory() as folder:
        if options.layers:
            source = first_layers(source, Path(folder) / "source", options.layers)
        calibration = Path(folder) / "calibration.jsonl"
        calibration.write_text("\n".join(json.dumps({"tokens": chat.tokens}) for chat in asked[:half]) + "\n")
        trained = trained_model(source)
        reference = [log_probabilities(trained, chat) for chat in measured]
        counts = {"tokens": sum(map(len, reference)), "calibration_tokens": sum(len(c.tokens) for c in asked[:half])}
        table = {}
        for name in options.only or VARIANTS:
            table[name] = one = measure(source, name, calibration, reference, measured)
            span = f"[{one['kl_low']:.4f}, {one['kl_high']:.4f}]"
            print(
                f"{name:34} KL {one['kl']:.4f} {span}  top-1 {one['top1']:.1%}  {one['megabytes']:.0f} MB"
                f"  {one['seconds_to_convert']:.0f} s",
                flush=True,
            )
            store("real_formats", {"layers": options.layers, **counts, "formats": table})


if __name__ == "__main__":
    main()
