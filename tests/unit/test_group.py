"""The rehearsed process group: gloo's own results where nothing is planted, a chip's rules, shaped links, culprits."""

from __future__ import annotations

import csv
from importlib import resources

import pytest

from isthmus.chips.rehearse.dispatch import short_name
from isthmus.chips.rehearse.faults import parse_fault
from isthmus.chips.rehearse.links import HOST, Links, LinkShape, route_of
from isthmus.launch.crew import Called, Crew
from tests.support.fault_work import DTYPES

CHIP = "ascend-910b-313t"
WORLD = 3


@pytest.fixture(scope="module")
def crew():
    with Crew(WORLD) as crew:
        yield crew


def call(crew: Crew, function: str, **arguments) -> list:
    return crew.call(f"tests.support.fault_work:{function}", arguments, deadline_s=120).values


def with_faults(function: str, *faults: str, world: int = WORLD, stall_s: float | None = None, **arguments) -> Called:
    with Crew(world, faults=[parse_fault(fault) for fault in faults]) as crew:
        return crew.call(f"tests.support.fault_work:{function}", arguments, deadline_s=120, stall_s=stall_s)


@pytest.mark.parametrize("dtype", list(map(short_name, DTYPES)))
def test_every_collective_gives_the_bits_that_gloo_gives(crew: Crew, dtype: str):
    assert call(crew, "differing", dtype=dtype) == [[]] * WORLD


@pytest.mark.parametrize("how", ["fsdp2", "ddp"])
def test_training_ends_in_the_same_bits(crew: Crew, how: str):
    assert call(crew, "trained", how=how) == [True] * WORLD


def test_collectives_are_counted_and_messages_are_not(crew: Crew):
    assert call(crew, "counted") == [[1, 2, 3, 4, 4, 5]] * WORLD


def test_a_dispatch_mode_counts_where_no_group_does(crew: Crew):
    assert call(crew, "seen") == [3] * WORLD


def test_other_backends_names_stand_for_the_rehearsed_one():
    names = ["hccl", "nccl", "cpu:gloo,cuda:nccl", "gloo"]
    with Crew(2) as crew:
        assert call(crew, "other_names", names=names) == [[[name, 2.0, 1] for name in names]] * 2


@pytest.mark.parametrize("how", ["fsdp2", "ddp"])
def test_training_is_struck_in_its_operators_and_its_collectives(how: str):
    """Backward of the second of two layers is two products, of the first one; a mean of gradients is a reduction."""
    faults = ("nan@rank=1,operator=aten::mm", "wrong-sum@rank=0")
    fired = with_faults("trained_with_faults", *faults, world=2, how=how).values
    assert len([text for text in fired[1] if "aten::mm" in text]) == 9 == len(fired[1])
    assert any("reduce" in text for text in fired[0])


def rules(kind: str) -> list[dict[str, str]]:
    text = (resources.files("isthmus.chips.rehearse") / "ascend" / "collectives.csv").read_text(encoding="utf-8")
    return [row for row in csv.DictReader(text.splitlines()) if row["kind"] == kind and "A2" in row["generations"]]


def refused(collective: str, kind: str) -> set[str]:
    """The dtypes or reductions that the table refuses to a collective."""
    found = [
        row["values"].split("|")
        for row in rules(kind)
        if row["action"] == "refuse" and {collective, "*"} & set(row["collectives"].split("|"))
    ]
    return {value for values in found for value in values}


@pytest.mark.parametrize("collective", ["all_reduce", "reduce", "reduce_scatter"])
def test_reductions_are_refused_as_the_table_says_and_no_others(crew: Crew, collective: str):
    dtypes, operations = refused(collective, "dtype"), refused(collective, "reduction")
    assert "float64" in dtypes and operations == {"band", "bor", "bxor"}
    for found in call(crew, "ruled", chip=CHIP, name=collective):
        for key, outcome in found.items():
            dtype, operation = key.split()
            assert (outcome == "refused") == (dtype in dtypes or operation in operations), (key, outcome)
    root = found if collective == "all_reduce" else call(crew, "ruled", chip=CHIP, name=collective)[0]
    for dtype in ("int8", "int32", "int64", "float16", "bfloat16", "float32"):
        assert float(root[f"{dtype} sum"]) == 6 and float(root[f"{dtype} max"]) == 3
        assert float(root[f"{dtype} avg"]) == 2 and float(root[f"{dtype} product"]) == 6


def test_copies_are_refused_as_the_table_says_and_no_others(crew: Crew):
    found = call(crew, "ruled_copies", chip=CHIP)
    for key, outcome in found[0].items():
        collective, dtype = key.split()
        assert (outcome == "refused") == (dtype in refused(collective, "dtype")), (key, outcome)
    assert found[0]["gather float32"] == "2.0" and found[1]["gather float32"] != "refused"
    assert [one["broadcast float64"] for one in found] == ["2.0"] * WORLD


def test_a_sum_of_booleans_is_their_maximum(crew: Crew):
    assert {one["bool sum"] for one in call(crew, "ruled", chip=CHIP, name="all_reduce")} == {"True"}


def test_a_mean_is_a_sum_first_and_so_overflows_in_half_precision(crew: Crew):
    assert call(crew, "means", chip=CHIP, dtype="float16", value=30000.0) == [[float("inf")] * 2] * WORLD
    assert call(crew, "means", chip=CHIP, dtype="float16", value=20000.0) == [[20000.0] * 2] * WORLD
    assert call(crew, "means", chip=CHIP, dtype="int32", value=7) == [[7, 7]] * WORLD


def test_a_premultiplied_sum_multiplies_first(crew: Crew):
    found = call(crew, "premultiplied", chip=CHIP, factor=0.5)
    assert found == [[3.0, 0.5 * WORLD * rank] for rank in range(WORLD)]


def test_a_rank_that_comes_later_than_the_connect_time_out_is_refused(crew: Crew):
    found = call(crew, "late", chip=CHIP, default="default 1 s", seconds=2.5)
    assert any("a rank was not there 1 s after another began to connect" in one for one in found[:-1])
    assert "connected" not in found


def test_a_rank_may_come_later_than_that_where_the_time_out_is_longer(crew: Crew):
    assert call(crew, "late", chip=CHIP, default="default 60 s", seconds=1.5) == ["connected"] * WORLD


def test_a_connect_time_out_outside_its_range_is_refused(crew: Crew):
    for found in call(crew, "out_of_range", chip=CHIP, seconds="60"):
        assert "HCCL_CONNECT_TIMEOUT=60 is outside its range" in found
    assert call(crew, "out_of_range", chip=CHIP, seconds="600") == ["connected"] * WORLD


def test_a_crew_of_a_rehearsed_chip_has_its_rules():
    with Crew(2, chip=CHIP) as crew:
        assert crew.call("tests.support.crew_work:add_up", {"start": 1.0}, deadline_s=60).ok
        called = crew.call("tests.support.fault_work:bitwise", deadline_s=60)
    assert not called.ok and "RehearsalRefused" in called.describe()


def test_what_a_chip_gathers_in_its_own_way_can_be_damaged():
    with Crew(2, chip=CHIP, faults=[parse_fault("nan@rank=0,operator=c10d::gather_")]) as crew:
        assert call(crew, "gathered") == [1, 0]


def test_a_wrong_sum_is_in_the_reductions_of_one_rank_at_one_step():
    found = with_faults("damaged", "wrong-sum@rank=1,step=1", count=3).values
    assert found[1] == [[0] * 6, [1, 0, 1, 1, 1, 1], [0] * 6]
    assert found[0] == found[2] == [[0] * 6] * 3


def test_values_of_one_kind_of_collective_are_damaged():
    found = with_faults("damaged", "nan@rank=2,operator=c10d::broadcast_", count=1).values
    assert found == [[[0] * 6], [[0] * 6], [[0, 1, 0, 0, 0, 0]]]


def test_a_wrong_sum_is_wrong_by_as_much_as_asked():
    values = with_faults("sums", "wrong-sum@rank=0,size=0.5,step=0", count=1).values
    wrong = [(a, b) for a, b in zip(values[0][0], values[1][0], strict=True) if a != b]
    assert len(wrong) == 1 and wrong[0][0] == pytest.approx(1.5 * wrong[0][1])


@pytest.mark.parametrize("what", ["all_reduce", "all_gather", "reduce_scatter", "broadcast", "barrier", "functional"])
def test_a_slow_link_slows_collectives_that_use_it(what: str):
    """100 ms of latency, in as many turns as a ring of three takes: an all-reduce has four."""
    turns = {"all_reduce": 4, "functional": 4}.get(what, 2)
    slow = with_faults("timed", "slow-link@rank=0,peer=2,size=1001", what=what).values
    assert all(seconds > turns * 0.1 for seconds in slow)


def test_a_slow_link_slows_no_group_that_does_not_hold_both_ends():
    seconds = with_faults("timed", "slow-link@rank=0,peer=2,size=5001", what="all_reduce", ranks=[0, 1]).values
    assert max(seconds) < 1.0


def test_in_an_exchange_of_all_with_all_only_the_ends_of_a_slow_link_are_late():
    seconds = with_faults("timed", "slow-link@rank=0,peer=2,size=5001", what="all_to_all").values
    assert seconds[0] > 0.5 and seconds[2] > 0.5 > seconds[1]


def test_other_ways_to_call_are_slowed_too():
    for what in ("asynchronous", "object"):
        slow = with_faults("timed", "slow-link@rank=1,size=1001", what=what).values
        assert all(seconds > 0.4 for seconds in slow)


def test_messages_are_slowed_on_their_own_link_by_latency_and_by_bandwidth():
    arguments = {"repeats": 2, "megabytes": 0.0}
    fault = "slow-link@rank=0,peer=1,size=1001"
    assert with_faults("messages", fault, left=0, right=1, **arguments).values[0] > 0.1
    assert with_faults("messages", fault, left=1, right=2, **arguments).values[1] < 0.1
    size = 2.0
    expected = 50 * (2**20 * size / (HOST.bandwidth_gbs * 1e9) + HOST.latency_us * 1e-6)
    taken = with_faults("messages", "slow-link@rank=0,peer=1,size=51", left=1, right=0, repeats=2, megabytes=size)
    assert expected < taken.values[1] < 5 * expected


def test_a_cut_link_hangs_its_ends_until_the_time_out():
    for error in with_faults("cut_off", "link-cut@rank=2,peer=0", seconds=0.5).values:
        assert "Timed out waiting 500ms for all_reduce" in error and "between ranks 0 and 2" in error
        assert error.endswith("in time")


@pytest.mark.parametrize(
    ("fault", "function", "arguments", "culprits"),
    [
        ("crash@rank=1,step=1", "steps", {"count": 3}, [1]),
        ("crash@rank=2,step=0,size=3", "steps", {"count": 3}, [2]),
        ("hang@rank=0,step=2", "steps", {"count": 3}, [0]),
        ("hang@rank=2,operator=c10d::barrier", "steps", {"count": 3}, [2]),
        ("hang@rank=1,step=1,operator=aten::mm", "steps", {"count": 3}, [1]),
        ("out-of-memory@rank=1,step=1", "steps", {"count": 3}, [1]),
        ("link-cut@rank=0,peer=1", "messages", {"left": 0, "right": 1, "megabytes": 0.0, "repeats": 1}, [0, 1]),
        ("link-cut@rank=1,step=1", "steps", {"count": 3}, [0, 1, 2]),
    ],
)
def test_a_crew_names_the_ranks_at_fault(fault: str, function: str, arguments: dict, culprits: list[int]):
    called = with_faults(function, fault, stall_s=3.0, **arguments)
    assert not called.ok and called.culprits() == culprits


def test_an_exit_code_is_reported():
    called = with_faults("steps", "crash@rank=0,step=1,size=7", world=2, count=2)
    assert called.replies[0].error == "exit code 7" and called.replies[0].beat.step == 1


def test_a_cut_link_leaves_other_pairs_alone():
    called = with_faults("messages", "link-cut@rank=0,peer=1", left=1, right=2, megabytes=0.0, repeats=1)
    assert called.ok


def test_who_waits_for_a_link_and_who_does_not():
    ranks = [0, 1, 2, 3]
    ring = route_of("all-reduce", ranks, 2, 0, 400)
    assert len(ring.pairs) == 6 and ring.size == 600 and ring.messages == 6
    assert route_of("all-to-all", ranks, 2, 0, 400).pairs == ((0, 2), (1, 2), (2, 3))
    assert route_of("star", ranks, 3, 1, 10).pairs == ((1, 3),)
    assert len(route_of("star", ranks, 1, 1, 10).pairs) == 3
    assert route_of("pair", [4, 7], 1, 0, 8).pairs == ((4, 7),)


def test_links_are_as_slow_as_their_shape_and_never_faster_than_the_host():
    slow = LinkShape(HOST.bandwidth_gbs / 4, HOST.latency_us * 3)
    route = route_of("pair", [0, 1], 0, 1, 1e6)
    late = Links([], lambda a, b: slow).passage(route, "g", 0).late_s
    assert late == pytest.approx(1e6 * 3 / (HOST.bandwidth_gbs * 1e9) + 2 * HOST.latency_us * 1e-6)
    assert Links([], lambda a, b: LinkShape(1000.0, 0.1)).passage(route, "g", 0).late_s == 0.0


def test_both_ends_of_a_link_agree_when_it_is_slow():
    fault = parse_fault("slow-link@rank=1,rate=0.5,seed=3")
    route = route_of("pair", [1, 4], 0, 1, 1.0)
    ends = [Links([fault]) for _ in range(2)]
    first, second = ([end.passage(route, "g", 0).late_s > 0 for _ in range(40)] for end in ends)
    assert first == second and 8 < sum(first) < 32
