"""What one sees of training beside the loss: memory, share of the peak, load of the experts, curves, a trace."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule, supported_activities

from isthmus.chips import Chip
from isthmus.errors import IsthmusError
from isthmus.run import Figure, explain_io_errors, fsync_folder

_STATUS = Path("/proc/self/status")
TERA = 1e12
PEAKS = {"bf16": "bf16_tflops", "fp8": "fp8_tflops"}
"""The declared fact that is the peak of each precision of matrix products. No fact says it of fp32."""


def peak_memory(device: torch.device) -> int | None:
    """Largest memory so far, in bytes, or None where nothing tells it.

    On an accelerator: what tensors occupied at most on the device (its module's `max_memory_allocated`). On a CPU:
    the maximum resident set of this process, code and libraries included (VmHWM of Linux), which never falls.
    """
    if device.type == "cpu":
        return _largest_resident_set()
    measure = getattr(torch.get_device_module(device), "max_memory_allocated", None)
    return None if measure is None else measure(device) or None


def _largest_resident_set() -> int | None:
    """getrusage would not do: what it says begins with the size of the process that started this one."""
    if not _STATUS.is_file():
        return None
    lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)


def mfu(tokens_per_s: Figure, flops_per_token: float, chip: Chip, precision: str, ranks: int) -> Figure | None:
    """Model FLOPs utilisation: operations of the model per second over the declared peak of `ranks` chips.

    `flops_per_token` are the operations of training that the model needs for a token (`forecast.count.training_flops`),
    recomputation not counted: PaLM, arXiv 2204.02311, appendix B. None where the peak of that precision has no source,
    the speed is unknown, or the pool is rehearsed: the speed of a rehearsal says nothing about the chip.
    """
    peak = getattr(chip, PEAKS[precision]) if precision in PEAKS else None
    if peak is None or peak.value is None or tokens_per_s.value is None or tokens_per_s.kind == "rehearsed":
        return None
    share = tokens_per_s.value * flops_per_token / (peak.value * TERA * ranks)
    source = (
        f"{tokens_per_s.source}: {tokens_per_s.value:,.6g} tokens/s x {flops_per_token:.4g} FLOP per token, over "
        f"{ranks} x {peak.value:g} {peak.unit} {precision} ({peak.source})"
    )
    return Figure.derived(share, "share", source, tokens_per_s, peak)


def expert_imbalance(loads: Sequence[torch.Tensor | Sequence[float]]) -> float | None:
    """The largest load of an expert over the mean load of its layer, in the worst layer; None without any load.

    `loads`: one [E] of token counts or shares per MoE layer. 1 is even; E is all tokens at one expert.
    """
    layers = [torch.as_tensor(load, dtype=torch.float64) for load in loads]
    return max((float(load.max() / load.mean()) for load in layers if load.sum() > 0), default=None)


class TensorBoard:
    """Writes scalars for TensorBoard into a folder. Raises IsthmusError if TensorBoard is not installed.

    What an earlier, interrupted try wrote into the same folder for `first_step` and after it is hidden, the curves of
    all stages alike: stages that count their own steps and are taken up again need a folder each.
    """

    def __init__(self, folder: Path, first_step: int = 0):
        if importlib.util.find_spec("tensorboard") is None:
            raise IsthmusError(
                "train.tensorboard = true needs TensorBoard, which is not installed. "
                "Install it with: pip install 'isthmus[tensorboard]'"
            )
        from torch.utils.tensorboard import SummaryWriter

        with explain_io_errors(folder):
            self._writer = SummaryWriter(str(folder), purge_step=first_step or None)

    def step(self, stage: str, step: int, values: Mapping[str, float | None]) -> None:
        """Write the values of a step, each as the curve `stage`/name; one that is None, unknown, is left out."""
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(f"{stage}/{name}", value, step)

    def close(self) -> None:
        """Write out what is pending and close the file."""
        self._writer.close()


class Profiler:
    """Counts the training steps for a trace. `written` is its path once it is on the disk."""

    def __init__(self, path: Path, wait: int, warmup: int, active: int):
        self.path = path
        self.written: Path | None = None
        self._profile = profile(
            activities=_activities(),
            schedule=schedule(wait=wait, warmup=warmup, active=active, repeat=1),
            on_trace_ready=self._write,
        )

    def step(self) -> None:
        """To be called after each training step."""
        self._profile.step()

    def _write(self, finished: profile) -> None:
        temporary = self.path.with_name(f".{os.getpid()}.{self.path.name}")
        with explain_io_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                finished.export_chrome_trace(str(temporary))
                with temporary.open("rb") as file:
                    os.fsync(file.fileno())
                temporary.replace(self.path)
            finally:
                temporary.unlink(missing_ok=True)
            fsync_folder(self.path.parent)
        self.written = self.path


@contextlib.contextmanager
def profiler(path: Path, wait: int, warmup: int, active: int) -> Iterator[Profiler]:
    """Trace `active` training steps, after `wait` steps without tracing and `warmup` steps whose trace is thrown away.

    The trace is Chrome's JSON, compressed if `path` ends in .gz, for chrome://tracing or Perfetto: operators of the CPU
    and the kernels of the accelerator, if there is one. If training ends during the traced steps, the trace holds those
    that were done; if it ends before them, nothing is written and `written` stays None.
    """
    tracing = Profiler(path, wait, warmup, active)
    with tracing._profile:
        yield tracing


def _activities() -> set[ProfilerActivity]:
    return set(supported_activities()) if torch.accelerator.is_available() else {ProfilerActivity.CPU}
