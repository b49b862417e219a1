"""The small crossing of every step: the trainer's weights reach the engine, and are what it then computes with."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from torch import Tensor

from isthmus.engines import Sampling
from isthmus.engines.channel import Channel, writer
from isthmus.engines.local.core.replica import exact_for
from isthmus.errors import GateRefused
from isthmus.formats import get_format
from isthmus.model.model import Model
from isthmus.parity.engine import SPOT_TWINS, Spot, spot_check
from isthmus.parity.target import ANNOUNCED
from isthmus.parity.tokens import GoldenSequence
from isthmus.parity.trend import trend
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
            folder=writer(self.section.publish, self.section.rollout_format),
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
        """A few greedy tokens of the engine against the format's model on the CPU.

        Beyond the limit all weights are sent once more. If that does not help it is a strike.
        """
        if not self.section.parity_tokens or self.state.step % self.section.parity_every:
            return {}
        began = time.perf_counter()
        gap = self.spot(tensors)
        if gap.is_over:
            self.channel.send_whole()
            first, gap = gap, self.spot(tensors)
            self._alarm(first, gap)
        self.strikes = self.strikes + 1 if gap.is_over else 0
        gone = mismatch.look(gap.mean, self.strikes, self.section.parity_strikes, self.state.step)
        if gone is not None:
            self.engine.give_up(gone, self._refusal(gap))
            self.strikes = 0
            return self._check(tensors)
        return {
            "parity_gap": round(gap.mean, 7) if math.isfinite(gap.mean) else None,
            "parity_gap_max": round(gap.largest, 7) if math.isfinite(gap.largest) else None,
            "parity_limit": None if gap.limit is None else round(gap.limit, 7),
            "parity_tokens": gap.tokens,
            "parity_s": round(time.perf_counter() - began, 4),
        }

    def spot(self, tensors: dict[str, Tensor]) -> Spot:
        """What the engine says to the checking prompts, beside what exactly these weights say."""
        sampling = Sampling(self.section.parity_tokens, temperature=0.0)
        answers = [group[0] for group in self.engine.generate(self.prompts, sampling)]
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

    def _alarm(self, first: Spot, again: Spot) -> None:
        gaps = {"gap": first.mean, "gap_after_snapshot": again.mean, "limit": first.limit or math.nan}
        facts = {key: value if math.isfinite(value) else None for key, value in gaps.items()}
        what = "the engine does not compute what was sent to it"
        self.tell("alarm", what=what, weight_version=self.state.step, **facts)
        outcome = "still" if again.is_over else "helped:"
        self.say(
            f"  [bold red]alarm[/] version {self.state.step}: {what}, {first.mean:.3g} nats/token from the exact model "
            f"({self._allowed(first)}); all weights sent again, {outcome} "
            f"{again.mean:.3g}"
        )

    def _allowed(self, gap: Spot) -> str:
        if gap.other_bits is not None:
            return "a healthy engine of these bits gives the same"
        return f"{SPOT_TWINS} healthy twins in {self.arithmetic} stay below {gap.limit or math.nan:.3g}"

    def _refusal(self, gap: Spot) -> GateRefused:
        return GateRefused(
            "the engine on the rollout pool does not compute what was sent to it: at version "
            f"{self.state.step} its log-probabilities are {gap.mean:.3g} nats/token from the exact model of "
            f"{self.section.rollout_format} ({self._allowed(gap)} on the same tokens), in {self.strikes} checks "
            "in a row and after all weights were sent again. It must not generate: qualify the pool again, or use "
            "another engine"
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
