"""Pilots: a few steps of each kind of work that a run will ask of a pool. The plan's estimate rests on their pace."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from isthmus.chips import Chip, get_chip
from isthmus.chips.rehearse import Profile, can_rehearse, profile_of
from isthmus.engines import Engine, EngineError, Sampling
from isthmus.engines.elsewhere import check_telling, open_fleet, unfit
from isthmus.engines.local import LocalEngine
from isthmus.forecast.count import count_parameters
from isthmus.formats import get_format
from isthmus.formats.files.bundle import write_bundle
from isthmus.formats.updates.wire import digest
from isthmus.formats.updates.wire import pack as pack_wire
from isthmus.launch.outside import from_outside, may_be_its_own
from isthmus.probes.compute import compute_threads, host_device_gbs, matmul_tflops, memory_gbs, time_each
from isthmus.probes.findings import Findings
from isthmus.probes.judge.thresholds import METRICS, apply_thresholds, load_thresholds
from isthmus.probes.static.weights import Placed, placed
from isthmus.probes.workload import Workload
from isthmus.recipe.practice import generating, rollout_formats
from isthmus.recipe.schema import Recipe
from isthmus.recipe.steps import RlSection
from isthmus.records import Outcome
from isthmus.run import Figure, RunFolder

T = TypeVar("T")
FLOOR_ROWS, FLOOR_MIB = 8192, 1024
"""Matrices and copies from which the published floors of `chips/thresholds.csv` hold."""
STATE_BYTES = 16
"""Per parameter: weight, gradient and two moments in fp32."""
PILOT_TOKENS = 48
PILOT_SAMPLES = (16, 256)
"""Samples of the small batch, and of the full one where the small one tells that it takes less than `PILOT_S`."""
PILOT_S = 30.0
"""Seconds that the full batch of the engine's pilot may take, and the steps of the pilots of training."""


def rates(found: Findings, work: Workload) -> None:
    """Matrix multiplication and copies of one chip, each timed alone, and held against the thresholds of its kind.

    On an accelerator they are large enough for the published floors, whatever the recipe asks at least.
    """
    section, device, pool = found.recipe.qualify, work.device, found.pool
    here = device.type == "cpu"
    size, mebibytes = section.matmul_size, section.memory_mib
    size, mebibytes = (size, mebibytes) if here else (max(size, FLOOR_ROWS), max(mebibytes, FLOOR_MIB))
    threads = f", {pool.threads} threads" if here else ""
    matmul = matmul_tflops(device, size, section.repeats)
    copy = memory_gbs(device, mebibytes, section.repeats)
    figures = {
        "matmul_tflops": found.setting.median(matmul, "TFLOPS", f"fp32 matmul of {size} x {size}{threads}"),
        "memory_gbs": found.setting.median(copy, "GB/s", f"copy of {mebibytes} MiB, read plus written{threads}"),
    }
    if not here:
        fast = matmul_tflops(device, size, section.repeats, torch.bfloat16)
        figures["matmul_bf16_tflops"] = found.setting.median(fast, "TFLOPS", f"bf16 matmul of {size} x {size}")
        host = host_device_gbs(device, mebibytes, section.repeats)
        figures["host_device_gbs"] = found.setting.median(
            host, "GB/s", f"copy of {mebibytes} MiB of pinned memory to the chip"
        )
    found.figures.update(figures)
    sizes = {name: float(mebibytes if name.endswith("_gbs") else size) for name in figures}
    found.add("rates", "compute", "both", "pass", "measured", section.repeats, figures)
    hold_against_thresholds(found, sizes)


def hold_against_thresholds(found: Findings, sizes: dict[str, float]) -> None:
    """A finding for each threshold that applies to the figures so far, and one that names those that do not, and why.

    `sizes` are the sizes of measurements by the name of their figure, counted as `thresholds.METRICS` says.
    """
    pool = found.pool
    rules = load_thresholds(found.recipe.qualify.thresholds)
    figures = {name: figure for name, figure in found.figures.items() if name in METRICS}
    applied = apply_thresholds(figures, pool.chip, rules, ranks=pool.ranks, sizes=sizes)
    found.evidence += applied.evidence
    aside = {reason: [*these] for reason, these in applied.aside.items()}
    for rule in rules:
        if rule.chip == pool.chip and rule.metric not in figures:
            aside.setdefault(f"{rule.metric} was not measured", []).append(rule)
    if aside:
        count = sum(map(len, aside.values()))
        reasons = "; ".join(f"{reason}: {', '.join(map(str, these))}" for reason, these in aside.items())
        found.add("thresholds left aside", "compute", "both", "pass", f"{count} in all. {reasons}", count)


def training(found: Findings, work: Workload) -> None:
    """A few real steps of supervised training, after one to warm up, and what a token costs the learner of RL."""
    steps = found.recipe.qualify.pilot_steps
    losses = [work.pilot_step(0)]
    seconds = time_each(lambda: losses.append(work.pilot_step(len(losses))), work.device, steps, 0, PILOT_S)
    step = found.setting.median(seconds, "s/step", f"pilot of supervised training, {found.pool.threads} threads")
    prompts, completions = work.lengths()
    examples = f"{len(prompts)} worked examples of this recipe"
    found.figures |= {
        "sft_step_s": step,
        "prompt_tokens": found.setting.measured(sum(prompts) / len(prompts), "tokens", f"mean of {examples}"),
        "completion_tokens": found.setting.measured(
            sum(completions) / len(completions), "tokens", f"mean of {examples}"
        ),
        "longest_completion_tokens": found.setting.measured(max(completions), "tokens", f"longest of {examples}"),
    }
    outcome, words = _finite_steps(work, losses)
    detail = f"{len(losses)} steps of this model on this recipe's data: loss {losses[0]:.3f} to {losses[-1]:.3f}{words}"
    found.add("pilot of training", "software", "training", outcome, detail, len(losses), {"sft_step_s": step})
    _pace_of_learning(found, work)


def _finite_steps(work: Workload, losses: list[float]) -> tuple[Outcome, str]:
    """Whether every step gave a number; what this machine's CPU cannot do better is the recipe's own."""
    if all(map(math.isfinite, losses)):
        return "pass", ""
    broken = next(step for step, loss in enumerate(losses) if not math.isfinite(loss))
    what = f"; a loss or a gradient is not finite at step {broken}"
    if work.device.type != "cpu":
        trusted = Workload(work.run, torch.device("cpu"))
        if all(math.isfinite(trusted.pilot_step(step)) for step in range(broken + 1)):
            return "fail", f"{what}, and this machine's CPU has numbers there"
    own = f"{what}, the recipe's own, since this machine's CPU has none there either"
    return ("pass", own) if broken else ("unknown", f"{own}; so nothing is known of its training: change the recipe")


def _pace_of_learning(found: Findings, work: Workload) -> None:
    batch, threads = work.batch(0), _rl_threads(found)
    with compute_threads(threads):
        seconds = time_each(lambda: work.learn(batch), work.device, found.recipe.qualify.pilot_steps, 1, PILOT_S)
    source = f"log-probabilities and gradients of {batch.num_tokens} tokens, {threads} threads"
    found.figures["learn_token_s"] = found.setting.median(
        [one / batch.num_tokens for one in seconds], "s/token", source
    )


def too_large(recipe: Recipe, chip: Chip, device: str) -> str | None:
    """Why the pilots cannot hold this model whole, as they do in one process; None if they can.

    Parameters, gradients and two moments in fp32 must fit the memory of one chip, or of this machine.
    """
    need = STATE_BYTES * count_parameters(recipe.model).total
    declared = chip.mem_gb.value * 1e9 if chip.mem_gb is not None and chip.mem_gb.value is not None else None
    room = _memory_of_this_machine() if device == "cpu" else declared
    if room is None or need <= room:
        return None
    state, memory = f"{need / 1e9:,.0f} GB", f"{room / 1e9:,.0f} GB"
    return f"the pilots hold the model whole, and its training state of {state} does not fit in {memory}"


def _memory_of_this_machine() -> float | None:
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return None


def generation(found: Findings, work: Workload, rules: AbstractContextManager[object] | None) -> None:
    """The engine's forward pass, under the rules of the chip if it is rehearsed."""
    name = "generation under the chip's rules" if rules else "generation"
    try:
        logits = work.generate(rules)
    except RuntimeError as error:  # an operator that is not there, or that the rules refuse, among them
        found.add(name, "software", "serving", "fail", str(error))
        return
    finite = bool(torch.isfinite(logits).all())
    detail = f"prefill and decoding gave {len(logits)} rows of logits, {'all' if finite else 'not all'} finite"
    found.add(name, "software", "serving", "pass" if finite else "fail", detail, len(logits))


def weight_formats(found: Findings, profile: Profile | None) -> None:
    """Whether the chip computes in the formats in which the recipe would place weights on it.

    What its tables say of dtypes holds for a chip that is here, too; which operators its software has, `profile` says.
    """
    chip = get_chip(found.pool.chip)
    tables = profile_of(chip.slug) if can_rehearse(chip.slug) else None
    for name in placed_formats(found):
        operators = profile.formats.get(name, ()) if profile else ()
        lacking = [operator for operator in operators if profile and profile.status(operator) != "native"]
        rules = placed(name, found.recipe.model, tables) if tables else Placed((), ())
        if rules.refusals:
            outcome, detail = "fail", f"{chip.name} does not compute in {name}: {'; '.join(rules.refusals)}"
        elif chip.formats is None:
            outcome, detail = "unknown", f"whether {chip.name} computes in {name} is not known"
        elif name not in chip.formats or lacking:
            outcome = "fail"
            detail = f"{chip.name} computes in {', '.join(chip.formats)}; no kernel for: {', '.join(lacking) or name}"
        else:
            outcome = "pass"
            detail = f"computed by {', '.join(operators)}" if operators else chip.capabilities.source
        detail = "; but ".join([detail, *rules.cautions])
        found.add(f"weights in {name}", "software", "serving", outcome, detail)


def placed_formats(found: Findings) -> list[str]:
    """The formats of the weights that the recipe may place on this pool."""
    recipe = found.recipe
    placed = {"rollout": rollout_formats(recipe), "serve": [recipe.handoff.format]}
    here = [forms for stage, forms in placed.items() if found.pool.name in getattr(recipe.place, stage)]
    return sorted({form for forms in here for form in forms})


def engine(found: Findings, work: Workload, run: RunFolder, folder: Path) -> None:
    """The local engine in its own process, with weights in their format: start, crossings, and two batch sizes."""
    formats = placed_formats(found)
    if not formats:
        return
    if work.device.type != "cpu":
        served_by = ", ".join(get_chip(found.pool.chip).engines or ("none known",))
        why = f"the local engine computes on the CPU; this chip is served by {served_by}"
        run.event("qualify", "skipped", what=f"engine pilot on {found.pool}", why=why)
        return
    pilot = folder.with_name(f"{folder.name}-pilot")
    try:
        paces = _undisturbed(lambda: _engine_paces(found, work, pilot, formats[0]), run)
    except EngineError as error:
        what = from_outside(str(error))
        outcome = "fail" if what is None or may_be_its_own(what) else "unknown"
        found.add("pilot of the engine", "software", "serving", outcome, str(error))
        found.disturbances += [f"the engine: {what}"] if what and outcome == "unknown" else []
        return
    finally:
        shutil.rmtree(pilot, ignore_errors=True)
    found.figures |= paces
    detail = f"started with weights in {formats[0]}, took new ones, and answered"
    found.add("pilot of the engine", "software", "serving", "pass", detail, len(PILOT_SAMPLES), paces)


def _undisturbed(pilot: Callable[[], T], run: RunFolder) -> T:
    """What a pilot finds, which is run a second time if something from outside ends its engine."""
    try:
        return pilot()
    except EngineError as error:
        what = from_outside(str(error))
        if what is None:
            raise
        run.event("qualify", "repeated", what="pilot of the engine", why=what)
        return pilot()


def elsewhere(found: Findings, work: Workload, run: RunFolder) -> None:
    """The engines of a pool that is reached by URLs: what they are, crossings, and two batch sizes.

    Raises EngineError, before anything is trained, if one of them cannot take part.
    """
    form, folder = generating(found.recipe).rollout_format, run.path / "qualify" / f"{found.pool.name}-bundle"
    state = {name: tensor.detach().cpu() for name, tensor in work.model.state_dict().items()}
    write_bundle(folder, form, state, work.recipe.model, work.tokenizer)
    lost: list[str] = []

    def tell(name: str, **facts: Any) -> None:
        run.event("qualify", name, **facts)
        lost.extend([f"{facts['what']}: {facts['why']}"] if name == "fallback" else [])

    began = time.perf_counter()
    learning = [step for step in found.recipe.step if isinstance(step, RlSection)]
    routes = any(step.loss.router_replay for step in learning)
    fleet = open_fleet(found.pool, folder, form, tell, routes=routes)
    start = time.perf_counter() - began
    source = f"{len(fleet.members)} engines of {found.pool.name}, in {form}"
    try:
        for step in learning:
            check_telling(step.name, step.loss, fleet)
        paces = _paces_of(fleet, found, work, form, start, source)
    except EngineError as error:
        raise unfit(found.pool, error, folder, routes=routes) from None
    if lost:
        raise unfit(found.pool, EngineError("; ".join(lost)), folder, routes=routes)
    found.figures |= paces
    detail = f"{', '.join(member.engine.server for member in fleet.members)}: took weights in {form}, and answered"
    found.add("pilot of the engines", "software", "serving", "pass", detail, len(PILOT_SAMPLES), paces)
    for aspect in ("stability", "links"):
        found.add(
            aspect,
            aspect,
            "training",
            "unknown",
            "engines behind URLs only generate, and the kind of their chip is the recipe's word",
        )


def _paces_of(
    engine: Engine, found: Findings, work: Workload, form: str, start: float, source: str
) -> dict[str, Figure]:
    """Seconds of crossings, and of two batch sizes."""
    state = {name: tensor.detach().cpu() for name, tensor in work.model.state_dict().items()}
    crossings = [_cross(engine, form, state, work, version) for version in range(1, 4)]
    small = _generate(engine, work, PILOT_SAMPLES[0])
    full = _generate(engine, work, full_batch(small))
    per_step, per_token = solve_pace(small, full)
    fixed, growing = f"{source}: share of a step that does not grow with the batch", f"{source}: share that does"
    return {
        "engine_start_s": found.setting.measured(start, "s", source),
        "crossing_s": found.setting.median(crossings, "s", f"{source}: export, pack, send, swap"),
        "decode_step_s": found.setting.measured(per_step, "s/step", fixed),
        "decode_token_s": found.setting.measured(per_token, "s/token", growing),
    }


def _engine_paces(found: Findings, work: Workload, folder: Path, form: str) -> dict[str, Figure]:
    threads, pool = _rl_threads(found), found.pool
    state = {name: tensor.detach().cpu() for name, tensor in work.model.state_dict().items()}
    write_bundle(folder, form, state, work.recipe.model, work.tokenizer)
    engine = LocalEngine(
        folder, log=folder.with_suffix(".log"), threads=threads, rehearse=pool.chip if pool.rehearsed else None
    )
    began = time.perf_counter()
    with engine:
        start = time.perf_counter() - began
        return _paces_of(engine, found, work, form, start, f"engine pilot in {form}, {threads} threads")


def _cross(engine: Engine, form: str, state: dict[str, Tensor], work: Workload, version: int) -> float:
    began = time.perf_counter()
    payload = pack_wire(get_format(form).export(state, work.recipe.model))
    engine.update(payload, version, digest(payload))
    return time.perf_counter() - began


def _generate(engine: Engine, work: Workload, samples: int) -> tuple[int, int, float]:
    """(steps, tokens, seconds) of a batch of samples, after one to warm up."""
    prompts, recipe = work.prompts(samples // 8), work.recipe
    room = recipe.model.max_position_embeddings - max(map(len, prompts))
    sampling = Sampling(min(PILOT_TOKENS, generating(recipe).max_new_tokens, room), n=8)
    engine.generate(prompts, sampling)
    began = time.perf_counter()
    lengths = [len(one.tokens) for group in engine.generate(prompts, sampling) for one in group]
    return max(lengths), sum(lengths), time.perf_counter() - began


def full_batch(small: tuple[int, int, float]) -> int:
    """Samples of the full batch, after the (steps, tokens, seconds) of the small one.

    Time grows no faster than the number of samples, and it is taken twice: once to warm up.
    """
    few, many = PILOT_SAMPLES
    affordable = few * PILOT_S / (2 * small[2]) if small[2] else many
    return max(2 * few, min(many, int(affordable) // 8 * 8))


def _rl_threads(found: Findings) -> int:
    """Threads in reinforcement learning, where with stale samples another pool works at the same time."""
    return found.pool.shared_threads if generating(found.recipe).staleness else found.pool.threads


def solve_pace(small: tuple[int, int, float], full: tuple[int, int, float]) -> tuple[float, float]:
    """(seconds per step, seconds per token) from two runs, each (steps, tokens, seconds) = steps a + tokens b.

    Noise that would make one of them negative leaves it at zero and gives all the time to the other.
    """
    (s1, n1, t1), (s2, n2, t2) = small, full
    determinant = s1 * n2 - s2 * n1
    per_token = (s1 * t2 - s2 * t1) / determinant if determinant else 0.0
    per_token = min(max(per_token, 0.0), t2 / n2)
    return max((t2 - per_token * n2) / s2, 0.0), per_token
