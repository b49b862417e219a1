"""NVIDIA GPUs, through torch.cuda of a CUDA build."""

from __future__ import annotations

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


def chips() -> list[Chip]:
    return chips_from_table(
        "NVIDIA",
        source="backends of torch.distributed; platforms of vLLM and SGLang",
        collectives=("nccl", "gloo"),
        engines=("vllm", "sglang"),
    )


def detect() -> Presence:
    import torch

    if torch.version.cuda is None:
        return absent("NVIDIA", "/dev/nvidia0", f"torch {torch.__version__} is not a CUDA build")
    if not torch.cuda.is_available():
        return absent("NVIDIA", "/dev/nvidia0", "torch.cuda.is_available() is false: check the driver")
    return devices_of(torch.cuda, "NVIDIA", "cuda", _NAMES, mine=r"^(NVIDIA|Tesla|GeForce|Quadro)")


VENDOR = Vendor("NVIDIA", device="cuda", chips=chips, detect=detect)
