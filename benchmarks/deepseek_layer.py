"""One real-sized layer of DeepSeek-V3 through the tools as a person calls them: time, memory, and the whole model's.

    python -m benchmarks.deepseek_layer                          # 256 experts: 24 GB of disk
    python -m benchmarks.deepseek_layer --experts 16             # a first look; 16 at least
    python -m benchmarks.deepseek_layer --format modelslim_dynamic
    python -m benchmarks.deepseek_layer --folder DIR             # where to write, and not the temporary folder

The checkpoint is in fp8 e4m3 with a scale per block of 128x128 and has one layer of the published sizes: latent
attention with 128 heads, experts of 7168 x 2048 and the shared one. Its weights are random, each a rotation of the same
values. The vocabulary is small, so that the layer is what is measured. `--vocabulary 129280` has the published one, for
what a real embedding and output head ask of memory.

It is converted, captured on 4 prompts of 32 random tokens and verified on the CPU in fp32, each by a command of its own
with one thread. Beside its seconds stands the largest memory of its process (ru_maxrss of wait4, with the interpreter,
torch and mapped files). Rivals: a plain copy of the files with an fsync, and one forward pass of the golden sequences
through the exact emulator, which reads each expert that is met once.

The whole model is computed: time by its weights over the layer's, and memory, which does not grow with the number of
layers, as it is.
"""

from __future__ import annotations

import argparse
import json
import math
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
from torch import Tensor

from benchmarks.conditions import store
from benchmarks.convert import copy, filesystem
from benchmarks.verify import bytes_of, forward
from isthmus.formats import get_format
from isthmus.formats.files.bundle import open_bundle
from isthmus.formats.files.stream import TensorWriter, tensor_bytes
from isthmus.formats.parts.float8 import E4M3
from isthmus.formats.parts.names import SCALE
from isthmus.model.config import hf_config
from isthmus.parity.capture import GoldenSet
from isthmus.recipe.architecture import DeepseekSection

GIB = 2**30
DEVIATION, SPREAD = 0.006, 100.0
"""Of the random weights, and of their e4m3 values before the scale."""
EXPERTS, LAYERS, VOCABULARY = 256, 61, 129280
SMALL_VOCABULARY = 4096
PROMPTS, TOKENS = 4, 32
TIMES, MORE, ALL = 4, GIB, 8 * GIB
"""Memory is to stay below so many times the largest piece in fp32 and so much more, and below so much in all."""


def model(experts: int = EXPERTS, vocabulary: int = SMALL_VOCABULARY, layers: int = 1) -> DeepseekSection:
    """DeepSeek-V3's numbers (its published config.json) without the layer for guessing tokens. The layer of one is
    a mixture; of all 61 the first three are dense."""
    return DeepseekSection(
        vocab_size=vocabulary,
        hidden_size=7168,
        intermediate_size=18432,
        moe_intermediate_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        n_routed_experts=experts,
        num_experts_per_tok=8,
        n_group=8,
        topk_group=4,
        routed_scaling_factor=2.5,
        first_k_dense_replace=0 if layers == 1 else 3,
        num_nextn_predict_layers=0,
        max_position_embeddings=4096,
    )


def main() -> None:
    options = parse()
    if options.step:
        own_step(options)
        return
    architecture = model(options.experts, options.vocabulary)
    look_for_room(options.folder, architecture, options.format)
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        found = measure(Path(temporary), options)
    found |= {"whole_model": whole_model(architecture, found["steps"], options.format)}
    Console().print(table(found), whole_table(found["whole_model"]))
    store("deepseek_layer", found)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--experts", type=int, default=EXPERTS, help="of the layer, a multiple of 8, 16 at least (default: 256)"
    )
    parser.add_argument("--vocabulary", type=int, default=SMALL_VOCABULARY)
    parser.add_argument("--format", default="w8a8")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--step", choices=["write", "copy", "forward"], help=argparse.SUPPRESS)
    return parser.parse_args()


def look_for_room(folder: Path, architecture: DeepseekSection, form: str) -> None:
    """End with an error where the disk cannot hold the checkpoint and what it becomes, or its copy."""
    source, bundle = (bytes_in(name, architecture) for name in ("fp8", form))
    needed, free = source + max(source, bundle) + GIB, shutil.disk_usage(folder).free
    if free < needed:
        raise SystemExit(
            f"{folder} has {free / 1e9:.1f} GB free, and {needed / 1e9:.1f} GB are needed: name another folder with "
            "--folder, or fewer experts with --experts"
        )


def bytes_in(form: str, architecture: DeepseekSection) -> int:
    return sum(tensor_bytes(*kind) for kind in get_format(form).layout(architecture).values())


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All steps, one after the other."""
    source, bundle, prompts = folder / "source", folder / "bundle", folder / "prompts.jsonl"
    write_prompts(prompts, options.vocabulary)
    own = [sys.executable, "-m", "benchmarks.deepseek_layer", "--folder", str(folder)]
    own += ["--experts", str(options.experts), "--vocabulary", str(options.vocabulary), "--step"]
    isthmus = [sys.executable, "-m", "isthmus"]
    commands = {
        "write": [*own, "write"],
        "start": [*isthmus, "--help"],
        "copy": [*own, "copy"],
        "convert": [*isthmus, "convert", str(source), str(bundle), "--format", options.format, "--threads", "1"],
        "capture": [*isthmus, "capture", str(bundle), "--source", str(source), "--prompts", str(prompts)],
        "forward": [*own, "forward"],
        "verify": [*isthmus, "verify", str(bundle), "--device", "cpu"],
    }
    steps = {}
    for name, command in commands.items():
        os.sync()
        steps[name] = run(command)
        print(name, steps[name], flush=True)
    golden = bytes_of(bundle / "golden")
    return {
        "experts": options.experts,
        "vocabulary": options.vocabulary,
        "format": options.format,
        "prompts": PROMPTS,
        "tokens": TOKENS,
        "filesystem": filesystem(folder),
        "source_bytes": bytes_of(source),
        "bundle_bytes": bytes_of(bundle) - golden,
        "golden_bytes": golden,
        "bound_mib": bound(model(options.experts, options.vocabulary)) / 2**20,
        "verdict": json.loads((bundle / "verdict.json").read_bytes())["verdict"],
        "steps": steps,
    }


def write_prompts(path: Path, vocabulary: int) -> None:
    drawn = torch.randint(vocabulary, (PROMPTS, TOKENS), generator=torch.Generator().manual_seed(0)).tolist()
    path.write_text("".join(json.dumps({"tokens": row}) + "\n" for row in drawn))


def run(command: list[str]) -> dict[str, float]:
    """A command with one thread: its seconds, and its largest memory."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    began = time.monotonic()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{said.read().decode()[-4000:]}")
    cpu = usage.ru_utime + usage.ru_stime
    return {"wall_s": time.monotonic() - began, "cpu_s": cpu, "peak_mib": usage.ru_maxrss / 1024}


def own_step(options: argparse.Namespace) -> None:
    """A step that no command of isthmus is."""
    folder: Path = options.folder
    if options.step == "write":
        write_layer(folder / "source", model(options.experts, options.vocabulary))
    elif options.step == "copy":
        copy(folder / "source", folder / "copied")
        shutil.rmtree(folder / "copied")
    else:
        with open_bundle(folder / "bundle", check_files=False) as opened:
            forward(opened.stream(), GoldenSet(folder / "bundle").listed.golden_sequences())


def write_layer(folder: Path, architecture: DeepseekSection) -> None:
    """A checkpoint in fp8 of random weights."""
    folder.mkdir()
    chosen, generator = get_format("fp8"), torch.Generator().manual_seed(0)
    drawn: dict[tuple[int, ...], Tensor] = {}
    layout = chosen.layout(architecture)
    with TensorWriter(folder, layout, 4 * 10**9, "the random layer") as writer:
        for number, (name, (dtype, shape)) in enumerate(layout.items()):
            if name.endswith(SCALE):
                tensor = torch.full(shape, DEVIATION / SPREAD)
            elif "norm" in name:
                tensor = torch.ones(shape, dtype=dtype)
            elif len(shape) == 1:
                tensor = torch.zeros(shape, dtype=dtype)
            else:
                if shape not in drawn:
                    drawn[shape] = torch.randn(shape, generator=generator).mul_(SPREAD).to(E4M3)
                rolled = drawn[shape].view(torch.uint8).flatten().roll(7919 * number).view(shape).view(E4M3)
                tensor = rolled if dtype == E4M3 else rolled.float().mul_(DEVIATION / SPREAD).to(dtype)
            writer.write(name, tensor)
        writer.finish()
    config = hf_config(architecture, dtype="bfloat16", eos_token_id=1, bos_token_id=0)
    config["quantization_config"] = chosen.quantization_config(architecture)
    (folder / "config.json").write_text(json.dumps(config))


def bound(architecture: DeepseekSection) -> float:
    """What a tool may take of memory: by the largest of what is in memory as a whole, attention or an expert."""
    layout = get_format("fp32").layout(architecture)
    attention = sum(math.prod(shape) for name, (_, shape) in layout.items() if ".self_attn." in name)
    expert = 3 * architecture.hidden_size * architecture.moe_intermediate_size
    return min(TIMES * 4 * max(attention, expert) + MORE, ALL)


def weights_of(architecture: DeepseekSection) -> int:
    return sum(math.prod(shape) for _, shape in get_format("fp32").layout(architecture).values())


def whole_model(architecture: DeepseekSection, steps: dict[str, dict[str, float]], form: str) -> dict[str, Any]:
    """Hours of a whole DeepSeek-V3 with one thread: what a step takes beyond its start, by weights."""
    whole = model(vocabulary=VOCABULARY, layers=LAYERS)
    times, start = weights_of(whole) / weights_of(architecture), steps["start"]["cpu_s"]
    hours = {
        name: times * (one["cpu_s"] - start) / 3600 for name, one in steps.items() if name not in ("write", "start")
    }
    return {
        "weights": weights_of(whole),
        "times_the_layer": times,
        "source_bytes": bytes_in("fp8", whole),
        "bundle_bytes": bytes_in(form, whole),
        "cpu_h": hours,
    }


def table(found: dict[str, Any]) -> Table:
    layer = f"a layer of {found['experts']} experts, {found['source_bytes'] / 1e9:.2f} GB, to {found['format']}"
    shown = Table(title=f"{layer}; memory is to stay below {found['bound_mib']:,.0f} MiB", title_justify="left")
    for column in ("step", "wall s", "cpu s", "of the copy's wall", "forward passes", "peak MiB"):
        shown.add_column(column, justify="right")
    steps, start = found["steps"], found["steps"]["start"]["cpu_s"]
    for name, one in steps.items():
        passes = (one["cpu_s"] - start) / (steps["forward"]["cpu_s"] - start)
        numbers = (one["wall_s"], one["cpu_s"], one["wall_s"] / steps["copy"]["wall_s"], passes)
        shown.add_row(name, *(f"{number:,.2f}" for number in numbers), f"{one['peak_mib']:,.0f}")
    return shown


def whole_table(found: dict[str, Any]) -> Table:
    title = (
        f"DeepSeek-V3, {found['weights'] / 1e9:,.0f} billion weights, computed: {found['times_the_layer']:.1f} layers"
    )
    shown = Table(title=title, title_justify="left")
    for column in ("step", "hours of one core"):
        shown.add_column(column, justify="right")
    for name, hours in found["cpu_h"].items():
        shown.add_row(name, f"{hours:,.2f}")
    return shown


if __name__ == "__main__":
    main()
