"""The weights that a target holds once it has loaded them, bit by bit against those of the emulator.

A loader that swaps two experts, keeps a stale matrix or flips one bit gives outputs that rounding can hide. Where the
target is a model in this process, whatever its device, its tensors can be read back, and nothing hides.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from isthmus.model.layer import ResidualLayer
from isthmus.model.model import Model
from isthmus.records import Check

NAME = "weights as loaded"


def check_loaded(emulator: Model, target: Model) -> list[Check]:
    """One failing check per module whose tensors differ, in the order of the model, or one that passes.

    A target in a narrower float type must hold the emulator's values rounded to it. What is compared stays small: one
    tensor at a time is brought to the CPU.
    """
    expected, found = _tensors(emulator), _tensors(target)
    failed: dict[str, Check] = {}
    for path in [*expected, *(path for path in found if path not in expected)]:
        problem = _difference(expected.get(path), found.get(path))
        module, operator = _split(emulator, path)
        if problem is not None and module not in failed:
            failed[module] = Check(
                layer="modules", name=NAME, outcome="fail", detail=f"{path} {problem}", module=module, operator=operator
            )
    if failed:
        return list(failed.values())
    detail = f"all {len(expected)} tensors of the target are the emulator's"
    return [Check(layer="modules", name=NAME, outcome="pass", detail=detail)]


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _difference(expected: Tensor | None, found: Tensor | None) -> str | None:
    if expected is None or found is None:
        return "is in the target alone" if expected is None else "is missing in the target"
    if expected.shape != found.shape:
        return f"has the shape {list(found.shape)} and should have {list(expected.shape)}"
    here = found.detach().to("cpu")
    differs = here != expected.detach().to(here.dtype)
    if not differs.any():
        return None
    first = torch.nonzero(differs)[0].tolist()
    return f"differs in {int(differs.sum())} of {differs.numel()} values, first at {first}"


def _split(model: Model, path: str) -> tuple[str, str | None]:
    """Attention, MLP or norm of a layer, or a part outside the layers; and the path of the tensor in it."""
    parts = path.split(".")
    for size in range(1, len(parts)):
        if isinstance(_module(model, parts[:size]), ResidualLayer):
            inside = parts[size + 1 :]
            return ".".join(parts[: size + 1]), ".".join(inside[:-1]) or None
    return ".".join(parts[:-1]), None


def _module(model: Model, parts: list[str]) -> nn.Module | None:
    found: nn.Module | None = model
    for part in parts:
        found = getattr(found, part, None)
        if not isinstance(found, nn.Module):
            return None
    return found
