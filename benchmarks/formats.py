"""What each format costs in tokens: emulators against fp32, on a small model with heavy-tailed weights.

    python -m benchmarks.formats [--seeds 3] [--tokens 2048]

The model has DeepSeek-V3's parts and random weights, drawn from Student's t with three degrees of freedom and, in its
norms, factors from a log-normal, so that some channels are outliers. Its tokens are random too. For each format: the
mean KL divergence of the next token's distribution from fp32's, in nats, how often the likeliest token is the same,
and how many bits a weight takes. Formats that need a calibration get one from other tokens. bf16 is the yardstick.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
from torch import Tensor

from benchmarks.conditions import store
from isthmus.formats import format_names, get_format
from isthmus.model.model import Model
from isthmus.recipe.architecture import DeepseekSection
from tests.support.calibrated import calibrate

ARCHITECTURE = DeepseekSection(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=512,
    moe_intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    q_lora_rank=96,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=32,
    v_head_dim=32,
    n_routed_experts=8,
    num_experts_per_tok=2,
    num_nextn_predict_layers=0,
    max_position_embeddings=128,
)
LENGTH = 128


def heavy_tailed(seed: int) -> dict[str, Tensor]:
    """The state of a model whose matrices have t-distributed entries of variance 1 / inputs.

    Embeddings are of size one, and what adds to them is scaled by 1 / sqrt(2 layers), as GPT-2 does.
    """
    generator = torch.Generator().manual_seed(seed)
    state = Model(ARCHITECTURE).initialise(seed).state_dict()
    for name, tensor in state.items():
        if "norm" in name:
            tensor.copy_(torch.randn(tensor.shape, generator=generator).mul_(0.5).exp_())
        elif "embed" in name:
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        elif tensor.dim() == 2:
            normal, chi = torch.randn(tensor.shape, generator=generator), torch.zeros(tensor.shape)
            for _ in range(3):
                chi += torch.randn(tensor.shape, generator=generator).square()
            adds = "o_proj" in name or "down_proj" in name
            gain = 1 / math.sqrt(2 * ARCHITECTURE.num_hidden_layers) if adds else 1.0
            tensor.copy_((normal / (chi / 3).sqrt()).clamp_(-50, 50) * (gain / math.sqrt(3 * tensor.shape[1])))
    return state


def drawn(tokens: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(ARCHITECTURE.vocab_size, (tokens // LENGTH, LENGTH), generator=generator)


def compare(reference: Tensor, logits: Tensor) -> tuple[float, float]:
    """Mean KL divergence in nats, and the share of equal first choices."""
    p, q = reference.double().log_softmax(-1), logits.double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    return kl, (reference.argmax(-1) == logits.argmax(-1)).double().mean().item()


def measure(seed: int, tokens: int) -> dict[str, dict[str, float]]:
    state = heavy_tailed(seed)
    known = calibrate(state, ARCHITECTURE, drawn(tokens, seed + 1000))
    held_out = drawn(tokens, seed)
    reference = get_format("fp32").build(ARCHITECTURE, get_format("fp32").export(state, ARCHITECTURE))(held_out)
    found = {}
    for name in format_names():
        stored = get_format(name).export(state, ARCHITECTURE, known)
        kl, same = compare(reference, get_format(name).build(ARCHITECTURE, stored)(held_out))
        bits = 8 * sum(tensor.nbytes for tensor in stored.values()) / sum(tensor.numel() for tensor in state.values())
        found[name] = {"kl": kl, "top1": same, "bits_per_weight": bits}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=2048)
    options = parser.parse_args()
    with torch.inference_mode():
        runs = [measure(seed, options.tokens) for seed in range(options.seeds)]
    table: dict[str, Any] = {}
    for name in runs[0]:
        columns = {key: [run[name][key] for run in runs] for key in runs[0][name]}
        table[name] = {key: sum(values) / len(values) for key, values in columns.items()} | {
            "kl_by_seed": columns["kl"]
        }
        mean = table[name]
        print(f"{name:18} KL {mean['kl']:.2e}  top-1 {mean['top1']:.2%}  {mean['bits_per_weight']:.2f} bits")
    store("formats", {"seeds": options.seeds, "tokens": options.tokens, "formats": table})


if __name__ == "__main__":
    main()
