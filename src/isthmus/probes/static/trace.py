"""A training step and a serving pass of a recipe's own model, traced at full size on the meta device.

What the trace takes for granted, because nothing has a value there:

- Every row of a microbatch is one document, and all of its tokens are targets.
- The tokens spread evenly over the experts, and over the ranks that hold them.
- Layers of one kind and shape issue the same calls: the first of each kind runs, the others only pass shapes on and
  count as many times. `every_layer` runs them all.
- Where torch itself chooses by kind of device (a fused loop over tensors, for example), it takes the plain way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.fx.experimental._config as symbolic
from torch import Tensor, nn

from isthmus.engines.local.core.batch import Chunk, LayerView, Singles, StepBatch
from isthmus.engines.local.core.cache import blocks_for
from isthmus.engines.local.core.runner import Runner
from isthmus.errors import IsthmusError
from isthmus.model.attention import EntryLayout
from isthmus.model.documents import Documents
from isthmus.model.layer import ResidualLayer
from isthmus.model.model import Model
from isthmus.model.moe import MixtureOfExperts, Routing
from isthmus.probes.static.costs import (
    ALL_GATHER,
    ALL_REDUCE,
    ALL_TO_ALL,
    OUTSIDE,
    REDUCE_SCATTER,
    Call,
    Collective,
    CostRecorder,
    Costs,
)
from isthmus.probes.static.sites import OPTIMISER, Site, cached_attention, watch_sites
from isthmus.recipe.architecture import MixtureSection, ModelSection
from isthmus.recipe.practice import first_text, pretrained
from isthmus.recipe.schema import Recipe, TrainSection, layout_problem
from isthmus.recipe.steps import TextSection
from isthmus.trainer.batch import Batch
from isthmus.trainer.optimizer import Optimizer
from isthmus.trainer.parallel import TokenExchange
from isthmus.trainer.parts import Part, parts_of
from isthmus.trainer.step import microbatch_losses, update_router_bias

META = torch.device("meta")
LONGEST_ROW = 4096
"""Tokens of a traced row, and of a traced prompt, where the recipe does not say."""
BLOCK = 16
"""Tokens of a block of the cache."""


@dataclass(frozen=True)
class Layout:
    """How `ranks` processes divide a model: see [train] in the recipe."""

    ranks: int = 1
    replicate: int = 1
    expert: int = 1

    @classmethod
    def of(cls, model: ModelSection, section: TrainSection, ranks: int) -> Layout:
        """The layout of a recipe. Raises IsthmusError if so many ranks cannot divide the model so."""
        if problem := layout_problem(model, section, ranks):
            raise IsthmusError(problem)
        return cls(ranks, section.replicate, section.expert)

    @property
    def shard(self) -> int:
        """Ranks that share all parameters but those of the routed experts."""
        return self.ranks // self.replicate

    @property
    def expert_shard(self) -> int:
        """Ranks that share the routed experts of one place in the exchange."""
        return self.shard // self.expert


@dataclass(frozen=True)
class Options:
    """What decides which kernels run: the dtype of forward and backward, the operator that computes attention in one
    piece, and whether the chip has grouped products. `every_layer` traces layers that are alike one by one."""

    dtype: torch.dtype = torch.bfloat16
    whole_attention: str | None = None
    grouped: bool = False
    every_layer: bool = False


def training_costs(recipe: Recipe, layout: Layout, options: Options) -> dict[str, Costs]:
    """One training step of one rank: `model` (forward and backward), `sharding` (what FSDP2 adds), `optimizer`.

    The step is the first on plain text, else supervised training.
    """
    section, plain = first_text(recipe), pretrained(recipe)
    length = plain.row_length if plain else LONGEST_ROW
    length = min(length, recipe.model.max_position_embeddings)
    batch = full_rows(recipe.train.rows_per_microbatch or 1, length)
    with META:
        model = Model(recipe.model)
    recorder = CostRecorder(whole_attention=options.whole_attention)
    watch_sites(model, recorder.sites.add, layout.expert)
    _exchange_tokens(model, layout, recorder)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(options.dtype)
    for module in _mixtures(model):
        module.experts.grouped = options.grouped and module.experts.aligned
    if recipe.train.activation_checkpointing:
        model.recompute_activations()
    costs = step_costs(model, batch, section, recorder, every_layer=options.every_layer)
    return {
        "model": costs,
        "sharding": sharding_costs(model, layout) if layout.ranks > 1 or options.dtype != torch.float32 else Costs(),
        "optimizer": optimizer_costs(recipe.model, section, layout, every_part=options.every_layer),
    }


def full_rows(rows: int, length: int) -> Batch:
    """Rows that are one document each, without padding; every token but a row's first is a target."""
    shape = (rows, length)
    target = torch.ones(shape, dtype=torch.bool)
    target[:, 0] = False
    return Batch(
        tokens=torch.zeros(shape, dtype=torch.long),
        positions=torch.arange(length).expand(shape),
        document=torch.arange(rows)[:, None].expand(shape),
        target_mask=target,
    )


def step_costs(model: Model, batch: Batch, section: TextSection, recorder: CostRecorder, *, every_layer: bool) -> Costs:
    """Forward and backward of `batch` on the device of `model`, and the update of the routers' biases."""
    device = next(model.parameters()).device
    times = mark_layers(model, recorder, every_layer=every_layer)
    spans = Documents.of(batch.document, model.architecture.num_attention_heads).to(device)
    documents, counts, batch = batch.num_documents, batch.counts().to(device), batch.to(device)
    assume = symbolic.patch(meta_nonzero_assume_all_nonzero=True)  # pyright: ignore[reportAttributeAccessIssue]
    with assume, recorder.watching():
        total, sums = microbatch_losses(model, batch, spans, documents, counts, section)
        total.backward()
        if isinstance(model.architecture, MixtureSection):
            loads = list(sums[3:].view(-1, model.architecture.n_routed_experts))
            update_router_bias(model.routers(), loads, section.bias_update_speed)
    return recorder.total(times)


def _mixtures(model: Model) -> list[MixtureOfExperts]:
    return [module for module in model.modules() if isinstance(module, MixtureOfExperts)]


def mark_layers(model: Model, recorder: CostRecorder, *, every_layer: bool) -> dict[str, int]:
    """Give every kind of layer a scope of its own, and return how often each scope counts.

    Unless `every_layer`, only the first layer of a kind computes; the layer of multi-token prediction always does.
    """
    seen: dict[str, str] = {}
    times: Counter[str] = Counter()
    for index, layer in enumerate(model.model.layers[: model.architecture.num_hidden_layers]):
        assert isinstance(layer, ResidualLayer)
        kind = _kind(layer)
        scope = seen.setdefault(kind, f"layer {index} and alike")
        first = times[scope] == 0
        times[scope] += 1
        layer.forward = (_computed if first or every_layer else _passed_on)(layer, recorder, scope)
    return {scope: 1 if every_layer else count for scope, count in times.items()}


def _kind(layer: ResidualLayer) -> str:
    """Same for layers that issue the same calls: their modules, sizes and settings."""
    shapes = [(name, tuple(one.shape), str(one.dtype)) for name, one in layer.named_parameters()]
    window = layer.self_attn.layout.window  # pyright: ignore[reportAttributeAccessIssue]
    return f"{type(layer).__name__} {type(layer.mlp).__name__} {layer.recompute} {window} {shapes}"


def _computed(layer: ResidualLayer, recorder: CostRecorder, scope: str) -> Callable[..., Tensor]:
    forward = layer.forward

    def run(x: Tensor, *arguments: Any, **named: Any) -> Tensor:
        x = _Scope.apply(x, recorder, scope, OUTSIDE)  # pyright: ignore[reportAssignmentType]
        y = forward(x, *arguments, **named)
        return _Scope.apply(y, recorder, OUTSIDE, scope)  # pyright: ignore[reportReturnType]

    return run


class _Scope(torch.autograd.Function):
    """Changes the recorder's scope in the forward pass, and to another in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, recorder: CostRecorder, scope: str, backward_scope: str) -> Tensor:
        ctx.recorder, ctx.backward_scope = recorder, backward_scope
        recorder.scope = scope
        with recorder.pause():
            return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None, None]:
        ctx.recorder.scope = ctx.backward_scope
        return gradients[0], None, None, None


def _passed_on(layer: ResidualLayer, recorder: CostRecorder, _scope: str) -> Callable[..., Tensor]:
    """Shapes of what the layer would give, and of its router's decision, without computing it."""
    mlp = layer.mlp
    experts, choices = (mlp.num_experts, mlp.gate.top_k) if isinstance(mlp, MixtureOfExperts) else (0, 0)

    def run(x: Tensor, rotation: object, mask: object, cache: object = None, trace: Any = None) -> Tensor:
        y, scores = _PassedOn.apply(x, experts, recorder)  # pyright: ignore[reportGeneralTypeIssues]
        if trace is not None and experts:
            with recorder.pause():
                chosen = torch.empty(len(scores), choices, dtype=torch.long, device=x.device)
                trace.routings.append(Routing(chosen, scores.new_empty(chosen.shape), scores))
        return y

    return run


class _PassedOn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, experts: int, recorder: CostRecorder) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.recorder = recorder
        ctx.like = x.shape, x.dtype
        with recorder.pause():
            wide = torch.promote_types(x.dtype, torch.float32)
            return torch.empty_like(x), x.new_empty(x.numel() // x.shape[-1], experts, dtype=wide)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:
        shape, dtype = ctx.like
        with ctx.recorder.pause():
            return gradients[0].new_empty(shape, dtype=dtype), None, None


def _exchange_tokens(model: Model, layout: Layout, recorder: CostRecorder) -> None:
    """Leave each mixture the experts of one rank, and an exchange that only notes what it would send."""
    if layout.expert == 1:
        return
    size = layout.expert

    def swap(arrived: Tensor, rows: Tensor, receive: list[int] | None = None, send: list[int] | None = None) -> None:
        payload = rows.numel() * rows.element_size()
        own = send[0] / max(sum(send), 1) if send else 1 / size
        recorder.add_collective(ALL_TO_ALL, rows, size, payload * (1 - own))

    for moe in _mixtures(model):
        for name in ("gate_up", "down"):
            whole = getattr(moe.experts, name).detach()
            setattr(moe.experts, name, nn.Parameter(whole[: moe.num_experts // size]))
        moe.exchange = TokenExchange(size, swap)


def sharding_costs(model: Model, layout: Layout) -> Costs:
    """What FSDP2 adds to a step of a model that is divided as `layout`: casts, gathers and reductions of its units.

    The units are those of trainer/parallel.py: the experts of a layer, the layer, and the rest. All but the rest are
    gathered twice. The copies are those of torch.distributed.fsdp (`_fsdp_collectives.py`).
    """
    costs = Costs()
    for layer in model.model.layers:
        assert isinstance(layer, ResidualLayer)
        experts = list(layer.mlp.experts.parameters()) if isinstance(layer.mlp, MixtureOfExperts) else []
        held = {id(parameter) for parameter in experts}
        rest = [parameter for parameter in layer.parameters() if id(parameter) not in held]
        costs += _unit_costs(experts, layout.expert_shard, layout.replicate, gathers=2)
        costs += _unit_costs(rest, layout.shard, layout.replicate, gathers=2)
    layers = {id(parameter) for parameter in model.model.layers.parameters()}
    root = [parameter for parameter in model.parameters() if id(parameter) not in layers]
    return costs + _unit_costs(root, layout.shard, layout.replicate, gathers=1)


def _unit_costs(parameters: list[nn.Parameter], ranks: int, replicas: int, gathers: int) -> Costs:
    if not parameters:
        return Costs()
    compute, width = parameters[0].dtype, parameters[0].element_size()
    name = str(compute).removeprefix("torch.")
    whole = sum(parameter.numel() for parameter in parameters)
    local = sum(-(-parameter.shape[0] // ranks) * parameter[0].numel() for parameter in parameters)
    calls: Counter[Call] = Counter()
    collectives: Counter[Collective] = Counter()
    gathered = local * ranks * width
    calls[_copy("aten::_foreach_copy_", ("float32", name), (local,), local * (4 + width))] += gathers
    if ranks > 1:
        calls[_copy("aten::split_with_sizes_copy.out", (name,), (whole,), 2 * gathered)] += gathers
        calls[_copy("aten::_chunk_cat.out", (name, "float32"), (whole,), whole * width + local * ranks * 4)] += 1
        collectives[Collective(ALL_GATHER, name, ranks, (ranks - 1) * local * width)] += gathers
        collectives[Collective(REDUCE_SCATTER, "float32", ranks, (ranks - 1) * local * 4)] += 1
    if replicas > 1:
        collectives[Collective(ALL_REDUCE, "float32", replicas, 2 * (replicas - 1) / replicas * local * 4)] += 1
    return Costs(calls, collectives)


def _copy(operator: str, dtypes: tuple[str, ...], shape: tuple[int, ...], moved: int) -> Call:
    return Call(operator, tuple(dict.fromkeys(dtypes)), (shape,), 0, moved)


class _Shard(Part):
    """A parameter of which this rank holds the first rows. Nothing of it has values."""

    recorder: CostRecorder
    ranks: int

    @classmethod
    def of(cls, part: Part, layout: Layout, recorder: CostRecorder) -> _Shard:
        shard = cls(part.name, part.parameter, part.experts)
        ranks = layout.shard if part.experts is None else layout.expert_shard
        object.__setattr__(shard, "ranks", ranks)
        object.__setattr__(shard, "recorder", recorder)
        return shard

    @property
    def rows(self) -> tuple[int, int]:
        return 0, -(-self.parameter.shape[0] // self.ranks)

    @property
    def local(self) -> Tensor:
        with self.recorder.pause():
            return torch.empty(self.rows[1], *self.parameter.shape[1:], dtype=torch.float32, device=META)

    @property
    def gradient(self) -> Tensor:
        return self.local

    def whole(self, local: Tensor) -> Tensor:
        if self.ranks == 1:
            return local
        sent = (self.ranks - 1) * local.numel() * local.element_size()
        self.recorder.add_collective(ALL_GATHER, local, self.ranks, sent)
        with self.recorder.pause():
            return local.new_empty(self.parameter.shape)


def optimizer_costs(model: ModelSection, section: TextSection, layout: Layout, *, every_part: bool) -> Costs:
    """One update of what one rank holds in fp32, its clipping included, without the collective of the norm.

    Unless `every_part`, Muon orthogonalises stacks of one shape once, and they count as often as there are.
    """
    with META:
        described = Model(model)
    recorder = CostRecorder()
    _exchange_tokens(described, layout, recorder)
    parts: list[Part] = [_Shard.of(part, layout, recorder) for part in parts_of(described)]
    optimizer = Optimizer(described, section.optimizer, 1, parts=parts)
    times: Counter[str] = Counter()
    if optimizer.muon is not None and not every_part:
        optimizer.muon.orthogonalise = _once_per_shape(optimizer.muon.orthogonalise, recorder, times)
    with recorder.watching():
        optimizer.step(0)
    recorder.sites.add(Site.of(OPTIMISER))
    return recorder.total(times)


def _once_per_shape(
    work: Callable[[Tensor], Tensor], recorder: CostRecorder, times: Counter[str]
) -> Callable[[Tensor], Tensor]:
    """`work`, which keeps shape and dtype, done for the first tensor of a shape; the others are counted in `times`."""

    def run(x: Tensor) -> Tensor:
        scope = f"{tuple(x.shape)} and alike"
        times[scope] += 1
        if times[scope] > 1:
            with recorder.pause():
                return torch.empty_like(x)
        recorder.scope = scope
        done = work(x)
        recorder.scope = OUTSIDE
        return done

    return run


def serving_costs(recipe: Recipe, options: Options, ranks: int = 1) -> dict[str, Costs]:
    """One pass of the engine over a prompt (`prefill`) and one over a token of each sequence (`decode`), on one chip.

    The prompt has `LONGEST_ROW` tokens, or as many as there is room for; `recipe.serve.max_batch` sequences of that
    length are decoded. `ranks` is among how many chips the experts would be divided where sequences are decoded: the
    exchange of tokens is noted as a site, and computed by none.
    """
    length = min(LONGEST_ROW, recipe.model.max_position_embeddings - 1)
    found: dict[str, Costs] = {}
    for name, sequences in (("prefill", 1), ("decode", recipe.serve.max_batch)):
        with META:
            model = Model(recipe.model)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(options.dtype)
        for module in _mixtures(model):
            module.experts.grouped = options.grouped and module.experts.aligned
        recorder = CostRecorder(whole_attention=options.whole_attention)
        watch_sites(model, recorder.sites.add, ranks if name == "decode" else 1)
        times = mark_layers(model, recorder, every_layer=options.every_layer)
        runner = Runner(model, sequences * blocks_for(length + 1, BLOCK) + 1, BLOCK, native=False)
        with torch.inference_mode(), recorder.watching():
            batch = _pass(name, sequences, length, runner)
            batch.prepare(model.windows)
            caches = [_SeenView(store, batch, recorder) for store in runner.store.layers]
            hidden = model.hidden(batch.tokens[None], batch.positions[None], caches=caches)[0]
            runner.logits(hidden[-sequences:])
        found[name] = recorder.total(times)
    return found


class _SeenView(LayerView):
    """A layer of the cache that notes what attention looks at it."""

    def __init__(self, store: Tensor, batch: StepBatch, recorder: CostRecorder):
        super().__init__(store, batch)
        self._recorder = recorder

    def attend(self, query: Tensor, entries: Tensor, layout: EntryLayout, scale: float) -> Tensor:
        self._recorder.sites.add(cached_attention(query, layout))
        return super().attend(query, entries, layout, scale)


def _pass(name: str, sequences: int, length: int, runner: Runner) -> StepBatch:
    """A whole prompt, or the token after `length` ones of each sequence."""
    each = blocks_for(length + 1, BLOCK)
    tables = np.arange(1, sequences * each + 1, dtype=np.int32).reshape(sequences, each)
    if name == "prefill":
        return StepBatch(None, [Chunk(np.zeros(length, dtype=np.int64), 0, tables[0])], runner.store)
    tokens, last = np.zeros(sequences, dtype=np.int64), np.full(sequences, length, dtype=np.int64)
    return StepBatch(Singles(tokens, last, tables), [], runner.store)
