"""What each pool of a recipe is fit for: probes, pilots of this run's own work, and a verdict with its evidence.

A pool that is here is measured. A rehearsed pool is judged by the tables of its chip's software; what only the chip
could show (stability, links, speed) stays unknown, so a rehearsal never ends in `fit`.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from torch import Tensor

from isthmus.chips import Chip, check_available, device_of, get_chip
from isthmus.chips.rehearse import Profile, RehearsalRefused, enforce, profile_of
from isthmus.data.corpus import prompt_ids, run_tokenizer, sft_documents
from isthmus.data.tasks import load_task
from isthmus.engines import Engine, EngineError, Sampling
from isthmus.engines.local import LocalEngine
from isthmus.engines.local.runner import Trial
from isthmus.formats import get_format
from isthmus.formats.bundle import write_bundle
from isthmus.formats.wire import digest
from isthmus.formats.wire import pack as pack_wire
from isthmus.model.model import Model
from isthmus.pools import Pool, get_pool, placed_pools
from isthmus.probes.compute import compute_threads, matmul_tflops, memory_gbs, time_each
from isthmus.probes.determinism import Trials, known_answer, same_twice
from isthmus.probes.operators import Coverage, coverage, trace_operators
from isthmus.probes.statistics import median_of, zero_failure_bound
from isthmus.progress import Watch
from isthmus.records import Aspect, Evidence, Outcome, QualifyRecord, Use, Verdict
from isthmus.run import Figure, RunFolder
from isthmus.trainer.batch import Batch, pack
from isthmus.trainer.optimizer import Optimizer
from isthmus.trainer.step import accumulate_gradients, target_logprobs, train_step

NAME = "qualify"
PILOT_TOKENS = 48
PILOT_SAMPLES = (16, 256)
SAME_TWICE_SAMPLES = 3
KNOWN_ANSWER_TIMES = 20
COLLECTIVES = (("all_reduce", "sum"), ("all_gather", None), ("broadcast", None))


def execute(run: RunFolder, watch: Watch, *, again: bool = False) -> list[QualifyRecord]:
    """Qualify every pool that the recipe places. A pool that has its record is left alone, unless `again`."""
    check_available(run.recipe)
    records = []
    for pool in placed_pools(run.recipe):
        stored = None if again else run.read_record(f"{NAME}/{pool.name}", QualifyRecord)
        records.append(stored or qualify_pool(run, pool.name, watch))
    return records


def qualify_pool(run: RunFolder, pool_name: str, watch: Watch) -> QualifyRecord:
    """Probe one pool, judge what was found, and write `qualify/<pool>.json`."""
    started = time.time()
    pool = get_pool(run.recipe, pool_name)
    run.event(NAME, "start", pool=pool.name)
    watch.say(f"  examining {escape(str(pool))}")
    with compute_threads(pool.threads):
        examination = Examination(run, pool, Workload(run, torch.device(device_of(pool))))
        if pool.rehearsed:
            examination.rehearse()
        else:
            examination.measure()
    record = examination.record(started)
    run.write_record(f"{NAME}/{pool.name}", record)
    run.event(NAME, "end", pool=pool.name, seconds=round(record.seconds, 3), verdict=record.verdict)
    return record


def judge(evidence: Sequence[Evidence]) -> Verdict:
    """The verdict that the evidence allows: serving is judged first, and a failure weighs more than what is unknown."""
    serving = {item.outcome for item in evidence if item.needed_for in ("serving", "both")}
    if "fail" in serving:
        return "unfit"
    if "unknown" in serving or not serving:
        return "not enough evidence"
    return "fit" if all(item.outcome == "pass" for item in evidence) else "serve-only"


class Workload:
    """This run's own work in small: its model as it starts, its data, and what each stage does at one step."""

    def __init__(self, run: RunFolder, device: torch.device):
        self.run, self.recipe, self.device = run, run.recipe, device
        self.task = load_task(run.recipe)
        self.tokenizer = run_tokenizer(run, self.task)
        self.model = Model(run.recipe.model).initialise(run.recipe.seed).to(device)
        self.optimizer = Optimizer(self.model, run.recipe.sft.optimizer, run.recipe.sft.steps)

    def batch(self, step: int) -> Batch:
        documents = sft_documents(self.run, self.task, self.tokenizer, step)
        return pack(documents).to(self.device)

    def lengths(self) -> tuple[list[int], list[int]]:
        """Tokens of the prompts and of the completions in one step's worked examples."""
        documents = sft_documents(self.run, self.task, self.tokenizer, 0)
        return [d.prompt_length for d in documents], [len(d.tokens) - d.prompt_length for d in documents]

    def prompts(self, count: int) -> list[list[int]]:
        """`count` prompts of the task, over again if it has fewer."""
        problems = self.task.train
        return [prompt_ids(self.tokenizer, problems[index % len(problems)]) for index in range(count)]

    def sft_step(self, step: int, batch: Batch) -> float:
        """One step of supervised fine-tuning, as `train` does it. Returns the loss."""
        losses, _ = train_step(self.model, self.optimizer, batch, self.recipe.sft, step)
        return losses.loss

    def gradients(self, batch: Batch) -> list[Tensor]:
        """The gradients of one batch, without an update."""
        accumulate_gradients(self.model, self.optimizer, batch, self.recipe.sft)
        return [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]

    def learn(self, batch: Batch) -> None:
        """What reinforcement learning differentiates on a batch of samples, but for the choice of the loss."""
        self.optimizer.zero_grad()
        logprobs, _ = target_logprobs(self.model, batch, self.recipe.rl.temperature)
        logprobs.mean().backward()

    @torch.inference_mode()
    def generate(self, rules: AbstractContextManager[object] | None = None) -> Tensor:
        """Prefill and two more tokens for a few prompts by the engine's forward pass. Returns all logits [N, V].

        `rules` are in force while the chip would work.
        """
        prompts = [prompt for prompt in self.prompts(4) for _ in range(2)]
        trial = Trial(self.model, len(prompts), max(map(len, prompts)) + 2)
        with rules or nullcontext():
            logits = [trial.prefill(prompts)]
            for _ in range(2):
                logits.append(trial.decode(logits[-1].argmax(-1)))
        return torch.cat(logits)


@dataclass
class Examination:
    """One pool under examination: its evidence and figures as they come in."""

    run: RunFolder
    pool: Pool
    workload: Workload
    evidence: list[Evidence] = field(default_factory=list)
    figures: dict[str, Figure] = field(default_factory=dict)

    def measure(self) -> None:
        """All that can be found out about a pool that is here."""
        self._rates()
        self._known_answer()
        self._same_twice()
        self._links()
        self._pilot_of_training()
        self._pace_of_learning()
        self._generation(None)
        self._weight_formats(None)
        self._pilot_of_the_engine()

    def rehearse(self) -> None:
        """All that can be found out about a pool that is not here."""
        profile = profile_of(self.pool.chip)
        batch = self.workload.batch(0)
        serving = trace_operators(self.workload.generate)
        training = trace_operators(lambda: (self.workload.sft_step(0, batch), self.workload.learn(batch)))
        self._operators("operators of serving", "serving", coverage(serving, profile))
        self._operators("operators of training", "training", coverage(training, profile))
        self._collectives(profile)
        self._only_the_chip_can_tell()
        self._generation(enforce(self.pool.chip))
        self._weight_formats(profile)
        self._pilot_of_the_engine()

    def record(self, started: float) -> QualifyRecord:
        verdict = judge(self.evidence)
        doubts = [f"{item.name}: {item.detail}" for item in self.evidence if item.outcome != "pass"]
        return QualifyRecord(
            recipe_sha256=self.run.recipe.digest(),
            started=started,
            ended=time.time(),
            pool=self.pool.name,
            chip=self.pool.chip,
            present=not self.pool.rehearsed,
            rehearsed=self.pool.rehearsed,
            verdict=verdict,
            title=f"{self.pool}: {verdict}",
            reasons=doubts or [f"all {len(self.evidence)} findings pass"],
            evidence=self.evidence,
            figures=self.figures,
        )

    def _rates(self) -> None:
        section, device = self.run.recipe.qualify, self.workload.device
        size, threads = section.matmul_size, f", {self.pool.threads} threads" if device.type == "cpu" else ""
        matmul = matmul_tflops(device, size, section.repeats)
        copy = memory_gbs(device, section.memory_mib, section.repeats)
        rates = {
            "matmul_tflops": self._median(matmul, "TFLOPS", f"fp32 matmul of {size} x {size}{threads}"),
            "memory_gbs": self._median(copy, "GB/s", f"copy of {section.memory_mib} MiB, read plus written{threads}"),
        }
        self.figures.update(rates)
        self._add(
            "rates", "compute", "both", "pass", "measured; there is no limit to compare with", section.repeats, rates
        )

    def _known_answer(self) -> None:
        section = self.run.recipe.qualify
        trials = known_answer(self.workload.device, section.matmul_size, section.repeats, KNOWN_ANSWER_TIMES)
        what = f"products of {section.matmul_size} x {section.matmul_size} integer matrices, exact by construction"
        self._trials("known answer", "both", trials, what)

    def _same_twice(self) -> None:
        batch = self.workload.batch(0)
        trials = same_twice(lambda: self.workload.gradients(batch), SAME_TWICE_SAMPLES)
        self._trials(
            "same result twice", "training", trials, "repeated backward passes, all gradients compared bit by bit"
        )

    def _trials(self, name: str, needed_for: Use, trials: Trials, what: str) -> None:
        confidence = self.run.recipe.qualify.confidence
        if trials.failures:
            self._add(
                name,
                "stability",
                needed_for,
                "fail",
                f"{trials.failures} of {trials.samples} {what}, differ",
                trials.samples,
            )
            return
        bound = zero_failure_bound(trials.samples, confidence)
        source = f"{trials.samples} trials without a failure; {confidence:.0%} upper bound 1 - (1 - c)^(1/n)"
        figures = {"failure_rate": self._measured(0.0, "% per trial", source, low=0.0, high=100 * bound)}
        detail = f"{trials.samples} {what}: no failure; a rate below {bound:.2g} per trial could have stayed unseen"
        self._add(name, "stability", needed_for, "pass", detail, trials.samples, figures, confidence)

    def _links(self) -> None:
        if self.pool.count == 1:
            self._add("links", "links", "training", "pass", "one chip: there is no link to measure")
        else:
            self._add("links", "links", "training", "unknown", "the links between the chips were not measured")

    def _pilot_of_training(self) -> None:
        """A few real steps of supervised training, after one to warm up."""
        steps, work = self.run.recipe.qualify.pilot_steps, self.workload
        losses = [work.sft_step(0, work.batch(0))]
        seconds = time_each(
            lambda: losses.append(work.sft_step(len(losses), work.batch(len(losses)))), work.device, steps, warm_up=0
        )
        step = self._median(seconds, "s/step", f"pilot of supervised training, {self.pool.threads} threads")
        prompts, completions = work.lengths()
        examples = f"{len(prompts)} worked examples of this recipe"
        self.figures |= {
            "sft_step_s": step,
            "prompt_tokens": self._measured(sum(prompts) / len(prompts), "tokens", f"mean of {examples}"),
            "completion_tokens": self._measured(sum(completions) / len(completions), "tokens", f"mean of {examples}"),
            "longest_completion_tokens": self._measured(max(completions), "tokens", f"longest of {examples}"),
        }
        outcome: Outcome = "pass" if all(map(math.isfinite, losses)) else "fail"
        detail = f"{len(losses)} steps of this model on this recipe's data: loss {losses[0]:.3f} to {losses[-1]:.3f}"
        self._add("pilot of training", "software", "training", outcome, detail, len(losses), {"sft_step_s": step})

    def _pace_of_learning(self) -> None:
        """What a token costs the learner of reinforcement learning."""
        batch, threads = self.workload.batch(0), self._rl_threads
        with compute_threads(threads):
            repeats = self.run.recipe.qualify.pilot_steps
            seconds = time_each(lambda: self.workload.learn(batch), self.workload.device, repeats, warm_up=1)
        source = f"log-probabilities and gradients of {batch.num_tokens} tokens, {threads} threads"
        self.figures["learn_token_s"] = self._median([one / batch.num_tokens for one in seconds], "s/token", source)

    def _generation(self, rules: AbstractContextManager[object] | None) -> None:
        """The engine's forward pass, under the rules of the chip if it is rehearsed."""
        name = "generation under the chip's rules" if rules else "generation"
        try:
            logits = self.workload.generate(rules)
        except RehearsalRefused as refusal:
            self._add(name, "software", "serving", "fail", str(refusal))
            return
        finite = bool(torch.isfinite(logits).all())
        detail = f"prefill and decoding gave {len(logits)} rows of logits, {'all' if finite else 'not all'} finite"
        self._add(name, "software", "serving", "pass" if finite else "fail", detail, len(logits))

    def _weight_formats(self, profile: Profile | None) -> None:
        """Whether the chip computes in the formats in which the recipe would place weights on it."""
        known = self._chip.formats
        for name in self._formats():
            operators = profile.formats.get(name, ()) if profile else ()
            lacking = [operator for operator in operators if profile and profile.status(operator) != "native"]
            if known is None:
                outcome, detail = "unknown", f"whether {self._chip.name} computes in {name} is not known"
            elif name not in known or lacking:
                outcome = "fail"
                detail = (
                    f"{self._chip.name} computes in {', '.join(known)}; no kernel for: {', '.join(lacking) or name}"
                )
            else:
                outcome, detail = (
                    "pass",
                    f"computed by {', '.join(operators)}" if operators else self._chip.capabilities.source,
                )
            self._add(f"weights in {name}", "software", "serving", outcome, detail)

    def _formats(self) -> list[str]:
        """The formats of the weights that the recipe may place on this pool."""
        recipe = self.run.recipe
        placed = {"rollout": recipe.rl.rollout_format, "serve": recipe.handoff.format}
        return sorted({form for stage, form in placed.items() if self.pool.name in getattr(recipe.place, stage)})

    def _operators(self, name: str, needed_for: Use, found: Coverage) -> None:
        """Operators that fall back to the host fail training, where every step would wait for them."""
        missing, fallback, unlisted = (found.operators[status] for status in ("none", "fallback", "unknown"))
        for operator in fallback:
            self.run.event(NAME, "fallback", what=f"{operator} on {self.pool}", why="the host's CPU runs it, silently")
        bad = {"missing": missing, "on the host's CPU": fallback, "not in the table": unlisted}
        bad |= {f"with {dtype}, which the chip refuses": names for dtype, names in found.refused_dtypes.items()}
        bad |= {f"with {dtype}, with which the chip is weak": names for dtype, names in found.weak_dtypes.items()}
        failed = missing or found.refused_dtypes or (fallback and needed_for == "training")
        outcome: Outcome = "fail" if failed else "unknown" if unlisted else "pass"
        made = found.count("generic") + found.count("decomposes")
        detail = f"{found.total} operators: {found.count('native')} native, {made} made of others"
        detail += "".join(f", {len(names)} {what} ({', '.join(names)})" for what, names in bad.items() if names)
        limits = [f"{operator} ({', '.join(cautions)})" for operator, cautions in found.cautions.items()]
        detail += f"; documented limits: {', '.join(limits)}" if limits else ""
        figures = {
            "operators": self._measured(found.total, "operators", "trace of this model's own work"),
            "native_share": self._measured(100 * found.native_share, "% of calls", f"trace joined with {found.source}"),
        }
        self._add(name, "software", needed_for, outcome, detail, found.total, figures)

    def _collectives(self, profile: Profile) -> None:
        """What the chip's collective library makes of the collectives that data-parallel training in fp32 uses."""
        try:
            differences = [profile.check_collective(name, "float32", reduction) for name, reduction in COLLECTIVES]
        except RehearsalRefused as refusal:
            self._add("collective rules", "links", "training", "fail", str(refusal))
            return
        notes = [note for found in differences for note in found] + list(profile.timeouts())
        allowed = f"{', '.join(name for name, _ in COLLECTIVES)} of float32 are allowed"
        self._add("collective rules", "links", "training", "pass", "; ".join([allowed, *notes]), len(COLLECTIVES))

    def _only_the_chip_can_tell(self) -> None:
        detail = "only the chip itself can show it, and it is not here"
        links = _known(declared_link=self._chip.scaleup_gbs_uni, declared_network=self._chip.nic_gbs_uni)
        rates = _known(declared_peak=self._chip.bf16_tflops, declared_memory=self._chip.mem_bw_gbs)
        self._add("stability over time", "stability", "training", "unknown", detail)
        self._add("speed of links", "links", "training", "unknown", detail, figures=links)
        self._add("rates", "compute", "training", "unknown", detail, figures=rates)

    def _pilot_of_the_engine(self) -> None:
        """The local engine in its own process, with weights in their format: start, crossings, and two batch sizes."""
        formats = self._formats()
        if not formats:
            return
        if self.workload.device.type != "cpu":
            why = "the local engine computes on the CPU; this chip is served by " + ", ".join(
                self._chip.engines or ("none known",)
            )
            self.run.event(NAME, "skipped", what=f"engine pilot on {self.pool}", why=why)
            return
        folder = self.run.path / NAME / f"{self.pool.name}-pilot"
        try:
            paces = self._engine_paces(folder, formats[0])
        except EngineError as error:
            self._add("pilot of the engine", "software", "serving", "fail", str(error))
            return
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self.figures |= paces
        detail = f"started with weights in {formats[0]}, took new ones, and answered"
        self._add("pilot of the engine", "software", "serving", "pass", detail, len(PILOT_SAMPLES), paces)

    def _engine_paces(self, folder: Path, form: str) -> dict[str, Figure]:
        work, threads = self.workload, self._rl_threads
        state = {name: tensor.detach().cpu() for name, tensor in work.model.state_dict().items()}
        write_bundle(folder, form, state, work.recipe.model, work.tokenizer)
        engine = LocalEngine(
            folder,
            log=folder.with_suffix(".log"),
            threads=threads,
            rehearse=self.pool.chip if self.pool.rehearsed else None,
        )
        began = time.perf_counter()
        with engine:
            start = time.perf_counter() - began
            crossings = [self._cross(engine, form, state, version) for version in range(1, 4)]
            small, full = (self._generate(engine, samples) for samples in PILOT_SAMPLES)
        source = f"engine pilot in {form}, {threads} threads"
        per_step, per_token = solve_pace(small, full)
        return {
            "engine_start_s": self._measured(start, "s", source),
            "crossing_s": self._median(crossings, "s", f"{source}: export, pack, send, swap"),
            "decode_step_s": self._measured(
                per_step, "s/step", f"{source}: share of a step that does not grow with the batch"
            ),
            "decode_token_s": self._measured(per_token, "s/token", f"{source}: share that does"),
        }

    def _cross(self, engine: Engine, form: str, state: dict[str, Tensor], version: int) -> float:
        began = time.perf_counter()
        payload = pack_wire(get_format(form).export(state, self.run.recipe.model))
        engine.update(payload, version, digest(payload))
        return time.perf_counter() - began

    def _generate(self, engine: Engine, samples: int) -> tuple[int, int, float]:
        """(steps, tokens, seconds) of a batch of samples, after one to warm up."""
        prompts, recipe = self.workload.prompts(samples // 8), self.run.recipe
        room = recipe.model.max_position_embeddings - max(map(len, prompts))
        sampling = Sampling(min(PILOT_TOKENS, recipe.rl.max_new_tokens, room), n=8)
        engine.generate(prompts, sampling)
        began = time.perf_counter()
        lengths = [len(one.tokens) for group in engine.generate(prompts, sampling) for one in group]
        return max(lengths), sum(lengths), time.perf_counter() - began

    @property
    def _rl_threads(self) -> int:
        """Threads in reinforcement learning, where with stale samples another pool works at the same time."""
        return self.pool.shared_threads if self.run.recipe.rl.staleness else self.pool.threads

    @property
    def _chip(self) -> Chip:
        return get_chip(self.pool.chip)

    def _measured(
        self, value: float, unit: str, source: str, low: float | None = None, high: float | None = None
    ) -> Figure:
        return Figure.measured(value, unit, source, rehearsed=self.pool.rehearsed, low=low, high=high)

    def _median(self, samples: Sequence[float], unit: str, source: str) -> Figure:
        median = median_of(samples, self.run.recipe.qualify.confidence)
        source = f"{source}; median of {median.samples}, interval {median.confidence:.0%}"
        return self._measured(median.value, unit, source, median.low, median.high)

    def _add(
        self,
        name: str,
        aspect: Aspect,
        needed_for: Use,
        outcome: Outcome,
        detail: str,
        samples: int = 0,
        figures: dict[str, Figure] | None = None,
        confidence: float | None = None,
    ) -> None:
        self.evidence.append(
            Evidence(
                name=name,
                aspect=aspect,
                needed_for=needed_for,
                outcome=outcome,
                detail=detail,
                samples=samples,
                confidence=confidence,
                figures=figures or {},
            )
        )


def _known(**figures: Figure | None) -> dict[str, Figure]:
    return {name: figure for name, figure in figures.items() if figure is not None}


def solve_pace(small: tuple[int, int, float], full: tuple[int, int, float]) -> tuple[float, float]:
    """(seconds per step, seconds per token) from two runs, each (steps, tokens, seconds) = steps a + tokens b.

    Noise that would make one of them negative leaves it at zero and gives all the time to the other.
    """
    (s1, n1, t1), (s2, n2, t2) = small, full
    determinant = s1 * n2 - s2 * n1
    per_token = (s1 * t2 - s2 * t1) / determinant if determinant else 0.0
    per_token = min(max(per_token, 0.0), t2 / n2)
    return max((t2 - per_token * n2) / s2, 0.0), per_token


def render(record: QualifyRecord) -> RenderableType:
    """The verdict, its evidence finding by finding, and the pool's figures."""
    colour = {"pass": "green", "fail": "red", "unknown": "yellow"}
    table = Table(box=box.SIMPLE_HEAD, title=escape(record.title), title_justify="left", title_style="bold")
    for title in ("finding", "needed for", "outcome", "detail"):
        table.add_column(title, overflow="fold")
    for item in record.evidence:
        table.add_row(item.name, item.needed_for, f"[{colour[item.outcome]}]{item.outcome}[/]", escape(item.detail))
    numbers = [f"{name.removesuffix('_s').replace('_', ' ')} {figure}" for name, figure in record.figures.items()]
    return Group(table, Text("\n".join(f"   {number}" for number in numbers), style="dim"), Text())
