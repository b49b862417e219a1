"""Errors of operators on chips that are trusted, one JSON file per chip: what `benchmarks/live_tier.py` stores.

A file has `chip`, `conditions` and `errors`: of "operator dtype pass" the largest and the mean relative error and the
root mean square error over all calls, each by what rounding explains of it.
"""

from __future__ import annotations

import json
from importlib import resources
from importlib.resources.abc import Traversable

Errors = dict[str, dict[str, float]]


def trusted_errors(chip: str, folder: Traversable | None = None) -> Errors | None:
    """What an operator may be off by: the most of all chips that are stored, but for `chip` itself unless it is alone.

    None without a stored chip.
    """
    files = [file for file in (folder or resources.files(__name__)).iterdir() if file.name.endswith(".json")]
    contents = [json.loads(file.read_text("utf-8")) for file in files]
    stored = {content["chip"]: content["errors"] for content in contents}
    others = {name: errors for name, errors in stored.items() if name != chip} or stored
    if not others:
        return None
    merged: Errors = {}
    for errors in others.values():
        for key, one in errors.items():
            kept = merged.setdefault(key, one)
            merged[key] = {name: max(kept[name], one[name]) for name in one}
    return merged
