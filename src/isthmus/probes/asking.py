"""Running live probes one after another on a crew, and stopping where more of them would end in the same way.

A probe whose ranks were ended from outside has found nothing out, and is run again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from isthmus.launch.crew import Crew
from isthmus.launch.outside import may_be_its_own
from isthmus.probes.contract import Probe, Setting
from isthmus.records import Evidence

BROKEN_PROBES = 2
"""After so many probes in which ranks crashed or hung, the rest is left out."""
ATTEMPTS = 2
"""So often is a probe run that something from outside disturbs."""


@dataclass(frozen=True)
class Asked:
    """What one probe found, and how long it took. `broken`: ranks crashed or hung. None: it was left out.

    `disturbed` says what ended ranks from outside, in every attempt.
    """

    probe: Probe
    evidence: list[Evidence] | None
    seconds: float
    broken: bool
    disturbed: str | None = None


def ask(
    crew: Crew, setting: Setting, probes: Sequence[Probe], begin: Callable[[int, Probe], None] = lambda *_: None
) -> list[Asked]:
    """Run the probes in order; `begin` is told each one before it runs."""
    answers: list[Asked] = []
    for number, probe in enumerate(probes):
        if sum(answer.broken for answer in answers) >= BROKEN_PROBES:
            answers.append(Asked(probe, None, 0.0, False))
            continue
        begin(number, probe)
        answers.append(_asked(crew, setting, probe))
    return answers


def _asked(crew: Crew, setting: Setting, probe: Probe) -> Asked:
    kept, asked = len(setting.failures), _attempt(crew, setting, probe)
    for _ in range(ATTEMPTS - 1):
        if asked.disturbed is None:
            return asked
        setting.say(f"{probe.name} was disturbed ({asked.disturbed}), and is run again")
        setting.drop_failures(kept)
        asked = _attempt(crew, setting, probe)
    if asked.disturbed is None or asked.evidence is None:
        return asked
    if may_be_its_own(asked.disturbed):
        return replace(asked, disturbed=None)
    setting.drop_failures(kept)
    return replace(asked, broken=False, evidence=[_nothing_found(one, asked.disturbed) for one in asked.evidence])


def _attempt(crew: Crew, setting: Setting, probe: Probe) -> Asked:
    began, failed_before, disturbed_before = time.monotonic(), crew.failed_calls, len(crew.disturbances)
    evidence = probe.run(crew, setting)
    assert evidence, f"the probe {probe.name} found nothing at all"
    disturbance = next(iter(crew.disturbances[disturbed_before:]), None)
    return Asked(probe, evidence, time.monotonic() - began, crew.failed_calls > failed_before, disturbance)


def _nothing_found(item: Evidence, disturbance: str) -> Evidence:
    """What failed for something that the chip has no part in is no finding about the chip."""
    if item.outcome != "fail":
        return item
    detail = f"not found out: {disturbance}, in {ATTEMPTS} attempts, which says nothing about the chip ({item.detail})"
    return item.model_copy(update={"outcome": "unknown", "detail": detail, "limits": [], "ranks": [], "failure": None})
