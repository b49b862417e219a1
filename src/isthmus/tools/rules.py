"""`isthmus rules`: what the dated records say of a chip, a buyer and a place, with each step of the arithmetic."""

from __future__ import annotations

import json
from datetime import date

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from isthmus.chips import load_chips
from isthmus.chips.trade import EFFECTS, trade_facts
from isthmus.errors import IsthmusError
from isthmus.progress import Watch
from isthmus.records import RuleFinding, RuleStep, Ruling
from isthmus.rules import (
    UNKNOWN,
    Amount,
    Buyer,
    any_holds,
    export_class,
    judge,
    machine_class,
    notice,
    numbers_of,
    warning,
    window,
)

_COLOURS = {"refused": "red", "licence": "yellow", "unknown": "yellow", "caution": "yellow", "nothing found": "green"}
_SIDES = {"US": "United States", "CN": "China"}
_STEPS = {
    "tpp": "TPP",
    "pd": "PD",
    "io_gbs": "links",
    "mem_bw_gbs": "memory bandwidth",
    "mbd": "memory bandwidth density",
}


def execute(
    slug: str | None,
    as_of: date,
    watch: Watch,
    *,
    buyer_parent: str | None = None,
    site: str | None = None,
    count: int | None = None,
    state_funded: bool | None = None,
    as_json: bool = False,
) -> Ruling | None:
    """Print the ruling on one chip and return it; without a chip print the classes of all, and return None.

    Raises IsthmusError for an unknown chip or country, and for a chip without a buyer.
    """
    if slug is None:
        if buyer_parent or site or count:
            raise IsthmusError(
                "name a chip: --buyer-parent, --site and --count are about one; `isthmus chips` lists them"
            )
        _print_classes(as_of, watch, as_json)
        return None
    if not (buyer_parent and site):
        raise IsthmusError(
            "say who buys and where: --buyer-parent CC is the country of the buyer's ultimate parent, --site CC that "
            "in which the chips stand, two letters each, such as --buyer-parent CN --site MY"
        )
    ruling = judge(slug, Buyer(buyer_parent, site, count, state_funded), as_of)
    if as_json:
        watch.console.print_json(json.dumps({"notice": notice(ruling), **ruling.model_dump(mode="json")}))
    else:
        watch.console.print(render(ruling))
    return ruling


def render(ruling: Ruling) -> RenderableType:
    """A ruling as a person reads it: the answer, the arithmetic, the records by side, and what it is not."""
    asked = f"parent {ruling.buyer_parent}, site {ruling.site}, as of {ruling.as_of}"
    title = Text.assemble((ruling.chip, "bold"), f"  {asked}: ", (ruling.answer, _COLOURS[ruling.answer]))
    parts: list[RenderableType] = [title]
    if (why := warning(ruling)) is not None and ruling.answer != "refused":
        parts.append(Text(f"{why}."))
    if ruling.maker is None:
        parts.append(Text("Its maker is in no record: nothing can be applied to it."))
    parts += [_arithmetic(ruling), *(_side(ruling, side) for side in _SIDES if _of(ruling, side))]
    return Group(*parts, Text(notice(ruling), style="dim"))


def _arithmetic(ruling: Ruling) -> RenderableType:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("number")
    table.add_column("value", justify="right")
    table.add_column("how", overflow="fold")
    for step in ruling.steps:
        table.add_row(_STEPS[step.name], _amount(step), escape(step.formula))
    amounts = {step.name: Amount(step.value, step.low) for step in ruling.steps}
    for one in trade_facts().classes:
        if one.holds_on(ruling.as_of):
            met = {True: "yes", False: "no", None: UNKNOWN}[any_holds(one.any_of, amounts)]
            table.add_row(one.name, met, escape(" or ".join(one.any_of)))
    table.add_row("class", ruling.export_class, "the first of these that holds")
    table.add_row("window of January 2026", ruling.window, "TPP < 21,000 and memory bandwidth < 6,500 GB/s")
    return table


def _side(ruling: Ruling, side: str) -> RenderableType:
    lines: list[RenderableType] = [Text(_SIDES[side], style="bold")]
    for found in _of(ruling, side):
        since = f"since {found.since:%Y-%m-%d}" if found.day_known else f"since {found.since:%Y-%m}"
        may = "" if found.certain else "may apply: "
        head = Text(f"{may}{found.effect} · {found.kind}, {since} · {found.record}")
        stale = f" Expired on {found.expires}: look again." if found.stale else ""
        told = Group(Text(f"{found.what}{stale}"), Text(f"{found.why}; {found.source}", style="dim"))
        lines += [Padding(head, (0, 0, 0, 2)), Padding(told, (0, 0, 0, 4))]
    return Group(*lines, Text())


def _of(ruling: Ruling, side: str) -> list[RuleFinding]:
    """The findings of a side, the strictest first."""
    found = [one for one in ruling.findings if one.side == side]
    return sorted(found, key=lambda one: (EFFECTS.index(one.effect), one.certain), reverse=True)


def _amount(step: RuleStep) -> str:
    if step.value is not None:
        return f"{step.value:,.5g}" if step.value < 1000 else f"{step.value:,.0f}"
    return UNKNOWN if step.low is None else f"≥ {step.low:,.4g}"


def _print_classes(as_of: date, watch: Watch, as_json: bool) -> None:
    facts = trade_facts()
    rows = []
    for slug, chip in load_chips().items():
        numbers = numbers_of(load_chips()[facts.machines.get(slug, slug)])
        steps = {step.name: step for step in numbers.steps}
        klass, maker = export_class(numbers, as_of), facts.makers.get(chip.vendor)
        row = {"chip": slug, "maker": maker, "tpp": steps["tpp"], "pd": steps["pd"]}
        shown = machine_class(klass) if slug in facts.machines else klass
        rows.append({**row, "class": shown, "window": window(numbers, klass, maker, as_of)})
    said = (
        f"As of {as_of}, from records that end on {facts.ends}: by arithmetic alone. A chip can be listed by name "
        "below every threshold; `isthmus rules CHIP` asks that, too. It is not current, and it is not legal advice."
    )
    if as_json:
        plain = [{**row, "tpp": row["tpp"].model_dump(), "pd": row["pd"].model_dump()} for row in rows]
        watch.console.print_json(json.dumps({"notice": said, "as_of": str(as_of), "chips": plain}))
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("chip", "maker", "TPP", "PD", "class", "window"):
        table.add_column(title, no_wrap=True, justify="right" if title in ("TPP", "PD") else "left")
    for row in rows:
        table.add_row(
            row["chip"], row["maker"] or UNKNOWN, _amount(row["tpp"]), _amount(row["pd"]), row["class"], row["window"]
        )
    watch.console.print(Group(table, Text(said, style="dim")))
