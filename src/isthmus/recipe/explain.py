"""What is wrong with a recipe, in the words of the one who wrote it."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Tag, ValidationError

from isthmus.errors import suggestion
from isthmus.recipe.section import Section


def explain(error: ValidationError, heading: str, kind: Any, within: tuple[str, ...] = (), given: Any = None) -> str:
    """A line per problem. `kind` is what was validated, a section or a union of them; `within` where it stands; in
    `given`, what was validated, tables of a list have their names."""
    lines = [heading]
    for problem in error.errors():
        location = problem["loc"]
        written, _ = _follow(kind, location, given)
        where = ".".join((*within, *written))
        if problem["type"] == "extra_forbidden":
            _, found = _follow(kind, location[:-1], given)
            lines.append(f"  unknown key {where}{suggestion(str(location[-1]), keys_of(found))}")
        elif problem["type"] in ("union_tag_not_found", "union_tag_invalid"):
            told = ", ".join(tagged_in(_follow(kind, location, given)[1]))
            lines.append(f"  {where}: its kind is one of {told}; write for example kind = {told.split(', ')[0]!r}")
        elif problem["type"] == "missing":
            lines.append(f"  {where} is missing")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            lines.append(f"  {where or 'recipe'}: {message}")
    return "\n".join(lines)


def keys_of(kind: Any) -> list[str]:
    """The keys of a section as a recipe writes them; none if `kind` is no section."""
    section = section_in(kind)
    return [field.alias or name for name, field in section.model_fields.items()] if section else []


def section_in(kind: Any) -> type[Section] | None:
    """The first section that an annotation speaks of."""
    if isinstance(kind, type) and issubclass(kind, Section):
        return kind
    return next(filter(None, map(section_in, typing.get_args(kind))), None)


def _follow(kind: Any, location: Sequence[int | str], given: Any) -> tuple[list[str], Any]:
    """(the location as the user writes it, what may stand there): pydantic adds the tag of a union to it, and has
    numbers for the tables of a list, which the user knows by name."""
    written = []
    for part in location:
        tagged = tagged_in(kind)
        if part in tagged:
            kind = tagged[str(part)]
        else:
            given = _within(given, part)
            name = given.get("name") if isinstance(part, int) and isinstance(given, dict) else None
            written.append(str(part if name is None else name))
            kind = _value(kind, part)
    return written, kind


def tagged_in(kind: Any) -> dict[str, Any]:
    """The members of a union that pydantic tells apart by a tag."""
    found: dict[str, Any] = {}
    for member in typing.get_args(kind):
        tags = [one.tag for one in typing.get_args(member) if isinstance(one, Tag)]
        found |= dict.fromkeys(tags, member) if typing.get_origin(member) is Annotated and tags else tagged_in(member)
    return found


def _within(given: Any, key: int | str) -> Any:
    try:
        return given[key]
    except (KeyError, IndexError, TypeError):
        return None


def _value(kind: Any, key: int | str) -> Any:
    if isinstance(key, int) and typing.get_origin(kind) is list:
        return typing.get_args(kind)[0]
    if typing.get_origin(kind) is dict:  # a table whose keys the user names, such as [pools.*]
        return typing.get_args(kind)[1]
    section = section_in(kind)
    return section.model_fields[str(key)].annotation if section and key in section.model_fields else None
