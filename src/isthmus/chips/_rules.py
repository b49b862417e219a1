"""What engines on a chip are known not to run, or to run wrongly: shapes, formats, settings, with their sources."""

from __future__ import annotations

import csv
import functools
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib import resources
from typing import Any, Literal, cast

Breach = Literal["fail", "caution"]
Standing = Literal["documented", "read in code", "assumed"]


@dataclass(frozen=True)
class Rule:
    """`key` of the architecture, or `format`, must be one of `allowed` on the `chips` whose slugs match.

    `allowed` is a list of values, `<=N`, `none`, or values with `!` in front that are not allowed. A breach is `fail`
    where the target cannot run it, and `caution` where it is a risk.
    """

    chips: str
    architecture: str
    key: str
    allowed: str
    breach: Breach
    standing: Standing
    source: str
    why: str

    def holds(self, value: Any) -> bool:
        """Whether a value keeps the rule."""
        said = "none" if value is None else str(value)
        words = self.allowed.split()
        if self.allowed.startswith("<="):
            return value is None or value <= float(self.allowed.removeprefix("<="))
        if self.allowed.startswith("!"):
            return f"!{said}" not in words
        return said in words


def rules_for(slug: str, architecture: Literal["deepseek", "dense"]) -> list[Rule]:
    """The rules of one chip for one kind of architecture."""
    return [r for r in _rules() if fnmatch(slug, r.chips) and r.architecture in ("any", architecture)]


@functools.cache
def _rules() -> tuple[Rule, ...]:
    text = resources.files("isthmus.chips").joinpath("rules.csv").read_text(encoding="utf-8")
    return tuple(
        Rule(**{**row, "breach": cast(Breach, row["breach"]), "standing": cast(Standing, row["standing"])})
        for row in csv.DictReader(text.splitlines())
    )
