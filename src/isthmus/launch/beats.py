"""The heartbeat of a rank in a small shared file: what it does, and how many collectives it has begun."""

from __future__ import annotations

import mmap
import os
import struct
import time
from dataclasses import dataclass
from pathlib import Path

_LAYOUT = struct.Struct("<dqqq96s")


@dataclass(frozen=True)
class Beat:
    """The last sign of life of a rank. `time` is time.monotonic() of this machine, seconds; 0 before the first."""

    time: float
    step: int
    beats: int
    collectives: int
    section: str

    def __str__(self) -> str:
        return f"{self.section or 'its start'}, step {self.step}, after {self.collectives} collectives"


class Pulse:
    """A rank's side: writes its beat."""

    def __init__(self, path: Path):
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self.section, self.step, self.beats, self.collectives = "", 0, 0, 0

    def beat(self, section: str, step: int = 0) -> None:
        """What this rank does now."""
        self.section, self.step = section, step
        self.beats += 1
        self._write()

    def begin_collective(self) -> None:
        """Another collective begins."""
        self.collectives += 1
        self._write()

    def _write(self) -> None:
        name = self.section.encode()[:96]
        _LAYOUT.pack_into(self._map, 0, time.monotonic(), self.step, self.beats, self.collectives, name)


FOLDER = "ISTHMUS_BEATS"
"""The variable that names the folder in which the ranks of a supervised step leave their beats."""


def own_beat(rank: int) -> Path | None:
    """Where this process leaves its beat; None if nobody looks."""
    folder = os.environ.get(FOLDER)
    return Path(folder) / f"{rank}-{os.getpid()}" if folder else None


def beat(section: str, step: int) -> None:
    """What this process does now, if anybody looks."""
    path = own_beat(int(os.environ.get("RANK", "0")))
    if path is not None and path.exists():
        Pulse(path).beat(section, step)


def left_beats(folder: Path) -> dict[int, tuple[int, Beat]]:
    """(process, last beat) of each rank that has begun, by rank."""
    found: dict[int, tuple[int, Beat]] = {}
    for path in folder.glob("*-*"):
        rank, _, process = path.name.partition("-")
        found[int(rank)] = int(process), read_beat(path)
    return found


def create_beat(path: Path) -> None:
    """A file for a rank that has not begun."""
    path.write_bytes(bytes(_LAYOUT.size))


def read_beat(path: Path) -> Beat:
    """The last beat of the rank whose file this is."""
    at, step, beats, collectives, name = _LAYOUT.unpack(path.read_bytes())
    return Beat(at, step, beats, collectives, name.rstrip(b"\0").decode(errors="replace"))
