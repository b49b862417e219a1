"""Heartbeats of ranks in a small shared file: what each one does, and how many collectives it has begun."""

from __future__ import annotations

import mmap
import struct
import time
from dataclasses import dataclass
from pathlib import Path

_LAYOUT = struct.Struct("<dqqq96s")
_SIZE = 128


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
    """A rank's side: writes its own beat."""

    def __init__(self, path: Path, rank: int):
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self._offset = rank * _SIZE
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
        _LAYOUT.pack_into(self._map, self._offset, time.monotonic(), self.step, self.beats, self.collectives, name)


def create_beats(path: Path, world: int) -> None:
    path.write_bytes(bytes(world * _SIZE))


def read_beats(path: Path, world: int) -> list[Beat]:
    content = path.read_bytes()
    found = []
    for rank in range(world):
        at, step, beats, collectives, name = _LAYOUT.unpack_from(content, rank * _SIZE)
        found.append(Beat(at, step, beats, collectives, name.rstrip(b"\0").decode(errors="replace")))
    return found
