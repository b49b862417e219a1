"""Huawei Ascend NPUs, through torch_npu."""

from __future__ import annotations

import contextlib
import os
import platform
from importlib import metadata
from pathlib import Path

from isthmus.chips._detect import devices_of_extension
from isthmus.chips._facts import Chip, Presence, Vendor, chips_from_table

# The 910B letters are tied to speeds by inference only (see the notes in chips.csv); a 910C has two bins that its name
# does not tell apart, so it stays unmatched.
_NAMES = (
    (r"910B1\b", "ascend-910b1"),
    (r"910B2\b", "ascend-910b-376t"),
    (r"910B3\b", "ascend-910b-313t"),
    (r"910B4\b", "ascend-910b-280t"),
    (r"950PR", "ascend-950pr"),
    (r"950DT", "ascend-950dt"),
)


def chips() -> list[Chip]:
    return chips_from_table(
        "Huawei",
        source="torch_npu's distributed backend; platforms of vllm-ascend and SGLang",
        collectives=("hccl", "gloo"),
        engines=("vllm-ascend", "sglang"),
        own_formats={
            "int8": ("modelslim", "modelslim_dynamic", "modelslim_fp16", "modelslim_mixed"),
            "fp8": ("mxfp8",),
        },
    )


def detect() -> Presence:
    return devices_of_extension("torch_npu", "npu", "Huawei", "/dev/davinci0", _NAMES)


# An operator without a kernel then raises, where it would run on the host's CPU with one warning (torch_npu 2.13.0).
_ENVIRONMENT = {"TORCH_NPU_FALLBACK_CPU_DISABLE": "1"}


# It keeps weights in the published layout, so that others can take their place, and opens the routes for them
# (vllm-ascend 0.23).
_SERVING = {"vllm-ascend": """--additional-config '{"rl_config": {"enabled": true}}'"""}


def versions() -> dict[str, str]:
    """Of torch_npu, and of the CANN that `set_env.sh` has put into the environment, from its installation record."""
    found = {}
    with contextlib.suppress(metadata.PackageNotFoundError):
        found["torch_npu"] = metadata.version("torch-npu")
    home = os.environ.get("ASCEND_TOOLKIT_HOME") or os.environ.get("ASCEND_HOME_PATH")
    if home:
        record = Path(home, f"{platform.machine()}-linux", "ascend_toolkit_install.info")
        lines = record.read_text(encoding="utf-8").splitlines() if record.is_file() else []
        found["CANN"] = next((line.partition("=")[2] for line in lines if line.startswith("version=")), "unknown")
    return found


VENDOR = Vendor(
    "Huawei",
    device="npu",
    chips=chips,
    detect=detect,
    rehearsal="ascend",
    ray_resource="NPU",
    environment=_ENVIRONMENT,
    package="torch_npu",
    variables=(
        "ASCEND_",
        "HCCL_",
        "TORCH_NPU_",
        "PYTORCH_NPU_",
        "TASK_QUEUE_",
        "CPU_AFFINITY_",
        "ACL_",
        "CLOSE_MATMUL_",
    ),
    versions=versions,
    serving=_SERVING,
)
