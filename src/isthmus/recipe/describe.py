"""The schema of a recipe as tables of keys, for who writes one."""

from __future__ import annotations

import inspect
import json
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from isthmus.recipe.explain import section_in, tagged_in
from isthmus.recipe.former import toml_value
from isthmus.recipe.schema import Recipe
from isthmus.recipe.section import Section, Unit

NAME = "NAME"
"""Stands in a path for a name that the user chooses."""
_TYPES = {bool: "true or false", int: "integer", float: "number", str: "text", Path: "path", date: "date"}
_BOUNDS = {Gt: "> {.gt:g}", Ge: ">= {.ge:g}", Lt: "< {.lt:g}", Le: "<= {.le:g}"}


@dataclass(frozen=True)
class Key:
    """A key of a table. `unit` is that of a number, `1` for a pure one; `default` is TOML, `required` or `absent`."""

    name: str
    type: str
    unit: str | None
    default: str
    about: str

    @property
    def shown_unit(self) -> str:
        return "" if self.unit in (None, "1") else str(self.unit)


@dataclass(frozen=True)
class Table:
    """A table of a recipe by its path, such as `step.optimizer`; `when` is the setting under which it has these keys,
    and a `listed` one may stand there many times."""

    path: str
    when: str
    about: str
    keys: list[Key]
    listed: bool = False

    @property
    def title(self) -> str:
        return (f"[[{self.path}]]" if self.listed else f"[{self.path}]") + (f" with {self.when}" if self.when else "")

    @property
    def summary(self) -> str:
        """The first sentence of what it is about."""
        return self.about.partition(". ")[0].rstrip(".")


OF_KIND = Key("kind", "text", None, "absent", "which of those below it is; the name says it if absent")
"""What tables have whose keys depend on it."""
Options = Mapping[str, Mapping[str, type[Section]]]
"""Sections for tables that the schema leaves open, by path and by the setting under which they count."""


def tables(options: Options) -> list[Table]:
    """Every table, a table before those within it; the first one has the keys that are in no section."""
    found = _tables(Recipe, "", "", options)
    return list({(table.path, table.when): table for table in found}.values())


def _tables(section: type[Section], path: str, when: str, options: Options) -> Iterator[Table]:
    yield _table(section, path, when, section.model_fields)
    yield from _within(section.model_fields, path, when, options)


def _within(fields: Mapping[str, FieldInfo], path: str, when: str, options: Options) -> Iterator[Table]:
    for name, field in fields.items():
        below = f"{path}.{name}".removeprefix(".")
        for setting, section in options.get(below, {}).items():
            yield from _tables(section, below, setting, options)
        holder = typing.get_origin(field.annotation)
        place = f"{below}.{NAME}" if holder is dict else below
        if kinds := options.get(place if holder is dict else ""):
            yield Table(place, "", f"{field.description}.", [OF_KIND])
            for setting, section in kinds.items():
                yield _table(section, place, setting, section.model_fields)
        if members := tagged_in(field.annotation):
            found = [section for one in members.values() if (section := section_in(one))]
            yield from (
                replace(one, listed=one.path == place and holder is list) for one in _union(found, place, options)
            )
        elif section := section_in(field.annotation):
            yield from _tables(section, place, when, options)


def _union(members: list[type[Section]], path: str, options: Options) -> Iterator[Table]:
    """What all members have, then what each has of its own or otherwise; a tag such as `type` tells them apart."""
    base = next(one for one in members[0].__mro__ if all(issubclass(member, one) for member in members))
    assert issubclass(base, Section)
    shared = {name: str(field) for name, field in base.model_fields.items()}
    own = [{n: f for n, f in one.model_fields.items() if shared.get(n) != str(f)} for one in members]
    yield _table(base, path, "", {n: f for n, f in base.model_fields.items() if not all(n in one for one in own)})
    tag = next(name for name in ("model_type", "type", "kind") if name in members[0].model_fields)
    for section, fields in zip(members, own, strict=True):
        when = f"{tag} = {_type(section.model_fields[tag].annotation)}"
        yield _table(section, path, when, fields)
        for name, field in fields.items():
            forms = {str(one.model_fields[name].annotation) for one in members if name in one.model_fields}
            yield from _within({name: field}, path, when if len(forms) > 1 else "", options)


def _table(section: type[Section], path: str, when: str, fields: Mapping[str, FieldInfo]) -> Table:
    about = " ".join((inspect.getdoc(section) or "").split())
    return Table(path, when, about, [_key(name, field) for name, field in fields.items()])


def _key(name: str, field: FieldInfo) -> Key:
    markers = [*_markers(field.annotation), *field.metadata]
    units = [one.name for one in markers if isinstance(one, Unit)]
    kind = " ".join([_type(field.annotation), *_bounds(markers)])
    return Key(field.alias or name, kind, units[-1] if units else None, _default(field), field.description or "")


def _markers(annotation: Any) -> Iterator[Any]:
    """What Annotated says anywhere within an annotation."""
    yield from getattr(annotation, "__metadata__", ())
    for argument in typing.get_args(annotation):
        if section_in(argument) is None:
            yield from _markers(argument)


def _bounds(markers: list[Any]) -> list[str]:
    flat = [one for marker in markers for one in (marker.metadata if isinstance(marker, FieldInfo) else [marker])]
    found = [text.format(one) for kind, text in _BOUNDS.items() for one in flat if isinstance(one, kind)]
    return [" and ".join(dict.fromkeys(found))] if found else []


def _type(annotation: Any) -> str:
    arguments = [one for one in typing.get_args(annotation) if one is not type(None)]
    origin = typing.get_origin(annotation)
    if section_in(annotation) and origin is not list:
        return "table"
    if origin is dict:
        return "table of numbers" if float in (arguments[1], *typing.get_args(arguments[1])) else "table"
    if origin is Literal:
        return " or ".join(map(json.dumps, arguments))
    if origin is list:
        named = typing.get_origin(arguments[0]) is Literal
        return f"list of {_type(arguments[0])}{'' if named else 's'}"
    if origin is tuple:
        return f"{len(arguments)} {_type(arguments[0])}s"
    return _type(arguments[0]) if arguments else _TYPES[annotation]


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if field.is_required():
        return "required"
    if value is None:
        return "absent"
    return "{}" if isinstance(value, Section) else toml_value(value)
