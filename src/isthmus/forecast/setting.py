"""A training setting in the terms that decide its speed: model, device, layout."""

from __future__ import annotations

from dataclasses import dataclass, replace

from isthmus.forecast.count import attention_width, count_parameters, forward_flops
from isthmus.forecast.device import Device
from isthmus.recipe.architecture import MixtureSection, ModelSection


@dataclass(frozen=True)
class ModelShape:
    """A model as its speed depends on it.

    `total` and `active` are parameters; `attention_width` is heads times the width of a query and a value, as a mean
    over the layers; `experts_per_token` is 0 for a dense model and `sparse_share` the share of layers with experts.
    """

    name: str
    total: float
    active: float
    layers: float
    hidden: float
    attention_width: float
    experts_per_token: float = 0.0
    sparse_share: float = 0.0

    @property
    def is_mixture(self) -> bool:
        return self.experts_per_token > 0.0

    def matrix_flops(self) -> float:
        """Of a training step per token in the matrices that parameters form: 6 per active parameter."""
        return 6.0 * self.active

    def attention_flops(self, row_length: float) -> float:
        """Of a training step per token in scores and values, causal: a token sees half of its row on average."""
        return 3.0 * self.layers * self.attention_width * row_length


@dataclass(frozen=True)
class Setting:
    """One training set-up. Rows of `row_length` tokens, `batch_rows` of them to an update over `count` devices.

    `precision` is "BF16", "FP8" or "FP4", and `recipe` how the source calls it. The layout: `tensor`, `pipeline` in
    `stages_per_rank` virtual stages, `context`, `expert` parallelism; `microbatch` rows are computed at once.
    `sharded`: parameters are gathered layer by layer; `checkpointing`: layers are computed again in the backward pass.
    `software` is the release of the training program in years since 2000, `source` who published it. None: not stated.
    """

    model: ModelShape
    device: Device
    count: int
    precision: str
    source: str
    recipe: str = ""
    row_length: float | None = None
    batch_rows: float | None = None
    tensor: float | None = None
    pipeline: float | None = None
    stages_per_rank: float | None = None
    context: float | None = None
    expert: float | None = None
    microbatch: float | None = None
    accumulation: float | None = None
    sharded: bool = False
    checkpointing: bool = False
    software: float | None = None
    layout: str = ""

    @property
    def length(self) -> float:
        """Tokens of a row; 4096 where the source does not say."""
        return self.row_length or 4096.0

    @property
    def peak(self) -> float:
        """FLOP/s of the device at this precision. Only for a device that has one."""
        peak = self.device.peak(self.precision)
        assert peak is not None
        return peak * 1e12

    @property
    def flops_per_token(self) -> float:
        """Of a training step, forward and backward, without what is computed again."""
        return self.model.matrix_flops() + self.model.attention_flops(self.length)

    def on(self, device: Device, count: int) -> Setting:
        """The same work on another pool."""
        return replace(self, device=device, count=count)


def shape_of(name: str, architecture: ModelSection, context: float) -> ModelShape:
    """The shape of an architecture of a recipe, from its exact counts, with sliding windows at a row of `context`."""
    count = count_parameters(architecture)
    matrices = count.active - count.embedding - count.norms - count.biases
    if architecture.tie_word_embeddings:
        matrices += count.embedding
    rest = forward_flops(architecture, context) - 2.0 * matrices
    seen = rest / (2.0 * context * architecture.num_hidden_layers) if context else attention_width(architecture)
    layers = architecture.num_hidden_layers
    experts = float(architecture.num_experts_per_tok) if isinstance(architecture, MixtureSection) else 0.0
    return ModelShape(
        name=name,
        total=float(count.main),
        active=float(matrices),
        layers=float(layers),
        hidden=float(architecture.hidden_size),
        attention_width=seen,
        experts_per_token=experts,
        sparse_share=len(architecture.sparse_layers) / layers,
    )
