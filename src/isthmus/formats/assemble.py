"""What the formats share: a model without weights, and filling it with stored tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from isthmus.model.attention import RotaryTable
from isthmus.model.model import Model
from isthmus.recipe import ModelSection

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
ROUTER_BIAS = "e_score_correction_bias"


def empty_model(architecture: ModelSection) -> Model:
    """A model whose weights take no memory yet; its rotary table is real."""
    with torch.device("meta"):
        model = Model(architecture)
    model.model.rotary = RotaryTable(architecture)
    return model


def fill(model: Model, tensors: dict[str, Tensor]) -> Model:
    """Put fp32 tensors with published names in place, all of them, and freeze the model for inference."""
    if model.architecture.tie_word_embeddings:
        tensors = {**tensors, HEAD: tensors[EMBEDDING]}
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def export_float(state: dict[str, Tensor], architecture: ModelSection, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every tensor in `dtype`, except the routing bias, which published checkpoints keep in fp32.

    A tied output head is left out, as in published checkpoints.
    """
    return {
        name: tensor.detach().to(torch.float32 if name.endswith(ROUTER_BIAS) else dtype).contiguous()
        for name, tensor in state.items()
        if not (architecture.tie_word_embeddings and name == HEAD)
    }


def layout(export: Any, architecture: ModelSection) -> dict[str, Tensor]:
    """The tensors that `export` stores for this architecture: names, shapes and dtypes, no data (meta device)."""
    with torch.device("meta"):
        state = Model(architecture).state_dict()
    return export(state, architecture)


def announced_dtype(config: dict[str, Any]) -> str | None:
    """The dtype in a config.json, under its old or its new key, without the prefix `torch.`."""
    dtype = config.get("torch_dtype", config.get("dtype"))
    return str(dtype).removeprefix("torch.") if dtype is not None else None
