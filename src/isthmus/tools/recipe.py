"""What may stand in a recipe: every key with type, default, unit and description, read off the schema."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import replace

from isthmus.algos import algorithm_names, get_algorithm
from isthmus.errors import suggestion
from isthmus.recipe.describe import NAME, Key, Table, tables
from isthmus.recipe.section import RecipeError
from isthmus.rewards import reward_kinds, reward_options_class
from isthmus.tasks import task_kinds, task_options_class

WIDEST = 100
COLUMN = 32
HOW = "`isthmus recipe SECTION` shows the keys of a section, `isthmus recipe SECTION.KEY` one of them."
REFRESH = "isthmus recipe --markdown > docs/recipe.md"


def every_table() -> list[Table]:
    """The tables of a recipe, with the options of each algorithm, kind of task and kind of reward."""
    return tables(
        {
            "step.options": {f'algorithm = "{name}"': get_algorithm(name).Config for name in algorithm_names()},
            f"tasks.{NAME}": {f'kind = "{kind}"': task_options_class(kind) for kind in task_kinds()},
            f"rewards.{NAME}": {f'kind = "{kind}"': reward_options_class(kind) for kind in reward_kinds()},
        }
    )


def execute(place: str | None, markdown: bool = False) -> str:
    """What there is at a place, a section or a key of one, or all sections; as the page docs/recipe.md if asked to.

    Raises RecipeError with a suggestion if there is no such place.
    """
    every = every_table()
    if markdown:
        return page(every)
    if not place:
        return "\n".join(_overview(every))
    asked = place.strip("[]").split(".")
    chosen = [one for one in every if _lies_in(one.path, asked)]
    if not chosen:
        *parents, name = asked
        holders = [one for one in every if _is_at(one.path, parents)]
        chosen = [
            replace(one, about="", keys=[key for key in one.keys if key.name == name])
            for one in holders
            if any(key.name == name for key in one.keys)
        ]
    if not chosen:
        raise RecipeError(f"a recipe has no {place!r}{_meant(every, asked)}")
    return "\n\n".join("\n".join(_shown(one)) for one in chosen)


def _is_at(path: str, asked: list[str]) -> bool:
    parts = path.split(".") if path else []
    return len(parts) == len(asked) and all(part in (NAME, one) for part, one in zip(parts, asked, strict=True))


def _lies_in(path: str, asked: list[str]) -> bool:
    return _is_at(".".join(path.split(".")[: len(asked)]), asked)


def _meant(every: list[Table], asked: list[str]) -> str:
    """What a place that is not there may have been meant to be."""
    named = [f"{one.path}.{key.name}" for one in every for key in one.keys if key.name == asked[-1] and one.path]
    if named:
        return f"; did you mean {' or '.join(map(repr, dict.fromkeys(named)))}?"
    parents = asked[:-1]
    keys = {key.name for one in every if _is_at(one.path, parents) for key in one.keys}
    below = {one.path.split(".")[0] for one in every if one.path} if not parents else set()
    if not keys and parents:
        return _meant(every, parents)
    return suggestion(asked[-1], keys | below)


def _overview(every: list[Table]) -> Iterator[str]:
    yield from textwrap.wrap(f"A recipe is a TOML file. {HOW}", _width())
    yield ""
    first, *rest = every
    for key in first.keys:
        if key.type != "table":
            yield from _entry(f"  {_assignment(key)}", key.about)
    for one in rest:
        if not one.when and "." not in one.path.removesuffix(f".{NAME}"):
            yield from _entry(f"  {one.title}", one.summary.partition(";")[0])


def _shown(table: Table) -> Iterator[str]:
    if table.path:
        yield table.title
    yield from textwrap.wrap(table.about, _width())
    for key in table.keys:
        yield ""
        details = [key.type, key.shown_unit, key.default if key.default in ("required", "absent") else ""]
        yield from _entry(f"  {_assignment(key)}", ", ".join(filter(None, details)))
        yield from textwrap.wrap(key.about, _width(), initial_indent=" " * 6, subsequent_indent=" " * 6)


def _assignment(key: Key) -> str:
    return key.name if key.default in ("required", "absent") else f"{key.name} = {key.default}"


def _entry(left: str, right: str) -> Iterator[str]:
    """Two columns; a left one that is too wide stands on a line of its own."""
    indent = " " * COLUMN
    if len(left) >= COLUMN:
        yield left
        left = ""
    yield from textwrap.wrap(right, _width(), initial_indent=left.ljust(COLUMN), subsequent_indent=indent)


def _width() -> int:
    return min(shutil.get_terminal_size().columns, WIDEST)


def page(every: list[Table]) -> str:
    """docs/recipe.md."""
    lines = ["# Every key of a recipe", "", f"Read off the schema by `{REFRESH}`. {HOW}"]
    for one in every:
        lines += ["", f"## `{one.title}`" if one.path else "## Keys that stand before the first section", "", one.about]
        lines += ["", "| Key | Type | Unit | Default | What it is |", "|---|---|---|---|---|"]
        lines += [
            f"| `{key.name}` | {key.type} | {key.shown_unit} | "
            f"{key.default if key.default in ('required', 'absent') else f'`{key.default}`'} | {key.about} |"
            for key in one.keys
        ]
    return "\n".join(lines)
