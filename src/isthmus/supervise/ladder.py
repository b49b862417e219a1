"""What is done about a signal: a pure function of what was met so far, the budgets, and the forecast of both sides.

The rungs, mildest first: go on, retry the update, leave its batch out, restart from the checkpoint, leave out a rank,
shrink, wait and restart, move to the next pool of place.train, stop. Rollouts have two of their own: start the engine
again, and let the next pool of place.rollout generate. Each has a budget in [supervise].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from isthmus.recipe.supervise import SuperviseSection
from isthmus.records import IncidentRecord, Rung, Side
from isthmus.run import Figure
from isthmus.supervise.balance import Balance
from isthmus.supervise.signals import Signal
from isthmus.supervise.signals.no_progress import restarts_without_progress

STRIKES = 3
"""Repeats that differ on a pool before it is no longer believed; as many anomalies strike out a chip in a vendor's own
feature-value detection, which forgets them after 8 hours; this does not."""
FIRST_WAIT_S = 60.0
"""The first pause before a restart where restarts were spent; each further one is twice as long."""
WITHIN = ("not finite", "spike", "repeat differs")
"""Signals of one update, which the process that computes it can act on."""


@dataclass(frozen=True)
class Situation:
    """A step when a signal comes. `checkpoint` is the newest one's update, 0 if there is none.

    `smaller` is the next smaller number of ranks that divides as [train] says, and `next_pools` are those where the
    step may go. `in_update` says that the update can still be computed again or left out. `side` is what failed, and
    pools are that side's. Engines elsewhere are not `ours_to_start`.
    """

    section: SuperviseSection
    pool: str
    ranks: int
    checkpoint: int
    past: Sequence[IncidentRecord] = ()
    next_pools: Sequence[str] = ()
    smaller: int | None = None
    balance: Balance | None = None
    in_update: bool = False
    side: Side = "train"
    ours_to_start: bool = True


@dataclass(frozen=True)
class Decision:
    """A rung, why, where the step goes on if it moves or shrinks, and how long it waits before if it does."""

    rung: Rung
    why: str
    to_pool: str | None = None
    to_ranks: int | None = None
    without_ranks: tuple[int, ...] = ()
    wait_s: float | None = None
    figures: dict[str, Figure] = field(default_factory=dict)


def decide(signal: Signal, situation: Situation) -> Decision:
    """The rung for a signal. The same input gives the same decision."""
    now = replace(situation, past=[one for one in situation.past if one.side == situation.side])
    decision = _of_rollouts(signal, now) if now.side == "rollout" else _rung(signal, now)
    if situation.balance is None:
        return decision
    return replace(decision, figures=situation.balance.figures)


def _rung(signal: Signal, now: Situation) -> Decision:
    if signal.kind == "asked to stop":
        return Decision("leave", "whoever started it asked it to stop; what is done is saved")
    if signal.kind == "save failed":
        return Decision("stop", "a checkpoint that cannot be written is for a person to mend; older ones are whole")
    if signal.kind in ("slow", "drift"):
        return _surely_quicker(now) or Decision("go on", _no_move(now))
    if now.in_update:
        return _within(signal, now)
    return _restart_or_further(signal, now)


def _of_rollouts(signal: Signal, now: Situation) -> Decision:
    """Rollouts hold nothing that could be lost: their engine is started again, or another pool's takes its place."""
    spent, why = now.section.restarts, f"an engine that computes something else does so again: {signal.detail}"
    if signal.kind != "mismatch" and now.ours_to_start:
        restarts = [one.checkpoint for one in now.past if one.rung == "restart engine" and one.pool == now.pool]
        spent = restarts_without_progress(restarts, now.checkpoint)
        why = f"{spent} restarts of the engine brought no newer checkpoint than that of update {now.checkpoint}"
    elif signal.kind != "mismatch":
        why = f"whoever started the engines of {now.pool} has to start them again"
    if spent < now.section.restarts:
        return Decision(
            "restart engine",
            f"restart {spent + 1} of {now.section.restarts} of the engine without a newer checkpoint",
        )
    move = _move_rollouts(now)
    return _with(move, why) if move else Decision("stop", f"{why}, and {_no_way(now)}")


def _move_rollouts(now: Situation) -> Decision | None:
    moves = [one for one in now.past if one.rung == "move rollouts"]
    left = {one.pool for one in moves if one.outcome == "done"}
    refused = {one.to_pool for one in moves if one.outcome == "failed"}
    pools = [pool for pool in now.next_pools if pool not in {now.pool, *left, *refused}]
    budget_left = sum(one.outcome == "done" for one in moves) < now.section.reverts
    return Decision("move rollouts", "", pools[0]) if pools and budget_left else None


def _within(signal: Signal, now: Situation) -> Decision:
    """The first two rungs, for an update that is not made yet."""
    same = [one for one in _since_moved(now) if one.update == signal.update and one.signal in WITHIN]
    retried = sum(one.rung == "retry" for one in same)
    if retried < now.section.retries:
        if signal.kind == "repeat differs" and len(_repeats(now)) + 1 >= STRIKES and now.next_pools:
            return Decision("restart", f"{STRIKES} repeats on {now.pool} came out differently")
        return Decision("retry", f"computed again, {retried + 1} of {now.section.retries}")
    if signal.kind == "repeat differs":
        return Decision("restart", "computing it again does not tell which result is right")
    skipped = sum(one.rung == "skip batch" for one in now.past)
    if skipped < now.section.skips:
        return Decision(
            "skip batch", f"it comes out the same again; batch {skipped + 1} of {now.section.skips} left out"
        )
    if signal.kind == "spike":
        return Decision("go on", f"it comes out the same again, and {skipped} batches are left out already")
    return Decision("restart", f"it comes out the same again, and {skipped} batches are left out already")


def _restart_or_further(signal: Signal, now: Situation) -> Decision:
    if signal.kind == "repeat differs" and len(_repeats(now)) >= STRIKES and (move := _move(now)):
        return _with(move, f"{len(_repeats(now))} repeats on {now.pool} came out differently")
    if surely := _surely_quicker(now):
        return surely
    restarts = [one.checkpoint for one in _since_moved(now) if one.rung == "restart"]
    spent = restarts_without_progress(restarts, now.checkpoint)
    if spent < now.section.restarts:
        if again := _same_rank_again(signal, now):
            return again
        return Decision("restart", f"restart {spent + 1} of {now.section.restarts} without a newer checkpoint")
    why = f"{spent} restarts brought no newer checkpoint than that of update {now.checkpoint}"
    move, wait = _move(now), _wait(now)
    further = _smaller(signal, now) or (wait if _is_slower_there(now) else None) or move or wait
    return _with(further, why) if further else Decision("stop", f"{why}, and {_no_way(now)}")


def _wait(now: Situation) -> Decision | None:
    """A pause before one more restart, twice as long as the one before, while the patience of the recipe lasts."""
    waits = [one for one in _since_moved(now) if one.rung == "wait"]
    in_vain = restarts_without_progress([one.checkpoint for one in waits], now.checkpoint)
    waited = sum(one.wait_s or 0.0 for one in waits[len(waits) - in_vain :])
    left = now.section.patience_s - waited
    return Decision("wait", "", wait_s=min(FIRST_WAIT_S * 2.0**in_vain, left)) if left > 0 else None


def _is_slower_there(now: Situation) -> bool:
    """Whether the next pool is known, and would rather be later than earlier."""
    return now.balance is not None and now.balance.move_is_quicker < 0.5


def _same_rank_again(signal: Signal, now: Situation) -> Decision | None:
    """A rank that failed twice in a row is left out, where the others divide the work."""
    before = next((one for one in reversed(_since_moved(now)) if one.rung == "restart"), None)
    if before is None or not signal.culprits or tuple(before.culprits) != signal.culprits:
        return None
    smaller = _smaller(signal, now)
    named = ", ".join(map(str, signal.culprits))
    return _with(smaller, f"rank {named} failed twice in a row") if smaller else None


def _smaller(signal: Signal, now: Situation) -> Decision | None:
    shrunk = sum(one.rung in ("leave out a rank", "shrink") and one.outcome == "done" for one in now.past)
    if now.smaller is None or shrunk >= now.section.shrinks:
        return None
    fits = now.ranks - len(signal.culprits) == now.smaller and bool(signal.culprits)
    rung: Rung = "leave out a rank" if fits else "shrink"
    return Decision(rung, "", now.pool, now.smaller, signal.culprits if fits else ())


def _move(now: Situation) -> Decision | None:
    moved = sum(one.rung == "revert" and one.outcome == "done" for one in now.past)
    refused = {one.to_pool for one in now.past if one.rung == "revert" and one.outcome == "failed"}
    pools = [pool for pool in now.next_pools if pool != now.pool and pool not in refused]
    return Decision("revert", "", pools[0]) if pools and moved < now.section.reverts else None


def _surely_quicker(now: Situation) -> Decision | None:
    """A move before the restarts are spent, if the forecast is sure enough."""
    move = _move(now)
    if move is None or now.balance is None or now.balance.move_is_quicker < now.section.move_if:
        return None
    return _with(move, f"moving is quicker than staying with probability {now.balance.move_is_quicker:.2f}")


def _no_move(now: Situation) -> str:
    if _move(now) is None:
        return _no_way(now)
    if now.balance is None:
        return "how quick the next pool would be is not known"
    return f"moving is quicker with probability {now.balance.move_is_quicker:.2f}, below {now.section.move_if:g}"


def _no_way(now: Situation) -> str:
    place = f"place.{now.side}"
    return f"no other pool of {place} is left" if not now.next_pools else "no move is left in the budget"


def _since_moved(now: Situation) -> list[IncidentRecord]:
    """What was met on this pool with this number of ranks."""
    return [one for one in now.past if one.pool == now.pool and one.ranks == now.ranks]


def _repeats(now: Situation) -> list[IncidentRecord]:
    return [one for one in _since_moved(now) if one.signal == "repeat differs" and one.rung == "retry"]


def _with(decision: Decision, why: str) -> Decision:
    return replace(decision, why=why)
