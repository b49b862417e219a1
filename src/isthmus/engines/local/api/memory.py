"""Giving memory back: what only cycles of objects hold, and what the C library's allocator keeps for later.

The allocator is told so where it is glibc (man 3 mallopt, man 3 malloc_trim); others are left alone.
"""

from __future__ import annotations

import ctypes
import gc

_LIBRARY = ctypes.CDLL(None)
_TRIM, _OPTION = (getattr(_LIBRARY, name, None) for name in ("malloc_trim", "mallopt"))
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
ARENAS, APART_BYTES, KEPT_BYTES = 2, 8 << 20, 64 << 20
"""Heaps for all threads; blocks from this size on, as long bodies are, lie apart and go back at once; and what the end
of a heap keeps, which a step of the engine takes up again."""


def use_few_heaps() -> None:
    """Let the memory of many threads not lie in pieces. To be called before they are started."""
    if _OPTION is not None:
        for option, value in ((_ARENA_MAX, ARENAS), (_MMAP_THRESHOLD, APART_BYTES), (_TRIM_THRESHOLD, KEPT_BYTES)):
            _OPTION(option, value)


def give_back() -> None:
    """Takes milliseconds, for what is loaded and stays is out of the collector's sight (host.py)."""
    gc.collect()
    if _TRIM is not None:
        _TRIM(0)
