"""The form in which recipes said what is trained before they had steps, and the same in the present form."""

from __future__ import annotations

import json
import re
from typing import Any

from isthmus.recipe.steps import MODEL

FORMER = ("data", "pretrain", "sft", "rl")
_BARE = re.compile(r"[A-Za-z0-9_-]+")


def is_former(tree: dict[str, Any]) -> bool:
    """Whether a recipe has a section that steps and tasks took the place of."""
    return any(name in tree for name in FORMER)


def modernised(tree: dict[str, Any]) -> dict[str, Any]:
    """The same recipe, as nested dictionaries, with [[step]] and [tasks.*]. Raises KeyError for what is no table."""
    data = {name: value for name, value in tree.get("data", {}).items() if value is not None}
    kind = data.pop("task", "countdown")
    steps: list[dict[str, Any]] = []
    for name, section in (("pretrain", "pretrain"), ("cold-start", "sft"), ("reasoning", "rl")):
        if not isinstance(tree.get(section), dict):
            continue
        step: dict[str, Any] = {"name": name, "kind": section, "from": steps[-1]["name"] if steps else MODEL}
        said = {key: value for key, value in tree[section].items() if value is not None}
        if section == "rl":
            if (cap := said.pop("importance_cap", None)) is not None:
                step["loss"] = {"importance_cap": cap}
            step["rewards"] = {"accuracy": 1.0, "format": said.pop("format_reward", 0.1)}
        steps.append(step | said)
    kept = {name: value for name, value in tree.items() if name not in FORMER}
    return {**kept, "tasks": {kind: data}, "step": steps}


def toml_of(tree: dict[str, Any]) -> str:
    """Nested dictionaries as a TOML file."""
    return "\n".join(_table(tree, ())).strip() + "\n"


def _table(tree: dict[str, Any], path: tuple[str, ...]) -> list[str]:
    tables = {name: value for name, value in tree.items() if isinstance(value, dict) and not _is_inline(value, path)}
    lists = {name: value for name, value in tree.items() if _is_table_list(value)}
    lines = [f"{_key(name)} = {toml_value(value)}" for name, value in tree.items() if name not in tables | lists]
    for name, value in tables.items():
        below = (*path, name)
        holds_values = not value or any(not isinstance(one, dict) for one in value.values())
        lines += ["", f"[{'.'.join(map(_key, below))}]"] if holds_values else []
        lines += _table(value, below)
    for name, values in lists.items():
        for value in values:
            lines += ["", f"[[{'.'.join(map(_key, (*path, name)))}]]", *_table(value, (*path, name))]
    return lines


def _is_inline(value: dict[str, Any], path: tuple[str, ...]) -> bool:
    """Short tables of numbers within a step, such as `rewards`, stand on one line."""
    return path[:1] == ("step",) and all(isinstance(one, int | float) for one in value.values()) and "name" not in value


def _is_table_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


def _key(name: str) -> str:
    return name if _BARE.fullmatch(name) else json.dumps(name)


def toml_value(value: Any) -> str:
    """A value as it stands behind a key of a TOML file, on one line."""
    if isinstance(value, dict):
        said = ", ".join(f"{_key(name)} = {toml_value(one)}" for name, one in value.items())
        return f"{{ {said} }}" if said else "{}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    if isinstance(value, str | bool):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value)
