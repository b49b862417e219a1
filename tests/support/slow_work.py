"""Functions for a worker process: some answer, others do not."""

from __future__ import annotations

import os
import time


def work(what: str) -> str:
    if what == "hang":
        time.sleep(3600)
    if what == "die":
        os._exit(3)
    if what == "raise":
        raise ValueError("what it said")
    print("a library says something")
    return what.upper()
