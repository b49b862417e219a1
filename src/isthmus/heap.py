"""What the allocator of glibc is told (man 3 mallopt, man 3 malloc_trim); those of others are left alone."""

from __future__ import annotations

import ctypes
from typing import Literal

_LIBRARY = ctypes.CDLL(None)
_SET, _TRIM = (getattr(_LIBRARY, name, None) for name in ("mallopt", "malloc_trim"))
_NUMBERS = {"trim threshold": -1, "mmap threshold": -3, "arenas": -8}
"""Of M_TRIM_THRESHOLD, M_MMAP_THRESHOLD and M_ARENA_MAX in malloc.h."""


def set_option(name: Literal["trim threshold", "mmap threshold", "arenas"], value: int) -> None:
    """Bytes, or how many."""
    if _SET is not None:
        _SET(_NUMBERS[name], value)


def trim() -> None:
    """Give the system what is free."""
    if _TRIM is not None:
        _TRIM(0)
