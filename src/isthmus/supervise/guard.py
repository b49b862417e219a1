"""Inside the process that trains: looks at every update before it is made, and leaves a beat.

In an update where nothing is wrong it changes no number, and draws none.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist

from isthmus.errors import Diverged, TooSlow, Unrepeatable
from isthmus.launch.beats import beat
from isthmus.progress import Watch
from isthmus.recipe.steps import RlSection
from isthmus.records import IncidentRecord, PlanRecord, TrainPlace
from isthmus.run import RunFolder
from isthmus.supervise import incidents
from isthmus.supervise.ladder import decide
from isthmus.supervise.signals import Signal, not_finite, repeat
from isthmus.supervise.signals.no_beat import UNLIMITED, UPDATE
from isthmus.supervise.signals.slow import Slow
from isthmus.supervise.signals.spike import Leaps, Spikes
from isthmus.supervise.signals.stop import StopAsked
from isthmus.supervise.situation import situation
from isthmus.trainer.batch import Batch
from isthmus.trainer.mesh import Ranks

T = TypeVar("T")
HALF = 1 << 31


@dataclass(frozen=True)
class Computed(Generic[T]):
    """Gradients that are computed and not applied: the loss and norm of all ranks, and whatever else came out."""

    loss: float
    norm: float
    rest: T

    @property
    def pair(self) -> tuple[float, float]:
        return self.loss, self.norm


class Guard:
    """Of one step on one rank; all ranks make the same calls."""

    def __init__(self, run: RunFolder, step: str, place: TrainPlace, ranks: Ranks, watch: Watch):
        section = run.recipe.supervise
        self.run, self.step, self.place, self.ranks, self.watch = run, step, place, ranks, watch
        self.section = section
        self.spikes = _spikes(run, step)
        self.slow = Slow(_longest_s(run, step))
        self.stop = StopAsked()
        self.too_slow: Signal | None = None
        self.leaving = False

    @property
    def band(self) -> float:
        """How far a repeated computation may be off: not at all on a CPU, where the same code meets the same data."""
        return 0.0 if self.ranks.device.type == "cpu" else self.section.repeat_band

    @property
    def wants_to_leave(self) -> bool:
        """Whether a scheduler asked this rank to stop, or the forecast would have the step move."""
        return self.stop.asked or self.too_slow is not None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hear SIGTERM."""
        with self.stop.listening():
            yield
        beat(UNLIMITED, 0)

    def update(self, update: int, batch: Batch, compute: Callable[[], Computed[T]]) -> tuple[Computed[T], bool, str]:
        """Compute an update: (what came out, whether it is to be made, digest of the batch of all ranks).

        Raises Diverged or Unrepeatable if neither computing it again nor leaving its batch out is an answer.
        """
        beat(UPDATE, update)
        before = compute() if repeat.is_due(update, self.section.repeat_every) else None
        found = compute()
        signal = self._look(update, found)
        if before is not None:
            signal = repeat.look(update, before.pair, found.pair, self.band) or signal
        digest = self._agree(batch, signal)
        if digest.suspicious:
            earlier = [found.pair] if before is None else [before.pair, found.pair]
            found, made = self._act(update, signal, found, earlier, compute)
        else:
            made = True
        if made:
            self.spikes.remember(*found.pair)
        return found, made, digest.text

    def after(self, update: int, seconds: float) -> None:
        """What shows when an update is over."""
        beat(UPDATE, update)
        if not self.ranks.is_first:
            return
        signal = self.slow.look(update, seconds)
        if signal is None:
            return
        now = situation(self.run, self.step, self.place)
        decision = decide(signal, now)
        if decision.rung == "go on":
            record = incidents.write(self.run, self.step, signal, decision, self.place, now.checkpoint)
            self._tell(incidents.conclude(self.run, record, "done"))
        else:
            self.too_slow = signal

    def leave(self, update: int, save: Callable[[], object]) -> None:
        """Save and end, if a scheduler or the forecast asked for it; the ranks agreed within the update.

        Raises KeyboardInterrupt or TooSlow.
        """
        if not self.leaving:
            return
        beat("save", update)
        save()
        slow = self._shared(self.too_slow)
        if slow is not None:
            raise TooSlow(slow.detail)
        raise KeyboardInterrupt(f"asked to stop by SIGTERM; saved after update {update}")

    def _look(self, update: int, found: Computed[Any]) -> Signal | None:
        return not_finite.look(update, *found.pair) or self.spikes.look(update, *found.pair)

    def _agree(self, batch: Batch, signal: Signal | None) -> _Agreed:
        """One small sum over the ranks: whether any suspects anything or was asked to stop, and the batch's digest."""
        said = [self.wants_to_leave, signal is not None, *_halves(batch)]
        asked, suspicious, *halves = self.ranks.total(torch.tensor(said, device=self.ranks.device)).tolist()
        self.leaving = bool(asked)
        return _Agreed(bool(suspicious), _joined(*halves))

    def _act(
        self,
        update: int,
        signal: Signal | None,
        found: Computed[T],
        earlier: list[tuple[float, float]],
        compute: Callable[[], Computed[T]],
    ) -> tuple[Computed[T], bool]:
        """Climb the first rungs, all ranks together; the first one decides."""
        signal = self._shared(signal)
        while signal is not None:
            record = self._shared(self._decided(signal) if self.ranks.is_first else None)
            if record is None:
                raise (Unrepeatable if signal.kind == "repeat differs" else Diverged)(_escalated(signal))
            if record.rung != "retry":
                self._conclude(record)
                return found, record.rung == "go on"
            found = compute()
            agrees = any(repeat.look(update, one, found.pair, self.band) is None for one in earlier)
            differs = signal.kind == "repeat differs" and not agrees
            signal = self._shared(signal if differs else self._look(update, found))
            earlier = [*earlier, found.pair]
            self._conclude(record)
        return found, True

    def _decided(self, signal: Signal) -> IncidentRecord | None:
        """The decision, on the disk; None if it is for the supervisor."""
        now = situation(self.run, self.step, self.place, in_update=True)
        decision = decide(signal, now)
        if decision.rung not in ("retry", "skip batch", "go on"):
            return None
        return incidents.write(self.run, self.step, signal, decision, self.place, now.checkpoint)

    def _conclude(self, record: IncidentRecord) -> None:
        if self.ranks.is_first:
            self._tell(incidents.conclude(self.run, record, "done"))

    def _tell(self, record: IncidentRecord) -> None:
        self.run.event(self.step, "incident", number=record.number, signal=record.signal, rung=record.rung)
        self.watch.say(f"  [yellow]{record.signal}[/]: {record.detail}; {record.rung}, {record.why}")

    def _shared(self, value: T) -> T:
        """The first value that a rank has, from the first rank on, the same for all."""
        if self.ranks.world == 1:
            return value
        values: list[Any] = [None] * self.ranks.world
        dist.all_gather_object(values, value)
        return next((one for one in values if one is not None), None)  # pyright: ignore[reportReturnType]


@dataclass(frozen=True)
class _Agreed:
    suspicious: bool
    text: str


def shared_digest(batch: Batch, ranks: Ranks) -> str:
    """The digest of the batch of all ranks, as `Guard.update` has it."""
    return _joined(*ranks.total(torch.tensor(_halves(batch), device=ranks.device)).tolist())


def _halves(batch: Batch) -> list[int]:
    """Of a rank's digest, so that sums of them stay exact."""
    own = digest_of(batch)
    return [own >> 31, own % HALF]


def _joined(high: int, low: int) -> str:
    return f"{((high << 31) + low) % (1 << 62):016x}"


def _spikes(run: RunFolder, step: str) -> Spikes | Leaps:
    section = run.recipe.supervise
    if isinstance(run.recipe.named(step), RlSection):
        return Leaps(section.spike_window, section.spike_history)
    return Spikes(section.spike_sigma, section.spike_window, section.spike_history)


def digest_of(batch: Batch) -> int:
    """62 bits of a rank's documents and of their targets. Summed over ranks it is the same in any world: how documents
    are packed into rows depends on the world, which documents a batch has does not."""
    total = 0
    tokens, targets = batch.tokens.int().cpu().numpy(), batch.target_mask.cpu().numpy()
    for row, numbers in enumerate(batch.document.cpu()):
        start = 0
        numbers_here, lengths = (one.tolist() for one in numbers.unique_consecutive(return_counts=True))
        for number, length in zip(numbers_here, lengths, strict=True):
            if number >= 0:
                hashed = hashlib.sha256(tokens[row, start : start + length].tobytes())
                hashed.update(targets[row, start : start + length].tobytes())
                total += int.from_bytes(hashed.digest()[:8], "little") >> 2
            start += length
    return total % (1 << 62)


WATCHED_MODULES = 5
"""Parameters whose part of the gradient an event tells."""


def watched_figures(found: Computed[Any], modules: dict[str, float], digest: str) -> dict[str, Any]:
    """What an event keeps of an update, for the gate of a revert: all that is a number."""

    def number(value: float) -> float | None:
        return value if math.isfinite(value) else None

    norms = {name: number(value) for name, value in modules.items()}
    return {"batch": digest, "loss": number(found.loss), "norm": number(found.norm), "modules": norms}


def _longest_s(run: RunFolder, step: str) -> float | None:
    """Seconds of an update at the P90 of the plan's time for the step."""
    figure = run.require_record("plan", PlanRecord, "plan").estimate.get(step)
    steps = getattr(run.recipe.named(step), "steps", None)
    return figure.high / steps if figure is not None and figure.high is not None and steps else None


def _escalated(signal: Signal) -> str:
    if signal.kind == "repeat differs":
        return f"{signal.detail}: a chip computes wrongly. Qualify the pool again; the checkpoints before it are whole."
    return (
        f"{signal.detail}: training has diverged, or a chip computes wrongly. Lower the learning rate, or qualify the "
        "pool again; the checkpoints before it are whole."
    )
