"""The whole model. Its state dict has the tensor names of a published checkpoint of its architecture."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from isthmus.model.attention import LayerCache, Mask, RMSNorm, RotaryTable
from isthmus.model.dense import GroupedQueryLayer
from isthmus.model.layer import DecoderLayer, ResidualLayer
from isthmus.model.moe import Experts, MixtureOfExperts, Router, Trace
from isthmus.model.mtp import MtpLayer
from isthmus.recipe.architecture import DeepseekSection, GroupedSection, ModelSection

Result = TypeVar("Result")


class Backbone(nn.Module):
    """Everything under the prefix `model.` of a published checkpoint."""

    def __init__(self, architecture: ModelSection):
        super().__init__()
        a = architecture
        self.embed_tokens = nn.Embedding(a.vocab_size, a.hidden_size)
        self.layers = nn.ModuleList(_layers(a))
        self.norm = RMSNorm(a.hidden_size, a.rms_norm_eps)
        self.rotary = RotaryTable(a)


def _layers(architecture: ModelSection) -> list[DecoderLayer] | list[GroupedQueryLayer]:
    a, depth = architecture, architecture.num_hidden_layers
    if isinstance(a, GroupedSection):
        return [GroupedQueryLayer(a, index) for index in range(depth)]
    assert isinstance(a, DeepseekSection)
    decoders = [DecoderLayer(a, index) for index in range(depth)]
    return decoders + [MtpLayer(a, depth + index) for index in range(a.num_nextn_predict_layers)]


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
        """Fill the parameters of a whole model with `initial_values`."""
        parameters = self.state_dict()
        with torch.no_grad():
            for name, value in self.initial_values(seed):
                parameters[name].copy_(value)
        return self

    def initial_values(
        self, seed: int, wants: Callable[[str], bool] = lambda name: True
    ) -> Iterator[tuple[str, Tensor]]:
        """Whole parameters by published name: normal with the architecture's initializer_range, norms one, biases zero.

        Each depends on the seed and its name alone, whatever of the model is here. Only those that `wants` names.
        """
        for prefix, module in self.named_modules():
            if module is self.lm_head and self.architecture.tie_word_embeddings:
                continue
            for name, parameter in module.named_parameters(recurse=False):
                if isinstance(module, Experts):
                    shapes = module.published_shapes(name)
                else:
                    shapes = {name: parameter.shape}
                for published, shape in shapes.items():
                    if wants(full := f"{prefix}.{published}"):
                        yield full, self._initial_value(module, full, shape, seed)

    def _initial_value(self, module: nn.Module, name: str, shape: torch.Size, seed: int) -> Tensor:
        if isinstance(module, RMSNorm):
            return torch.ones(shape)
        if name.endswith(".bias"):
            return torch.zeros(shape)
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        return torch.empty(shape).normal_(0.0, self.architecture.initializer_range, generator=generator)

    def forward(self, tokens: Tensor, positions: Tensor | None = None, mask: Mask | None = None) -> Tensor:
        """Logits [B, T, vocab] of tokens [B, T]; positions count from 0 and the mask is causal unless given."""
        return self.logits(self.hidden(tokens, positions, mask))

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        mask: Mask | None = None,
        caches: Sequence[LayerCache] | None = None,
        trace: Trace | None = None,
    ) -> Tensor:
        """States [B, T, D] before the final norm. `caches`, one per layer, take the place of the mask."""
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        if mask is None and caches is None:
            mask = causal_mask(tokens.shape[1], tokens.device)
        rotation = self.model.rotary(positions)
        x = self.model.embed_tokens(tokens)
        for index in range(self.architecture.num_hidden_layers):
            x = self.model.layers[index](x, rotation, mask, caches[index] if caches else None, trace)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of states [..., D] before the final norm."""
        return self.lm_head(self.model.norm(hidden))

    def mtp_states(
        self, hidden: Tensor, tokens: Tensor, positions: Tensor, mask: Mask, trace: Trace | None = None
    ) -> Tensor:
        """States [B, T, D] for the output head, each with what comes after the next token; the last one is void."""
        return self.mtp_next(hidden, tokens.roll(-1, dims=1), positions, mask, trace)

    def mtp_next(
        self,
        hidden: Tensor,
        next_tokens: Tensor,
        positions: Tensor,
        mask: Mask | None,
        trace: Trace | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """States [B, T, D] for the output head: what comes after `next_tokens` [B, T], which follow those of `hidden`.

        A `cache` takes the place of the mask.
        """
        layer = self.mtp_layer
        assert layer is not None, "this architecture has no multi-token prediction"
        return layer(self.model.embed_tokens(next_tokens), hidden, self.model.rotary(positions), mask, trace, cache)

    def recompute_activations(self) -> None:
        """Compute each layer again in the backward pass, instead of keeping its intermediate results."""
        for layer in self.model.layers:
            assert isinstance(layer, ResidualLayer)
            layer.recompute = True

    def compute(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """work(model, *arguments), as a forward pass: where parameters are sharded, it finds them whole."""
        return work(self, *arguments)

    @property
    def mtp_layer(self) -> MtpLayer | None:
        last = self.model.layers[-1]
        return last if isinstance(last, MtpLayer) else None

    @property
    def windows(self) -> list[int | None]:
        """The sliding windows of its layers, each once; None for layers that look at all."""
        return list(dict.fromkeys(layer.self_attn.layout.window for layer in self.model.layers))  # pyright: ignore

    def routers(self) -> list[Router]:
        """The routers in the order in which a trace lists their decisions (the MTP layer's last)."""
        return [layer.mlp.gate for layer in self.model.layers if isinstance(layer.mlp, MixtureOfExperts)]


def causal_mask(length: int, device: torch.device | None = None) -> Tensor:
    """Additive mask [1, 1, T, T]: 0 where a token may look, -inf where not."""
    return torch.full((length, length), float("-inf"), device=device).triu(1)[None, None]
