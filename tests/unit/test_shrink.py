"""Shrinking: what is left still fails, in the same manner and as often, and nothing smaller of its kind would."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.launch.crew import Called, Reply
from isthmus.probes.cases.reproduction import manner_of, same_manner
from isthmus.probes.cases.shrink import Budget, Call, Judge, ddmin, manner_of_call, shrink, smallest

WRONG = {"state": "wrong", "errors": []}


def answered(*failed: bool) -> Called:
    return Called([Reply(rank, "done", value={"failed": one}) for rank, one in enumerate(failed)], 0.0)


def judge(run: Callable[[Call], Called], **options: object) -> Judge:
    return Judge(run, WRONG, Budget(60.0, 10_000), **options)  # pyright: ignore[reportArgumentType]


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_the_smallest_number_of_a_threshold_is_the_threshold(one: int, other: int):
    threshold, value = sorted((one, other))
    assert smallest(value, lambda tried: tried >= threshold) == threshold


@given(st.sampled_from([8, 16, 32, 64]), st.integers(1, 100), st.integers(1, 100))
def test_aligned_numbers_are_found_where_others_do_not_even_run(step: int, one: int, other: int):
    least, value = sorted((one * step, other * step))
    assert smallest(value, lambda tried: tried % step == 0 and tried >= least) == least


@given(st.integers(1, 40), st.data())
def test_of_a_list_only_what_is_needed_together_stays(length: int, data: st.DataObject):
    needed = set(data.draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=4)))
    assert set(ddmin(list(range(length)), lambda kept: needed <= set(kept))) == needed


SPECS = st.recursive(
    st.integers(-3, 300) | st.booleans() | st.text("ab", max_size=2),
    lambda inner: (
        st.lists(inner, min_size=1, max_size=3) | st.dictionaries(st.text("xyz", max_size=2), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text("pq", min_size=1, max_size=2), SPECS, max_size=3), st.integers(1, 9), st.integers(0, 99))
def test_what_comes_out_was_seen_to_fail_whatever_fails(arguments: dict, ranks: int, salt: int):
    first = Call(arguments, ranks)
    seen = {first.key}

    def fails(call: Call) -> bool:
        by_chance = zlib.crc32(f"{salt}{call.key}".encode()) % 3 == 0
        if by_chance:
            seen.add(call.key)
        return by_chance

    found = shrink(first, fails)
    assert found.key in seen and found.ranks <= ranks and len(found.key) <= len(first.key)


def test_sizes_that_belong_together_shrink_together():
    calls = [{"operator": name, "shapes": [[64, 96], [96, 32]]} for name in ("good", "bad", "fine", "ok")]

    def fails(call: Call) -> bool:
        for spec in call.arguments["calls"]:
            if len(spec["shapes"]) != 2 or any(len(shape) != 2 for shape in spec["shapes"]):
                return False
            (_, k), (k2, n) = spec["shapes"]
            if k != k2 or k % 16:
                return False
            if spec["operator"] == "bad" and k >= 48 and n >= 3 and call.ranks >= 2:
                return True
        return False

    found = shrink(Call({"calls": calls, "seed": 5, "tolerance": 7}, 16), fails)
    assert found == Call(
        {"calls": [{"operator": "bad", "shapes": [[1, 48], [48, 3]]}], "seed": 5, "tolerance": 7}, ranks=2
    )


@pytest.mark.parametrize(("suspects", "first_tried"), [([2], 3), ([5, 1], 6), ([], 1)])
def test_the_ranks_at_fault_stay_in_the_first_smaller_world(suspects: list[int], first_tried: int):
    tried = []
    shrink(Call({}, 8), lambda call: bool(tried.append(call.ranks)), suspects)
    assert tried[0] == first_tried


def test_a_budget_of_calls_is_kept_and_the_result_still_fails():
    calls = []

    def run(call: Call) -> Called:
        calls.append(call)
        return answered(call.arguments["size"] >= 10)

    limited = Judge(run, WRONG, Budget(60.0, 4))
    found = shrink(Call({"size": 1000}, 4), limited.fails)
    assert len(calls) == 4 and 10 <= found.arguments["size"] < 1000


def test_no_time_left_means_no_step():
    over = Judge(lambda call: answered(True), WRONG, Budget(0.0, 100))
    assert shrink(Call({"size": 1000}, 4), over.fails) == Call({"size": 1000}, 4)


def test_a_smaller_call_that_fails_where_the_first_passed_is_another_failure():
    """Below a size of 10 the call is wrong anywhere, because the probe itself is at its limits."""
    suspect = judge(lambda call: answered(True), reference=lambda call: answered(call.arguments["size"] < 10))
    assert shrink(Call({"size": 640}, 1), suspect.fails) == Call({"size": 10}, 1)


def test_a_failure_that_comes_and_goes_is_kept_as_frequent_as_it_was():
    draws = random.Random(4)

    def run(call: Call) -> Called:
        return answered(draws.random() < (0.7 if call.arguments["size"] >= 16 else 0.05))

    looks = judge(run).frequency(Call({"size": 64}, 1), runs=400, sure_after=401)
    assert looks.runs == 400 and looks.share == pytest.approx(0.7, abs=0.1)
    sizes = [shrink(Call({"size": 64}, 1), judge(run, usual=0.7).fails).arguments["size"] for _ in range(20)]
    assert min(sizes) >= 16 and sizes.count(16) >= 10


def test_a_failure_in_each_of_the_first_runs_is_not_run_on():
    looks = judge(lambda call: answered(True)).frequency(Call({}, 1))
    assert str(looks) == "fails in 3 of 3 runs"


def test_another_way_to_fail_does_not_count_and_is_told():
    def run(call: Call) -> Called:
        return Called([Reply(0, "raised", error="ValueError: no")], 0.0)

    looks = judge(run).frequency(Call({}, 1))
    assert looks.failures == 0 and looks.others == ("raised, ValueError: no",)
    assert not judge(run).fails(Call({}, 1))


def test_the_manner_is_that_of_the_rank_at_fault():
    lost = Reply(0, "raised", error="RuntimeError: connection lost", seconds=2.0)
    complains = Reply(1, "raised", error="ValueError: 48 is odd", seconds=1.0)
    assert manner_of_call(Called([lost, complains], 2.0)) == {"state": "raised", "errors": ["ValueError:"]}
    crashed = Reply(1, "crashed", error="killed by signal 9", seconds=1.0)
    assert manner_of_call(Called([lost, crashed], 2.0)) == {"state": "crashed", "errors": ["killed by signal 9"]}
    assert manner_of_call(answered(False, False)) is None and manner_of_call(answered(False, True)) == WRONG
    hung = Called([Reply(0, "hung"), Reply(1, "stopped")], 2.0)
    assert manner_of_call(hung) == {"state": "hung", "errors": []}


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("RuntimeError: shapes (3x4 and 5x6)", "RuntimeError: shapes (1x2 and 3x4)", True),
        ("RuntimeError: shapes (3x4 and 5x6)", "RuntimeError: out of memory", False),
        ("ValueError: no", "TypeError: no", False),
        ("killed by signal 9", "killed by signal 11", False),
    ],
)
def test_numbers_in_an_error_do_not_make_it_another(one: str, other: str, same: bool):
    state = "crashed" if one.startswith("killed") else "raised"
    manners = [manner_of([{"state": state, "value": None, "error": error}]) for error in (one, other)]
    assert same_manner(*manners) is same
