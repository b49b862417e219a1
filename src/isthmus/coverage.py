"""Coverage: what a chip's software makes of a model, from the vendor's tables alone. Needs no chip and no weights."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from isthmus.chips import Chip, get_chip
from isthmus.chips.rehearse import profile_of
from isthmus.chips.rehearse.fused import ShapeRule, fused_tables_of
from isthmus.chips.rehearse.tables import STATUSES
from isthmus.chips.wheel import Software, software_of
from isthmus.errors import IsthmusError
from isthmus.probes.static import (
    NeedFound,
    OperatorShare,
    StaticCoverage,
    need_sentence,
    needs_of,
    sizes_of,
    static_coverage,
)
from isthmus.probes.static_trace import Layout
from isthmus.progress import Watch
from isthmus.recipe import Recipe, apply_override, load_recipe, parse_recipe, preset_names
from isthmus.records import Use
from isthmus.run import RunFolder

SHOWN = 12
"""Operators in a table, beside all that are missing, fall back or may do so."""
ALWAYS_SHOWN = ("fallback", "none", "unknown")


@dataclass(frozen=True)
class Report:
    """What `isthmus coverage` found. `rules` are the documented shape rules that were looked at: whether each holds.

    `software` is what a wheel or an installation added to the chip's tables.
    """

    model: str
    chip: Chip
    ranks: int
    uses: list[StaticCoverage]
    needs: list[NeedFound]
    rules: list[tuple[ShapeRule, bool]]
    software: Software

    @property
    def trains(self) -> bool:
        """Whether nothing that training needs is missing or refused."""
        return not self._reasons("training")

    def verdict(self, use: Use) -> str:
        """One line: whether this use is possible, and what it costs."""
        found = [one for one in self.uses if one.use == use]
        if reasons := self._reasons(use):
            return f"impossible: {'; '.join(reasons)}"
        waits = sorted({name for one in found for name in one.found.operators["fallback"]})
        unlisted = sorted({name for one in found for name in one.found.operators["unknown"]})
        shares = "; ".join(f"{one.what}: {one.headline()}" for one in found)
        if waits:
            how = "possible, but not fit: every step is" if use == "training" else "possible,"
            return f"{how} waiting for the host's CPU in {', '.join(waits)}. {shares}"
        if unlisted:
            return f"not known of {', '.join(unlisted)}. {shares}"
        return f"possible. {shares}"

    def _reasons(self, use: Use) -> list[str]:
        """Why a use cannot run at all."""
        found = [reason for one in self.uses if one.use == use for reason in one.impossible]
        return list(dict.fromkeys([*self.software.blocking, *found]))


def execute(
    target: str,
    watch: Watch,
    *,
    chip: str,
    ranks: int | None,
    as_json: bool,
    overrides: tuple[str, ...] = (),
    wheel: Path | None = None,
    cann: Path | None = None,
    write_table: Path | None = None,
) -> Report:
    """Trace TARGET's model at full size, join it with the tables of `chip`, and print what was found.

    The operators of a `wheel` take the place of those of the tables, and are written to `write_table`; `cann` is an
    installation whose symbols are held against what the wheel, or the installed package, needs. Raises IsthmusError for
    a chip without tables, and for ranks that cannot divide the model.
    """
    recipe = recipe_of(target, chip, ranks, overrides)
    software = software_of(profile_of(chip), wheel, cann, write_table)
    report = examine(recipe, get_chip(chip), software, ranks or _ranks_of(recipe, chip))
    if as_json:
        watch.console.print_json(json.dumps(as_dictionary(report)))
    else:
        watch.console.print(render(report))
    return report


def examine(recipe: Recipe, chip: Chip, software: Software, ranks: int) -> Report:
    """The report on a recipe's model with so many training processes."""
    profile = software.profile
    layout = Layout.of(recipe.model, recipe.train, ranks)
    sizes = sizes_of(recipe, layout)
    checked = [(rule, rule.holds(sizes)) for rule in fused_tables_of(chip.slug).rules]
    uses: tuple[Use, ...] = ("training", "serving")
    return Report(
        model=recipe.name,
        chip=chip,
        ranks=ranks,
        uses=static_coverage(recipe, chip, profile, layout),
        needs=[need for use in uses for need in needs_of(recipe, layout, chip, profile, use)],
        rules=[(rule, holds) for rule, holds in checked if holds is not None],
        software=software,
    )


def recipe_of(target: str, chip: str, ranks: int | None, overrides: tuple[str, ...]) -> Recipe:
    """The recipe that TARGET is, or one that does nothing but train and serve TARGET's model on `chip`."""
    path = Path(target)
    if path.suffix == ".toml":
        return load_recipe(path, overrides)
    if (path / "recipe.json").is_file():
        if overrides:
            raise IsthmusError("--set goes with a recipe or a model; a run folder keeps the recipe it was made from")
        return RunFolder.open(path).recipe
    if (path / "config.json").is_file():
        return _recipe_around(path.resolve().name, {"from": str(path.resolve())}, chip, ranks, overrides)
    if target in preset_names():
        return _recipe_around(target, {"preset": target}, chip, ranks, overrides)
    raise IsthmusError(
        f"{target} is no recipe (a .toml file), no run folder, no folder with a config.json, and no preset; "
        f"presets: {', '.join(preset_names())}"
    )


def _recipe_around(
    name: str, model: dict[str, Any], chip: str, ranks: int | None, overrides: tuple[str, ...]
) -> Recipe:
    """Muon for the matrices and AdamW for the rest, so that both optimisers are looked at."""
    optimizer = {"name": "muon", "learning_rate": 1e-3, "matrix_learning_rate": 1e-2}
    kept = "".join(letter for letter in name.lower() if letter.isalnum() or letter in "._-")
    tree: dict[str, Any] = {
        "name": kept.lstrip("._-") or "model",
        "model": model,
        "pools": {"target": {"chip": chip, "count": ranks or 1, "rehearsed": True}},
        "place": {stage: ["target"] for stage in ("train", "rollout", "serve")},
        "sft": {"steps": 1, "optimizer": optimizer},
        "rl": {"steps": 1, "optimizer": {"name": "adamw", "learning_rate": 1e-3}},
    }
    for override in overrides:
        apply_override(tree, override)
    return parse_recipe(tree)


def _ranks_of(recipe: Recipe, chip: str) -> int:
    """Training processes of the first pool for training that has this chip; one if none has."""
    pools = [recipe.pools[name] for name in recipe.place.train]
    return next((pool.ranks or pool.count for pool in pools if pool.chip == chip), 1)


def render(report: Report) -> RenderableType:
    """A table per use, the fused operators, the broken shape rules, and a verdict for training and for serving."""
    heading = f"{report.model} on {report.chip.name}: what its software makes of it (a rehearsal, not a measurement)"
    parts: list[RenderableType] = [Text(heading, style="bold")]
    parts += [_table(found) for found in report.uses]
    known = any(need.usable or need.unusable for need in report.needs)
    if not known:
        parts.append(Text(f"no table of fused operators of {report.chip.name} is known"))
    for use in ("training", "serving") if known else ():
        needs = [need for need in report.needs if need.use == use]
        lines = [f"   {need_sentence(need)}" for need in needs if need.usable or need.unusable]
        bare = [need.need for need in needs if not need.usable and not need.unusable]
        lines += [f"   nothing fused is known for {', '.join(bare)}"] if bare else []
        parts.append(Text("\n".join([f"fused operators for {use}", *lines])))
    broken = [rule for rule, holds in report.rules if not holds]
    lines = [f"{len(report.rules)} documented rules on shapes looked at, {len(broken)} not kept"]
    lines += [f"   {rule_sentence(rule)}" for rule in broken]
    sources = dict.fromkeys(source for found in report.uses for source in found.sources)
    lines += ["", *(f"   {source}" for source in (*sources, *report.software.notes))]
    lines += [*(f"   warning: {problem}" for problem in report.software.warnings), ""]
    for use in ("training", "serving"):
        lines.append(f"{use}: {report.verdict(use)}")
    return Group(*parts, Text("\n".join(lines)))


def rule_sentence(rule: ShapeRule) -> str:
    note = f" ({rule.note})" if rule.note else ""
    return f"{rule.operator} wants {rule.quantity} {rule.rule}{note}: {rule.source}"


def _table(found: StaticCoverage) -> RenderableType:
    table = Table(box=box.SIMPLE_HEAD, title=f"{found.use}: {escape(found.what)}", title_justify="left")
    for title in ("operator", "on the chip", f"share of {found.basis}", "calls", "dtypes", "to know"):
        table.add_column(title, overflow="fold")
    shown = [
        *found.rows[:SHOWN],
        *(row for row in found.rows[SHOWN:] if row.status in ALWAYS_SHOWN or row.may_fall_back),
    ]
    for row in shown:
        table.add_row(
            escape(row.operator),
            row.status,
            f"{row.shares[found.basis]:.2%}",
            f"{row.calls:,}",
            ", ".join(row.dtypes),
            escape(", ".join(_remarks(row))),
        )
    left = [row for row in found.rows if row not in shown]
    lines = [f"   {len(left)} more operators, {sum(row.shares[found.basis] for row in left):.2%} of {found.basis}"]
    made = [row.operator for row in found.rows if row.status in ("generic", "decomposes") and row.shares[found.basis]]
    lines += [f"   made of other operators: {', '.join(made)}"] if made else []
    lines += [f"   {sentence}" for sentence in found.collectives.values()]
    lines += [f"   {note}" for note in found.collective_notes]
    return Group(table, Text("\n".join(lines), style="dim"), Text())


def _remarks(row: OperatorShare) -> list[str]:
    remarks = [f"{dtype} is refused" for dtype in row.refused]
    return [*remarks, *(["not deterministic by default"] if row.unrepeatable else []), *row.cautions]


def as_dictionary(report: Report) -> dict[str, Any]:
    """The report as JSON values."""
    return {
        "model": report.model,
        "chip": report.chip.slug,
        "rehearsed": True,
        "ranks": report.ranks,
        "uses": [_use(found) for found in report.uses],
        "needs": [dataclasses.asdict(need) for need in report.needs],
        "rules": [{**dataclasses.asdict(rule), "holds": holds} for rule, holds in report.rules],
        "software": {
            "version": report.software.profile.version,
            "notes": list(report.software.notes),
            "warnings": list(report.software.warnings),
            "blocking": list(report.software.blocking),
        },
        "verdict": {use: report.verdict(use) for use in ("training", "serving")},
        "trains": report.trains,
    }


def _use(found: StaticCoverage) -> dict[str, Any]:
    return {
        "use": found.use,
        "what": found.what,
        "basis": found.basis,
        "least_seconds": found.seconds,
        **found.totals,
        "impossible": found.impossible,
        "shares": {status: found.share(status) for status in STATUSES},
        "operators": [dataclasses.asdict(row) for row in found.rows],
        "collectives": found.collectives,
        "collective_notes": list(found.collective_notes),
        "sources": list(found.sources),
    }
