"""Verification of a bundle on the machine of its target: layer by layer, cheapest first, with nothing but the folder.

Files, configuration, weights as loaded, modules, tokens. The layers after a failed one are still asked where they can
say more about the fault: a wrong weight is found by its hash, and the replay says what it does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from isthmus import __version__
from isthmus.chips.rehearse.dispatch import enforce
from isthmus.errors import DamagedFile
from isthmus.formats.files.bundle import Bundle, read_bundle
from isthmus.model.model import Model
from isthmus.parity.blocks import Block, blocks_of, run_block
from isthmus.parity.capture import GoldenSet
from isthmus.parity.lint import lint_config, lint_model
from isthmus.parity.loaded import check_loaded
from isthmus.parity.manifest import add_file, check_manifest
from isthmus.parity.replay import LIMIT, Measure, Replay, Replayer, relative_error
from isthmus.parity.target import DTYPES, build_target, healthy_twin
from isthmus.parity.tokens import TokenParity, compare_tokens
from isthmus.records import Check, LedgerRow, Outcome, ParityVerdict
from isthmus.run import Figure

VERDICT = "verdict.json"
SAME_EMULATOR = 5e-3
"""Relative error of a block between the emulators of two hosts: sums in another order, an int8 step here and there."""
MOST_FAULTS = 12
TWIN_PASSES = 4
"""Passes of the healthy twin, each with other noise: where experts flip, one pass says little."""

Tell = Callable[[str, int, int], None]
"""Hears of progress: what is done, how much of it, of how much."""


@dataclass(frozen=True)
class Limits:
    """The drift budget. KL in nats per token, between emulator and target; `max_module_error` is what quantisation may
    cost a block, relative. `source` says where the limits come from."""

    max_chip_kl: float = 0.01
    max_module_error: float = 0.25
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
    tell: Tell = lambda what, done, total: None,
) -> ParityVerdict:
    """Verify a captured bundle on a target, and give the verdict; nothing is written.

    `build` makes the target's model instead of `build_target`. Raises IsthmusError if the folder is no bundle, was not
    captured, or the device is not here.
    """
    target, limits, started = target or Target(), limits or Limits(), time.time()
    checks = check_manifest(folder)
    try:
        bundle = read_bundle(folder)
    except DamagedFile as error:
        checks.append(_failure("files", "the bundle is whole", str(error)))
        return _verdict(target, checks, [], started)
    checks += lint_config(folder, chip=target.rehearse)
    if any(check.outcome == "fail" for check in checks):
        return _verdict(target, checks, [], started)
    golden, emulator = GoldenSet(folder), bundle.build()
    checks += _check_emulator(golden, emulator)
    replayer = Replayer(golden, emulator, healthy_twin(bundle, DTYPES[target.dtype]), DTYPES[target.dtype])
    model = build(bundle) if build else build_target(bundle, target.device, DTYPES[target.dtype])
    checks += lint_model(model, bundle.architecture) + check_loaded(emulator, model)
    context = target.context()
    found = replayer.compare(model, lambda done, total: tell("modules", done, total), lambda: context)
    checks += _check_modules(found, target) + _check_quantisation(found.ledger, limits)
    checks += _check_tokens(golden, bundle, emulator, model, target, limits)
    return _verdict(target, checks, found.ledger, started)


def write_verdict(folder: Path, verdict: ParityVerdict) -> None:
    """Put the verdict into a bundle that is not sealed yet, and its hash into the checksums."""
    add_file(folder, VERDICT, verdict.model_dump_json(indent=2).encode() + b"\n")


def _verdict(target: Target, checks: list[Check], ledger: list[LedgerRow], started: float) -> ParityVerdict:
    """Refused by any check that did not pass; the culprit is the module of the first that names one."""
    failed = [check for check in checks if check.outcome == "fail"]
    named = next((check for check in failed if check.module), None)
    return ParityVerdict(
        verdict="refuse" if failed else "pass",
        target=str(target),
        rehearsed=target.rehearse is not None,
        checks=checks,
        ledger=ledger,
        culprit=named.module if named else None,
        operator=named.operator if named else None,
        isthmus=__version__,
        torch=torch.__version__,
        started=started,
        ended=time.time(),
    )


def _failure(layer: str, name: str, detail: str, module: str | None = None) -> Check:
    return Check(layer=layer, name=name, outcome="fail", figure=None, limit=None, detail=detail, module=module)  # pyright: ignore


@torch.inference_mode()
def _check_emulator(golden: GoldenSet, emulator: Model) -> list[Check]:
    """This host's emulator on the golden inputs, against what the source's emulator made of them."""
    worst: tuple[float, Block | None] = (0.0, None)
    for block in blocks_of(emulator):
        stored = golden.block(block.path)
        found, _ = run_block(emulator, block, stored.input)
        worst = max(worst, (relative_error(found, stored.output), block), key=lambda pair: pair[0])
    error, block = worst
    figure = None
    if math.isfinite(error):
        source = "all blocks on their golden inputs, emulator of this host against that of the source"
        figure = Figure.measured(error, "relative error", source, rehearsed=False)
    limit = Figure(
        value=SAME_EMULATOR, unit="relative error", kind="declared", source="isthmus.parity.verify.SAME_EMULATOR"
    )
    passed = error <= SAME_EMULATOR
    return [
        Check(
            layer="modules",
            name="the emulator is the source's",
            outcome="pass" if passed else "fail",
            figure=figure,
            limit=limit,
            detail="what was carried means here what it meant there",
            module=None if passed or block is None else block.path,
        )
    ]


def _check_modules(found: Replay, target: Target) -> list[Check]:
    """One check that passes, or one for each module at fault, the most telling first."""
    limit = Figure(value=LIMIT, unit="times the floor", kind="declared", source="isthmus.parity.replay.LIMIT")
    if not found.faults:
        ratio, worst = found.worst
        where = f"{worst.path}{f', {worst.operator}' if worst.operator else ''}"
        detail = f"{len(found.ledger)} blocks and {len(found.measures)} measures; the largest is at {where}"
        return [_module_check("pass", ratio, limit, detail, target)]
    by_path: dict[str, tuple[float, Measure]] = {}
    for ratio, measure in found.faults:
        by_path.setdefault(measure.path, (ratio, measure))
    checks = []
    for ratio, measure in list(by_path.values())[:MOST_FAULTS]:
        what = f"{measure.path}{f', operator {measure.operator}' if measure.operator else ''}"
        detail = f"{what}: {measure.note or _amount(ratio, measure)}"
        checks.append(_module_check("fail", ratio, limit, detail, target, measure))
    return checks


def _amount(ratio: float, measure: Measure) -> str:
    if not math.isfinite(ratio):
        return "its output is not a number"
    return f"differs by {measure.value:.3g}, {ratio:.3g} times what a healthy target differs by"


def _module_check(
    outcome: Outcome, ratio: float, limit: Figure, detail: str, target: Target, measure: Measure | None = None
) -> Check:
    source = f"golden inputs replayed on {target}"
    figure = None
    if math.isfinite(ratio):
        figure = Figure.measured(ratio, "times the floor", source, rehearsed=target.rehearse is not None)
    return Check(
        layer="modules",
        name="module replay",
        outcome=outcome,
        figure=figure,
        limit=limit,
        detail=detail,
        module=measure.path if measure else None,
        operator=measure.operator if measure else None,
    )


def _check_quantisation(ledger: list[LedgerRow], limits: Limits) -> list[Check]:
    rows = [row for row in ledger if row.quantisation is not None]
    if not rows:
        return []
    worst = max(rows, key=lambda row: row.quantisation or 0.0)
    assert worst.quantisation is not None
    passed = worst.quantisation <= limits.max_module_error
    source = f"golden input of {worst.module}, trained weights against the emulator"
    return [
        Check(
            layer="modules",
            name="what quantisation costs a block",
            outcome="pass" if passed else "fail",
            figure=Figure.measured(worst.quantisation, "relative error", source, rehearsed=False),
            limit=Figure(value=limits.max_module_error, unit="relative error", kind="declared", source=limits.source),
            detail=f"the largest of {len(rows)} blocks, {worst.module}",
            module=None if passed else worst.module,
        )
    ]


def _check_tokens(
    golden: GoldenSet, bundle: Bundle, emulator: Model, model: Model, target: Target, limits: Limits
) -> list[Check]:
    """Whole sequences, emulator against target. What rounding costs a healthy twin is granted beside the budget."""
    sequences, context = golden.listed.golden_sequences(), target.context()
    twin = healthy_twin(bundle, DTYPES[target.dtype], seed=1)
    floor = max(compare_tokens(emulator, twin, sequences).mean_kl for _ in range(TWIN_PASSES))
    found = compare_tokens(emulator, model, sequences, confidence=limits.confidence, candidate_context=lambda: context)
    allowed = max(limits.max_chip_kl, LIMIT * floor)
    source = f"{found.sequences} golden sequences, {found.tokens} tokens, teacher-forced on {target}"
    rehearsed = target.rehearse is not None
    granted = ""
    if allowed > limits.max_chip_kl:
        granted = f"; a healthy twin is at {floor:.3g}, and {LIMIT:g} times that is granted"
    detail = f"KL(emulator || target), largest {found.max_kl:.3g}{granted}; {_flips(found)}"
    finite = math.isfinite(found.mean_kl)
    figure = None
    if finite:
        figure = Figure.measured(
            found.mean_kl, "nats/token", source, rehearsed=rehearsed, low=found.kl_low, high=found.kl_high
        )
    return [
        Check(
            layer="tokens",
            name="mean KL, emulator to target",
            outcome=_within(found, allowed) if finite else "fail",
            figure=figure,
            limit=Figure(value=allowed, unit="nats/token", kind="declared", source=limits.source),
            detail=detail,
        )
    ]


def _within(found: TokenParity, allowed: float) -> Outcome:
    """Refused only if the whole interval is above what is allowed: in a few tokens one router flip moves the mean."""
    if found.kl_low > allowed:
        return "fail"
    return "pass" if found.mean_kl <= allowed else "unknown"


def _flips(found: TokenParity) -> str:
    agreed = f"first choices agree for {found.top1_agreement:.2%}, {found.near_ties} near-ties, {found.flips} flips"
    if not found.router_choices:
        return agreed
    return f"{agreed}; {found.router_flips} of {found.router_choices} router choices differ"
