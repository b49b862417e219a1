"""How wrong the forecasts are: published results predicted with whole groups left out, beside medians of the others."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from isthmus.forecast.decode import Engine
from isthmus.forecast.device import published_device
from isthmus.forecast.efficiency import FEW_WIDTH, MANY, WIDTHS, Efficiency, shipped, without
from isthmus.forecast.points import fit_points
from isthmus.forecast.published import Measured, Row, shape_named
from isthmus.forecast.rl import UNKNOWN_LENGTHS_WIDTH, WIDTH, MeasuredStep, RlCorrection

RL_NEW = ("size or mode", "experiment")
SEEN_RL_WIDTH = 0.6
"""Half width of the 80 % interval of an RL step whose experiment was measured at another size or in another mode."""
Same = Callable[[Measured, Measured], bool]


@dataclass(frozen=True)
class Test:
    """One question. `left_out(target, other)`: what may not be known of a target. `peers(target, other)`: whose median
    a naive planner takes, in efficiency. `width` names the interval that is held against the truth."""

    name: str
    left_out: Same
    peers: Same
    width: str


def _model(a: Measured, b: Measured) -> bool:
    return a.setting.model.name == b.setting.model.name


def _chip(a: Measured, b: Measured) -> bool:
    return a.setting.device.name == b.setting.device.name


def _family(a: Measured, b: Measured) -> bool:
    return a.setting.device.family == b.setting.device.family


def _precision(a: Measured, b: Measured) -> bool:
    return a.setting.precision == b.setting.precision


def _kind(a: Measured, b: Measured) -> bool:
    return a.setting.model.is_mixture == b.setting.model.is_mixture


TESTS = (
    Test(
        "new model",
        _model,
        lambda t, o: _chip(t, o) and _precision(t, o) and _kind(t, o) and not _model(t, o),
        "model",
    ),
    Test("new chip", _chip, lambda t, o: _model(t, o) and _precision(t, o) and not _chip(t, o), "chip"),
    Test("new family", _family, lambda t, o: _model(t, o) and _precision(t, o) and not _family(t, o), "family"),
    Test(
        "new chip and model",
        lambda t, o: _chip(t, o) or _model(t, o),
        lambda t, o: _precision(t, o) and _kind(t, o) and not _chip(t, o) and not _model(t, o),
        "model and chip",
    ),
    Test(
        "new program",
        lambda t, o: t.setting.source == o.setting.source,
        lambda t, o: _chip(t, o) and _precision(t, o) and _kind(t, o) and t.setting.source != o.setting.source,
        "program",
    ),
    Test("new precision", _precision, lambda t, o: _chip(t, o) and _model(t, o) and not _precision(t, o), "precision"),
)


@dataclass(frozen=True)
class Outcome:
    """Relative errors of one test: of the forecast and of the naive median, over the same targets.

    `coverage` is the share of truths inside the 80 % interval. `targets` counts results that have peers.
    """

    name: str
    targets: int
    naive: float
    median: float
    mean: float
    p90: float
    coverage: float

    @property
    def ratio(self) -> float:
        return self.median / self.naive if self.naive else math.inf


@dataclass(frozen=True)
class Prediction:
    """A target, what was forecast and what a naive planner would say, both as ratios to the truth."""

    id: str
    test: str
    forecast: float
    naive: float | None
    inside: bool


def predictions(test: Test, targets: Sequence[Measured], results: Sequence[Measured]) -> list[Prediction]:
    """Every target, predicted from the results without what its group leaves out."""
    found: list[Prediction] = []
    fitted: dict[tuple[str, ...], Efficiency] = {}
    for target in targets:
        key = _group_key(test, target)
        if key not in fitted:
            fitted[key] = without(lambda other, target=target: test.left_out(target, other), results)
        ratio = math.exp(fitted[key].log_tokens_per_s(target.setting)) / target.tokens_per_s
        peers = [other.mfu for other in results if test.peers(target, other) and other.id != target.id]
        naive = statistics.median(peers) / target.mfu if peers else None
        inside = abs(math.log(ratio)) <= _width(test, target, results)
        found.append(Prediction(target.id, test.name, ratio, naive, inside))
    return found


def _width(test: Test, target: Measured, results: Sequence[Measured]) -> float:
    """Half width of the interval that a test holds against a truth, in the logarithm."""
    alike = sum(one.setting.source == target.setting.source for one in results)
    if test.width == "program":
        return math.hypot(WIDTHS["nothing"], FEW_WIDTH)
    return WIDTHS[test.width] if alike >= MANY else math.hypot(WIDTHS[test.width], FEW_WIDTH)


def _group_key(test: Test, target: Measured) -> tuple[str, ...]:
    s = target.setting
    named = {
        "model": s.model.name,
        "chip": s.device.name,
        "family": s.device.family,
        "precision": s.precision,
        "program": s.source,
    }
    return tuple(named[part] for part in named if part in test.name)


def summary(name: str, found: Sequence[Prediction]) -> Outcome | None:
    """The errors of the predictions that have a naive one beside them; None if none has."""
    both = [one for one in found if one.naive is not None]
    if not both:
        return None
    errors = sorted(abs(one.forecast - 1.0) for one in both)
    naive = [abs(one.naive - 1.0) for one in both if one.naive is not None]
    return Outcome(
        name=name,
        targets=len(both),
        naive=statistics.median(naive),
        median=statistics.median(errors),
        mean=statistics.fmean(errors),
        p90=errors[min(len(errors) - 1, int(0.9 * len(errors)))],
        coverage=sum(one.inside for one in both) / len(both),
    )


def calibrated(results: Sequence[Measured], points: int = 2) -> list[float]:
    """Errors of forecasts of a pool that `points` of its own results calibrated, on the rest of them.

    A pool is one model on one device at one precision by one program, of which at least `points` + 1 results are known;
    its first results calibrate. Everything of its device is left out of what the forecast learns from.
    """
    pools: dict[tuple[str, ...], list[Measured]] = {}
    for one in results:
        s = one.setting
        pools.setdefault((s.source, s.model.name, s.device.name, s.precision), []).append(one)
    errors: list[float] = []
    fitted: dict[str, Efficiency] = {}
    for (_, _, device, _), found in pools.items():
        if len(found) <= points:
            continue
        if device not in fitted:
            fitted[device] = without(lambda other, device=device: other.setting.device.name == device, results)
        expected = [math.exp(-fitted[device].log_tokens_per_s(one.setting)) for one in found]
        seconds = [1.0 / one.tokens_per_s for one in found]
        calibration = fit_points(expected[:points], seconds[:points])
        errors += [
            (calibration.overhead_s + calibration.factor * e) / s - 1.0
            for e, s in zip(expected[points:], seconds[points:], strict=True)
        ]
    return errors


def rl_predictions(targets: Sequence[MeasuredStep], results: Sequence[MeasuredStep], new: str) -> list[Prediction]:
    """RL steps predicted with the same step left out ("size or mode"), or its whole experiment ("experiment")."""
    found: list[Prediction] = []
    for target in targets:
        others = [one for one in results if not _same_rl(target, one, new)]
        correction = RlCorrection(others, shipped())
        ratio = correction.step_s(target.setting, target.experiment, target.mean_known) / target.seconds
        peers = [one.seconds * target.setting.tokens / one.setting.tokens for one in others if _alike(target, one)]
        naive = statistics.median(peers) / target.seconds if peers else None
        width = SEEN_RL_WIDTH if new == RL_NEW[0] else WIDTH if target.mean_known else UNKNOWN_LENGTHS_WIDTH
        found.append(Prediction(target.id, f"RL, new {new}", ratio, naive, abs(math.log(ratio)) <= width))
    return found


def _same_rl(target: MeasuredStep, other: MeasuredStep, new: str) -> bool:
    if new == "experiment":
        return target.experiment == other.experiment
    a, b = target.setting, other.setting
    same_pool = (a.generating, a.learning, a.mode, a.learner.name) == (b.generating, b.learning, b.mode, b.learner.name)
    return target.id == other.id or (target.experiment == other.experiment and same_pool)


def _alike(target: MeasuredStep, other: MeasuredStep) -> bool:
    return other.setting.model.is_mixture == target.setting.model.is_mixture


_EXPERTS = {"deepseek-v3": 256.0, "kimi-k2": 384.0}
_LATENT_CACHE = 61 * 576 * 2.0
"""Bytes of cache per token of both models: 61 layers of a latent of 512 and 64 rotary numbers in bf16."""
_PREFILL_BESIDE = 0.5
"""Share of the prompts' time that decoding waits for where the same devices do both."""


def decoding_errors(rows: Iterable[Row]) -> list[float]:
    """Relative errors of forecast times per token, of published decoding points, by the arithmetic as it is."""
    errors: list[float] = []
    for row in rows:
        model = shape_named({"params_total": "", "params_active": "", **row})
        device = published_device(row["chip"])
        if model is None or device is None:
            continue
        devices = int(row["tp"]) * int(row["dp"])
        each = 1.0 if row["precision"] == "fp8" else 0.56
        engine = Engine(model, device, devices, each, _LATENT_CACHE, _EXPERTS[model.name])
        sequences, prompt, answer = float(row["batch"]) * int(row["dp"]), float(row["input"]), float(row["output"])
        seconds = engine.step_s(sequences, prompt + answer / 2.0)
        if row["mode"] == "agg":
            seconds += _PREFILL_BESIDE * engine.prefill_s(sequences * prompt / answer)
        errors.append(1e3 * seconds / float(row["tpot_ms"]) - 1.0)
    return errors
