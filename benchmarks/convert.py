"""Conversion of a 2 GB bf16 checkpoint to W8A8 beside a copy of the same files, in one run.

    python -m benchmarks.convert [--folders DIR ...] [--repeats 3] [--threads 2]

A random deepseek_v3 of 1.08 G parameters in bf16 (five layers, 32 experts of 2048 x 1024, a vocabulary of 32768), in
files of 1 GB. The rival is `shutil.copyfile` of each file and an fsync. Both find the source in the page cache, both
are flushed to the disk within their time, and each run is a process of its own. Rates are bytes of the source per
second of wall time, the best of the repeats; the processor's time stands beside them, and the largest memory of the
process: in all (VmHWM of /proc/self/status, with mapped files and the interpreter), and before the work begins.
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
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.conditions import store
from isthmus.formats.files.stream import TensorWriter
from isthmus.formats.parts.assemble import float_layout
from isthmus.model.config import hf_config
from isthmus.progress import Watch
from isthmus.recipe.architecture import DeepseekSection
from isthmus.tools.convert import Options, execute

ARCHITECTURE = DeepseekSection(
    vocab_size=32768,
    hidden_size=2048,
    intermediate_size=8192,
    moe_intermediate_size=1024,
    num_hidden_layers=5,
    num_attention_heads=16,
    q_lora_rank=1024,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    n_routed_experts=32,
    num_experts_per_tok=4,
    max_position_embeddings=512,
    num_nextn_predict_layers=0,
)
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    memory = [path for path in (Path("/dev/shm"),) if path.is_dir()]
    parser.add_argument("--folders", type=Path, nargs="+", default=[Path(tempfile.gettempdir()), *memory])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shard-gb", type=float, nargs="+", default=[5.0, 0.25])
    parser.add_argument("--only", choices=["copy", "convert"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(once(options.only, options.folders[0], options.threads, options.shard_gb[0])))
        return
    results = [measure(folder, options) for folder in options.folders]
    Console().print(table(results))
    store("convert", {"threads": options.threads, "repeats": options.repeats, "results": results})


def measure(parent: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Copy and conversion in turns, in a new folder of `parent` that is deleted afterwards."""
    with tempfile.TemporaryDirectory(dir=parent) as temporary:
        folder = Path(temporary)
        size = make(folder / "source")
        runs: dict[str, list[dict[str, float]]] = {}
        for _ in range(options.repeats):
            runs.setdefault("copy", []).append(in_a_process("copy", folder, options.threads, options.shard_gb[0]))
            for shard in options.shard_gb:
                name = f"convert, files of {shard:g} GB"
                runs.setdefault(name, []).append(in_a_process("convert", folder, options.threads, shard))
    best = {name: {key: min(run[key] for run in found) for key in found[0]} for name, found in runs.items()}
    for found in best.values():
        found["mb_per_s"] = size / 1e6 / found["wall_s"]
        found["rate_of_copy"] = best["copy"]["wall_s"] / found["wall_s"]
    return {"filesystem": filesystem(parent), "source_bytes": size, "best": best, "runs": runs}


def make(folder: Path) -> int:
    """A random checkpoint. Returns its bytes."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    layout = float_layout(ARCHITECTURE, torch.bfloat16)
    with TensorWriter(folder, layout, 10**9, "the random checkpoint") as writer:
        for name, (dtype, shape) in layout.items():
            writer.write(name, torch.randn(shape, generator=generator).mul_(0.02).to(dtype))
        writer.finish()
    config = hf_config(ARCHITECTURE, dtype="bfloat16", eos_token_id=1, bos_token_id=0)
    (folder / "config.json").write_text(json.dumps(config))
    return sum(path.stat().st_size for path in folder.iterdir())


def in_a_process(what: str, folder: Path, threads: int, shard_gb: float) -> dict[str, float]:
    os.sync()
    command = [sys.executable, "-m", "benchmarks.convert", "--only", what, "--folders", folder]
    command += ["--threads", str(threads), "--shard-gb", str(shard_gb)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def once(what: str, folder: Path, threads: int, shard_gb: float) -> dict[str, float]:
    target = folder / "target"
    before = peak_bytes()
    began, busy = time.perf_counter(), time.process_time()
    if what == "copy":
        copy(folder / "source", target)
    else:
        options = Options("w8a8", threads=threads, shard_gb=shard_gb)
        execute(folder / "source", target, options, Watch(quiet=True))
    wall, cpu = time.perf_counter() - began, time.process_time() - busy
    shutil.rmtree(target)
    peak = peak_bytes()
    return {"wall_s": wall, "cpu_s": cpu, "peak_mib": peak / MIB, "before_mib": before / MIB}


def peak_bytes() -> int:
    """The most memory this process ever had. getrusage would count that of its parent, before exec."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def copy(source: Path, target: Path) -> None:
    target.mkdir()
    for path in source.iterdir():
        shutil.copyfile(path, target / path.name)
        with (target / path.name).open("rb") as file:
            os.fsync(file.fileno())


def filesystem(folder: Path) -> str:
    done = subprocess.run(["stat", "-f", "-c", "%T", folder], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def table(results: list[dict[str, Any]]) -> Table:
    shown = Table(title="bf16 to w8a8, best of the repeats", title_justify="left")
    for column in ("on", "what", "wall s", "cpu s", "MB/s of source", "of the copy", "peak MiB", "before MiB"):
        shown.add_column(column)
    for result in results:
        for name, found in result["best"].items():
            numbers = (found[key] for key in ("wall_s", "cpu_s", "mb_per_s"))
            memory = (found[key] for key in ("peak_mib", "before_mib"))
            shown.add_row(
                result["filesystem"],
                name,
                *(f"{number:,.2f}" for number in numbers),
                f"{found['rate_of_copy']:.0%}",
                *(f"{number:,.0f}" for number in memory),
            )
    return shown


if __name__ == "__main__":
    main()
