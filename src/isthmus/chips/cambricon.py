"""Cambricon MLUs, through torch_mlu. Only their names are known here: no sourced figure was found."""

from __future__ import annotations

from isthmus.chips._detect import devices_of_extension
from isthmus.chips._facts import Chip, Presence, Vendor, chips_from_table

_NAMES = ((r"MLU590", "mlu590"),)


def chips() -> list[Chip]:
    return chips_from_table("Cambricon", source="nothing else was found")


def detect() -> Presence:
    return devices_of_extension("torch_mlu", "mlu", "Cambricon", "/dev/cambricon_dev0", _NAMES)


VENDOR = Vendor("Cambricon", device="mlu", chips=chips, detect=detect, package="torch_mlu")
