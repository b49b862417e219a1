"""One forward pass: which tokens run, where their entries go, and what each of them looks at.

Tokens are laid out flat. First come single tokens, each with a table of blocks of its own (a sequence that checks a
draft has two of them); behind them chunks of prompts. N tokens in all, M of them single.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from isthmus.engines.local.cache import PagedStore, blocks_for, places_of, to_tensor
from isthmus.model.attention import EntryLayout, attend_entries


@dataclass(frozen=True)
class Singles:
    """Tokens [M] at positions [M] of sequences whose blocks are `tables` [M, at least the blocks in use]."""

    tokens: NDArray[np.int64]
    positions: NDArray[np.int64]
    tables: NDArray[np.int32]


@dataclass(frozen=True)
class Chunk:
    """Tokens [T] of one sequence from position `start` on; `table` holds its blocks."""

    tokens: NDArray[np.int64]
    start: int
    table: NDArray[np.int32]


class StepBatch:
    """The tokens of one pass, as tensors on the model's device."""

    def __init__(self, singles: Singles | None, chunks: list[Chunk], store: PagedStore):
        size, device = store.block_size, store.layers[0].device
        tokens, positions, places = [], [], []
        self.single_count = 0
        if singles is not None and len(singles.tokens):
            self.single_count = len(singles.tokens)
            tokens.append(singles.tokens)
            positions.append(singles.positions)
            rows = np.arange(self.single_count)
            blocks = singles.tables[rows, singles.positions // size].astype(np.int64)
            places.append(blocks * size + singles.positions % size)
            self._set_singles(singles, size, device)
        self.parts = []
        first = self.single_count
        for chunk in chunks:
            where = np.arange(chunk.start, chunk.start + len(chunk.tokens))
            tokens.append(chunk.tokens)
            positions.append(where)
            places.append(places_of(chunk.table, where, size))
            self.parts.append(ChunkPart(chunk, first, size, device))
            first += len(chunk.tokens)
        self.tokens = to_tensor(np.concatenate(tokens), device)
        self.positions = to_tensor(np.concatenate(positions), device)
        self.places = to_tensor(np.concatenate(places), device)

    def _set_singles(self, singles: Singles, size: int, device: torch.device) -> None:
        span = blocks_for(int(singles.positions.max()) + 1, size)
        tables = singles.tables[:, :span].astype(np.int64)
        self.tables = np.ascontiguousarray(singles.tables[:, :span])
        self.lengths = singles.positions + 1
        seen = (tables[:, :, None] * size + np.arange(size)).reshape(len(tables), -1)
        hidden = np.arange(seen.shape[1]) > singles.positions[:, None]
        self._seen = to_tensor(seen, device)
        self._mask = to_tensor(np.where(hidden, np.float32("-inf"), np.float32(0.0)), device)[:, None, None]

    def attend_singles(self, store: Tensor, query: Tensor, layout: EntryLayout, scale: float) -> Tensor:
        """query [M, H, key_size] over the entries of each token's own sequence: [M, H, value_size]."""
        shape = self._seen.shape
        entries = store.index_select(0, self._seen.flatten()).view(*shape, -1)
        return attend_entries(query.unsqueeze(1), entries, self._mask, layout, scale).squeeze(1)


class ChunkPart:
    """One chunk in the flat layout."""

    def __init__(self, chunk: Chunk, first: int, size: int, device: torch.device):
        length, end = len(chunk.tokens), chunk.start + len(chunk.tokens)
        self.rows = slice(first, first + length)
        self.start = chunk.start
        self._seen = None if chunk.start == 0 else to_tensor(places_of(chunk.table, np.arange(end), size), device)
        later = torch.full((length, end), float("-inf"), device=device).triu(chunk.start + 1)
        self._mask = later[None, :, None]

    def attend(self, store: Tensor, query: Tensor, entries: Tensor, layout: EntryLayout, scale: float) -> Tensor:
        """query [T, H, key_size], with the chunk's own entries [T, W] already in `store`: [T, H, value_size]."""
        seen = entries if self._seen is None else store.index_select(0, self._seen)
        return attend_entries(query.unsqueeze(0), seen.unsqueeze(0), self._mask, layout, scale).squeeze(0)


class LayerView:
    """One layer of the store during one pass: what the attention of that layer talks to."""

    def __init__(self, store: Tensor, batch: StepBatch):
        self._store, self._batch = store, batch

    def attend(self, query: Tensor, entries: Tensor, layout: EntryLayout, scale: float) -> Tensor:
        """query [1, N, H, key_size], new entries [1, N, W]: [1, N, H, value_size]."""
        batch, flat_query, flat_entries = self._batch, query[0], entries[0]
        self._store.index_copy_(0, batch.places, flat_entries)
        singles = batch.single_count
        parts = []
        if singles:
            parts.append(batch.attend_singles(self._store, flat_query[:singles], layout, scale))
        for part in batch.parts:
            parts.append(part.attend(self._store, flat_query[part.rows], flat_entries[part.rows], layout, scale))
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).unsqueeze(0)
