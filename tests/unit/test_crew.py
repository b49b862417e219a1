"""A crew of ranks: its answers, and who is named when one of them crashes, raises or hangs."""

from __future__ import annotations

import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from isthmus.launch.beats import Beat
from isthmus.launch.crew import Crew
from isthmus.launch.places import Answer


@pytest.fixture(scope="module")
def crew():
    with Crew(3) as crew:
        yield crew


def test_each_rank_answers_again_and_again(crew: Crew):
    for start in (1.0, 2.0):
        called = crew.call("tests.support.crew_work:add_up", {"start": start}, deadline_s=30)
        assert called.values == [3 * start + 3.0] * 3
    assert len(crew.starts[-1]) == 3 and all(seconds > 0 for seconds in crew.starts[-1])


def test_a_rank_that_dies_is_named_and_the_next_call_starts_new_ranks(crew: Crew):
    called = crew.call("tests.support.crew_work:die", {"who": 1}, deadline_s=30)
    assert not called.ok and called.culprits() == [1]
    assert called.replies[1].error == "killed by signal 9" and "rank 1 crashed" in called.describe()
    assert crew.call("tests.support.crew_work:add_up", {"start": 0.0}, deadline_s=30).values == [3.0] * 3


def test_the_error_of_a_rank_and_what_it_printed_are_kept(crew: Crew):
    called = crew.call("tests.support.crew_work:complain", {"who": 2}, deadline_s=30)
    assert called.culprits() == [2] and called.replies[2].error == "ValueError: this cannot be"
    assert "this cannot be" in called.replies[2].log


def test_what_all_ranks_refuse_alike_is_the_fault_of_no_single_one(crew: Crew):
    called = crew.call("tests.support.crew_work:refuse", {}, deadline_s=30)
    assert called.culprits() == [0, 1, 2] and called.describe() == "all 3 ranks raised: ValueError: nobody can do this"


def test_of_ranks_that_hang_the_one_that_lags_is_named(crew: Crew):
    called = crew.call("tests.support.crew_work:lag", {"who": 0}, deadline_s=60, stall_s=1.5)
    assert [reply.state for reply in called.replies] == ["hung"] * 3
    assert called.culprits() == [0] and called.seconds < 20
    assert called.replies[0].beat.step == 1 and called.replies[1].beat.step in (1, 2)


def test_a_deadline_ends_a_call_that_goes_on(crew: Crew):
    called = crew.call("tests.support.crew_work:lag", {"who": 0}, deadline_s=1.0)
    assert not called.ok and called.seconds < 20


class Idle:
    """A rank that answers its set-up at once, and then after a while without a beat; it had no processor till then."""

    connection: Connection | None = None

    def __init__(self, answers_after_s: float, *, starved: bool):
        self.after, self.starved, self.asked = answers_after_s, starved, None

    def start(self, setup: object) -> None:
        pass

    def ask(self, function: str, arguments: dict[str, object]) -> None:
        self.asked = time.monotonic()

    def answer(self) -> Answer | None:
        waited = self.after if self.asked is None else time.monotonic() - self.asked
        return Answer("done", None, waited) if waited >= self.after else None

    def beat(self) -> Beat:
        return Beat(0.0, 0, 0, 0, "")

    def starved_s(self) -> float:
        return time.monotonic() - self.asked if self.asked is not None and self.starved else 0.0

    def log(self) -> str:
        return ""

    def release(self) -> None:
        pass

    def end(self, *, politely: bool) -> None:
        pass


@pytest.mark.parametrize(("starved", "state"), [(True, "done"), (False, "hung")])
def test_a_rank_that_waits_for_a_processor_does_not_hang(starved: bool, state: str):
    with Crew(1, places=[Idle(0.5, starved=starved)]) as crew:
        called = crew.call("any:thing", deadline_s=30.0, stall_s=0.2)
    assert called.replies[0].state == state


def test_the_wait_for_a_processor_is_read_off_the_system(crew: Crew):
    crew.start()
    assert all(place.starved_s() >= 0.0 for place in crew.places)
    assert all(place.starved_s() > 0.0 for place in crew.places) == Path("/proc/self/schedstat").is_file()
