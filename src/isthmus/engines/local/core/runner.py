"""The forward passes of the engine: one for the model, one for the drafts of its multi-token prediction."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from isthmus.engines.local.core.batch import Chunk, LayerView, Singles, StepBatch
from isthmus.engines.local.core.cache import PagedStore, blocks_for
from isthmus.engines.local.core.native import NativeModel, NativeUnavailable
from isthmus.model.model import Model
from isthmus.model.moe import MixtureOfExperts, Router, Trace

NATIVE_WORK = 32768
"""Up to so many tokens times hidden size the compiled layers are faster than torch's operators."""


class Runner:
    """A model and its cache. Block 0 is left to fill up tables.

    With `drafts` the cache has a layer for multi-token prediction. With `row_by_row` each token gets the same bits
    whatever else is in the pass. `native` False keeps to torch's operators, which a rehearsal can see. `record_routes`
    notes the experts of every token in the store.
    """

    def __init__(
        self,
        model: Model,
        blocks: int,
        block_size: int,
        *,
        drafts: bool = False,
        row_by_row: bool = False,
        threads: int = 1,
        native: bool = True,
        record_routes: bool = False,
    ):
        a, weight = model.architecture, model.lm_head.weight
        layers = a.num_hidden_layers + (1 if drafts else 0)
        self.row_by_row, self._threads, self._wants_native = row_by_row, threads, native
        width = sum(router.top_k for router in self._routers(model)) if record_routes else 0
        self.store = PagedStore(layers, blocks, block_size, a.cache_width, weight.dtype, weight.device, width)
        self.use(model)

    def use(self, model: Model) -> None:
        """Compute with this model from the next pass on. If this raises, the former one stays in use."""
        native, kernels = self._compiled(model)
        self.model, self.native, self.kernels = model, native, kernels

    def _compiled(self, model: Model) -> tuple[NativeModel | None, str]:
        """The model's compiled layers, and what `kernels` says."""
        if not self._wants_native:
            return None, "torch"
        try:
            return NativeModel(model, self.store.block_size, self._threads), "native"
        except NativeUnavailable as reason:
            return None, f"torch: {reason}"

    def hidden(self, batch: StepBatch) -> Tensor:
        """States [N, D] before the final norm."""
        if self.native is not None and self._suits(len(batch)):
            return self.native.hidden(batch, self.store.layers, self.store.routes)
        if self.row_by_row and len(batch) > 1:
            return torch.cat([self.hidden(one) for one in batch.one_by_one()])
        caches = [LayerView(store, batch) for store in self.store.layers]
        trace = None if self.store.routes is None else Trace()
        hidden = self.model.hidden(batch.tokens[None], batch.positions[None], caches=caches, trace=trace)[0]
        if trace is not None and self.store.routes is not None:
            experts = torch.cat([routing.experts for routing in trace.routings], dim=1)
            self.store.routes[batch.place_ids] = experts.cpu().numpy()
        return hidden

    @staticmethod
    def _routers(model: Model) -> list[Router]:
        """Those of the layers that `hidden` passes."""
        last = None if model.mtp_layer is None or not isinstance(model.mtp_layer.mlp, MixtureOfExperts) else -1
        return model.routers()[:last]

    def draft_states(self, hidden: Tensor, batch: StepBatch) -> Tensor:
        """States [N, D] for the output head, of the token after `batch.tokens`, which follow those of `hidden`."""
        store = self.store.layers[-1]
        if self.native is not None and self._suits(len(batch)):
            layer = self.model.mtp_layer
            assert layer is not None
            joined = layer.join(self.model.model.embed_tokens(batch.tokens), hidden)
            return layer.shared_head.norm(self.native.last_layer(joined, batch, store))
        positions = batch.positions[None]
        return self.model.mtp_next(hidden[None], batch.tokens[None], positions, None, cache=LayerView(store, batch))[0]

    def head(self, states: Tensor) -> Tensor:
        """Logits [N, V] of states [N, D] that have passed a final norm."""
        return self._output(states, normed=True)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [N, V] of what `hidden` returns."""
        return self._output(hidden, normed=False)

    def _output(self, states: Tensor, normed: bool) -> Tensor:
        if self.native is not None and self._suits(len(states)):
            return self.native.logits(states, normed)
        if self.row_by_row and len(states) > 1:
            return torch.cat([self._output(one, normed) for one in states.split(1)])
        return self.model.lm_head(states) if normed else self.model.logits(states)

    def _suits(self, tokens: int) -> bool:
        return self.row_by_row or tokens * self.model.architecture.hidden_size <= NATIVE_WORK


class Trial:
    """A few sequences from position 0 in a cache of their own: what is needed to look at an engine's passes alone."""

    def __init__(self, model: Model, sequences: int, length: int, block_size: int = 16):
        each = blocks_for(length, block_size)
        self.runner = Runner(model, sequences * each + 1, block_size, native=False)
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
