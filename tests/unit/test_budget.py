"""What a budget buys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from isthmus.chips import get_chip, looked_for
from isthmus.errors import IsthmusError
from isthmus.pools import get_pool
from isthmus.probes.budget import choose, parse_seconds
from isthmus.probes.contract import Probe, Setting
from isthmus.recipe.read import load_recipe
from tests.support.flow_recipe import RECIPE


def probe(name: str, aspect: Any, price: float, *finds: Any, min_ranks: int = 1) -> Probe:
    return Probe(name, aspect, "training", finds, lambda _: price, lambda *_: [], min_ranks)


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    recipe = load_recipe(RECIPE, ("pools.home.count=2",))
    return Setting(recipe, get_pool(recipe, "home"), get_chip("cpu"), None, "cpu", tmp_path, tmp_path)


PROBES = [
    probe("soak", "stability", 60.0, "crash", "hang", "corrupted-save"),
    probe("known answers", "stability", 2.0, "wrong-sum", "flipped-bit"),
    probe("pairs", "links", 3.0, "slow-link", "link-cut"),
    probe("pairs again", "links", 3.0, "slow-link", "link-cut"),
    probe("operators", "software", 10.0, "fallback", "dtype-swap", "nan", "small-error"),
    probe("eight at once", "links", 1.0, "hang", min_ranks=8),
]


def test_without_a_budget_all_that_can_run_are_chosen_cheapest_first(setting: Setting):
    choice = choose(PROBES, setting, None)
    assert [one.name for one, _ in choice.chosen] == ["known answers", "pairs", "pairs again", "operators", "soak"]
    assert not choice.skipped
    assert choice.seconds == 78.0


def test_a_budget_buys_what_tells_most_per_second_and_says_what_nobody_looks_for(setting: Setting):
    choice = choose(PROBES, setting, 16.0)
    assert [one.name for one, _ in choice.chosen] == ["known answers", "pairs", "operators"]
    skipped = {one.probe: one for one in choice.skipped}
    assert skipped["soak"].unseen == ["crash", "hang", "corrupted-save"] and skipped["soak"].price_s == 60.0
    assert skipped["pairs again"].unseen == [] and "16 s" in skipped["pairs again"].why


@pytest.mark.parametrize("budget", [0.5, 2.5, 5.0, 15.0, 18.0, 70.0, 100.0])
def test_a_budget_is_kept_and_more_of_it_never_shows_less(setting: Setting, budget: float):
    def seen(budget_s: float) -> float:
        choice = choose(PROBES, setting, budget_s)
        assert choice.seconds <= budget_s
        assert len(choice.chosen) + len(choice.skipped) == 5
        pairs = {(one.aspect, kind) for one, _ in choice.chosen for kind in one.finds}
        return sum(looked_for(aspect, [k for a, k in pairs if a == aspect]) for aspect in ("stability", "links"))

    assert seen(budget) <= seen(2 * budget)


@pytest.mark.parametrize(("text", "seconds"), [("30s", 30.0), ("2min", 120.0), ("1.5h", 5400.0), ("90", 90.0)])
def test_durations(text: str, seconds: float):
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "-3s", "0s", "3 days"])
def test_other_texts_are_no_durations(text: str):
    with pytest.raises(IsthmusError, match="for example 30s"):
        parse_seconds(text)
