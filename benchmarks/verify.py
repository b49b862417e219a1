"""Memory and time of conversion, capture and verification on a real model.

    python -m benchmarks.verify
    python -m benchmarks.verify --folder DIR               # where to write, and not the system's temporary folder

The model is SmolLM2-135M-Instruct in bf16 (tests/support/real_model.py). It becomes w8a8, is captured on 16 random
sequences of 64 tokens, and is verified on the CPU in fp32. `benchmarks/deepseek_layer.py` does the same with a layer of
DeepSeek-V3.

Each step is a process of its own with `--threads` threads. Beside its wall and processor time stands its largest memory
(VmHWM of /proc/self/status, with the interpreter and mapped files). Rivals: a copy of the files with an fsync, and one
forward pass of the golden sequences through the exact emulator, all of them side by side, with the output head where
something follows that is compared: what verify asks of each model.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.conditions import store
from benchmarks.convert import copy, filesystem, peak_bytes
from isthmus.formats.files.bundle import open_bundle
from isthmus.model.model import Model
from isthmus.parity.capture import GoldenSet
from isthmus.parity.tokens import GoldenSequence
from isthmus.parity.verify import verify_bundle
from isthmus.progress import Watch
from isthmus.tools import capture, convert
from tests.support.real_model import real_checkpoint

MIB = 2**20
STEPS = ("copy", "convert", "capture", "forward", "verify")


def main() -> None:
    options = parse()
    if options.step:
        print(json.dumps(once(options.step, options.folder, options.threads)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        result = measure(Path(temporary), options.threads)
    Console().print(table(result))
    store("verify", {"threads": options.threads, **result})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(folder: Path, threads: int) -> dict[str, Any]:
    """All steps, one after the other, in a folder that is deleted afterwards."""
    source, bundle, steps = folder / "source", folder / "bundle", {}
    source.symlink_to(real_checkpoint())
    for step in STEPS:
        os.sync()
        command = [sys.executable, "-m", "benchmarks.verify", "--step", step, "--folder", folder]
        done = subprocess.run([*command, "--threads", str(threads)], capture_output=True, text=True, check=True)
        steps[step] = json.loads(done.stdout.splitlines()[-1])
        print(step, steps[step], flush=True)
    golden = bytes_of(bundle / "golden")
    return {
        "filesystem": filesystem(folder),
        "source_bytes": bytes_of(source),
        "bundle_bytes": bytes_of(bundle) - golden,
        "golden_bytes": golden,
        "verify_in_forward_passes": steps["verify"]["cpu_s"] / steps["forward"]["cpu_s"],
        "steps": steps,
    }


def once(step: str, folder: Path, threads: int) -> dict[str, float]:
    """One step, measured in this process."""
    torch.set_num_threads(threads)
    source, bundle, watch = folder / "source", folder / "bundle", Watch(quiet=True)
    before, began, busy = peak_bytes(), time.perf_counter(), time.process_time()
    if step == "copy":
        copy(source, folder / "copied")
        shutil.rmtree(folder / "copied")
    elif step == "convert":
        convert.execute(source, bundle, convert.Options("w8a8", threads=threads), watch)
    elif step == "capture":
        capture.execute(bundle, source, None, True, 256, watch)
    elif step == "forward":
        with open_bundle(bundle, check_files=False) as opened:
            forward(opened.stream(), GoldenSet(bundle).listed.golden_sequences())
    else:
        verdict = verify_bundle(bundle)
        assert all(check.outcome == "pass" for check in verdict.checks if check.layer in ("files", "modules"))
    wall, cpu = time.perf_counter() - began, time.process_time() - busy
    return {"wall_s": wall, "cpu_s": cpu, "peak_mib": peak_bytes() / MIB, "before_mib": before / MIB}


@torch.inference_mode()
def forward(model: Model, sequences: Sequence[GoldenSequence]) -> None:
    """The logits of the completions of sequences of one length."""
    start = len(sequences[0].prompt) - 1
    hidden = model.hidden(torch.tensor([[*one.prompt, *one.completion] for one in sequences]))
    model.logits(hidden[:, start:-1].flatten(0, 1))


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def table(result: dict[str, Any]) -> Table:
    title = f"{result['source_bytes'] / 1e9:.2f} GB to w8a8, captured and verified"
    shown = Table(title=title, title_justify="left")
    for column in ("step", "wall s", "cpu s", "forward passes", "peak MiB", "before MiB"):
        shown.add_column(column, justify="right")
    for step, found in result["steps"].items():
        passes = found["cpu_s"] / result["steps"]["forward"]["cpu_s"]
        numbers = (found["wall_s"], found["cpu_s"], passes)
        memory = (found["peak_mib"], found["before_mib"])
        shown.add_row(step, *(f"{one:,.2f}" for one in numbers), *(f"{one:,.0f}" for one in memory))
    return shown


if __name__ == "__main__":
    main()
