"""A healthy chip of another vendor, imitated: operators read and write bf16, and add in an order of their own.

What real kernels keep wide stays wide here: the integers of a quantised product, the inside of a norm, and the router.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from isthmus.model.model import Model
from isthmus.model.moe import Router

ENTRIES = ("forward", "project", "queries", "latents", "join", "_naive", "_absorbed", "_whole")
"""Methods of modules through which a forward pass, or a part of it, starts."""
ACCUMULATION = 2.0**-13
"""Noise of a sum relative to the size of its row, as from accumulators with 14 bits (arXiv 2412.19437, 3.3.2)."""
SUMS: frozenset[Any] = frozenset({F.linear, torch.bmm, torch.Tensor.bmm, F.scaled_dot_product_attention})
OTHERS: frozenset[Any] = frozenset(
    {F.softmax, F.silu, F.embedding, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.add, torch.Tensor.__add__}
)


class Bf16Device(TorchFunctionMode):
    """Inside it, operators round to bf16 what they read and write; `seed` decides how their sums come out."""

    def __init__(self, seed: int):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)
        self.entered = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in SUMS and func not in OTHERS:
            return func(*args, **(kwargs or {}))
        found = func(*map(rounded, args), **{key: rounded(value) for key, value in (kwargs or {}).items()})
        return rounded(self._noisy(found) if func in SUMS else found)

    def _noisy(self, y: Tensor) -> Tensor:
        size = y.square().mean(-1, keepdim=True).sqrt()
        return y + ACCUMULATION * size * torch.randn(y.shape, generator=self.generator)


def rounded(value: Any) -> Any:
    """A float tensor rounded to bf16 and kept in its type; anything else as it is."""
    if isinstance(value, Tensor) and value.dtype == torch.float32:
        return value.to(torch.bfloat16).float()
    return value


def on_device(model: Model, seed: int) -> Model:
    """The same model, computing from now on as on a healthy device."""
    device = Bf16Device(seed)
    for module in model.modules():
        for name in ENTRIES:
            method = getattr(module, name, None)
            if method is not None and not isinstance(module, nn.ModuleList | Router):
                setattr(module, name, _inside(device, method))
    for router in model.modules():
        if isinstance(router, Router):
            router.forward = _wide(router.forward)
    return model


def _inside(device: Bf16Device, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        if device.entered:
            return method(*args, **kwargs)
        device.entered = True
        try:
            with device:
                return _rounded_all(method(*_rounded_all(args), **kwargs))
        finally:
            device.entered = False

    return run


def _wide(method: Callable[..., Any]) -> Callable[..., Any]:
    """A router reads bf16 and computes in fp32."""

    @functools.wraps(method)
    def run(x: Tensor) -> Any:
        with torch._C.DisableTorchFunction():
            return method(rounded(x))

    return run


def _rounded_all(values: Any) -> Any:
    return tuple(map(rounded, values)) if type(values) is tuple else rounded(values)
