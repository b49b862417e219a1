"""Giving memory back: what only cycles of objects hold, and what the C library's allocator keeps for later."""

from __future__ import annotations

import gc

from isthmus import heap

ARENAS, APART_BYTES, KEPT_BYTES = 2, 8 << 20, 64 << 20
"""Heaps for all threads; blocks from this size on, as long bodies are, lie apart and go back at once; and what the end
of a heap keeps, which a step of the engine takes up again."""


def use_few_heaps() -> None:
    """Let the memory of many threads not lie in pieces. To be called before they are started."""
    heap.set_option("arenas", ARENAS)
    heap.set_option("mmap threshold", APART_BYTES)
    heap.set_option("trim threshold", KEPT_BYTES)


def give_back() -> None:
    """Takes milliseconds, for what is loaded and stays is out of the collector's sight (host.py)."""
    gc.collect()
    heap.trim()
