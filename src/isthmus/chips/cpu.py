"""The CPU: always present, and the slow reference that every other chip is compared with."""

from __future__ import annotations

import platform
from pathlib import Path

from isthmus.chips._facts import Capabilities, Chip, Found, Presence, Vendor

_EMULATED = (
    *("w8a8", "w8a8_static", "modelslim", "modelslim_dynamic", "modelslim_fp16", "modelslim_mixed"),
    *("fp8", "mxfp8"),
)
_CPUINFO = Path("/proc/cpuinfo")


def chips() -> list[Chip]:
    capabilities = Capabilities(
        source="torch on a CPU; the exact emulations in isthmus/formats",
        dtypes=("fp64", "fp32", "bf16", "int8"),
        formats=("fp32", "bf16", *_EMULATED),
        collectives=("gloo",),
        engines=("local",),
    )
    note = "no rate is declared: processors differ too much, so qualify measures the one that is here"
    return [Chip(slug="cpu", name="this machine's CPU", vendor="any", capabilities=capabilities, note=note)]


def detect() -> Presence:
    return Presence((Found("any", "cpu", processor_name(), "cpu"),))


def processor_name() -> str:
    """The processor's own name where the system tells it, else its architecture."""
    lines = _CPUINFO.read_text(encoding="utf-8").splitlines() if _CPUINFO.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


VENDOR = Vendor("any", device="cpu", chips=chips, detect=detect, ray_resource="CPU")
