"""Which acts of a run a command asks for, and the picture of its steps: on a run folder in which nothing is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from isthmus.cli import cli
from isthmus.errors import IsthmusError
from isthmus.recipe.read import load_recipe
from isthmus.recipe.section import RecipeError
from isthmus.records import Placement, PlanRecord, TextRecord
from isthmus.run import RunFolder
from tests.support.flow_recipe import RECIPE, REINFORCED, TAUGHT
from tests.support.ranks_recipe import RECIPE as SMALL_RECIPE

ALL = ["qualify", "plan", TAUGHT, REINFORCED, "handoff", "report"]


def said(*words: object) -> str:
    """What a command prints; raises what a user would read as an error."""
    result = CliRunner(env={"COLUMNS": "200"}).invoke(cli, list(map(str, words)), standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result.output


def record_of(run: RunFolder, name: str) -> TextRecord:
    return TextRecord(
        recipe_sha256=run.recipe.digest(),
        started=0.0,
        ended=1.0,
        kind="sft",
        step=name,
        pool="home",
        started_from="model",
        steps=24,
        resumed_from=[],
        checkpoint=f"steps/{name}/checkpoints/step-000024",
        checkpoint_sha256="5ea1ed00" * 8,
        figures={},
    )


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run whose plan stands."""
    recipe = tmp_path / "small.toml"
    recipe.write_text(SMALL_RECIPE, encoding="utf-8")
    made = RunFolder.create(tmp_path / "run", load_recipe(recipe))
    places = [Placement(stage=stage, pool="home", reason="") for stage in ("train", "rollout", "serve")]
    record = PlanRecord(
        recipe_sha256=made.recipe.digest(), started=0, ended=0, placements=places, rejected=[], estimate={}
    )
    made.write_record("plan", record)
    return made


def would_run(*options: str) -> list[str]:
    (last,) = [line for line in said("run", RECIPE, "--dry-run", *options).splitlines() if "would run" in line]
    return last.removeprefix("would run ").partition(" in ")[0].split(", ")


def test_a_run_does_all_its_acts_in_order_or_those_that_are_asked_for():
    assert would_run() == ALL
    for place, name in enumerate(ALL):
        assert would_run("--only", name) == [name]
        assert would_run("--until", name) == ALL[: place + 1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--only", "resoning"), "--only resoning: the run has no such step or stage; did you mean 'reasoning'"),
        (("--until", "cold"), "--until cold: the run has no such step or stage; did you mean 'cold-start'"),
        (("--only", "plan", "--until", "plan"), "give one of them"),
        (("--only", "plan", "--profile"), "--profile traces one step"),
        (("--profile",), "--profile traces one step"),
    ],
)
def test_what_cannot_be_asked_for_is_said_before_anything_is_done(tmp_path: Path, options: tuple[str, ...], words: str):
    with pytest.raises(IsthmusError, match=words):
        said("run", RECIPE, "--run", tmp_path / "run", *options)
    assert not (tmp_path / "run").exists()


def test_a_step_that_is_done_is_skipped_and_one_without_its_weights_says_what_to_run(run: RunFolder):
    with pytest.raises(IsthmusError, match=f"first run: isthmus run {run.path} --until {TAUGHT}"):
        said("run", run.path, "--only", REINFORCED)
    run.write_record(f"steps/{TAUGHT}/record", record_of(run, TAUGHT))
    shown = said("run", run.path, "--only", TAUGHT)
    assert f"3/6 {TAUGHT} (sft): done before, skipped" in shown and f"isthmus steps {run.path}" in shown
    assert run.events(TAUGHT) == []


def test_the_steps_are_drawn_with_how_far_they_are(run: RunFolder, tmp_path: Path):
    drawn = said("steps", run.path)
    assert [state for state in ("done", "running", "waiting") if state in drawn] == ["waiting"]
    run.write_record(f"steps/{TAUGHT}/record", record_of(run, TAUGHT))
    run.event(REINFORCED, "start", pool="home")
    run.event(REINFORCED, "step", step=1)
    first, taught, reinforced = said("steps", run.path).splitlines()
    assert first == "model"
    assert f"{TAUGHT}  sft  done  24 updates on home, checkpoint 5ea1ed00" in taught and "hand-off" not in taught
    assert f"{REINFORCED}  rl  running  1 of 2 updates  => hand-off" in reinforced
    assert reinforced.index(REINFORCED) > taught.index(TAUGHT), "it hangs below the weights that it takes"


def test_the_steps_of_a_recipe_are_drawn_with_their_data_and_warnings(tmp_path: Path):
    sampled = '[[step]]\nname = "harvest"\nkind = "sample"\nfrom = "reasoning"\ntasks = ["countdown"]\n\n'
    recipe = tmp_path / "more.toml"
    recipe.write_text(SMALL_RECIPE.replace("[handoff]\n", f"{sampled}[handoff]\n"), encoding="utf-8")
    drawn = said("steps", recipe)
    assert "harvest  sample  <- countdown" in drawn and "waiting" not in drawn
    assert "nothing takes the data of 'harvest'" in drawn


def test_set_reaches_a_step_by_its_name(tmp_path: Path):
    recipe = load_recipe(
        RECIPE,
        (f"step.{TAUGHT}.steps=7", f"step.{REINFORCED}.optimizer.learning_rate=1e-5", f"step.{REINFORCED}.options.x=1"),
    )
    assert recipe.named(TAUGHT).steps == 7 and recipe.named(REINFORCED).steps == 64  # type: ignore[union-attr]
    reinforced: Any = recipe.named(REINFORCED)
    assert reinforced.optimizer.learning_rate == 1e-5 and reinforced.options["x"] == 1
    assert reinforced.optimizer.gradient_clip == 0.2, "what is not named stays"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("step.cold-strt.steps=7", "no step 'cold-strt'; did you mean 'cold-start'"),
        ("step.cold-start=7", "'cold-start' is a step; write --set step.cold-start.KEY=VALUE"),
        ("step.0.steps=7", "no step '0'"),
        ("step.cold-start.steps.more=7", "'steps' is a value, not a section"),
    ],
)
def test_set_of_what_no_step_has_is_refused(override: str, words: str):
    with pytest.raises(RecipeError, match=words):
        load_recipe(RECIPE, (override,))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("tasks.mine.kind=jsonl", "train_file"),
        ("tasks.countdown.largst=9", "unknown key tasks.countdown.largst; did you mean 'largest'"),
        ("tasks.countdwn.largest=9", "unknown kind of task 'countdwn'; did you mean 'countdown'"),
        ("step.reasoning.rewards.acuracy=1", "unknown kind of reward 'acuracy'; did you mean 'accuracy'"),
        ("step.reasoning.options.clip_hihg=1", r"step\.reasoning\.options\.clip_hihg.*clip_high"),
    ],
)
def test_options_that_nothing_has_are_refused_before_a_run_begins(override: str, words: str):
    with pytest.raises(IsthmusError, match=words):
        said("run", RECIPE, "--dry-run", "--set", override)
