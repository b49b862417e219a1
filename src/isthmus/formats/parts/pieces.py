"""A model of which one layer at a time is in memory, and of a large mixture one expert at a time.

`streamed` gives a model with the modules of the whole and without its weights. A layer gets them, as the format builds
them from what is stored, when it runs or when it is lent (`at_hand`), and loses them afterwards. Of the embedding those
rows are read that are looked up, and of the output head some rows at a time. What is computed is what the whole model
computes; a head that is larger than ROWS_BYTES is multiplied in several products.

Pieces are made in a thread of their own, so that a mode which watches what a target does never sees how it is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from isthmus.formats.parts.assemble import EMBEDDING, HEAD, unfilled
from isthmus.formats.parts.slices import cut_architecture, tensors_of_layers
from isthmus.model.layer import ResidualLayer
from isthmus.model.model import Model
from isthmus.model.moe import MixtureOfExperts, Router
from isthmus.recipe.architecture import ModelSection

Build = Callable[[ModelSection, dict[str, Tensor]], Model]
Adapt = Callable[[nn.Module], object]
"""Changes a piece that was built, in place: brings it to a device, casts it, adds noise to it."""
Made = TypeVar("Made")

WHOLE_EXPERTS = 256 << 20
"""Bytes in fp32 up to which the routed experts of a layer are in memory all at once."""
ROWS_BYTES = 64 << 20
"""Bytes in fp32 of the rows of the output head that are in memory at once."""
SMALL_TENSOR = 1 << 16
NORM = "model.norm.weight"
_EXPERTS = "model.layers.0.mlp.experts."
_LAYER = "model.layers."


def streamed(
    architecture: ModelSection,
    tensors: Mapping[str, Tensor],
    build: Build,
    adapt: Adapt = lambda _piece: None,
    *,
    lend_experts: bool = True,
) -> Model:
    """A model for inference whose pieces are made of `tensors` (stored names, read when asked) when they are used.

    Experts of a layer that take more than WHOLE_EXPERTS come one at a time, unless `lend_experts` is false.
    """
    return Pieces(architecture, tensors, build, adapt, lend_experts).model


def pieces_of(model: nn.Module) -> Pieces | None:
    """What lends the model its weights; None if it holds them itself."""
    found = getattr(model, "pieces", None)
    return found if isinstance(found, Pieces) else None


def at_hand(model: nn.Module, path: str) -> AbstractContextManager[None]:
    """Lends the layer that a path lies in; does nothing outside the layers, or if the model holds its own weights."""
    pieces = pieces_of(model)
    if pieces is None or not path.startswith(_LAYER):
        return nullcontext()
    return pieces.layer(int(path.split(".")[2]))


class LentExperts(nn.Module):
    """The routed experts of a layer, of which the one that was used last is in memory."""

    def __init__(self, total: int, limit: float | None, load: Callable[[int], nn.Module]):
        super().__init__()
        self.total, self.limit, self._load = total, limit, load
        self._last: tuple[int, nn.Module] | None = None

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """x [N, D], sorted by expert; `counts` [E] of its rows belong to each. Returns [N, D]."""
        rows = enumerate(x.split(counts.tolist()))
        return torch.cat([self.ask(index, some) for index, some in rows if len(some)])

    def ask(self, index: int, rows: Tensor) -> Tensor:
        """What one expert makes of rows [N, D]."""
        return self.expert(index)(rows, torch.tensor([len(rows)], device=rows.device))

    def parts(self, index: int) -> dict[str, Callable[[Tensor], Tensor]]:
        """The products of one expert, by name: of rows [N, D] or [N, M]."""
        return self.expert(index).parts(0)  # pyright: ignore[reportCallIssue]

    def expert(self, index: int) -> nn.Module:
        """One expert, as experts of a layer that has no other."""
        if self._last is None or self._last[0] != index:
            self._last = None
            self._last = index, self._load(index)
        return self._last[1]


@dataclass
class _Lent:
    """A layer that is lent, how often, and the empty modules that take the place of its own afterwards."""

    empty: dict[str, nn.Module]
    times: int = 1


@dataclass(eq=False)
class Pieces:
    """Makes the pieces of `model`, and takes them back. The arguments are those of `streamed`."""

    architecture: ModelSection
    tensors: Mapping[str, Tensor]
    build: Build
    adapt: Adapt
    lend_experts: bool
    model: Model = field(init=False)

    def __post_init__(self) -> None:
        self.model = unfilled(self.architecture).eval().requires_grad_(False)
        self.model.pieces = self  # pyright: ignore
        self._worker = ThreadPoolExecutor(1)
        self._lent: dict[int, _Lent] = {}
        self._names: dict[int, dict[str, str]] = {}
        for name in self.tensors:
            if name.startswith(_LAYER):
                index = int(name.split(".")[2])
                self._names.setdefault(index, {}).update(tensors_of_layers([name], range(index, index + 1)))
        for index, layer in enumerate(self.model.model.layers):
            layer.register_forward_pre_hook(lambda *_, index=index: self._enter(index))
            layer.register_forward_hook(lambda *_, index=index: self._leave(index), always_call=True)
        self._fill_outside()

    @contextmanager
    def layer(self, index: int) -> Iterator[None]:
        """The weights of a layer are in the model's modules inside this context."""
        self._enter(index)
        try:
            yield
        finally:
            self._leave(index)

    def head_blocks(self) -> list[range]:
        """The rows of the output head, in the blocks that are in memory at once."""
        count = self.architecture.vocab_size
        step = max(1, ROWS_BYTES // (4 * self.architecture.hidden_size))
        return [range(start, min(start + step, count)) for start in range(0, count, step)]

    def head_rows(self, rows: range) -> nn.Linear:
        """Some rows of the output head, as a layer."""
        name = EMBEDDING if self.architecture.tie_word_embeddings else HEAD
        return self._made(lambda: self._linear(rows_of(self.tensors, name, rows)))

    def embedding_rows(self, rows: Tensor) -> nn.Embedding:
        """Some rows of the embedding, ascending, as an embedding of its own."""
        return self._made(lambda: self._embedding(rows))

    def _made(self, make: Callable[[], Made]) -> Made:
        return self._worker.submit(_without_gradients, make).result()

    def _fill_outside(self) -> None:
        model = self.model
        model.model.norm.weight = nn.Parameter(self.tensors[NORM].float(), requires_grad=False)
        for outside in (model.model.norm, model.model.rotary):
            self.adapt(outside)
        model.model.embed_tokens.forward = self._embed  # pyright: ignore[reportAttributeAccessIssue]
        model.lm_head.forward = self._logits  # pyright: ignore[reportAttributeAccessIssue]

    def _embed(self, tokens: Tensor) -> Tensor:
        def look_up() -> tuple[nn.Embedding, Tensor]:
            rows, places = tokens.cpu().unique(return_inverse=True)
            return self._embedding(rows), places.to(tokens.device)

        embedding, places = self._made(look_up)
        return embedding(places)

    def _logits(self, x: Tensor) -> Tensor:
        blocks = self.head_blocks()
        if len(blocks) == 1:
            return self.head_rows(blocks[0])(x)
        found: Tensor | None = None
        for rows in blocks:
            part = self.head_rows(rows)(x)
            whole = part.new_empty(*part.shape[:-1], self.architecture.vocab_size) if found is None else found
            whole[..., rows.start : rows.stop] = part
            found = whole
        assert found is not None, "a vocabulary has tokens"
        return found

    def _linear(self, weight: Tensor) -> nn.Linear:
        with torch.device("meta"):
            made = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        made.weight = nn.Parameter(weight.float(), requires_grad=False)
        self.adapt(made)
        return made

    def _embedding(self, rows: Tensor) -> nn.Embedding:
        runs = _runs(rows.tolist())
        made = nn.Embedding.from_pretrained(torch.cat([rows_of(self.tensors, EMBEDDING, run).float() for run in runs]))
        self.adapt(made)
        return made

    def _enter(self, index: int) -> None:
        if index in self._lent:
            self._lent[index].times += 1
            return
        layer, built = self.model.model.layers[index], self._made(lambda: self._layer(index))
        self._lent[index] = _Lent(dict(layer.named_children()))
        for name, child in built.named_children():
            setattr(layer, name, child)

    def _leave(self, index: int) -> None:
        lent = self._lent.get(index)
        if lent is None:
            return
        lent.times -= 1
        if not lent.times:
            for name, child in lent.empty.items():
                setattr(self.model.model.layers[index], name, child)
            del self._lent[index]

    def _layer(self, index: int) -> nn.Module:
        architecture = _of_one_layer(self.architecture, index)
        names = self._names.get(index, {})
        if not self._experts_are_lent(index):
            tensors = {new: self.tensors[old] for new, old in names.items()}
            layer = self.build(architecture, tensors | _outside(architecture)).model.layers[0]
            self.adapt(layer)
            return layer
        return self._layer_with_lent_experts(architecture, names)

    def _experts_are_lent(self, index: int) -> bool:
        mlp = self.model.model.layers[index].mlp
        if not self.lend_experts or not isinstance(mlp, MixtureOfExperts):
            return False
        return 4 * sum(one.numel() for one in mlp.experts.parameters()) > WHOLE_EXPERTS

    def _layer_with_lent_experts(self, architecture: ModelSection, names: dict[str, str]) -> nn.Module:
        """A layer, built with its first expert alone; what lends them all, and the router, then take their places."""
        single = _with_one_expert(architecture)
        kept = {new: self.tensors[old] for new, old in names.items() if not new.startswith(_EXPERTS)}
        gate = {name.rpartition(".")[2]: kept.pop(name) for name in list(kept) if ".mlp.gate." in name}
        kept |= _outside(single) | {f"model.layers.0.mlp.gate.{part}": one[:1] for part, one in gate.items()}
        first = self._expert_tensors(names, 0)
        layer = self.build(single, kept | first).model.layers[0]
        assert isinstance(layer, ResidualLayer) and isinstance(layer.mlp, MixtureOfExperts)
        shapes = {name: one if one.numel() < SMALL_TENSOR else one.to("meta") for name, one in kept.items()}

        def load(index: int) -> nn.Module:
            def make() -> nn.Module:
                tensors = self._expert_tensors(names, index)
                mixture = self.build(single, shapes | tensors).model.layers[0].mlp
                assert isinstance(mixture, MixtureOfExperts)
                self.adapt(mixture.experts)
                return mixture.experts

            return self._made(make)

        count = int(architecture.n_routed_experts)  # pyright: ignore[reportAttributeAccessIssue]
        limit = getattr(architecture, "swiglu_limit", None)
        layer.mlp.gate, layer.mlp.num_experts = _router(architecture, gate), count
        layer.mlp.experts = LentExperts(count, limit, load)  # pyright: ignore[reportAttributeAccessIssue]
        self.adapt(layer)
        return layer

    def _expert_tensors(self, names: dict[str, str], index: int) -> dict[str, Tensor]:
        """What is stored of one expert, as that of the first."""
        prefix = f"{_EXPERTS}{index}."
        found = (name for name in names if name.startswith(prefix))
        return {f"{_EXPERTS}0.{name.removeprefix(prefix)}": self.tensors[names[name]] for name in found}


def rows_of(tensors: Mapping[str, Tensor], name: str, rows: range) -> Tensor:
    """Rows of a stored tensor; no others are read if `tensors` can read some alone."""
    read: Any = getattr(tensors, "rows", None)
    return tensors[name][rows.start : rows.stop] if read is None else read(name, rows)


def _without_gradients(make: Callable[[], Made]) -> Made:
    with torch.no_grad():
        return make()


def _of_one_layer(architecture: ModelSection, index: int) -> ModelSection:
    """One layer, with an embedding and a head of one row, and the rotary table of one position."""
    small = {"vocab_size": 1, "max_position_embeddings": 1, "tie_word_embeddings": False}
    return cut_architecture(architecture, range(index, index + 1)).model_copy(update=small)


def _with_one_expert(architecture: ModelSection) -> ModelSection:
    fields = type(architecture).model_fields
    single = ("n_routed_experts", "num_experts", "num_experts_per_tok", "n_group", "topk_group")
    return architecture.model_copy(update={name: 1 for name in single if name in fields})


def _outside(architecture: ModelSection) -> dict[str, Tensor]:
    """What a model of one layer has beside it, which nobody uses."""
    row = torch.zeros(1, architecture.hidden_size)
    return {EMBEDDING: row, HEAD: row, NORM: row[0]}


def _router(architecture: ModelSection, stored: dict[str, Tensor]) -> Router:
    with torch.device("meta"):
        router = Router(architecture)  # pyright: ignore[reportArgumentType]
    router.load_state_dict({name: tensor.float() for name, tensor in stored.items()}, strict=True, assign=True)
    return router.eval().requires_grad_(False)


def _runs(ascending: list[int]) -> list[range]:
    """The numbers in runs that follow each other."""
    runs: list[range] = []
    for number in ascending:
        if runs and runs[-1].stop == number:
            runs[-1] = range(runs[-1].start, number + 1)
        else:
            runs.append(range(number, number + 1))
    return runs
