"""Verification of a bundle on the machine of its target: layer by layer, cheapest first, with nothing but the folder.

Files, configuration, weights as loaded, modules, tokens. The layers after a failed one are still asked where they can
say more about the fault: a wrong weight is found by its hash, and the replay says what it does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from isthmus.chips.rehearse.dispatch import enforce
from isthmus.errors import DamagedFile
from isthmus.formats.files.bundle import Bundle, open_bundle
from isthmus.model.model import Model
from isthmus.parity.capture import GoldenSet
from isthmus.parity.cost import check_cost
from isthmus.parity.engine import check_distance, check_loss
from isthmus.parity.gate import at_most, declared, finite, judge, refuses
from isthmus.parity.lint import lint_config, lint_model
from isthmus.parity.loaded import Loaded
from isthmus.parity.manifest import add_file, check_manifest
from isthmus.parity.replay import LIMIT, Measure, Replay, Replayer
from isthmus.parity.sanity import check_sanity
from isthmus.parity.seal import VERDICT
from isthmus.parity.target import DTYPES, stream_target, stream_twin
from isthmus.parity.tokens import (
    Candidate,
    GoldenSequence,
    Told,
    ask_tokens,
    distinct,
    lengths_of,
    numbered,
    of_sequences,
)
from isthmus.parity.twins import (
    GRANTED,
    SEED,
    Healthy,
    ask_twins,
    compare_losses,
    compare_with_emulator,
    half_squares,
)
from isthmus.records import Check, LedgerRow, ParityVerdict

SAME_EMULATOR = 5e-3
"""Relative error of a block between the emulators of two hosts: sums in another order, an int8 step here and there."""
MOST_FAULTS = 12
DISTANCE = "distance to the emulator, target against healthy twins"
LOSS = "distance to the trained model, target minus emulator"

Tell = Callable[[str, int, int], None]
"""Hears of progress: what is done, how much of it, of how much."""


@dataclass(frozen=True)
class Limits:
    """The drift budget, in nats per token: `max_chip_kl` is what the target may be further from the trained model than
    the emulator, `max_mean_kl` the KL between the trained model and the emulator. `source` says where they come from.
    """

    max_chip_kl: float = 0.01
    max_mean_kl: float = 0.02
    confidence: float = 0.95
    source: str = "isthmus.parity.verify.Limits"


@dataclass(frozen=True)
class Target:
    """Where and how the bundle's model runs. `rehearse` names a chip whose rules are enforced."""

    device: str = "cpu"
    dtype: str = "fp32"
    rehearse: str | None = None

    def __str__(self) -> str:
        where = f"the CPU by the rules of {self.rehearse}" if self.rehearse else self.device
        return f"{where} in {self.dtype}"

    def context(self) -> AbstractContextManager[object]:
        return enforce(self.rehearse) if self.rehearse else nullcontext()


def verify_bundle(
    folder: Path,
    *,
    build: Callable[[Bundle], Model] | None = None,
    target: Target | None = None,
    limits: Limits | None = None,
    before: Sequence[Check] = (),
    tell: Tell = lambda what, done, total: None,
) -> ParityVerdict:
    """Verify a captured bundle on a target, and give the verdict; nothing is written.

    `build` makes the target's model, whole, instead of `stream_target`, which makes it piece by piece. The verdict is
    on the findings in `before`, too. Raises IsthmusError if the folder is no bundle, was not captured, or the device is
    not here.
    """
    target, limits = target or Target(), limits or Limits()
    judged = partial(judge, before, target=str(target), rehearsed=target.rehearse is not None, started=time.time())
    checks = check_manifest(folder)
    with ExitStack() as stack:
        try:
            bundle = stack.enter_context(open_bundle(folder, check_files=any(map(refuses, checks))))
        except DamagedFile as error:
            checks.append(Check(layer="files", name="the bundle is whole", outcome="fail", detail=str(error)))
            return judged(checks)
        checks += lint_config(folder, chip=target.rehearse)
        if any(map(refuses, checks)):
            return judged(checks)
        golden = GoldenSet(folder)
        vocabulary = bundle.architecture.vocab_size
        checks[:0] = [check_sanity(golden, vocabulary, limits.confidence), check_format_cost(golden, limits)]
        found, ledger = _ask(bundle, golden, build, target, limits, tell)
    return judged(checks + found, ledger=ledger)


def _ask(
    bundle: Bundle,
    golden: GoldenSet,
    build: Callable[[Bundle], Model] | None,
    target: Target,
    limits: Limits,
    tell: Tell,
) -> tuple[list[Check], list[LedgerRow]]:
    """The target's weights, modules and tokens against the emulator; both are in memory piece by piece, but for a
    target that `build` makes."""
    dtype, context = DTYPES[target.dtype], target.context()
    lend_experts = build is None
    emulator = bundle.stream(lend_experts=lend_experts)
    model = build(bundle) if build else stream_target(bundle, target.device, dtype)
    loaded = Loaded(emulator, model)
    replayer = Replayer(golden, emulator, stream_twin(bundle, dtype, lend_experts=lend_experts), dtype)
    found = replayer.compare(model, lambda done, total: tell("modules", done, total), lambda: context, loaded.look)
    checks = [_check_emulator(found), *lint_model(model, bundle.architecture), *loaded.checks()]
    checks += check_modules(found, target)

    def ask_here(sequences: list[GoldenSequence]) -> Healthy:
        twin = stream_twin(bundle, dtype, SEED, GRANTED, lend_experts=lend_experts)
        return Healthy(ask_tokens(Candidate(emulator), sequences), ask_twins(twin, sequences))

    return checks + _check_tokens(golden, model, target, limits, ask_here), found.ledger


def write_verdict(folder: Path, verdict: ParityVerdict) -> None:
    """Put the verdict into a bundle that is not sealed yet, and its hash into the checksums."""
    add_file(folder, VERDICT, verdict.model_dump_json(indent=2).encode() + b"\n")


def _check_emulator(found: Replay) -> Check:
    """This host's emulator on the golden inputs, against what the source's emulator made of them."""
    error = found.emulator_error
    outcome = at_most(SAME_EMULATOR, error)
    source = "all blocks on their golden inputs, emulator of this host against that of the source"
    return Check(
        layer="modules",
        name="the emulator is the source's",
        outcome=outcome,
        figure=finite(error, "relative error", source, rehearsed=False),
        limit=declared(SAME_EMULATOR, "relative error", "isthmus.parity.verify.SAME_EMULATOR"),
        detail="what was carried means here what it meant there",
        module=None if outcome == "pass" else found.emulator_block,
    )


def check_modules(found: Replay, target: Target) -> list[Check]:
    """One check that passes, or one for each module at fault, the most telling first."""
    if not found.faults:
        ratio, worst = found.worst
        detail = f"{len(found.ledger)} blocks and {len(found.measures)} measures; the largest is at {_place(worst, '')}"
        return [_module_check(ratio, detail, target)]
    by_path: dict[str, tuple[float, Measure]] = {}
    for ratio, measure in found.faults:
        by_path.setdefault(measure.path, (ratio, measure))
    return [
        _module_check(ratio, f"{_place(one, 'operator ')}: {one.note or _amount(ratio, one)}", target, one)
        for ratio, one in list(by_path.values())[:MOST_FAULTS]
    ]


def _place(measure: Measure, word: str) -> str:
    return f"{measure.path}{f', {word}{measure.operator}' if measure.operator else ''}"


def _amount(ratio: float, measure: Measure) -> str:
    if not math.isfinite(ratio):
        return "its output is not a number"
    return f"differs by {measure.value:.3g}, {ratio:.3g} times what a healthy target differs by"


def _module_check(ratio: float, detail: str, target: Target, fault: Measure | None = None) -> Check:
    source = f"golden inputs replayed on {target}"
    return Check(
        layer="modules",
        name="module replay",
        outcome="fail" if fault else "pass",
        figure=finite(ratio, "times the floor", source, rehearsed=target.rehearse is not None),
        limit=declared(LIMIT, "times the floor", "isthmus.parity.replay.LIMIT"),
        detail=detail,
        module=fault.path if fault else None,
        operator=fault.operator if fault else None,
    )


def check_format_cost(golden: GoldenSet, limits: Limits) -> Check:
    """Whether what capture measured of the format is within its budget."""
    limit = declared(limits.max_mean_kl, "nats/token", limits.source)
    return check_cost(golden.cost, golden.listed.format, golden.listed.origin, limit, limits.confidence)


def _check_tokens(
    golden: GoldenSet,
    model: Model,
    target: Target,
    limits: Limits,
    ask_here: Callable[[list[GoldenSequence]], Healthy],
) -> list[Check]:
    """Whole sequences: the target against the emulator, healthy twins of it, and what the trained model said.

    Emulator and twins are those of the capture. What these do not let pass is held against those of this host, which
    `ask_here` asks, and they decide.
    """
    listed, context = golden.listed.golden_sequences(), target.context()
    kept = distinct(listed)
    sequences, trained = [listed[place] for place in kept], golden.token_logprobs().trained
    said = ask_tokens(Candidate(model, lambda: context), sequences)
    judged = partial(_judge_tokens, said, of_sequences(trained, listed, kept), lengths_of(sequences), target, limits)
    if (known := golden.healthy(target.dtype)) is not None:
        checks = judged(known.of(listed, kept), "asked when it was captured")
        if not any(map(refuses, checks)):
            return checks
    return judged(ask_here(sequences), "asked on this host")


def _judge_tokens(
    said: Told,
    trained: Tensor,
    lengths: Tensor,
    target: Target,
    limits: Limits,
    healthy: Healthy,
    asked: str,
) -> list[Check]:
    """What the target said [N] of sequences of these lengths [S]; `asked` says where emulator and twins were."""
    emulator, rehearsed = healthy.emulator, target.rehearse is not None
    source = f"{len(lengths)} golden sequences, {len(trained)} tokens, teacher-forced on {target}"
    beyond = compare_with_emulator(said.logprobs, emulator.logprobs, healthy.twins, lengths)
    distance = check_distance(DISTANCE, beyond, target.dtype, source, "tokens", "target", rehearsed=rehearsed)
    budget = declared(limits.max_chip_kl, "nats/token", limits.source)
    loss = compare_losses(said.logprobs, emulator.logprobs, trained, numbered(lengths), limits.confidence)
    apart = half_squares(said.logprobs, emulator.logprobs)
    detail = f"{distance.detail}; mean (Δlogp)²/2 to the emulator, which estimates KL: {_mean(apart):.3g}; "
    detail += f"first choices agree for {_mean(said.first == emulator.first):.2%}; emulator and twins {asked}"
    return [
        distance.model_copy(update={"detail": detail}),
        check_loss(LOSS, loss, budget, source, limits.confidence, layer="tokens", rehearsed=rehearsed),
    ]


def _mean(values: Tensor) -> float:
    return float(values.double().mean())
