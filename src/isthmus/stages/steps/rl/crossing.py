"""The small crossing of every step: the trainer's weights reach the engine, and are what it then computes with."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from rich.markup import escape
from torch import Tensor

from isthmus.engines import Completion, Sampling
from isthmus.engines.account import SHOWN, Findings, Sums, compare
from isthmus.engines.channel import Channel, writer
from isthmus.engines.local.core.replica import exact_for
from isthmus.errors import GateRefused
from isthmus.formats import get_format
from isthmus.model.model import Model
from isthmus.parity.engine import SPOT_TWINS, Spot, spot_check
from isthmus.parity.target import ANNOUNCED
from isthmus.parity.tokens import GoldenSequence
from isthmus.parity.trend import trend
from isthmus.parity.twins import RESOLUTION
from isthmus.stages.steps.rl.engines import Engines
from isthmus.stages.steps.rl.state import State
from isthmus.supervise.signals import mismatch

SPOT_PROMPTS = 2
"""Prompts whose greedy answers check a version."""


class Crossing:
    """Brings each version of the weights to one engine. `prompts` check it; `weights_sha256` is of the last version.

    The version is the number of finished steps.
    """

    def __init__(self, state: State, engine: Engines, prompts: list[list[int]], say: Callable[[str], None]):
        self.state, self.engine, self.prompts, self.say = state, engine, prompts, say
        self.section, self.tell = state.work.section, state.work.event
        self.format = get_format(self.section.rollout_format)
        self.weights_sha256, self.strikes = "", 0
        self.channel = Channel(
            engine,
            deltas=self.section.update == "delta",
            snapshot_every=self.section.snapshot_every,
            folder=writer(self.section.publish, self.section.rollout_format, self.section.publish_layout),
            tell=self.tell,
        )
        engine.bring = self.channel.take_up

    @property
    def arithmetic(self) -> str:
        """The dtype in which the engine computes, as far as it says so."""
        return self.engine.arithmetic or ANNOUNCED[self.format.dtype]

    def send(self) -> dict[str, Any]:
        """Bring the weights to the engine in its format, and check what it then computes; both for an event.

        Raises GateRefused if it computes something else too many times in a row, and no other pool can generate.
        """
        tensors = self.format.export(self.state.weights(), self.state.work.architecture)
        sent = self.channel.send(self.state.step, tensors)
        self.weights_sha256 = sent.sha256
        return sent.shown() | self._check(tensors)

    def _check(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """What each engine holds against what was sent, by checksums, and a few greedy tokens of each against the
        format's model on the CPU.

        Where one is wrong, all weights are sent once more. If that does not help it is a strike.
        """
        if not self.section.parity_tokens or self.state.step % self.section.parity_every:
            return {}
        began = time.perf_counter()
        looks = self._look(tensors)
        found = worst_of(looks.values())
        if found.is_wrong:
            self.channel.send_whole()
            looks = self._look(tensors)
            first, found = found, worst_of(looks.values())
            self._alarm(first, found)
            found = self._of_those_that_stay(looks)
        self.strikes = self.strikes + 1 if found.is_wrong else 0
        gone = mismatch.look(found.words, self.strikes, self.section.parity_strikes, self.state.step)
        if gone is not None:
            self.engine.give_up(gone, self._refusal(found))
            self.strikes = 0
            return self._check(tensors)
        gap = found.gap
        return {
            "parity_gap": round(gap.mean, 7) if math.isfinite(gap.mean) else None,
            "parity_gap_max": round(gap.largest, 7) if math.isfinite(gap.largest) else None,
            "parity_limit": None if gap.limit is None else round(gap.limit, 7),
            "parity_tokens": gap.tokens,
            "checksums": found.findings.seen,
            "checksums_unseen": found.findings.unseen,
            "parity_s": round(time.perf_counter() - began, 4),
        }

    def _look(self, tensors: dict[str, Tensor]) -> dict[str, Look]:
        """By engine: does it hold what was sent, and compute with it?

        One that answers as another does is not judged twice.
        """
        sums, accounts = Sums(tensors), self.engine.accounts()
        held = {url: compare(one, self.state.step, tensors, sums) for url, one in accounts}
        sampling = Sampling(self.section.parity_tokens, temperature=0.0)
        within = RESOLUTION if self.engine.bits is None else 0.0
        judged: list[tuple[list[Completion], Spot]] = []
        looks: dict[str, Look] = {}
        for url, groups in self.engine.probe(self.prompts, sampling):
            answers = [group[0] for group in groups]
            spot = next((spot for known, spot in judged if _same(answers, known, within)), None)
            if spot is None:
                spot = self.spot_of(answers, tensors)
                judged.append((answers, spot))
            looks[url] = Look(spot, held.get(url, NOTHING_TOLD), url)
        return looks

    def _of_those_that_stay(self, looks: dict[str, Look]) -> Look:
        """Without the engines that are wrong, if others of the pool are right: these go on alone."""
        wrong = {url: look for url, look in looks.items() if look.is_wrong}
        if len(wrong) == len(looks):
            return worst_of(looks.values())
        for url, look in wrong.items():
            self.engine.leave_out(url, f"at version {self.state.step} {look.words}, after all weights were sent again")
        return worst_of(look for url, look in looks.items() if url not in wrong)

    def spot_of(self, answers: list[Completion], tensors: dict[str, Tensor]) -> Spot:
        work = self.state.work

        def build() -> Model:
            return self.format.build(work.architecture, dict(tensors))

        said = [
            (GoldenSequence(prompt, one.tokens), one.logprobs)
            for prompt, one in zip(self.prompts, answers, strict=True)
        ]
        return spot_check(
            build,
            self.arithmetic,
            self.state.whole_model(),
            said,
            work.recipe.handoff.max_chip_kl,
            seed=self.state.step,
            exact=exact_for(self.engine.bits, build, [sequence for sequence, _ in said]),
        )

    def _alarm(self, first: Look, again: Look) -> None:
        limit = first.gap.limit
        gaps = {
            "gap": first.gap.mean,
            "gap_after_snapshot": again.gap.mean,
            "limit": math.nan if limit is None else limit,
        }
        facts = {key: value if math.isfinite(value) else None for key, value in gaps.items()}
        what = f"the engine does not {'hold' if first.wrong else 'compute'} what was sent to it"
        self.tell("alarm", what=what, weight_version=self.state.step, tensors=sorted(first.wrong)[:SHOWN], **facts)
        outcome = "still" if again.is_wrong else "helped:"
        self.say(
            f"  [bold red]alarm[/] version {self.state.step}: {what}, {first.gap.mean:.3g} nats/token from the exact "
            f"model ({self._allowed(first.gap)}){f'; {escape(first.findings.shown)}' if first.wrong else ''}; all "
            f"weights sent again, {outcome} {again.gap.mean:.3g}"
        )

    def _allowed(self, gap: Spot) -> str:
        if gap.other_bits is not None:
            return "a healthy engine of these bits gives the same"
        return f"{SPOT_TWINS} healthy twins in {self.arithmetic} stay below {gap.limit or math.nan:.3g}"

    def _refusal(self, found: Look) -> GateRefused:
        held = f". It does not hold what was sent: {found.findings.shown}" if found.wrong else ""
        return GateRefused(
            "the engine on the rollout pool does not compute what was sent to it: at version "
            f"{self.state.step} its log-probabilities are {found.gap.mean:.3g} nats/token from the exact model of "
            f"{self.section.rollout_format} ({self._allowed(found.gap)} on the same tokens), in {self.strikes} checks "
            f"in a row and after all weights were sent again{held}. It must not generate: qualify the pool again, or "
            "use another engine"
        )


@dataclass(frozen=True)
class Look:
    """At one engine and one version: its log-probabilities, and its checksums."""

    gap: Spot
    findings: Findings
    url: str

    @property
    def wrong(self) -> dict[str, str]:
        return self.findings.wrong

    @property
    def is_wrong(self) -> bool:
        return self.gap.is_over or bool(self.wrong)

    @property
    def words(self) -> str:
        """What is wrong."""
        if self.wrong:
            return f"it does not hold what was sent: {self.findings.shown}"
        return f"log-probabilities {self.gap.mean:.3g} nats per token from those of the weights that were sent"


NOTHING_TOLD = Findings({}, 0, 0)


def worst_of(looks: Iterable[Look]) -> Look:
    """The gap of the engine that is furthest off, with what is wrong in any, and the fewest checksums."""
    several = list(looks)
    gap = max((look.gap for look in several), key=lambda spot: (spot.is_over, spot.mean))
    wrong = {f"{name} at {look.url}": why for look in several for name, why in look.wrong.items()}
    seen, unseen = (min(getattr(look.findings, kind) for look in several) for kind in ("seen", "unseen"))
    return Look(gap, Findings(wrong, seen, unseen), "")


def _same(one: list[Completion], other: list[Completion], within: float) -> bool:
    return all(
        a.tokens == b.tokens and all(abs(x - y) <= within for x, y in zip(a.logprobs, b.logprobs, strict=True))
        for a, b in zip(one, other, strict=True)
    )


class DriftAlarm:
    """Says so, once per rise, when the mismatch climbs and will pass the budget before the run ends."""

    def __init__(self, budget: float, steps: int, tell: Callable[..., None]):
        self.budget, self.steps, self.tell = budget, steps, tell
        self.climbs = False

    def look(self, step: int, mismatches: list[float], say: Callable[[str], None]) -> None:
        """At the mismatches until the end of a step, in nats per token. `tell` gets an event, `say` a line."""
        drift, before = trend(mismatches), self.climbs
        self.climbs = drift is not None and drift.alarms(self.budget, self.steps - step)
        if drift is None or not self.climbs or before:
            return
        why = (
            f"it is {drift.level:.3g} nats per token and rises by {drift.slope:.2g} a step: it passes the budget of "
            f"{self.budget:g} in {drift.crossings_until(self.budget):.0f} steps"
        )
        self.tell("alarm", step=step, what="the mismatch climbs", why=why)
        say(f"[bold red]drift[/] the mismatch climbs: {why}")
