"""Chips as a person reads them. A value that nobody published is shown as unknown."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from isthmus.chips._facts import FIGURES, TEXTS, Chip
from isthmus.run import Figure

UNKNOWN, NOT_PUBLISHED = "unknown", "–"
_COLUMNS = {
    "bf16_tflops": "bf16\nTFLOPS",
    "int8_tops": "int8\nTOPS",
    "mem_gb": "GB",
    "mem_bw_gbs": "GB/s",
    "tpp": "TPP",
}
_TO_READ = f"""\
Declared figures; {NOT_PUBLISHED} was not published. `isthmus chips NAME` shows one chip
with its dtypes, formats and links, and the source of each fact."""


def describe_chips(chips: list[Chip]) -> RenderableType:
    """One line per chip, within 80 columns."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("chip", style="bold", no_wrap=True)
    table.add_column("vendor", no_wrap=True)
    for title in _COLUMNS.values():
        table.add_column(title, justify="right", no_wrap=True)
    for chip in chips:
        table.add_row(chip.slug, chip.vendor, *(_short(getattr(chip, column), NOT_PUBLISHED) for column in _COLUMNS))
    return Group(table, Text(_TO_READ, style="dim"))


def describe_chip(chip: Chip, device: str, can_rehearse: bool) -> RenderableType:
    """Every fact of one chip, with its source."""
    heading = Text.assemble((chip.slug, "bold"), f"  {chip.name}, {chip.vendor}")
    parts: list[RenderableType] = [heading, _figures(chip), _properties(chip, device, can_rehearse)]
    if chip.note:
        parts.append(Text(f"note: {chip.note}"))
    return Group(*parts)


def _figures(chip: Chip) -> RenderableType:
    figures = chip.figures()
    sources = list(dict.fromkeys(figure.source for figure in figures.values() if figure is not None))
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("fact")
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("source")
    for name, figure in figures.items():
        table.add_row(
            FIGURES[name][0], _long(figure, FIGURES[name][1]), f"({sources.index(figure.source) + 1})" if figure else ""
        )
    return Group(table, *(Text(f" ({number}) {source}", style="dim") for number, source in enumerate(sources, start=1)))


def _properties(chip: Chip, device: str, can_rehearse: bool) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 1))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    rows = {
        "dtypes": _listed(chip.dtypes),
        "weight formats": _listed(chip.formats),
        "collectives": _listed(chip.collectives),
        "engines": _listed(chip.engines),
        "known from": chip.capabilities.source,
        "generation": chip.generation or UNKNOWN,
        **{label: chip.texts.get(column, UNKNOWN) for column, label in TEXTS.items()},
        "torch device": device,
        "can be rehearsed": "yes" if can_rehearse else "no: there are no tables of its software",
        "confidence": chip.confidence or UNKNOWN,
    }
    for label, value in rows.items():
        table.add_row(label, escape(value))
    return table


def _short(figure: Figure | None, unknown: str = UNKNOWN) -> str:
    if figure is None:
        return unknown
    if figure.value is not None:
        return f"{figure.value:,.10g}"
    return f"≥ {figure.low:,.10g}" if figure.low is not None else unknown


def _long(figure: Figure | None, unit: str) -> str:
    text = _short(figure)
    return text if text == UNKNOWN else f"{text} {unit}"


def _listed(names: tuple[str, ...] | None) -> str:
    return ", ".join(names) if names else UNKNOWN
