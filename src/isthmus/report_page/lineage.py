"""The lineage of a run as a picture: whose weights and whose data each step takes."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup, escape

from isthmus.report_page.chapters import Chapter

COLUMN, ROW, BOX, HEIGHT, MARGIN = 176, 56, 144, 42, 8
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
        parts.append(_box(places[root], root, "as it begins", "root"))
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
    """(column, row) of each box. A step stands right of all that it takes, in the row of its weights if that is free
    all the way there, so that no line runs behind another box."""
    places: dict[str, tuple[int, int]] = {}
    taken: set[tuple[int, int]] = set()

    def put(name: str, start: int, column: int, wished: int) -> None:
        rows = range(wished, wished + len(chapters) + 2)
        row = next(row for row in rows if not taken & {(at, row) for at in range(start, column + 1)})
        taken.update((at, row) for at in range(start, column + 1))
        places[name] = (column, row)

    for one in chapters:
        root = _root(one)
        if root not in places:
            put(root, 0, 0, 0)
        column = 1 + max(places[name][0] for name in (root, *one.data) if name in places)
        put(one.name, places[root][0] + 1, column, places[root][1])
    return places


def _edge(start: tuple[int, int], end: tuple[int, int], kind: str) -> str:
    x0, y0 = start[0] * COLUMN + MARGIN + BOX, start[1] * ROW + MARGIN + HEIGHT / 2
    x1, y1 = end[0] * COLUMN + MARGIN, end[1] * ROW + MARGIN + HEIGHT / 2
    bend = x0 + COLUMN - BOX
    middle = (x0 + bend) / 2
    return f'<path class="{kind}" d="M{x0:g} {y0:g}C{middle:g} {y0:g} {middle:g} {y1:g} {bend:g} {y1:g}H{x1:g}"/>'


def _box(place: tuple[int, int], name: str, said: str, css: str) -> str:
    x, y = place[0] * COLUMN + MARGIN, place[1] * ROW + MARGIN
    shown = name if len(name) <= 20 else f"{name[:19]}…"
    return (
        f'<g class="{css}"><rect x="{x}" y="{y}" width="{BOX}" height="{HEIGHT}" rx="6"/>'
        f'<text class="name" x="{x + BOX / 2:g}" y="{y + 18}">{escape(shown)}</text>'
        f'<text class="said" x="{x + BOX / 2:g}" y="{y + 33}">{escape(said)}</text></g>'
    )
