"""How steps hang together: what a recipe with a list of them is refused for, and what it is told instead."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import pytest

from isthmus.errors import IsthmusError
from isthmus.recipe.lineage import line, needs, unused, unused_steps
from isthmus.recipe.read import parse_recipe
from isthmus.recipe.schema import Recipe
from isthmus.recipe.section import RecipeError
from isthmus.recipe.steps import RESERVED
from isthmus.tools.steps import check, check_files

ADAMW = {"name": "adamw", "learning_rate": 1e-3}
TRAINED = {"steps": 1, "optimizer": ADAMW}
TREE: dict[str, Any] = {
    "name": "small",
    "model": {"preset": "r-nano"},
    "models": {"student": {"preset": "r-nano", "num_hidden_layers": 2}},
    "pools": {"home": {"chip": "cpu"}},
    "place": {"train": ["home"], "rollout": ["home"], "serve": ["home"]},
    "tasks": {"countdown": {}, "sums": {"kind": "countdown"}},
}
BASE = {"name": "base", "kind": "pretrain", "folder": "books", **TRAINED}
TAUGHT = {"name": "taught", "kind": "sft", "from": "base", "data": ["countdown"], **TRAINED}
REINFORCED = {"name": "reinforced", "kind": "rl", "from": "taught", "tasks": {"countdown": 1.0}, **TRAINED}
SAMPLED = {"name": "sampled", "kind": "sample", "from": "reinforced"}
AGAIN = {"name": "again", "kind": "sft", "from": "base", "data": {"sampled": 3.0, "countdown": 1.0}, **TRAINED}
R1 = [BASE, TAUGHT, REINFORCED, SAMPLED, AGAIN]


def recipe(*steps: dict[str, Any], **sections: Any) -> Recipe:
    return parse_recipe({**TREE, **sections, "step": copy.deepcopy(list(steps))})


def changed(step_name: str, /, **keys: Any) -> list[dict[str, Any]]:
    """R1's steps, with other keys in the one of that name; None leaves a key out."""
    merged = [{**step, **(keys if step["name"] == step_name else {})} for step in R1]
    return [{key: value for key, value in step.items() if value is not None} for step in merged]


def test_the_line_of_a_step_goes_back_to_a_model_and_its_data_are_needed_too():
    found = recipe(*R1)
    assert [one.name for one in line(found.step, "sampled")] == ["base", "taught", "reinforced", "sampled"]
    assert [one.name for one in line(found.step, "again")] == ["base", "again"]
    assert {step.name: needs(step, found.step) for step in found.step} == {
        "base": [],
        "taught": ["base"],
        "reinforced": ["taught"],
        "sampled": ["reinforced"],
        "again": ["base", "sampled"],
    }
    assert found.handed_off.name == "again"


def test_a_list_of_names_weighs_them_alike():
    assert recipe(*R1).named("taught").data == {"countdown": 1.0}
    assert recipe(*R1).named("again").data == {"sampled": 3.0, "countdown": 1.0}


def test_a_line_that_starts_from_another_model_trains_that_one():
    student = {"name": "student", "kind": "sft", "model": "student", "data": ["sampled"], **TRAINED}
    polished = {**TAUGHT, "name": "polished", "from": "student"}
    found = recipe(*R1, student, polished)
    assert found.architecture_of(found.named("polished")).num_hidden_layers == 2
    assert found.architecture_of(found.named("again")).num_hidden_layers == found.model.num_hidden_layers
    assert found.handed_off.name == "again", "the last step that trains [model]"
    assert recipe(*R1, student, polished, handoff={"step": "polished"}).handed_off.name == "polished"


UNSOUND = {
    "unknown start": (
        changed("taught", **{"from": "bass"}),
        "step 'taught': from = 'bass' is no step; did you mean 'base'?",
    ),
    "a start like nothing": (
        changed("reinforced", **{"from": "xyz"}),
        "step 'reinforced': from = 'xyz' is no step; there are model, base, taught",
    ),
    "circle": (
        changed("base", **{"from": "reinforced"}),
        "the steps start from each other in a circle: base -> reinforced -> taught -> base; one of them starts from "
        "'model'",
    ),
    "itself": (
        changed("base", **{"from": "base"}),
        "the steps start from each other in a circle: base -> base; one of them starts from 'model'",
    ),
    "a later step": (
        [TAUGHT, BASE],
        "step 'taught': it starts from 'base', which comes after it; steps are trained in the order of the recipe",
    ),
    "no start": (
        changed("reinforced", **{"from": None}),
        'step \'reinforced\': it has to say whose weights it starts from: from = "taught", or from = "model"',
    ),
    "data as a start": (
        changed("again", **{"from": "sampled"}),
        "step 'again': it starts from 'sampled', which makes data, not weights; an `sft` step can name it in `data`",
    ),
    "weights as data": (
        changed("again", data=["reinforced"]),
        "step 'again': data names the step 'reinforced', which makes weights, not data; start from it with `from`",
    ),
    "data of a later step": (
        [BASE, {**AGAIN}, TAUGHT, REINFORCED, SAMPLED],
        "step 'again': data names 'sampled', which comes after it; steps are trained in the order of the recipe",
    ),
    "unknown data": (
        changed("again", data={"sampld": 1.0}),
        "step 'again': data names 'sampld'; did you mean 'sampled'?",
    ),
    "data like nothing": (
        changed("again", data=["xyz"]),
        "step 'again': data names 'xyz'; there are countdown, sums, sampled",
    ),
    "unknown task": (
        changed("reinforced", tasks=["countdwn"]),
        "step 'reinforced': tasks names 'countdwn'; did you mean 'countdown'?",
    ),
    "answers as prompts": (
        [*R1, {**REINFORCED, "name": "more", "from": "again", "tasks": ["sampled"]}],
        "step 'more': tasks names the step 'sampled'; its answers can only be taught, by an `sft` step",
    ),
    "two of a name": (
        [*R1, {**TAUGHT, "from": "base"}],
        "two steps are named 'taught'; a name is a folder of the run",
    ),
    "a task's name": (
        changed("again", name="sums"),
        "'sums' names a step and a task, and `data` could mean either; rename one",
    ),
    "unknown model": (
        [{**BASE, "model": "studnt"}],
        "step 'base': model = 'studnt' is none of [models.*]; did you mean 'student'?",
    ),
    "another model's weights": (
        changed("taught", model="student"),
        "step 'taught': it starts from 'base', so it trains that one's model; leave out model = 'student'",
    ),
    "no step of the recipe's model": (
        [{**BASE, "model": "student"}],
        "no step trains [model], so nothing can be handed off; name a step with handoff.step",
    ),
}


@pytest.mark.parametrize(("steps", "words"), UNSOUND.values(), ids=UNSOUND)
def test_steps_that_do_not_hang_together_are_refused_in_words(steps: list[dict[str, Any]], words: str):
    with pytest.raises(RecipeError) as caught:
        recipe(*steps)
    (line_of_problem,) = str(caught.value).splitlines()[1:]
    assert line_of_problem == f"  recipe: {words}"


@pytest.mark.parametrize("name", RESERVED)
def test_a_step_cannot_have_the_name_of_something_else(name: str):
    with pytest.raises(RecipeError, match=f"a step cannot be named '{name}': that is the name of something else"):
        recipe({**BASE, "name": name})


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ("agin", r"handoff\.step names 'agin'; did you mean 'again'\?"),
        ("sampled", r"handoff\.step names 'sampled'; steps with weights: base, taught, reinforced, again"),
    ],
)
def test_only_a_step_with_weights_is_handed_off(named: str, words: str):
    with pytest.raises(RecipeError, match=words):
        recipe(*R1, handoff={"step": named})


def test_a_kind_that_is_none_is_told_the_kinds():
    with pytest.raises(RecipeError, match=r"pretrain(.*)sft(.*)rl(.*)sample"):
        recipe({**BASE, "kind": "pretraining"})


def test_what_nothing_comes_of_is_told_with_what_to_do():
    found = recipe(*R1, handoff={"step": "taught"})
    assert unused(found.step, "taught") == ["reinforced", "sampled", "again"]
    (told,) = unused_steps(found.step, "taught")
    assert told.startswith("nothing goes on from 'again': start a step from it, hand it off with handoff.step, ")
    assert told.endswith("or leave it out; its weights stay in steps/again")
    assert unused(found.step, "taught", ["again"]) == [], "it is compared, and what it takes is used by it"
    alone = recipe(*changed("again", data=["countdown"]))
    assert unused_steps(alone.step, "again")[-1].startswith(
        "nothing takes the data of 'sampled': name it in `data` of an `sft` step"
    )
    assert unused_steps(recipe(*R1).step, "again") == []


def test_files_that_a_step_would_look_for_in_vain_are_told_before_anything_runs(tmp_path):
    """A step that is not asked for, or is done, needs none."""
    mine = {"kind": "jsonl", "train_file": str(tmp_path / "mine.jsonl"), "heldout_share": 0.1}
    found = recipe(*changed("base", folder=str(tmp_path / "books")), tasks={**TREE["tasks"], "mine": mine})
    check_files(found, None, ["qualify", "report"])
    with pytest.raises(IsthmusError, match=r"step.base.folder: there is no folder .*books"):
        check_files(found, None, ["base", "taught"])
    (tmp_path / "books").mkdir()
    with pytest.raises(IsthmusError, match=r"tasks.mine.train_file: there is no file .*mine.jsonl"):
        check_files(found, None, ["taught"])
    (tmp_path / "mine.jsonl").touch()
    check_files(found, None, ["base", "taught"])


def test_a_data_set_that_reasoning_gym_does_not_have_is_told_before_anything_runs(monkeypatch):
    """Where the library is not installed nobody can know."""

    def found(**given: Any) -> Recipe:
        return recipe({**TAUGHT, "from": "model"}, tasks={"countdown": {}, "more": {"kind": "reasoning-gym", **given}})

    check(found(dataset="chain_sum", options={"max_terms": 2}))
    with pytest.raises(IsthmusError, match=r"tasks.more: reasoning-gym has no data set 'chain_sums'.*'chain_sum'"):
        check(found(dataset="chain_sums"))
    with pytest.raises(IsthmusError, match=r"tasks.more: reasoning-gym's chain_sum refuses its options: .*terms"):
        check(found(dataset="chain_sum", options={"terms": 2}))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check(found(dataset="chain_sums"))
