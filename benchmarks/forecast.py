"""How wrong forecasts are on the published results that come with the package, and how long one takes."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.conditions import store
from isthmus.forecast.efficiency import MANY
from isthmus.forecast.published import shipped_training
from isthmus.forecast.validate import TESTS, Prediction, summary
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


def few_programs(found: Sequence[Prediction]) -> dict[str, dict[str, Any]]:
    """Errors over the training programs of which fewer than `MANY` results are known, by what is new."""
    results = shipped_training()
    counts = Counter(one.setting.source for one in results)
    rare = {one.id for one in results if counts[one.setting.source] < MANY}
    chosen = {
        test.name: summary(test.name, [p for p in found if p.test == test.name and p.id in rare]) for test in TESTS
    }
    return {name: asdict(one) for name, one in chosen.items() if one is not None}


def main() -> None:
    started = time.perf_counter()
    validation = execute(Watch(), rows=None, as_json=False)
    seconds = time.perf_counter() - started
    found = validation.as_json()
    del found["predictions"]
    rare = few_programs(validation.predictions)
    print({name: f"{one['median']:.1%} (naive {one['naive']:.1%})" for name, one in rare.items()})
    store("forecast", {**found, "few_results_of_the_program": rare, "validate_s": seconds, "answer_s": answering_s()})


if __name__ == "__main__":
    main()
