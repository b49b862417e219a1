"""AMD GPUs, through torch.cuda of a ROCm build, which keeps that name."""

from __future__ import annotations

from isthmus.chips._detect import absent, devices_of
from isthmus.chips._facts import Chip, Presence, Vendor, chips_from_table

_NAMES = ((r"MI300X", "mi300x"), (r"MI308X", "mi308x"), (r"MI325X", "mi325x"), (r"MI355X", "mi355x"))


def chips() -> list[Chip]:
    return chips_from_table(
        "AMD",
        source="torch.distributed, where RCCL answers to nccl; platforms of vLLM and SGLang",
        collectives=("nccl", "gloo"),
        engines=("vllm", "sglang"),
    )


def detect() -> Presence:
    import torch

    if torch.version.hip is None:
        return absent("AMD", "/dev/kfd", f"torch {torch.__version__} is not a ROCm build")
    if not torch.cuda.is_available():
        return absent("AMD", "/dev/kfd", "torch.cuda.is_available() is false: check the driver")
    return devices_of(torch.cuda, "AMD", "cuda", _NAMES)


def versions() -> dict[str, str]:
    """Of HIP as this torch has it, and of RCCL, which answers to nccl."""
    import torch
    from torch.cuda import nccl

    if torch.version.hip is None:
        return {}
    found = {"HIP of torch": torch.version.hip}
    return found | ({"RCCL": ".".join(map(str, nccl.version()))} if torch.cuda.is_available() else {})


VENDOR = Vendor(
    "AMD",
    device="cuda",
    chips=chips,
    detect=detect,
    rehearsal="amd",
    ray_resource="GPU",
    variables=("HIP_", "ROCR_", "HSA_", "MIOPEN_", "NCCL_", "RCCL_", "TORCH_NCCL_", "PYTORCH_HIP_"),
    versions=versions,
)
