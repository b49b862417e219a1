"""The lineage of a run as a picture: whose weights and whose data each step takes."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup, escape

from isthmus.report_page.chapters import Chapter

COLUMN, ROW, BOX, HEIGHT, MARGIN = 210, 62, 168, 42, 8
MODEL = "model"
STATES = {True: "done", False: "waiting"}


def picture(chapters: Sequence[Chapter], handed_off: str) -> Markup:
    """Boxes from left to right, each to the right of what it takes: lines for weights, dashes for data."""
    places = _places(chapters)
    columns = 1 + max(column for column, _ in places.values())
    rows = 1 + max(row for _, row in places.values())
    width, height = columns * COLUMN, rows * ROW
    parts = [f'<svg class="lineage" viewBox="0 0 {width} {height}" role="img" aria-label="Lineage of the steps">']
    for one in chapters:
        parts.append(_edge(places[_root(one)], places[one.name], "weights"))
        parts += [_edge(places[name], places[one.name], "data") for name in one.data if name in places]
    for root in dict.fromkeys(_root(one) for one in chapters if _root(one) not in {c.name for c in chapters}):
        parts.append(_box(places[root], root, "the weights it begins with", "root"))
    for one in chapters:
        state = "done" if one.record is not None else "running" if one.events else "waiting"
        said = f"{one.what}, {state}" + (", handed off" if one.name == handed_off else "")
        parts.append(_box(places[one.name], one.name, said, f"{state}{' crosses' if one.name == handed_off else ''}"))
    return Markup("".join([*parts, "</svg>"]))


def _root(chapter: Chapter) -> str:
    """What a step starts from, as a box: a step, or a model by its name."""
    if chapter.start != MODEL:
        return chapter.start
    return MODEL if chapter.section.model is None else f"models.{chapter.section.model}"


def _places(chapters: Sequence[Chapter]) -> dict[str, tuple[int, int]]:
    """(column, row) of each box. A step stands right of all that it takes, and in the row of its weights if that is
    free there."""
    places: dict[str, tuple[int, int]] = {}
    for one in chapters:
        root = _root(one)
        if root not in places:
            places[root] = (0, _free_row(places, 0, 0))
        column = 1 + max(places[name][0] for name in (root, *one.data) if name in places)
        places[one.name] = (column, _free_row(places, column, places[root][1]))
    return places


def _free_row(places: dict[str, tuple[int, int]], column: int, wished: int) -> int:
    taken = {row for at, row in places.values() if at == column}
    return next(row for row in range(wished, wished + len(places) + 1) if row not in taken)


def _edge(start: tuple[int, int], end: tuple[int, int], kind: str) -> str:
    x0, y0 = start[0] * COLUMN + MARGIN + BOX, start[1] * ROW + MARGIN + HEIGHT / 2
    x1, y1 = end[0] * COLUMN + MARGIN, end[1] * ROW + MARGIN + HEIGHT / 2
    middle = (x0 + x1) / 2
    return f'<path class="{kind}" d="M{x0:g} {y0:g}C{middle:g} {y0:g} {middle:g} {y1:g} {x1:g} {y1:g}"/>'


def _box(place: tuple[int, int], name: str, said: str, css: str) -> str:
    x, y = place[0] * COLUMN + MARGIN, place[1] * ROW + MARGIN
    shown = name if len(name) <= 20 else f"{name[:19]}…"
    return (
        f'<g class="{css}"><rect x="{x}" y="{y}" width="{BOX}" height="{HEIGHT}" rx="6"/>'
        f'<text class="name" x="{x + BOX / 2:g}" y="{y + 18}">{escape(shown)}</text>'
        f'<text class="said" x="{x + BOX / 2:g}" y="{y + 33}">{escape(said)}</text></g>'
    )
