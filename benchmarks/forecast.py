"""How wrong forecasts are on the published results that come with the package, and how long one takes."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from benchmarks.conditions import store
from isthmus.progress import Watch
from isthmus.tools.validate_forecast import execute

RECIPE = Path(__file__).parents[1] / "recipes" / "tiny.toml"


def answering_s(times: int = 5) -> float:
    """Seconds of `isthmus forecast` on a recipe, the fastest of some."""
    command = [sys.executable, "-m", "isthmus", "forecast", str(RECIPE), "--set", "pools.away.rehearsed=false"]
    found: list[float] = []
    for _ in range(times):
        started = time.perf_counter()
        subprocess.run(command, capture_output=True, check=True)
        found.append(time.perf_counter() - started)
    return min(found)


def main() -> None:
    started = time.perf_counter()
    found = execute(Watch(), rows=None, as_json=False).as_json()
    seconds = time.perf_counter() - started
    del found["predictions"]
    store("forecast", {**found, "validate_s": seconds, "answer_s": answering_s()})


if __name__ == "__main__":
    main()
