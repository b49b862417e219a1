"""Mixtures: which modules of a model are stored how, chosen by what each costs in nats and in work.

Every module is quantised alone, the others as trained, and the KL of the model's next tokens to the trained model's is
measured on the calibration text. The costs of modules add up nearly (each is a small independent disturbance of the
logits), so they say in which order modules are worth a better type; how far to go in that order is measured on whole
mixtures, by bisection.

Work is counted in bits of the weight plus bits of the input for every multiplication: 16 in W8A8_DYNAMIC, 24 in W8A16,
32 in bf16. Modules that a server runs as one have one type.

Shapes: B rows of T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.errors import IsthmusError
from isthmus.formats import get_format
from isthmus.formats.modelslim import DYNAMIC, FLOAT, WEIGHTS_ONLY, ModelSlim
from isthmus.formats.parts.quantised import expert_list
from isthmus.formats.w8a8 import W8A8Linear, is_quantised
from isthmus.model.model import causal_mask
from isthmus.model.moe import Experts
from isthmus.recipe.architecture import ModelSection

BITS = {DYNAMIC: 16, WEIGHTS_ONLY: 24, FLOAT: 32}
"""Of the weight and of the input, for every multiplication."""
TRIAL_TOKENS, TRIAL_PLACES = 512, 256
"""Tokens that single modules read, and at how many of them, evenly spread, what comes next is compared. Whole mixtures
are measured on all."""
CACHED_BYTES = 1 << 30
_EXPERT = re.compile(r"\.experts\.\d+\..*")
_FUSED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("q_a_proj", "kv_a_proj_with_mqa"), "fused_qkv_a_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
}
"""What servers make one product of."""


@dataclass(frozen=True)
class Unit:
    """Weights that have one type. `kinds` are those that it may have, the least work first; `size` counts weights."""

    path: str
    weights: tuple[str, ...]
    kinds: tuple[str, ...]
    size: int

    @property
    def layer(self) -> int:
        return int(self.path.split(".")[2])

    def work(self, kind: str) -> int:
        """Bits for every token, if all its weights are used."""
        return self.size * BITS[kind]


@dataclass(frozen=True)
class Priced:
    """A unit, and by kind what it costs alone, in nats per token. Left in float it costs nothing."""

    unit: Unit
    kl: dict[str, float]


@dataclass(frozen=True)
class Step:
    """One unit gets a better type: by how much the KL is expected to fall, for how much more work."""

    place: int
    kind: str
    gain: float
    work: int


@dataclass(frozen=True)
class Mixture:
    """The type of every weight by name, the KL of the whole to the trained model, measured, and each unit's price.

    `kinds` are those of the units. `work` and `work_of_float` are bits per token.
    """

    types: dict[str, str]
    kl: float
    tokens: int
    priced: tuple[Priced, ...]
    kinds: tuple[str, ...]
    work: int
    work_of_float: int


Refine = Callable[[dict[str, Tensor]], None]
Tell = Callable[[str, int, int], None]


def units_of(chosen: ModelSlim, architecture: ModelSection, kinds: tuple[str, ...]) -> list[Unit]:
    """The units of a model, layer by layer. The MTP layer is none of them: the next token does not depend on it."""
    found: dict[str, list[str]] = {}
    sizes: dict[str, int] = {}
    for name, (_, shape) in chosen.layout(architecture).items():
        if is_quantised(name) and int(name.split(".")[2]) < architecture.num_hidden_layers:
            path = _unit_path(name)
            found.setdefault(path, []).append(name)
            sizes[path] = sizes.get(path, 0) + shape[0] * shape[1]
    units = [
        Unit(path, tuple(names), tuple(k for k in kinds if k != WEIGHTS_ONLY or ".experts" not in path), sizes[path])
        for path, names in found.items()
    ]
    return sorted(units, key=lambda unit: unit.layer)


def choose_mixture(
    state: Mapping[str, Tensor],
    architecture: ModelSection,
    chosen: ModelSlim,
    kinds: tuple[str, ...],
    rows: list[list[int]],
    budget: float,
    refine: Refine = lambda _stored: None,
    tell: Tell = lambda what, done, total: None,
) -> Mixture:
    """The mixture with the least work whose KL to the trained model is at most `budget` on `rows`, in nats per token.

    `state` holds the float weights, `refine` may change the int8 values of a stored weight. Raises IsthmusError if even
    the model in bf16 is beyond the budget.
    """
    units = units_of(chosen, architecture, kinds)
    judge = Judge(state, architecture, chosen, refine)
    priced = judge.price(units, _first(rows, TRIAL_TOKENS), tell)
    steps = order_steps(priced)
    reference = judge.reference(rows)
    measured: dict[int, float] = {}

    def within(count: int) -> bool:
        tell(f"mixture of {count} steps", len(measured), len(steps).bit_length() + 1)
        measured[count] = judge.measure(judge.types(units, _kinds_after(units, steps[:count])), reference)
        return measured[count] <= budget

    if not within(0):
        if not within(len(steps)):
            raise IsthmusError(
                f"with every module in bf16 the model is {measured[len(steps)]:.3g} nats from the trained one, beyond "
                f"the budget of {budget:g}: give a larger --budget, or store it in fp32"
            )
        low, high = 0, len(steps)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if within(middle) else (middle, high)
        taken = high
    else:
        taken = 0
    final = _kinds_after(units, steps[:taken])
    return Mixture(
        judge.types(units, final),
        measured[taken],
        reference.tokens,
        tuple(priced),
        tuple(final),
        sum(unit.work(kind) for unit, kind in zip(units, final, strict=True)),
        sum(unit.work(FLOAT) for unit in units),
    )


def order_steps(priced: list[Priced]) -> list[Step]:
    """All steps from the least work to all in float, those that save most nats for their work first.

    A unit's steps are those of the lower convex hull of its costs, so each of them saves less than the one before.
    """
    steps: list[Step] = []
    for place, one in enumerate(priced):
        at = 0
        kinds, work = one.unit.kinds, one.unit.work
        while at < len(kinds) - 1:
            rates = [
                ((one.kl[kinds[at]] - one.kl[kinds[next_]]) / (work(kinds[next_]) - work(kinds[at])), -next_)
                for next_ in range(at + 1, len(kinds))
            ]
            best = -max(rates)[1]
            gain, more = one.kl[kinds[at]] - one.kl[kinds[best]], work(kinds[best]) - work(kinds[at])
            steps.append(Step(place, kinds[best], gain, more))
            at = best
    return sorted(steps, key=lambda step: step.gain / step.work, reverse=True)


@dataclass(frozen=True)
class Reference:
    """What the trained model says of rows [B, T]: its states [B, T, D]. `places` [B, T] are where it is compared."""

    rows: Tensor
    places: Tensor
    hidden: Tensor

    @property
    def tokens(self) -> int:
        return int(self.places.sum())

    def thinned(self, most: int) -> Reference:
        """The same, compared at `most` places, evenly spread."""
        found = self.places.nonzero()
        kept = found[:: -(-len(found) // most)]
        places = torch.zeros_like(self.places)
        places[kept[:, 0], kept[:, 1]] = True
        return replace(self, places=places)


class Judge:
    """Measures KL(trained || model), nats per token, for models with some modules quantised.

    It holds the trained model in fp32, and the int8 values of what it has measured.
    """

    def __init__(self, state: Mapping[str, Tensor], architecture: ModelSection, chosen: ModelSlim, refine: Refine):
        plain = get_format("fp32")
        whole = {name: tensor.float() for name, tensor in state.items()}
        self.state, self.architecture, self.chosen, self.refine = state, architecture, chosen, refine
        self.trained = plain.build(architecture, plain.export(whole, architecture))
        self._stored: dict[str, dict[str, Tensor]] = {}

    @torch.inference_mode()
    def reference(self, rows: list[list[int]]) -> Reference:
        """Padding stands behind, where no token looks."""
        longest = max(map(len, rows))
        tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        real = torch.tensor([[place < len(row) for place in range(longest)] for row in rows])
        return Reference(tokens, real, self.trained.hidden(tokens))

    @torch.inference_mode()
    def price(self, units: list[Unit], rows: list[list[int]], tell: Tell) -> list[Priced]:
        """Each unit in each of its types, alone. A layer is computed from what the trained layers before it give."""
        reference = self.reference(rows).thinned(TRIAL_PLACES)
        distance = self._distance(reference)
        positions = torch.arange(reference.rows.shape[1]).expand(reference.rows.shape)
        rotation, mask = self.trained.model.rotary(positions), causal_mask(reference.rows.shape[1])
        x, entered = self.trained.model.embed_tokens(reference.rows), 0
        priced = []
        for done, unit in enumerate(units):
            tell(unit.path, done, len(units))
            while entered < unit.layer:
                x = self.trained.model.layers[entered](x, rotation, mask)
                entered += 1
            found = {FLOAT: 0.0}
            for kind in unit.kinds:
                if kind != FLOAT:
                    with self._replaced(unit, kind):
                        y = x
                        for index in range(unit.layer, self.architecture.num_hidden_layers):
                            y = self.trained.model.layers[index](y, rotation, mask)
                    found[kind] = distance(self.trained.logits, y)
            priced.append(Priced(unit, found))
        tell("", len(units), len(units))
        return priced

    @torch.inference_mode()
    def measure(self, types: dict[str, str], reference: Reference) -> float:
        """The KL of a whole mixture, as it is stored. `types` are those of every weight."""
        mixed = self.chosen.with_types(types)
        tensors: dict[str, Tensor] = {}
        for name in self.state:
            kind = types.get(name, FLOAT)
            if kind == FLOAT:
                tensors |= mixed.export_one(name, self.state[name], self.architecture)
            else:
                tensors |= mixed.retyped(self._int8(name), kind)
        model = mixed.build(self.architecture, tensors)
        return self._distance(reference)(model.logits, model.hidden(reference.rows))

    def types(self, units: list[Unit], kinds: list[str]) -> dict[str, str]:
        """The type of every weight. What is no unit is in float, and in the MTP layer quantised as usual."""
        weights = (name for name in (*self.chosen.layout(self.architecture), *self.state) if name.endswith(".weight"))
        types = {name: DYNAMIC if is_quantised(name) else FLOAT for name in weights}
        return types | {name: kind for unit, kind in zip(units, kinds, strict=True) for name in unit.weights}

    def _distance(self, reference: Reference) -> Callable[[Callable[[Tensor], Tensor], Tensor], float]:
        """A function of a model's head and states; what the trained model says is kept where it is small."""
        kept: list[Tensor] = []
        cached = reference.tokens * self.architecture.vocab_size * 4 <= CACHED_BYTES

        def wanted(row: int, places: Tensor) -> Tensor:
            if len(kept) > row:
                return kept[row]
            found = self.trained.logits(reference.hidden[row, places]).log_softmax(-1)
            if cached:
                kept.append(found)
            return found

        def distance(head: Callable[[Tensor], Tensor], hidden: Tensor) -> float:
            total = torch.zeros((), dtype=torch.float64)
            for row, (states, places) in enumerate(zip(hidden, reference.places, strict=True)):
                p, q = wanted(row, places), head(states[places]).log_softmax(-1)
                total += (p.exp() * (p - q)).sum(-1).double().sum()
            return float(total) / reference.tokens

        return distance

    def _int8(self, name: str) -> dict[str, Tensor]:
        """What W8A8_DYNAMIC stores of a weight, refined; computed once."""
        if name not in self._stored:
            stored = self.chosen.with_types({name: DYNAMIC}).export_one(name, self.state[name], self.architecture)
            self.refine(stored)
            self._stored[name] = stored
        return self._stored[name]

    @contextlib.contextmanager
    def _replaced(self, unit: Unit, kind: str) -> Iterator[None]:
        before: list[tuple[nn.Module, str, nn.Module]] = []
        for path in _modules(unit):
            parent, _, last = path.rpartition(".")
            owner, module = self.trained.get_submodule(parent), self.trained.get_submodule(path)
            before.append((owner, last, module))
            if isinstance(module, Experts):
                made: nn.Module = expert_list(module, lambda inner, _inputs, _bias: self._linear(inner, kind), path)
            else:
                made = self._linear(path, kind, getattr(module, "bias", None))
            setattr(owner, last, made)
        try:
            yield
        finally:
            for owner, last, module in before:
                setattr(owner, last, module)

    def _linear(self, path: str, kind: str, bias: Tensor | None = None) -> nn.Module:
        stored = self._int8(f"{path}.weight")
        values, scale = stored[f"{path}.weight"], stored[f"{path}.weight_scale"]
        if kind == DYNAMIC:
            made: Any = W8A8Linear((values, scale), bias=bias is not None)
        else:
            with torch.device("meta"):
                made = nn.Linear(values.shape[1], values.shape[0], bias=bias is not None)
            made.weight = nn.Parameter(values.float() * scale, requires_grad=False)
        if bias is not None:
            made.bias = bias
        return made


def _unit_path(name: str) -> str:
    path = name.removesuffix(".weight")
    if (whole := _EXPERT.sub(".experts", name)) != name:
        return whole
    parent, _, last = path.rpartition(".")
    return f"{parent}.{_FUSED.get(last, last)}"


def _modules(unit: Unit) -> list[str]:
    if unit.path.endswith(".experts"):
        return [unit.path]
    return [name.removesuffix(".weight") for name in unit.weights]


def _first(rows: list[list[int]], tokens: int) -> list[list[int]]:
    """The first rows with so many tokens in all, the last one cut."""
    found: list[list[int]] = []
    for row in rows:
        if tokens > 0:
            found.append(row[:tokens])
            tokens -= len(found[-1])
    return found


def _kinds_after(units: list[Unit], steps: list[Step]) -> list[str]:
    kinds = [unit.kinds[0] for unit in units]
    for step in steps:
        kinds[step.place] = step.kind
    return kinds
