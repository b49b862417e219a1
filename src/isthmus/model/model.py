"""The whole model. Its state dict has the tensor names of a published DeepSeek-V3 checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from isthmus.model.attention import LayerCache, RMSNorm, RotaryTable
from isthmus.model.layer import DecoderLayer
from isthmus.model.moe import Experts, MixtureOfExperts, Router, Routing
from isthmus.model.mtp import MtpLayer
from isthmus.recipe import ModelSection


class Backbone(nn.Module):
    """Everything under the prefix `model.` of a published checkpoint."""

    def __init__(self, architecture: ModelSection):
        super().__init__()
        a = architecture
        depth = a.num_hidden_layers
        self.embed_tokens = nn.Embedding(a.vocab_size, a.hidden_size)
        decoders: list[DecoderLayer] = [DecoderLayer(a, index) for index in range(depth)]
        decoders += [MtpLayer(a, depth + index) for index in range(a.num_nextn_predict_layers)]
        self.layers = nn.ModuleList(decoders)
        self.norm = RMSNorm(a.hidden_size, a.rms_norm_eps)
        self.rotary = RotaryTable(a)


class Model(nn.Module):
    """An R-series model. `hidden` gives the states before the final norm, `logits` turns states into logits."""

    def __init__(self, architecture: ModelSection):
        super().__init__()
        self.architecture = architecture
        self.model = Backbone(architecture)
        self.lm_head = nn.Linear(architecture.hidden_size, architecture.vocab_size, bias=False)
        if architecture.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def initialise(self, seed: int) -> Model:
        """Normal weights with the architecture's initializer_range, norms at one; the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding | Router):
                _normal(module.weight, self.architecture.initializer_range, generator)
            elif isinstance(module, Experts):
                _normal(module.gate_up, self.architecture.initializer_range, generator)
                _normal(module.down, self.architecture.initializer_range, generator)
        return self

    def forward(self, tokens: Tensor, positions: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Logits [B, T, vocab] of tokens [B, T]; positions count from 0 and the mask is causal unless given."""
        return self.logits(self.hidden(tokens, positions, mask))

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        caches: Sequence[LayerCache] | None = None,
        trace: list[Routing] | None = None,
    ) -> Tensor:
        """States [B, T, D] before the final norm. With `caches` (one per layer) a mask [B, 1, T, S] must be given."""
        positions, mask = self._defaults(tokens, positions, mask)
        rotation = self.model.rotary(positions)
        x = self.model.embed_tokens(tokens)
        for index in range(self.architecture.num_hidden_layers):
            x = self.model.layers[index](x, rotation, mask, caches[index] if caches else None, trace)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of states [..., D] before the final norm."""
        return self.lm_head(self.model.norm(hidden))

    def mtp_logits(
        self, hidden: Tensor, tokens: Tensor, positions: Tensor, mask: Tensor, trace: list[Routing] | None = None
    ) -> Tensor:
        """Logits [B, T - 1, vocab] of token i + 2, from the states [B, T, D] of tokens [B, T]."""
        layer = self.mtp_layer
        assert layer is not None, "this architecture has no multi-token prediction"
        rotation = self.model.rotary(positions[:, :-1])
        embedded = self.model.embed_tokens(tokens[:, 1:])
        return self.lm_head(layer.predict(embedded, hidden[:, :-1], rotation, mask[..., :-1, :-1], trace))

    @property
    def mtp_layer(self) -> MtpLayer | None:
        last = self.model.layers[-1]
        return last if isinstance(last, MtpLayer) else None

    def routers(self) -> list[Router]:
        """The routers in the order in which a trace lists their decisions (the MTP layer's last)."""
        return [layer.mlp.gate for layer in self.model.layers if isinstance(layer.mlp, MixtureOfExperts)]

    def _defaults(self, tokens: Tensor, positions: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        batch, length = tokens.shape
        if positions is None:
            positions = torch.arange(length, device=tokens.device).expand(batch, length)
        return positions, causal_mask(length, tokens.device) if mask is None else mask


def causal_mask(length: int, device: torch.device | None = None) -> Tensor:
    """Additive mask [1, 1, T, T]: 0 where a token may look, -inf where not."""
    return torch.full((length, length), float("-inf"), device=device).triu(1)[None, None]


def document_mask(document: Tensor) -> Tensor:
    """Additive mask [B, 1, T, T] for packed rows: causal, and only within a document. `document` [B, T] holds ids."""
    same = document.unsqueeze(-1) == document.unsqueeze(-2)
    allowed = same & torch.ones_like(same).tril()
    return torch.zeros(allowed.shape, device=document.device).masked_fill(~allowed, float("-inf")).unsqueeze(1)


def _normal(weight: Tensor, std: float, generator: torch.Generator) -> None:
    with torch.no_grad():
        weight.copy_(torch.randn(weight.shape, generator=generator) * std)
