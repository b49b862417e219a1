"""What a recipe does by itself, on any chip, is not the pool's fault; what this pool alone does is."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from isthmus.chips import get_chip
from isthmus.chips.rehearse.faults import parse_fault
from isthmus.launch.crew import Called, Crew, Reply
from isthmus.pools import get_pool
from isthmus.probes import PRELOAD, stability
from isthmus.probes.contract import Setting
from isthmus.probes.judge.soak_judgement import problems_of
from isthmus.probes.recipes_own import STEPS_AGAIN, owners_of, raised_by_recipe, stopped_by_recipe
from isthmus.recipe.read import load_recipe
from isthmus.run import RunFolder
from tests.support.flow_recipe import RECIPE, SMALL, written

ADAMW = {"sft.optimizer.name": "adamw", "sft.batch_size": 4, "qualify.soak_s": 0.1}
JUMPS = {"sft.optimizer.learning_rate": 0.01, "sft.optimizer.warmup_steps": 6, "model.initializer_range": 0.002}
ENDS = {"sft.optimizer.learning_rate": 1e12, "sft.optimizer.warmup_steps": 2}
JUMP, END = 15, 1


def setting_of(path: Path, **more: Any) -> Setting:
    changes = {written(name): value for name, value in {**ADAMW, **more}.items()}
    overrides = {**SMALL, **changes, "place.train": '["home"]'}
    run = RunFolder.create(path, load_recipe(RECIPE, tuple(f"{key}={value}" for key, value in overrides.items())))
    pool = get_pool(run.recipe, "home")
    return Setting(run.recipe, pool, get_chip("cpu"), None, "cpu", path, path / "qualify" / "home")


@pytest.fixture(scope="module")
def jumping(tmp_path_factory: pytest.TempPathFactory) -> tuple[Setting, Crew, dict[str, Any]]:
    """A recipe whose gradient jumps at a step, and what a rank saw of it."""
    setting = setting_of(tmp_path_factory.mktemp("jumping") / "run", **JUMPS)
    arguments = {"run": str(setting.root), "pool": "home", "folder": str(setting.folder / "soak"), "steps": JUMP + 1}
    with Crew(1, preload=PRELOAD) as crew:
        (seen,) = crew.call(STEPS_AGAIN, arguments, deadline_s=100.0).values
    return setting, crew, seen


def owners(setting: Setting, crew: Crew, seen: dict[str, Any]):
    return owners_of(crew, setting, [seen], problems_of([seen]), deadline_s=100.0)


def test_a_jump_that_repeats_bit_for_bit_is_the_recipes(jumping: tuple[Setting, Crew, dict[str, Any]]):
    setting, crew, seen = jumping
    (problem,) = problems_of([seen])
    assert f"the gradient at step {JUMP}" in problem.what and problem.step == JUMP
    found = owners(setting, crew, seen)
    assert not found.problems and found.own == [problem] and found.repeated == JUMP + 1
    assert "bit for bit" in str(found) and "The recipe's own" in str(found)


def test_a_jump_that_a_trusted_chip_does_not_repeat_is_the_pools(jumping: tuple[Setting, Crew, dict[str, Any]]):
    setting, crew, seen = jumping
    changed = deepcopy(seen)
    changed["norms"][7] *= 1 + 1e-12
    found = owners(setting, crew, changed)
    assert not found.own and "has another norm of the gradient from step 7 on" in found.problems[0].what


def test_another_arithmetic_must_jump_at_the_same_step_by_about_as_much(jumping: tuple[Setting, Crew, dict[str, Any]]):
    setting, _, seen = jumping
    elsewhere = Crew(1, "cuda")
    nearly = deepcopy(seen)
    nearly["norms"] = [norm * 1.01 for norm in nearly["norms"]]
    found = owners(setting, elsewhere, nearly)
    assert found.own and not found.problems and "in its own arithmetic" in str(found)
    nearly["norms"][JUMP] *= 5
    found = owners(setting, elsewhere, nearly)
    assert not found.own and "this machine's CPU does not do so" in found.problems[0].what


def test_a_recipe_whose_numbers_end_is_soaked_with_the_steps_before(tmp_path: Path):
    setting = setting_of(tmp_path / "run", **ENDS)
    with Crew(1, preload=PRELOAD) as crew:
        (found,) = stability.soak(crew, setting, round_steps=2)
    assert found.outcome == "pass" and f"from the start again after every {END}" in found.detail
    assert f"not finite at step {END}" in found.detail and "bit for bit" in found.detail


def test_a_rank_that_makes_numbers_end_is_still_found_under_such_a_recipe(tmp_path: Path):
    setting = setting_of(tmp_path / "run", **JUMPS)
    with Crew(1, faults=[parse_fault("nan@rank=0,step=3")], preload=PRELOAD) as crew:
        (found,) = stability.soak(crew, setting, round_steps=2)
    assert found.outcome == "fail" and "not finite at step 3" in found.detail and "has another loss" in found.detail


def test_what_cannot_be_repeated_is_not_known(jumping: tuple[Setting, Crew, dict[str, Any]]):
    setting, crew, seen = jumping
    found = owners_of(crew, setting, [seen], problems_of([seen]), deadline_s=0.0)
    assert not found.problems and not found.own and "not known" in found.open[0].what


def test_what_every_rank_says_of_the_recipe_is_told_to_its_author():
    alike = Called([Reply(rank, "raised", error="IsthmusError: the example is too long") for rank in range(2)], 1.0)
    assert raised_by_recipe(alike) == "the example is too long"
    assert raised_by_recipe(Called([Reply(0, "raised", error="OutOfMemoryError: no")], 1.0)) is None
    assert raised_by_recipe(Called([Reply(0, "crashed", error="IsthmusError: x"), Reply(1, "done")], 1.0)) is None


def test_a_stop_counts_as_the_recipes_only_where_it_was_repeated():
    seen: list[dict[str, Any]] = [{"stopped": 3}]
    own = SimpleNamespace(own=[SimpleNamespace(step=3)])
    assert stopped_by_recipe(own, seen) == 3  # pyright: ignore[reportArgumentType]
    assert stopped_by_recipe(SimpleNamespace(own=[]), seen) is None  # pyright: ignore[reportArgumentType]
