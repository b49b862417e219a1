"""w8a8: int8 weights per output channel, int8 activations per token, in the layout of compressed-tensors.

Quantised: the query, kv_a and output projections of latent attention, all four of grouped-query attention, and gate, up
and down of every MLP and expert. In float: embeddings, output head, norms, biases, router, kv_b_proj (the absorbed form
of attention multiplies it into its neighbours) and eh_proj. For DeepSeek-V3 this is the choice of msmodelslim's
published recipe.

A quantised module stores `weight` (int8 [out, in]) and `weight_scale` (fp32 [out, 1]), made from the fp32 weights. What
stays in float is stored in bf16, the routing bias in fp32. The same tensors go into a bundle and over the wire at each
RL step, so what is verified is what is served and what generates.

The model built here holds int8 values as fp32 and multiplies them exactly (see int8.py); the rest runs in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.formats import Layout
from isthmus.formats.parts.assemble import TensorByTensor, export_float, fill, float_layout, unfilled
from isthmus.formats.parts.int8 import quantise_weight, quantised_matmul
from isthmus.formats.parts.quantised import QuantisedModule
from isthmus.formats.parts.ranges import Calibration
from isthmus.model.model import Model
from isthmus.model.moe import Experts, GatedMlp, swiglu
from isthmus.recipe.architecture import DeepseekSection, ModelSection

MLP_PARTS = ("gate_proj", "up_proj", "down_proj")
ATTENTION_PARTS = ("q_proj", "k_proj", "v_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj")


class W8A8(TensorByTensor):
    """Dynamic W8A8, symmetric on both sides."""

    name = "w8a8"
    dtype = "bfloat16"

    def export_one(
        self, name: str, tensor: Tensor, architecture: ModelSection, calibration: Calibration | None = None
    ) -> dict[str, Tensor]:
        if not is_quantised(name):
            return export_float(name, tensor, architecture, torch.bfloat16)
        values, scale = quantise_weight(tensor.detach())
        return {name: values, f"{name}_scale": scale}

    def layout(self, architecture: ModelSection) -> Layout:
        layout = float_layout(architecture, torch.bfloat16)
        for name in list(filter(is_quantised, layout)):
            _, shape = layout[name]
            layout[name] = (torch.int8, shape)
            layout[f"{name}_scale"] = (torch.float32, (shape[0], 1))
        return layout

    def quantization_config(self, architecture: ModelSection) -> dict[str, Any] | None:
        return int8_config(architecture, ACTIVATIONS)

    def recognises(self, config: dict[str, Any]) -> bool:
        return announces_int8(config, ACTIVATIONS)

    def build(self, architecture: ModelSection, tensors: dict[str, Tensor]) -> Model:
        model = unfilled(architecture)
        _replace_children(model, "", tensors)
        quantised = {name for name in tensors if is_quantised(name.removesuffix("_scale"))}
        return fill(model, {name: tensor.float() for name, tensor in tensors.items() if name not in quantised})


class W8A8Linear(QuantisedModule):
    """One or more linear layers with a common input, side by side: `weight` [out, in] and `scale` [out], both fp32.

    With `bias` the float bias of a single layer is part of the state, under its published name.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, *stored: tuple[Tensor, Tensor], bias: bool = False):
        super().__init__()
        weight = torch.cat([values for values, _ in stored])
        scale = torch.cat([scale for _, scale in stored])
        self.register_buffer("weight", weight.float().contiguous(), persistent=False)
        self.register_buffer("scale", scale.float().flatten(), persistent=False)
        self.register_buffer("bias", torch.zeros(len(weight)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        return quantised_matmul(x, self.weight.t(), self.scale, self.bias)


class W8A8GatedMlp(nn.Module):
    """SwiGLU with gate and up in one product."""

    def __init__(
        self,
        gate: tuple[Tensor, Tensor],
        up: tuple[Tensor, Tensor],
        down: tuple[Tensor, Tensor],
        limit: float | None = None,
    ):
        super().__init__()
        self.limit = limit
        self.gate_up = W8A8Linear(gate, up)
        self.down = W8A8Linear(down)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(_swiglu(self.gate_up(x), self.limit))


class W8A8Experts(QuantisedModule):
    """All routed experts of a layer. `gate_up` [E, 2M, D], `down` [E, D, M], with scales [E, 2M] and [E, D]."""

    gate_up: Tensor
    gate_up_scale: Tensor
    down: Tensor
    down_scale: Tensor

    def __init__(self, experts: list[dict[str, tuple[Tensor, Tensor]]], limit: float | None = None):
        super().__init__()
        self.limit = limit
        for name, parts in (("gate_up", ("gate_proj", "up_proj")), ("down", ("down_proj",))):
            weight = stacked([[e[part][0] for part in parts] for e in experts])
            scale = stacked([[e[part][1].flatten() for part in parts] for e in experts])
            self.register_buffer(name, weight, persistent=False)
            self.register_buffer(f"{name}_scale", scale, persistent=False)

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """x [N, D], sorted by expert; `counts` [E] of its rows belong to each. Returns [N, D]."""
        parts = x.split(counts.tolist())
        return torch.cat([self._expert(index, rows) for index, rows in enumerate(parts)])

    def parts(self, index: int) -> dict[str, Callable[[Tensor], Tensor]]:
        """The two products of one expert, by name: of rows [N, D] or [N, M]."""
        return {
            "gate_up_proj": lambda x: quantised_matmul(x, self.gate_up[index].t(), self.gate_up_scale[index]),
            "down_proj": lambda x: quantised_matmul(x, self.down[index].t(), self.down_scale[index]),
        }

    def _expert(self, index: int, x: Tensor) -> Tensor:
        gate_up = quantised_matmul(x, self.gate_up[index].t(), self.gate_up_scale[index])
        return quantised_matmul(_swiglu(gate_up, self.limit), self.down[index].t(), self.down_scale[index])


def stacked(parts: list[list[Tensor]]) -> Tensor:
    """Tensors one below the other, and lists of them behind each other, in fp32 and without a copy in between."""
    sizes = [len(part) for part in parts[0]]
    whole = torch.empty(len(parts), sum(sizes), *parts[0][0].shape[1:], device=parts[0][0].device)
    for place, some in zip(whole, parts, strict=True):
        for piece, part in zip(place.split(sizes), some, strict=True):
            piece.copy_(part)
    return whole


def is_quantised(name: str) -> bool:
    """Whether the weight of this published name is stored in int8."""
    *_, module, part = name.split(".") if "." in name else ("", "", "")
    return part == "weight" and module in (*MLP_PARTS, *ATTENTION_PARTS)


def float_modules(architecture: ModelSection) -> list[str]:
    """Names of the linear modules that are not quantised: the `ignore` list."""
    a, names = architecture, ["lm_head"]
    for index in range(a.num_hidden_layers + a.num_nextn_predict_layers):
        prefix = f"model.layers.{index}"
        if isinstance(a, DeepseekSection):
            names.append(f"{prefix}.self_attn.kv_b_proj")
        if a.is_sparse(index):
            names.append(f"{prefix}.mlp.gate")
        if index >= a.num_hidden_layers:
            names += [f"{prefix}.eh_proj", f"{prefix}.shared_head.head"]
    return names


def int8_config(architecture: ModelSection, activations: dict[str, Any]) -> dict[str, Any]:
    """compressed-tensors' block of config.json for int8 weights per channel, with that scheme of activations."""
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": float_modules(architecture),
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": int8_scheme("channel", dynamic=False),
                "input_activations": activations,
                "output_activations": None,
            }
        },
    }


def int8_scheme(strategy: str, *, dynamic: bool) -> dict[str, Any]:
    """A symmetric int8 scheme of compressed-tensors."""
    return {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": strategy,
        "dynamic": dynamic,
        "group_size": None,
    }


ACTIVATIONS = int8_scheme("token", dynamic=True)


def announces_int8(config: dict[str, Any], activations: dict[str, Any]) -> bool:
    """Whether a config.json announces what `int8_config` writes for that scheme of activations."""
    found = config.get("quantization_config") or {}
    groups = found.get("config_groups") or {}
    return (
        found.get("quant_method") == "compressed-tensors"
        and found.get("format") == "int-quantized"
        and len(groups) == 1
        and all(
            _fits(group.get("weights") or {}, int8_scheme("channel", dynamic=False))
            and _fits(group.get("input_activations") or {}, activations)
            and not group.get("output_activations")
            for group in groups.values()
        )
    )


def _fits(scheme: dict[str, Any], wanted: dict[str, Any]) -> bool:
    return all(scheme.get(key) == value for key, value in wanted.items())


def _replace_children(module: nn.Module, prefix: str, tensors: dict[str, Tensor]) -> None:
    for name, child in list(module.named_children()):
        path = f"{prefix}{name}"
        quantised = _quantised_module(child, path, tensors)
        if quantised is not None:
            setattr(module, name, quantised)
        else:
            _replace_children(child, f"{path}.", tensors)


def _quantised_module(child: nn.Module, path: str, tensors: dict[str, Tensor]) -> nn.Module | None:
    def stored(part: str) -> tuple[Tensor, Tensor]:
        return tensors[f"{part}.weight"], tensors[f"{part}.weight_scale"]

    if isinstance(child, GatedMlp):
        return W8A8GatedMlp(*(stored(f"{path}.{part}") for part in MLP_PARTS), limit=child.limit)
    if isinstance(child, Experts):
        count = child.down.shape[0]
        return W8A8Experts(
            [{part: stored(f"{path}.{i}.{part}") for part in MLP_PARTS} for i in range(count)], child.limit
        )
    if isinstance(child, nn.Linear) and path.rpartition(".")[2] in ATTENTION_PARTS:
        return W8A8Linear(stored(path), bias=child.bias is not None)
    return None


def _swiglu(gate_up: Tensor, limit: float | None) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return swiglu(gate, up, limit)


FORMAT = W8A8()
