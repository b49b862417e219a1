"""Memory and time of conversion, capture and verification, on a real model and on a layer of DeepSeek-V3's size.

    python -m benchmarks.verify                            # both; the layer needs 24 GB of disk
    python -m benchmarks.verify --what real
    python -m benchmarks.verify --what layer --experts 32  # a layer with some of its 256 experts
    python -m benchmarks.verify --folder DIR               # where to write, and not the system's temporary folder

The real model is SmolLM2-135M-Instruct in bf16 (tests/support/real_model.py). The layer is one of DeepSeek-V3 in fp8,
random weights: 256 experts of 7168 x 2048, each a rotation of the same values, with a vocabulary of 4096.
Both become w8a8, are captured on 16 random sequences of 64 tokens, and are verified on the CPU in fp32.

Each step is a process of its own with `--threads` threads. Beside its wall and processor time stands its largest memory
(VmHWM of /proc/self/status, with the interpreter and mapped files). Rivals: a copy of the files with an fsync, and one
forward pass of the golden sequences through the exact emulator, all of them side by side, with the output head where
something follows that is compared: what verify asks of each model. What a whole DeepSeek-V3 takes is
computed from the layer: 58 such layers, and three dense ones and the output head by their share of its multiplications.
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
from torch import Tensor

from benchmarks.conditions import store
from benchmarks.convert import copy, filesystem, peak_bytes
from isthmus.formats import get_format
from isthmus.formats.files.bundle import open_bundle
from isthmus.formats.files.stream import TensorWriter
from isthmus.formats.parts.float8 import E4M3
from isthmus.formats.parts.names import SCALE
from isthmus.model.config import hf_config
from isthmus.model.model import Model
from isthmus.parity.capture import GoldenSet
from isthmus.parity.tokens import GoldenSequence
from isthmus.parity.verify import verify_bundle
from isthmus.progress import Watch
from isthmus.recipe.architecture import DeepseekSection
from isthmus.tools import capture, convert
from tests.support.real_model import real_checkpoint

MIB = 2**20
STEPS = ("copy", "convert", "capture", "forward", "verify")
DEVIATION, SPREAD = 0.006, 100.0
"""Of the random weights, and of their e4m3 values before the scale."""
V3_LAYERS, V3_DENSE, V3_DENSE_WIDTH, V3_VOCABULARY = 61, 3, 18432, 129280
ACTIVE_EXPERTS = 8


def layer(experts: int) -> DeepseekSection:
    """DeepSeek-V3's numbers (its published config.json), with one layer, a short context and few tokens."""
    return DeepseekSection(
        vocab_size=4096,
        hidden_size=7168,
        intermediate_size=V3_DENSE_WIDTH,
        moe_intermediate_size=2048,
        num_hidden_layers=1,
        num_attention_heads=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        n_routed_experts=experts,
        num_experts_per_tok=ACTIVE_EXPERTS,
        n_group=8,
        topk_group=4,
        routed_scaling_factor=2.5,
        first_k_dense_replace=0,
        num_nextn_predict_layers=0,
        max_position_embeddings=4096,
    )


def main() -> None:
    options = parse()
    if options.step:
        print(json.dumps(once(options.step, options.folder, options.threads)))
        return
    results = []
    for what in ("real", "layer") if options.what == "both" else (options.what,):
        with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
            results.append(measure(what, Path(temporary), options))
    Console().print(table(results))
    store("verify", {"threads": options.threads, "results": results})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=["both", "real", "layer"], default="both")
    parser.add_argument("--experts", type=int, default=256, help="of the layer, a multiple of 8")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(what: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All steps, one after the other, in a folder that is deleted afterwards."""
    source = folder / "source"
    if what == "real":
        source.symlink_to(real_checkpoint())
    else:
        write_layer(source, layer(options.experts))
    steps = {}
    for step in STEPS:
        os.sync()
        command = [sys.executable, "-m", "benchmarks.verify", "--step", step, "--folder", folder]
        done = subprocess.run([*command, "--threads", str(options.threads)], capture_output=True, text=True, check=True)
        steps[step] = json.loads(done.stdout.splitlines()[-1])
        print(what, step, steps[step], flush=True)
    found = {
        "what": what,
        "experts": options.experts if what == "layer" else None,
        "filesystem": filesystem(folder),
        "source_bytes": bytes_of(source),
        "bundle_bytes": bytes_of(folder / "bundle") - bytes_of(folder / "bundle" / "golden"),
        "golden_bytes": bytes_of(folder / "bundle" / "golden"),
        "verify_in_forward_passes": steps["verify"]["cpu_s"] / steps["forward"]["cpu_s"],
        "steps": steps,
    }
    if what == "layer":
        found["whole_model"] = whole_model(layer(options.experts), steps)
    return found


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


def whole_model(a: DeepseekSection, steps: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Processor time and memory of a whole DeepSeek-V3, by the layer: time by what is read or by what is multiplied.

    A dense layer's MLP and the output head count by their weights beside those that a token meets in the layer.
    """
    expert = 3 * a.hidden_size * a.moe_intermediate_size
    heads = a.num_attention_heads
    attention = (
        a.hidden_size * (a.q_lora_rank or 0)
        + (a.q_lora_rank or 0) * heads * (a.qk_nope_head_dim + a.qk_rope_head_dim)
        + a.hidden_size * (a.kv_lora_rank + a.qk_rope_head_dim)
        + a.kv_lora_rank * heads * (a.qk_nope_head_dim + a.v_head_dim)
        + heads * a.v_head_dim * a.hidden_size
    )
    met = attention + (ACTIVE_EXPERTS + 1) * expert
    dense, head = attention + 3 * a.hidden_size * V3_DENSE_WIDTH, V3_VOCABULARY * a.hidden_size
    layers = V3_LAYERS - V3_DENSE + (V3_DENSE * dense + head) / met
    return {
        step: {"cpu_h": layers * found["cpu_s"] / 3600, "peak_mib": found["peak_mib"]} for step, found in steps.items()
    }


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def table(results: list[dict[str, Any]]) -> Table:
    shown = Table(title="to w8a8, captured and verified", title_justify="left")
    for column in ("what", "step", "wall s", "cpu s", "forward passes", "peak MiB", "before MiB"):
        shown.add_column(column)
    for result in results:
        name = f"{result['what']}, {result['source_bytes'] / 1e9:.2f} GB"
        for step, found in result["steps"].items():
            passes = found["cpu_s"] / result["steps"]["forward"]["cpu_s"]
            numbers = (found["wall_s"], found["cpu_s"], passes)
            memory = (found["peak_mib"], found["before_mib"])
            shown.add_row(name, step, *(f"{one:,.2f}" for one in numbers), *(f"{one:,.0f}" for one in memory))
    return shown


if __name__ == "__main__":
    main()
