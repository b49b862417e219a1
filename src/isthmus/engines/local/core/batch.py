"""One forward pass: which tokens run, where their entries go, and what each of them looks at.

Tokens are laid out flat. First come single tokens, each with a table of blocks of its own (a sequence that checks a
draft has two of them); behind them chunks of prompts. N tokens in all, M of them single.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from isthmus.engines.local.core.cache import PagedStore, blocks_for, places_of, to_tensor
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

    @property
    def positions(self) -> NDArray[np.int64]:
        return np.arange(self.start, self.start + len(self.tokens))


class StepBatch:
    """The tokens of one pass: `token_ids`, `position_ids` and the `place_ids` of their entries in a store, all [N]."""

    def __init__(self, singles: Singles | None, chunks: list[Chunk], store: PagedStore):
        self.singles = singles if singles is not None and len(singles.tokens) else None
        self.chunks, self._store = chunks, store
        self._singles_views: dict[int | None, tuple[Tensor, Tensor]] = {}
        self._views: dict[int | None, list[ChunkView]] = {}
        parts = [*([self.singles] if self.singles else []), *chunks]
        self.token_ids = np.concatenate([part.tokens for part in parts])
        self.position_ids = np.concatenate([part.positions for part in parts])
        self.place_ids = np.concatenate([self._places(part) for part in parts])
        self.single_count = len(self.singles.tokens) if self.singles else 0
        ends = np.cumsum([self.single_count, *(len(chunk.tokens) for chunk in chunks)]).tolist()
        self.chunk_rows = [slice(first, last) for first, last in pairwise(ends)]

    def __len__(self) -> int:
        return len(self.token_ids)

    def prepare(self, windows: Sequence[int | None] = (None,)) -> None:
        """Make what all layers with these windows look at, which else the first of them makes."""
        made: list[object] = [self.tokens, self.positions, self.places]
        made += [self._chunk_views(window) for window in windows]
        made += [self._singles_view(window) for window in windows] if self.singles else []

    @cached_property
    def tokens(self) -> Tensor:
        return to_tensor(self.token_ids, self._device)

    @cached_property
    def positions(self) -> Tensor:
        return to_tensor(self.position_ids, self._device)

    @cached_property
    def places(self) -> Tensor:
        return to_tensor(self.place_ids, self._device)

    @cached_property
    def tables(self) -> NDArray[np.int32]:
        """Blocks [N, span] of every token's sequence."""
        span = blocks_for(int(self.position_ids.max()) + 1, self._store.block_size)
        tables = np.zeros((len(self), span), dtype=np.int32)
        if self.singles:
            width = min(span, self.singles.tables.shape[1])
            tables[: self.single_count, :width] = self.singles.tables[:, :width]
        for chunk, rows in zip(self.chunks, self.chunk_rows, strict=True):
            width = min(span, len(chunk.table))
            tables[rows, :width] = chunk.table[:width]
        return tables

    def one_by_one(self) -> Iterator[StepBatch]:
        """The same tokens, each in a pass of its own, in an order in which each finds what it looks at."""
        for index in range(len(self)):
            one = slice(index, index + 1)
            yield StepBatch(Singles(self.token_ids[one], self.position_ids[one], self.tables[one]), [], self._store)

    def attend(
        self, store: Tensor, query: Tensor, entries: Tensor, layout: EntryLayout, scale: float
    ) -> Iterator[Tensor]:
        """query [N, H, key_size], the new entries [N, W] already in `store`: contexts [.., H, value_size], in order."""
        if self.single_count:
            yield self._attend_singles(store, query[: self.single_count], layout, scale)
        for view, rows in zip(self._chunk_views(layout.window), self.chunk_rows, strict=True):
            yield view.attend(store, query[rows], entries[rows], layout, scale)

    @property
    def _device(self) -> torch.device:
        return self._store.layers[0].device

    def _places(self, part: Singles | Chunk) -> NDArray[np.int64]:
        size = self._store.block_size
        if isinstance(part, Chunk):
            return places_of(part.table, part.positions, size)
        blocks = part.tables[np.arange(len(part.tokens)), part.positions // size].astype(np.int64)
        return blocks * size + part.positions % size

    def _singles_view(self, window: int | None) -> tuple[Tensor, Tensor]:
        """Places [M, S] of all entries that the single tokens may look at, and the mask [M, 1, 1, S] of the others."""
        if window not in self._singles_views:
            assert self.singles is not None
            own, tables, size = self.singles.positions[:, None], self.singles.tables, self._store.block_size
            longest = int(own.max()) + 1
            if window is None or window >= longest:
                seen = np.arange(blocks_for(longest, size) * size)[None]
            else:
                seen = np.maximum(own + 1 - window, 0) + np.arange(window)
            hidden = np.broadcast_to(seen > own, (len(own), seen.shape[1]))
            blocks = np.minimum(seen // size, tables.shape[1] - 1)
            places = np.take_along_axis(tables, np.broadcast_to(blocks, hidden.shape), 1).astype(np.int64) * size
            mask = to_tensor(np.where(hidden, np.float32("-inf"), np.float32(0.0)), self._device)
            self._singles_views[window] = to_tensor(places + seen % size, self._device), mask[:, None, None]
        return self._singles_views[window]

    def _chunk_views(self, window: int | None) -> list[ChunkView]:
        if window not in self._views:
            self._views[window] = [ChunkView(chunk, self._store, window) for chunk in self.chunks]
        return self._views[window]

    def _attend_singles(self, store: Tensor, query: Tensor, layout: EntryLayout, scale: float) -> Tensor:
        seen, mask = self._singles_view(layout.window)
        entries = store.index_select(0, seen.flatten()).view(*seen.shape, -1)
        return attend_entries(query.unsqueeze(1), entries, mask, layout, scale).squeeze(1)


class ChunkView:
    """What the tokens of one chunk look at."""

    def __init__(self, chunk: Chunk, store: PagedStore, window: int | None):
        device, length = store.layers[0].device, len(chunk.tokens)
        first = 0 if window is None else max(chunk.start + 1 - window, 0)
        end, fresh = chunk.start + length, chunk.start == 0
        places = None if fresh else places_of(chunk.table, np.arange(first, end), store.block_size)
        self._seen = None if places is None else to_tensor(places, device)
        later = torch.full((length, end - first), float("-inf"), device=device).triu(chunk.start - first + 1)
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
        self._store.index_copy_(0, self._batch.places, entries[0])
        parts = list(self._batch.attend(self._store, query[0], entries[0], layout, scale))
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).unsqueeze(0)
