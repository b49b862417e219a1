"""The forward passes of the engine: one for the model, one for the drafts of its multi-token prediction."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from isthmus.engines.local.batch import Chunk, LayerView, Singles, StepBatch
from isthmus.engines.local.cache import PagedStore, blocks_for
from isthmus.model.model import Model


class Runner:
    """A model and its cache. `model` may be exchanged between two passes.

    With `drafts` the cache has a layer for multi-token prediction. Block 0 is left to fill up tables.
    """

    def __init__(self, model: Model, blocks: int, block_size: int, drafts: bool = False, row_by_row: bool = False):
        a, weight = model.architecture, model.lm_head.weight
        layers = a.num_hidden_layers + (1 if drafts else 0)
        self.row_by_row = row_by_row
        self.use(model)
        self.store = PagedStore(layers, blocks, block_size, a.cache_width, weight.dtype, weight.device)

    def use(self, model: Model) -> None:
        """Compute with this model from the next pass on."""
        self.model = model

    def hidden(self, batch: StepBatch) -> Tensor:
        """States [N, D] before the final norm."""
        caches = [LayerView(store, batch) for store in self.store.layers]
        return self.model.hidden(batch.tokens[None], batch.positions[None], caches=caches)[0]

    def draft_states(self, hidden: Tensor, batch: StepBatch) -> Tensor:
        """States [N, D] for the output head, of the token after `batch.tokens`, which follow those of `hidden`."""
        cache = LayerView(self.store.layers[-1], batch)
        positions = batch.positions[None]
        return self.model.mtp_next(hidden[None], batch.tokens[None], positions, None, cache=cache)[0]

    def head(self, states: Tensor) -> Tensor:
        """Logits [..., V] of states that have passed a final norm."""
        return self.model.lm_head(states)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of what `hidden` returns."""
        return self.model.logits(hidden)


class Trial:
    """A few sequences from position 0 in a cache of their own: what is needed to look at an engine's passes alone."""

    def __init__(self, model: Model, sequences: int, length: int, block_size: int = 16):
        each = blocks_for(length, block_size)
        self.runner = Runner(model, sequences * each + 1, block_size)
        self.tables = np.arange(1, sequences * each + 1, dtype=np.int32).reshape(sequences, each)
        self.lengths = np.zeros(sequences, dtype=np.int64)

    def prefill(self, prompts: list[list[int]]) -> Tensor:
        """Logits [sequences, V] after each prompt."""
        chunks = [Chunk(np.array(prompt), 0, table) for prompt, table in zip(prompts, self.tables, strict=True)]
        batch = StepBatch(None, chunks, self.runner.store)
        self.lengths[:] = [len(prompt) for prompt in prompts]
        last = torch.tensor(np.cumsum(self.lengths) - 1, device=batch.tokens.device)
        return self.runner.logits(self.runner.hidden(batch)[last])

    def decode(self, tokens: Tensor) -> Tensor:
        """Logits [sequences, V] after one more token for each."""
        singles = Singles(tokens.cpu().numpy(), self.lengths.copy(), self.tables)
        self.lengths += 1
        return self.runner.logits(self.runner.hidden(StepBatch(singles, [], self.runner.store)))
