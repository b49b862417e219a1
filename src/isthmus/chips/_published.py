"""What others published: measured results, the devices and models that they are about. A table per file."""

from __future__ import annotations

import functools
from importlib import resources

from isthmus.lines import csv_rows


@functools.cache
def published_rows(name: str) -> tuple[dict[str, str], ...]:
    """The rows of `chips/published/NAME.csv`; each has a `source`."""
    text = resources.files("isthmus.chips").joinpath("published", f"{name}.csv").read_text(encoding="utf-8")
    return tuple(csv_rows(text))
