"""From a TOML file, presets and overrides to a checked recipe."""

from __future__ import annotations

import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from isthmus.errors import suggestion
from isthmus.lines import read_text
from isthmus.recipe.architecture import read_architecture
from isthmus.recipe.explain import explain
from isthmus.recipe.former import FORMER, is_former, modernised, toml_of
from isthmus.recipe.schema import Recipe, ServeSection
from isthmus.recipe.section import RecipeError


def load_recipe(path: Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """Read, override (`a.b=c`), resolve and check a recipe. Raises RecipeError with what to write instead."""
    try:
        if path.is_dir():
            raise RecipeError(f"{path} is a folder; a recipe is a .toml file")
        tree = tomllib.loads(read_text(path))
    except FileNotFoundError:
        raise RecipeError(f"no recipe at {path}{_nearby_recipes(path)}") from None
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path} is not valid TOML: {error}") from None
    if is_former(tree):
        raise RecipeError(_in_the_present_form(str(path), tree))
    for override in overrides:
        apply_override(tree, override)
    return parse_recipe(tree, origin=path)


def _in_the_present_form(what: str, tree: dict[str, Any]) -> str:
    sections = ", ".join(f"[{name}]" for name in FORMER if name in tree)
    return (
        f"{what}: instead of {sections} there are [tasks.NAME] and [[step]]. This recipe in that form:\n\n"
        f"{toml_of(modernised(tree))}"
    )


def parse_recipe(tree: dict[str, Any], origin: Path | None = None) -> Recipe:
    """Check a recipe given as nested dictionaries. Paths in it are relative to the folder of `origin`."""
    if is_former(tree):
        raise RecipeError(_in_the_present_form(str(origin or "the recipe"), tree))
    model = tree.get("model")
    if isinstance(model, dict):
        tree = {**tree, "model": _resolve_model(model, origin)}
    for section in ("serve", "qualify"):
        if isinstance(tree.get(section), dict):
            tree = {**tree, section: _resolve_files(tree[section], origin)}
    if isinstance(steps := tree.get("step"), list):
        tree = {**tree, "step": [_resolve_files(step, origin) if isinstance(step, dict) else step for step in steps]}
    for section in ("tasks", "rewards", "models", "pools"):
        if isinstance(named := tree.get(section), dict):
            resolve = _resolve_model if section == "models" else _resolve_files
            done = {name: resolve(one, origin) if isinstance(one, dict) else one for name, one in named.items()}
            tree = {**tree, section: done}
    return resolved_recipe(tree, origin)


def resolved_recipe(tree: dict[str, Any], origin: Path | None = None) -> Recipe:
    """Check a recipe whose presets are already merged, as a run folder stores it."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(
            explain(error, f"{origin or 'the recipe'} is not a valid recipe:", Recipe, given=tree)
        ) from None


def override_serve(section: ServeSection, overrides: tuple[str, ...] = (), **changes: Any) -> ServeSection:
    """A [serve] with `changes` that are not None or empty, then with `serve.key=value` overrides."""
    given = {key: value for key, value in changes.items() if value is not None and value != ()}
    tree: dict[str, Any] = {"serve": {**section.model_dump(), **given}}
    for override in overrides:
        if not override.strip().startswith("serve."):
            raise RecipeError(f"--set {override!r}: a server can only be given other keys of [serve]")
        apply_override(tree, override)
    try:
        return ServeSection.model_validate(tree["serve"])
    except ValidationError as error:
        raise RecipeError(explain(error, "[serve] is not valid:", ServeSection, ("serve",))) from None


def preset_names() -> list[str]:
    """Names of the architectures that ship with the package."""
    return sorted(
        entry.name.removesuffix(".toml")
        for entry in resources.files("isthmus.presets").iterdir()
        if entry.name.endswith(".toml")
    )


def _resolve_model(section: dict[str, Any], origin: Path | None) -> dict[str, Any]:
    if "preset" in section and "from" in section:
        raise RecipeError("[model] has both preset and from; keep one")
    if "preset" in section:
        return {**_read_preset(section["preset"]), **section}
    if "from" in section:
        folder = Path(section["from"])
        if origin is not None and not folder.is_absolute():
            folder = origin.parent / folder
        return {**read_architecture(folder), **section, "from": str(folder.resolve())}
    return section


def _resolve_files(section: dict[str, Any], origin: Path | None) -> dict[str, Any]:
    """Paths relative to the recipe made absolute."""
    folder = origin.parent if origin else Path()
    files = {key: str((folder / value).resolve()) for key, value in section.items() if _is_path(key)}
    return {**section, **files}


def _is_path(key: str) -> bool:
    return key in ("folder", "publish", "thresholds", "exchange") or key.endswith("_file")


def _read_preset(name: Any) -> dict[str, Any]:
    entry = resources.files("isthmus.presets") / f"{name}.toml"
    if not entry.is_file():
        raise RecipeError(f"unknown model preset {name!r}{suggestion(str(name), preset_names())}")
    return tomllib.loads(entry.read_text(encoding="utf-8"))


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one key of a recipe given as nested dictionaries, from `section.key=value`. Raises RecipeError."""
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise RecipeError(f"--set {override!r}: write --set section.key=value")
    node: Any = tree
    *parents, last = key.strip().split(".")
    if parents and parents[0] in FORMER and "step" in tree:
        raise RecipeError(f"--set {override!r}: {_moved(parents[0])}{'.'.join([*parents[1:], last])}={text}")
    for parent in parents:
        node = _named(node, parent, override) if isinstance(node, list) else node.setdefault(parent, {})
        if not isinstance(node, dict | list):
            raise RecipeError(f"--set {override!r}: {parent!r} is a value, not a section")
    if isinstance(node, list):
        _named(node, last, override)
        raise RecipeError(f"--set {override!r}: {last!r} is a step; write --set step.{last}.KEY=VALUE")
    node[last] = _override_value(text.strip())


def _moved(section: str) -> str:
    if section == "data":
        return "what is learnt is in [tasks.NAME]; write --set tasks.NAME."
    return "what is trained is in [[step]]; write --set step.NAME."


def _named(tables: list[Any], name: str, override: str) -> dict[str, Any]:
    """The one of [[step]] that has this name."""
    found = {one.get("name"): one for one in tables if isinstance(one, dict)}
    if name not in found:
        raise RecipeError(f"--set {override!r}: no step {name!r}{suggestion(name, map(str, found))}")
    return found[name]


def _override_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _nearby_recipes(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path("recipes")
    names = [str(candidate) for candidate in sorted(folder.glob("*.toml"))]
    return f"; did you mean one of: {', '.join(names)}?" if names else ""
