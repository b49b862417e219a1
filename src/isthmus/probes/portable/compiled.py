"""A small block of a model as torch.compile makes it, against the same block run eagerly and in float64."""

from __future__ import annotations

import os
import shutil
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

TIMES = 4.0
"""How many times the eager error a compiled result may be off: it fuses, and so rounds elsewhere."""
ROUNDOFFS = 16.0
"""An eager error counts as no less than so many unit roundoffs."""


def check_compiled(rank: Any, rows: int = 24, width: int = 32, dtype: str = "float32", seed: int = 0) -> dict[str, Any]:
    """Compare forward and backward pass of a gated block, on rank 0 alone: the others wait for nothing.

    Returns `failed` and `detail`, and `unchecked`: why there is nothing to compare, or "". `errors` are root mean
    square errors relative to float64, of the eager and the compiled block.
    """
    rank.beat("compile", 0)
    if rank.rank != 0:
        return {"failed": False, "detail": "", "unchecked": "rank 0 does it", "errors": {}}
    if rank.device.type == "cpu" and not _compiler():
        why = "torch.compile needs a C++ compiler on the CPU, and there is none (CXX, c++, g++, clang++)"
        return {"failed": False, "detail": "", "unchecked": why, "errors": {}}
    given = _inputs(rows, width, seed)
    here = [tensor.to(getattr(torch, dtype)).to(rank.device) for tensor in given]
    with _disable_current_modes():
        exact = _passes(_block, [tensor.to(getattr(torch, dtype)).double() for tensor in given])
    eager = _passes(_block, here)
    rank.beat("compile", 1)
    try:
        with _disable_current_modes():
            from torch._inductor import config

            config.compile_threads = 1
            compiled = _passes(torch.compile(_block, backend="inductor", fullgraph=True), here)
    except (RuntimeError, ImportError, TypeError, AttributeError) as error:
        lines = str(error).strip().splitlines() or [""]
        detail = f"rank 0: torch.compile raises {type(error).__name__}: {lines[0][:300]}"
        return {"failed": True, "detail": detail, "unchecked": "", "errors": {}}
    rank.beat("compile", 2)
    with _disable_current_modes():
        return _judge(exact, eager, compiled, torch.finfo(getattr(torch, dtype)).eps / 2)


def _judge(exact: dict[str, Tensor], eager: dict[str, Tensor], compiled: dict[str, Tensor], unit: float) -> dict:
    errors, bad = {}, []
    for name, right in exact.items():
        one, other = _error(eager[name], right), _error(compiled[name], right)
        errors[name] = [one, other]
        if not other <= TIMES * max(one, ROUNDOFFS * unit):
            bad.append(f"{name} off by {other:.2g} compiled and {one:.2g} eager")
        elif not one <= TIMES * max(other, ROUNDOFFS * unit):
            bad.append(f"{name} off by {one:.2g} eager and {other:.2g} compiled")
    detail = f"rank 0: {'; '.join(bad)} (relative to float64)" if bad else ""
    return {"failed": bool(bad), "detail": detail, "unchecked": "", "errors": errors}


def _inputs(rows: int, width: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, width), (width,), (width, 2 * width), (width, 2 * width), (2 * width, width)]
    scales = [1.0, 1.0, width**-0.5, width**-0.5, (2 * width) ** -0.5]
    drawn = (torch.randn(shape, generator=generator) for shape in shapes)
    return [tensor * scale for tensor, scale in zip(drawn, scales, strict=True)]


def _block(x: Tensor, norm: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """A normalised gated layer with its residual, and a softmax over the result."""
    scaled = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * norm
    inner = F.silu(scaled @ gate) * (scaled @ up)
    return (x + inner @ down).log_softmax(-1)


def _passes(work: Any, given: list[Tensor]) -> dict[str, Tensor]:
    """The result and the gradients, on the host."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in given]
    out = work(*leaves)
    out[:, 0].sum().backward()
    names = ("x", "norm", "gate", "up", "down")
    found = {f"the gradient of {name}": leaf.grad for name, leaf in zip(names, leaves, strict=True)}
    return {"the result": out.detach().cpu()} | {name: grad.cpu() for name, grad in found.items() if grad is not None}


def _error(got: Tensor, right: Tensor) -> float:
    scale = right.square().mean().sqrt().clamp(min=1e-30)
    return ((got.double() - right).square().mean().sqrt() / scale).item()


def _compiler() -> bool:
    named = os.environ.get("CXX")
    return any(shutil.which(name) for name in ([named] if named else ["c++", "g++", "clang++"]))
