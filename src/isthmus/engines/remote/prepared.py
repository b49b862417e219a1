"""A version on its way to the engines of a pool: read, put together and written once for all of them."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from isthmus.formats.updates.delta import WeightSet, apply
from isthmus.formats.updates.wire import unpack
from isthmus.run import new_folder

T = TypeVar("T")


class Prepared:
    """One for the engines of a pool. Each method keeps its last result for whoever asks for the same: that is known by
    the very objects that it is made of. Who asks while another one's is made waits for it. Errors are not kept.
    """

    def __init__(self) -> None:
        self._locks = {name: threading.Lock() for name in ("unpacked", "whole", "changed", "written")}
        self._kept: dict[str, tuple[tuple[object, ...], object]] = {}

    def unpacked(self, payload: bytes, sha256: str) -> dict[str, Tensor]:
        """As updates/wire.py has it. The tensors must not be changed."""
        return self._once("unpacked", (payload, sha256), lambda: unpack(payload, sha256))

    def whole(self, payload: bytes, version: int, sha256: str) -> WeightSet:
        """All weights of a version. Raises as `unpack` does."""
        tensors = self.unpacked(payload, sha256)
        return self._once("whole", (payload, version), lambda: WeightSet.of(version, tensors))

    def changed(self, base: WeightSet, parts: Sequence[bytes]) -> WeightSet:
        """The weights after a delta. Raises as `apply` of updates/delta.py does."""
        return self._once("changed", (base, *parts), lambda: apply(base, parts))

    def written(self, made_of: tuple[object, ...], target: Path, write: Callable[[], Path]) -> Path:
        """What `write` leaves at `target`: written for the first engine, and linked from there for the others."""
        first = self._once("written", made_of, write)
        if first == target:
            return target
        if not first.is_dir():
            return write()
        with new_folder(target) as new:
            shutil.copytree(first, new, dirs_exist_ok=True, copy_function=_linked)
        return target

    def _once(self, name: str, made_of: tuple[object, ...], make: Callable[[], T]) -> T:
        with self._locks[name]:
            known = self._kept.get(name)
            if known is None or not _same(known[0], made_of):
                known = made_of, make()
                self._kept[name] = known
            return known[1]  # type: ignore[return-value]


def _same(one: tuple[object, ...], other: tuple[object, ...]) -> bool:
    """Large things are compared by what they are, the words and numbers beside them by what they say."""
    pairs = zip(one, other, strict=False)
    return len(one) == len(other) and all(a is b or (isinstance(a, str | int | Path) and a == b) for a, b in pairs)


def _linked(source: str, target: str) -> None:
    """Storage need not know links, nor be one."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
