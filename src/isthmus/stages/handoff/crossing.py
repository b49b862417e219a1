"""What crosses in a hand-off, and who works on it: engines that answer, a writer of bundles, an examination.

The hand-off of a run and that of a published checkpoint share them.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from isthmus.chips.rehearse.dispatch import Rehearsal, enforce
from isthmus.data.corpus import completion_of, prompt_ids, run_tokenizer
from isthmus.data.tokenizer import Tokenizer
from isthmus.engines import Completion, Sampling
from isthmus.engines.local import LocalEngine, report_kernels
from isthmus.formats import get_format
from isthmus.formats.calibration.balance import find_balance
from isthmus.formats.calibration.calibrate import calibrate
from isthmus.formats.files.basis import Conversion
from isthmus.formats.files.bundle import Bundle, TokenizerFiles, read_bundle, write_bundle
from isthmus.formats.files.golden import make_golden, write_golden
from isthmus.formats.parts.ranges import Calibration
from isthmus.formats.parts.stochastic import StochasticState
from isthmus.model.model import Model
from isthmus.parity import engine as engine_parity
from isthmus.parity import gate, twins
from isthmus.parity.capture import SYNTHETIC, CaptureOptions, capture
from isthmus.parity.coverage import check_coverage
from isthmus.parity.lint import lint_config
from isthmus.parity.manifest import write_manifest
from isthmus.parity.paired import compare_answers
from isthmus.parity.tokens import GoldenSequence, compare_tokens, distinct
from isthmus.parity.undone import check_updates, measure_updates, start_of
from isthmus.parity.verify import Limits, Target, verify_bundle, write_verdict
from isthmus.pools import Pool, get_pool
from isthmus.progress import Watch
from isthmus.recipe.architecture import ModelSection
from isthmus.recipe.lineage import line
from isthmus.recipe.practice import answering
from isthmus.recipe.schema import HandoffSection
from isthmus.records import Check, ParityVerdict, PlanRecord, read_weights
from isthmus.run import Figure, RunFolder
from isthmus.tasks import Mixture, Problem, interleaved, load_tasks, seeded, tasks_of
from isthmus.trainer.checkpoint import load_model_state

NAME = "handoff"
REFERENCE, PLAIN, STOCHASTIC = "fp32", "bf16", "bf16-stochastic"
SAMPLES_PER_PROBLEM = 2
ENGINE_ARITHMETIC = "fp32"
"""Of the local engine."""
SECTION = "recipe, [handoff]"
MEAN_KL = "mean KL"

Answers = list[list[Completion]]


@dataclass(frozen=True)
class Crossing:
    """What crosses, and between which pools: `source` trained the weights, `target` is to serve them.

    `state` may read a tensor whenever it is asked for it. Bundles lie in `folder` by format; the reference and the logs
    of engines in `work`. `asked` tells of the golden prompts where they come from, and `limits_from` of the limits.
    Without `tasks` nothing is answered. `on` is where the target bundle's model runs; `tell` records events.
    """

    folder: Path
    work: Path
    architecture: ModelSection
    state: Mapping[str, Tensor]
    tokenizer: Tokenizer
    section: HandoffSection
    limits_from: str
    asked: str
    tasks: Mixture | None
    problems: Sequence[Problem]
    sampling: Sampling
    seed: int
    source: Pool
    target: Pool
    on: Target
    tell: Callable[..., None]

    @classmethod
    def of(cls, run: RunFolder) -> Crossing:
        plan = run.require_record("plan", PlanRecord, "plan")
        trained = read_weights(run, run.recipe.handed_off.name)
        source, target = get_pool(run.recipe, trained.pool), get_pool(run.recipe, plan.pool_of("serve"))
        (most_tokens, temperature), handed_off = answering(run.recipe), run.recipe.handed_off
        every = load_tasks(run.recipe)
        tasks, model = tasks_of(run.recipe, handed_off, every), line(run.recipe.step, handed_off.name)[0].model
        return cls(
            folder=run.path / "bundle",
            work=run.path / NAME,
            architecture=run.recipe.architecture_of(run.recipe.handed_off),
            state=load_model_state(run.path / trained.checkpoint, trained.checkpoint_sha256),
            tokenizer=run_tokenizer(run, list(every.values()), model),
            section=run.recipe.handoff,
            limits_from=SECTION,
            asked="held-out problems of the run",
            tasks=tasks,
            problems=interleaved(tasks.heldout, run.recipe.handoff.heldout_problems),
            sampling=Sampling(most_tokens, temperature, n=SAMPLES_PER_PROBLEM),
            seed=run.recipe.seed,
            source=source,
            target=target,
            on=Target(rehearse=target.chip if target.rehearsed else None),
            tell=partial(run.event, NAME),
        )

    @cached_property
    def prompts(self) -> list[list[int]]:
        return [prompt_ids(self.tokenizer, problem) for problem in self.problems]

    @cached_property
    def trained(self) -> Model:
        """The trained weights as a model in fp32, whole in memory from the first time on."""
        plain = get_format(REFERENCE)
        return plain.build(self.architecture, plain.export(dict(self.state), self.architecture))

    @property
    def plain_format(self) -> str:
        """The format of the bundle beside the target's."""
        return "fp32" if self.section.export == "fp32" else PLAIN

    def target_of(self, bundle: Bundle) -> Target:
        """Where a bundle has to be verified: one that is not the target's, on the CPU without further rules."""
        return self.on if bundle.format == self.section.format else Target()

    def golden_sequences(self, answers: Answers) -> list[GoldenSequence]:
        """The first answer to each of the first golden prompts."""
        count = self.section.golden_prompts
        pairs = zip(self.prompts[:count], answers[:count], strict=True)
        return [GoldenSequence(prompt, group[0].tokens) for prompt, group in pairs]


@contextmanager
def reference_bundle(crossing: Crossing, files: TokenizerFiles | None = None) -> Iterator[Bundle]:
    """The trained weights in fp32, as long as they are needed; with other `files` than the tokenizer's own."""
    folder = crossing.work / REFERENCE
    try:
        write_bundle(folder, REFERENCE, crossing.state, crossing.architecture, files or crossing.tokenizer)
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
        crossing = self.crossing
        seeds = [seeded("handoff", crossing.seed, str(prompt)).getrandbits(48) for prompt in prompts]
        log = crossing.work / f"engine-{bundle.format}.log"
        rehearse = pool.chip if pool.rehearsed else None
        with LocalEngine(bundle.folder, threads=max(1, pool.threads // 2), rehearse=rehearse, log=log) as engine:
            report_kernels(crossing.tell, engine.kernels)
            return engine.generate(prompts, crossing.sampling, seeds)


@dataclass(frozen=True)
class Written:
    """A bundle as read back from the disk, and what was made of the trained weights.

    `stochastic` says that floats were rounded at random.
    """

    bundle: Bundle
    made: Conversion
    stochastic: bool = False


class Writer:
    """Writes the bundles of a crossing, calibrated and balanced where the recipe asks for it or the format needs it."""

    def __init__(self, crossing: Crossing, engines: Engines, watch: Watch):
        self.crossing, self.engines, self.watch = crossing, engines, watch

    def write_all(self, reference: Bundle) -> dict[str, Written]:
        """The plain bundle and the target's, by format."""
        crossing = self.crossing
        plain: dict[str, tuple[Conversion, Calibration | None]] = {crossing.plain_format: (Conversion(), None)}
        prepared = plain | {crossing.section.format: self._prepare(reference)}
        return {name: self._write(name, *one) for name, one in prepared.items()}

    def _prepare(self, reference: Bundle) -> tuple[Conversion, Calibration | None]:
        """Calibrate on the reference's answers to training problems, and balance, if that is wanted."""
        crossing, section = self.crossing, self.crossing.section
        by_inputs = section.rounding == "gptq"
        if not (get_format(section.format).needs_calibration or section.balance or by_inputs):
            return Conversion(), None
        assert crossing.tasks is not None, "a run has tasks"
        trained = {name: task.train for name, task in crossing.tasks.tasks.items()}
        problems = interleaved(trained, section.calibration_prompts)
        prompts = [prompt_ids(crossing.tokenizer, problem) for problem in problems]
        self.watch.say(f"  {len(prompts)} training problems, answered by the reference, calibrate {section.format}")
        answers = self.engines.answer(reference, crossing.source, prompts)
        texts = [[*prompt, *one.tokens] for prompt, group in zip(prompts, answers, strict=True) for one in group]
        calibration = calibrate(reference.build(), texts, gram=by_inputs)
        for path in calibration.unseen:
            crossing.tell("fallback", what=f"the calibration of {path}", why="no token of the text reached it")
        if not section.balance:
            return Conversion(), calibration
        balance = find_balance(crossing.state, crossing.architecture, calibration)
        return Conversion(balance), balance.calibration(calibration)

    def _write(self, name: str, made: Conversion, calibration: Calibration | None) -> Written:
        crossing, section = self.crossing, self.crossing.section
        folder, stochastic = crossing.folder / name, name == PLAIN and section.export == STOCHASTIC
        state = made.balance.state(crossing.state)

        def refine(stored: dict[str, Tensor]) -> None:
            if calibration is not None and section.rounding == "gptq":
                made.round(stored, state, calibration)

        write_bundle(
            folder,
            name,
            StochasticState(state, crossing.seed) if stochastic else state,
            crossing.architecture,
            crossing.tokenizer,
            calibration=calibration,
            refine=refine,
            beside=made.files,
        )
        bundle = read_bundle(folder)
        self.watch.say(f"  wrote {folder.parent.name}/{name}: {len(bundle.tensors)} tensors")
        return Written(bundle, made, stochastic)


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
        chip = self.crossing.target_of(target).rehearse
        checks = lint_config(target.folder, self.crossing.architecture, chip)
        refusing = list(filter(gate.refuses, checks))
        self._add(target, refusing)
        return not refusing

    def verify(self, written: Written, golden: list[GoldenSequence], prompts: list[list[int]] | None = None) -> None:
        """Follow every weight into the bundle, write golden answers to `prompts`, or else to the problems, capture
        golden inputs, and verify the bundle as its target would."""
        crossing, section, bundle = self.crossing, self.crossing.section, written.bundle
        folder, made = bundle.folder, written.made
        entries, checks = check_coverage(
            crossing.state,
            folder,
            balance=made.balance.apply,
            compensated=made.inputs,
            stochastic=written.stochastic,
        )
        chosen = crossing.prompts if prompts is None else prompts
        write_golden(folder, make_golden(bundle, chosen, crossing.tokenizer.ends))
        texts = [[*one.prompt, *one.completion] for one in golden]
        target = crossing.target_of(bundle)
        options = CaptureOptions(
            max_bytes=section.capture_mb << 20,
            arithmetics=(target.dtype,),
            origin=crossing.asked,
            synthetic=crossing.asked == SYNTHETIC,
        )
        capture(folder, made.balance.state(crossing.state), texts, options)
        write_manifest(folder, coverage=entries, architecture=crossing.architecture)
        limits = Limits(section.max_chip_kl, section.max_mean_kl, section.confidence, crossing.limits_from)
        with self.watch.count(f"verify {bundle.format}", 1) as counter:
            verdict = verify_bundle(folder, target=target, limits=limits, before=checks, tell=counter.tell)
        write_verdict(folder, verdict)
        self.verdicts[bundle.format] = verdict
        self._add(bundle, verdict.checks)

    def compare_tokens(self, bundle: Bundle, golden: list[GoldenSequence]) -> None:
        """Golden sequences, fp32 reference against the bundle."""
        section, chip = self.crossing.section, self.crossing.target_of(bundle).rehearse
        rehearsal = enforce(chip) if chip else nullcontext()
        found = compare_tokens(
            self.crossing.trained,
            bundle.build(),
            golden,
            confidence=section.confidence,
            candidate_context=lambda: rehearsal,
        )
        if isinstance(rehearsal, Rehearsal) and (names := rehearsal.tally.names("fallback")):
            why = f"on {self.crossing.target.chip} these operators run on the host's CPU"
            self.crossing.tell("fallback", what=", ".join(names), why=why)
        rehearsed, where = chip is not None, f"on the CPU by the rules of {chip}" if chip else "on the CPU"
        asked = f"{found.sequences} golden sequences of the fp32 reference, {found.tokens} tokens"
        source, interval = f"{asked}, teacher-forced {where}", f"interval at {section.confidence:.0%} over sequences"
        detail = f"KL(fp32 || {bundle.format}), {interval}; largest {found.max_kl:.3g}"
        limit = gate.declared(section.max_mean_kl, "nats/token", f"{self.crossing.limits_from} max_mean_kl")
        least, of_least = section.min_top1_agreement, f"{self.crossing.limits_from} min_top1_agreement"
        kl = gate.check_kl(MEAN_KL, found, limit, source, detail, rehearsed=rehearsed, confidence=section.confidence)
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

    def compare_updates(self, written: Written, start_folder: Path) -> None:
        """A bundle of floats against the checkpoint that the run started from: what training changed, and rounding
        undid. To be asked after `compare_tokens`, whose KL says what it cost."""
        bundle = written.bundle
        with start_of(start_folder, self.crossing.architecture) as start:
            found = measure_updates(start, self.crossing.state, bundle.tensors)
        kl = next(check for check in self.found[bundle.format] if check.name == MEAN_KL)
        self._add(bundle, [check_updates(found, bundle.format, kl, start_folder, stochastic=written.stochastic)])

    def compare_engine(self, target: Bundle, answers: Answers) -> None:
        """What the engine says it sampled from, against the bundle's model on the CPU, its healthy twins and the
        trained weights. Of tokens that the engine itself drew, those that it favours are a little too many: its
        distance comes out larger than a twin's by about half the mean square of the gap."""
        crossing, sequences = self.crossing, self.crossing.golden_sequences(answers)
        kept = distinct(sequences)
        said = torch.tensor([value for place in kept for value in answers[place][0].logprobs]).double()
        sequences, temperature = [sequences[place] for place in kept], crossing.sampling.temperature
        found = engine_parity.compare_logprobs(
            said,
            twins.score_tokens(crossing.trained, sequences, temperature=temperature).logprobs[0],
            twins.Calibration.of(target.build, ENGINE_ARITHMETIC, sequences, temperature=temperature),
            crossing.section.confidence,
        )
        budget = gate.declared(crossing.section.max_chip_kl, "nats/token", f"{crossing.limits_from} max_chip_kl")
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
            f"{found.problems} held-out problems, {crossing.sampling.n} answers each at temperature "
            f"{crossing.sampling.temperature:g}, the same random numbers on both sides"
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
            limit=gate.declared(-100 * margin, "points", f"{crossing.limits_from} max_accuracy_drop"),
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
            self.crossing.tell("check", name=check.name, outcome=check.outcome, detail=check.detail)

    def _correct(self, answers: Answers) -> list[list[bool]]:
        crossing, tokenizer = self.crossing, self.crossing.tokenizer
        tasks = crossing.tasks
        assert tasks is not None, "somebody answered problems"
        return [
            [tasks.of(problem).accuracy(problem, completion_of(tokenizer, one.tokens)) == 1.0 for one in group]
            for problem, group in zip(crossing.problems, answers, strict=True)
        ]

    def refuse(self, bundle: Bundle) -> None:
        """Leave in a bundle all that was found on it, if some of it refuses: `isthmus verify` then seals it no more."""
        if any(map(gate.refuses, self.found.get(bundle.format, []))):
            self.write_verdict(bundle)

    def write_verdict(self, bundle: Bundle) -> ParityVerdict:
        """Leave in a bundle the verdict on all that was found on it."""
        said, target = self.verdicts.get(bundle.format), self.crossing.target_of(bundle)
        verdict = gate.judge(
            self.found.get(bundle.format, []),
            target=str(target),
            rehearsed=target.rehearse is not None,
            ledger=said.ledger if said else (),
            started=said.started if said else time.time(),
        )
        write_verdict(bundle.folder, verdict)
        return verdict

    def _add(self, bundle: Bundle, checks: list[Check]) -> None:
        self.found.setdefault(bundle.format, []).extend(checks)
        self.checks += [check.model_copy(update={"name": f"{bundle.format}: {check.name}"}) for check in checks]
