"""Giving memory back: what only cycles of objects hold, and what the C library's allocator keeps for later."""

from __future__ import annotations

import ctypes
import gc

_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None)
"""Of glibc alone: man 3 malloc_trim."""


def give_back() -> None:
    """Takes milliseconds, for what is loaded and stays is out of the collector's sight (host.py)."""
    gc.collect()
    if _TRIM is not None:
        _TRIM(0)
