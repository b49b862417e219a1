"""Small charts as inline SVG and HTML.

The drawing stretches with the page (`preserveAspectRatio="none"`, strokes that keep their width) while its words stay
HTML, so that they keep their size on a phone. Colours are CSS classes: they follow the reader's light or dark scheme.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from markupsafe import Markup, escape

from isthmus.report_page.numbers import plain

WIDTH, HEIGHT = 1000.0, 300.0
MOST_POINTS = 240
SMALLEST_SPAN = 1e-300
MOST_HEAT_COLUMNS = 60
MOST_HEAT_ROWS = 32
HEAT_EDGES = (0.5, 0.75, 0.9, 1.1, 1.33, 2.0)
"""Upper ends of the shades of a heat strip, in multiples of the even share; the last shade is open."""


@dataclass(frozen=True)
class Series:
    """A line. `tone` is its colour (home, away, ink); `faint` draws it as the raw data behind another line."""

    name: str
    points: list[tuple[float, float]]
    tone: str = "ink"
    faint: bool = False
    dashed: bool = False


@dataclass(frozen=True)
class Mark:
    """One value with its interval, at a place on the horizontal axis."""

    name: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    tone: str = "away"


@dataclass(frozen=True)
class Scale:
    low: float
    high: float
    ticks: list[float]

    def place(self, value: float) -> float:
        """Where `value` lies between the ends, 0 to 1."""
        return (value - self.low) / (self.high - self.low)


def points_of(events: Sequence[dict[str, Any]], key: str, factor: float = 1.0) -> list[tuple[float, float]]:
    """(step, value) of the events that have a finite number under `key`."""
    pairs = [(event.get("step"), event.get(key)) for event in events]
    return [(float(x), factor * float(y)) for x, y in pairs if _is_number(x) and _is_number(y)]


def moving_average(points: Sequence[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """Each point replaced by the mean of itself and the `window - 1` points before it."""
    values = [y for _, y in points]
    starts = [max(0, end + 1 - window) for end in range(len(values))]
    return [
        (points[end][0], math.fsum(values[start : end + 1]) / (end + 1 - start)) for end, start in enumerate(starts)
    ]


def line_chart(
    series: Sequence[Series], *, suffix: str = "", marks: Sequence[Mark] = (), from_zero: bool = True
) -> Markup:
    """Lines over steps. Returns an empty Markup when there is nothing to draw."""
    shown = [line for line in series if line.points]
    if not shown and not marks:
        return Markup("")
    xs = [x for line in shown for x, _ in line.points] + [mark.x for mark in marks]
    ys = [y for line in shown for _, y in line.points]
    ys += [end for mark in marks for end in (mark.y, mark.low, mark.high) if end is not None]
    across, up = scale(0.0, max(xs), 6, from_zero=True, tight=True), scale(min(ys), max(ys), 4, from_zero=from_zero)
    body = [_grid(up), *(_line(line, across, up) for line in shown), *(_mark(mark, across, up) for mark in marks)]
    return _frame(body, across, up, suffix, _summary(shown, marks), _legend(shown, marks))


def scale(low: float, high: float, about: int, *, from_zero: bool, tight: bool = False) -> Scale:
    """A scale with round ticks. `from_zero` puts zero on it; `tight` ends it at the data instead of at a tick."""
    if from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    largest = max(abs(low), abs(high))
    if high - low <= max(1e-12 * largest, SMALLEST_SPAN):
        spread = largest if largest > SMALLEST_SPAN else 1.0
        low, high = (0.0, spread) if from_zero and high >= 0 else (low - spread / 2, high + spread / 2)
    step = _round_step((high - low) / about)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [index * step for index in range(first, last + 1)]
    if tight:
        return Scale(low, high, [tick for tick in ticks if low <= tick <= high])
    return Scale(ticks[0], ticks[-1], ticks)


def heat_strip(columns: Sequence[tuple[float, Sequence[float]]]) -> Markup:
    """The load of each expert (rows) over steps (columns), shaded by its multiple of the even share.

    `columns`: (step, share of each expert), shares adding up to 1. Neighbouring steps are averaged into at most
    MOST_HEAT_COLUMNS columns and neighbouring experts into at most MOST_HEAT_ROWS rows.
    """
    experts = len(columns[0][1])
    usable = [shares for _, shares in columns if len(shares) == experts]
    steps = [[_mean(values) for values in zip(*group, strict=True)] for group in _split(usable, MOST_HEAT_COLUMNS)]
    cells = [[_mean(group) * experts for group in _split(column, MOST_HEAT_ROWS)] for column in steps]
    paths: dict[int, list[str]] = {}
    for x, column in enumerate(cells):
        for y, multiple in enumerate(column):
            paths.setdefault(shade(multiple), []).append(f"M{x} {y}h1v1h-1z")
    drawn = "".join(f'<path class="heat{level}" d="{"".join(paths[level])}"/>' for level in sorted(paths))
    low, high = min(map(min, cells)), max(map(max, cells))
    words = f"{experts} experts; load between {low:.2f} and {high:.2f} times the even share"
    return Markup(
        f'<svg class="heat" viewBox="0 0 {len(cells)} {len(cells[0])}" preserveAspectRatio="none" role="img" '
        f'aria-label="{words}">{drawn}</svg>'
    )


def shade(multiple: float) -> int:
    """Which of the shades, 0 (starved) to len(HEAT_EDGES) (crowded), a multiple of the even share has."""
    return sum(multiple > edge for edge in HEAT_EDGES)


def stacked_bar(parts: Sequence[tuple[str, float, str]]) -> Markup:
    """One bar of (name, amount, css class) parts, each as wide as its share of the whole."""
    whole = math.fsum(amount for _, amount, _ in parts)
    if whole <= 0:
        return Markup("")
    spans = "".join(
        f'<span class="part {css}" style="width:{100 * amount / whole:.3f}%" title="{escape(name)}"></span>'
        for name, amount, css in parts
    )
    words = ", ".join(f"{name} {100 * amount / whole:.0f} percent" for name, amount, _ in parts)
    return Markup(f'<div class="stack" role="img" aria-label="{escape(words)}">{spans}</div>')


def interval_bar(value: float, low: float, high: float) -> Markup:
    """An interval against zero, on an axis that holds both."""
    axis = scale(min(low, 0.0), max(high, 0.0), 4, from_zero=True)
    ticks = "".join(_tick_label("left", axis.place(tick), tick, "") for tick in axis.ticks)
    left, right = 100 * axis.place(low), 100 * axis.place(high)
    return Markup(
        f'<div class="whisker" role="img" aria-label="{plain(value)}, interval {plain(low)} to {plain(high)}">'
        f'<i class="zero" style="left:{100 * axis.place(0.0):.2f}%"></i>'
        f'<i class="span" style="left:{left:.2f}%;width:{right - left:.2f}%"></i>'
        f'<i class="dot" style="left:{100 * axis.place(value):.2f}%"></i>{ticks}</div>'
    )


def _frame(body: list[str], across: Scale, up: Scale, suffix: str, words: str, legend: str) -> Markup:
    y_labels = "".join(_tick_label("bottom", up.place(tick), tick, suffix) for tick in up.ticks)
    x_labels = "".join(_tick_label("left", across.place(tick), tick, "") for tick in across.ticks)
    return Markup(
        f'<div class="chart"><div class="y">{y_labels}</div>'
        f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" preserveAspectRatio="none" role="img" aria-label="{escape(words)}">'
        f'{"".join(body)}</svg><div class="x">{x_labels}</div></div>{legend}'
    )


def _tick_label(side: str, place: float, tick: float, suffix: str) -> str:
    return f'<span style="{side}:{100 * place:.2f}%">{plain(tick)}{escape(suffix)}</span>'


def _grid(up: Scale) -> str:
    path = "".join(f"M0 {_y(tick, up)}H{WIDTH:g}" for tick in up.ticks if tick != 0 or up.low == 0)
    zero = f'<path class="axis" d="M0 {_y(0.0, up)}H{WIDTH:g}"/>' if up.low <= 0 <= up.high else ""
    return f'<path class="grid" d="{path}"/>{zero}'


def _line(line: Series, across: Scale, up: Scale) -> str:
    points = [
        (_mean([x for x, _ in group]), _mean([y for _, y in group])) for group in _split(line.points, MOST_POINTS)
    ]
    css = f"line {line.tone}" + (" faint" if line.faint else "") + (" dashed" if line.dashed else "")
    if len(points) == 1:
        return f'<path class="dot {line.tone}" d="M{_x(points[0][0], across)} {_y(points[0][1], up)}h0"/>'
    path = "L".join(f"{_x(x, across)} {_y(y, up)}" for x, y in points)
    return f'<path class="{css}" d="M{path}"/>'


def _mark(mark: Mark, across: Scale, up: Scale) -> str:
    x, dot = _x(mark.x, across), f"M{_x(mark.x, across)} {_y(mark.y, up)}h0"
    whisker = ""
    if mark.low is not None and mark.high is not None:
        whisker = f'<path class="whiskers {mark.tone}" d="M{x} {_y(mark.low, up)}V{_y(mark.high, up)}"/>'
    return f'{whisker}<path class="dot {mark.tone}" d="{dot}"/>'


def _legend(series: Sequence[Series], marks: Sequence[Mark]) -> str:
    entries = [
        (line.name, f"{line.tone}{' faint' if line.faint else ''}{' dashed' if line.dashed else ''}") for line in series
    ]
    keys = "".join(f'<li><i class="key {css}"></i>{escape(name)}</li>' for name, css in dict.fromkeys(entries))
    for name, tone in dict.fromkeys((mark.name, mark.tone) for mark in marks):
        keys += f'<li><i class="key point {tone}"></i>{escape(name)}</li>'
    return f'<ul class="legend">{keys}</ul>' if len(entries) + len(marks) > 1 else ""


def _summary(series: Sequence[Series], marks: Sequence[Mark]) -> str:
    lines = [
        f"{line.name}: from {plain(line.points[0][1])} to {plain(line.points[-1][1])}"
        for line in series
        if not line.faint
    ]
    return "; ".join(lines + [f"{mark.name} {plain(mark.y)} at step {plain(mark.x)}" for mark in marks])


def _x(value: float, across: Scale) -> str:
    return f"{WIDTH * across.place(value):.1f}"


def _y(value: float, up: Scale) -> str:
    return f"{HEIGHT * (1 - up.place(value)):.1f}"


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * (1 - 1e-9))


def _split(items: Sequence[Any], most: int) -> list[Sequence[Any]]:
    """Neighbours in groups of one size (the last may be smaller), at most `most` groups."""
    size = max(1, math.ceil(len(items) / most))
    return [items[start : start + size] for start in range(0, len(items), size)]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
