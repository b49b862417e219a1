"""Which training scripts `isthmus rehearse` runs, by chip, and with which versions of their libraries.

    python -m benchmarks.rehearse_scripts                     # all scripts on three chips: ten minutes on two cores
    python -m benchmarks.rehearse_scripts --quick             # one chip, and no result is stored
    python -m benchmarks.rehearse_scripts --script ddp        # one script; no result is stored

The scripts are in benchmarks/scripts, written after the public examples of torch, transformers, accelerate and
Lightning. They know nothing of Isthmus, and fetch nothing; the one of a library that is not installed is left out, and
the result says so. A script runs if it ends with code 0 after at least two steps of an optimiser on each rank. It is
refused if a rule of the chip ends it, and that rule is its answer; any other end is a break.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.conditions import store

SCRIPTS = Path(__file__).parent / "scripts"
CHIPS = ("ascend-910b-313t", "h800-sxm", "mi300x")
LIMIT_S = 420.0


@dataclass(frozen=True)
class Script:
    """One script: its file, the ranks that it wants, and the libraries beside torch."""

    name: str
    what: str
    ranks: int = 1
    needs: tuple[str, ...] = ()


ALL = (
    Script("mixed_precision", "autocast, a scaler of gradients, convolutions, Adadelta"),
    Script("ddp", "DistributedDataParallel, and a checkpoint that all ranks load", 2),
    Script("fsdp2_meta", "`fully_shard` from the meta device in bf16, and a checkpoint in parts", 2),
    Script("tensor_parallel", "columns and rows of a model over a mesh", 2),
    Script("transformers_trainer", "transformers' Trainer, bf16", 1, ("transformers", "accelerate")),
    Script("accelerate_loop", "accelerate's loop", 1, ("accelerate",)),
    Script("lightning_fit", "Lightning's Trainer", 1, ("lightning",)),
)


def versions(script: Script) -> dict[str, str] | None:
    """Of what a script needs; None if something is not installed."""
    try:
        return {name: version(name) for name in ("torch", *script.needs)}
    except PackageNotFoundError:
        return None


def rehearse(script: Script, chip: str) -> dict[str, Any]:
    """How a script ends under the rules of a chip: {outcome: runs, refused or breaks; steps, said}."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        options = ["--chip", chip, "--ranks", str(script.ranks), "--json", str(report)]
        command = [sys.executable, "-m", "isthmus", "rehearse", *options, "--", sys.executable]
        try:
            done = subprocess.run(
                [*command, str(SCRIPTS / f"{script.name}.py")],
                capture_output=True,
                text=True,
                cwd=folder,
                timeout=LIMIT_S,
                env=os.environ | {"TMPDIR": folder, "HF_HUB_OFFLINE": "1"},
            )
        except subprocess.TimeoutExpired:
            return {"outcome": "breaks", "steps": 0, "said": f"not done after {LIMIT_S:.0f} s"}
        found = json.loads(report.read_text()) if report.exists() else {}
        refusals, steps = found.get("refusals", []), found.get("steps", 0)
        if done.returncode == 0 and steps >= 2:
            return {"outcome": "runs", "steps": steps, "said": ""}
        if refusals:
            return {"outcome": "refused", "steps": steps, "said": refusals[0]}
        lines = [line for line in (done.stdout + done.stderr).splitlines() if "Error" in line]
        return {"outcome": "breaks", "steps": steps, "said": (lines or ["no step was seen"])[-1].strip()[:300]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--script", choices=[script.name for script in ALL])
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for script in ALL if arguments.script is None else [one for one in ALL if one.name == arguments.script]:
        known = versions(script)
        row: dict[str, Any] = {"script": script.name, "what": script.what, "ranks": script.ranks, "versions": known}
        for chip in CHIPS[:1] if arguments.quick else CHIPS:
            row[chip] = (
                rehearse(script, chip) if known else {"outcome": "not tried", "steps": 0, "said": "not installed"}
            )
            print(script.name, chip, row[chip]["outcome"], row[chip]["steps"], row[chip]["said"], flush=True)
        rows.append(row)
    if not arguments.quick and arguments.script is None:
        store("rehearse_scripts", {"chips": CHIPS, "scripts": rows})


if __name__ == "__main__":
    main()
