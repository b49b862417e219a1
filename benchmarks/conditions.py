"""The conditions under which a result was obtained, stored beside it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def conditions() -> dict[str, Any]:
    """Machine, software and commit."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--", "src", "recipes")),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "load_average_at_end": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def store(name: str, result: dict[str, Any]) -> Path:
    """Write results/<name>_<date>_<commit>.json."""
    where = conditions()
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}_{where['date']}_{where['commit']}.json"
    path.write_text(json.dumps({"conditions": where, **result}, indent=2) + "\n")
    print(f"stored {path.relative_to(RESULTS.parent.parent)}")
    return path


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], capture_output=True, text=True, cwd=RESULTS.parent)
    return done.stdout.strip()


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
