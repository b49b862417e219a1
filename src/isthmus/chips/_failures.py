"""How often chips fail, as published: fleet by fleet, each rate with its source."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib import resources

from isthmus.lines import csv_rows


@dataclass(frozen=True)
class FailureRate:
    """Failures per chip-hour of one fleet: `failures` among `chips_in_fleet` chips in `hours`.

    `chips` are patterns of the slugs that it is about; none where the source does not name the chip. `in_prior` says
    whether a prior may be built from it: not from a part of another row, nor from a claim whose meaning is disputed.
    """

    fleet: str
    chips: tuple[str, ...]
    chip_named: str
    chips_in_fleet: int
    hours: float
    failures: float
    rate: float
    in_prior: bool
    standing: str
    source: str
    note: str

    def is_of(self, slug: str) -> bool:
        return any(fnmatch(slug, pattern) for pattern in self.chips)


@functools.cache
def failure_rates() -> tuple[FailureRate, ...]:
    """All published rates that are known here."""
    text = resources.files("isthmus.chips").joinpath("failure_rates.csv").read_text(encoding="utf-8")
    return tuple(
        FailureRate(
            fleet=row["fleet"],
            chips=tuple(row["chips"].split()),
            chip_named=row["chip_named"],
            chips_in_fleet=int(row["chips_in_fleet"]),
            hours=float(row["hours"]),
            failures=float(row["failures"]),
            rate=float(row["rate_per_chip_hour"]),
            in_prior=row["use"] == "prior",
            standing=row["standing"],
            source=row["source"],
            note=row["note"],
        )
        for row in csv_rows(text)
    )
