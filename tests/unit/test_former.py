"""A recipe in the form that recipes had: refused, and told whole in the present one."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from isthmus.recipe.former import toml_of
from isthmus.recipe.read import load_recipe, parse_recipe
from isthmus.recipe.section import RecipeError
from tests.support.flow_recipe import RECIPE

TINY = """
name = "tiny"
seed = 0

[model]
preset = "r-nano"

[pools.home]
chip = "cpu"

[pools.away]
chip = "ascend-910b-313t"
rehearsed = true

[place]
train   = ["away", "home"]
rollout = ["away"]
serve   = ["away"]

[data]
task = "countdown"

[sft]
steps = 600
batch_size = 64
bias_update_speed = 0.01

[sft.optimizer]
name = "muon"
matrix_learning_rate = 0.02
learning_rate = 3e-3
warmup_steps = 20
decay_share = 0.3

[rl]
algorithm = "grpo"
steps = 64
prompts_per_step = 32
samples_per_prompt = 8
max_new_tokens = 160
staleness = 1

[rl.optimizer]
name = "adamw"
learning_rate = 2e-4
gradient_clip = 0.2

[rl.options]
clip_low = 0.2
clip_high = 0.28

[handoff]
format = "w8a8"

[serve]
temperature = 1.0
"""
MORE = """
[pretrain]
folder = "books of \\"old\\""
steps = 40
row_length = 64

[pretrain.optimizer]
name = "adamw"
learning_rate = 1e-3
betas = [0.8, 0.99]
"""
OWN = """
task = "jsonl"
train_file = "ours.jsonl"
heldout_file = "theirs.jsonl"
"""


def refusal(folder: Path, text: str) -> str:
    (folder / "old.toml").write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(folder / "old.toml")
    return str(caught.value)


def told(folder: Path, text: str) -> dict[str, Any]:
    """The recipe that a refusal writes out, as a TOML reader has it."""
    _, _, recipe = refusal(folder, text).partition("in that form:\n\n")
    return tomllib.loads(recipe)


def test_the_recipe_that_is_told_is_the_one_that_ships_now(tmp_path: Path):
    assert "instead of [data], [sft], [rl] there are [tasks.NAME] and [[step]]" in refusal(tmp_path, TINY)
    assert parse_recipe(told(tmp_path, TINY)).digest() == load_recipe(RECIPE).digest()


def test_all_that_was_said_is_said_again_in_its_step(tmp_path: Path):
    old = tomllib.loads(TINY.replace("staleness = 1", "format_reward = 0.3\nimportance_cap = 3.5") + MORE)
    new = told(tmp_path, TINY.replace("staleness = 1", "format_reward = 0.3\nimportance_cap = 3.5") + MORE)
    base, taught, reinforced = new["step"]
    assert [(one["kind"], one.get("from")) for one in new["step"]] == [
        ("pretrain", "model"),
        ("sft", base["name"]),
        ("rl", taught["name"]),
    ]
    for step, before in ((base, old["pretrain"]), (taught, old["sft"])):
        assert {key: value for key, value in step.items() if key not in ("name", "kind", "from")} == before
    assert reinforced.pop("rewards") == {"accuracy": 1.0, "format": 0.3}
    assert reinforced.pop("loss") == {"importance_cap": 3.5}
    kept = {key: value for key, value in old["rl"].items() if key not in ("format_reward", "importance_cap")}
    assert {key: value for key, value in reinforced.items() if key not in ("name", "kind", "from")} == kept
    assert {name: new[name] for name in new if name not in ("step", "tasks")} == {
        name: old[name] for name in old if name not in ("data", "pretrain", "sft", "rl")
    }
    assert parse_recipe(new, origin=tmp_path / "old.toml").named(base["name"]).folder == tmp_path / 'books of "old"'


def test_the_users_own_problems_become_a_task_of_that_kind(tmp_path: Path):
    text = TINY.replace('task = "countdown"', OWN)
    new = told(tmp_path, text)
    assert new["tasks"] == {"jsonl": {"train_file": "ours.jsonl", "heldout_file": "theirs.jsonl"}}
    recipe = parse_recipe(new, origin=tmp_path / "old.toml")
    assert recipe.tasks["jsonl"]["train_file"] == str(tmp_path / "ours.jsonl")


def test_a_recipe_that_has_half_of_it_is_told_that_half(tmp_path: Path):
    _, _, rl = TINY.partition("[rl]")
    new = told(tmp_path, TINY.replace(rl, "").replace("[rl]", ""))
    assert [one["kind"] for one in new["step"]] == ["sft"]


def test_an_old_key_of_set_is_told_where_it_stands_now():
    for override, words in (
        ("sft.steps=3", "write --set step.NAME.steps=3"),
        ("sft.optimizer.learning_rate=1", "write --set step.NAME.optimizer.learning_rate=1"),
        ("rl.publish=out", "write --set step.NAME.publish=out"),
        ("data.largest=9", r"write --set tasks\.NAME\.largest=9"),
    ):
        with pytest.raises(RecipeError, match=words):
            load_recipe(RECIPE, (override,))


@pytest.mark.parametrize("file", sorted(RECIPE.parent.glob("*.toml")), ids=lambda file: file.name)
def test_what_is_written_reads_as_what_it_was_written_from(file: Path):
    tree = tomllib.loads(file.read_text(encoding="utf-8"))
    assert tomllib.loads(toml_of(tree)) == tree


@pytest.mark.parametrize(
    "tree",
    [
        {"text": 'line\nof "words", tab\t, control \x01\x7f, µ, \U0001f600'},
        {"numbers": [1, -2.5, 1e-30, 10**12], "yes": True, "none": [], "empty": {}},
        {"a key": {"with.dots": 1, "µ": {"deep": [[1], [2, 3]]}}},
        {
            "step": [
                {"name": "x", "rewards": {"a-b": 1, "c d": 0.5}, "options": {}, "loss": {"kind": "x", "n": 1}},
                {"name": "y"},
            ]
        },
        {"pools": {"home": {"chip": "cpu"}}, "tables": [{"in": {"a": {"b": "c"}}}, {}]},
    ],
)
def test_toml_comes_back_from_a_reader_as_it_was(tree: dict[str, Any]):
    assert tomllib.loads(toml_of(tree)) == tree
