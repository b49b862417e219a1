"""What the field does today to find a fault, on the same models: thresholds on propagated tensors, and end accuracy.

The reference (the emulator of the format) and the target run the same prompts from end to end; the output of every
block is compared as it arrives, so an error of one module is carried into all behind it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from isthmus.model.attention import RMSNorm
from isthmus.model.layer import ResidualLayer
from isthmus.model.model import Model
from tests.support.gate_faults import outputs

NORM_RATIO = 0.5
"""msprobe's network comparison in statistics mode: an output whose norm differs by more is an error."""
FIRST_DIFFERENCE = 1e-3
"""SGLang's tensor comparator: 1 - 2xy / (x^2 + y^2) above it is a difference."""


@dataclass(frozen=True)
class Rival:
    """What a rule says: whether it refuses, and the module it names."""

    refused: bool
    module: str | None = None


@dataclass(frozen=True)
class Propagated:
    """A run from end to end: block outputs by path, in the order of the computation, and the logits."""

    blocks: dict[str, Tensor]
    logits: Tensor


def propagate(model: Model, prompts: list[list[int]]) -> Propagated:
    """The outputs of attention, MLP and final norms of every layer, on the prompts."""
    blocks: dict[str, Tensor] = {}

    def keep(path: str):
        def hook(_module: object, _inputs: object, output: object) -> None:
            first = output[0] if isinstance(output, tuple) else output
            assert isinstance(first, Tensor)
            blocks[path] = first.float()

        return hook

    handles = [model.get_submodule(path).register_forward_hook(keep(path)) for path in _block_paths(model)]
    logits = outputs(model, torch.tensor(prompts)).float()
    for handle in handles:
        handle.remove()
    size = len(prompts) * len(prompts[0]) * model.architecture.vocab_size
    return Propagated(blocks, logits[:size].view(-1, model.architecture.vocab_size))


def norm_ratio_rule(reference: Propagated, target: Propagated) -> Rival:
    """The first block whose norm differs by more than half."""
    return _first(reference, target, lambda x, y: abs(y.norm() - x.norm()) / x.norm() > NORM_RATIO)


def first_difference_rule(reference: Propagated, target: Propagated) -> Rival:
    """The first block that differs by SGLang's measure."""
    return _first(
        reference,
        target,
        lambda x, y: 1 - 2 * (x * y).sum() / (x.square().sum() + y.square().sum()) > FIRST_DIFFERENCE,
    )


def relative_error_rule(reference: Propagated, target: Propagated) -> Rival:
    """The first block with a relative L2 error above one thousandth."""
    return _first(reference, target, lambda x, y: (y - x).norm() / x.norm() > FIRST_DIFFERENCE)


def mean_kl(reference: Propagated, target: Propagated) -> float:
    """KL(reference || target) in nats per token; infinite if the target gives no numbers."""
    p, q = reference.logits.double().log_softmax(-1), target.logits.double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    return kl if kl == kl else float("inf")


def top1_agreement(reference: Propagated, target: Propagated) -> float:
    return (reference.logits.argmax(-1) == target.logits.argmax(-1)).double().mean().item()


def _first(reference: Propagated, target: Propagated, differs) -> Rival:
    for path, x in reference.blocks.items():
        y = target.blocks[path]
        if not torch.isfinite(y).all() or bool(differs(x, y)):
            return Rival(True, path)
    return Rival(False)


def _block_paths(model: Model) -> list[str]:
    paths = []
    for path, module in model.named_modules():
        if isinstance(module, ResidualLayer):
            paths += [f"{path}.self_attn", f"{path}.mlp"]
        elif isinstance(module, RMSNorm) and path == "model.norm":
            paths.append(path)
    return paths
