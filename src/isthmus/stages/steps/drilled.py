"""A step of a drill on a rehearsed pool: its faults strike while it trains, and each is an event before it does.

A fault of the pool with a `step` strikes once, at that update; one without is there all the time. Beside them faults
are drawn: at each start of the step one, of a kind as often as published counts have it, an exponential number of
updates later. The same recipe goes wrong in the same way.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from isthmus.chips import fault_weights, parse_fault
from isthmus.chips.rehearse import Emulation, profile_of
from isthmus.chips.rehearse.dispatch import enforce
from isthmus.chips.rehearse.faults import LINK_KINDS, Fault
from isthmus.chips.rehearse.group import rehearse_backend
from isthmus.chips.rehearse.inject import Injector
from isthmus.pools import Pool
from isthmus.recipe.drill import DrillSection
from isthmus.run import RunFolder
from isthmus.supervise.situation import checkpoints

COUNTED = "stability"
"""The aspect of chips/fault_weights.csv that drawn kinds are of: interruptions of one run, counted by cause."""
NEED_OTHERS = (*LINK_KINDS, "wrong-sum")
"""Kinds that need a second rank."""


def drawn(section: DrillSection, step: str, attempt: int, begins: int, ranks: int) -> Fault | None:
    """The fault of one start of a step, whose first update is `begins` + 1; None if the recipe draws none."""
    if section.updates_between_faults is None:
        return None
    chance = random.Random(f"{section.seed}/{step}/{attempt}")
    weights = {kind: share for kind, share in fault_weights()[COUNTED].items() if ranks > 1 or kind not in NEED_OTHERS}
    (kind,) = chance.choices(list(weights), list(weights.values()))
    update = begins + 1 + int(chance.expovariate(1 / section.updates_between_faults))
    return parse_fault(f"{kind}@rank={chance.randrange(ranks)},step={update},seed={attempt}")


def faults_of(run: RunFolder, step: str, pool: Pool, section: DrillSection) -> list[Fault]:
    """What is planted in the start of a step that comes now: what has struck by its update does not come again."""
    struck = {event["fault"] for event in run.events(step, "planted")}
    by_hand = [parse_fault(text) for text in run.recipe.pools[pool.name].faults]
    left = [fault for fault in by_hand if fault.step is None or str(fault) not in struck]
    begins = max(checkpoints(run, step), default=0)
    new = drawn(section, step, len(run.events(step, "start")), begins, pool.ranks)
    return [*left, new] if new is not None else left


@dataclass
class Drill:
    """Of one rank of a step on a rehearsed pool."""

    run: RunFolder
    step: str
    pool: Pool
    faults: Sequence[Fault]
    injector: Injector
    told: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, run: RunFolder, step: str, pool: Pool, rank: int) -> Drill | None:
        """None where nothing is drilled: in a run that is no drill, and on a pool that is here.

        All ranks have to call it before one of them writes an event.
        """
        if run.recipe.drill is None or not pool.rehearsed:
            return None
        faults = faults_of(run, step, pool, run.recipe.drill)
        drill = cls(run, step, pool, faults, Injector(faults, rank, armed=False))
        drill.injector.last_words = drill.tell
        if pool.ranks > 1:
            rehearse_backend("gloo", profile_of(pool.chip), drill.injector)
        return drill

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """Faults strike within this, and saves are damaged."""
        self.injector.begin()
        with self.injector.install_saves():
            yield
        self.tell()

    @contextmanager
    def on_chip(self) -> Iterator[None]:
        """What is computed within this is the chip's: its rules hold, and faults strike its operators."""
        with enforce(self.pool.chip, emulate=Emulation()), self.injector.operators():
            yield

    def update(self, number: int) -> None:
        """An update begins, counted from 1. A rank may crash or hang here."""
        self.tell()
        self.injector.step(number)

    def tell(self) -> None:
        """An event for each fault that struck since it was last said; one that is there all the time is said once."""
        for fault in self.faults:
            text, at = str(fault), self.injector.current_step
            if text not in self.told and fault in self.injector.struck:
                self.told.add(text)
                self.run.event(self.step, "planted", fault=text, update=at, pool=self.pool.name)
