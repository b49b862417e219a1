"""Balancing: outlier channels of activations are made smaller, and the weights that read them larger by as much.

SmoothQuant (arXiv 2211.10438, equation 4): channel j is divided by s_j = max|x_j|^alpha / max|w_j|^(1 - alpha). The
factors are folded into what writes the channel (a norm's gain, or the rows of the matrix before) and into all that read
it. int8 then rounds it less. They are rounded to powers of two, so every product and every sum of the float model stays
what it was to the bit, and a weight that bf16 holds is held after balancing too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from isthmus.formats.parts.ranges import Calibration
from isthmus.recipe.architecture import ModelSection

ALPHA = 0.5
LARGEST_EXPONENT = 13
"""Factors stay within 2^13 in both directions, a range that fp32 gains and bf16 tensors hold well."""
_FP32_BIAS, _FP32_MANTISSA = 127, 23


@dataclass(frozen=True)
class Balance:
    """The change of basis of a model, by name of a tensor: exponents of two in int8.

    A tensor [M, K] or [M] is multiplied by 2^columns [K] and divided by 2^rows [M]. Tensors that share their factors
    hold the same object. A tensor in neither stays as it is.
    """

    rows: dict[str, Tensor] = field(default_factory=dict)
    columns: dict[str, Tensor] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.rows or self.columns)

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        """What a tensor of the source becomes, in fp32; the tensor itself where it stays as it is."""
        rows, columns = self.rows.get(name), self.columns.get(name)
        if rows is None and columns is None:
            return tensor
        changed = tensor.detach().float()
        if columns is not None:
            changed = changed * powers(columns)
        if rows is not None:
            factors = powers(rows)
            changed = changed / (factors if changed.dim() == 1 else factors[:, None])
        return changed

    def state(self, source: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The source's tensors in the balanced basis, each of them made when it is asked for."""
        return _Balanced(source, self) if self else source

    def calibration(self, known: Calibration) -> Calibration:
        """What a calibration of the source says of the balanced model: each input divided by its factor, exactly."""
        factors = {name.removesuffix(".weight"): powers(columns) for name, columns in self.columns.items()}
        one = torch.ones(1)
        low = {path: tensor / factors.get(path, one) for path, tensor in known.low.items()}
        high = {path: tensor / factors.get(path, one) for path, tensor in known.high.items()}
        return replace(known, low=low, high=high, gram=_BalancedGram(known.gram, factors))


class _BalancedGram(Mapping[str, Tensor]):
    """Second moments of inputs divided by `factors`, each made when it is asked for."""

    def __init__(self, known: Mapping[str, Tensor], factors: Mapping[str, Tensor]):
        self._known, self._factors = known, factors

    def __getitem__(self, path: str) -> Tensor:
        gram, factors = self._known[path], self._factors.get(path)
        return gram if factors is None else gram / factors / factors[:, None]

    def __contains__(self, path: object) -> bool:
        return path in self._known

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)


class _Balanced(Mapping[str, Tensor]):
    def __init__(self, source: Mapping[str, Tensor], balance: Balance):
        self._source, self._balance = source, balance

    def __getitem__(self, name: str) -> Tensor:
        return self._balance.apply(name, self._source[name])

    def rows(self, name: str, rows: range) -> Tensor:
        """Some rows of a tensor; where it stays as it is no others are read, if the source can read some alone."""
        if name in self._balance.rows or name in self._balance.columns:
            return self[name][rows.start : rows.stop]
        read: Any = getattr(self._source, "rows", None)
        return self._source[name][rows.start : rows.stop] if read is None else read(name, rows)

    def __contains__(self, name: object) -> bool:
        return name in self._source

    def __iter__(self) -> Iterator[str]:
        return iter(self._source)

    def __len__(self) -> int:
        return len(self._source)


@dataclass(frozen=True)
class Seam:
    """Where a channel is written and read. The rows, or gains, of `writers` are divided, those of them that `places`
    names if it is given; `readers` are weights whose columns are multiplied, and whose inputs say how large the channel
    is.

    `shared` heads of a reader read each channel once: its columns repeat in groups of `width`.
    """

    writers: tuple[str, ...]
    readers: tuple[str, ...]
    places: Tensor | None = None
    shared: int = 1
    width: int = 0


def find_balance(
    state: Mapping[str, Tensor], architecture: ModelSection, calibration: Calibration, alpha: float = ALPHA
) -> Balance:
    """The factors for a model and what was seen of its inputs. Reads each weight of the state once, and keeps none.

    A channel that no token was seen in, because nothing of what reads it was calibrated, stays as it is.
    """
    rows: dict[str, Tensor] = {}
    columns: dict[str, Tensor] = {}
    for seam in _seams(state, architecture):
        factors = _exponents(state, seam, calibration, alpha)
        if factors is None:
            continue
        for name in seam.writers:
            rows[name] = factors if seam.places is None else _at(seam.places, factors, len(state[name]))
        columns |= dict.fromkeys(seam.readers, _repeated(factors, seam))
    return Balance(rows, columns)


def balance(
    state: Mapping[str, Tensor], architecture: ModelSection, calibration: Calibration, alpha: float = ALPHA
) -> dict[str, Tensor]:
    """The balanced weights (fp32); the given ones are left as they are."""
    found = find_balance(state, architecture, calibration, alpha)
    return {name: tensor.detach().float().clone() for name, tensor in found.state(state).items()}


def powers(exponents: Tensor) -> Tensor:
    """2^exponent in fp32, exactly, of exponents in int8."""
    return (exponents.to(torch.int32) + _FP32_BIAS).bitwise_left_shift_(_FP32_MANTISSA).view(torch.float32)


def _exponents(state: Mapping[str, Tensor], seam: Seam, calibration: Calibration, alpha: float) -> Tensor | None:
    known = [path for name in seam.readers if (path := name.removesuffix(".weight")) in calibration.high]
    if not known:
        return None
    largest = torch.stack([torch.maximum(calibration.high[p].abs(), calibration.low[p].abs()) for p in known]).amax(0)
    weights = torch.stack([state[name].detach().float().abs().amax(0) for name in seam.readers]).amax(0)
    if seam.shared > 1:
        largest, weights = (part.view(-1, seam.shared, seam.width).amax(1).flatten() for part in (largest, weights))
    alive = (largest > 0) & (weights > 0)
    factors = torch.where(alive, largest.clamp_min(1e-12) ** alpha / weights.clamp_min(1e-12) ** (1 - alpha), 1.0)
    return factors.log2().round().clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT).to(torch.int8)


def _repeated(factors: Tensor, seam: Seam) -> Tensor:
    if seam.shared == 1:
        return factors
    return factors.view(-1, 1, seam.width).expand(-1, seam.shared, -1).flatten()


def _at(places: Tensor, factors: Tensor, length: int) -> Tensor:
    whole = torch.zeros(length, dtype=factors.dtype)
    whole[places] = factors
    return whole


def _seams(state: Mapping[str, Tensor], architecture: ModelSection) -> Iterator[Seam]:
    a: Any = architecture
    names = _names_by_layer(state)
    for index in range(a.num_hidden_layers + a.num_nextn_predict_layers):
        layer = f"model.layers.{index}"
        if f"{layer}.self_attn.kv_b_proj.weight" in state:
            yield from _latent_seams(layer, a)
        elif f"{layer}.self_attn.v_proj.weight" in state:
            yield from _grouped_seams(state, layer, a)
        yield from _mlp_seams(names.get(index, []), layer, a)


def _names_by_layer(state: Mapping[str, Tensor]) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for name in state:
        parts = name.split(".")
        if parts[:2] == ["model", "layers"] and len(parts) > 3:
            found.setdefault(int(parts[2]), []).append(name)
    return found


def _latent_seams(layer: str, a: Any) -> Iterator[Seam]:
    attention = f"{layer}.self_attn"
    first = "q_proj" if a.q_lora_rank is None else "q_a_proj"
    yield _after(f"{layer}.input_layernorm", [f"{attention}.{first}", f"{attention}.kv_a_proj_with_mqa"])
    if a.q_lora_rank is not None:
        yield _after(f"{attention}.q_a_layernorm", [f"{attention}.q_b_proj"])
    per_head = a.qk_nope_head_dim + a.v_head_dim
    starts = torch.arange(a.num_attention_heads)[:, None] * per_head + a.qk_nope_head_dim
    values = (starts + torch.arange(a.v_head_dim)).flatten()
    yield Seam((f"{attention}.kv_b_proj.weight",), (f"{attention}.o_proj.weight",), values)


def _grouped_seams(state: Mapping[str, Tensor], layer: str, a: Any) -> Iterator[Seam]:
    attention = f"{layer}.self_attn"
    yield _after(f"{layer}.input_layernorm", [f"{attention}.{part}_proj" for part in "qkv"])
    writers = tuple(name for part in ("weight", "bias") if (name := f"{attention}.v_proj.{part}") in state)
    group = a.num_attention_heads // a.num_key_value_heads
    yield Seam(writers, (f"{attention}.o_proj.weight",), shared=group, width=a.head_size)


def _mlp_seams(names: list[str], layer: str, a: Any) -> Iterator[Seam]:
    """Into the MLP, whose router reads the same channels, and into every down projection behind a plain SwiGLU."""
    mlp = f"{layer}.mlp"
    mine = [name for name in names if name.startswith(f"{mlp}.")]
    readers = [name.removesuffix(".weight") for name in mine if _reads_norm(name)]
    yield _after(f"{layer}.post_attention_layernorm", readers)
    if getattr(a, "swiglu_limit", None) is not None:
        return
    for name in mine:
        if name.endswith(".down_proj.weight"):
            yield Seam((name.replace(".down_proj.", ".up_proj."),), (name,))


def _reads_norm(name: str) -> bool:
    return name.endswith((".gate_proj.weight", ".up_proj.weight", ".mlp.gate.weight"))


def _after(norm: str, readers: list[str]) -> Seam:
    return Seam((f"{norm}.weight",), tuple(f"{reader}.weight" for reader in readers))
