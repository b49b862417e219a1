"""Running live probes one after another on a crew, and stopping where more of them would end in the same way."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from isthmus.launch.crew import Crew
from isthmus.probes.contract import Probe, Setting
from isthmus.records import Evidence

BROKEN_PROBES = 2
"""After so many probes in which ranks crashed or hung, the rest is left out."""


@dataclass(frozen=True)
class Asked:
    """What one probe found, and how long it took. `broken`: ranks crashed or hung. None: it was left out."""

    probe: Probe
    evidence: list[Evidence] | None
    seconds: float
    broken: bool


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
        began, failed_before = time.monotonic(), crew.failed_calls
        evidence = probe.run(crew, setting)
        assert evidence, f"the probe {probe.name} found nothing at all"
        answers.append(Asked(probe, evidence, time.monotonic() - began, crew.failed_calls > failed_before))
    return answers
