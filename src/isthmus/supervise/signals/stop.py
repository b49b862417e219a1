"""A scheduler's SIGTERM: what is under way is finished and saved, and the process leaves."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from isthmus.supervise.signals import Signal


class StopAsked:
    """Set by SIGTERM while it listens. A second one is as if nobody listened."""

    def __init__(self) -> None:
        self.asked = False

    def signal(self, update: int) -> Signal:
        return Signal("asked to stop", f"SIGTERM after update {update}", update)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Only the main thread of a process may listen; elsewhere SIGTERM stays as it is."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.getsignal(signal.SIGTERM)

        def hear(_number: int, _frame: FrameType | None) -> None:
            self.asked = True
            signal.signal(signal.SIGTERM, before)

        signal.signal(signal.SIGTERM, hear)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
