"""Live canaries: now and then the running engine answers the bundle's golden prompts, and must answer as before.

Weights that were damaged in memory, a kernel that computes something else, a chip that errs: all of them show here,
while requests go on. Weights that an administrator exchanged are not those that the golden answers belong to, so a
canary says `not applicable` then, and no alarm.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from isthmus.engines import EngineError
from isthmus.engines.local.api.service import Service
from isthmus.engines.local.core.scheduler import Finished, Request, Token
from isthmus.errors import IsthmusError
from isthmus.formats.files.golden import Golden, GoldenAnswer
from isthmus.parity.gate import at_most

Outcome = Literal["ok", "drift", "not applicable", "failed"]
ANSWER_S = 600.0
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CanaryReport:
    """What one canary found. `drift` is in nats; infinite if the model's output is not a number."""

    outcome: Outcome
    reason: str
    version: int
    at: float
    seconds: float
    drift: float | None = None
    prompts: int = 0
    tokens: int = 0
    rolled_back: bool = False

    def shown(self) -> dict[str, Any]:
        """As JSON shows it."""
        shown = asdict(self)
        return shown | {"drift": str(self.drift)} if self.drift is not None and math.isinf(self.drift) else shown


class Canary:
    """Compares the engine with golden answers. Drift beyond `bound` nats is an alarm.

    `roll_back`, if given, is called upon an alarm and must bring the sealed weights back; the canary then runs once
    more. `tell` hears every report. `quiet` says when no canary should run, for example while the server is paused.
    """

    def __init__(
        self,
        service: Service,
        golden: Golden,
        *,
        bound: float,
        roll_back: Callable[[str], None] | None = None,
        tell: Callable[[CanaryReport], None] = lambda _report: None,
        quiet: Callable[[], bool] = lambda: False,
    ):
        self.service, self.golden, self.bound = service, golden, bound
        self.last: CanaryReport | None = None
        self._roll_back, self._tell, self._quiet = roll_back, tell, quiet
        self._running, self._stopped = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, every_s: float) -> None:
        """Run every so many seconds, in a thread of its own, until `stop`. The first canary runs at once."""
        self._thread = threading.Thread(target=self._repeat, args=(every_s,), name="canary", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the schedule. A canary that is running is left to the end of the core."""
        self._stopped.set()

    def run(self) -> CanaryReport:
        """Ask the engine once, and act on what it says. Waits for a canary that is running already."""
        with self._running:
            report = self._compare()
            if self._stopped.is_set():
                return report
            self._publish(report)
            if report.outcome != "drift" or self._roll_back is None:
                return report
            return self._bring_back(self._roll_back, report.reason)

    def alarm(self, reason: str) -> None:
        """The weights in use are damaged, whatever the golden prompts would say of them."""
        with self._running:
            service = self.service
            report = CanaryReport("drift", reason, service.core.version, time.time(), 0.0, drift=math.inf)
            self._publish(report)
            if self._roll_back is not None and service.is_original:
                self._bring_back(self._roll_back, reason)

    def _bring_back(self, roll_back: Callable[[str], None], reason: str) -> CanaryReport:
        try:
            roll_back(reason)
        except IsthmusError as error:
            reason = f"the rollback failed: {error}"
            report = CanaryReport("failed", reason, self.service.core.version, time.time(), 0.0)
        else:
            again = self._compare()
            report = CanaryReport(**{**asdict(again), "rolled_back": True})
        self._publish(report)
        return report

    def _publish(self, report: CanaryReport) -> None:
        self.last = report
        if report.outcome in ("drift", "failed"):
            logger.error("canary: %s", report.reason)
        self._tell(report)

    def _repeat(self, every_s: float) -> None:
        while not self._stopped.is_set():
            if not self._quiet():
                self.run()
            self._stopped.wait(every_s)

    def _compare(self) -> CanaryReport:
        began, at, service = time.monotonic(), time.time(), self.service
        revision, version = service.revision, service.core.version

        def report(outcome: Outcome, reason: str, **found: Any) -> CanaryReport:
            return CanaryReport(outcome, reason, version, at, round(time.monotonic() - began, 3), **found)

        if not service.is_original:
            return report("not applicable", f"version {version} came by an update; the golden answers are the bundle's")
        try:
            samples = self._ask()
        except EngineError as error:
            return report("failed", str(error))
        if service.revision != revision:
            return report("not applicable", "the weights were exchanged while the canary ran")
        if samples is None or any(sample.finish_reason == "abort" for sample in samples):
            return report("failed", "the engine did not answer the golden prompts")
        drifts = [drift_of(answer, sample) for answer, sample in zip(self.golden.answers, samples, strict=True)]
        drift, tokens = max(drifts), sum(len(sample.tokens) for sample in samples)
        found = {"drift": drift, "prompts": len(samples), "tokens": tokens}
        if at_most(self.bound, drift) == "pass":
            return report("ok", f"within {self.bound:g} nats of the golden answers", **found)
        worst = drifts.index(drift)
        reason = f"the answer to golden prompt {worst} drifted by {drift:.4g} nats; the bound is {self.bound:g}"
        return report("drift", reason, **found)

    def _ask(self) -> list[Finished] | None:
        """The engine's greedy answers in order, or None if they do not come."""
        groups = {len(answer.tokens) for answer in self.golden.answers}
        found: dict[int, Finished] = {}
        done = threading.Event()

        def listen(members: list[int], event: Token | Finished) -> None:
            if isinstance(event, Finished):
                found[members[event.choice]] = event
                if len(found) == len(self.golden.answers):
                    done.set()

        requests = []
        for length in groups:
            members = [i for i, answer in enumerate(self.golden.answers) if len(answer.tokens) == length]
            prompts = [self.golden.answers[i].prompt for i in members]
            request = Request(prompts, lambda event, m=members: listen(m, event), length, temperature=0.0)
            self.service.core.submit(request)
            requests.append(request)
        end = time.monotonic() + ANSWER_S
        while not done.wait(0.1):
            if self._stopped.is_set() or self.service.core.failure is not None or time.monotonic() > end:
                for request in requests:
                    self.service.core.end(request)
                return None
        return [found[index] for index in range(len(self.golden.answers))]


def drift_of(golden: GoldenAnswer, sample: Finished) -> float:
    """How far an answer is from its golden one, in nats: the largest change of a log-probability.

    Where the engine chose another token, the margin by which the golden token led counts, and what the chosen one
    gained over the runner-up; what follows is another text. An answer that is not a number drifts infinitely.
    """
    if sample.finish_reason == "error":
        return math.inf
    drift = 0.0
    for place, token in enumerate(golden.tokens):
        if place >= len(sample.tokens):
            return max(drift, golden.margins[place])
        if sample.tokens[place] != token:
            runner_up = golden.logprobs[place] - golden.margins[place]
            return max(drift, golden.margins[place], _size(sample.logprobs[place] - runner_up))
        drift = max(drift, _size(sample.logprobs[place] - golden.logprobs[place]))
    return drift


def _size(gap: float) -> float:
    return abs(gap) if math.isfinite(gap) else math.inf
