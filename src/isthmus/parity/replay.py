"""Module replay: each block of a target is fed with its golden input, and so is each operator in it.

An error of one module reaches all that follow it, so thresholds on propagated tensors blame the wrong one. Here every
module gets the exact input, and only what it does itself can differ. One level down, every operator of the emulator (a
module with weights, or a step such as the rotation) is recorded while the emulator runs the block, and the target's
operator gets the recorded input, rounded to the target's dtype on both sides.

Two measures. Of an operator, the output channel that differs most: a flipped bit or a lost scale touches one row of a
weight, which is nothing in the norm of a block and much in its channel. Of a block, the relative L2 error, and along
the way from the emulator to the trained weights, how far the target went: near 1 it has not quantised at all.

Floors. Each measure is also taken of a healthy twin (parity/target.py), on these inputs and on others, and the largest
of its kind is the floor; a measure above LIMIT times its floor is a fault. Where a router of the target chooses other
experts than the emulator's, and the scores tie within rounding, the token is left out and counted.

Emulator, twin and target are asked layer by layer, in one walk, and what the emulator answers serves both others. Of
models that are made piece by piece (formats/parts/pieces.py) a layer of each is in memory, or an expert of it.

Shapes: N rows, C channels, E experts, K chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from isthmus.formats.parts.pieces import LentExperts, at_hand, pieces_of
from isthmus.model.attention import LatentAttention, RMSNorm, Rotation
from isthmus.model.layer import ResidualLayer
from isthmus.model.model import Model, causal_mask
from isthmus.model.moe import MixtureOfExperts, Router, Routing, Trace, swiglu
from isthmus.parity.blocks import Block, WholeRows, blocks_of, rotation_of, run_block, same_experts
from isthmus.parity.capture import GoldenBlock, GoldenSet
from isthmus.parity.target import ACCUMULATION, ROUNDING, noise_of
from isthmus.parity.walk import CANNOT_BE_ASKED, MixturePass, split_rows
from isthmus.records import LedgerRow

LIMIT = 3.0
"""A fault is above three floors. How many healthy targets are, `benchmarks/gate.py` counts."""
UNQUANTISED = 0.5
"""Half way from the emulator to the trained weights."""
SMALL_CHANNEL = 2.0**-4
"""A channel is measured against itself, or against this share of its row's size if it is smaller."""
SMALLEST_BLOCK_FLOOR = 2e-3
"""In fp32 a twin differs by nothing, or by one int8 step here and there."""
SMALLEST_ROUTER_FLOOR = 2.0**-17
"""Scores near 0 and their normalised shares lose a few bits of fp32 that a plain product keeps."""
NOTHING = 1 / (LIMIT + 1)
"""The floor of a count: one is a fault."""
EXPERT_ROWS = 4
MOST_EMBEDDINGS = 4096
FEW_TOKENS = 96
"""Of so many tokens, and a row at least, the twin is asked on other inputs than the golden ones, attention is asked
with a cache, a mixture on larger inputs, and the output head."""
FEWEST_TOKENS = 32
"""Of so many tokens of a row an MLP is asked on larger inputs, and a mixture whose experts come one by one, to which
tokens are rows of their own, and whole layers are: what these look at, clamps, norms and residuals, shows at every
token."""
FEWEST_OF_LENT = 4
"""Of so many tokens whole layers are asked whose experts come one by one: each token brings its own."""
SCALES = (1.0, 8.0, 64.0)
"""Inputs as they are, and large enough that a clamp bites."""
ROUTER_SCALES = (1.0, 4.0, 16.0)
"""Inputs at which scores come near 0 and 1, so that biases, groups and masks decide."""
FAR = 8
HEADROOM = 2.0
"""Inputs that a dtype can hold are held twice as large."""


Level = Literal[0, 1, 2, 3, 4]
STRUCTURE, OPERATOR, STEP, BLOCK, LAYER = get_args(Level)
"""What a measure is about, the most telling first: what the target is built of, one operator, a step of several
operators, a block, a layer."""


@dataclass(frozen=True)
class Probe:
    """One question to a model: `run(model, *inputs)` gives [..., C] or a router's decision.

    `path` is the module it asks about and `operator` what in it; `floor_inputs` are asked of the healthy twin too.
    `known` are the emulator's answers to `floor_inputs` and to `inputs`, where it has given them already. `plain` says
    that it is one product, or one norm: in fp32 a twin's answer is the emulator's with noise.
    """

    path: str
    operator: str | None
    kind: str
    run: Callable[..., Any]
    inputs: tuple[Any, ...]
    floor_inputs: tuple[Any, ...]
    level: Level = OPERATOR
    known: tuple[Any, Any] | None = None
    plain: bool = False


@dataclass(frozen=True)
class Call:
    """What a module was called with, and what it gave."""

    inputs: tuple[Any, ...]
    output: Any


@dataclass(frozen=True)
class Measure:
    """What came of a probe: `value` against the `floor` of its kind; infinite where the output is not a number."""

    path: str
    operator: str | None
    kind: str
    value: float
    level: Level = OPERATOR
    note: str = ""


@dataclass(frozen=True)
class Group:
    """Probes that are asked together: `run` gives the answers of a model to several lists of inputs, one each."""

    probes: tuple[Probe, ...]
    run: Callable[[Model, list[tuple[Any, ...]]], list[Any]]

    @classmethod
    def of(cls, probe: Probe) -> Group:
        """A probe that is asked alone."""
        return cls((probe,), lambda model, questions: [probe.run(model, *inputs) for inputs in questions])


@dataclass
class Floors:
    """The largest measure of a healthy twin, by kind."""

    of_kind: dict[str, float]

    def ratio(self, measure: Measure) -> float:
        if not math.isfinite(measure.value):
            return math.inf
        return measure.value / self.of_kind[measure.kind] if measure.value else 0.0


@dataclass
class Replay:
    """What the replay of a target found. `emulator_error` is by how much a block of this host's emulator differs at
    most, relative, from what the source's emulator made of the golden input, and `emulator_block` which block."""

    measures: list[Measure]
    floors: Floors
    ledger: list[LedgerRow] = field(default_factory=list)
    router_flips: int = 0
    near_ties: int = 0
    emulator_error: float = 0.0
    emulator_block: str | None = None

    @property
    def faults(self) -> list[tuple[float, Measure]]:
        """Ratio and measure of what is above the limit, the most telling first, and of these the largest."""
        found = [(self.floors.ratio(measure), measure) for measure in self.measures]
        wrong = [(ratio, measure) for ratio, measure in found if not ratio <= LIMIT]
        return sorted(wrong, key=lambda pair: (pair[1].level, -pair[0]))

    @property
    def worst(self) -> tuple[float, Measure]:
        """The measure that is highest above its floor."""
        return max(((self.floors.ratio(measure), measure) for measure in self.measures), key=lambda pair: pair[0])


@dataclass(frozen=True)
class Answer:
    """What emulator and target made of the golden input of a block; `error` is what the target raised instead."""

    expected: Any
    found: Any
    error: Exception | None


class Replayer:
    """Compares a target with an emulator on the golden inputs of a bundle, by the measure of a healthy twin.

    `dtype` is that of the target's activations.
    """

    def __init__(self, golden: GoldenSet, emulator: Model, twin: Model, dtype: torch.dtype):
        self.golden, self.emulator, self.twin, self.dtype = golden, emulator, twin, dtype
        self._blocks = {block.path: block for block in blocks_of(emulator)}
        self._context: Callable[[], AbstractContextManager[object]] = nullcontext
        self._narrow_twin = twin if torch.finfo(dtype).max < torch.finfo(torch.bfloat16).max else None

    @torch.inference_mode()
    def compare(
        self,
        target: Model,
        tell: Callable[[int, int], None] = lambda done, total: None,
        context: Callable[[], AbstractContextManager[object]] = nullcontext,
        look: Callable[[str | None, int | None], None] = lambda layer, expert: None,
    ) -> Replay:
        """Replay every block and operator on the target, which runs inside `context()`; `tell` hears of progress.

        `look` is called with each layer while its weights are at hand, with each expert of it that is in memory alone,
        and with None for what lies outside the layers.
        """
        self._context, self._look, self._target, total, done = context, look, target, len(self._blocks) + 1, 0
        found = Replay([], Floors({"structure": NOTHING}))
        for layer, blocks in groupby(self._blocks.values(), key=lambda block: layer_of(block.path)):
            with self._at_hand(target, layer):
                found.measures += differences_of_structure(self.emulator, target, layer)
                look(layer, None)
                for block in blocks:
                    tell(done, total)
                    self._compare_block(block, target, found)
                    done += 1
        tell(done, total)
        found.measures += differences_of_structure(self.emulator, target, None)
        look(None, None)
        self._compare_outside(target, found)
        found.ledger = [row.model_copy(update={"floor": found.floors.of_kind[row.kind]}) for row in found.ledger]
        tell(total, total)
        return found

    def _at_hand(self, target: Model, path: str | None) -> ExitStack:
        """The layer of emulator, twin and target, as long as it is asked."""
        stack = ExitStack()
        for model in (self.emulator, self.twin, target):
            stack.enter_context(at_hand(model, path or ""))
        return stack

    def _compare_block(self, block: Block, target: Model, found: Replay) -> None:
        golden = self.golden.block(block.path)
        x = rounded(golden.input, self.dtype)
        own: Answer | None = None
        for group in self._block_probes(block, x):
            answers = self._ask(group, target, found)
            if group.probes[0].path == block.path and group.probes[0].kind == block.kind:
                own = answers[0]
        assert own is not None, "a block is asked as a whole"
        found.floors.of_kind[f"{block.kind} unquantised"] = UNQUANTISED / LIMIT
        found.measures += self._ledger_row(block, golden, own, found)
        expected = own.expected
        if not torch.equal(x, golden.input):
            expected = run_block(self.emulator, block, golden.input)[0]
        error = relative_error(expected[0] if isinstance(expected, tuple) else expected, golden.output)
        if error > found.emulator_error:
            found.emulator_error, found.emulator_block = error, block.path

    def _compare_outside(self, target: Model, found: Replay) -> None:
        last = rounded(self.golden.block(next(reversed(self._blocks))).input, self.dtype)
        for group in map(Group.of, self._outside_probes(last)):
            self._ask(group, target, found)
        if self.emulator.mtp_layer is not None:
            path = f"model.layers.{len(self.emulator.model.layers) - 1}"
            with self._at_hand(target, path):
                for group in map(Group.of, self._mtp_probes(path, last)):
                    self._ask(group, target, found)

    def _least(self, kind: str) -> float:
        """Of an operator: rounding of its output, and of sums in another order."""
        if kind.endswith(" choice"):
            return NOTHING
        least = ROUNDING[self.dtype] + 2 * ACCUMULATION[self.dtype]
        return max(least, SMALLEST_ROUTER_FLOOR) if kind.startswith("router") else least

    def _ask(self, group: Group, target: Model, found: Replay) -> list[Answer]:
        """Ask twin and target, note floors and measures, and give the answers to the inputs."""
        probes = group.probes
        asked = (*(probe.floor_inputs for probe in probes), *(probe.inputs for probe in probes))
        questions = [tuple(rounded(value, self.dtype) for value in inputs) for inputs in asked]
        expected = self._expected(group, questions)
        healthy = self._twin_answers(group, questions, expected)
        for probe, wanted, given in zip((*probes, *probes), expected, healthy, strict=True):
            for measure in self._measures(probe, wanted, given, None):
                least = SMALLEST_BLOCK_FLOOR if probe.level > OPERATOR else self._least(measure.kind)
                floors = found.floors.of_kind
                floors[measure.kind] = max(floors.get(measure.kind, least), measure.value)
        with self._context():
            answers = self._answers(group, target, questions[len(probes) :])
        own = expected[len(probes) :]
        for probe, wanted, given in zip(probes, own, answers, strict=True):
            found.measures += self._measures(probe, wanted, given, found)
        return [
            Answer(wanted, given, given if isinstance(given, Exception) else None)
            for wanted, given in zip(own, answers, strict=True)
        ]

    def _expected(self, group: Group, questions: list[tuple[Any, ...]]) -> list[Any]:
        known = [probe.known for probe in group.probes if probe.known is not None]
        if len(known) == len(group.probes):
            return [*(of_floor for of_floor, _ in known), *(own for _, own in known)]
        return group.run(self.emulator, [_placed_all(inputs, self.emulator) for inputs in questions])

    def _twin_answers(self, group: Group, questions: list[tuple[Any, ...]], expected: list[Any]) -> list[Any]:
        noise = noise_of(self.twin)
        if noise is not None and all(probe.plain for probe in group.probes):
            return [noise.added(output) for output in expected]
        return self._answers(group, self.twin, questions)

    def _answers(self, group: Group, model: Model, questions: list[tuple[Any, ...]]) -> list[Any]:
        """The answers of a model, or what it raised in place of each."""
        try:
            return group.run(model, [_placed_all(inputs, model) for inputs in questions])
        except CANNOT_BE_ASKED as error:
            return [error] * len(questions)

    def _measures(self, probe: Probe, expected: Any, answer: Any, found: Replay | None) -> list[Measure]:
        try:
            if isinstance(answer, Exception):
                raise answer
            if isinstance(expected, Routing):
                return self._compare_routing(probe, expected, answer, found)
            if isinstance(expected, tuple):
                return self._compare_mixture(probe, expected, answer)
            measure = worst_channel if probe.level == OPERATOR else relative_error
            return [Measure(probe.path, probe.operator, probe.kind, measure(as_host(answer), expected), probe.level)]
        except CANNOT_BE_ASKED as error:
            note = f"cannot be asked: {error}"
            return [Measure(probe.path, probe.operator, probe.kind, math.inf, probe.level, note)]

    def _compare_mixture(self, probe: Probe, expected: tuple[Any, ...], answer: tuple[Any, ...]) -> list[Measure]:
        same = same_experts(expected[1], answer[1])
        y, e = as_host(answer[0]).flatten(0, -2)[same], expected[0].flatten(0, -2)[same]
        return [Measure(probe.path, probe.operator, probe.kind, relative_error(y, e), probe.level)]

    def _compare_routing(self, probe: Probe, expected: Routing, answer: Routing, found: Replay | None) -> list[Measure]:
        router = self.emulator.get_submodule(f"{probe.path}.gate")
        assert isinstance(router, Router)
        same = same_experts(expected, answer)
        ties = near_ties(router, expected, self.dtype)
        real = int((~same & ~ties).sum())
        if found is not None:
            found.router_flips += real
            found.near_ties += int((~same & ties).sum())
        scores = worst_channel(as_host(answer.scores), expected.scores)
        weights = worst_channel(by_expert(answer)[same], by_expert(expected)[same])
        share = "" if not real else f"{real} of {len(same)} tokens get other experts, and no tie explains it"
        return [
            Measure(probe.path, "gate.scores", f"{probe.kind} scores", scores),
            Measure(probe.path, "gate.choice", f"{probe.kind} choice", float(real), OPERATOR, share),
            Measure(probe.path, "gate.weights", f"{probe.kind} weights", weights),
        ]

    def _ledger_row(self, block: Block, golden: GoldenBlock, own: Answer, found: Replay) -> list[Measure]:
        """What the block lost on its golden input, and whether the target quantises it."""
        if own.error is not None:
            return [Measure(block.path, None, block.kind, math.inf, BLOCK, f"cannot be asked: {own.error}")]
        expected, routing = own.expected if isinstance(own.expected, tuple) else (own.expected, None)
        answer, answered = own.found if isinstance(own.found, tuple) else (own.found, None)
        y, e, f = (part.flatten(0, -2) for part in (as_host(answer), expected, golden.float_output))
        known = torch.isfinite(f).all(-1)
        y, e, f = y[known], e[known], f[known]
        if routing is not None and answered is not None:
            same = same_experts(routing, answered)[known]
            y, e, f = y[same], e[same], f[same]
        chip, quantisation = relative_error(y, e), relative_error(f, e)
        found.ledger.append(
            LedgerRow(
                module=block.path,
                kind=block.kind,
                quantisation=quantisation if e.numel() and math.isfinite(quantisation) else None,
                chip=chip if e.numel() and math.isfinite(chip) else None,
                floor=found.floors.of_kind[block.kind],
            )
        )
        way = f - e
        if not math.isfinite(chip) or quantisation < LIMIT * ROUNDING[torch.bfloat16]:
            return []
        share = ((y - e).flatten().double() @ way.flatten().double() / way.double().square().sum()).item()
        note = f"its output is {share:.0%} of the way from the emulator to the trained weights"
        return [Measure(block.path, None, f"{block.kind} unquantised", max(share, 0.0), BLOCK, note)]

    def _block_probes(self, block: Block, x: Tensor) -> Iterator[Group]:
        """The operators of a block in the order in which it runs them, then its steps, then the block itself."""
        other = fewer(other_inputs(x))
        yield from map(Group.of, self._norm_probes(block, x, other))
        first, second = (self._record(block, given) for given in (x, other))
        for path in first:
            if path in second and path != block.path:
                yield from map(Group.of, self._operator_probes(block, path, first[path], second[path]))
        if self._are_lent(block):
            yield from self._walk(block, x, other)
            yield from self._layer_probe(block, x, other)
            return
        if block.kind == "moe":
            for index in range(self._mixture(block).num_experts):
                yield from map(Group.of, self._expert_probes(block, index, x, other))
        if block.kind == "attention":
            yield from map(Group.of, self._attention_probes(block, x, other))
        known = self._known(first[block.path], second[block.path]) if block.path in first else None
        yield from self._whole_block_probes(block, x, other, known)
        yield from self._layer_probe(block, x, other)

    def _holds(self, block: Block, *inputs: Tensor) -> bool:
        """Whether the target's dtype can hold what the block makes of these inputs: fp16 ends at 65504."""
        if self._narrow_twin is None:
            return True
        given = (rounded(x * HEADROOM, self.dtype) for x in inputs)
        outputs = (run_block(self._narrow_twin, block, placed(x, self._narrow_twin))[0] for x in given)
        return all(bool(torch.isfinite(output).all()) for output in outputs)

    def _known(self, first: Call, second: Call) -> tuple[Any, Any] | None:
        """What the emulator answered when it was recorded; other inputs are asked where the target's dtype rounds."""
        return (second.output, first.output) if self.dtype == torch.float32 else None

    def _whole_block_probes(
        self, block: Block, x: Tensor, other: Tensor, known: tuple[Any, Any] | None
    ) -> Iterator[Group]:
        """The block on its inputs, and on larger ones of fewer tokens."""
        yield Group.of(replace(self._whole_block_probe(block, 1.0, x, other), known=known))
        yield from map(Group.of, self._scaled_probes(block, x, other))

    def _scaled_probes(self, block: Block, x: Tensor, other: Tensor) -> Iterator[Probe]:
        if block.kind == "attention":
            return
        cut = fewer if block.kind == "moe" and not self._are_lent(block) else first_tokens
        few, other_few = (cut(given) for given in (x, other))
        for scale in SCALES[1:]:
            if self._holds(block, few * scale, other_few * scale):
                yield self._whole_block_probe(block, scale, few, other_few)

    def _walk(self, block: Block, x: Tensor, other: Tensor) -> Iterator[Group]:
        """Each expert, and the block as a whole: emulator, twin and target at the same expert at a time."""
        probes = (self._whole_block_probe(block, 1.0, x, other), *self._scaled_probes(block, x, other))
        own, others = (
            [inputs[0] for inputs in part] for part in zip(*((p.inputs, p.floor_inputs) for p in probes), strict=True)
        )
        models = (self.emulator, self.twin, self._target)
        passes = {
            id(model): self._mixture_pass(model, block, own if model is self._target else [*others, *own])
            for model in models
        }
        for index in range(self._mixture(block).num_experts):
            self._look(layer_of(block.path), index)
            yield from map(Group.of, self._expert_probes(block, index, x, other))
            for one in passes.values():
                one.visit(index)
        yield Group(probes, lambda model, _questions: passes[id(model)].answers())

    def _mixture_pass(self, model: Model, block: Block, inputs: list[Tensor]) -> MixturePass:
        """A twin in fp32 needs no experts of its own: its answers are the emulator's with noise."""
        mixture, noise = model.get_submodule(block.path), noise_of(model) if model is self.twin else None
        assert isinstance(mixture, MixtureOfExperts)
        lent, experts = self._mixture(block).experts, None
        assert isinstance(lent, LentExperts)
        if noise is not None and is_plain(lent.expert(0)):
            experts = lambda index: lambda rows: noise.added(lent.ask(index, rows))  # noqa: E731
        questions = [placed(rounded(x, self.dtype), model) for x in inputs]
        return MixturePass(mixture, questions, self._context if model is self._target else nullcontext, experts)

    def _mixture(self, block: Block) -> MixtureOfExperts:
        mixture = self.emulator.get_submodule(block.path)
        assert isinstance(mixture, MixtureOfExperts)
        return mixture

    def _are_lent(self, block: Block) -> bool:
        """Whether each pass through the block reads its experts one by one."""
        return isinstance(getattr(self.emulator.get_submodule(block.path), "experts", None), LentExperts)

    def _whole_block_probe(self, block: Block, scale: float, x: Tensor, other: Tensor) -> Probe:
        def run(model: Model, given: Tensor, cos: Tensor | None = None, sin: Tensor | None = None) -> Any:
            rotation = None if cos is None or sin is None else Rotation(cos, sin)
            output, routing = run_block(model, block, given, rotation)
            return output if routing is None else (output, routing)

        extra, others = (self._turned(given) if block.kind == "attention" else () for given in (x, other))
        kind = block.kind if scale == 1.0 else f"{block.kind} at {scale:g} times its input"
        return Probe(block.path, None, kind, run, (x * scale, *extra), (other * scale, *others), BLOCK)

    def _turned(self, x: Tensor) -> tuple[Wide, ...]:
        """The rotation of the rows of x [B, T, D]."""
        return tuple(Wide(part) for part in rotation_of(self.emulator, x.shape[:2]))

    def _layer_probe(self, block: Block, x: Tensor, other: Tensor) -> Iterator[Group]:
        """The whole layer once, after its MLP: norms, residuals and their order."""
        if block.kind == "attention":
            return
        path, count = block.path.rpartition(".")[0], FEWEST_OF_LENT if self._are_lent(block) else FEWEST_TOKENS
        x, other = first_tokens(x, count), first_tokens(other, count)

        def run(model: Model, given: Tensor, cos: Tensor, sin: Tensor) -> Any:
            layer, trace = model.get_submodule(path), Trace()
            assert isinstance(layer, ResidualLayer)
            mask = causal_mask(given.shape[1], given.device)
            output = ResidualLayer.forward(layer, given, Rotation(cos, sin), mask, None, trace)
            return (output, trace.routings[0]) if trace.routings else output

        both = (x, *self._turned(x)), (other, *self._turned(other))
        probe = Probe(path, None, f"layer with {block.kind}", run, *both, LAYER)
        if self._are_lent(block):
            yield Group((probe,), lambda model, questions: in_one_pass(run, model, questions))
        else:
            yield Group.of(probe)

    def _norm_probes(self, block: Block, x: Tensor, other: Tensor) -> Iterator[Probe]:
        """The norm in front of the block, which is part of its layer, also on inputs so small that eps shows."""
        layer, _, name = block.path.rpartition(".")
        norm = "input_layernorm" if name == "self_attn" else "post_attention_layernorm"
        yield from self._norm(f"{layer}.{norm}", f"{layer}.{norm}", None, x, other)

    def _norm(self, path: str, named: str, operator: str | None, x: Tensor, other: Tensor) -> Iterator[Probe]:
        module = self.emulator.get_submodule(path)
        assert isinstance(module, RMSNorm)
        size = module.weight.shape[0]
        x, other = (fitted(given, size) for given in (x, other))

        def run(model: Model, given: Tensor) -> Tensor:
            return model.get_submodule(path)(given)

        yield Probe(named, operator, "norm", run, (x,), (other,), plain=True)
        small, other_small = (
            given * module.eps**0.5 / given.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-20)
            for given in (x, other)
        )
        yield Probe(named, operator, "norm", run, (small,), (other_small,), plain=True)

    def _record(self, block: Block, x: Tensor) -> dict[str, Call]:
        """The first call of every module below the block, by its path, in the order of the calls; then of the block."""
        module, handles = self.emulator.get_submodule(block.path), []
        inputs: dict[str, tuple[Any, ...]] = {}
        outputs: dict[str, Any] = {}
        for name, child in module.named_modules():
            if name:
                path = f"{block.path}.{name}"
                keep = lambda _module, given, path=path: inputs.setdefault(path, given)  # noqa: E731
                note = lambda _module, _given, output, path=path: outputs.setdefault(path, output)  # noqa: E731
                handles += [child.register_forward_pre_hook(keep), child.register_forward_hook(note)]
        try:
            if self._are_lent(block):
                _run_beside_experts(module, x)
            else:
                output, routing = run_block(self.emulator, block, x)
                inputs[block.path] = (x,)
                outputs[block.path] = output if routing is None else (output, routing)
        finally:
            for handle in handles:
                handle.remove()
        return {path: Call(given, outputs[path]) for path, given in inputs.items()}

    def _operator_probes(self, block: Block, path: str, own: Call, other: Call) -> Iterator[Probe]:
        module, operator = self.emulator.get_submodule(path), path.removeprefix(f"{block.path}.")

        def run(model: Model, *given: Any) -> Any:
            return model.get_submodule(path)(*given)

        if isinstance(module, Router):
            for scale in ROUTER_SCALES:
                both = (shifted(own.inputs[0], module, scale),), (shifted(other.inputs[0], module, scale),)
                yield Probe(block.path, "gate", "router", run, *both)
        elif isinstance(module, RMSNorm):
            yield from self._norm(path, block.path, operator, own.inputs[0], other.inputs[0])
        else:
            is_step = not is_plain(module) or hasattr(module, "parts")
            kind, level = (f"{block.kind} {operator}", STEP) if is_step else ("linear", OPERATOR)
            known = self._known(own, other)
            yield Probe(block.path, operator, kind, run, own.inputs, other.inputs, level, known, not is_step)

    def _expert_probes(self, block: Block, index: int, x: Tensor, other: Tensor) -> Iterator[Probe]:
        """Each matrix of an expert, on rows that it gets whether the router sends them or not. The emulator's is asked
        once of all of them."""
        experts = self._mixture(block).experts
        held = experts.expert(index) if isinstance(experts, LentExperts) else experts
        inputs = torch.cat([given.flatten(0, -2)[:EXPERT_ROWS] for given in (other, x)])
        for part, product in experts.parts(index).items():
            inputs = rounded(inputs, self.dtype)
            answers = product(inputs)

            def run(model: Model, given: Tensor, part: str = part) -> Tensor:
                return model.get_submodule(f"{block.path}.experts").parts(index)[part](given)  # pyright: ignore

            others, own = inputs.chunk(2)
            of_others, of_own = answers.chunk(2)
            operator, known = f"experts.{index}.{part}", (of_others, of_own)
            yield Probe(block.path, operator, "linear", run, (own,), (others,), OPERATOR, known, is_plain(held))
            if part == "gate_up_proj":
                inputs = swiglu(*answers.chunk(2, dim=-1), experts.limit)

    def _attention_probes(self, block: Block, x: Tensor, other: Tensor) -> Iterator[Probe]:
        """The steps between the products: rotations, the scores, and both forms of the attention."""
        module = self.emulator.get_submodule(block.path)
        turned = tuple(zip(self._turned(x), self._turned(other), strict=True))

        def ask(operator: str, call: Callable[..., Any], *inputs: Any, level: Level = OPERATOR) -> Probe:
            own, others = (
                tuple(value[which] if isinstance(value, tuple) else value for value in inputs) for which in (0, 1)
            )

            def run(model: Model, *given: Any) -> Any:
                return call(model.get_submodule(block.path), *given)

            return Probe(block.path, operator, f"attention {operator}", run, own, others, level)

        def cached(attention: Any, given: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            return attention(given, Rotation(cos, sin), None, WholeRows())

        if isinstance(module, LatentAttention):
            pairs = [module.project(given, rotation_of(self.emulator, given.shape[:2])) for given in (x, other)]
            q_nope, q_rope, latents = zip(*pairs, strict=True)
            yield ask("rope of keys", _rotated_keys, (x, other), *turned)
            yield ask("rope of queries", _rotated_queries, (x, other), *turned, level=STEP)
            yield ask("attention scores and context", _naive_context, q_nope, q_rope, latents)
            yield ask("attention in latent space", _absorbed_context, q_nope, q_rope, latents)
        few = fewer(x), fewer(other)
        turned = zip(*map(self._turned, few), strict=True)
        yield ask("attention with a cache", cached, few, *turned, level=BLOCK)

    def _outside_probes(self, x: Tensor) -> Iterator[Probe]:
        """Embedding, rotary table, final norm and output head, a large one in blocks of its rows."""
        other, model = other_inputs(x), self.emulator
        tokens = torch.arange(min(model.architecture.vocab_size, MOST_EMBEDDINGS))
        yield Probe(
            "model.embed_tokens", None, "embedding", lambda m, ids: m.model.embed_tokens(ids), (tokens,), (tokens,)
        )
        places = positions_to_ask(model.architecture.max_position_embeddings)

        def table(m: Model, positions: Tensor) -> Tensor:
            return torch.cat(tuple(m.model.rotary(positions)), dim=-1)

        yield Probe("model.rotary", None, "rotary", table, (places,), (places,))
        yield from self._norm("model.norm", "model.norm", None, x, other)
        pieces, few, other_few = pieces_of(model), fewer(x), fewer(other)
        for rows in pieces.head_blocks() if pieces is not None else [range(model.architecture.vocab_size)]:
            run = lambda m, given, rows=rows: head(m, given, rows)  # noqa: E731
            yield Probe("lm_head", None, "linear", run, (few,), (other_few,), plain=True)

    def _mtp_probes(self, path: str, x: Tensor) -> Iterator[Probe]:
        """How the MTP layer joins its inputs, and what it makes of them."""
        other, layer = other_inputs(x), self.emulator.mtp_layer
        assert layer is not None
        for norm in ("enorm", "hnorm", "shared_head.norm"):
            yield from self._norm(f"{path}.{norm}", f"{path}.{norm}", None, x, other)
        joined = torch.cat((layer.enorm(x), layer.hnorm(other)), dim=-1)
        yield Probe(
            f"{path}.eh_proj", None, "linear", lambda m, given: m.mtp_layer.eh_proj(given), (joined,), (joined.flip(0),)
        )
        rows = torch.tensor(self.golden.listed.rows)
        yield Probe(path, "next token", "mtp", _mtp_states, (x, rows), (other, rows.flip(0)), LAYER)
        yield Probe(f"{path}.eh_proj", "join", "join", lambda m, a, b: m.mtp_layer.join(a, b), (x, other), (other, x))


@dataclass(frozen=True)
class Wide:
    """A tensor that stays in fp32 on every target: cos and sin."""

    tensor: Tensor


def rounded(value: Any, dtype: torch.dtype) -> Any:
    """Float tensors as the target can hold them, in fp32 on the host. A dtype that is wide enough changes nothing."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(dtype).float()
    return value


def placed(value: Any, model: Model) -> Any:
    """A host value on the target's device, in the dtype of its activations; cos and sin stay as they are."""
    if isinstance(value, Wide):
        return value.tensor.to(model.model.norm.weight.device)
    if not isinstance(value, Tensor):
        return value
    weight = model.model.norm.weight
    return value.to(weight.device, weight.dtype) if value.is_floating_point() else value.to(weight.device)


def _placed_all(inputs: tuple[Any, ...], model: Model) -> tuple[Any, ...]:
    return tuple(placed(value, model) for value in inputs)


def as_host(value: Tensor) -> Tensor:
    return value.detach().float().cpu()


def layer_of(path: str) -> str | None:
    """The path of the layer that a path lies in; None outside the layers."""
    parts = path.split(".")
    return ".".join(parts[:3]) if len(parts) > 2 and parts[:2] == ["model", "layers"] else None


def first_tokens(x: Tensor, count: int = FEWEST_TOKENS) -> Tensor:
    """The first tokens of the first row of x [B, T, D]."""
    return x[:1, :count]


def fewer(x: Tensor) -> Tensor:
    """The first rows of x [B, T, D], of FEW_TOKENS tokens, and one at least."""
    return x[: max(1, FEW_TOKENS // x.shape[1])]


def head(model: Model, x: Tensor, rows: range) -> Tensor:
    """Logits of some rows of the output head; whole, if the model holds it whole."""
    pieces = pieces_of(model)
    if pieces is not None:
        return pieces.head_rows(rows)(x)
    found = model.lm_head(x)
    return found if len(rows) == found.shape[-1] else found[..., rows.start : rows.stop]


def in_one_pass(run: Callable[..., Any], model: Model, questions: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Answers to several inputs whose rows, the first dimension of each, do not depend on each other."""
    given = tuple(torch.cat(parts) for parts in zip(*questions, strict=True))
    output, routing = run(model, *given)
    return split_rows(output, routing, [len(inputs[0]) for inputs in questions])


def is_plain(module: nn.Module) -> bool:
    """Whether nothing in a module is a module of its own: a twin adds noise to its output alone."""
    return not any(True for _ in module.children())


def _run_beside_experts(mixture: nn.Module, x: Tensor) -> None:
    """What of a mixture sees every token: its router and the shared experts."""
    tokens = x.reshape(-1, x.shape[-1])
    for name, part in mixture.named_children():
        if name != "experts":
            part(tokens)


def other_inputs(x: Tensor) -> Tensor:
    """Inputs of the same kind that are not the golden ones: tokens in another order, each a little larger."""
    generator = torch.Generator().manual_seed(x.shape[-1])
    order = torch.randperm(x.shape[1], generator=generator)
    size = 1 + 0.2 * torch.rand(*x.shape[:2], 1, generator=generator)
    return x.flip(0)[:, order] * size


def shifted(x: Tensor, router: Router, scale: float) -> Tensor:
    """Inputs of a router, larger and moved against its experts' mean direction: scores near 0 as well as near 1."""
    mean = router.weight.float().mean(0)
    push = mean / mean.norm().clamp_min(1e-20) * x.flatten(0, -2).norm(dim=-1).mean()
    return x * scale - (push * (scale - 1.0) / 2)


def positions_to_ask(most: int) -> Tensor:
    """The first positions, and some up to the last one."""
    near = torch.arange(min(most, FAR))
    far = torch.linspace(0, most - 1, FAR).long()
    return torch.cat((near, far))[None]


def fitted(x: Tensor, size: int) -> Tensor:
    """Rows of that many channels, from rows of whatever number."""
    if x.shape[-1] >= size:
        return x[..., :size]
    return x.repeat(*(1,) * (x.dim() - 1), -(-size // x.shape[-1]))[..., :size]


def relative_error(y: Tensor, e: Tensor) -> float:
    """|y - e| / |e| in L2; infinite if y is no number anywhere, 0 for nothing to compare."""
    if not e.numel():
        return 0.0
    error = ((y - e).norm() / e.norm().clamp_min(1e-30)).item()
    return error if math.isfinite(error) else math.inf


def worst_channel(y: Tensor, e: Tensor) -> float:
    """The largest relative error of an output channel over the rows: L2 of the difference over that of the channel,
    where a channel that is small beside its rows counts as SMALL_CHANNEL of them."""
    if not e.numel():
        return 0.0
    if y.shape != e.shape:
        return math.inf
    y, e = y.reshape(-1, y.shape[-1]), e.reshape(-1, e.shape[-1])
    channels = e.square().sum(0)
    size = (channels + SMALL_CHANNEL**2 * channels.mean()).sqrt().clamp_min(1e-30)
    error = ((y - e).square().sum(0).sqrt() / size).max().item()
    return error if math.isfinite(error) and bool(torch.isfinite(size).all()) else math.inf


def by_expert(routing: Routing) -> Tensor:
    """The weights [N, E] of the experts, 0 where one is not chosen."""
    scores = as_host(routing.scores)
    return torch.zeros_like(scores).scatter(-1, routing.experts.cpu(), as_host(routing.weights))


def near_ties(router: Router, routing: Routing, dtype: torch.dtype) -> Tensor:
    """Which tokens [N] are chosen so narrowly, among experts or among groups, that rounding of scores decides."""
    biased = router.biased(routing.scores)
    slack = 8 * (ROUNDING[dtype] + ACCUMULATION[dtype])
    narrow = torch.zeros(len(biased), dtype=torch.bool)
    if router.topk_group < router.n_group:
        grouped = biased.unflatten(-1, (router.n_group, -1))
        score = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1).sort(-1, descending=True).values
        narrow |= score[:, router.topk_group - 1] - score[:, router.topk_group] < slack
        kept = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1).topk(router.topk_group, dim=-1).indices
        closed = torch.ones(grouped.shape[:2], dtype=torch.bool).scatter(-1, kept, False)
        biased = grouped.masked_fill(closed.unsqueeze(-1), float("-inf")).flatten(-2)
    ordered = biased.sort(-1, descending=True).values
    if router.top_k < ordered.shape[-1]:
        narrow |= ordered[:, router.top_k - 1] - ordered[:, router.top_k] < slack
    return narrow


def differences_of_structure(emulator: Model, target: Model, layer: str | None) -> list[Measure]:
    """Modules of a layer of the target, or of what lies outside the layers, that are of another class than the
    emulator's, or missing: something left unquantised."""
    theirs, found = dict(target.named_modules()), []
    for path, module in emulator.named_modules():
        if layer_of(path) != layer:
            continue
        other = theirs.get(path)
        if other is None and path.rpartition(".")[0] not in theirs:
            continue
        if type(other) is not type(module):
            built = "missing" if other is None else f"a {type(other).__name__}"
            note = f"it is {built}, and the format has a {type(module).__name__}"
            found.append(Measure(*place_of(path), "structure", 1.0, STRUCTURE, note))
    return found


def place_of(path: str) -> tuple[str, str | None]:
    """The block that a module lies in, and what in it; the path itself where there is no block."""
    parts = path.split(".")
    if parts[:2] == ["model", "layers"] and len(parts) > 4 and parts[3] in ("self_attn", "mlp"):
        return ".".join(parts[:4]), ".".join(parts[4:])
    return path, None


def _rotated_keys(attention: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return attention.latents(x, Rotation(cos, sin))[..., attention.rank :]


def _rotated_queries(attention: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return attention.queries(x, Rotation(cos, sin))[1]


def _naive_context(attention: Any, q_nope: Tensor, q_rope: Tensor, latents: Tensor) -> Tensor:
    context = attention.naive(q_nope, q_rope, latents, causal_mask(latents.shape[1], latents.device))
    return context.flatten(-2)


def _absorbed_context(attention: Any, q_nope: Tensor, q_rope: Tensor, latents: Tensor) -> Tensor:
    return attention.absorbed(q_nope, q_rope, latents, WholeRows()).flatten(-2)


def _mtp_states(model: Model, hidden: Tensor, tokens: Tensor) -> Any:
    """What the MTP layer makes of a hidden state and the next tokens, from the embedding to its norm."""
    trace, (rows, length) = Trace(), tokens.shape
    positions = torch.arange(length, device=tokens.device).expand(rows, length)
    states = model.mtp_next(hidden, tokens, positions, causal_mask(length, tokens.device), trace)
    return (states, trace.routings[0]) if trace.routings else states
