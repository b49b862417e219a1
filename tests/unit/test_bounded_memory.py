"""Each tool of a crossing holds pieces of a model, whatever its size: its process is measured as a person calls it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from isthmus.formats.files.stream import TensorWriter
from isthmus.formats.parts.assemble import float_layout
from isthmus.model.config import hf_config
from tests.support.small import architecture

EXPERTS, HIDDEN, WIDTH = 32, 1024, 4096
EXPERT_BYTES = 4 * 3 * HIDDEN * WIDTH
BOUND = 4 * EXPERT_BYTES + (1 << 30)
LARGE = architecture(
    hidden_size=HIDDEN,
    moe_intermediate_size=WIDTH,
    num_hidden_layers=1,
    first_k_dense_replace=0,
    n_routed_experts=EXPERTS,
    num_nextn_predict_layers=0,
    initializer_range=0.02,
)


def checkpoint(folder: Path) -> Path:
    """Random weights in bf16, each a rotation of the same values."""
    folder.mkdir()
    layout = float_layout(LARGE, torch.bfloat16)
    drawn = torch.randn(HIDDEN * WIDTH, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    with TensorWriter(folder, layout, 10**9, "the checkpoint") as writer:
        for number, (name, (dtype, shape)) in enumerate(layout.items()):
            rolled = drawn.roll(7919 * number)[: torch.Size(shape).numel()].view(shape)
            writer.write(name, torch.ones(shape, dtype=dtype) if "norm" in name else rolled.to(dtype))
        writer.finish()
    config = hf_config(LARGE, dtype="bfloat16", eos_token_id=1, bos_token_id=0)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def peak_bytes(*words: object) -> int:
    """The most memory that a command had, with the interpreter and torch."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    # The measured process is a child of one that holds nothing: what a process had before exec is counted as its own.
    program = (
        "import os, sys; pid = os.posix_spawn(sys.executable, [sys.executable, '-m', 'isthmus', *sys.argv[1:]], "
        "os.environ); _, status, usage = os.wait4(pid, 0); print(usage.ru_maxrss); "
        "sys.exit(os.waitstatus_to_exitcode(status))"
    )
    command = [sys.executable, "-c", program, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert not done.returncode, done.stderr
    return 1024 * int(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_tools_hold_four_pieces_and_a_gibibyte_at_most(tmp_path: Path) -> None:
    assert EXPERTS * EXPERT_BYTES + (1 << 28) > BOUND, "the experts of the layer are more than the bound"
    source, bundle, prompts = checkpoint(tmp_path / "source"), tmp_path / "bundle", tmp_path / "prompts.jsonl"
    rows = torch.randint(LARGE.vocab_size, (2, 16), generator=torch.Generator().manual_seed(1)).tolist()
    prompts.write_text("".join(json.dumps({"tokens": row}) + "\n" for row in rows))
    loose = ("--max-mean-kl", "10", "--max-chip-kl", "10")
    for words in (
        ("convert", source, bundle, "--format", "w8a8", "--threads", "1"),
        ("capture", bundle, "--source", source, "--prompts", prompts),
        ("verify", bundle, "--device", "cpu", *loose),
    ):
        found = peak_bytes(*words)
        assert found < BOUND, f"{words[0]} takes {found / 2**20:,.0f} MiB, and {BOUND / 2**20:,.0f} are the bound"
