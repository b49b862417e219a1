"""Updates that bf16 undoes: rounding at random keeps them on average, and the measure finds what is lost."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.formats import get_format
from isthmus.formats.files.bundle import Bundle
from isthmus.formats.parts.stochastic import StochasticState, round_stochastically
from isthmus.model.model import Model
from isthmus.parity.coverage import check_coverage
from isthmus.parity.undone import LIMIT, Updates, check_updates, measure_updates
from isthmus.records import Check
from isthmus.run import Figure
from tests.support.small_dense import dense_architecture

DENSE = dense_architecture("llama", vocab_size=61)


@given(st.floats(min_value=-(2.0**127), max_value=2.0**127, width=32, allow_subnormal=False), st.integers(0, 2**40))
@settings(max_examples=300, deadline=None)
def test_a_number_becomes_one_of_its_two_neighbours(value: float, seed: int):
    (found,) = round_stochastically(torch.tensor([value]), seed, "x").float().tolist()
    exact = torch.tensor(value)
    nearest = exact.bfloat16()
    if float(nearest) == value:
        assert found == value
    else:
        other = torch.nextafter(nearest, torch.tensor(math.copysign(math.inf, value - float(nearest))).bfloat16())
        assert found in (float(nearest), float(other))


@pytest.mark.parametrize("value", [1.0 + 2**-10, -1.0 - 3 * 2**-11, 3.7e-5, -1e-40, 123.456])
def test_the_mean_is_the_number_itself(value: float):
    """Against the exact probability: of n independent roundings, within four standard deviations of it."""
    draws = 40_000
    exact = torch.full((draws,), value)
    found = round_stochastically(exact, 0, "mean").double()
    low, high = (float(one) for one in (found.min(), found.max()))
    assert low < float(exact[0]) < high
    deviation = math.sqrt((float(exact[0]) - low) * (high - float(exact[0])) / draws)
    assert abs(float(found.mean()) - float(exact[0])) < 4 * deviation


def test_the_same_seed_and_name_give_the_same_numbers_and_others_do_not():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    once = round_stochastically(x, 3, "a")
    assert torch.equal(once, round_stochastically(x, 3, "a"))
    assert not torch.equal(once, round_stochastically(x, 4, "a"))
    assert not torch.equal(once, round_stochastically(x, 3, "b"))
    assert torch.equal(StochasticState({"a": x}, 3)["a"], once)
    odd = torch.tensor([math.inf, -math.inf, math.nan, 0.0])
    assert torch.equal(round_stochastically(odd, 0, "x").float().nan_to_num(7), odd.nan_to_num(7))


def test_small_moves_survive_on_average_and_to_the_nearest_they_do_not():
    """A tenth of a step: to the nearest nothing is left of it, at random a tenth of the elements moves a whole step."""
    start = torch.ones(100_000)
    masters = start + 0.1 * 2**-7
    nearest, random = masters.bfloat16(), round_stochastically(masters, 0, "w")
    state = {"w": start.bfloat16()}
    assert measure_updates(state, {"w": masters}, {"w": nearest}) == Updates(100_000, 100_000, 100_000)
    assert measure_updates(state, {"w": masters}, {"w": random}).share == pytest.approx(0.9, abs=0.01)
    assert float(random.double().mean() - 1) == pytest.approx(0.1 * 2**-7, rel=0.05)


def test_what_is_counted_by_hand():
    start = {"moved": torch.tensor([1.0, 2.0, 4.0, 8.0]), "fp32": torch.tensor([1.0 + 2**-20]), "gone": torch.ones(1)}
    masters = {
        "moved": torch.tensor([1.0, 2.0 + 2**-12, 5.0, 8.0 + 2**-10]),
        "fp32": torch.tensor([1.0]),
        "new": torch.ones(3),
    }
    stored = {name: tensor.bfloat16() for name, tensor in masters.items()}
    assert measure_updates(start, masters, stored) == Updates(elements=4, changed=3, undone=2)
    assert Updates(4, 0, 0).share == 0


@pytest.mark.parametrize(
    ("undone", "kl_outcome", "outcome"),
    [(5, "fail", "pass"), (83, "pass", "caution"), (83, "fail", "fail"), (83, "unknown", "fail")],
)
def test_the_cost_decides_whether_it_is_a_caution_or_a_fault(undone: int, kl_outcome, outcome: str):
    figure = Figure(value=0.27, unit="nats/token", kind="measured", source="golden sequences")
    kl = Check(layer="tokens", name="mean KL", outcome=kl_outcome, figure=figure, detail="")
    check = check_updates(Updates(200, 100, undone), "bf16", kl, Path("published/base"))
    assert check.outcome == outcome and (undone / 100 > LIMIT) == (outcome != "pass")
    assert "since base" in check.detail and "0.27" in check.detail
    assert ('export = "fp32"' in check.detail) == (outcome != "pass")
    at_random = check_updates(Updates(200, 100, undone), "bf16", kl, Path("published/base"), stochastic=True)
    assert at_random.outcome == ("fail" if outcome == "fail" else "pass")


def test_coverage_takes_rounding_at_random_for_what_it_is_and_nothing_else():
    masters = {name: tensor.detach() for name, tensor in Model(DENSE).initialise(0).state_dict().items()}
    rounded = get_format("bf16").export(dict(StochasticState(masters, 1)), DENSE)
    bundle = Bundle(Path("nowhere"), "bf16", DENSE, rounded)
    entries, (check,) = check_coverage(masters, bundle, stochastic=True)
    assert check.outcome == "pass"
    assert any(entry.detail == "rounded at random to bfloat16" for entry in entries)
    assert any(one.outcome == "fail" for one in check_coverage(masters, bundle)[1]), "unless it is asked for"
    name = "model.layers.0.self_attn.q_proj.weight"
    rounded[name][0, 0] = rounded[name][0, 0] * 1.05
    _, (fault,) = check_coverage(masters, bundle, stochastic=True)
    assert fault.outcome == "fail" and fault.module == "model.layers.0.self_attn.q_proj"
