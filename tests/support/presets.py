"""The architectures that ship with the package, changed."""

from __future__ import annotations

import tomllib
from importlib import resources
from typing import Any

from isthmus.recipe.architecture import DeepseekSection, DenseSection, parse_architecture


def preset_architecture(name: str, **changes: Any) -> DeepseekSection | DenseSection:
    """A preset with some of its keys changed."""
    text = (resources.files("isthmus.presets") / f"{name}.toml").read_text(encoding="utf-8")
    return parse_architecture({**tomllib.loads(text), **changes})
