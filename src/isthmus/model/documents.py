"""Packed rows: where the documents in them are, so that attention stays within each and costs nothing across them.

Shapes: B rows of T tokens, H heads, N = B * T * H, M places of documents filled up to a few common lengths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

SHORTEST, GROWTH, LONG, GROWTH_OF_LONG = 16, 1.5, 256, 1.25
"""Documents are filled up to 16, 24, 36, ... tokens: few kernels for short ones, little waste for long ones."""


class Rows(torch.autograd.Function):
    """x[index] for x [N, D], whose gradient is gradient[inverse] * keep: no scattered addition, the same every time.

    `inverse` [N] says where each row of x went, and `keep` [N, 1] is 0 for rows that went nowhere.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor, keep: Tensor | None) -> Tensor:
        ctx.save_for_backward(inverse, keep)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None, None]:
        inverse, keep = ctx.saved_tensors
        back = gradients[0].index_select(0, inverse)
        return (back if keep is None else back.mul_(keep)), None, None, None


@dataclass(frozen=True)
class Documents:
    """The documents of packed rows [B, T], grouped by length, for attention with `heads` heads.

    A place is one of (document, head, position). `index` [M] gives the (token, head) in it, a document's last token for
    what fills it up; `place` [N] the place of each (token, head). `used` [M, 1] and `real` [N, 1] are 0 for what fills
    up and for padding. `groups` lists (documents, length).
    """

    index: Tensor
    place: Tensor
    used: Tensor
    real: Tensor
    groups: tuple[tuple[int, int], ...]
    heads: int

    @classmethod
    def of(cls, document: Tensor, heads: int) -> Documents:
        """`document` [B, T], on the CPU, numbers the documents; one lies in one row without a gap. -1 is padding."""
        starts, lengths = _runs(document)
        sizes = _filled_lengths(int(lengths.max()) if len(lengths) else 0, document.shape[1])
        group_of = torch.bucketize(lengths, torch.tensor(sizes, dtype=torch.long))
        parts, groups = [torch.zeros(0, dtype=torch.long)], []
        for group, size in enumerate(sizes):
            chosen = group_of == group
            if chosen.any():
                tokens = starts[chosen, None] + torch.arange(size).minimum(lengths[chosen, None] - 1)
                parts.append((tokens.unsqueeze(1) * heads + torch.arange(heads)[:, None]).flatten())
                groups.append((int(chosen.sum()), size))
        index = torch.cat(parts)
        return cls(index, *_places(index, document.numel() * heads), tuple(groups), heads)

    def to(self, device: torch.device) -> Documents:
        """The same on another device."""
        index, place, used, real = (part.to(device) for part in (self.index, self.place, self.used, self.real))
        return Documents(index, place, used, real, self.groups, self.heads)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None = None) -> Tensor:
        """Causal attention within documents, over `window` tokens if it is given.

        query and key [B, T, H, Q], value [B, T, H, V]; returns [B, T, H, V]. Padding gets what means nothing.
        """
        if not self.groups:
            return value + 0.0 * (query + key).sum()
        shape = value.shape
        sizes = [count * span * self.heads for count, span in self.groups]
        placed = [self._gather(part).split(sizes) for part in (query, key, value)]
        outputs = []
        for (count, span), *parts in zip(self.groups, *placed, strict=True):
            query, key, value = (part.view(count, self.heads, span, -1) for part in parts)
            outputs.append(_causal(query, key, value, scale, window).flatten(0, 2))
        tokens = Rows.apply(torch.cat(outputs), self.place, self.index, self.used)
        return tokens.view(shape)  # pyright: ignore[reportOptionalMemberAccess]

    def _gather(self, x: Tensor) -> Tensor:
        return Rows.apply(x.flatten(0, 2), self.index, self.place, self.real)  # pyright: ignore[reportReturnType]


def beyond(window: int, length: int, device: torch.device) -> Tensor:
    """Which places [L, L] lie so far before a token that a window, which counts the token itself, leaves them out."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril(-window)


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
    """Causal attention over query and key [n, H, L, Q], value [n, H, L, V]: [n, H, L, V]."""
    length, size = query.shape[2], value.shape[-1]
    outside = beyond(window, length, query.device) if window is not None and window < length else None
    if query.device.type == "cpu" and length <= LONG:
        q, k, v = (part.flatten(0, 1) for part in (query, key, value))
        later = torch.full((length, length), float("-inf"), dtype=q.dtype).triu(1)
        if outside is not None:
            later = later.masked_fill(outside, float("-inf"))
        weights = torch.baddbmm(later, q, k.transpose(1, 2), alpha=scale).softmax(-1)
        return torch.bmm(weights, v).view(*query.shape[:3], size)
    if outside is None:
        return attention(query, key, value, None, scale)
    later = torch.full((length, length), float("-inf"), dtype=query.dtype, device=query.device).triu(1)
    return attention(query, key, value, later.masked_fill(outside, float("-inf"))[None, None], scale)


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(query key^T scale + mask) value for [B, H, T, D], by a fused kernel; causal without a mask.

    Values narrower than the keys are filled up with zeros: fused kernels want one size, and keep no [T, T] matrix.
    """
    size = value.shape[-1]
    filled = F.pad(value, (0, query.shape[-1] - size)) if size < query.shape[-1] else value
    bias = None if mask is None else mask.to(query.dtype)
    out = F.scaled_dot_product_attention(query, key, filled, attn_mask=bias, is_causal=mask is None, scale=scale)
    return out[..., :size]


def _runs(document: Tensor) -> tuple[Tensor, Tensor]:
    """(first token, length) of each document in the flattened rows."""
    before = torch.full_like(document, -2)
    before[:, 1:] = document[:, :-1]
    firsts = (document != before).flatten().nonzero().squeeze(1)
    lengths = torch.diff(firsts, append=torch.tensor([document.numel()]))
    real = document.flatten()[firsts] >= 0
    return firsts[real], lengths[real]


def _filled_lengths(longest: int, limit: int) -> list[int]:
    sizes = [min(SHORTEST, limit)]
    while sizes[-1] < longest:
        growth = GROWTH if sizes[-1] < LONG else GROWTH_OF_LONG
        sizes.append(min(int(sizes[-1] * growth), limit))
    return sizes


def _places(index: Tensor, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """(place [N], used [M, 1], real [N, 1]) of `index`, in which the first occurrence of a token is its own."""
    place = torch.zeros(tokens, dtype=torch.long)
    place.scatter_reduce_(0, index, torch.arange(len(index)), "amin", include_self=False)
    used = torch.zeros(len(index), 1)
    used[place[index]] = 1.0
    real = torch.zeros(tokens, 1)
    real[index] = 1.0
    return place, used, real
