"""Measured points of a pool in place of published ones: a factor on the arithmetic, and a fixed time per update."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from isthmus.errors import IsthmusError
from isthmus.forecast.outlook import Outlooks
from isthmus.forecast.pace import Knobs, step_pace
from isthmus.forecast.points import Calibration, fit_points
from isthmus.lines import read_json
from isthmus.run import write_atomic


@dataclass(frozen=True)
class Point:
    """`seconds` that one update of `rows` rows of `row_length` tokens took."""

    rows: float
    row_length: float
    seconds: float


def parse_point(text: str) -> Point:
    """`ROWSxLENGTH=SECONDS`, such as 256x4096=12.5. Raises IsthmusError."""
    size, _, seconds = text.partition("=")
    rows, _, length = size.partition("x")
    try:
        point = Point(float(rows), float(length), float(seconds))
    except ValueError:
        raise IsthmusError(
            f"--point {text!r}: write ROWSxLENGTH=SECONDS, such as 256x4096=12.5: an update of 256 rows of 4096 tokens "
            "took 12.5 seconds"
        ) from None
    if not all(math.isfinite(one) and one > 0.0 for one in asdict(point).values()):
        raise IsthmusError(f"--point {text!r}: rows, length and seconds have to be above 0")
    return point


def calibrate(outlooks: Outlooks, pool: str, points: Sequence[Point]) -> Calibration:
    """What points measured on a pool teach of it. Raises IsthmusError where arithmetic says nothing of the pool."""
    work = outlooks.work
    learning = next((step for step in work.steps if step.learns), None)
    if learning is None:
        raise IsthmusError("no step of the recipe learns, so there is nothing to calibrate")
    plain = replace(
        outlooks.pools[pool], facts=replace(outlooks.pools[pool].facts, figures={}, calibration=Calibration())
    )
    expected: list[float] = []
    for point in points:
        step = replace(learning, kind="pretrain", rows=point.rows, row_length=point.row_length)
        pace = step_pace(work, step, plain, None, Knobs())
        if pace.seconds is None:
            raise IsthmusError(f"the pool {pool!r} cannot be calibrated: {pace.why}")
        expected.append(pace.seconds)
    return fit_points(expected, [point.seconds for point in points])


def write_calibration(path: Path, recipe: str, pool: str, chip: str, count: int, found: Calibration) -> None:
    """Add a pool to a calibration file, which is made if it is not there."""
    content = read_file(path) if path.is_file() else {}
    content[pool] = {"chip": chip, "count": count, "recipe": recipe, **asdict(found)}
    write_atomic(path, json.dumps(content, indent=2, sort_keys=True).encode() + b"\n")


def read_calibrations(path: Path) -> dict[str, tuple[str, Calibration]]:
    """Chip and calibration by pool. Raises IsthmusError for a file that is not one of ours."""
    found: dict[str, tuple[str, Calibration]] = {}
    for pool, entry in read_file(path).items():
        try:
            values = [float(entry[key]) for key in ("factor", "overhead_s", "spread")]
            found[pool] = str(entry["chip"]), Calibration(*values, points=int(entry["points"]))
        except (KeyError, TypeError, ValueError):
            raise IsthmusError(
                f"{path} is not a calibration: {pool!r} is not whole; make it with `isthmus forecast calibrate`"
            ) from None
    return found


def read_file(path: Path) -> dict[str, dict[str, Any]]:
    """The entries of a calibration file."""
    try:
        content = read_json(path)
    except FileNotFoundError:
        raise IsthmusError(f"no calibration at {path}; make one with `isthmus forecast calibrate`") from None
    if not isinstance(content, dict):
        raise IsthmusError(f"{path} is not a calibration: it holds no pools by name")
    return content
