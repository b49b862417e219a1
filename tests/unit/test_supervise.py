"""A watched step: what is noticed, what is decided, what is written down first, and what a move has to show."""

from __future__ import annotations

import json
import math
import random
import time
from dataclasses import replace

import pytest
import torch

from isthmus.errors import DamagedFile, Diverged, GateRefused, IsthmusError, RanksFailed, SaveFailed, Unrepeatable
from isthmus.forecast.goodput import FailureRate
from isthmus.launch.beats import Beat
from isthmus.progress import Watch
from isthmus.recipe.supervise import SuperviseSection
from isthmus.records import (
    Candidate,
    IncidentRecord,
    Placement,
    PlanRecord,
    Rejection,
    RevertVerdict,
    TrainPlace,
    incidents,
)
from isthmus.run import Figure, RunFolder
from isthmus.supervise import gate
from isthmus.supervise.balance import Pace, Pool, weigh
from isthmus.supervise.gate import Band, Bands, Repeated, Restored, Seen, judge
from isthmus.supervise.guard import Computed, Guard, digest_of
from isthmus.supervise.ladder import Situation, decide
from isthmus.supervise.signals import Signal, drift, no_beat, no_progress, not_finite, repeat
from isthmus.supervise.signals.slow import Slow
from isthmus.supervise.signals.spike import Spikes
from isthmus.supervise.situation import place_of
from isthmus.supervise.supervisor import Supervisor
from isthmus.trainer.batch import Batch
from isthmus.trainer.mesh import alone
from tests.support.ranks_recipe import planned

STEP = "cold-start"
SECTION = SuperviseSection()
QUIET = Watch(quiet=True)


def incident(number: int, signal: str, rung: str, **fields) -> IncidentRecord:
    given = {
        "recipe_sha256": "0", "started": 0, "ended": 0, "step": STEP, "detail": "", "pool": "home", "ranks": 1,
        "update": 5, "checkpoint": 0, "why": "", "outcome": "done",
    }  # fmt: skip
    return IncidentRecord(**{**given, "number": number, "signal": signal, "rung": rung, **fields})


# Signals


def test_a_healthy_loss_is_no_spike_and_one_far_above_is():
    """The limit is that of the published rule: 6 deviations of the last 128 values, from 64 values on."""
    chance, spikes = random.Random(3), Spikes()
    seen = [3.0 - 0.01 * index + chance.gauss(0, 0.05) for index in range(100)]
    assert Spikes().look(1, 1e9, 1e9) is None
    for index, loss in enumerate(seen):
        assert spikes.look(index, loss, 1.0 + chance.gauss(0, 0.1)) is None
        spikes.remember(loss, 1.0 + chance.gauss(0, 0.1))
    mean, deviation = torch.tensor(seen, dtype=torch.float64).mean(), torch.tensor(seen, dtype=torch.float64).std()
    limit = float(mean + 6 * deviation)
    assert spikes.look(101, limit - 0.01, 1.0) is None
    found = spikes.look(101, limit + 0.01, 1.0)
    assert found is not None and found.kind == "spike" and "loss" in found.detail and "norm" not in found.detail


def test_no_number_is_named():
    assert not_finite.look(3, 1.0, 2.0) is None
    found = not_finite.look(3, 1.0, math.inf)
    assert found is not None and found.detail == "the norm of the gradient is inf at update 3"


@pytest.mark.parametrize(
    ("beats", "culprits"),
    [
        ({0: Beat(95, 4, 0, 0, "update"), 1: Beat(95, 4, 0, 0, "update")}, None),
        ({0: Beat(20, 4, 0, 0, "update"), 1: Beat(20, 3, 0, 0, "update")}, (1,)),
        ({0: Beat(20, 4, 0, 0, "save")}, None),
        ({0: Beat(0, 0, 0, 0, "")}, None),
        ({0: Beat(1, 9, 0, 0, no_beat.UNLIMITED)}, None),
    ],
)
def test_who_gives_no_sign_of_life(beats, culprits):
    found = no_beat.look(beats, now=100.0, started=10.0, beat_s=50.0, start_s=200.0)
    assert (found and found.culprits) == culprits


def test_a_start_without_a_sign_is_a_hang_in_the_end():
    assert no_beat.look({0: Beat(0, 0, 0, 0, "")}, now=211.0, started=10.0, beat_s=50.0, start_s=200.0)


def test_slow_is_said_once_and_only_against_a_forecast():
    slow, unknown = Slow(1.0), Slow(None)
    said = [slow.look(update, 2.0) for update in range(40)]
    assert [one.kind for one in said if one] == ["slow"]
    assert not any(unknown.look(update, 1e9) for update in range(40))
    quick = Slow(1.0)
    assert not any(quick.look(update, 30.0 if update == 3 else 0.9) for update in range(40))


def test_repeats_are_held_to_a_band():
    assert repeat.look(2, (1.0, 2.0), (1.0, 2.0), 0.0) is None
    assert repeat.look(2, (1.0, 2.0), (1.0, 2.0 + 1e-7), 0.0) is not None
    assert repeat.look(2, (1.0, 2.0), (1.0005, 2.0), 1e-3) is None
    assert repeat.look(2, (1.0, 2.0), (math.nan, 2.0), 1e-3) is not None
    assert [update for update in range(1, 9) if repeat.is_due(update, 3)] == [3, 6] and not repeat.is_due(3, None)


def test_progress_resets_the_count_of_restarts():
    assert no_progress.restarts_without_progress([0, 10, 10, 10], 10) == 3
    assert no_progress.restarts_without_progress([10, 10, 10], 20) == 0
    assert no_progress.look([10, 10, 10], 10, 3) is not None and no_progress.look([10, 10], 10, 3) is None


def test_drift_is_a_trend_that_passes_the_budget():
    assert drift.look(10, [0.01, 0.02], 0.002, 100, 0.05) is not None
    assert drift.look(10, [0.01, 0.02], 0.0001, 100, 0.05) is None and drift.look(10, [], None, 100, 0.05) is None


# Ladder


def situation(**fields) -> Situation:
    return replace(Situation(SECTION, pool="home", ranks=1, checkpoint=0), **fields)


RETRIED = incident(1, "not finite", "retry")
RESTARTS = [incident(number, "ended", "restart") for number in range(1, 4)]


PATIENT = SuperviseSection(patience_s=200.0)


def waits(*seconds: float):
    return [incident(9, "ended", "wait", wait_s=float(one)) for one in seconds]


WAITED = waits(60, 120, 20)


@pytest.mark.parametrize(
    ("signal", "now", "rung"),
    [
        (Signal("asked to stop", ""), situation(), "leave"),
        (Signal("save failed", ""), situation(next_pools=["away"]), "stop"),
        (Signal("slow", ""), situation(), "go on"),
        (Signal("not finite", "", 5), situation(in_update=True), "retry"),
        (Signal("not finite", "", 5), situation(in_update=True, past=[RETRIED]), "skip batch"),
        (Signal("not finite", "", 6), situation(in_update=True, past=[incident(1, "not finite", "retry")]), "retry"),
        (
            Signal("not finite", "", 5),
            situation(in_update=True, past=[incident(1, "not finite", "retry")], section=SuperviseSection(skips=0)),
            "restart",
        ),
        (
            Signal("spike", "", 5),
            situation(in_update=True, past=[incident(1, "spike", "retry")], section=SuperviseSection(skips=0)),
            "go on",
        ),
        (Signal("ended", ""), situation(), "restart"),
        (Signal("ended", ""), situation(past=RESTARTS), "stop"),
        (Signal("ended", ""), situation(past=RESTARTS, checkpoint=10), "restart"),
        (Signal("ended", ""), situation(past=RESTARTS, next_pools=["away"]), "revert"),
        (
            Signal("ended", ""),
            situation(past=[*RESTARTS, incident(4, "no progress", "revert", outcome="failed", to_pool="away")],
                      next_pools=["away"]),
            "stop",
        ),
        (
            Signal("ended", "", culprits=(1,)),
            situation(ranks=2, smaller=1, past=[incident(1, "ended", "restart", culprits=[1], ranks=2)]),
            "leave out a rank",
        ),
        (
            Signal("ended", "", culprits=(1,)),
            situation(ranks=2, smaller=1, past=[incident(1, "ended", "restart", culprits=[0], ranks=2)]),
            "restart",
        ),
        (
            Signal("ended", "", culprits=(1,)),
            situation(ranks=4, smaller=2, past=[incident(n, "ended", "restart", ranks=4) for n in (1, 2, 3)]),
            "shrink",
        ),
        (
            Signal("repeat differs", "", 9),
            situation(past=[incident(n, "repeat differs", "retry") for n in (1, 2, 3)], next_pools=["away"]),
            "revert",
        ),
        (Signal("ended", ""), situation(section=SuperviseSection(restarts=0)), "stop"),
        (Signal("ended", ""), situation(past=RESTARTS, section=PATIENT), "wait"),
        (Signal("ended", ""), situation(past=RESTARTS, section=PATIENT, next_pools=["away"]), "revert"),
        (Signal("ended", ""), situation(past=[*RESTARTS, *WAITED], section=PATIENT), "stop"),
        (Signal("ended", ""), situation(past=[*RESTARTS, *WAITED], section=PATIENT, checkpoint=4), "restart"),
    ],
)  # fmt: skip
def test_the_rung_of_a_signal(signal, now, rung):
    decision = decide(signal, now)
    assert decision.rung == rung and decision.why
    assert (decision.to_pool == "away") == (rung == "revert")


def balance(here_failures: float, there_pace: float):
    here = Pool("home", Pace.known(1.0), FailureRate(50.0, 50.0 / here_failures, "test"), 1, 30.0)
    there = Pool("away", Pace(there_pace / 1.2, there_pace, there_pace * 1.2), FailureRate(50.0, 5e6, "test"), 1, 30.0)
    return weigh(here, there, updates=1000, lost=20, between_checkpoints=20, move_s=60.0)


def test_the_balance_turns_when_a_pool_fails_often_enough():
    """1,000 s of work with a failure an hour or less is over before 2,000 s of work elsewhere; with one every 55 s,
    each costing 40 s, it takes about 3,700 s, and moving is quicker."""
    calm, stormy = balance(1.0, 2.0), balance(3600 / 55, 2.0)
    assert calm.move_is_quicker < 0.05 and calm.stay.value == pytest.approx(1011, rel=0.02)
    assert stormy.move_is_quicker > 0.9 and stormy.stay.value == pytest.approx(1000 / (1 - 40 / 55), rel=0.1)
    assert stormy.move.low < stormy.move.value < stormy.move.high
    for weighed, rung in ((calm, "restart"), (stormy, "revert")):
        decision = decide(Signal("ended", ""), situation(next_pools=["away"], balance=weighed))
        assert decision.rung == rung and decision.figures.keys() == {"stay_s", "move_s", "move_is_quicker"}


def test_pauses_double_until_the_patience_is_spent_and_begin_anew_after_progress():
    past, pauses = list(RESTARTS), []
    while (decision := decide(Signal("ended", ""), situation(past=past, section=PATIENT))).rung == "wait":
        pauses.append(decision.wait_s)
        past += waits(decision.wait_s)
    assert pauses == [60.0, 120.0, 20.0] and decision.rung == "stop"
    again = situation(
        past=[*past, *(one.model_copy(update={"checkpoint": 4}) for one in RESTARTS)], section=PATIENT, checkpoint=4
    )
    assert decide(Signal("ended", ""), again).wait_s == 60.0


def test_a_pool_that_would_be_slower_is_waited_for_before_it_is_left():
    calm, stormy = balance(1.0, 2.0), balance(3600 / 30, 2.0)
    for weighed, spent, rung in ((calm, (), "wait"), (calm, (60, 120, 20), "revert"), (stormy, (), "revert")):
        past = [*RESTARTS, *waits(*spent)]
        now = situation(past=past, section=PATIENT, next_pools=["away"], balance=weighed)
        assert decide(Signal("ended", ""), now).rung == rung


# In the process that trains


@pytest.fixture
def run(tmp_path) -> RunFolder:
    return RunFolder.open(planned(tmp_path / "run"))


def a_batch(shift: int = 0) -> Batch:
    tokens = torch.arange(16).reshape(2, 8) + shift
    document = torch.zeros(2, 8, dtype=torch.long)
    return Batch(tokens, torch.arange(8).expand(2, 8), document, document == 0)


def guarded(run: RunFolder, pairs, update: int = 5, **section):
    """(what came of an update, its incidents) of which the computations give these losses and norms in turn."""
    run.recipe = run.recipe.model_copy(update={"supervise": SuperviseSection(**section)})
    guard = Guard(run, STEP, TrainPlace("home", 1), alone(torch.device("cpu")), QUIET)
    left = iter(pairs)
    found, made, _ = guard.update(update, a_batch(), lambda: Computed(*next(left), None))
    assert next(left, None) is None, "it computed less often than it should"
    return found.pair, made, [(one.rung, one.outcome) for one in incidents(run, STEP)]


NAN = (math.nan, math.nan)


@pytest.mark.parametrize(
    ("pairs", "section", "expected"),
    [
        ([(1.0, 2.0)], {}, ((1.0, 2.0), True, [])),
        ([NAN, (1.0, 2.0)], {}, ((1.0, 2.0), True, [("retry", "done")])),
        ([NAN, NAN], {}, (None, False, [("retry", "done"), ("skip batch", "done")])),
        ([(1.0, 2.0), (1.0, 2.0)], {"repeat_every": 5}, ((1.0, 2.0), True, [])),
        ([(1.0, 2.0), (1.1, 2.0), (1.0, 2.0)], {"repeat_every": 5}, ((1.0, 2.0), True, [("retry", "done")])),
    ],
)
def test_what_becomes_of_an_update(run, pairs, section, expected):
    pair, made, seen = guarded(run, pairs, **section)
    assert made == expected[1] and seen == expected[2]
    assert expected[0] is None or pair == expected[0]


def test_what_the_process_cannot_mend_it_hands_on(run):
    with pytest.raises(Diverged, match="training has diverged"):
        guarded(run, [NAN, NAN], skips=0)
    with pytest.raises(Unrepeatable, match="a chip computes wrongly"):
        guarded(run, [(1.0, 2.0), (1.1, 2.0), (1.2, 2.0)], update=10, repeat_every=10)


def test_the_digest_of_a_batch_is_of_its_documents_wherever_they_are():
    whole = a_batch()
    one = digest_of(whole)
    halves = [digest_of(whole.select(range(rank, 2, 2))) for rank in range(2)]
    assert sum(halves) % (1 << 62) == one == digest_of(whole.select([1, 0])) == digest_of(whole.with_rows(4))
    in_one_row = Batch(*(tensor.reshape(1, 16) for tensor in (whole.tokens, whole.positions)), *marks(1, 16, 8))
    assert digest_of(in_one_row) == one
    assert digest_of(a_batch(1)) != one and digest_of(whole.select([0])) != one
    assert digest_of(replace(whole, target_mask=~whole.target_mask)) != one


def marks(rows: int, length: int, each: int):
    document = (torch.arange(length) // each).expand(rows, length)
    return document, torch.ones(rows, length, dtype=torch.bool)


# The supervisor


def with_pools(run: RunFolder, *names: str) -> None:
    """A plan that also found other pools acceptable."""
    section = run.recipe.pools["home"]
    pools = {"home": section, **dict.fromkeys(names, section)}
    run.recipe = run.recipe.model_copy(update={"pools": pools})
    plan = PlanRecord(
        recipe_sha256="0",
        started=0,
        ended=0,
        placements=[Placement(stage=stage, pool="home", reason="") for stage in ("train", "rollout", "serve")],
        rejected=[Rejection(stage="train", pool=name, reason="", acceptable=True) for name in names],
        estimate={},
    )
    run.write_record("plan", plan)


GO = RevertVerdict(verdict="go", reason="", checkpoint_step=None, repeated_steps=[], checks=[])
REFUSE = GO.model_copy(update={"verdict": "refuse", "reason": "the loss is 3, and was 2"})


def supervised(run: RunFolder, endings, verdict=GO, agreed=False, sleep=time.sleep):
    """Train a step whose tries end so, in turn: (pool of each try, incidents on the disk when it began)."""
    tries, left = [], iter(endings)

    def start(_step, place):
        tries.append((place.pool, [one.rung for one in incidents(run, STEP)]))
        if (error := next(left)) is not None:
            raise error

    Supervisor(run, STEP, QUIET, start, lambda old, new: verdict, agreed, sleep).train()
    return tries


def dead() -> RanksFailed:
    return RanksFailed("rank 0 stopped: killed by signal 9 (SIGKILL).", 0)


def test_a_step_that_dies_is_started_again_after_that_is_written_down(run):
    assert supervised(run, [dead(), dead(), None]) == [("home", []), ("home", ["restart"]), ("home", ["restart"] * 2)]
    (first, _) = incidents(run, STEP)
    assert first.signal == "ended" and "SIGKILL" in first.detail and first.outcome == "done"


def test_a_patient_step_outlives_a_failure_that_lasts(run):
    """Its node is repaired after 150 s of pauses; each is on the disk, as decided, before it begins."""
    run.recipe = run.recipe.model_copy(update={"supervise": SuperviseSection(restarts=1, patience_s=600.0)})
    slept = []

    def sleep(seconds):
        assert [(one.rung, one.wait_s) for one in incidents(run, STEP)][-1] == ("wait", seconds)
        slept.append(seconds)

    assert len(supervised(run, [dead()] * 3 + [None], sleep=sleep)) == 4
    assert slept == [60.0, 120.0] and [one.outcome for one in incidents(run, STEP)] == ["done"] * 3


def test_when_nothing_is_left_the_error_is_the_last_ones(run):
    with pytest.raises(RanksFailed, match=r"^rank 0 stopped: killed by signal 9 \(SIGKILL\)\.\nRun the same command"):
        supervised(run, [dead()] * 4)
    assert [one.rung for one in incidents(run, STEP)] == ["restart"] * 3 + ["stop"]


@pytest.mark.parametrize("error", [IsthmusError("no such file"), DamagedFile("flipped"), KeyboardInterrupt()])
def test_what_a_user_has_to_mend_is_no_incident(run, error):
    with pytest.raises(type(error)):
        supervised(run, [error])
    assert incidents(run, STEP) == []


def test_a_save_that_fails_is_told_as_it_is(run):
    with pytest.raises(SaveFailed, match="no space left"):
        supervised(run, [SaveFailed("no space left on the disk")])
    assert [(one.signal, one.rung) for one in incidents(run, STEP)] == [("save failed", "stop")]


def test_a_step_moves_when_its_pool_is_given_up_and_stays_there(run):
    with_pools(run, "away")
    tries = supervised(run, [dead()] * 4 + [None])
    assert [pool for pool, _ in tries] == ["home"] * 4 + ["away"]
    assert place_of(RunFolder(run.path, run.recipe), STEP).pool == "away"
    assert place_of(run, "reasoning").pool == "away"
    assert incidents(run, STEP)[-1].gate == GO


def test_a_move_that_the_gate_refuses_ends_the_step_with_its_reason(run):
    with_pools(run, "away")
    with pytest.raises(GateRefused, match=r"move to pool away was refused: the loss is 3, and was 2"):
        supervised(run, [dead()] * 4, REFUSE)
    assert place_of(run, STEP).pool == "home"
    assert [(one.rung, one.outcome) for one in incidents(run, STEP)][3:] == [("revert", "failed"), ("stop", "done")]


def test_a_person_can_be_asked_before_a_move(run):
    with_pools(run, "away")
    run.recipe = run.recipe.model_copy(update={"supervise": SuperviseSection(restarts=0, on_revert="ask")})
    with pytest.raises(GateRefused, match=r"isthmus run .* --revert") as asked:
        supervised(run, [dead()])
    assert asked.value.exit_code == 1 and place_of(run, STEP).pool == "home"
    assert supervised(run, [None], agreed=True)[0][0] == "away"


@pytest.mark.parametrize(("keeps_aim", "rollout"), [(False, "home"), (True, "home"), (False, "away")])
def test_a_person_is_asked_before_a_move_that_may_break_a_limit_of_the_aim(run, keeps_aim, rollout):
    """By the plan's forecast of the pair of pools that would be at work then, and of no other."""
    with_pools(run, "away")
    run.recipe = run.recipe.model_copy(update={"supervise": SuperviseSection(restarts=0)})
    unknown = Figure(value=None, unit="h", kind="forecast", source="a test")
    pair = Candidate(
        train="away",
        rollout=rollout,
        hours=unknown,
        chip_hours=unknown,
        cost=unknown,
        chosen=False,
        keeps_aim=keeps_aim,
        why="10% of the chip-hours are on chips of other, below aim.least of 50%",
    )
    plan = run.require_record("plan", PlanRecord, "plan")
    run.write_record("plan", plan.model_copy(update={"candidates": [pair]}))
    if keeps_aim or rollout != "home":
        assert [pool for pool, _ in supervised(run, [dead(), None])] == ["home", "away"]
        return
    with pytest.raises(GateRefused, match=r"away and rollouts on home are not known to keep to \[aim\](?s:.*)--revert"):
        supervised(run, [dead()])
    assert supervised(run, [None], agreed=True)[0][0] == "away"


def test_a_supervisor_that_ended_between_deciding_and_acting_acts_first(run):
    with_pools(run, "away")
    run.recipe = run.recipe.model_copy(update={"supervise": SuperviseSection(restarts=0)})

    def interrupted(_old, _new):
        raise KeyboardInterrupt

    def start(_step, _place):
        raise dead()

    with pytest.raises(KeyboardInterrupt):
        Supervisor(run, STEP, QUIET, start, interrupted).train()
    assert [(one.rung, one.outcome) for one in incidents(run, STEP)] == [("revert", "decided")]
    assert supervised(run, [None])[0][0] == "away"


def test_an_incident_that_cannot_be_written_is_said_beside_its_cause(run):
    (run.step_folder(STEP)).mkdir(parents=True)
    (run.step_folder(STEP) / "incidents").touch()
    with pytest.raises(RanksFailed, match=r"(?s)killed by signal 9.*could not be written"):
        supervised(run, [dead()])


# The gate

RESTORED = Restored(20, {}, [], True, 20.0, {"betas": "(0.9, 0.95)"}, "seed 0")
SAVED = {"groups": {"betas": "(0.9, 0.95)"}, "data": "seed 0"}
OLD = {n: Seen(n, f"b{n}", 2.0 - 0.01 * n, 1.0, 1e-3, {"head": 0.5}) for n in range(1, 30)}
BANDS = Bands(Band(1e-5, 2e-3), Band(5e-3, 2e-3))


def verdict(new=None, host=None, restored=None, steps=(10, 20)):
    """`new` and `host` change the recorded updates into what the new pool and the host compute."""

    def repeat_(step, side):
        change = (new if side == "new" else host) or (lambda seen: seen)
        found = replace(RESTORED, **{"step": step, "steps_counted": float(step), **(restored or {})})
        return Repeated(found, [change(OLD[step + 1]), change(OLD[step + 2])])

    return judge(list(steps), OLD, repeat_, lambda _: SAVED, lambda step: step, BANDS)


def test_a_healthy_move_goes_from_the_newest_checkpoint():
    found = verdict(new=lambda seen: replace(seen, loss=seen.loss * 1.001, norm=0.999))
    assert found.verdict == "go" and found.checkpoint_step == 20 and found.repeated_steps == [21, 22]
    assert all(check.band is None for check in found.checks if check.exact)


@pytest.mark.parametrize(
    ("restored", "named"),
    [
        ({"tensors": {"model/layer.weight": "has other values"}}, "model weights"),
        ({"tensors": {"optimizer/adam.exp_avg.x": "is torch.bfloat16 [2], and was torch.float32 [2]"}}, "bfloat16"),
        ({"tensors": {"bias/model/gate": "has other values"}}, "router bias"),
        ({"missing": ["adam.exp_avg.x"]}, "moments of every parameter"),
        ({"steps_counted": 0.0}, "step count"),
        ({"rng": False}, "random streams"),
        ({"groups": {"betas": "(0.9, 0.999)"}}, "optimiser group betas"),
        ({"data": "seed 1"}, "position in the data"),
    ],
)
def test_a_broken_restore_is_refused_by_name(restored, named):
    found = verdict(restored=restored)
    assert found.verdict == "refuse" and named in found.reason and found.checkpoint_step is None


@pytest.mark.parametrize(
    ("change", "named"),
    [({"batch": "other"}, "digest of the batch"), ({"learning_rate": 2e-3}, "learning rate")],
)
def test_what_must_be_the_same_after_a_restore_is_refused_without_asking_the_host(change, named):
    found = verdict(new=lambda seen: replace(seen, **change), host=lambda seen: pytest.fail("asked"))
    assert found.verdict == "refuse" and named in found.reason


def worse(seen: Seen) -> Seen:
    return replace(seen, norm=1.01, modules={"head": 0.52})


def test_a_new_pool_that_computes_otherwise_than_the_host_is_refused():
    """By the norm of the gradient: the loss alone is the same."""
    found = verdict(new=worse)
    assert found.verdict == "refuse" and "norm of the gradient" in found.reason and "new pool" in found.reason


def test_where_the_old_pool_was_wrong_an_older_checkpoint_is_trusted():
    def right(seen: Seen) -> Seen:
        return replace(seen, norm=1.01, modules={"head": 0.52}) if seen.update > 20 else seen

    found = verdict(new=right, host=right)
    assert found.verdict == "go" and found.checkpoint_step == 10
    assert "old pool was wrong" in found.passed_over[20]
    assert verdict(new=worse, host=worse).verdict == "refuse"


def test_a_damaged_checkpoint_is_passed_over():
    def repeat_(step, _side):
        if step == 20:
            raise DamagedFile("it does not match its hash")
        found = replace(RESTORED, step=step, steps_counted=float(step))
        return Repeated(found, [OLD[step + 1]])

    found = judge([10, 20], OLD, repeat_, lambda _: SAVED, lambda step: step, BANDS)
    assert found.verdict == "go" and found.checkpoint_step == 10 and "hash" in found.passed_over[20]


@pytest.mark.parametrize(
    ("restored", "named"), [({}, "update 10: the norm is nan"), ({"missing": ["adam.exp_avg.x"]}, "moments of every")]
)
def test_updates_that_diverge_after_a_restore_are_refused_by_what_was_restored_if_that_is_wrong(restored, named):
    found = replace(RESTORED, **{"step": 10, "steps_counted": 10.0, **restored})
    diverged = Repeated(found, [OLD[11]], "the norm is nan")
    said = judge([10], OLD, lambda *_: diverged, lambda _: SAVED, lambda step: step, BANDS)
    assert said.verdict == "refuse" and named in said.reason


def test_an_update_that_came_out_as_no_number_says_nothing_of_the_checkpoint_before_it():
    def event(step: int, loss: float | None, norm: float | None) -> dict:
        watched = {"batch": f"b{step}", "loss": loss, "norm": norm, "modules": {"head": norm}}
        return {"event": "step", "step": step, "learning_rate": 1e-3, "watched": watched}

    seen = gate.recorded([event(11, None, None), event(12, 1.0, None), event(13, 1.0, 2.0)])
    assert seen == {13: Seen(13, "b13", 1.0, 2.0, 1e-3, {"head": 2.0})}


def test_a_host_that_diverges_blames_nobody():
    def repeat_(step, side):
        found = replace(RESTORED, step=step, steps_counted=float(step))
        return Repeated(found, [worse(OLD[step + 1])]) if side == "new" else Repeated(found, [], "the norm is nan")

    said = judge([10], OLD, repeat_, lambda _: SAVED, lambda step: step, BANDS)
    assert said.verdict == "refuse" and "checkpoint or the recording is wrong" in said.reason


def test_newer_checkpoints_than_the_trusted_one_are_set_aside(run):
    folder = run.step_folder(STEP) / "checkpoints"
    for step in (10, 20):
        (folder / f"step-{step:06d}").mkdir(parents=True)
    gate.set_aside(run, STEP, GO.model_copy(update={"checkpoint_step": 10}))
    assert sorted(path.name for path in folder.iterdir()) == ["step-000010", "untrusted-0-step-000020"]


def test_records_are_read_back_as_they_were(run):
    supervised(run, [dead(), None])
    (record,) = incidents(run, STEP)
    stored = json.loads((run.step_folder(STEP) / "incidents" / "001.json").read_text())
    assert stored["rung"] == "restart" and IncidentRecord(**stored) == record
