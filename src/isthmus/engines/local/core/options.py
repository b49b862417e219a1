"""The options of the engine on the command line of its process, read off their declaration in the recipe's schema."""

from __future__ import annotations

import argparse

from pydantic import ValidationError

from isthmus.errors import IsthmusError
from isthmus.recipe.explain import explain
from isthmus.recipe.schema import EngineOptions

DEFAULT_OPTIONS = EngineOptions()


def add_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for each option; that of a switch says the contrary of its default."""
    for name, field in EngineOptions.model_fields.items():
        if isinstance(field.default, bool):
            action = "store_false" if field.default else "store_true"
            parser.add_argument(_flag(name, field.default), dest=name, action=action, help=field.description)
        else:
            parser.add_argument(_flag(name), type=int, default=field.default, help=field.description)


def read_flags(parsed: argparse.Namespace) -> EngineOptions:
    """What was parsed of `add_flags`. Raises IsthmusError for a number that cannot be."""
    try:
        return EngineOptions(**{name: getattr(parsed, name) for name in EngineOptions.model_fields})
    except ValidationError as error:
        raise IsthmusError(explain(error, "the engine cannot work so:", EngineOptions)) from None


def flags(options: EngineOptions) -> list[str]:
    """The arguments that `add_flags` reads as these options."""
    given: list[str] = []
    for name, default in DEFAULT_OPTIONS:
        value = getattr(options, name)
        if value != default:
            given += [_flag(name, default)] if isinstance(default, bool) else [_flag(name), str(value)]
    return given


def _flag(name: str, contrary: bool = False) -> str:
    return f"--{'no-' * contrary}{name.replace('_', '-')}"
