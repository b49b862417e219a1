"""The words of the paper in two languages, from one glossary."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

from markupsafe import Markup, escape

Language = Literal["en", "zh"]
LANGUAGES: tuple[Language, ...] = ("en", "zh")


@functools.cache
def glossary() -> Mapping[str, Mapping[str, Mapping[str, str]]]:
    """Tables of terms: each has its word in every language."""
    text = resources.files("isthmus.report_page.justify").joinpath("words.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


@dataclass(frozen=True)
class Words:
    """The words of one language."""

    language: Language

    def text(self, key: str, /, **slots: Any) -> str:
        """A sentence with its slots filled. Raises KeyError for one that the glossary does not have."""
        return glossary()["text"][key][self.language].format(**slots)

    def term(self, table: str, key: str) -> str:
        """The word for a value of the record. Raises KeyError for one that the glossary does not have."""
        return glossary()[table][key][self.language]

    def name(self, table: str, key: str) -> Markup:
        """The word for a name that comes from elsewhere; one without a word stands as it is, marked as English."""
        known = glossary()[table].get(key)
        if known is not None:
            return escape(known[self.language])
        return escape(key) if self.language == "en" else Markup('<span lang="en">{}</span>').format(key)

    def all_of(self, table: str) -> list[str]:
        """Every word of a table."""
        return [known[self.language] for known in glossary()[table].values()]
