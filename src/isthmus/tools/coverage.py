"""Coverage: what a chip's software makes of a model, from the vendor's tables alone. Needs no chip and no weights."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.markup import escape
from rich.padding import Padding
from rich.styled import Styled
from rich.table import Table
from rich.text import Text

from isthmus.chips import Chip, check_tables, get_chip
from isthmus.chips.rehearse import profile_of
from isthmus.chips.rehearse.fused import ShapeRule, fused_tables_of
from isthmus.chips.rehearse.tables import STATUSES
from isthmus.chips.wheel import Software, software_of
from isthmus.errors import IsthmusError, suggestion
from isthmus.probes.static.check import (
    BASIS_NAMES,
    HeldRule,
    NeedFound,
    OperatorShare,
    StaticCoverage,
    held_rules,
    need_answer,
    needs_of,
    percent,
    rule_text,
    serves_int8,
    sites_of,
    static_coverage,
)
from isthmus.probes.static.sites import Site
from isthmus.probes.static.trace import Layout
from isthmus.probes.static.weights import StoredWeights, stored_weights
from isthmus.progress import Watch
from isthmus.recipe.read import apply_override, load_recipe, parse_recipe, preset_names
from isthmus.recipe.schema import Recipe
from isthmus.records import Use
from isthmus.run import RunFolder

SHOWN = 12
"""Operators in a table, beside all that are missing, fall back or may do so."""
ALWAYS_SHOWN = ("fallback", "none", "unknown")
LEAST_WIDTH, ROOM_FOR_DTYPES = 80, 100
"""Columns of a terminal: for which names of operators are kept whole, and from which on a table lists dtypes."""
USES: tuple[Use, ...] = ("training", "serving")


@dataclass(frozen=True)
class CoverageReport:
    """What `isthmus coverage` found. `rules` are the documented shape rules that are about an operation of the model:
    which, and whether it keeps to the rule. `software` is what a wheel or an installation added to the chip's tables.
    `weights` are those of a checkpoint that is quantised, as they are stored; the operators are those of its
    dequantised weights.
    """

    model: str
    chip: Chip
    ranks: int
    uses: list[StaticCoverage]
    needs: list[NeedFound]
    rules: list[HeldRule]
    software: Software
    weights: StoredWeights | None = None

    @property
    def trains(self) -> bool:
        """Whether nothing that training needs is missing or refused."""
        return not self._reasons("training")

    def of(self, use: Use) -> list[StaticCoverage]:
        return [one for one in self.uses if one.use == use]

    def answer(self, use: Use) -> str:
        """Whether this use is possible."""
        found = self.of(use)
        if reasons := self._reasons(use):
            return f"impossible: {'; '.join(reasons)}"
        waits = sorted({name for one in found for name in one.found.operators["fallback"]})
        unlisted = sorted({name for one in found for name in one.found.operators["unknown"]})
        if waits:
            how = "possible, but not fit: every step is" if use == "training" else "possible,"
            return f"{how} waiting for the host's CPU in {', '.join(waits)}"
        return f"not known of {', '.join(unlisted)}" if unlisted else "possible"

    def verdict(self, use: Use) -> str:
        """One line: whether this use is possible, and what it costs."""
        shares = "; ".join(f"{one.what}: {one.headline()}" for one in self.of(use))
        return self.answer(use) if self._reasons(use) else f"{self.answer(use)}. {shares}"

    def _reasons(self, use: Use) -> list[str]:
        """Why a use cannot run at all."""
        found = [reason for one in self.of(use) for reason in one.impossible]
        stored = self.weights
        if use == "serving" and stored is not None and stored.computed is False:
            found.append(f"weights stored in {stored.form}: {stored.detail}; convert them first (isthmus convert)")
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
) -> CoverageReport:
    """Trace TARGET's model at full size, join it with the tables of `chip`, and print what was found.

    The operators of a `wheel` take the place of those of the tables, and are written to `write_table`; `cann` is an
    installation whose symbols are held against what the wheel, or the installed package, needs. Raises IsthmusError for
    a chip without tables, and for ranks that cannot divide the model.
    """
    check_tables(chip)
    recipe = recipe_of(target, chip, ranks, overrides)
    software = software_of(profile_of(chip), wheel, cann, write_table)
    report = examine(recipe, get_chip(chip), software, ranks or _ranks_of(recipe, chip))
    if as_json:
        watch.console.print_json(json.dumps(as_dictionary(report)))
    else:
        show(report, watch.console)
    return report


def examine(recipe: Recipe, chip: Chip, software: Software, ranks: int) -> CoverageReport:
    """The report on a recipe's model with so many training processes."""
    profile = software.profile
    layout = Layout.of(recipe.model, recipe.train, ranks)
    uses = static_coverage(recipe, chip, profile, layout)
    sites = {use: sites_of(uses, use) for use in USES}
    folder = recipe.model.from_
    stored = stored_weights(folder, recipe.model, chip, profile) if folder is not None else None
    int8 = stored.int8 if stored is not None else serves_int8(recipe)
    needs = [need for use in USES for need in needs_of(sites[use], chip, profile, use, int8=int8)]
    held = [
        one
        for use in USES
        for one in held_rules(fused_tables_of(chip.slug).rules, sites[use], use)
        if one.rule.operator in _offered(needs, use)
    ]
    return CoverageReport(
        model=recipe.name,
        chip=chip,
        ranks=ranks,
        uses=uses,
        needs=needs,
        rules=_once_each(held),
        software=software,
        weights=stored,
    )


def _offered(needs: list[NeedFound], use: Use) -> set[str]:
    """The fused operators that are there for a need of the model in a use: rules of others are not about it."""
    return {one.operator for need in needs if need.use == use for one in (*need.usable, *need.unusable)}


def _once_each(held: list[HeldRule]) -> list[HeldRule]:
    """Of a rule on both uses, what breaks it, if anything does."""
    found: dict[ShapeRule, HeldRule] = {}
    for one in held:
        if one.rule not in found or not one.holds:
            found[one.rule] = one
    return list(found.values())


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
        f"{target} is no recipe (a .toml file), no run folder, no folder with a config.json, and no preset"
        + suggestion(target, preset_names(), f"presets: {', '.join(preset_names())}")
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
        "step": [
            {"name": "taught", "kind": "sft", "steps": 1, "optimizer": optimizer},
            {
                "name": "reinforced",
                "kind": "rl",
                "from": "taught",
                "steps": 1,
                "optimizer": {"name": "adamw", "learning_rate": 1e-3},
                "rollout_format": "bf16",
            },
        ],
        "handoff": {"format": "bf16"},
    }
    for override in overrides:
        apply_override(tree, override)
    return parse_recipe(tree)


def _ranks_of(recipe: Recipe, chip: str) -> int:
    """Training processes of the first pool for training that has this chip; one if none has."""
    pools = [recipe.pools[name] for name in recipe.place.train]
    return next((pool.ranks or pool.count for pool in pools if pool.chip == chip), 1)


def show(report: CoverageReport, console: Console) -> None:
    """Print a report. A terminal narrower than `LEAST_WIDTH` folds the lines itself, so that no name is cut."""
    console.width = max(console.width, LEAST_WIDTH)
    console.print(render(report))


def render(report: CoverageReport) -> RenderableType:
    """A table per use, the fused operators, the broken shape rules, and a verdict for training and for serving."""
    heading = f"{report.model} on {report.chip.name}: what its software makes of it (a rehearsal, not a measurement)"
    parts: list[RenderableType] = [Text(heading, style="bold")]
    if report.weights is not None:
        said = Text(f"\nweights as stored: {report.weights.said}", style="italic")
        parts += [said, _indented(_of_weights(report.weights))]
    for found in report.uses:
        parts += [Text(f"\n{found.use}: {found.what}", style="italic"), OperatorTable(found), *_notes(found)]
    parts += [Text(), *_fused(report), *_rules(report)]
    sources = dict.fromkeys(source for found in report.uses for source in found.sources)
    lines = [*sources, *report.software.notes, *(f"warning: {problem}" for problem in report.software.warnings)]
    parts += [Text("from"), *map(_indented, lines), Text()]
    for use in USES:
        parts.append(Text(f"{use}: {report.answer(use)}", style="bold"))
        parts += [_indented(f"{one.what}: {one.headline()}") for one in report.of(use)]
    return Group(*parts)


def _of_weights(stored: StoredWeights) -> str:
    """What the chip makes of weights as they are stored, and what the tables below are about."""
    computes = {
        True: "the chip computes in it",
        False: "the chip does not compute in it",
        None: "whether the chip computes in it is not known",
    }
    below = "The operators below are those of its dequantised weights, with which training begins."
    return f"{computes[stored.computed]}: {stored.detail}. {below}"


@dataclass(frozen=True)
class OperatorTable:
    """The operators of a use, as wide as the terminal allows. A name is never broken: it can be looked up as it is."""

    found: StaticCoverage

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.table(wide=options.max_width >= ROOM_FOR_DTYPES)

    def table(self, wide: bool) -> Table:
        """With the dtypes of the calls if there is room for them. Shares are of the time, or of what it comes from."""
        rows = [self.cells(row, wide) for row in self.shown()]
        titles = ["operator", "on the\nchip", *(f"% of\n{basis}" for basis in self.found.bases), "calls"]
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for number, title in enumerate(titles):
            longest = max(map(_width, [title, *(row[number] for row in rows)]))
            side = "left" if number < 2 else "right"
            table.add_column(title, justify=side, no_wrap=True, min_width=longest, vertical="bottom")
        if wide:
            table.add_column("dtypes", overflow="fold")
        for row in rows:
            table.add_row(*map(escape, row if wide else row[:-1]))
        return table

    def shown(self) -> list[OperatorShare]:
        """The largest, and all that are missing, fall back or may do so."""
        rows = self.found.rows
        return [*rows[:SHOWN], *(row for row in rows[SHOWN:] if row.status in ALWAYS_SHOWN or row.may_fall_back)]

    def cells(self, row: OperatorShare, wide: bool) -> list[str]:
        shares = [f"{100 * row.shares[basis]:.2f}" for basis in self.found.bases]
        name = row.operator if wide else row.operator.replace(" (", "\n  (")
        return [name, row.status, *shares, f"{row.calls:,}", ", ".join(row.dtypes)]


def _width(text: str) -> int:
    return max(map(len, text.splitlines()), default=0)


def _notes(found: StaticCoverage) -> list[RenderableType]:
    """What there is to know beside the table: what it leaves out, what its operators are, and the collectives."""
    shown = OperatorTable(found).shown()
    left = [row for row in found.rows if row not in shown]
    lines: list[tuple[str, str]] = []
    if left:
        shares = zip(found.shares_of(left), found.bases, strict=True)
        lines.append(
            (f"{len(left)} more operators", " and ".join(f"{percent(n)} of the {BASIS_NAMES[b]}" for n, b in shares))
        )
    made = [row for row in found.rows if row.status in ("generic", "decomposes") and any(found.shares_of([row]))]
    lines += [("made of other operators", _names(made))] if made else []
    remarks: dict[str, list[OperatorShare]] = {}
    for row in found.rows:
        for remark in _remarks(row):
            remarks.setdefault(remark, []).append(row)
    lines += [(remark, _names(rows)) for remark, rows in remarks.items()]
    lines += [*found.collectives.items(), *(("collectives", note) for note in found.collective_notes)]
    return [Styled(_listed(lines), "dim")] if lines else []


def _names(rows: list[OperatorShare]) -> str:
    return ", ".join(row.operator for row in rows)


def _remarks(row: OperatorShare) -> list[str]:
    remarks = [f"{dtype} is refused" for dtype in row.refused] + list(row.weak)
    remarks += ["not deterministic by default"] if row.unrepeatable else []
    return [*remarks, *(caution.replace("_", " ") for caution in row.cautions)]


def _fused(report: CoverageReport) -> list[RenderableType]:
    """What a chip offers for each need of the model, if there is a table of that."""
    if not any(need.usable or need.unusable for need in report.needs):
        return [Text(f"no table of fused operators of {report.chip.name}, or of their rules on shapes, is known\n")]
    parts: list[RenderableType] = []
    for use in USES:
        needs = [need for need in report.needs if need.use == use]
        bare = [need.need for need in needs if not need.usable and not need.unusable]
        lines = [(need.need, need_answer(need)) for need in needs if need.usable or need.unusable]
        lines += [(need, "nothing fused is known") for need in bare]
        parts += [Text(f"fused operators for {use}"), _listed(lines), Text()]
    return parts


def _rules(report: CoverageReport) -> list[RenderableType]:
    """The documented rules on shapes that the model does not keep, each operator's together."""
    if not report.rules:
        return []
    broken: dict[tuple[str, Site, str], list[HeldRule]] = {}
    for held in report.rules:
        if not held.holds:
            broken.setdefault((held.rule.operator, held.site, held.rule.source), []).append(held)
    count = len(report.rules)
    kept = count - sum(map(len, broken.values()))
    heading = f"documented rules on shapes: {kept} of {count} are kept" + (", not these" if broken else "")
    parts: list[RenderableType] = [Text(heading)]
    for (operator, site, source), rules in broken.items():
        wants = "; ".join(map(_wanted, rules))
        parts += [_indented(f"{operator} wants {wants}")]
        parts += [_indented(f"of {site}", style="dim"), _indented(source, style="dim")]
    return [*parts, Text()]


def _wanted(held: HeldRule) -> str:
    note = held.rule.note
    return f"{rule_text(held.rule)} (here {held.here:g})" + (f", {note}" if note else "")


def _indented(text: str, style: str = "") -> RenderableType:
    return Padding(Text(text, style=style), (0, 0, 0, 3), expand=False)


def _listed(lines: list[tuple[str, str]]) -> RenderableType:
    """Pairs of a name and what is said of it; what does not fit in a line goes on below itself, between words."""
    longest = max((len(word) for _, text in lines for word in text.split()), default=0)
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True, min_width=max(len(name) for name, _ in lines))
    grid.add_column(overflow="fold", min_width=longest)
    for name, text in lines:
        grid.add_row(Text(name), Text(text))
    return Padding(grid, (0, 0, 0, 3), expand=False)


def as_dictionary(report: CoverageReport) -> dict[str, Any]:
    """The report as JSON values."""
    return {
        "model": report.model,
        "chip": report.chip.slug,
        "rehearsed": True,
        "ranks": report.ranks,
        "uses": [_use(found) for found in report.uses],
        "needs": [dataclasses.asdict(need) for need in report.needs],
        "weights": None if report.weights is None else dataclasses.asdict(report.weights),
        "rules": [
            {
                **dataclasses.asdict(one.rule),
                "about": {"kind": one.site.kind, **dict(one.site.sizes)},
                "here": one.here,
                "holds": one.holds,
            }
            for one in report.rules
        ],
        "software": {
            "version": report.software.profile.version,
            "notes": list(report.software.notes),
            "warnings": list(report.software.warnings),
            "blocking": list(report.software.blocking),
        },
        "verdict": {use: report.verdict(use) for use in USES},
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
