"""The hand-off: the trained weights in the format of the pool that serves them, a parity gate, and a seal.

Every source tensor is followed into each bundle, golden inputs are captured, and the bundle is verified as on the
machine of its target: files, configuration, modules, tokens. The reference is the fp32 model on the CPU. It writes
golden sequences, and every bundle is compared with it token by token on these; the target bundle also answers the
held-out problems in an engine of its own, with the same random numbers as the reference, so that the answers pair. A
gate that refuses writes its record and seals nothing.
"""

from __future__ import annotations

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from rich.table import Table
from torch import Tensor

from isthmus.chips.rehearse.dispatch import Rehearsal, enforce
from isthmus.data.corpus import prompt_ids, run_tokenizer
from isthmus.data.tasks import Problem, Task, load_task, seeded
from isthmus.data.tokenizer import Tokenizer
from isthmus.engines import Completion, Sampling
from isthmus.engines.local import LocalEngine, report_kernels
from isthmus.errors import GateRefused
from isthmus.formats import get_format
from isthmus.formats.calibration.balance import balance
from isthmus.formats.calibration.calibrate import calibrate
from isthmus.formats.calibration.ranges import Calibration
from isthmus.formats.calibration.rounding import round_with_calibration
from isthmus.formats.files.bundle import Bundle, read_bundle, write_bundle
from isthmus.formats.files.golden import make_golden, write_golden
from isthmus.model.model import Model
from isthmus.parity.capture import CaptureOptions, capture
from isthmus.parity.coverage import check_coverage
from isthmus.parity.lint import lint_config
from isthmus.parity.manifest import write_manifest
from isthmus.parity.paired import compare_answers
from isthmus.parity.seal import Lineage, write_seal
from isthmus.parity.spot import LIMIT, LIMIT_SOURCE
from isthmus.parity.tokens import GoldenSequence, TokenParity, compare_tokens, completion_log_probabilities
from isthmus.parity.verify import Limits, Target, verify_bundle, write_verdict
from isthmus.pools import Pool, get_pool
from isthmus.progress import Watch
from isthmus.records import Check, HandoffRecord, Layer, Outcome, ParityVerdict, PlanRecord, RlRecord
from isthmus.rewards import get_reward
from isthmus.run import Figure, RunFolder
from isthmus.trainer.checkpoint import load_model_state

NAME = "handoff"
REFERENCE, PLAIN = "fp32", "bf16"
SAMPLES_PER_PROBLEM = 2
MUST_BE_KNOWN = ("tokens", "engine", "task")
"""Layers in which "unknown" refuses: more samples would tell. In the others it is a risk, and said."""
STYLES: dict[Outcome, str] = {"pass": "green", "fail": "bold red", "unknown": "yellow"}


@dataclass(frozen=True)
class Session:
    """What the checks work on. `source` trained the weights, `target` is to serve them."""

    run: RunFolder
    rl: RlRecord
    task: Task
    tokenizer: Tokenizer
    problems: list[Problem]
    state: dict[str, Tensor]
    source: Pool
    target: Pool

    @property
    def prompts(self) -> list[list[int]]:
        return [prompt_ids(self.tokenizer, problem) for problem in self.problems]


@dataclass
class Findings:
    """What the checks found, in their order, figures beside them, and the verdict on each bundle by its format."""

    checks: list[Check]
    figures: dict[str, Figure]
    verdicts: dict[str, ParityVerdict] = field(default_factory=dict)

    def add(self, layer: Layer, name: str, outcome: Outcome, figure: Figure, limit: Figure, detail: str) -> None:
        self.checks.append(Check(layer=layer, name=name, outcome=outcome, figure=figure, limit=limit, detail=detail))


Answers = list[list[Completion]]


def execute(run: RunFolder, watch: Watch) -> HandoffRecord:
    """Write the bundles, check them against the fp32 reference, and seal them. Raises GateRefused if a check fails."""
    started = time.time()
    session = _open_session(run)
    run.event(NAME, "start", pool=session.target.name, source_pool=session.source.name)
    (run.path / "parity.json").unlink(missing_ok=True)
    folder = run.path / NAME / REFERENCE
    try:
        write_bundle(folder, REFERENCE, session.state, run.recipe.model, session.tokenizer)
        findings, bundles = _prove(session, read_bundle(folder), watch)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    record = _conclude(session, bundles, findings, started)
    run.write_record("parity", record)
    run.event(NAME, "verdict", verdict=record.verdict, seal_id=record.seal_id)
    run.event(NAME, "end", seconds=round(record.seconds, 3))
    if record.verdict == "refuse":
        watch.console.print(render(record))
        raise GateRefused(_refusal(run, record))
    watch.say(f"  sealed {record.bundles[record.format]} as {record.seal_id}")
    return record


def render(record: HandoffRecord) -> Table:
    """The parity table."""
    table = Table(
        title=f"parity of {record.format} for pool {record.target_pool}: {record.verdict}", title_justify="left"
    )
    for column in ("check", "outcome", "found", "limit"):
        table.add_column(column, overflow="fold")
    for check in record.checks:
        outcome = f"[{STYLES[check.outcome]}]{check.outcome}[/]"
        table.add_row(check.name, outcome, str(check.figure or "-"), str(check.limit or "-"))
    return table


def _open_session(run: RunFolder) -> Session:
    plan = run.require_record("plan", PlanRecord, "plan")
    rl = run.require_record("rl", RlRecord, "rl")
    source, target = get_pool(run.recipe, rl.train_pool), get_pool(run.recipe, plan.pool_of("serve"))
    task = load_task(run.recipe)
    problems = task.heldout[: run.recipe.handoff.heldout_problems]
    state = load_model_state(run.path / rl.checkpoint, rl.checkpoint_sha256)
    return Session(run, rl, task, run_tokenizer(run, task), problems, state, source, target)


@dataclass(frozen=True)
class Prepared:
    """The weights as they are stored: balanced and calibrated, where the recipe asks for it or the format needs it.

    `balanced` are the trained weights after balancing, and the same where there is none.
    """

    balanced: dict[str, Tensor]
    calibration: Calibration | None = None


def _prove(session: Session, reference: Bundle, watch: Watch) -> tuple[Findings, dict[str, Bundle]]:
    """Write the bundles, and put every check to them."""
    run, section = session.run, session.run.recipe.handoff
    prepared = {PLAIN: Prepared(session.state)} | {section.format: _prepare(session, reference, watch)}
    bundles = {name: _write(session, name, one, watch) for name, one in prepared.items()}
    target, findings = bundles[section.format], Findings([], {})
    if not _can_run(session, target, findings):
        return findings, bundles
    watch.say(f"  {len(session.problems)} held-out problems, answered by the reference and by the target")
    expected, found = _both_answer(session, reference, target)
    golden = _sequences(session, expected)
    for name, bundle in bundles.items():
        _verify(session, bundle, prepared[name], golden, findings, watch)
    model = reference.build()
    for bundle in bundles.values():
        _check_tokens(session, model, bundle, golden, findings)
    _check_engine(session, target, found, findings)
    _check_accuracy(session, target, expected, found, findings)
    for check in findings.checks:
        run.event(NAME, "check", name=check.name, outcome=check.outcome, detail=check.detail)
    return findings, bundles


def _can_run(session: Session, target: Bundle, findings: Findings) -> bool:
    """Whether nothing that is known of the target's chip forbids this bundle; if something does, it is a finding."""
    checks = lint_config(target.folder, session.run.recipe.model, _chip(session, target))
    failed = [check for check in checks if check.outcome == "fail"]
    findings.checks += [check.model_copy(update={"name": f"{target.format}: {check.name}"}) for check in failed]
    for check in failed:
        session.run.event(NAME, "check", name=check.name, outcome=check.outcome, detail=check.detail)
    return not failed


def _chip(session: Session, bundle: Bundle) -> str | None:
    """The chip whose rules the bundle has to keep here."""
    of_target = bundle.format == session.run.recipe.handoff.format
    return session.target.chip if of_target and session.target.rehearsed else None


def _prepare(session: Session, reference: Bundle, watch: Watch) -> Prepared:
    """Calibrate on the reference's answers to training problems, and balance, if that is wanted."""
    section = session.run.recipe.handoff
    by_inputs = section.rounding == "gptq"
    if not (get_format(section.format).needs_calibration or section.balance or by_inputs):
        return Prepared(session.state)
    problems = session.task.train[: section.calibration_prompts]
    prompts = [prompt_ids(session.tokenizer, problem) for problem in problems]
    watch.say(f"  {len(prompts)} training problems, answered by the reference, calibrate {section.format}")
    answers = _answer(session, reference, session.source, prompts)
    texts = [[*prompt, *one.tokens] for prompt, group in zip(prompts, answers, strict=True) for one in group]
    model, balanced = reference.build(), session.state
    calibration = calibrate(model, texts, gram=by_inputs)
    if section.balance:
        balanced = balance(session.state, session.run.recipe.model, calibration)
        float_format = get_format(REFERENCE)
        stored = float_format.export(balanced, session.run.recipe.model)
        calibration = calibrate(float_format.build(session.run.recipe.model, stored), texts, gram=by_inputs)
    for path in calibration.unseen:
        session.run.event(NAME, "fallback", what=f"the calibration of {path}", why="no token of the text reached it")
    return Prepared(balanced, calibration)


def _write(session: Session, name: str, prepared: Prepared, watch: Watch) -> Bundle:
    """A bundle, as read back from the disk: what is checked is what is stored."""
    run = session.run
    folder = run.path / "bundle" / name

    def refine(stored: dict[str, Tensor]) -> None:
        if prepared.calibration is not None and run.recipe.handoff.rounding == "gptq":
            round_with_calibration(stored, prepared.balanced, prepared.calibration)

    write_bundle(
        folder,
        name,
        prepared.balanced,
        run.recipe.model,
        session.tokenizer,
        calibration=prepared.calibration,
        refine=refine,
    )
    bundle = read_bundle(folder)
    watch.say(f"  wrote {folder.relative_to(run.path)}: {len(bundle.tensors)} tensors")
    return bundle


def _verify(
    session: Session,
    bundle: Bundle,
    prepared: Prepared,
    golden: list[GoldenSequence],
    findings: Findings,
    watch: Watch,
) -> None:
    """Follow every weight into the bundle, capture golden inputs, and verify it as its target would."""
    section, folder = session.run.recipe.handoff, bundle.folder
    moved = prepared.balanced is not session.state
    rounded = [name.removesuffix(".weight") for name, tensor in bundle.tensors.items() if tensor.dtype == torch.int8]
    entries, checks = check_coverage(
        session.state,
        folder,
        **({"balance": lambda name, _tensor: prepared.balanced[name]} if moved else {}),
        compensated=rounded if section.rounding == "gptq" else (),
    )
    write_golden(folder, make_golden(bundle, session.prompts, session.tokenizer.eos_id))
    texts = [[*one.prompt, *one.completion] for one in golden]
    options = CaptureOptions(max_bytes=section.capture_mb << 20, origin="held-out problems of the run")
    capture(folder, prepared.balanced, texts, options)
    write_manifest(folder, coverage=entries, architecture=session.run.recipe.model)
    limits = Limits(section.max_chip_kl, section.max_module_error, section.confidence, "recipe, [handoff]")
    with watch.count(f"verify {bundle.format}", 1) as counter:
        verdict = verify_bundle(
            folder, target=Target(rehearse=_chip(session, bundle)), limits=limits, tell=counter.tell
        )
    verdict = verdict.model_copy(update={"checks": [*checks, *verdict.checks]})
    if any(check.outcome == "fail" for check in checks):
        culprit = next((check.module for check in checks if check.module), None)
        verdict = verdict.model_copy(update={"verdict": "refuse", "culprit": culprit})
    write_verdict(folder, verdict)
    findings.verdicts[bundle.format] = verdict
    for check in verdict.checks:
        findings.checks.append(check.model_copy(update={"name": f"{bundle.format}: {check.name}"}))


def _conclude(session: Session, bundles: dict[str, Bundle], findings: Findings, started: float) -> HandoffRecord:
    """The record; if every check passed, the bundles get their golden answers and are sealed."""
    run = session.run
    culprit = next((verdict for verdict in findings.verdicts.values() if verdict.verdict == "refuse"), None)
    record = HandoffRecord(
        recipe_sha256=run.recipe.digest(),
        started=started,
        ended=time.time(),
        source_pool=session.source.name,
        target_pool=session.target.name,
        format=run.recipe.handoff.format,
        verdict="refuse" if any(map(_refuses, findings.checks)) else "pass",
        checks=findings.checks,
        bundles={name: str(bundle.folder.relative_to(run.path)) for name, bundle in bundles.items()},
        seal_id=None,
        figures=findings.figures,
        ledger=verdict.ledger if (verdict := findings.verdicts.get(run.recipe.handoff.format)) else [],
        culprit=culprit.culprit if culprit else None,
        operator=culprit.operator if culprit else None,
    )
    if record.verdict == "refuse":
        return record
    lineage = Lineage(
        checkpoint_sha256=session.rl.checkpoint_sha256,
        recipe_sha256=record.recipe_sha256,
        source_pool=record.source_pool,
        target_pool=record.target_pool,
    )
    seals = {}
    for name, bundle in bundles.items():
        seals[name] = write_seal(
            bundle.folder,
            verdict=record.verdict,
            checks=record.checks,
            lineage=lineage,
            sign_key=run.recipe.handoff.sign_key,
        )
    return record.model_copy(update={"seal_id": seals[record.format].id})


def _both_answer(session: Session, reference: Bundle, target: Bundle) -> tuple[Answers, Answers]:
    """Both engines at once, each with half of the threads of its pool: here the pools share one machine."""
    with ThreadPoolExecutor(max_workers=2) as workers:
        first = workers.submit(_answer, session, reference, session.source, session.prompts)
        second = workers.submit(_answer, session, target, session.target, session.prompts)
        return first.result(), second.result()


def _answer(session: Session, bundle: Bundle, pool: Pool, prompts: list[list[int]]) -> Answers:
    section = session.run.recipe.rl
    sampling = Sampling(section.max_new_tokens, section.temperature, n=SAMPLES_PER_PROBLEM)
    seeds = [seeded("handoff", session.run.recipe.seed, str(prompt)).getrandbits(48) for prompt in prompts]
    log = session.run.path / NAME / f"engine-{bundle.format}.log"
    rehearse = pool.chip if pool.rehearsed else None
    with LocalEngine(bundle.folder, threads=max(1, pool.threads // 2), rehearse=rehearse, log=log) as engine:
        report_kernels(partial(session.run.event, NAME), engine.kernels)
        return engine.generate(prompts, sampling, seeds)


def _sequences(session: Session, answers: Answers) -> list[GoldenSequence]:
    """The first answer to each of the first golden prompts."""
    count = session.run.recipe.handoff.golden_prompts
    pairs = zip(session.prompts[:count], answers[:count], strict=True)
    return [GoldenSequence(prompt, group[0].tokens) for prompt, group in pairs]


def _check_tokens(
    session: Session, reference: Model, bundle: Bundle, golden: list[GoldenSequence], findings: Findings
) -> None:
    section = session.run.recipe.handoff
    chip = _chip(session, bundle)
    rehearsal = enforce(chip) if chip else nullcontext()
    found = compare_tokens(
        reference, bundle.build(), golden, confidence=section.confidence, candidate_context=lambda: rehearsal
    )
    if isinstance(rehearsal, Rehearsal):
        _report_fallbacks(session, rehearsal)
    where = f"on the CPU by the rules of {chip}" if chip else "on the CPU"
    source = f"{found.sequences} golden sequences of the fp32 reference, {found.tokens} tokens, teacher-forced {where}"

    def figure(value: float, unit: str, low: float | None = None, high: float | None = None) -> Figure:
        return Figure.measured(value, unit, source, rehearsed=chip is not None, low=low, high=high)

    findings.add(
        "tokens",
        f"{bundle.format}: mean KL",
        _within(found, section.max_mean_kl),
        figure(found.mean_kl, "nats/token", found.kl_low, found.kl_high),
        _limit(section.max_mean_kl, "nats/token", "max_mean_kl"),
        f"KL(fp32 || {bundle.format}), interval at {section.confidence:.0%} over sequences; largest {found.max_kl:.3g}",
    )
    findings.add(
        "tokens",
        f"{bundle.format}: top-1 agreement",
        "pass" if found.top1_agreement >= section.min_top1_agreement else "fail",
        figure(100 * found.top1_agreement, "%"),
        _limit(100 * section.min_top1_agreement, "%", "min_top1_agreement"),
        f"of the first choices that differ, {found.near_ties} are near-ties of the reference, {found.flips} are not; "
        f"{found.router_flips} of {found.router_choices} router choices differ",
    )
    findings.figures |= {
        f"{bundle.format}.max_kl": figure(found.max_kl, "nats"),
        f"{bundle.format}.near_ties": figure(found.near_ties, "tokens"),
        f"{bundle.format}.flips": figure(found.flips, "tokens"),
        f"{bundle.format}.mean_abs_dlogp": figure(found.mean_abs_dlogp, "nats/token"),
    }


def _check_engine(session: Session, target: Bundle, answers: Answers, findings: Findings) -> None:
    """What the engine says it sampled from, against the bundle's model on the CPU: the chip's share of the gap."""
    sequences = _sequences(session, answers)
    temperature = session.run.recipe.rl.temperature
    expected = completion_log_probabilities(target.build(), sequences, temperature)
    said = torch.tensor([value for group in answers[: len(sequences)] for value in group[0].logprobs]).double()
    gap = (said - expected).abs().mean().item()
    source = f"{len(sequences)} answers of the engine on pool {session.target}, {len(said)} tokens"
    findings.add(
        "engine",
        f"{target.format}: mean |Δlogp|, engine against emulator",
        "pass" if gap <= LIMIT else "fail",
        Figure.measured(gap, "nats/token", source, rehearsed=session.target.rehearsed),
        Figure(value=LIMIT, unit="nats/token", kind="declared", source=LIMIT_SOURCE),
        "log-probabilities of the engine's own tokens, against the same bundle on the CPU, without caches",
    )


def _check_accuracy(session: Session, target: Bundle, expected: Answers, answers: Answers, findings: Findings) -> None:
    section = session.run.recipe.handoff
    found = compare_answers(_correct(session, expected), _correct(session, answers), section.confidence)
    source = (
        f"{found.problems} held-out problems, {SAMPLES_PER_PROBLEM} answers each at temperature "
        f"{session.run.recipe.rl.temperature:g}, the same random numbers on both sides"
    )

    def figure(value: float, unit: str, pool: Pool, low: float | None = None, high: float | None = None) -> Figure:
        return Figure.measured(100 * value, unit, source, rehearsed=pool.rehearsed, low=low, high=high)

    findings.add(
        "task",
        f"{target.format}: accuracy, target minus reference",
        found.verdict(section.max_accuracy_drop),
        figure(found.difference, "points", session.target, 100 * found.low, 100 * found.high),
        _limit(-100 * section.max_accuracy_drop, "points", "max_accuracy_drop"),
        f"right only by the reference {found.only_reference}, only by the target {found.only_candidate}, of "
        f"{found.answers}; passes if the interval (Newcombe's method 10, {section.confidence:.0%}) is above the limit. "
        f"An equally good target passes with {found.power(section.max_accuracy_drop):.0%}; "
        f"{found.problems_for(0.8, section.max_accuracy_drop)} problems would give 80%",
    )
    findings.figures["accuracy.reference"] = figure(found.reference, "%", session.source)
    findings.figures["accuracy.target"] = figure(found.candidate, "%", session.target)


def _correct(session: Session, answers: Answers) -> list[list[bool]]:
    reward = get_reward(session.task.reward)
    return [
        [reward.score(problem, session.tokenizer.decode(one.tokens)).accuracy == 1.0 for one in group]
        for problem, group in zip(session.problems, answers, strict=True)
    ]


def _refuses(check: Check) -> bool:
    return check.outcome == "fail" or (check.outcome == "unknown" and check.layer in MUST_BE_KNOWN)


def _within(found: TokenParity, limit: float) -> Outcome:
    """A mean KL passes if its whole interval is below the limit."""
    if found.kl_high <= limit:
        return "pass"
    return "fail" if found.mean_kl > limit else "unknown"


def _limit(value: float, unit: str, key: str) -> Figure:
    return Figure(value=value, unit=unit, kind="declared", source=f"recipe, [handoff] {key}")


def _report_fallbacks(session: Session, rehearsal: Rehearsal) -> None:
    if names := rehearsal.tally.names("fallback"):
        why = f"on {session.target.chip} these operators run on the host's CPU"
        session.run.event(NAME, "fallback", what=", ".join(names), why=why)


def _refusal(run: RunFolder, record: HandoffRecord) -> str:
    lines = ["the hand-off is refused; no bundle is sealed."]
    for check in record.checks:
        if not _refuses(check):
            continue
        shown = "not shown to be within" if check.outcome == "unknown" else "outside"
        found = f"{check.figure} is {shown} the limit {check.limit}; " if check.figure and check.limit else ""
        lines.append(f"  {check.name}: {found}{check.detail}")
    if record.culprit:
        lines.append(f"The fault is in {record.culprit}{f', operator {record.operator}' if record.operator else ''}.")
    lines.append(f"All checks are in {run.path / 'parity.json'}. Another format or more training may pass:")
    lines.append("change [handoff], [rl] or [sft] in the recipe and use a new run folder.")
    return "\n".join(lines)
