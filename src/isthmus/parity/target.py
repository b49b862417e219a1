"""The model as it runs on a chip that is here: the bundle's modules on its device, with activations of its dtype.

Weights that are multiplied in float get the dtype of the activations. Integer values, scales, rotary tables, routers
and their biases stay in fp32: rounding them would make another model.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from isthmus.errors import IsthmusError
from isthmus.formats.files.bundle import Bundle
from isthmus.formats.parts.pieces import LentExperts
from isthmus.formats.parts.quantised import QuantisedModule
from isthmus.model.attention import RMSNorm
from isthmus.model.model import Model
from isthmus.model.moe import Experts, Router

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ANNOUNCED = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
"""What an engine of another make computes in unless it is told otherwise: the dtype of config.json."""
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
"""Unit roundoff: half the distance from 1 to the next number, relative."""
ACCUMULATION = {torch.float32: 2.0**-21, torch.bfloat16: 2.0**-12, torch.float16: 2.0**-12}
"""Noise of a long sum, relative to the root mean square of its row. Tensor units that keep about 14 bits of a sum were
measured at 2^-13 (arXiv 2412.19437, 3.3.2), and twice that is granted; fp32 sums in another order stay below 2^-21."""


def build_target(bundle: Bundle, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Model:
    """The bundle's model on a torch device. Raises IsthmusError if there is no such device here."""
    model = bundle.build()
    _adapt_to(device, dtype)(model)
    return model


def stream_target(bundle: Bundle, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Model:
    """`build_target`, with a layer at a time in memory."""
    return bundle.stream(_adapt_to(device, dtype))


class Noise:
    """The noise of a healthy twin's sums: `granted` times that of ACCUMULATION, drawn anew for every row and pass."""

    def __init__(self, dtype: torch.dtype, seed: int, granted: float):
        self.dtype, self.granted = dtype, granted
        self._generator = torch.Generator().manual_seed(seed)

    def added(self, output: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """An output with the noise of sums in `dtype`, the twin's own if absent."""
        norm = torch.linalg.vector_norm(output, dim=-1, keepdim=True, dtype=torch.float32)
        size = norm.mul_(self.granted * ACCUMULATION[dtype or self.dtype] / math.sqrt(output.shape[-1]))
        noise = torch.randn(output.shape, generator=self._generator)
        return noise.mul_(size).add_(output).to(output.dtype)


def make_twin(model: Model, dtype: torch.dtype, seed: int = 0, granted: float = 1.0) -> Model:
    """Make a healthy twin of a model in fp32, in place: one that is right, and as inexact as a chip may be.

    It computes in its dtype, and its sums have `granted` times the noise of ACCUMULATION, drawn anew in every pass and
    for every row.
    """
    noise = Noise(dtype, seed, granted)
    _adapt_to("cpu", dtype)(model)
    _add_noise(model, noise)
    return _with(model, noise)


def stream_twin(
    bundle: Bundle,
    dtype: torch.dtype,
    seed: int = 0,
    granted: float = 1.0,
    *,
    lend_experts: bool = True,
) -> Model:
    """`make_twin` of a bundle's model, with a layer at a time in memory."""
    noise, adapt = Noise(dtype, seed, granted), _adapt_to("cpu", dtype)

    def adapt_and_add_noise(piece: nn.Module) -> None:
        adapt(piece)
        _add_noise(piece, noise)

    return _with(bundle.stream(adapt_and_add_noise, lend_experts=lend_experts), noise)


def _with(twin: Model, noise: Noise) -> Model:
    twin.noise = noise  # pyright: ignore
    return twin


def noise_of(twin: Model) -> Noise | None:
    """The noise in which a twin in fp32 differs from the emulator, product by product; None of other models."""
    noise = getattr(twin, "noise", None)
    return noise if isinstance(noise, Noise) and noise.dtype == torch.float32 else None


def _adapt_to(device: str, dtype: torch.dtype) -> Callable[[nn.Module], None]:
    def adapt(model: nn.Module) -> None:
        try:
            model.to(torch.device(device))
        except (RuntimeError, AssertionError) as error:
            raise IsthmusError(f"the device {device!r} cannot be used here: {error}") from None
        if dtype != torch.float32:
            _cast(model, dtype)

    torch.set_float32_matmul_precision("highest")
    return adapt


def _add_noise(model: nn.Module, noise: Noise) -> None:
    def add_noise(_module: nn.Module, _inputs: object, output: object) -> object:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        return noise.added(output)

    def with_noise(product: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: noise.added(product(x))

    for module in model.modules():
        if isinstance(module, LentExperts):
            continue
        if isinstance(module, Router):
            module.logits = lambda x, logits=module.logits: noise.added(logits(x), torch.float32)
        elif not any(True for _ in module.children()) and not isinstance(module, nn.Embedding):
            module.register_forward_hook(add_noise)
        if (parts := getattr(module, "parts", None)) is not None:
            replaced = lambda index, parts=parts: {k: with_noise(part) for k, part in parts(index).items()}  # noqa: E731
            module.parts = replaced  # pyright: ignore[reportArgumentType]


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding | RMSNorm | Experts):
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(parameter.to(dtype), requires_grad=False))
        elif isinstance(module, QuantisedModule) and module.FOLLOWING:
            module.to(dtype)
