"""How long one update of a step takes on a pool: by measurements of it where there are some, else by arithmetic."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from isthmus.forecast.count import count_parameters
from isthmus.forecast.decode import Engine, rollout_s
from isthmus.forecast.device import Device, pool_device, with_measured
from isthmus.forecast.efficiency import Z80, Speed, shipped
from isthmus.forecast.goodput import FailureRate, prior
from isthmus.forecast.memory import Layout, cache_bytes, training_memory
from isthmus.forecast.points import Calibration
from isthmus.forecast.rl import (
    CROSSING_GBS,
    LOGPROB_PASSES,
    UNKNOWN_LENGTHS_WIDTH,
    WIDTH,
    RlSetting,
    RlTimes,
    combine,
    shipped_correction,
)
from isthmus.forecast.setting import ModelShape, Setting, shape_of
from isthmus.forecast.work import PoolWork, StepWork, Work
from isthmus.recipe.architecture import MixtureSection

WEIGHT_BYTES = {"fp32": 4.0, "bf16": 2.0}
"""Bytes a parameter of the formats that are not 8 bits wide."""
ROOM = 0.92
"""Share of a device's memory that training may plan with."""
PILOT_SPREAD = math.log(1.24) / Z80
"""Of a pilot's prediction, in the logarithm: 24 % error at the 90th percentile over llm-foundry's dense rows."""
SLOTS = 256.0
"""Samples that an engine of ours decodes together."""


@dataclass(frozen=True)
class PoolFacts:
    """What is known of a pool beyond its chip: figures of its qualification by name, calibration, beliefs, inputs.

    `figures` are values, in the units of their names. `price` is per chip-hour, in the currency of the caller.
    """

    figures: Mapping[str, float] = field(default_factory=dict)
    calibration: Calibration = field(default_factory=Calibration)
    failures: FailureRate | None = None
    price: float | None = None
    spares: int = 0


@dataclass(frozen=True)
class Knobs:
    """Factors on what a forecast assumes, each 1 unless a question turns it."""

    efficiency: float = 1.0
    memory: float = 1.0
    links: float = 1.0
    failures: float = 1.0
    lengths: float = 1.0
    crossing: float = 1.0
    save: float = 1.0
    restart: float = 1.0
    count: float = 1.0
    of: str | None = None
    """Only for the pool of this name; for all if None."""

    def on(self, pool: str) -> Knobs:
        """The knobs as they stand for a pool."""
        return self if self.of in (None, pool) else Knobs(lengths=self.lengths)


PLAIN = Knobs()
"""Nothing turned."""


@dataclass(frozen=True)
class Pool:
    """A pool with its device and what is known of it."""

    work: PoolWork
    device: Device
    facts: PoolFacts

    @property
    def name(self) -> str:
        return self.work.name

    def belief(self) -> FailureRate:
        return self.facts.failures or prior(self.work.chip)

    def turned(self, knobs: Knobs) -> Pool:
        """The pool with its rates and its size multiplied."""
        k = knobs.on(self.name)
        if (k.efficiency, k.memory, k.links, k.count) == (1.0, 1.0, 1.0, 1.0):
            return self
        d = self.device
        device = replace(
            d,
            mem_bw_gbs=_times(d.mem_bw_gbs, k.memory),
            link_gbs=_times(d.link_gbs, k.links),
            nic_gbs=_times(d.nic_gbs, k.links),
        )
        return Pool(replace(self.work, count=max(1, round(self.work.count * k.count))), device, self.facts)


def make_pool(work: PoolWork, facts: PoolFacts) -> Pool:
    """A pool of a recipe; rates that nobody published are those that its qualification measured."""
    figures = facts.figures
    device = pool_device(work.chip)
    return Pool(
        work, with_measured(device, figures.get("matmul_bf16_tflops"), figures.get("all_to_all_bus_gbs")), facts
    )


@dataclass(frozen=True)
class Pace:
    """One update: seconds at P50 and the spread of their logarithm; None with `why` where it cannot run or be told.

    `parts` are seconds by name; `basis` says what it rests on.
    """

    seconds: float | None
    spread: float
    basis: str
    why: str = ""
    parts: dict[str, float] = field(default_factory=dict)
    tokens_per_s: float | None = None
    memory_gb: float | None = None
    fixed_s: float = 0.0


def step_pace(work: Work, step: StepWork, learner: Pool, generator: Pool | None, knobs: Knobs) -> Pace:
    """One update of a step on a pool that learns, and one that generates where the step needs it."""
    learner = learner.turned(knobs)
    generator = generator.turned(knobs) if generator is not None else None
    if step.kind == "rl":
        assert generator is not None
        return _rl_pace(work, step, learner, generator, knobs)
    if step.kind == "sample":
        return _sample_pace(step, learner, knobs)
    return _learning_pace(work, step, learner, knobs)


def _learning_pace(work: Work, step: StepWork, pool: Pool, knobs: Knobs) -> Pace:
    if pool.work.rehearsed:
        return Pace(None, 0.0, "nothing", "rehearsed: a rehearsal can refuse a pool for training, never vouch for it")
    figures = pool.facts.figures
    per_token = figures.get("learn_token_s")
    tokens = step.rows * step.row_length
    if step.kind == "sft" and "sft_step_s" in figures:
        return _tuned(Pace(figures["sft_step_s"], PILOT_SPREAD, "pilot on the pool"), pool, knobs)
    if per_token is not None:
        return _tuned(Pace(tokens * per_token, PILOT_SPREAD, "pilot on the pool"), pool, knobs)
    if (unknown := unknown_rates(pool)) is not None:
        return Pace(None, 0.0, "nothing", unknown)
    memory = memory_of(work, step, pool)
    if (full := _too_full(work, step, pool, memory)) is not None:
        return Pace(None, 0.0, "counts", full, memory_gb=memory / 1e9)
    speed = shipped().speed(setting_of(work, step, pool))
    rate = speed.middle * pool.work.count
    pace = Pace(tokens / rate, speed.spread, _basis(speed), tokens_per_s=speed.middle, memory_gb=memory / 1e9)
    return _tuned(pace, pool, knobs)


def _rl_pace(work: Work, step: StepWork, learner: Pool, generator: Pool, knobs: Knobs) -> Pace:
    learning = _learning_pace(work, replace(step, kind="pretrain", row_length=_grown(step, knobs)[1]), learner, knobs)
    if learning.seconds is None:
        return learning
    generating = _sample_pace(step, generator, knobs)
    if generating.seconds is None:
        return generating
    crossing = _crossing_s(step, learner, generator) / knobs.on(generator.name).crossing
    apart = step.overlapped and learner.name != generator.name
    measured = "learn_token_s" in learner.facts.figures
    logprobs = 0.0 if measured else LOGPROB_PASSES * learning.seconds / 3.0
    times = combine("overlapped" if apart else "colocated", generating.seconds, logprobs, learning.seconds, crossing)
    factor, spread = (
        (1.0, PILOT_SPREAD) if measured else (_correction(step, learner, generator, apart), _width(generator) / Z80)
    )
    if learner.facts.calibration.points:
        factor, spread = 1.0, max(learning.spread, generating.spread)
    return Pace(
        times.step * factor,
        spread,
        f"{learning.basis}; rollouts by arithmetic" if not measured else "pilots on both pools",
        parts=_parts(times),
        tokens_per_s=learning.tokens_per_s,
        memory_gb=learning.memory_gb,
        fixed_s=generating.fixed_s,
    )


def _sample_pace(step: StepWork, pool: Pool, knobs: Knobs) -> Pace:
    figures = pool.facts.figures
    mean, _ = _grown(step, knobs)
    factor = 1.0 / knobs.on(pool.name).efficiency
    if "decode_step_s" in figures and "decode_token_s" in figures:
        waves = math.ceil(step.rows / SLOTS)
        longest = min(step.longest, 2.0 * figures.get("longest_completion_tokens", step.longest))
        mean = min(step.longest, figures.get("completion_tokens", mean) * _growth(knobs))
        seconds = waves * longest * figures["decode_step_s"] + step.rows * mean * figures["decode_token_s"]
        return Pace(seconds * factor, PILOT_SPREAD, "pilot on the pool", fixed_s=figures.get("engine_start_s", 0.0))
    if (unknown := unknown_rates(pool)) is not None:
        return Pace(None, 0.0, "nothing", unknown)
    engine = engine_of(step, pool.device, pool.work.count)
    if engine is None:
        return Pace(
            None, 0.0, "counts", f"{pool.work.count} x {pool.device.mem_gb:g} GB do not hold weights and a cache"
        )
    engines = max(1, pool.work.count // engine.devices)
    seconds = rollout_s(engine, step.rows / engines, step.prompt, mean, step.longest)
    return Pace(seconds * factor, _width(pool) / Z80, "generation by arithmetic")


def setting_of(work: Work, step: StepWork, pool: Pool) -> Setting:
    """A learning step as a training setting on a pool: FSDP, expert parallelism as the recipe has it, bf16."""
    count = pool.work.count
    rows = max(1.0, step.rows / count)
    return Setting(
        model=_shape(step),
        device=pool.device,
        count=count,
        precision="BF16",
        source="isthmus",
        recipe="BF16",
        row_length=step.row_length,
        batch_rows=step.rows,
        expert=float(work.expert) if isinstance(step.model, MixtureSection) else None,
        microbatch=min(8.0, float(work.microbatch or rows)),
        sharded=count > 1,
        checkpointing=work.checkpointing,
    )


def memory_of(work: Work, step: StepWork, pool: Pool) -> float:
    """Bytes of training that the fullest chip of a pool holds."""
    count = pool.work.count
    rows = work.microbatch or max(1, math.ceil(step.rows / count))
    layout = Layout(count=count, expert=min(work.expert, count), replicate=min(work.replicate, count))
    return training_memory(
        step.model, layout, rows=rows, row_length=int(step.row_length), checkpointing=work.checkpointing
    ).total


def engine_of(step: StepWork, device: Device, most: int) -> Engine | None:
    """The smallest engine, a power of two of devices, that holds the weights and at least eight sequences."""
    each = WEIGHT_BYTES.get(step.format, 1.0)
    experts = float(step.model.n_routed_experts) if isinstance(step.model, MixtureSection) else 0.0
    context = step.prompt + step.longest
    per_token = cache_bytes(step.model, context) / max(context, 1.0)
    devices = 1
    while devices <= most:
        engine = Engine(_shape(step), device, devices, each, per_token, experts)
        if engine.most_sequences(step.prompt + step.mean) >= 8:
            return engine
        devices *= 2
    return None


def _shape(step: StepWork) -> ModelShape:
    return shape_of(f"{step.model.model_type} {count_parameters(step.model).main}", step.model, step.row_length / 2.0)


def _width(generator: Pool) -> float:
    """Of a step's time: narrow where a pilot measured how long completions are."""
    return WIDTH if "completion_tokens" in generator.facts.figures else UNKNOWN_LENGTHS_WIDTH


def _correction(step: StepWork, learner: Pool, generator: Pool, apart: bool) -> float:
    setting = RlSetting(
        model=_shape(step),
        generator=generator.device,
        generating=generator.work.count,
        learner=learner.device,
        learning=learner.work.count,
        mode="overlapped" if apart else "colocated",
        samples=step.rows,
        prompt=step.prompt,
        mean=step.mean,
        longest=step.longest,
        engine_devices=1,
    )
    return shipped_correction().factor(setting)


def _crossing_s(step: StepWork, learner: Pool, generator: Pool) -> float:
    """Seconds in which weights cross, at the rate of the slower pool's network, `CROSSING_GBS` at most."""
    measured = generator.facts.figures.get("crossing_s")
    if measured is not None:
        return measured
    size = count_parameters(step.model).main * WEIGHT_BYTES.get(step.format, 1.0)
    if learner.name == generator.name:
        return size / (CROSSING_GBS * 1e9)
    slowest = min((pool.device.nic_gbs or CROSSING_GBS) * pool.work.count for pool in (learner, generator))
    return size / (min(CROSSING_GBS, slowest) * 1e9)


GROWTH = 1.5
"""Mean completion over a whole RL step, as a multiple of the first: R1's thoughts grew all through it (arXiv
2501.12948, figure 3); the middle case lets them double."""


def _growth(knobs: Knobs) -> float:
    return GROWTH * knobs.lengths


def _grown(step: StepWork, knobs: Knobs) -> tuple[float, float]:
    """(mean completion, row length) over the step, completions grown."""
    if not step.generates:
        return step.mean, step.row_length
    growth = _growth(knobs) if step.kind == "rl" else 1.0
    mean = min(0.95 * step.longest, step.mean * growth)
    return mean, step.prompt + mean


def _tuned(pace: Pace, pool: Pool, knobs: Knobs) -> Pace:
    """With the pool's calibration, and with the knob on its efficiency."""
    assert pace.seconds is not None
    calibration = pool.facts.calibration
    seconds = calibration.overhead_s + calibration.factor * pace.seconds / knobs.on(pool.name).efficiency
    if not calibration.points:
        return replace(pace, seconds=seconds)
    basis = f"{calibration.points} measured points"
    rate = pace.tokens_per_s * pace.seconds / seconds if pace.tokens_per_s else None
    return replace(pace, seconds=seconds, spread=calibration.spread or pace.spread, basis=basis, tokens_per_s=rate)


def unknown_rates(pool: Pool) -> str | None:
    """Why arithmetic says nothing of a pool; None if it does."""
    if pool.work.rehearsed:
        return (
            "rehearsed on this machine's CPU, which says nothing of the chip's speed: forecast a run folder with its "
            f"pilots, or --what-if pools.{pool.name}.rehearsed=false"
        )
    if pool.device.is_complete and pool.device.mem_gb is not None:
        return None
    return f"no sourced rates of {pool.work.chip}: qualify the pool and forecast the run folder, or calibrate it"


def _too_full(work: Work, step: StepWork, pool: Pool, memory: float) -> str | None:
    """Why a step does not fit on a pool's chips, and what would make it fit; None if it does. `memory` is its
    `memory_of`."""
    assert pool.device.mem_gb is not None
    room = ROOM * pool.device.mem_gb * 1e9
    if memory <= room:
        return None
    ways = _ways_out(work, step, pool, memory, room)
    return f"a chip would hold {memory / 1e9:,.0f} GB of {pool.device.mem_gb:g}: {ways}"


def _ways_out(work: Work, step: StepWork, pool: Pool, now: float, room: float) -> str:
    """The keys of a recipe that make a step of `now` bytes fit into `room`, each alone, or else all together."""

    def needed(**changes: Any) -> float:
        return memory_of(replace(work, **changes), step, pool)

    helping = dict[str, dict[str, Any]]()
    for name, field_name, values in _levers(work, step, pool):
        lower = [value for value in values if needed(**{field_name: value}) < now]
        if lower:
            enough = next((value for value in lower if needed(**{field_name: value}) <= room), lower[-1])
            helping[f"{name} = {json.dumps(enough)}"] = {field_name: enough}
    fitting = [name for name, change in helping.items() if needed(**change) <= room]
    together = {key: value for change in helping.values() for key, value in change.items()}
    if fitting:
        return " or ".join(fitting)
    if helping and needed(**together) <= room:
        return " and ".join(helping)
    return ", ".join([*helping, *_last_resorts(work, step, pool, now)])


def _last_resorts(work: Work, step: StepWork, pool: Pool, now: float) -> list[str]:
    """What lowers what a chip holds, `now` bytes, beside the keys of [train]."""
    larger = replace(pool, work=replace(pool.work, count=2 * pool.work.count))
    copies = [work.replicate, *_fewer_copies(work, step, larger), *(n * work.replicate for n in (2, 4))]
    fitting = (n for n in copies if _divides(work, step, larger, n))
    more = any(memory_of(replace(work, replicate=n), step, larger) < now for n in fitting)
    if step.longest:
        shorter = "a smaller max_new_tokens"
    else:
        shorter = "a smaller row_length" if step.kind == "pretrain" else "shorter examples"
    return [*(["more chips"] if more else []), shorter]


def _fewer_copies(work: Work, step: StepWork, pool: Pool) -> list[int]:
    return [n for n in range(work.replicate - 1, 0, -1) if _divides(work, step, pool, n)]


def _divides(work: Work, step: StepWork, pool: Pool, copies: int) -> bool:
    """Whether so many copies of the model can stand on a pool: no more ranks than experts share one."""
    count = pool.work.count
    most = step.model.n_routed_experts if isinstance(step.model, MixtureSection) else count
    return count % (copies * min(work.expert, count)) == 0 and count // copies <= most


def _levers(work: Work, step: StepWork, pool: Pool) -> list[tuple[str, str, list[Any]]]:
    """Keys of [train] that lower what a chip holds, with their values from the mildest."""
    count, experts = pool.work.count, step.model.n_routed_experts if isinstance(step.model, MixtureSection) else 0
    spread = [n for n in (2, 4, 8, 16, 32, 64) if experts and experts % n == 0 and count % (n * work.replicate) == 0]
    return [
        ("train.activation_checkpointing", "checkpointing", [True]),
        ("train.rows_per_microbatch", "microbatch", [1]),
        ("train.replicate", "replicate", _fewer_copies(work, step, pool)),
        ("train.expert", "expert", [n for n in spread if n > work.expert]),
    ]


def _basis(speed: Speed) -> str:
    new = "" if speed.missing == "nothing" else f"; new: {speed.missing}"
    return f"published results{new}"


def _parts(times: RlTimes) -> dict[str, float]:
    return {
        "rollout": times.rollout,
        "log-probabilities": times.logprobs,
        "update": times.update,
        "crossing": times.crossing,
    }


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
