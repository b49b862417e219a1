"""A healthy chip of another vendor, imitated: it computes in its dtype, and adds in an order of its own.

What real kernels keep wide stays wide here: the integers of a quantised product, and the router.
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

ENTRIES = ("forward", "project", "queries", "latents", "join", "naive", "absorbed", "whole")
"""Methods of modules through which a forward pass, or a part of it, starts."""
ACCUMULATION = {torch.bfloat16: 2.0**-13, torch.float16: 2.0**-13, torch.float32: 2.0**-22}
"""Noise of a sum relative to the size of its row: accumulators of 14 bits (arXiv 2412.19437, 3.3.2), and of fp32."""
SUMS: frozenset[Any] = frozenset({F.linear, torch.bmm, torch.Tensor.bmm, torch.matmul, F.scaled_dot_product_attention})


class Device(TorchFunctionMode):
    """Inside it, float sums come out a little differently; `seed` decides how.

    With `rows_alone` every row of an input goes through a linear layer by itself, as in a batch of one.
    """

    def __init__(self, seed: int, rows_alone: bool = False):
        super().__init__()
        self.rows_alone = rows_alone
        self.generator = torch.Generator().manual_seed(seed)
        self.entered = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear and self.rows_alone:
            x, *rest = args
            rows = [func(row, *rest, **(kwargs or {})) for row in x.reshape(-1, 1, x.shape[-1])]
            found = torch.cat(rows).reshape(*x.shape[:-1], -1)
        else:
            found = func(*args, **(kwargs or {}))
        return self._noisy(found) if func in SUMS else found

    def _noisy(self, y: Tensor) -> Tensor:
        size = y.float().square().mean(-1, keepdim=True).sqrt()
        noise = torch.randn(y.shape, generator=self.generator) * size * ACCUMULATION[y.dtype]
        return (y.float() + noise).to(y.dtype)


def on_device(model: Model, seed: int, rows_alone: bool = False) -> Model:
    """The same model, computing from now on as on a healthy device."""
    device = Device(seed, rows_alone)
    for module in model.modules():
        for name in ENTRIES:
            method = getattr(module, name, None)
            if method is not None and not isinstance(module, nn.ModuleList):
                setattr(module, name, _inside(device, method))
        if hasattr(module, "parts"):
            module.parts = _parts_inside(device, module.parts)
    return model


def _inside(device: Device, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        if device.entered:
            return method(*args, **kwargs)
        device.entered = True
        try:
            with device:
                return method(*args, **kwargs)
        finally:
            device.entered = False

    return run


def _parts_inside(device: Device, parts: Callable[[int], dict[str, Any]]) -> Callable[[int], dict[str, Any]]:
    return lambda index: {name: _inside(device, call) for name, call in parts(index).items()}
