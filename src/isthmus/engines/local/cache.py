"""The cache: per layer one tensor [slots, length, W], with the active sequences in slots [0, B).

W is the architecture's `cache_width`: a latent and a rotated key per token, or the keys and values of all heads.

Because active slots are contiguous, a decode step reads views of the store and gathers nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor


class SlotCache:
    """Latents of all layers and slots. Unwritten places are zero, so that masked places are always finite."""

    def __init__(self, layers: int, slots: int, length: int, width: int, dtype: torch.dtype, device: torch.device):
        self.layers = [torch.zeros(slots, length, width, dtype=dtype, device=device) for _ in range(layers)]
        self.slots, self.length = slots, length

    def decoding(self, positions: Tensor, span: int) -> list[DecodeCache]:
        """Caches for one new token in each slot [0, B), at `positions` [B]; attention sees places [0, span)."""
        rows = torch.arange(len(positions), device=positions.device)
        return [DecodeCache(store, rows, positions, span) for store in self.layers]

    def prefilling(self, prompt_of_slot: Tensor, first_slot: int) -> list[PrefillCache]:
        """Caches for whole prompts: slot `first_slot + i` receives the latents of prompt `prompt_of_slot[i]`."""
        return [PrefillCache(store, prompt_of_slot, first_slot) for store in self.layers]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` places of one slot to another."""
        for store in self.layers:
            store[target, :length] = store[source, :length]

    def clear(self, slot: int) -> None:
        """Zero a slot, after a sequence that left non-finite latents in it."""
        for store in self.layers:
            store[slot].zero_()


class DecodeCache:
    """One layer during a decode step."""

    def __init__(self, store: Tensor, rows: Tensor, positions: Tensor, span: int):
        self._store, self._rows, self._positions, self._span = store, rows, positions, span

    def append(self, latents: Tensor) -> Tensor:
        """Store latents [B, 1, W]; returns the view [B, span, W]."""
        self._store[self._rows, self._positions] = latents[:, 0]
        return self._store[: len(self._rows), : self._span]


class PrefillCache:
    """One layer during a prefill. A prompt with several samples is computed once and copied into each slot."""

    def __init__(self, store: Tensor, prompt_of_slot: Tensor, first_slot: int):
        self._store, self._prompt_of_slot, self._first = store, prompt_of_slot, first_slot

    def append(self, latents: Tensor) -> Tensor:
        """Store latents [P, T, W], padding included: a later token overwrites it before the mask shows it."""
        last = self._first + len(self._prompt_of_slot)
        self._store[self._first : last, : latents.shape[1]] = latents.index_select(0, self._prompt_of_slot)
        return latents
