"""What engines on a chip are known not to run, or to run wrongly: shapes, formats, settings, with their sources."""

from __future__ import annotations

import functools
from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib import resources
from typing import Any, Literal, cast

from isthmus.lines import csv_rows

Breach = Literal["fail", "caution"]
Standing = Literal["documented", "read in code", "assumed"]
ANY = "any"
PARTS = {
    "latent attention": "self_attn.kv_b_proj.weight",
    "biased router": "mlp.gate.e_score_correction_bias",
    "routed experts": "mlp.experts.0.down_proj.weight",
}
"""What a rule may be about, beside `any` model, and how the published name ends of a tensor that shows it: a router
whose scores get a bias before it chooses is what engines give to the fused kernel for groups of experts."""


@dataclass(frozen=True)
class Rule:
    """`key` of the architecture, or `format`, must be one of `allowed` on the `chips` whose slugs match.

    It is `about` any model, or about those that have one of `PARTS`: nothing else is held against it. `allowed` is a
    list of values, `<=N`, `none`, or values with `!` in front that are not allowed. A breach is `fail` where the target
    cannot run it, and `caution` where it is a risk.
    """

    chips: str
    about: str
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


def rules_for(slug: str, tensors: Collection[str]) -> list[Rule]:
    """The rules of one chip that are about a model with tensors of these published names."""
    parts = {ANY, *(part for part, end in PARTS.items() if any(name.endswith(end) for name in tensors))}
    return [rule for rule in _rules() if fnmatch(slug, rule.chips) and rule.about in parts]


@functools.cache
def _rules() -> tuple[Rule, ...]:
    text = resources.files("isthmus.chips").joinpath("rules.csv").read_text(encoding="utf-8")
    return tuple(
        Rule(**{**row, "breach": cast(Breach, row["breach"]), "standing": cast(Standing, row["standing"])})
        for row in csv_rows(text)
    )
