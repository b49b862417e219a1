"""The forward passes of the engine: whole prompts, and one token for every active sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from isthmus.engines.local.cache import SlotCache
from isthmus.model.model import Model


class Runner:
    """A model and its cache. `model` may be exchanged between two calls."""

    def __init__(self, model: Model, slots: int, length: int):
        a = model.architecture
        weight = model.lm_head.weight
        self.model = model
        self.device = weight.device
        self.cache = SlotCache(a.num_hidden_layers, slots, length, a.cache_width, weight.dtype, weight.device)
        self._places = torch.arange(length, device=self.device)
        self._causal = torch.zeros(0, 0, device=self.device)

    def prefill(self, prompts: list[list[int]], prompt_of_slot: list[int], first_slot: int) -> Tensor:
        """Run prompts into slots `first_slot`, `first_slot` + 1, ...; logits [slots, V] after each slot's prompt."""
        longest = max(map(len, prompts))
        tokens = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=self.device)
        source = torch.tensor(prompt_of_slot, device=self.device)
        positions = self._places[:longest].expand(len(prompts), longest)
        caches = self.cache.prefilling(source, first_slot)
        hidden = self.model.hidden(tokens, positions, self._causal_mask(longest), caches)
        last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=self.device)
        final = hidden[torch.arange(len(prompts), device=self.device), last]
        return self.model.logits(final).index_select(0, source)

    def decode(self, tokens: Tensor, positions: Tensor, span: int) -> Tensor:
        """One step for slots [0, B): tokens [B] at positions [B], all below `span`. Returns logits [B, V]."""
        tokens, positions = tokens.to(self.device), positions.to(self.device)
        hidden_places = self._places[:span] > positions.unsqueeze(1)
        mask = torch.zeros(hidden_places.shape, device=self.device).masked_fill_(hidden_places, float("-inf"))
        caches = self.cache.decoding(positions, span)
        hidden = self.model.hidden(tokens.unsqueeze(1), positions.unsqueeze(1), mask[:, None, None], caches)
        return self.model.logits(hidden[:, 0])

    def _causal_mask(self, length: int) -> Tensor:
        if length > len(self._causal):
            self._causal = torch.full((length, length), float("-inf"), device=self.device).triu(1)
        return self._causal[None, None, :length, :length]
