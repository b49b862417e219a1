"""A rank that is killed with -9 on a pool that is given up: the step ends on the next pool, and nothing is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

from isthmus.records import PlanRecord, Rejection, incidents, read_weights
from isthmus.run import RunFolder
from tests.support.flow_recipe import ROOT, TAUGHT, command
from tests.support.ranks_recipe import RECIPE, children, environment_of, planned, working_on

TWO_POOLS = (
    RECIPE.replace('train = ["home"]', 'train = ["home", "spare"]') + '\n[pools.spare]\nchip = "cpu"\nthreads = 1\n'
)


def with_spare(folder: Path, **changes: object) -> RunFolder:
    run = RunFolder.open(planned(folder, TWO_POOLS, sft__steps=10, sft__checkpoint_every=3, **changes))
    plan = run.require_record("plan", PlanRecord, "plan")
    other = Rejection(stage="train", pool="spare", reason="acceptable", acceptable=True)
    run.write_record("plan", plan.model_copy(update={"rejected": [other]}))
    return run


def test_a_killed_rank_of_a_pool_that_is_given_up_leads_to_the_next_pool(tmp_path):
    run = with_spare(tmp_path / "run", pools__home__ranks=2, supervise__restarts=0, supervise__shrinks=0)
    process = subprocess.Popen(
        command("run", run.path, "--only", TAUGHT),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    while max((event["step"] for event in run.events(TAUGHT, "step")), default=0) < 5:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    (rank,) = [pid for pid in children(process.pid) if b"RANK=1" in environment_of(pid)]
    os.kill(rank, signal.SIGKILL)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, output + errors

    (moved,) = incidents(run, TAUGHT)
    assert (moved.rung, moved.outcome, moved.to_pool) == ("revert", "done", "spare") and "rank 1" in moved.detail
    assert moved.gate is not None and moved.gate.verdict == "go" and moved.gate.checkpoint_step == 3
    assert moved.gate.repeated_steps[0] == 4
    assert read_weights(run, TAUGHT).pool == "spare"
    steps = run.events(TAUGHT, "step")
    assert [event["step"] for event in steps] == list(range(1, 11))
    assert [event["ranks"] for event in steps][-1] == 1 and {event["ranks"] for event in steps} == {1, 2}
    assert not working_on(run.path)
