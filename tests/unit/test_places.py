"""Ranks of processes that torchrun would have started: asked, watched and ended over a shared store."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from isthmus.chips.rehearse.faults import Fault
from isthmus.launch.crew import Crew
from isthmus.launch.places import Attendant, remote_places

WORLD = 3


@pytest.fixture
def store():
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))


@pytest.fixture
def places(store):
    """Attendants of the other ranks in threads here; torchrun gives each a process of its own."""
    others = [threading.Thread(target=Attendant(store.clone(), rank).attend) for rank in range(1, WORLD)]
    for other in others:
        other.start()
    with remote_places(store, WORLD, 0) as places:
        yield places
    for other in others:
        other.join(timeout=30)
        assert not other.is_alive(), "it was not told to go"


def test_remote_ranks_answer_crash_and_come_back(places):
    with Crew(WORLD, places=places) as crew:
        assert crew.call("tests.support.crew_work:add_up", {"start": 1.0}, deadline_s=60).values == [6.0] * WORLD
        called = crew.call("tests.support.crew_work:die", {"who": 1}, deadline_s=60)
        assert called.culprits() == [1] and called.replies[1].error == "killed by signal 9"
        called = crew.call("tests.support.crew_work:complain", {"who": 2}, deadline_s=60)
        assert called.culprits() == [2] and "this cannot be" in called.replies[2].log
        assert crew.call("tests.support.crew_work:add_up", {"start": 0.0}, deadline_s=60).values == [3.0] * WORLD
        assert len(crew.starts) == 3


def test_a_remote_rank_that_lags_is_named_and_faults_travel(places):
    with Crew(WORLD, places=places, faults=(Fault("hang", rank=2, step=1),)) as crew:
        called = crew.call("tests.support.crew_work:lag", {"who": -1}, deadline_s=60, stall_s=2.0)
        assert not called.ok and called.culprits() == [2]
