"""Which of the formats here each server reads, for which models: the format that suits it best first."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib import resources
from typing import Literal

from isthmus.chips._rules import Standing
from isthmus.lines import csv_rows

Models = Literal["dense", "moe"]


@dataclass(frozen=True)
class Reading:
    """A server reads `format` of `models`: "dense", "moe" or "any"."""

    server: str
    models: str
    format: str
    standing: Standing
    source: str


def servers() -> list[str]:
    """The servers of which it is known what they read."""
    return list(dict.fromkeys(reading.server for reading in _readings()))


def read_by(server: str, models: Models) -> list[Reading]:
    """What a server reads of such models, best first."""
    return [r for r in _readings() if r.server == server and r.models in ("any", models)]


@functools.cache
def _readings() -> tuple[Reading, ...]:
    text = resources.files("isthmus.chips").joinpath("servers.csv").read_text(encoding="utf-8")
    return tuple(Reading(**row) for row in csv_rows(text))  # pyright: ignore[reportArgumentType]
