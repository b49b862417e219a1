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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial

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
from isthmus.parity import engine as engine_parity
from isthmus.parity import gate, twins
from isthmus.parity.capture import CaptureOptions, capture
from isthmus.parity.coverage import check_coverage
from isthmus.parity.lint import lint_config
from isthmus.parity.manifest import write_manifest
from isthmus.parity.paired import compare_answers
from isthmus.parity.seal import Lineage, write_seal
from isthmus.parity.tokens import GoldenSequence, compare_tokens
from isthmus.parity.verify import Limits, Target, verify_bundle, write_verdict
from isthmus.pools import Pool, get_pool
from isthmus.progress import Watch
from isthmus.recipe.schema import HandoffSection
from isthmus.records import Check, HandoffRecord, ParityVerdict, PlanRecord, RlRecord
from isthmus.rewards import get_reward
from isthmus.run import Figure, RunFolder
from isthmus.trainer.checkpoint import load_model_state

NAME = "handoff"
REFERENCE, PLAIN = "fp32", "bf16"
SAMPLES_PER_PROBLEM = 2
ENGINE_ARITHMETIC = "fp32"
"""Of the local engine."""
SECTION = "recipe, [handoff]"

Answers = list[list[Completion]]


def execute(run: RunFolder, watch: Watch) -> HandoffRecord:
    """Write the bundles, check them against the fp32 reference, and seal them. Raises GateRefused if one refuses."""
    started = time.time()
    crossing = Crossing.of(run)
    run.event(NAME, "start", pool=crossing.target.name, source_pool=crossing.source.name)
    (run.path / "parity.json").unlink(missing_ok=True)
    engines, examination = Engines(crossing), Examination(crossing, watch)
    with reference_bundle(crossing) as reference:
        written = Writer(crossing, engines, watch).write_all(reference)
        target = written[crossing.section.format].bundle
        if examination.can_run(target):
            watch.say(f"  {len(crossing.problems)} held-out problems, answered by the reference and by the target")
            expected, found = engines.answer_both(reference, target)
            golden = crossing.golden_sequences(expected)
            for one in written.values():
                examination.verify(one, golden)
            model = reference.build()
            for one in written.values():
                examination.compare_tokens(model, one.bundle, golden)
            examination.compare_engine(model, target, found)
            examination.compare_accuracy(target, expected, found)
        examination.write_events()
    record = conclude(crossing, written, examination, started)
    if record.verdict == "refuse":
        watch.console.print(render(record))
        raise GateRefused(refusal(run, record))
    watch.say(f"  sealed {record.bundles[record.format]} as {record.seal_id}")
    return record


def render(record: HandoffRecord) -> Table:
    """The parity table."""
    title = f"parity of {record.format} for pool {record.target_pool}: {record.verdict}"
    return gate.check_table(title, map(gate.shown, record.checks))


def refusal(run: RunFolder, record: HandoffRecord) -> str:
    """Why nothing is sealed, and what may help."""
    opening = "the hand-off is refused; no bundle is sealed."
    return (
        f"{gate.refusal(opening, record.checks, record.culprit, record.operator)}\n"
        f"All checks are in {run.path / 'parity.json'}. Another format or more training may pass, and more problems\n"
        "or golden prompts where nothing was shown: change [handoff], [rl] or [sft] and use a new run folder."
    )


@dataclass(frozen=True)
class Crossing:
    """What crosses, and between which pools: `source` trained the weights, `target` is to serve them."""

    run: RunFolder
    rl: RlRecord
    task: Task
    tokenizer: Tokenizer
    problems: list[Problem]
    state: dict[str, Tensor]
    source: Pool
    target: Pool

    @classmethod
    def of(cls, run: RunFolder) -> Crossing:
        plan = run.require_record("plan", PlanRecord, "plan")
        rl = run.require_record("rl", RlRecord, "rl")
        source, target = get_pool(run.recipe, rl.train_pool), get_pool(run.recipe, plan.pool_of("serve"))
        task = load_task(run.recipe)
        problems = task.heldout[: run.recipe.handoff.heldout_problems]
        state = load_model_state(run.path / rl.checkpoint, rl.checkpoint_sha256)
        return cls(run, rl, task, run_tokenizer(run, task), problems, state, source, target)

    @property
    def section(self) -> HandoffSection:
        return self.run.recipe.handoff

    @cached_property
    def prompts(self) -> list[list[int]]:
        return [prompt_ids(self.tokenizer, problem) for problem in self.problems]

    def chip_of(self, bundle: Bundle) -> str | None:
        """The chip whose rules the bundle has to keep here."""
        of_target = bundle.format == self.section.format
        return self.target.chip if of_target and self.target.rehearsed else None

    def golden_sequences(self, answers: Answers) -> list[GoldenSequence]:
        """The first answer to each of the first golden prompts."""
        count = self.section.golden_prompts
        pairs = zip(self.prompts[:count], answers[:count], strict=True)
        return [GoldenSequence(prompt, group[0].tokens) for prompt, group in pairs]


@contextmanager
def reference_bundle(crossing: Crossing) -> Iterator[Bundle]:
    """The trained weights in fp32, as long as they are needed."""
    folder = crossing.run.path / NAME / REFERENCE
    try:
        write_bundle(folder, REFERENCE, crossing.state, crossing.run.recipe.model, crossing.tokenizer)
        yield read_bundle(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Engines:
    """Let engines on the pools of a crossing answer prompts."""

    def __init__(self, crossing: Crossing):
        self.crossing = crossing

    def answer_both(self, reference: Bundle, target: Bundle) -> tuple[Answers, Answers]:
        """Both at once, each with half of the threads of its pool: here the pools share one machine."""
        crossing = self.crossing
        with ThreadPoolExecutor(max_workers=2) as workers:
            first = workers.submit(self.answer, reference, crossing.source, crossing.prompts)
            second = workers.submit(self.answer, target, crossing.target, crossing.prompts)
            return first.result(), second.result()

    def answer(self, bundle: Bundle, pool: Pool, prompts: list[list[int]]) -> Answers:
        run = self.crossing.run
        sampling = Sampling(run.recipe.rl.max_new_tokens, run.recipe.rl.temperature, n=SAMPLES_PER_PROBLEM)
        seeds = [seeded("handoff", run.recipe.seed, str(prompt)).getrandbits(48) for prompt in prompts]
        log = run.path / NAME / f"engine-{bundle.format}.log"
        rehearse = pool.chip if pool.rehearsed else None
        with LocalEngine(bundle.folder, threads=max(1, pool.threads // 2), rehearse=rehearse, log=log) as engine:
            report_kernels(partial(run.event, NAME), engine.kernels)
            return engine.generate(prompts, sampling, seeds)


@dataclass(frozen=True)
class Written:
    """A bundle as read back from the disk, and the trained weights after balancing, the same where there is none."""

    bundle: Bundle
    balanced: dict[str, Tensor]


class Writer:
    """Writes the bundles of a crossing, calibrated and balanced where the recipe asks for it or the format needs it."""

    def __init__(self, crossing: Crossing, engines: Engines, watch: Watch):
        self.crossing, self.engines, self.watch = crossing, engines, watch

    def write_all(self, reference: Bundle) -> dict[str, Written]:
        """The plain bundle and the target's, by format."""
        prepared = {PLAIN: (self.crossing.state, None)} | {self.crossing.section.format: self._prepare(reference)}
        return {name: self._write(name, *one) for name, one in prepared.items()}

    def _prepare(self, reference: Bundle) -> tuple[dict[str, Tensor], Calibration | None]:
        """Calibrate on the reference's answers to training problems, and balance, if that is wanted."""
        crossing, section, run = self.crossing, self.crossing.section, self.crossing.run
        by_inputs = section.rounding == "gptq"
        if not (get_format(section.format).needs_calibration or section.balance or by_inputs):
            return crossing.state, None
        problems = crossing.task.train[: section.calibration_prompts]
        prompts = [prompt_ids(crossing.tokenizer, problem) for problem in problems]
        self.watch.say(f"  {len(prompts)} training problems, answered by the reference, calibrate {section.format}")
        answers = self.engines.answer(reference, crossing.source, prompts)
        texts = [[*prompt, *one.tokens] for prompt, group in zip(prompts, answers, strict=True) for one in group]
        balanced, calibration = crossing.state, calibrate(reference.build(), texts, gram=by_inputs)
        if section.balance:
            balanced = balance(crossing.state, run.recipe.model, calibration)
            float_format = get_format(REFERENCE)
            stored = float_format.export(balanced, run.recipe.model)
            calibration = calibrate(float_format.build(run.recipe.model, stored), texts, gram=by_inputs)
        for path in calibration.unseen:
            run.event(NAME, "fallback", what=f"the calibration of {path}", why="no token of the text reached it")
        return balanced, calibration

    def _write(self, name: str, balanced: dict[str, Tensor], calibration: Calibration | None) -> Written:
        run = self.crossing.run
        folder = run.path / "bundle" / name

        def refine(stored: dict[str, Tensor]) -> None:
            if calibration is not None and self.crossing.section.rounding == "gptq":
                round_with_calibration(stored, balanced, calibration)

        tokenizer = self.crossing.tokenizer
        write_bundle(folder, name, balanced, run.recipe.model, tokenizer, calibration=calibration, refine=refine)
        bundle = read_bundle(folder)
        self.watch.say(f"  wrote {folder.relative_to(run.path)}: {len(bundle.tensors)} tensors")
        return Written(bundle, balanced)


class Examination:
    """Puts the checks to the bundles. `checks` are in their order; `found` and `verdicts` go by format."""

    def __init__(self, crossing: Crossing, watch: Watch):
        self.crossing, self.watch = crossing, watch
        self.checks: list[Check] = []
        self.figures: dict[str, Figure] = {}
        self.verdicts: dict[str, ParityVerdict] = {}
        self.found: dict[str, list[Check]] = {}

    def can_run(self, target: Bundle) -> bool:
        """Whether nothing known of the target's chip forbids this bundle; if something does, it is a finding."""
        checks = lint_config(target.folder, self.crossing.run.recipe.model, self.crossing.chip_of(target))
        refusing = list(filter(gate.refuses, checks))
        self._add(target, refusing)
        return not refusing

    def verify(self, written: Written, golden: list[GoldenSequence]) -> None:
        """Follow every weight into the bundle, capture golden inputs, and verify it as its target would."""
        crossing, section, bundle = self.crossing, self.crossing.section, written.bundle
        folder, balanced = bundle.folder, written.balanced
        moved = {} if balanced is crossing.state else {"balance": lambda name, _tensor: balanced[name]}
        rounded = [name.removesuffix(".weight") for name, one in bundle.tensors.items() if one.dtype == torch.int8]
        compensated = rounded if section.rounding == "gptq" else ()
        entries, checks = check_coverage(crossing.state, folder, **moved, compensated=compensated)
        write_golden(folder, make_golden(bundle, crossing.prompts, crossing.tokenizer.eos_id))
        texts = [[*one.prompt, *one.completion] for one in golden]
        options = CaptureOptions(max_bytes=section.capture_mb << 20, origin="held-out problems of the run")
        capture(folder, balanced, texts, options)
        write_manifest(folder, coverage=entries, architecture=crossing.run.recipe.model)
        limits = Limits(section.max_chip_kl, section.max_mean_kl, section.confidence, SECTION)
        target = Target(rehearse=crossing.chip_of(bundle))
        with self.watch.count(f"verify {bundle.format}", 1) as counter:
            verdict = verify_bundle(folder, target=target, limits=limits, before=checks, tell=counter.tell)
        write_verdict(folder, verdict)
        self.verdicts[bundle.format] = verdict
        self._add(bundle, verdict.checks)

    def compare_tokens(self, reference: Model, bundle: Bundle, golden: list[GoldenSequence]) -> None:
        """Golden sequences, fp32 reference against the bundle."""
        section, chip = self.crossing.section, self.crossing.chip_of(bundle)
        rehearsal = enforce(chip) if chip else nullcontext()
        found = compare_tokens(
            reference, bundle.build(), golden, confidence=section.confidence, candidate_context=lambda: rehearsal
        )
        if isinstance(rehearsal, Rehearsal) and (names := rehearsal.tally.names("fallback")):
            why = f"on {self.crossing.target.chip} these operators run on the host's CPU"
            self.crossing.run.event(NAME, "fallback", what=", ".join(names), why=why)
        rehearsed, where = chip is not None, f"on the CPU by the rules of {chip}" if chip else "on the CPU"
        asked = f"{found.sequences} golden sequences of the fp32 reference, {found.tokens} tokens"
        source, interval = f"{asked}, teacher-forced {where}", f"interval at {section.confidence:.0%} over sequences"
        detail = f"KL(fp32 || {bundle.format}), {interval}; largest {found.max_kl:.3g}"
        limit = gate.declared(section.max_mean_kl, "nats/token", f"{SECTION} max_mean_kl")
        least, of_least = section.min_top1_agreement, f"{SECTION} min_top1_agreement"
        kl = gate.check_kl("mean KL", found, limit, source, detail, rehearsed=rehearsed, confidence=section.confidence)
        top1 = gate.check_top1("top-1 agreement", found, least, of_least, source, rehearsed=rehearsed)
        self._add(bundle, [kl, top1])
        beside = {
            "max_kl": (found.max_kl, "nats"),
            "near_ties": (found.near_ties, "tokens"),
            "flips": (found.flips, "tokens"),
            "mean_abs_dlogp": (found.mean_abs_dlogp, "nats/token"),
        }
        for name, (value, unit) in beside.items():
            if (figure := gate.finite(value, unit, source, rehearsed=rehearsed)) is not None:
                self.figures[f"{bundle.format}.{name}"] = figure

    def compare_engine(self, reference: Model, target: Bundle, answers: Answers) -> None:
        """What the engine says it sampled from, against the bundle's model on the CPU, its healthy twins and the fp32
        reference. Of tokens that the engine itself drew, those that it favours are a little too many: its distance
        comes out larger than a twin's by about half the mean square of the gap."""
        crossing, sequences = self.crossing, self.crossing.golden_sequences(answers)
        kept = twins.distinct(sequences)
        said = torch.tensor([value for place in kept for value in answers[place][0].logprobs]).double()
        sequences, temperature = [sequences[place] for place in kept], crossing.run.recipe.rl.temperature
        found = engine_parity.compare_logprobs(
            said,
            twins.score_tokens(reference, sequences, temperature=temperature).logprobs[0],
            twins.Calibration.of(target.build, ENGINE_ARITHMETIC, sequences, temperature=temperature),
            crossing.section.confidence,
        )
        budget = gate.declared(crossing.section.max_chip_kl, "nats/token", f"{SECTION} max_chip_kl")
        server, how = f"pool {crossing.target}, without caches on the other side", "answers of the engine on"
        self._add(
            target,
            engine_parity.check_engine(found, server, budget, how, rehearsed=crossing.target.rehearsed),
        )

    def compare_accuracy(self, target: Bundle, expected: Answers, answers: Answers) -> None:
        """Held-out problems, answered by the reference and by the target."""
        crossing, section = self.crossing, self.crossing.section
        found = compare_answers(self._correct(expected), self._correct(answers), section.confidence)
        source = (
            f"{found.problems} held-out problems, {SAMPLES_PER_PROBLEM} answers each at temperature "
            f"{crossing.run.recipe.rl.temperature:g}, the same random numbers on both sides"
        )
        margin = section.max_accuracy_drop

        def share(value: float, unit: str, pool: Pool, interval: tuple[float, float] | None = None) -> Figure:
            low, high = interval or (None, None)
            return Figure.measured(100 * value, unit, source, rehearsed=pool.rehearsed, low=low, high=high)

        check = Check(
            layer="task",
            name="accuracy, target minus reference",
            outcome=found.verdict(margin),
            figure=share(found.difference, "points", crossing.target, (100 * found.low, 100 * found.high)),
            limit=gate.declared(-100 * margin, "points", f"{SECTION} max_accuracy_drop"),
            detail=f"right only by the reference {found.only_reference}, only by the target {found.only_candidate}, of "
            f"{found.answers}; passes if the interval (Newcombe's method 10, {section.confidence:.0%}) is above the "
            f"limit. An equally good target passes with {found.power(margin):.0%}; "
            f"{found.problems_for(0.8, margin)} problems would give 80%",
        )
        self._add(target, [check])
        self.figures["accuracy.reference"] = share(found.reference, "%", crossing.source)
        self.figures["accuracy.target"] = share(found.candidate, "%", crossing.target)

    def write_events(self) -> None:
        """Every finding, as an event of the run."""
        for check in self.checks:
            self.crossing.run.event(NAME, "check", name=check.name, outcome=check.outcome, detail=check.detail)

    def _correct(self, answers: Answers) -> list[list[bool]]:
        reward, tokenizer = get_reward(self.crossing.task.reward), self.crossing.tokenizer
        return [
            [reward.score(problem, tokenizer.decode(one.tokens)).accuracy == 1.0 for one in group]
            for problem, group in zip(self.crossing.problems, answers, strict=True)
        ]

    def refuse(self, bundle: Bundle) -> None:
        """Leave in a bundle all that was found on it, if some of it refuses: `isthmus verify` then seals it no more."""
        checks, said = self.found.get(bundle.format, []), self.verdicts.get(bundle.format)
        if any(map(gate.refuses, checks)):
            target = Target(rehearse=self.crossing.chip_of(bundle))
            rows = said.ledger if said else ()
            started = said.started if said else time.time()
            rehearsed = target.rehearse is not None
            verdict = gate.judge(checks, target=str(target), rehearsed=rehearsed, ledger=rows, started=started)
            write_verdict(bundle.folder, verdict)

    def _add(self, bundle: Bundle, checks: list[Check]) -> None:
        self.found.setdefault(bundle.format, []).extend(checks)
        self.checks += [check.model_copy(update={"name": f"{bundle.format}: {check.name}"}) for check in checks]


def conclude(
    crossing: Crossing, written: dict[str, Written], examination: Examination, started: float
) -> HandoffRecord:
    """Write the record; if no check refuses, the bundles are sealed first."""
    run, verdicts, chosen = crossing.run, examination.verdicts, crossing.section.format
    refused = next((verdict for verdict in verdicts.values() if verdict.verdict == "refuse"), None)
    record = HandoffRecord(
        recipe_sha256=run.recipe.digest(),
        started=started,
        ended=time.time(),
        source_pool=crossing.source.name,
        target_pool=crossing.target.name,
        format=chosen,
        verdict="pass" if gate.shows_enough(examination.checks) else "refuse",
        checks=examination.checks,
        bundles={name: str(one.bundle.folder.relative_to(run.path)) for name, one in written.items()},
        seal_id=None,
        figures=examination.figures,
        ledger=verdicts[chosen].ledger if chosen in verdicts else [],
        culprit=refused.culprit if refused else None,
        operator=refused.operator if refused else None,
    )
    if record.verdict == "pass":
        lineage = Lineage(
            checkpoint_sha256=crossing.rl.checkpoint_sha256,
            recipe_sha256=record.recipe_sha256,
            source_pool=record.source_pool,
            target_pool=record.target_pool,
        )
        seal = partial(write_seal, verdict="pass", checks=record.checks, lineage=lineage)
        key = crossing.section.sign_key
        seals = {name: seal(one.bundle.folder, sign_key=key).id for name, one in written.items()}
        record = record.model_copy(update={"seal_id": seals[chosen]})
    else:
        for one in written.values():
            examination.refuse(one.bundle)
    run.write_record("parity", record)
    run.event(NAME, "verdict", verdict=record.verdict, seal_id=record.seal_id)
    run.event(NAME, "end", seconds=round(record.seconds, 3))
    return record
