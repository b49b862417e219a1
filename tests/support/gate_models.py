"""Random models for the test of the gate: random architectures with every part, and weights with heavy tails.

Quantisation looks on them as on trained models: norm gains and weight columns are lognormal, a few channels carry much
more than the others, and router biases have both signs.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from isthmus.formats.parts.assemble import HEAD
from isthmus.model.model import Model
from isthmus.recipe.architecture import DeepseekSection, DenseSection, Llama3Scaling, ModelSection, YarnScaling

PROMPTS, PROMPT_TOKENS = 4, 24
RL_STEP = 2e-3
"""Relative size of what one RL step changes in a weight matrix."""


@dataclass(frozen=True)
class RandomModel:
    """Trained weights `state` (fp32, published names), the same one version ago, and prompts for golden inputs."""

    seed: int
    architecture: ModelSection
    state: dict[str, Tensor]
    previous: dict[str, Tensor]

    def prompts(self, salt: int = 0) -> list[list[int]]:
        """Random token ids, others for each salt."""
        draw = random.Random(f"prompts {self.seed} {salt}")
        size = self.architecture.vocab_size
        return [[draw.randrange(size) for _ in range(PROMPT_TOKENS)] for _ in range(PROMPTS)]


def random_model(seed: int) -> RandomModel:
    """Two of three are DeepSeek-V3, the others Qwen2 or Llama."""
    draw = random.Random(f"model {seed}")
    kind = draw.choice(["deepseek_v3"] * 4 + ["qwen2", "llama"])
    architecture = random_deepseek(draw) if kind == "deepseek_v3" else random_dense(draw, kind)
    state = _heavy_tailed(Model(architecture).initialise(seed), seed)
    return RandomModel(seed, architecture, state, one_step_earlier(state, seed))


def random_deepseek(draw: random.Random, **fixed: object) -> DeepseekSection:
    """Attention's output projection, or the shared expert, is square in most; kv_a has no multiple of 128 rows."""
    heads, hidden = draw.choice([2, 4]), draw.choice([96, 128])
    n_group = draw.choice([1, 2, 4, 4])
    experts = draw.choice([8, 8, 16])
    topk_group = draw.randint(1, n_group)
    layers = draw.choice([2, 2, 3, 4])
    drawn = {
        "vocab_size": 199,
        "hidden_size": hidden,
        "intermediate_size": draw.choice([hidden, 160]),
        "moe_intermediate_size": draw.choice([32, 48]),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "q_lora_rank": draw.choice([None, 64, 80]),
        "kv_lora_rank": draw.choice([128, 160]),
        "qk_nope_head_dim": draw.choice([16, 24]),
        "qk_rope_head_dim": draw.choice([8, 16]),
        "v_head_dim": draw.choice([hidden // heads, hidden // heads, 20]),
        "n_routed_experts": experts,
        "n_shared_experts": draw.choice([1, 2]),
        "num_experts_per_tok": draw.randint(2, min(4, topk_group * (experts // n_group))),
        "n_group": n_group,
        "topk_group": topk_group,
        "norm_topk_prob": draw.random() < 0.8,
        "routed_scaling_factor": draw.choice([1.0, 1.5, 2.5]),
        "first_k_dense_replace": draw.randint(0, layers - 1),
        "swiglu_limit": draw.choice([None, 1.0, 2.0]),
        "num_nextn_predict_layers": draw.choice([0, 1, 1]),
        "max_position_embeddings": 256,
        "rope_theta": draw.choice([100.0, 10000.0]),
        "rope_scaling": draw.choice([None, _random_yarn(draw)]),
        "rms_norm_eps": draw.choice([1e-6, 1e-5]),
        "initializer_range": 0.1,
    }
    return DeepseekSection(**{**drawn, **fixed})


def random_dense(draw: random.Random, kind: str, **fixed: object) -> DenseSection:
    """Query and output projections are square in half of them."""
    kv_heads, group = draw.choice([1, 2]), draw.choice([2, 4])
    heads = kv_heads * group
    hidden = heads * draw.choice([12, 16])
    drawn = {
        "model_type": kind,
        "vocab_size": 199,
        "hidden_size": hidden,
        "intermediate_size": draw.choice([112, 160]),
        "num_hidden_layers": draw.randint(2, 4),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": draw.choice([None, 16]),
        "max_position_embeddings": 256,
        "rope_theta": draw.choice([10000.0, 500000.0]),
        "rope_scaling": draw.choice([None, _llama3()]),
        "rms_norm_eps": draw.choice([1e-6, 1e-5]),
        "initializer_range": 0.1,
        "tie_word_embeddings": draw.random() < 0.3,
    }
    return DenseSection(**{**drawn, **fixed})


def one_step_earlier(state: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """The weights one small update ago: each matrix differs by RL_STEP of its size, norms and biases by less."""
    generator = torch.Generator().manual_seed(seed + 77)
    earlier = {}
    for name, tensor in state.items():
        step = torch.randn(tensor.shape, generator=generator) * tensor.std(correction=0)
        earlier[name] = tensor - RL_STEP * step
    return earlier


def _random_yarn(draw: random.Random) -> YarnScaling:
    return YarnScaling(
        factor=draw.choice([4.0, 40.0]),
        original_max_position_embeddings=draw.choice([32, 64]),
        mscale=draw.choice([1.0, 0.7]),
        mscale_all_dim=draw.choice([1.0, 0.8]),
    )


def _llama3() -> Llama3Scaling:
    return Llama3Scaling(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)


def _heavy_tailed(model: Model, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    signs = -1.0 if seed % 2 else 1.0
    state = {}
    for name, tensor in model.state_dict().items():
        if name == HEAD and model.architecture.tie_word_embeddings:
            continue
        tensor = tensor.detach().clone()
        if name.endswith("e_score_correction_bias"):
            tensor = torch.randn(tensor.shape, generator=generator) * 0.3 + signs * 0.4
        elif name.endswith("bias"):
            tensor = torch.randn(tensor.shape, generator=generator) * 0.3
        elif "norm" in name:
            tensor = _lognormal(tensor.shape, 0.5, generator)
        elif tensor.dim() == 2 and "embed" not in name:
            tensor *= _lognormal(tensor.shape[-1:], 0.5, generator)
        state[name] = tensor
    return state


def _lognormal(shape: torch.Size, sigma: float, generator: torch.Generator) -> Tensor:
    """A median of 1, and one value in fifty four times as large."""
    values = (torch.randn(shape, generator=generator) * sigma).exp()
    return torch.where(torch.rand(shape, generator=generator) < 0.02, 4 * values, values)
