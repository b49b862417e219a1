"""A finished run against its own forecast, part by part."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from isthmus.errors import DamagedFile
from isthmus.lines import read_json_object
from isthmus.run import Figure

RECORDS = {"handoff": "parity.json"}


@dataclass(frozen=True)
class Score:
    """One part of a plan's forecast and what it took, in seconds. None: not forecast, or not done."""

    part: str
    low: float | None
    middle: float | None
    high: float | None
    truth: float | None

    @property
    def inside(self) -> bool | None:
        """Whether the truth lies from P10 to P90."""
        if self.truth is None or self.low is None or self.high is None:
            return None
        return self.low <= self.truth <= self.high

    @property
    def error(self) -> float | None:
        """The forecast's P50 over the truth, less 1."""
        return None if not self.truth or self.middle is None else self.middle / self.truth - 1.0


def scores(folder: Path, estimate: Mapping[str, Figure]) -> list[Score]:
    """Every part of a plan's estimate that is a forecast, beside what the run folder says that it took."""
    found: list[Score] = []
    for part, figure in estimate.items():
        if figure.kind != "forecast" or part == "total":
            continue
        middle = None if figure.value is None else float(figure.value)
        found.append(Score(part, figure.low, middle, figure.high, seconds_of(folder, part)))
    return [*found, _total(found)] if len(found) > 1 else found


def seconds_of(folder: Path, part: str) -> float | None:
    """Seconds that a part of a run took, by its record; None if there is none."""
    for name in (RECORDS.get(part, f"{part}.json"), f"steps/{part}/record.json"):
        path = folder / name
        if path.is_file():
            record = read_json_object(path, DamagedFile)
            try:
                return float(record["ended"]) - float(record["started"])
            except (KeyError, TypeError, ValueError) as error:
                raise DamagedFile(f"{path} does not say when it started and ended ({error!r})") from None
    return None


def _total(found: list[Score]) -> Score:
    def added(values: list[float | None]) -> float | None:
        known = [one for one in values if one is not None]
        return math.fsum(known) if len(known) == len(values) else None

    return Score(
        "all of these",
        added([one.low for one in found]),
        added([one.middle for one in found]),
        added([one.high for one in found]),
        added([one.truth for one in found]),
    )
