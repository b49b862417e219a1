"""How wrong the forecasts are: published results predicted with whole groups left out, beside medians of the others."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from isthmus.forecast.efficiency import WIDTHS, Efficiency, without
from isthmus.forecast.published import Measured

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
        inside = abs(math.log(ratio)) <= WIDTHS[test.width]
        found.append(Prediction(target.id, test.name, ratio, naive, inside))
    return found


def _group_key(test: Test, target: Measured) -> tuple[str, ...]:
    s = target.setting
    named = {"model": s.model.name, "chip": s.device.name, "family": s.device.family, "precision": s.precision}
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
