"""The incidents that benchmarks/revert.py plants: one of each kind of step is met, and the end is its twin's."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from benchmarks.revert_incidents import Twins, one_incident
from benchmarks.revert_steps import KINDS, in_one_process


@pytest.mark.parametrize("kind", KINDS)
def test_a_process_that_ends_is_found_restarted_and_loses_nothing(tmp_path: Path, kind: str):
    with in_one_process():
        found = one_incident("process ends", kind, Twins(tmp_path), random.Random(0))
    assert found["found"] and found["right"] and found["same"] and found["batches"], found
    assert found["rungs"] == ["restart"]
