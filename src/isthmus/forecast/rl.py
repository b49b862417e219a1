"""A step of reinforcement learning: rollout, log-probabilities, update, crossing; colocated, one step off, or apart."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from isthmus.chips import published_rows
from isthmus.forecast.decode import Engine, rollout_s
from isthmus.forecast.device import Device, published_device
from isthmus.forecast.efficiency import Efficiency, shipped
from isthmus.forecast.published import Row, shape_named
from isthmus.forecast.regression import dot, fit, residuals
from isthmus.forecast.setting import ModelShape, Setting

Mode = Literal["colocated", "overlapped"]
LOGPROB_PASSES = 1.0
"""Forward passes over all samples beside the update: the log-probabilities of the policy that learns."""
CROSSING_GBS = 25.0
"""GB/s at which weights cross to the engines: 470 GB in 58.6 s and 61 GB in 15.8 s (verl on H20, without its
checkpoint engine) are 8 and 4, with it 20 and 14."""
MEAN_SHARE = 0.12
"""Mean completion over the longest allowed, where a source states the longest alone. Assumed."""


@dataclass(frozen=True)
class RlSetting:
    """One step: `samples` of `prompt` + `mean` tokens, none longer than `longest`, on devices that generate and learn.

    Colocated, the same devices do both in turn; overlapped, two parts work at the same time and the slower sets the
    pace. `engine_devices` hold the weights of one engine.
    """

    model: ModelShape
    generator: Device
    generating: int
    learner: Device
    learning: int
    mode: Mode
    samples: float
    prompt: float
    mean: float
    longest: float
    engine_devices: int
    precision: str = "BF16"
    weight_bytes: float = 2.0
    cache_bytes: float | None = None
    experts: float = 0.0
    crossing_bytes: float | None = None
    crossing_gbs: float = CROSSING_GBS
    layout: str = ""

    @property
    def engine(self) -> Engine:
        model = self.model
        cache = self.cache_bytes or 2.0 * model.layers * (576.0 if model.total > 6e11 else model.hidden / 4.0)
        return Engine(model, self.generator, self.engine_devices, self.weight_bytes, cache, self.experts)

    @property
    def tokens(self) -> float:
        return self.samples * (self.prompt + self.mean)

    def training(self) -> Setting:
        """The update as a training setting."""
        return Setting(
            model=self.model,
            device=self.learner,
            count=self.learning,
            precision=self.precision,
            source="rl",
            row_length=self.prompt + self.mean,
            batch_rows=self.samples,
            sharded=True,
            checkpointing=True,
            layout=self.layout,
        )


@dataclass(frozen=True)
class RlTimes:
    """Seconds of a step's parts, and of the step."""

    rollout: float
    logprobs: float
    update: float
    crossing: float
    step: float


def rl_times(setting: RlSetting, efficiency: Efficiency) -> RlTimes:
    """A step's parts by arithmetic, before the correction that published steps teach."""
    engines = max(1, setting.generating // setting.engine_devices)
    rollout = rollout_s(setting.engine, setting.samples / engines, setting.prompt, setting.mean, setting.longest)
    tokens_per_s = math.exp(efficiency.log_tokens_per_s(setting.training())) * setting.learning
    update = setting.tokens / tokens_per_s
    logprobs = LOGPROB_PASSES * update / 3.0
    moved = setting.model.total * setting.weight_bytes if setting.crossing_bytes is None else setting.crossing_bytes
    crossing = moved / (setting.crossing_gbs * 1e9)
    return combine(setting.mode, rollout, logprobs, update, crossing)


def combine(mode: Mode, rollout: float, logprobs: float, update: float, crossing: float) -> RlTimes:
    """The step of these parts: one after the other, or the slower side of two and the crossing."""
    learn = logprobs + update
    step = (rollout + learn if mode == "colocated" else max(rollout, learn)) + crossing
    return RlTimes(rollout, logprobs, update, crossing, step)


@dataclass(frozen=True)
class MeasuredStep:
    """A published RL step: seconds of a step in a setting, and the experiment it is of."""

    id: str
    experiment: str
    setting: RlSetting
    seconds: float
    mean_known: bool


_SPREADS = {"all": 0.7, "overlapped": 0.3, "devices": 0.3, "mixture": 0.3, "mean unknown": 0.7}
EXPERIMENT_SPREAD = 0.5
"""Of an experiment's own factor, in the logarithm: how its lengths and its program differ from what is assumed."""
WIDTH, UNKNOWN_LENGTHS_WIDTH = 0.65, 1.6
"""Half widths of the 80 % interval of a step's time in the logarithm, where the mean length of completions is known and
where it is not: of `isthmus forecast validate`, new experiment."""


class RlCorrection:
    """What published steps teach about the arithmetic: a factor, and how it depends on a few properties."""

    def __init__(self, results: Sequence[MeasuredStep], efficiency: Efficiency) -> None:
        self.efficiency = efficiency
        self._experiments = sorted({one.experiment for one in results})
        rows = [self._row(one.setting, one.experiment, one.mean_known) for one in results]
        values = [math.log(one.seconds / rl_times(one.setting, efficiency).step) for one in results]
        spreads = [*_SPREADS.values(), *([EXPERIMENT_SPREAD] * len(self._experiments))]
        self._weights = fit(rows, values, spreads)
        self.left = residuals(rows, values, self._weights)

    def factor(self, setting: RlSetting, experiment: str = "", mean_known: bool = True) -> float:
        """What the arithmetic's step is multiplied by."""
        return math.exp(dot(self._row(setting, experiment, mean_known), self._weights))

    def step_s(self, setting: RlSetting, experiment: str = "", mean_known: bool = True) -> float:
        """Seconds of a step."""
        return rl_times(setting, self.efficiency).step * self.factor(setting, experiment, mean_known)

    def _row(self, setting: RlSetting, experiment: str, mean_known: bool) -> list[float]:
        devices = setting.learning + (setting.generating if setting.mode == "overlapped" else 0)
        own = [float(experiment == one) for one in self._experiments]
        return [
            1.0,
            float(setting.mode == "overlapped"),
            math.log(devices / 64.0),
            float(setting.model.is_mixture),
            float(not mean_known),
            *own,
        ]


@functools.cache
def shipped_correction() -> RlCorrection:
    """What the steps that come with the package teach."""
    return RlCorrection(read_steps(published_rows("results")), shipped())


def read_steps(rows: Iterable[Row]) -> list[MeasuredStep]:
    """The rows that are times of whole RL steps and say how many samples a step has."""
    return [step for row in rows if (step := _step(row)) is not None]


def _step(row: Row) -> MeasuredStep | None:
    seconds = _seconds(row)
    model, device = shape_named(row), published_device(row["chip"])
    samples, lengths = _samples(row), _lengths(row)
    if row["stage"] != "rl" or None in (seconds, model, device, samples, lengths):
        return None
    assert seconds and model and device and samples and lengths and device.bf16_tflops
    count = _count(row)
    generating, learning, mode = _division(row, count)
    prompt, mean, longest, known = lengths
    engine = re.search(r"gen\[TP,PP\]=\[(\d+)", row["parallelism"])
    setting = RlSetting(
        model=model,
        generator=device,
        generating=generating,
        learner=device,
        learning=learning,
        mode=mode,
        samples=samples,
        prompt=prompt,
        mean=mean,
        longest=longest,
        engine_devices=min(generating, int(engine[1])) if engine else _engine_devices(model, device, generating),
        precision="FP8" if "FP8" in row["precision"] and device.fp8_tflops else "BF16",
        weight_bytes=1.0 if "FP8 gen" in row["precision"] else 2.0,
        layout=row["parallelism"],
    )
    experiment = "-".join([row["id"].split("-")[0], model.name])
    return MeasuredStep(row["id"], experiment, setting, seconds, known)


def _engine_devices(model: ModelShape, device: Device, most: int) -> int:
    """The fewest devices, a power of two, that hold the weights twice over."""
    assert device.mem_gb
    needed = 2.0 * model.total * 2.0 / (device.mem_gb * 1e9)
    return min(most, 2 ** max(0, math.ceil(math.log2(needed))))


def _seconds(row: Row) -> float | None:
    if row["metric"] in ("step_time", "rl_step_time") and row["unit"] == "s":
        return float(row["value"])
    if row["unit"].startswith("tokens/s/card"):
        samples, lengths = _samples(row), _lengths(row)
        if samples and lengths:
            return samples * (lengths[0] + lengths[1]) / (float(row["value"]) * _count(row))
    return None


def _count(row: Row) -> int:
    """Devices as chips.csv counts them: two dies are one card."""
    count = int(re.match(r"\d+", row["n_chips"] or "64")[0])  # pyright: ignore[reportOptionalSubscript]
    return count // 2 if "dies" in row["n_chips"] else count


def _samples(row: Row) -> float | None:
    batch, note = row["global_batch"], row["note"]
    if found := re.search(r"gen (\d+)", batch):
        return float(found[1])
    if found := re.search(r"GBS (\d+) x n (\d+)", note):
        return float(found[1]) * float(found[2])
    group = re.search(r"\bn=(\d+)", note)
    return float(batch) * float(group[1]) if batch.isdigit() and group else None


def _lengths(row: Row) -> tuple[float, float, float, bool] | None:
    """(prompt, mean completion, longest completion, whether the mean is stated)."""
    note = row["note"]
    longest = float(row["seq_len"]) if row["seq_len"].isdigit() else None
    if found := re.search(r"prompt (\d+), response max (\d+)", note):
        return float(found[1]) / 4.0, MEAN_SHARE * float(found[2]), float(found[2]), False
    if longest is None:
        return None
    if found := re.search(r"mean generated seq len (\d+)", note):
        return 150.0, float(found[1]), longest, True
    return 300.0, MEAN_SHARE * longest, longest, False


def _division(row: Row, count: int) -> tuple[int, int, Mode]:
    """Devices that generate, devices that learn, and how they work together."""
    text = f"{row['parallelism']} {row['note']}"
    if found := re.search(r"async (\d+):(\d+)", text):
        return int(found[1]), int(found[2]), "overlapped"
    if found := re.search(r"(\d+) generation \+ (\d+) training", text):
        if "one-step-off" in text:
            return int(found[1]), int(found[2]), "overlapped"
        return count, count, "colocated"
    if re.search(r"\d+-step Off", text):
        return count // 2, count - count // 2, "overlapped"
    return count, count, "colocated"
