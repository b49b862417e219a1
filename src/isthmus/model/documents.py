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
class Shared:
    """The (token, head) pairs that are in several documents: `rows` [R] of them, and for each the up to C places
    `copies` [R, C] in which it is; `there` [R, C, 1] is 0 for what fills up."""

    rows: Tensor
    copies: Tensor
    there: Tensor

    def to(self, device: torch.device) -> Shared:
        return Shared(*(part.to(device) for part in (self.rows, self.copies, self.there)))


class SharedRows(torch.autograd.Function):
    """As Rows, where a row of x may be in several places: its gradient is the sum of theirs, in one order."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, index: Tensor, inverse: Tensor, keep: Tensor, rows: Tensor, copies: Tensor, there: Tensor
    ) -> Tensor:
        ctx.save_for_backward(inverse, keep, rows, copies, there)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None, None, None, None, None]:
        inverse, keep, rows, copies, there = ctx.saved_tensors
        back = gradients[0].index_select(0, inverse).mul_(keep)
        several = gradients[0].index_select(0, copies.flatten()).unflatten(0, copies.shape)
        back.index_copy_(0, rows, several.mul_(there).sum(1))
        return back, None, None, None, None, None, None


@dataclass(frozen=True)
class Documents:
    """The documents of packed rows [B, T], grouped by length, for attention with `heads` heads.

    A place is one of (document, head, position). `index` [M] gives the (token, head) in it, a document's last token for
    what fills it up; `place` [N] the place of each (token, head). `used` [M, 1] and `real` [N, 1] are 0 for what fills
    up and for padding. `groups` lists (documents, length). Tokens of a prompt that several documents go on with have a
    place in each of them: that is what `shared` tells, and of their places the first is `used`.
    """

    index: Tensor
    place: Tensor
    used: Tensor
    real: Tensor
    groups: tuple[tuple[int, int], ...]
    heads: int
    shared: Shared | None = None

    @classmethod
    def of(cls, document: Tensor, heads: int, positions: Tensor | None = None) -> Documents:
        """`document` [B, T], on the CPU, numbers the documents; one lies in one row without a gap. -1 is padding.

        With `positions` [B, T] a document that does not begin at position 0 goes on with the tokens before that
        position of the nearest document before it that does.
        """
        starts, lengths = _runs(document)
        prompts = torch.zeros_like(starts) if positions is None else positions.flatten()[starts]
        begins = torch.where(prompts == 0, starts, 0).cummax(0).values if len(starts) else starts
        lengths = lengths + prompts
        sizes = _filled_lengths(int(lengths.max()) if len(lengths) else 0, document.shape[1])
        group_of = torch.bucketize(lengths, torch.tensor(sizes, dtype=torch.long))
        parts, filled, groups = [torch.zeros(0, dtype=torch.long)], [torch.zeros(0, dtype=torch.bool)], []
        for group, size in enumerate(sizes):
            chosen = group_of == group
            if chosen.any():
                place, prompt = torch.arange(size).minimum(lengths[chosen, None] - 1), prompts[chosen, None]
                tokens = torch.where(place < prompt, begins[chosen, None], starts[chosen, None] - prompt) + place
                parts.append((tokens.unsqueeze(1) * heads + torch.arange(heads)[:, None]).flatten())
                filled.append(
                    (torch.arange(size) >= lengths[chosen, None]).unsqueeze(1).expand(-1, heads, -1).flatten()
                )
                groups.append((int(chosen.sum()), size))
        index = torch.cat(parts)
        shared = _shared(index, torch.cat(filled)) if bool((prompts > 0).any()) else None
        return cls(index, *_places(index, document.numel() * heads), tuple(groups), heads, shared)

    def to(self, device: torch.device) -> Documents:
        """The same on another device."""
        index, place, used, real = (part.to(device) for part in (self.index, self.place, self.used, self.real))
        shared = None if self.shared is None else self.shared.to(device)
        return Documents(index, place, used, real, self.groups, self.heads, shared)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None = None) -> Tensor:
        """Causal attention within documents, over `window` tokens if it is given.

        query and key [B, T, H, Q], value [B, T, H, V]; returns [B, T, H, V]. Padding gets what means nothing.
        """
        if not self.groups:
            return value + 0.0 * (query + key).sum()
        shape = value.shape
        sizes = [count * span * self.heads for count, span in self.groups]
        placed = [self._gather(query), self._gather_all(key), self._gather_all(value)]
        placed = [part.split(sizes) for part in placed]
        outputs = []
        for (count, span), *parts in zip(self.groups, *placed, strict=True):
            query, key, value = (part.view(count, self.heads, span, -1) for part in parts)
            outputs.append(_causal(query, key, value, scale, window).flatten(0, 2))
        tokens = Rows.apply(torch.cat(outputs), self.place, self.index, self.used)
        return tokens.view(shape)  # pyright: ignore[reportOptionalMemberAccess]

    def _gather(self, x: Tensor) -> Tensor:
        return Rows.apply(x.flatten(0, 2), self.index, self.place, self.real)  # pyright: ignore[reportReturnType]

    def _gather_all(self, x: Tensor) -> Tensor:
        """What each copy of a shared token is looked at for counts; of its queries only those at the first are used."""
        if self.shared is None:
            return self._gather(x)
        told = self.shared.rows, self.shared.copies, self.shared.there.to(x.dtype)
        return SharedRows.apply(x.flatten(0, 2), self.index, self.place, self.real, *told)  # pyright: ignore


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


def _shared(index: Tensor, filled: Tensor) -> Shared:
    """What is in several places of `index`, `filled` ones aside."""
    places = (~filled).nonzero().squeeze(1)
    rows, number, counts = index[places].unique(return_inverse=True, return_counts=True)
    order = number.argsort(stable=True)
    first = counts.cumsum(0) - counts
    several = counts > 1
    column = torch.arange(int(counts.max()))
    there = column < counts[several, None]
    copies = places[order[(first[several, None] + column).clamp(max=len(order) - 1)]]
    return Shared(rows[several], copies, there.unsqueeze(-1).float())
