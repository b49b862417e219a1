"""MetaX GPUs, which answer to torch.cuda and are told apart by their names. Only memory figures are known."""

from __future__ import annotations

from isthmus.chips._detect import devices_of
from isthmus.chips._facts import Chip, Presence, Vendor, chips_from_table

_NAMES = ((r"MetaX C550", "metax-c550"),)


def chips() -> list[Chip]:
    return chips_from_table("MetaX", source="nothing else was found")


def detect() -> Presence:
    import torch

    if not torch.cuda.is_available():
        return Presence()
    return devices_of(torch.cuda, "MetaX", "cuda", _NAMES, mine=r"^MetaX")


VENDOR = Vendor("MetaX", device="cuda", chips=chips, detect=detect, ray_resource="GPU")
