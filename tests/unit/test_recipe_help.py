"""`isthmus recipe`: every key, in words, as the schema has it."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from isthmus.algos import algorithm_names
from isthmus.cli import cli
from isthmus.recipe.describe import Key
from isthmus.recipe.schema import Recipe
from isthmus.recipe.section import RecipeError
from isthmus.recipe.steps import STEP_KINDS
from isthmus.rewards import reward_kinds, reward_options_class
from isthmus.tasks import task_kinds, task_options_class
from isthmus.tools.recipe import REFRESH, every_table

ROOT = Path(__file__).parents[2]
KEYS = [(f"{table.path}.{key.name}".lstrip("."), key) for table in every_table() for key in table.keys]
SCHEMA = Recipe.model_json_schema()
WORDS = ("required", "absent")
UNITS = {
    "_tokens": "tokens",
    "_s": "s",
    "_seconds": "s",
    "_minutes": "min",
    "_mib": "MiB",
    "_mb": "MiB",
    "_kl": "nats/token",
    "_per_minute": "/min",
    "_steps": "steps",
    "_problems": "problems",
    "_prompts": "prompts",
}


def recipe_help(*arguments: str, columns: int = 80) -> str:
    result = CliRunner(env={"COLUMNS": str(columns)}).invoke(cli, ["recipe", *arguments], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result.output


def is_number(key: Key) -> bool:
    return any(word.rstrip("s") in ("integer", "number") for word in key.type.split())


@pytest.mark.parametrize(("path", "key"), KEYS, ids=[path for path, _ in KEYS])
def test_every_key_is_described_and_every_number_has_a_unit(path: str, key: Key):
    assert key.about, f"{path} has no description: give its Field one"
    choices = [part for part in key.type.split(" or ") if part.isdigit()]
    if is_number(key) or choices:
        assert key.unit, f"{path} is a number without a unit: use a type with a Unit, `1` for a pure number"
        for ending, unit in UNITS.items():
            assert not key.name.endswith(ending) or key.unit.endswith(unit), f"{path} is not in {unit}"
    else:
        assert key.unit is None


def defined(schema: dict[str, Any], path: str = "") -> dict[str, dict[str, Any]]:
    """Every key that pydantic's own JSON schema has, by its path; `*` stands for any name."""
    found: dict[str, dict[str, Any]] = {}
    for name, value in schema.get("properties", {}).items():
        found[f"{path}{name}"] = value
        found |= below(value, f"{path}{name}.")
    return found


def below(value: Any, path: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    if "$ref" in value:
        found |= defined(SCHEMA["$defs"][value["$ref"].rsplit("/", 1)[1]], path)
    for one in (*value.get("anyOf", ()), *value.get("oneOf", ()), *filter(None, [value.get("items")])):
        found |= below(one, path)
    if isinstance(value.get("additionalProperties"), dict):
        found |= below(value["additionalProperties"], f"{path}NAME.")
    return found


def test_no_key_of_the_schema_is_left_out():
    shown = {path for path, _ in KEYS if not path.startswith(("step.options.", "tasks.NAME.", "rewards.NAME."))}
    assert shown == defined(SCHEMA).keys()


def test_the_options_of_every_plug_are_shown_under_what_chooses_it():
    for place, kinds, of in (
        ("tasks", task_kinds(), task_options_class),
        ("rewards", reward_kinds(), reward_options_class),
    ):
        shown = recipe_help(f"{place}.mine")
        for kind in kinds:
            (title,) = [line for line in shown.splitlines() if line == f'[{place}.NAME] with kind = "{kind}"']
            keys = shown.partition(title)[2].partition("\n\n[")[0]
            assert all(f"\n  {name}" in keys for name in of(kind).model_fields), kind


def test_units_and_defaults_are_those_of_the_json_schema():
    for path, value in defined(SCHEMA).items():
        keys = [key for shown, key in KEYS if shown == path]
        units = {one["unit"] for one in (value, value.get("items", {}), *value.get("anyOf", ())) if "unit" in one}
        if units:
            assert units <= {key.unit for key in keys}, path
        if value.get("default") is not None and "$ref" not in value and "$ref" not in str(value.get("anyOf")):
            told = [tomllib.loads(f"x = {key.default}")["x"] for key in keys if key.default not in WORDS]
            assert value["default"] in told, path


@pytest.mark.parametrize("columns", [80, 120])
def test_what_is_printed_fits_the_terminal(columns: int):
    for place in ((), *((table.path,) for table in every_table() if table.path)):
        lines = recipe_help(*place, columns=columns).splitlines()
        assert lines and max(map(len, lines)) <= columns, place


def test_without_a_section_all_of_them_are_listed_and_how_to_go_on():
    shown = recipe_help()
    assert "isthmus recipe SECTION.KEY" in shown
    sections = [name for name in Recipe.model_fields if name not in ("name", "seed")]
    assert all(f"[{name}" in shown for name in sections) and "[pools.NAME]" in shown
    assert len(shown.splitlines()) < 40


def test_a_key_is_shown_with_type_unit_default_and_meaning():
    shown = " ".join(recipe_help("step.drift_budget").split())
    about = "mismatch that a run may drift to; an alarm tells when the trend passes it before the end"
    assert shown == f'[[step]] with kind = "rl" drift_budget = 0.05 number > 0, nats/token {about}'
    assert "integer > 0, tokens, absent" in recipe_help("serve.max_waiting_tokens")
    assert "path, required" in recipe_help("step.folder")


def test_what_depends_on_a_setting_says_so():
    model = recipe_help("model")
    for family in ('"deepseek_v3"', '"qwen2" or "qwen3" or "llama" or "mistral"', '"qwen3_moe"'):
        assert f"[model] with model_type = {family}" in model
    assert model.count('[model.rope_scaling] with type = "yarn"') == 1
    assert model.count("vocab_size") == 1 and "kv_lora_rank" in model.partition("deepseek_v3")[2]
    for name in algorithm_names():
        assert f'[step.options] with algorithm = "{name}"' in recipe_help("step")
    assert "clip_low = 0.2" in recipe_help("step.options")
    step = recipe_help("step")
    assert all(f'[[step]] with kind = "{kind}"' in step for kind in STEP_KINDS)
    assert step.count("[step.optimizer]") == 1, "it is the same for all kinds"


MIXES = ("step.data", "step.tasks", "step.rewards")
"""Tables of weights: what stands in them is a name."""


def written_keys(tree: dict[str, Any], path: str = "") -> list[str]:
    found = []
    for key, value in tree.items():
        found.append(f"{path}{key}")
        tables = [] if f"{path}{key}" in MIXES else value if isinstance(value, list) else [value]
        found += [one for table in tables if isinstance(table, dict) for one in written_keys(table, f"{path}{key}.")]
    return found


@pytest.mark.parametrize("file", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda file: file.name)
def test_every_key_that_a_recipe_of_ours_writes_can_be_looked_up(file: Path):
    for key in written_keys(tomllib.loads(file.read_text())):
        assert recipe_help(key)


@pytest.mark.parametrize(
    ("place", "meant"),
    [
        ("hand", "'handoff'"),
        ("step.stepz", "'steps'"),
        ("handof.format", "'handoff.format'"),
        ("max_mean_kl", "'handoff.max_mean_kl'"),
        ("step.optimiser", "'optimizer'"),
        ("pools.home.chips", "'chip'"),
        ("qualfy.nothing", "'qualify'"),
        ("step.steps.more", "'step.steps'"),
    ],
)
def test_an_unknown_place_gets_a_suggestion(place: str, meant: str):
    with pytest.raises(RecipeError, match=f"no {place!r}; .*{meant}"):
        recipe_help(place)


def test_the_page_is_what_the_schema_says():
    written = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    assert written == recipe_help("--markdown"), f"docs/recipe.md is stale. Write it anew: {REFRESH}"
