"""The blocks of a model that are replayed one by one: the attention and the MLP of every layer.

Shapes: B rows of T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from isthmus.formats.parts.pieces import at_hand
from isthmus.model.attention import EntryLayout, Rotation, attend_entries
from isthmus.model.layer import ResidualLayer
from isthmus.model.model import Model, causal_mask
from isthmus.model.moe import MixtureOfExperts, Routing

BlockKind = Literal["attention", "mlp", "moe"]


@dataclass(frozen=True)
class Block:
    """`path` in the published names, and what it is."""

    path: str
    kind: BlockKind


def blocks_of(model: Model) -> list[Block]:
    """All blocks, in the order of the computation."""
    found = []
    for index, layer in enumerate(model.model.layers):
        assert isinstance(layer, ResidualLayer)
        kind: BlockKind = "moe" if isinstance(layer.mlp, MixtureOfExperts) else "mlp"
        found += [Block(f"model.layers.{index}.self_attn", "attention"), Block(f"model.layers.{index}.mlp", kind)]
    return found


def run_block(model: Model, block: Block, x: Tensor, rotation: Rotation | None = None) -> tuple[Tensor, Routing | None]:
    """Output [B, T, D] of a block on x [B, T, D], and what its router decided, if it has one.

    Attention is causal, from position 0; `rotation` is the model's own unless given.
    """
    module = model.get_submodule(block.path)
    if block.kind == "attention":
        if rotation is None:
            rotation = rotation_of(model, x.shape[:2])
        return module(x, rotation, causal_mask(x.shape[1], x.device)), None
    output = module(x)
    return output if isinstance(output, tuple) else (output, None)


def rotation_of(model: Model, shape: tuple[int, ...] | torch.Size) -> Rotation:
    """The model's rotation of positions 0 to T - 1 in each of B rows."""
    device = model.model.rotary.cos.device
    return model.model.rotary(torch.arange(shape[1], device=device).expand(*shape))


@torch.inference_mode()
def inputs_by_layer(model: Model, tokens: Tensor) -> Iterator[dict[str, Tensor]]:
    """The inputs [B, T, D] of the blocks of a layer by path, layer after layer, the MTP layer's too, for tokens [B, T].

    The model runs as far as it is asked; what it yields of a layer comes while the layer's weights are at hand.
    """
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
    rotation, mask = model.model.rotary(positions), causal_mask(tokens.shape[1], tokens.device)
    hidden = model.model.embed_tokens(tokens)
    for index, layer in enumerate(model.model.layers):
        path, inputs = f"model.layers.{index}", {}
        with at_hand(model, path):
            handles = [
                model.get_submodule(f"{path}.{name}").register_forward_pre_hook(
                    lambda _module, given, name=name: inputs.__setitem__(f"{path}.{name}", given[0].detach())  # noqa: B023
                )
                for name in ("self_attn", "mlp")
            ]
            try:
                if index < model.architecture.num_hidden_layers:
                    hidden = layer(hidden, rotation, mask)
                else:
                    model.mtp_next(hidden, tokens.roll(-1, dims=1), positions, mask)
            finally:
                for handle in handles:
                    handle.remove()
            yield inputs


def same_experts(expected: Routing, answer: Routing) -> Tensor:
    """Which tokens [N] get the same set of experts."""
    a, b = expected.experts.cpu().sort(-1).values, answer.experts.cpu().sort(-1).values
    return (a == b).all(-1) if a.shape == b.shape else torch.zeros(len(a), dtype=torch.bool)


class WholeRows:
    """A cache that is filled at once: every token looks at all up to itself."""

    def attend(self, query: Tensor, entries: Tensor, layout: EntryLayout, scale: float) -> Tensor:
        mask = causal_mask(entries.shape[1], entries.device)[0].transpose(0, 1)[None]
        return attend_entries(query, entries, mask.to(query.dtype), layout, scale)
