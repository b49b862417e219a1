"""NVIDIA GPUs, through torch.cuda of a CUDA build."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from isthmus.chips._detect import absent, devices_of
from isthmus.chips._facts import Chip, Presence, Vendor, chips_from_table

# Device names as the driver gives them. PCIe and NVL forms have other figures and are left unmatched.
_NAMES = (
    (r"GB200", "gb200"),
    (r"\bB200\b", "b200-sxm"),
    (r"\bH200$", "h200-sxm"),
    (r"\bH100 80GB HBM3$", "h100-sxm"),
    (r"\bH800$", "h800-sxm"),
    (r"\bH20$", "h20"),
    (r"\bA100-SXM4-80GB$", "a100-80gb-sxm"),
    (r"\bA800-SXM4-80GB$", "a800-80gb-sxm"),
    (r"\bL40S$", "l40s"),
    (r"\bL20$", "l20"),
    (r"RTX 4090$", "rtx-4090"),
)

_DRIVER = Path("/proc/driver/nvidia/version")

# Where grouped_mm runs without a loop on the host (github.com/pytorch/pytorch/pull/161717). Not on compute capability
# 10: there the weight gradient of an expert without rows is wrong (github.com/pytorch/pytorch/issues/172439).
_GROUPED_MATMUL = {"h20", "h100-sxm", "h200-sxm", "h800-sxm"}


def chips() -> list[Chip]:
    listed = chips_from_table(
        "NVIDIA",
        source="backends of torch.distributed; platforms of vLLM and SGLang",
        collectives=("nccl", "gloo"),
        engines=("vllm", "sglang"),
    )
    return [_with_grouped_matmul(chip) if chip.slug in _GROUPED_MATMUL else chip for chip in listed]


def _with_grouped_matmul(chip: Chip) -> Chip:
    return dataclasses.replace(chip, capabilities=dataclasses.replace(chip.capabilities, grouped_matmul=True))


def detect() -> Presence:
    import torch

    if torch.version.cuda is None:
        return absent("NVIDIA", "/dev/nvidia0", f"torch {torch.__version__} is not a CUDA build")
    if not torch.cuda.is_available():
        return absent("NVIDIA", "/dev/nvidia0", "torch.cuda.is_available() is false: check the driver")
    return devices_of(torch.cuda, "NVIDIA", "cuda", _NAMES, mine=r"^(NVIDIA|Tesla|GeForce|Quadro)")


def versions() -> dict[str, str]:
    """Of CUDA, cuDNN and NCCL as this torch has them, and of the driver where it says so."""
    import torch
    from torch.cuda import nccl

    if torch.version.cuda is None:
        return {}
    found = {"CUDA of torch": torch.version.cuda, "cuDNN": str(torch.backends.cudnn.version())}
    if torch.cuda.is_available():
        found["NCCL"] = ".".join(map(str, nccl.version()))
    driver = _DRIVER.read_text(encoding="utf-8").splitlines() if _DRIVER.is_file() else []
    return found | ({"driver": driver[0].strip()} if driver else {})


VENDOR = Vendor(
    "NVIDIA",
    device="cuda",
    chips=chips,
    detect=detect,
    rehearsal="nvidia",
    ray_resource="GPU",
    variables=("CUDA_", "CUBLAS_", "CUDNN_", "NCCL_", "NVIDIA_TF32_", "TORCH_NCCL_", "PYTORCH_CUDA_"),
    versions=versions,
)
