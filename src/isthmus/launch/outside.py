"""What ends a process and says nothing about its chip: a signal from outside, a full disk, a missing file, a busy
port."""

from __future__ import annotations

import re

_SIGNALS = {1: "SIGHUP", 2: "SIGINT", 9: "SIGKILL", 15: "SIGTERM"}
_BY_SIGNAL = re.compile(r"(?:killed by signal |code -)(\d+)\b")
_WORDS = (
    ("the disk is full", re.compile(r"Errno 28\b|Errno 122\b|No space left|no space left|Disk quota exceeded")),
    ("a port is busy", re.compile(r"Errno 98\b|EADDRINUSE|[Aa]ddress already in use")),
    ("a file is missing", re.compile(r"FileNotFoundError|Errno 2\b")),
    ("someone stopped it", re.compile(r"KeyboardInterrupt")),
)


def from_outside(words: str) -> str | None:
    """What it was, in words, if the last words of a process tell of something that the chip has no part in; else None.

    A process that dies of SIGSEGV, SIGABRT or SIGBUS has only itself and its driver to blame.
    """
    number = _BY_SIGNAL.search(words)
    if number is not None and int(number[1]) in _SIGNALS:
        return f"{_SIGNALS[int(number[1])]} ended it"
    return next((what for what, pattern in _WORDS if pattern.search(words)), None)


def may_be_its_own(what: str) -> bool:
    """Whether it counts as a failure after all where it happens again: SIGKILL is also how a process ends that asks for
    more memory than there is, each time."""
    return what.endswith(f"{_SIGNALS[9]} ended it")
