"""The collectives of a run: which, among how many ranks, and how large, read off its recipe."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass

import torch

from isthmus.model.model import Model
from isthmus.recipe.architecture import MixtureSection
from isthmus.recipe.practice import generating, pretrained, taught
from isthmus.recipe.schema import Recipe

ELEMENT = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Shape:
    """One collective of a training step: `numel` elements in a group of `ranks`, all shares included.

    `stride` is the distance between neighbours of a group among all ranks. `times` is how often a step has it, None
    where that depends on the data; `asked` the elements before a cap.
    """

    name: str
    collective: str
    dtype: str
    numel: int
    ranks: int
    stride: int = 1
    times: int | None = 1
    asked: int | None = None

    @property
    def bytes(self) -> int:
        return self.numel * ELEMENT[self.dtype]

    @property
    def cut(self) -> str:
        """What a cap took, in words; empty if nothing."""
        if self.asked is None:
            return ""
        return f"{self.name} cut from {_mib(self.asked, self.dtype)} to {_mib(self.numel, self.dtype)}"

    def groups(self, world: int) -> list[list[int]] | None:
        """The groups that do this at the same time; None: all ranks together."""
        if self.ranks == world:
            return None
        block = self.ranks * self.stride
        return [
            [start + offset + self.stride * place for place in range(self.ranks)]
            for start in range(0, world, block)
            for offset in range(self.stride)
        ]


def shapes_of(recipe: Recipe, world: int, device: str, most_bytes: int | None = None) -> list[Shape]:
    """The collectives of one training step on `world` ranks, those of one kind with their number; largest first.

    Parameters are gathered in the precision of the pass and gradients summed in fp32, unit by unit, as the trainer
    shards them; replicas sum their shards; experts exchange each token's rows. A crossing sends all weights in bf16.
    Nothing exceeds `most_bytes`. A layout that does not divide `world` is taken as if it were not asked for.
    """
    train = recipe.train
    fits = world % (train.replicate * train.expert) == 0
    replicate, expert = (train.replicate, train.expert) if fits else (1, 1)
    shard, compute = world // replicate, compute_dtype(recipe, device)
    units, found = _units(recipe, expert), list[Shape]()
    for (unit, parameters, spread), times in units.items():
        ranks, stride = (shard // expert, expert) if spread else (shard, 1)
        if ranks > 1:
            found.append(Shape(f"all-gather of {unit}", "all_gather", compute, parameters, ranks, stride, 2 * times))
            name = f"reduce-scatter of {unit}"
            found.append(Shape(name, "reduce_scatter", "float32", parameters, ranks, stride, times))
        if replicate > 1:
            share = -(-parameters // ranks)
            found.append(
                Shape(f"all-reduce of {unit}", "all_reduce", "float32", share, replicate, world // replicate, times)
            )
    if expert > 1:
        sparse = sum(times for (_, _, spread), times in units.items() if spread)
        numel = exchange_numel(recipe, world)
        found.append(Shape("tokens to experts and back", "all_to_all", compute, numel, expert, 1, 4 * sparse))
    weights = sum(parameters * times * (expert if spread else 1) for (_, parameters, spread), times in units.items())
    found.append(Shape("weights of a crossing", "broadcast", "bfloat16", weights, world))
    return sorted((capped(shape, most_bytes) for shape in found), key=lambda shape: -(shape.asked or shape.numel))


def tokens_per_rank(recipe: Recipe, world: int) -> int:
    """Tokens that a rank computes at once: of pretraining if there is any, else at most those of worked examples."""
    plain = pretrained(recipe)
    if plain is not None:
        rows = -(-plain.rows_per_step // world)
        return min(rows, recipe.train.rows_per_microbatch or rows) * plain.row_length
    return max(1, taught(recipe).batch_size * generating(recipe).max_new_tokens // world)


def exchange_numel(recipe: Recipe, world: int) -> int:
    """Elements that a rank sends in the exchange of one layer's tokens: tokens x experts per token x hidden size."""
    experts = recipe.model.num_experts_per_tok if isinstance(recipe.model, MixtureSection) else 1
    return tokens_per_rank(recipe, world) * experts * recipe.model.hidden_size


def _units(recipe: Recipe, expert: int) -> Counter[tuple[str, int, bool]]:
    """(name, parameters, whether spread over experts' ranks) of each unit that is sharded, and how many there are."""
    with torch.device("meta"):
        model = Model(recipe.model)
    units: Counter[tuple[str, int, bool]] = Counter()
    rest = sum(parameter.numel() for parameter in model.parameters())
    for layer in model.model.layers:
        whole = sum(parameter.numel() for parameter in layer.parameters())
        experts = getattr(layer.mlp, "experts", None)
        routed = sum(parameter.numel() for parameter in experts.parameters()) if experts is not None else 0
        if routed:
            units["the experts of a layer", routed // expert, True] += 1
        units["a layer", whole - routed, False] += 1
        rest -= whole
    units["embedding and head", rest, False] += 1
    return units


def compute_dtype(recipe: Recipe, device: str) -> str:
    """What forward and backward compute in, and so what is gathered and exchanged."""
    return {"fp32": "float32", "bf16": "bfloat16"}[recipe.train.precision_on(device)]


def capped(shape: Shape, most_bytes: int | None) -> Shape:
    """Cut to `most_bytes`, and to a multiple of its ranks, of which each then has one element at least."""
    most = shape.numel if most_bytes is None else most_bytes // ELEMENT[shape.dtype]
    numel = max(shape.ranks, min(shape.numel, most) // shape.ranks * shape.ranks)
    return dataclasses.replace(shape, numel=numel, asked=shape.numel if numel < shape.numel - shape.ranks else None)


def _mib(numel: int, dtype: str) -> str:
    return f"{numel * ELEMENT[dtype] / 2**20:,.3g} MiB"
