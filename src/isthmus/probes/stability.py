"""Stability of a pool: work whose result is known, the same work again and on all ranks, cold starts, and a soak.

Nothing that is found here proves a pool reliable. Each passing finding says what it could not have seen.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from isthmus.chips import stability_rule
from isthmus.chips.rehearse.faults import FaultKind
from isthmus.data.corpus import run_tokenizer
from isthmus.errors import IsthmusError
from isthmus.forecast.count import count_parameters, training_flops
from isthmus.forecast.device import pool_device
from isthmus.launch.beats import Beat
from isthmus.launch.crew import Called, Crew
from isthmus.probes.compute import compute_threads, matmul_tflops
from isthmus.probes.contract import Probe, Setting
from isthmus.probes.findings import finding, without_ranks
from isthmus.probes.judge.failure_rate import figures_of_soak
from isthmus.probes.judge.rates import median_of, zero_failure_bound
from isthmus.probes.judge.soak_judgement import Problem, Trend, problems_of, trends_of
from isthmus.probes.portable import training
from isthmus.probes.recipes_own import owners_of, raised_by_recipe, stopped_by_recipe
from isthmus.probes.workload import first_batch
from isthmus.records import Evidence, Use
from isthmus.run import Figure, RunFolder
from isthmus.tasks import load_tasks

KNOWN_ANSWERS = "isthmus.probes.portable.known_answers:products"
CHECKSUM = "isthmus.probes.portable.known_answers:checksum"
STEPS = "isthmus.probes.portable.training:steps"
PACE = "isthmus.probes.portable.training:pace"
SOAK = "isthmus.probes.soak_rank:soak"
READY = "isthmus.probes.soak_rank:ready"

DEADLINE_S = 300.0
READY_S = 120.0
"""For loading the trainer on all ranks, before a sign of life can be expected."""
COLD_STARTS = 3
LOOKS = 5
"""How often ranks are looked at before one counts as slow."""
ROUND_STEPS, LEAST_ROUNDS = 4, 2
"""Steps of a round of the soak, and the rounds that it has however long they take."""
LOAD_S = 6.0
"""For the ranks of a soak to load the trainer and to make the data."""
TRAINING_SHARE = 0.5
"""Of the rate of matrix products, what a step of training reaches. Assumed, for a price."""
PRICE_REPEATS = 3
SAY_EVERY_S = 10.0
DISK_BYTES_PER_S = 100e6
"""A save and a load may go this slowly before they count as hung. Assumed: a network disk."""
STATE_BYTES = 16
"""Per parameter: weight, gradient and two moments in fp32."""
_HALVES = {"bf16": "bfloat16", "fp16": "float16"}
_finding = partial(finding, aspect="stability")


def known_answers(crew: Crew, setting: Setting) -> list[Evidence]:
    """Products of integers, compared with their exact results in each dtype that the chip is known to compute in."""
    section, known = setting.recipe.qualify, setting.chip.capabilities.dtypes or ()
    dtypes = ["float32", *(name for short, name in _HALVES.items() if short in known)]
    arguments = {"size": section.matmul_size, "repeats": section.repeats, "seed": setting.recipe.seed, "dtypes": dtypes}
    what = f"products of {section.matmul_size} x {section.matmul_size} integers in {', '.join(dtypes)}"
    return [_trials(crew, setting, "known answers", KNOWN_ANSWERS, arguments, what, "exact results", "both")]


def checksums(crew: Crew, setting: Setting) -> list[Evidence]:
    """Products of real numbers with row and column sums, which equal chips must compute alike."""
    section = setting.recipe.qualify
    arguments = {"size": section.matmul_size, "repeats": section.repeats, "seed": setting.recipe.seed}
    what = f"products of {section.matmul_size} x {section.matmul_size} reals, checked by sums of rows and columns"
    return [_trials(crew, setting, "checksum matmul", CHECKSUM, arguments, what, "sums within rounding", "both")]


def same_result(crew: Crew, setting: Setting) -> list[Evidence]:
    """A small training run, twice on each rank, on all ranks alike, and beside one on this machine's CPU in fp32."""
    arguments: dict[str, Any] = {"steps": 8, "hidden": 64, "layers": 2, "seed": setting.recipe.seed}
    alone = SimpleNamespace(rank=0, world=1, device=torch.device("cpu"), beat=lambda _section, _step=0: None)
    reference = training.steps(alone, **arguments, repeats=1)["losses"]
    arguments |= {"reference": reference, "tolerance": stability_rule("loss-difference").value}
    what = "training steps, computed again and on every rank, all gradients and parameters compared bit by bit"
    return [_trials(crew, setting, "same result twice", STEPS, arguments, what, "equal bits and losses", "training")]


def _trials(
    crew: Crew,
    setting: Setting,
    name: str,
    function: str,
    arguments: dict[str, Any],
    what: str,
    expected: str,
    needed_for: Use,
) -> Evidence:
    """Call a portable function that counts trials and failures, and say what no failure could have left unseen."""
    called = crew.call(function, arguments, deadline_s=DEADLINE_S, stall_s=setting.stall_s)
    keep = partial(_keep, crew, setting, called, name, function, arguments, expected)
    if not called.ok:
        return _broken(name, called, needed_for, keep())
    failing = [rank for rank, value in enumerate(called.values) if value["failed"]]
    samples = sum(value["trials"] for value in called.values)
    if failing:
        detail = "; ".join(called.values[rank]["detail"] for rank in failing[:3])
        return _failing(name, needed_for, detail, failing, crew.world, keep(), samples)
    confidence = setting.recipe.qualify.confidence
    bound = zero_failure_bound(samples, confidence)
    source = f"{samples} trials without a failure; {confidence:.0%} upper bound 1 - (1 - c)^(1/n)"
    rate = setting.measured(0.0, "% per trial", source, low=0.0, high=100 * bound)
    figures = {f"{name.replace(' ', '_')}_failure_rate": rate}
    detail = f"{samples} {what}: no failure; a rate below {bound:.2g} per trial could have stayed unseen"
    return _finding(name, "pass", detail, samples, figures, confidence=confidence, needed_for=needed_for)


def stragglers(crew: Crew, setting: Setting) -> list[Evidence]:
    """Whether a rank is slower than its peers at the same work. While one seems so, all are looked at again."""
    rule = stability_rule("straggler")
    on_cpu = crew.device == "cpu"
    share = 0.02 if on_cpu else 0.5
    arguments = {"size": 128 if on_cpu else 2048, "slices": 60, "share": share, "limit": rule.value}
    seconds: list[list[float]] = [[] for _ in range(crew.world)]
    ratios: list[float] = []
    slow, looks = list(range(crew.world)), 0
    keep: Callable[[], str] | None = None
    while slow and looks < LOOKS:
        looks += 1
        called = crew.call(PACE, arguments, deadline_s=DEADLINE_S, stall_s=setting.stall_s)
        keep = partial(_keep, crew, setting, called, "stragglers", PACE, arguments, "ranks that are equally fast")
        if not called.ok:
            return [_broken("stragglers", called, "training", keep())]
        for rank, value in enumerate(called.values):
            seconds[rank] += value["seconds"]
        ratios = training.ratios_to_peers([training.quantile(one, share) for one in seconds])
        slow = [rank for rank, ratio in enumerate(ratios) if ratio > rule.value]
    shared = "the fiftieth part that was fastest, without the time in which a rank had no processor"
    own = shared if on_cpu else "the median"
    samples, worst = len(seconds[0]), max(ratios)
    source = f"slowest rank against the median of its peers, {own} of {samples} pieces of equal work"
    figures = {"straggler_ratio": setting.measured(worst, "x", source)}
    if slow:
        times = ", ".join(f"rank {rank} takes {ratios[rank]:.3g}" for rank in slow)
        detail = f"{times} times as long as its peers, in {looks} looks; above {rule.value:.3g} is slow ({rule.source})"
        failure = keep() if keep is not None else None
        return [_failing("stragglers", "training", detail, slow, crew.world, failure, samples, figures)]
    detail = (
        f"the slowest rank takes {worst:.2f} times as long as its peers; below {rule.value:.3g} is not seen as slow"
    )
    return [_finding("stragglers", "pass", detail, samples, figures, needed_for="training")]


def cold_starts(crew: Crew, setting: Setting, starts: int = COLD_STARTS) -> list[Evidence]:
    """End all ranks and start them, with their communicator, several times."""
    seconds = []
    for number in range(starts):
        crew.stop()
        began = time.perf_counter()
        called = crew.start()
        if not called.ok:
            return [_broken(f"cold start {number + 1} of {starts}", called, "both", None)]
        seconds.append(time.perf_counter() - began)
    slowest = max(value for start in crew.starts[-starts:] for value in start)
    confidence = setting.recipe.qualify.confidence
    median = median_of(seconds, confidence)
    source = f"ranks and communicator, median of {starts} cold starts, interval {median.confidence:.0%}"
    figures = {
        "cold_start_s": setting.measured(median.value, "s", source, median.low, median.high),
        "cold_communicator_s": setting.measured(slowest, "s", f"slowest rank of {starts} cold starts"),
    }
    bound = zero_failure_bound(starts, confidence)
    detail = f"{starts} of {starts} cold starts in {max(seconds):.2g} s at most; a rate below {bound:.2g} per start"
    detail += " could have stayed unseen"
    return [_finding("cold starts", "pass", detail, starts, figures, confidence=confidence, needed_for="both")]


def soak(crew: Crew, setting: Setting, round_steps: int = ROUND_STEPS) -> list[Evidence]:
    """Real steps of this run's training for as long as the recipe says, with known answers, repeats and verified saves.

    A trend that seems to matter is looked at again, for twice as long. Steps that look wrong and that a trusted chip
    repeats are the recipe's own: a recipe whose numbers end there is soaked with the steps before, over and over.
    Raises IsthmusError for a recipe whose examples the model cannot take.
    """
    seconds = setting.recipe.qualify.soak_s
    run = RunFolder.open(setting.root)
    run_tokenizer(run, list(load_tasks(setting.recipe).values()))
    ready = crew.call(READY, deadline_s=READY_S)
    if not ready.ok:
        return [_broken("soak", ready, "training", None)]
    look = partial(_look, crew, setting, round_steps)
    first = look(seconds)
    if first.broken is not None:
        return [_broken_soak(setting, first.broken, first.hours)]
    if first.stopped == 0 and not first.problems:
        return [_not_soaked(setting, first)]
    if first.stopped is not None and not first.problems:
        first = look(seconds, horizon=first.stopped, before=first)
        if first.broken is not None:
            return [_broken_soak(setting, first.broken, first.hours)]
    if first.problems or first.doubts or not any(trend.matters for found in first.trends.values() for trend in found):
        return [_soak_finding(crew, setting, first)]
    second = look(2.0 * seconds, horizon=first.horizon, before=first)
    if second.broken is not None:
        return [_broken_soak(setting, second.broken, second.hours)]
    second.problems += _confirmed(first.trends, second.trends)
    return [_soak_finding(crew, setting, second)]


@dataclass
class _Look:
    """One soak: what the ranks saw, whose the problems are, the trends, and the chip-hours with those before.

    `broken` is a call that not all ranks ended. `stopped` is the step at which the recipe's own numbers end, `horizon`
    the steps after which training was started anew. `own` says what the recipe does by itself, on any chip.
    """

    hours: float
    broken: Called | None = None
    seen: Sequence[dict[str, Any]] = ()
    problems: list[Problem] = field(default_factory=list)
    doubts: list[Problem] = field(default_factory=list)
    trends: dict[str, list[Trend]] = field(default_factory=dict)
    stopped: int | None = None
    horizon: int | None = None
    own: list[str] = field(default_factory=list)


def _look(
    crew: Crew,
    setting: Setting,
    round_steps: int,
    seconds: float,
    horizon: int | None = None,
    before: _Look | None = None,
) -> _Look:
    called = _soak(crew, setting, seconds, round_steps, horizon)
    hours = _chip_hours(setting, called) + (before.hours if before else 0.0)
    if not called.ok:
        if (words := raised_by_recipe(called)) is not None:
            raise IsthmusError(words)
        return _Look(hours, called)
    seen = called.values
    owners = owners_of(crew, setting, seen, problems_of(seen), deadline_s=4.0 * seconds + DEADLINE_S, horizon=horizon)
    return _Look(
        hours=hours,
        seen=seen,
        problems=owners.problems,
        doubts=owners.open,
        trends=_trends(crew.device, seen),
        stopped=stopped_by_recipe(owners, seen),
        horizon=horizon,
        own=list(dict.fromkeys([*(before.own if before else ()), *filter(None, [str(owners)])])),
    )


def _not_soaked(setting: Setting, look: _Look) -> Evidence:
    """A recipe whose own first step is not finite soaks no pool."""
    detail = f"{' '.join(look.own)} So nothing could be soaked: change the recipe"
    return _finding("soak", "unknown", detail, 0, _rates(setting, look.hours, 0, None), needed_for="training")


def _soak(crew: Crew, setting: Setting, seconds: float, round_steps: int, horizon: int | None) -> Called:
    folder = setting.folder / "soak"
    arguments = {
        "run": str(setting.root),
        "pool": setting.pool.name,
        "folder": str(folder),
        "seconds": seconds,
        "round_steps": round_steps,
        "least_rounds": LEAST_ROUNDS,
        "planted": [str(fault) for fault in crew.faults],
        "horizon": horizon,
    }
    storage_s = _storage_s(setting)
    patience = setting.stall_s + storage_s
    deadline = 4.0 * max(seconds, _least_soak_s(setting)) + DEADLINE_S + 4.0 * storage_s
    try:
        return crew.call(SOAK, arguments, deadline_s=deadline, stall_s=patience, watch=_progress(setting, seconds))
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # What ranks leave that did not come to their end.


def _storage_s(setting: Setting) -> float:
    """What a save and a load may take."""
    return STATE_BYTES * count_parameters(setting.recipe.model).total / DISK_BYTES_PER_S


def _broken_soak(setting: Setting, called: Called, hours: float) -> Evidence:
    """A soak that not all ranks ended: one failure in so many chip-hours."""
    broken = _broken("soak", called, "training", None)
    figures = _rates(setting, hours, 1, None)
    return broken.model_copy(update={"figures": figures, "confidence": setting.recipe.qualify.confidence})


def _chip_hours(setting: Setting, called: Called) -> float:
    """What a call soaked. A rehearsal counts for nothing: the chip was not there."""
    chips = min(setting.pool.count, len(called.replies))
    return 0.0 if setting.pool.rehearsed else called.seconds * chips / 3600.0


def _progress(setting: Setting, seconds: float) -> Callable[[list[Beat]], None]:
    """Says now and then how far the soak is."""
    began = said = time.monotonic()

    def watch(beats: list[Beat]) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= SAY_EVERY_S:
            said = now
            slowest = min(beats, key=lambda beat: beat.beats)
            setting.say(f"soak: {now - began:.0f} of about {seconds:.0f} s, {slowest.section}, step {slowest.step}")

    return watch


def _trends(device: str, seen: Sequence[dict[str, Any]]) -> dict[str, list[Trend]]:
    """Trends of step time and memory. On a CPU that others use too, a step is timed by what it computed."""
    return {
        "step time": trends_of([one["cpu_s" if device == "cpu" else "step_s"] for one in seen]),
        "memory of the process": trends_of([one["resident"] for one in seen]),
        "memory of the chip": trends_of([one["on_device"] for one in seen]),
    }


def _confirmed(first: dict[str, list[Trend]], second: dict[str, list[Trend]]) -> list[Problem]:
    """What grew in both looks, on the same rank."""
    found = []
    for name, trends in second.items():
        before = {trend.rank for trend in first[name] if trend.matters}
        ranks = tuple(trend.rank for trend in trends if trend.matters and trend.rank in before)
        if ranks:
            worst = max((trend for trend in trends if trend.rank in ranks), key=lambda trend: trend.slope.value)
            share = worst.slope.value / worst.level
            found.append(Problem(f"the {name} grows by {share:.2%} of its median per step, in two looks", ranks))
    return found


def _soak_finding(crew: Crew, setting: Setting, look: _Look) -> Evidence:
    seen, confidence = look.seen, setting.recipe.qualify.confidence
    first = seen[0]
    steps, saves = len(first["losses"]), first["saves_s"]
    save_s = setting.measured(statistics.median(saves), "s", f"median of {len(saves)} saves") if saves else None
    figures = _rates(setting, look.hours, int(bool(look.problems)), save_s)
    figures |= _slopes(setting, look.trends)
    if save_s is not None:
        figures["save_s"] = save_s
    wrong = look.problems or look.doubts
    detail = f"in {steps} real steps: " + "; ".join(problem.what for problem in wrong)
    detail += f". {' '.join(look.own)}" if look.own else ""
    if look.problems:
        ranks = sorted({rank for problem in look.problems for rank in problem.ranks})
        kept = next((one["kept"] for one in seen if one["kept"]), None)
        return _failing("soak", "training", detail, ranks, crew.world, kept, steps, figures, confidence)
    if look.doubts:
        return _finding("soak", "unknown", detail, steps, figures, confidence=confidence, needed_for="training")
    step_bound = zero_failure_bound(steps * crew.world, confidence)
    laps = f", from the start again after every {look.horizon}" if look.horizon else ""
    parts = [
        f"{steps} real steps on {crew.world} ranks {first['layout']}{laps}, "
        f"{first['repeats']} of them computed twice with equal bits, "
        f"{sum(one['known'] for one in seen)} known answers, {len(saves)} saves read back and equal; loss "
        f"{first['losses'][0]:.3f} to {first['losses'][-1]:.3f}.",
        *look.own,
        _power(setting, figures, step_bound, look.trends),
    ]
    return _finding("soak", "pass", " ".join(parts), steps, figures, confidence=confidence, needed_for="training")


def _power(setting: Setting, figures: dict[str, Figure], step_bound: float, trends: dict[str, list[Trend]]) -> str:
    """What a soak without a failure could not have seen."""
    parts = [f"A rate below {step_bound:.2g} per step and rank could have stayed unseen"]
    unseen = figures.get("unseen_rate_per_chip_hour")
    if unseen is not None and unseen.value is not None:
        needed = figures["chip_hours_to_show_target"].value
        assert needed is not None
        parts.append(
            f"and in {figures['soaked_chip_hours'].value:.2g} chip-hours one below {unseen.value:.2g} per chip-hour: "
            f"to show the target rate takes {needed:,.0f} chip-hours"
        )
    else:
        parts.append("and a rehearsal soaks no chip")
    if not trends["step time"]:
        parts.append("; too short for trends")
    return " ".join(parts).replace(" ;", ";") + "."


def _rates(setting: Setting, hours: float, failures: int, save_s: Figure | None) -> dict[str, Figure]:
    """The chip's failure rate. What failed in a rehearsal was not the chip."""
    failures = 0 if setting.pool.rehearsed else failures
    soaked = setting.measured(hours, "chip-hours", f"soak on {setting.pool}")
    confidence = setting.recipe.qualify.confidence
    return figures_of_soak(setting.pool.chip, soaked, failures, confidence, setting.pool.count, save_s)


def _slopes(setting: Setting, trends: dict[str, list[Trend]]) -> dict[str, Figure]:
    """The steepest trend of all ranks, per step."""
    names = {"step time": ("step_time_slope", "s/step"), "memory of the process": ("memory_slope", "bytes/step")}
    names["memory of the chip"] = ("chip_memory_slope", "bytes/step")
    figures = {}
    for name, (key, unit) in names.items():
        if trends[name]:
            slope = max((trend.slope for trend in trends[name]), key=lambda slope: slope.value)
            source = f"Theil-Sen over {slope.samples} values, interval {slope.confidence:.1%}, the steepest rank"
            figures[key] = setting.measured(slope.value, unit, source, slope.low, slope.high)
    return figures


def _keep(
    crew: Crew, setting: Setting, called: Called, name: str, function: str, arguments: dict[str, Any], expected: str
) -> str:
    observed = called.describe() or "; ".join(value["detail"] for value in called.values if value["failed"])
    return setting.keep_failure(
        crew,
        called,
        probe=name,
        title=f"{name} on {setting.pool}: {observed}"[:200],
        function=function,
        arguments=arguments,
        expected=expected,
        observed=observed,
    )


def _broken(name: str, called: Called, needed_for: Use, failure: str | None) -> Evidence:
    """A call that not all ranks answered. What the ranks at fault did is said, and not what became of the others."""
    ranks = called.culprits()
    at_fault = Called([reply for reply in called.replies if reply.rank in ranks], called.seconds)
    return _failing(name, needed_for, at_fault.describe(), ranks, len(called.replies), failure)


def _failing(
    name: str,
    needed_for: Use,
    detail: str,
    ranks: Sequence[int],
    world: int,
    failure: str | None,
    samples: int = 0,
    figures: dict[str, Figure] | None = None,
    confidence: float | None = None,
) -> Evidence:
    """A failing finding. Where fewer than half of the ranks are at fault, the pool is fit without them."""
    few = 0 < len(ranks) < world / 2
    limits = [without_ranks(ranks, f"{name}: {detail}"[:200], needed_for)] if few else []
    return _finding(name, "fail", detail, samples, figures, limits, ranks, failure, confidence, needed_for=needed_for)


_ANY_CALL: tuple[FaultKind, ...] = ("crash", "hang", "out-of-memory")


def _quick(setting: Setting) -> float:
    return 1.0


def _price_of_soak(setting: Setting) -> float:
    """Steps for as long as the recipe says, or the least rounds where those of its model take longer."""
    return max(setting.recipe.qualify.soak_s, _least_soak_s(setting)) + LOAD_S


def _least_soak_s(setting: Setting) -> float:
    """Of the least rounds: their steps, one of them twice more, and a save. 0 where nobody knows the chip's rate."""
    rate = matrix_rate(setting)
    if rate is None:
        return 0.0
    batch = first_batch(RunFolder.open(setting.root))
    step_s = batch.num_tokens * training_flops(setting.recipe.model, batch.mean_context) / (TRAINING_SHARE * rate)
    return LEAST_ROUNDS * ((ROUND_STEPS + 2) * step_s + _storage_s(setting))


def matrix_rate(setting: Setting) -> float | None:
    """Operations per second of all ranks together: on a CPU as it is, on a chip as its peak in bf16 is published."""
    if setting.device != "cpu":
        peak = pool_device(setting.pool.chip).bf16_tflops
        return None if peak is None else 1e12 * peak * setting.pool.ranks
    with compute_threads(setting.pool.threads):
        size = setting.recipe.qualify.matmul_size
        return 1e12 * statistics.median(matmul_tflops(torch.device("cpu"), size, PRICE_REPEATS))


def _price_of_starts(setting: Setting) -> float:
    return COLD_STARTS * (0.5 if setting.device == "cpu" else 8.0)


_SILENT: tuple[FaultKind, ...] = ("flipped-bit", "small-error", "nan")
PROBES: tuple[Probe, ...] = (
    Probe("known answers", "stability", "both", (*_ANY_CALL, *_SILENT, "dtype-swap"), _quick, known_answers),
    Probe("checksum matmul", "stability", "both", (*_ANY_CALL, *_SILENT, "dtype-swap"), _quick, checksums),
    Probe("same result twice", "stability", "training", (*_ANY_CALL, *_SILENT), _quick, same_result),
    Probe("stragglers", "stability", "training", (*_ANY_CALL, "slow-rank"), _quick, stragglers, min_ranks=2),
    Probe("cold starts", "stability", "both", _ANY_CALL, _price_of_starts, cold_starts),
    Probe("soak", "stability", "training", (*_ANY_CALL, *_SILENT, "corrupted-save"), _price_of_soak, soak),
)
