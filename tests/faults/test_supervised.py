"""A rank that is killed with -9 on a pool that is given up: the step ends on the next pool, and nothing is lost. A step
of reinforcement learning that is asked to stop saves first."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from isthmus.records import PlanRecord, Rejection, RlRecord, incidents, read_weights
from isthmus.run import RunFolder
from tests.support.flow_recipe import REINFORCED, ROOT, TAUGHT, command
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


def started(run: RunFolder, step: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command("run", run.path, "--only", step),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )


def wait_for(run: RunFolder, step: str, update: int, process: subprocess.Popen[str]) -> None:
    while max((event["step"] for event in run.events(step, "step")), default=0) < update:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


@pytest.mark.long
def test_a_killed_rank_of_a_pool_that_is_given_up_leads_to_the_next_pool(tmp_path):
    run = with_spare(tmp_path / "run", pools__home__ranks=2, supervise__restarts=0, supervise__shrinks=0)
    process = started(run, TAUGHT)
    wait_for(run, TAUGHT, 5, process)
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


def test_a_person_is_asked_before_a_move_and_the_next_command_is_the_answer(tmp_path):
    """Exit code 1 says how to go on; with --revert the step moves, the same command without it stays."""
    run = with_spare(tmp_path / "run", supervise__restarts=0, supervise__on_revert='"ask"')
    process = started(run, TAUGHT)
    wait_for(run, TAUGHT, 5, process)
    (trainer,) = [pid for pid in children(process.pid) if b"ISTHMUS_BEATS" in b"".join(environment_of(pid))]
    os.kill(trainer, signal.SIGKILL)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 1 and "Traceback" not in errors, output + errors
    assert "had better move from pool home to spare" in errors
    assert f"To move:  isthmus run {run.path} --revert" in errors and f"To stay:  isthmus run {run.path}\n" in errors
    (asked,) = incidents(run, TAUGHT)
    assert (asked.rung, asked.outcome) == ("revert", "asked")

    stays = RunFolder.open(shutil.copytree(run.path, tmp_path / "stays"))
    answer = subprocess.run(command("run", stays.path, "--only", TAUGHT), capture_output=True, text=True, cwd=ROOT)
    assert answer.returncode == 0 and "nobody agreed to the move to spare" in answer.stdout, answer.stderr
    assert read_weights(stays, TAUGHT).pool == "home"

    words = ("run", run.path, "--only", TAUGHT, "--revert")
    answer = subprocess.run(command(*words), capture_output=True, text=True, cwd=ROOT)
    assert answer.returncode == 0, answer.stderr
    assert read_weights(run, TAUGHT).pool == "spare"
    assert [(one.rung, one.outcome) for one in incidents(run, TAUGHT)] == [("revert", "done")]
    assert [event["step"] for event in run.events(TAUGHT, "step")] == list(range(1, 11))


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2])
def test_reinforcement_learning_leaves_when_asked_and_moves_when_its_pool_is_given_up(tmp_path, ranks):
    """SIGTERM after update 3 saves a checkpoint of update 3 or later; going on, its process is killed with -9.

    A KL lets also updates learn in which no answer is right.
    """
    run = with_spare(
        tmp_path / "run",
        supervise__restarts=0,
        rl__steps=14,
        rl__checkpoint_every=5,
        rl__staleness=1,
        rl__loss__kl_weight=0.01,
    )
    first = subprocess.run(command("run", run.path, "--only", TAUGHT), capture_output=True, text=True, cwd=ROOT)
    assert first.returncode == 0, first.stderr
    process = started(run, REINFORCED)
    wait_for(run, REINFORCED, 3, process)
    process.terminate()
    output, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and "Nothing is lost" in errors, output + errors
    saved = max(int(one.name.removeprefix("step-")) for one in run.step_folder(REINFORCED).glob("checkpoints/step-*"))
    assert saved == max(event["step"] for event in run.events(REINFORCED, "step")) >= 3

    process = started(run, REINFORCED)
    wait_for(run, REINFORCED, 7, process)
    *_, trainer = [pid for pid in children(process.pid) if b"ISTHMUS_BEATS" in b"".join(environment_of(pid))]
    os.kill(trainer, signal.SIGKILL)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, output + errors
    (moved,) = incidents(run, REINFORCED)
    assert (moved.rung, moved.outcome, moved.to_pool) == ("revert", "done", "spare")
    assert moved.gate is not None and moved.gate.verdict == "go" and moved.gate.repeated_steps
    record = run.require_record(f"steps/{REINFORCED}/record", RlRecord, "run")
    assert (record.pool, record.rollout_pool) == ("spare", "home")
    assert [event["step"] for event in run.events(REINFORCED, "step")] == list(range(1, 15))
    assert not working_on(run.path)
