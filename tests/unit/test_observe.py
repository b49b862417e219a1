"""What one sees of training: memory, share of the peak, expert load, TensorBoard files, traces."""

from __future__ import annotations

import contextlib
import gzip
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from isthmus.chips import get_chip, load_chips
from isthmus.errors import IsthmusError
from isthmus.run import Figure
from isthmus.trainer import observe
from isthmus.trainer.observe import TensorBoard, expert_imbalance, mfu, peak_memory, profiler

PEAKS = """
import torch
from isthmus.trainer.observe import peak_memory
for count in (2**26, 2**27, 1):
    torch.ones(count)
    print(peak_memory(torch.device("cpu")))
"""


def test_peak_memory_of_a_cpu_holds_a_large_tensor_that_is_gone_again():
    done = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, check=True)
    small, large, afterwards = map(int, done.stdout.split())
    assert large - small == pytest.approx(2**28, rel=0.1), "bytes of 2**27 floats less those of 2**26"
    assert afterwards == large


def test_peak_memory_of_an_accelerator_is_what_its_allocator_says(monkeypatch: pytest.MonkeyPatch):
    device, asked = torch.device("meta", 1), []
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace())
    assert peak_memory(device) is None, "its module counts no memory"
    module = SimpleNamespace(max_memory_allocated=lambda device: asked.append(device) or 1234)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    assert peak_memory(device) == 1234
    assert asked == [device]


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator is here")
def test_peak_memory_of_the_accelerator_that_is_here_grows_by_a_tensor():
    device = torch.accelerator.current_accelerator()
    assert device is not None
    torch.ones(1, device=device)
    before = torch.accelerator.memory_allocated()
    torch.ones(2**26, device=device)
    peak = peak_memory(device)
    assert peak is not None
    assert peak >= before + 2**28


def speed(kind: str = "measured") -> Figure:
    return Figure(value=5e4, unit="tokens/s", kind=kind, source="step 7, events.jsonl")  # type: ignore[arg-type]


def test_mfu_is_the_arithmetic_of_the_declared_peak():
    share = mfu(speed(), 3.6e10, get_chip("h100-sxm"), "bf16", ranks=4)
    assert share is not None
    assert share.value == pytest.approx(50_000 * 3.6e10 / (4 * 989e12))
    assert share.value == pytest.approx(0.455005, abs=1e-6)
    assert (share.unit, share.kind) == ("share", "declared"), "no better known than the peak in it"
    assert "step 7, events.jsonl" in share.source
    assert "4 x 989 TFLOPS bf16" in share.source
    assert str(get_chip("h100-sxm").bf16_tflops.source) in share.source  # type: ignore[union-attr]
    fp8 = mfu(speed(), 3.6e10, get_chip("h100-sxm"), "fp8", ranks=4)
    assert fp8 is not None
    assert fp8.value == pytest.approx(50_000 * 3.6e10 / (4 * 1979e12))


@pytest.mark.parametrize(
    ("chip", "precision"),
    [("cpu", "bf16"), ("cpu", "fp32"), ("h100-sxm", "fp32"), ("mi308x", "bf16"), ("a100-80gb-sxm", "fp8")],
)
def test_mfu_without_a_declared_peak_is_unknown(chip: str, precision: str):
    assert mfu(speed(), 1e9, get_chip(chip), precision, 1) is None


def test_a_rehearsal_has_no_mfu_and_an_unknown_speed_neither():
    chip = get_chip("ascend-910b-313t")
    assert mfu(speed(), 1e9, chip, "bf16", 1) is not None
    assert mfu(speed("rehearsed"), 1e9, chip, "bf16", 1) is None
    assert mfu(Figure(value=None, unit="tokens/s", kind="measured", source="x"), 1e9, chip, "bf16", 1) is None


def test_mfu_of_a_forecast_speed_is_no_measurement():
    share = mfu(speed("forecast"), 1e9, get_chip("h100-sxm"), "bf16", 1)
    assert share is not None
    assert share.kind == "forecast"


def test_no_peak_that_mfu_uses_is_an_inference():
    for chip in load_chips().values():
        for name in observe.PEAKS.values():
            peak = getattr(chip, name)
            assert peak is None or not peak.source.startswith("inference"), f"{chip.slug} {name}"


def test_expert_imbalance_is_that_of_the_worst_layer():
    even, crowded = torch.full((8,), 5), torch.tensor([1, 1, 1, 1, 1, 1, 1, 9])
    assert expert_imbalance([even]) == 1.0
    assert expert_imbalance([even, crowded]) == pytest.approx(9 / 2)
    assert expert_imbalance([[0.25, 0.75], [0.5, 0.5]]) == pytest.approx(1.5)
    assert expert_imbalance([torch.tensor([0, 0, 7, 0])]) == 4.0


def test_without_loads_there_is_no_imbalance():
    assert expert_imbalance([]) is None
    assert expert_imbalance([torch.zeros(4)]) is None


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard itself reads."""
    events = EventAccumulator(str(folder), purge_orphaned_data=True).Reload()
    return {tag: [(one.step, one.value) for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_reads_the_curves(tmp_path: Path):
    board = TensorBoard(tmp_path / "board")
    board.step("sft", 1, {"loss": 2.5, "mfu": None})
    board.step("sft", 2, {"loss": 1.25, "mfu": 0.5})
    board.step("rl", 1, {"reward": 0.25})
    board.close()
    assert curves(tmp_path / "board") == {
        "sft/loss": [(1, 2.5), (2, 1.25)],
        "sft/mfu": [(2, 0.5)],
        "rl/reward": [(1, 0.25)],
    }


def test_steps_that_are_done_again_are_drawn_once(tmp_path: Path):
    for first_step, last, loss in ((0, 5, 1.0), (3, 6, 2.0)):
        board = TensorBoard(tmp_path, first_step)
        for step in range(first_step or 1, last + 1):
            board.step("train", step, {"loss": loss})
        board.close()
    assert curves(tmp_path)["train/loss"] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0), (6, 2.0)]


def test_without_tensorboard_the_error_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "tensorboard" else find(name))
    with pytest.raises(IsthmusError, match=r"pip install 'isthmus\[tensorboard\]'"):
        TensorBoard(tmp_path / "board")
    assert not (tmp_path / "board").exists()


def trained(path: Path, steps: int, wait: int = 1, warmup: int = 1, active: int = 2) -> Path | None:
    layer = torch.nn.Linear(4, 4)
    with profiler(path, wait, warmup, active) as tracing:
        for step in range(steps):
            with torch.profiler.record_function(f"training step {step}"):
                layer(torch.ones(2, 4)).sum().backward()
            tracing.step()
        return tracing.written


def names_in(path: Path) -> list[str]:
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [event.get("name", "") for event in json.loads(content)["traceEvents"]]


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_a_trace_holds_the_operators_of_the_active_steps(tmp_path: Path, name: str):
    path = tmp_path / "new" / name
    assert trained(path, steps=8) == path
    names = names_in(path)
    assert {"aten::linear", "aten::addmm"} <= set(names)
    traced = [one for one in names if one.startswith("training step")]
    assert sorted(set(traced)) == ["training step 2", "training step 3"]
    assert [file.name for file in path.parent.iterdir()] == [name], "no temporary file is left"


def test_training_that_ends_early_leaves_the_trace_of_what_was_done(tmp_path: Path):
    trained(tmp_path / "trace.json", steps=3)
    assert "training step 2" in names_in(tmp_path / "trace.json")


def test_training_that_ends_before_the_traced_steps_has_no_trace(tmp_path: Path):
    assert trained(tmp_path / "trace.json", steps=1) is None
    assert list(tmp_path.iterdir()) == []


def test_a_trace_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "trace.json"
    path.write_text("old", encoding="utf-8")

    def torn(self, name: str) -> None:
        Path(name).write_text('{"traceEvents": [', encoding="utf-8")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", torn)
    with pytest.raises(IsthmusError, match="no space left on the disk"):
        trained(path, steps=8)
    assert path.read_text(encoding="utf-8") == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["trace.json"]


def test_an_accelerator_is_traced_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    known = {torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.XPU}
    monkeypatch.setattr(observe, "supported_activities", lambda: known)
    asked = []

    def profile(activities, **_):
        asked.append(activities)
        return contextlib.nullcontext()

    monkeypatch.setattr(observe, "profile", profile)
    for available, traced in ((True, known), (False, {torch.profiler.ProfilerActivity.CPU})):
        monkeypatch.setattr(torch, "accelerator", SimpleNamespace(is_available=lambda here=available: here))
        with profiler(tmp_path / "trace.json", wait=0, warmup=1, active=1):
            assert asked.pop() == traced
