"""What the formats share: filling a model with stored tensors, and float tensors as stored."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from isthmus.errors import IsthmusError
from isthmus.formats import Layout
from isthmus.formats.parts.ranges import Calibration
from isthmus.model.model import Model
from isthmus.recipe.architecture import ModelSection

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
ROUTER_BIAS = "e_score_correction_bias"


class _WithoutInitialValues(TorchFunctionMode):
    """Parameters stay without values, and tables are computed on the CPU.

    On the meta device both have no effect but to load torch's compiler, which takes longer than all the rest.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if getattr(func, "__module__", None) == "torch.nn.init":
            return given["tensor"] if "tensor" in given else args[0]
        if func in (torch.arange, torch.tensor):
            given.setdefault("device", "cpu")
        return func(*args, **given)


def unfilled(architecture: ModelSection) -> Model:
    """A model without memory for its weights, for `fill`."""
    with torch.device("meta"), _WithoutInitialValues():
        return Model(architecture)


def fill(model: Model, tensors: dict[str, Tensor]) -> Model:
    """Put fp32 tensors with published names in place, all of them and without a copy, and freeze the model."""
    if model.architecture.tie_word_embeddings:
        tensors = {**tensors, HEAD: tensors[EMBEDDING]}
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.eval().requires_grad_(False)


class TensorByTensor(ABC):
    """A format whose tensors are exported one by one."""

    needs_calibration = False

    @abstractmethod
    def export_one(
        self, name: str, tensor: Tensor, architecture: ModelSection, calibration: Calibration | None = None
    ) -> dict[str, Tensor]: ...

    def extra_files(self, architecture: ModelSection) -> dict[str, bytes]:
        return {}

    def as_announced(self, config: dict[str, Any]) -> Self:
        return self

    def export(
        self, state: dict[str, Tensor], architecture: ModelSection, calibration: Calibration | None = None
    ) -> dict[str, Tensor]:
        stored: dict[str, Tensor] = {}
        for name, tensor in state.items():
            stored |= self.export_one(name, tensor, architecture, calibration)
        return stored


def export_float(name: str, tensor: Tensor, architecture: ModelSection, dtype: torch.dtype) -> dict[str, Tensor]:
    """A tensor in `dtype`, except the routing bias, which published checkpoints keep in fp32.

    A tied output head is left out, as in published checkpoints. Raises IsthmusError for a number that fp16 cannot hold.
    """
    if _is_tied_head(name, architecture):
        return {}
    stored = tensor.detach().to(_stored_dtype(name, dtype)).contiguous()
    if stored.dtype == torch.float16 and stored.numel() and tensor.dtype != torch.float16:
        _check_fits(name, tensor, stored)
    return {name: stored}


def _check_fits(name: str, tensor: Tensor, stored: Tensor) -> None:
    """Numbers beyond 65,504 would become infinite in fp16."""
    low, high = (float(one) for one in torch.aminmax(stored))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise IsthmusError(
            f"{name} holds numbers up to {float(tensor.abs().max()):.6g}, and float16 ends at "
            f"{torch.finfo(torch.float16).max:,.0f}: choose a format in bfloat16"
        )


def float_layout(architecture: ModelSection, dtype: torch.dtype) -> Layout:
    """Types and shapes of what `export_float` makes of this architecture's whole state."""
    state = unfilled(architecture).state_dict()
    return {
        name: (_stored_dtype(name, dtype), tuple(tensor.shape))
        for name, tensor in state.items()
        if not _is_tied_head(name, architecture)
    }


class FloatFormat(TensorByTensor):
    """Stores weights in one float dtype, without a quantiser, and computes with them in fp32."""

    def __init__(self, name: str, stored: torch.dtype):
        self.name, self._stored, self.dtype = name, stored, str(stored).removeprefix("torch.")

    def export_one(
        self, name: str, tensor: Tensor, architecture: ModelSection, calibration: Calibration | None = None
    ) -> dict[str, Tensor]:
        return export_float(name, tensor, architecture, self._stored)

    def layout(self, architecture: ModelSection) -> Layout:
        return float_layout(architecture, self._stored)

    def quantization_config(self, architecture: ModelSection) -> dict[str, Any] | None:
        return None

    def recognises(self, config: dict[str, Any]) -> bool:
        return announced_dtype(config) == self.dtype and not config.get("quantization_config")

    def build(self, architecture: ModelSection, tensors: dict[str, Tensor]) -> Model:
        return fill(unfilled(architecture), {name: tensor.float() for name, tensor in tensors.items()})


def announced_dtype(config: dict[str, Any]) -> str | None:
    """The dtype in a config.json, under its old or its new key, without the prefix `torch.`."""
    dtype = config.get("torch_dtype", config.get("dtype"))
    return str(dtype).removeprefix("torch.") if dtype is not None else None


def _stored_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if name.endswith(ROUTER_BIAS) else dtype


def _is_tied_head(name: str, architecture: ModelSection) -> bool:
    return architecture.tie_word_embeddings and name == HEAD
