"""Balancing: outlier channels of activations are made smaller, and the weights that read them larger by as much.

SmoothQuant (arXiv 2211.10438, equation 4): channel j is divided by s_j = max|x_j|^alpha / max|w_j|^(1 - alpha). The
factors are folded into what writes the channel (a norm's gain, or the rows of the matrix before) and into all that read
it. The model computes the same function; int8 rounds it less.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from isthmus.formats.calibration.ranges import Calibration
from isthmus.recipe.architecture import DeepseekSection, GroupedSection, ModelSection

ALPHA = 0.5
LARGEST = 1e4
"""Factors stay within a range that fp32 gains and bf16 tensors hold well."""


@dataclass(frozen=True)
class Seam:
    """Where a channel is written and read. `writers` are (tensor, rows) whose rows, or gains, are divided; `readers`
    are weights whose columns are multiplied; those of `watched` that were calibrated say how large the channel is.

    `shared` heads of a reader read each channel once: its columns repeat in groups of `width`.
    """

    writers: tuple[tuple[str, Tensor], ...]
    readers: tuple[str, ...]
    watched: tuple[str, ...]
    shared: int = 1
    width: int = 0


def balance(
    state: dict[str, Tensor], architecture: ModelSection, calibration: Calibration, alpha: float = ALPHA
) -> dict[str, Tensor]:
    """The balanced weights (fp32); the given ones are left as they are."""
    new = {name: tensor.detach().float().clone() for name, tensor in state.items()}
    for seam in _seams(new, architecture):
        factors = _factors(new, seam, calibration, alpha)
        if factors is None:
            continue
        for name, rows in seam.writers:
            new[name][rows] /= factors if new[name].dim() == 1 else factors[:, None]
        columns = _columns(factors, seam)
        for name in seam.readers:
            new[name] *= columns
    return new


def _factors(state: dict[str, Tensor], seam: Seam, calibration: Calibration, alpha: float) -> Tensor | None:
    known = [path for path in seam.watched if path in calibration.high]
    if not known:
        return None
    largest = torch.stack([torch.maximum(calibration.high[p].abs(), calibration.low[p].abs()) for p in known]).amax(0)
    weights = torch.stack([state[name].abs().amax(0) for name in seam.readers]).amax(0)
    if seam.shared > 1:
        largest, weights = (part.view(-1, seam.shared, seam.width).amax(1).flatten() for part in (largest, weights))
    alive = (largest > 0) & (weights > 0)
    factors = torch.where(alive, largest.clamp_min(1e-12) ** alpha / weights.clamp_min(1e-12) ** (1 - alpha), 1.0)
    return factors.clamp(1 / LARGEST, LARGEST)


def _columns(factors: Tensor, seam: Seam) -> Tensor:
    if seam.shared == 1:
        return factors
    return factors.view(-1, 1, seam.width).expand(-1, seam.shared, -1).flatten()


def _seams(state: dict[str, Tensor], architecture: ModelSection) -> Iterator[Seam]:
    a = architecture
    for index in range(a.num_hidden_layers + a.num_nextn_predict_layers):
        layer = f"model.layers.{index}"
        if isinstance(a, DeepseekSection):
            yield from _latent_seams(state, layer, a)
        elif isinstance(a, GroupedSection):
            yield from _grouped_seams(state, layer, a)
        yield from _mlp_seams(state, layer, a)


def _latent_seams(state: dict[str, Tensor], layer: str, a: DeepseekSection) -> Iterator[Seam]:
    attention = f"{layer}.self_attn"
    first = "q_proj" if a.q_lora_rank is None else "q_a_proj"
    yield _after_norm(state, f"{layer}.input_layernorm", [f"{attention}.{first}", f"{attention}.kv_a_proj_with_mqa"])
    if a.q_lora_rank is not None:
        yield _after_norm(state, f"{attention}.q_a_layernorm", [f"{attention}.q_b_proj"])
    per_head = a.qk_nope_head_dim + a.v_head_dim
    starts = torch.arange(a.num_attention_heads)[:, None] * per_head + a.qk_nope_head_dim
    values = (starts + torch.arange(a.v_head_dim)).flatten()
    output = f"{attention}.o_proj"
    yield Seam(((f"{attention}.kv_b_proj.weight", values),), (f"{output}.weight",), (output,))


def _grouped_seams(state: dict[str, Tensor], layer: str, a: GroupedSection) -> Iterator[Seam]:
    attention = f"{layer}.self_attn"
    yield _after_norm(state, f"{layer}.input_layernorm", [f"{attention}.{part}_proj" for part in "qkv"])
    rows = torch.arange(a.num_key_value_heads * a.head_size)
    writers = [(f"{attention}.v_proj.weight", rows)]
    if f"{attention}.v_proj.bias" in state:
        writers.append((f"{attention}.v_proj.bias", rows))
    output, group = f"{attention}.o_proj", a.num_attention_heads // a.num_key_value_heads
    yield Seam(tuple(writers), (f"{output}.weight",), (output,), shared=group, width=a.head_size)


def _mlp_seams(state: dict[str, Tensor], layer: str, a: ModelSection) -> Iterator[Seam]:
    """Into the MLP, whose router reads the same channels, and into every down projection behind a plain SwiGLU."""
    mlp = f"{layer}.mlp"
    readers = [name.removesuffix(".weight") for name in state if name.startswith(f"{mlp}.") and _reads_norm(name)]
    yield _after_norm(state, f"{layer}.post_attention_layernorm", readers)
    if getattr(a, "swiglu_limit", None) is not None:
        return
    for name in list(state):
        if name.startswith(f"{mlp}.") and name.endswith(".down_proj.weight"):
            up = name.replace(".down_proj.", ".up_proj.")
            rows = torch.arange(len(state[up]))
            yield Seam(((up, rows),), (name,), (name.removesuffix(".weight"),))


def _reads_norm(name: str) -> bool:
    return name.endswith((".gate_proj.weight", ".up_proj.weight", ".mlp.gate.weight"))


def _after_norm(state: dict[str, Tensor], norm: str, readers: list[str]) -> Seam:
    gain = f"{norm}.weight"
    rows = torch.arange(len(state[gain]))
    return Seam(((gain, rows),), tuple(f"{reader}.weight" for reader in readers), tuple(readers))
