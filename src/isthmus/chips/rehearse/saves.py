"""Damage to files as they are saved: one byte of each is another than was written."""

from __future__ import annotations

import io
import os
import random
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Self

import safetensors.torch
import torch

from isthmus.chips.rehearse.faults import Fault

_writer: Any = safetensors.torch
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".distcp")
"""Files of tensors. Records and logs that a run writes beside them are left alone."""


class SaveDamage:
    """A context in which each file of tensors that this process saves has one byte flipped.

    It reaches torch.save, safetensors' save_file, and every file that is flushed to the disk (os.fsync) under a name of
    a file of tensors or of the temporary file that will take its name: what Isthmus and torch's distributed
    checkpoints write. `draws` gives the faults that strike a save, each with its random numbers; `note` hears of them.
    """

    def __init__(self, draws: Callable[[], list[tuple[Fault, random.Random]]], note: Callable[[Fault, str], None]):
        self._draws, self._note = draws, note
        self._done: set[tuple[int, int, int]] = set()
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self._originals = (torch.save, _writer.serialize_file, os.fsync)
        save, serialize, fsync = self._originals

        def save_and_damage(obj: Any, f: Any, *args: Any, **kwargs: Any) -> None:
            save(obj, f, *args, **kwargs)
            self._damage_target(f)

        def serialize_and_damage(tensors: Any, filename: Any, *args: Any, **kwargs: Any) -> None:
            serialize(tensors, filename, *args, **kwargs)
            self._damage_target(filename)

        def damage_and_fsync(file: Any) -> None:
            self._damage_flushed(file if isinstance(file, int) else file.fileno())
            fsync(file)

        torch.save, _writer.serialize_file, os.fsync = save_and_damage, serialize_and_damage, damage_and_fsync
        return self

    def __exit__(self, *exception: object) -> None:
        torch.save, _writer.serialize_file, os.fsync = self._originals

    def _damage_target(self, target: Any) -> None:
        """A path, or a file object that can be written and read in place; one that writes into another file waits for
        its fsync."""
        if isinstance(target, str | os.PathLike):
            with Path(target).open("r+b") as file:
                self._strike(file, os.fspath(target))
        elif isinstance(target, io.BytesIO):
            self._strike(target, "a buffer")

    def _damage_flushed(self, descriptor: int) -> None:
        state = os.fstat(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}")
        name = path.readlink().name
        if stat.S_ISREG(state.st_mode) and _holds_tensors(name) and _identity(descriptor) not in self._done:
            with path.open("r+b") as file:
                self._strike(file, name)

    def _strike(self, file: BinaryIO, name: str) -> None:
        with self._lock:
            struck = self._draws()
            for fault, draws in struck:
                place = flip_byte(file, draws)
                if place is not None:
                    self._note(fault, f"byte {place} of {name}")
            if not isinstance(file, io.BytesIO):
                file.flush()
                self._done.add(_identity(file.fileno()))


def flip_byte(file: BinaryIO, draws: random.Random) -> int | None:
    """Change one byte of a file, in the values if it is a safetensors file. Returns its place; None for an empty file.

    The position of the file is left where it is.
    """
    position = file.tell()
    size = file.seek(0, os.SEEK_END)
    start = _values_start(file, size)
    place = None
    if size > start:
        place = draws.randrange(start, size)
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ (1 << draws.randrange(8))]))
    file.seek(position)
    return place


def _values_start(file: BinaryIO, size: int) -> int:
    """Where the values of a safetensors file begin (8 bytes of length, a JSON header); 0 for another file."""
    file.seek(0)
    head = file.read(9)
    length = int.from_bytes(head[:8], "little")
    if len(head) == 9 and head[8:] == b"{" and 8 + length < size:
        return 8 + length
    return 0


def _holds_tensors(name: str) -> bool:
    return name.endswith(SUFFIXES) or (name.endswith(".tmp") and any(f"{suffix}." in name for suffix in SUFFIXES))


def _identity(descriptor: int) -> tuple[int, int, int]:
    """A file with the time of its last change: the same one is not damaged again before it is written again."""
    state = os.fstat(descriptor)
    return state.st_dev, state.st_ino, state.st_mtime_ns
