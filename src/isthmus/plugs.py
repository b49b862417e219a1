"""Parts that are one file each in a folder: the file's name is its registration, and its `Options` are its keys.

A name that people write may have hyphens where the file has underscores.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

from pydantic import ValidationError

from isthmus.errors import IsthmusError, suggestion
from isthmus.recipe.explain import explain
from isthmus.recipe.section import Section


def plug_names(folder: Iterable[str]) -> list[str]:
    """Names of the plugs in a package whose `__path__` is given; what plugs share is in folders of its own."""
    return sorted(one.name.replace("_", "-") for one in pkgutil.iter_modules(folder) if not one.ispkg)


def plug(package: str, names: Iterable[str], name: str, what: str) -> ModuleType:
    """The file of that name. Raises IsthmusError with a suggestion if there is none; `what` says what it would be."""
    if name not in names:
        raise IsthmusError(f"unknown {what} {name!r}{suggestion(name, names)}")
    return importlib.import_module(f"{package}.{name.replace('-', '_')}")


def plug_options(kind: type[Section], given: Mapping[str, Any], where: tuple[str, ...], what: str) -> Any:
    """A plug's options, checked. Raises IsthmusError that names the key under `where` and its neighbours."""
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise IsthmusError(explain(error, f"the options of {what} are not valid:", kind, where)) from None
