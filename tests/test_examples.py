"""The examples: what each of them answers, on a small checkpoint and on small scripts."""

from __future__ import annotations

from pathlib import Path

from isthmus.model.model import Model
from isthmus.parity.seal import verify_seal
from tests.support.bundles import published
from tests.support.engine_bundle import small_tokenizer
from tests.support.examples import example
from tests.support.small_dense import dense_architecture

TRAIN = """
import sys
import torch

model = torch.nn.Linear(8, 1).to("npu")
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(3):
    loss = model(torch.randn(4, 8, device="npu")).square().mean()
    loss.backward()
    optimizer.step()
if "--fused" in sys.argv:
    import torch_npu

    torch_npu.npu_rms_norm(loss, loss)
"""


def test_a_checkpoint_from_elsewhere_becomes_a_sealed_bundle_for_ascend(tmp_path: Path):
    source, bundle, tokenizer = tmp_path / "mine", tmp_path / "bundle", small_tokenizer()
    published(source, Model(dense_architecture("llama", vocab_size=300, initializer_range=0.05)).initialise(0))
    tokenizer.save(source)
    done = example("checkpoint_to_ascend.sh", source, bundle, "--max-mean-kl", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ascend-910b-313t" in done.stdout and "modelslim_dynamic" in done.stdout
    assert verify_seal(bundle).lineage.target_pool


def test_a_script_is_told_whether_it_runs_on_the_chip(tmp_path: Path):
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    runs = example("does_it_run.sh", "ascend-910b-313t", script)
    assert runs.returncode == 0, runs.stdout + runs.stderr
    refused = example("does_it_run.sh", "ascend-910b-313t", script, "--fused")
    assert refused.returncode == 1 and "torch_npu.npu_rms_norm" in refused.stdout + refused.stderr
