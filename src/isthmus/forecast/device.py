"""What arithmetic needs of a device: its rates, its memory, its links."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, replace

from isthmus.chips import Chip, get_chip, published_rows


@dataclass(frozen=True)
class Device:
    """Rates of one device. TFLOP/s (dense peaks), GB, GB/s in one direction, W; None where nobody published it.

    `domain` is how many devices the fast link joins. `family` groups generations that share their software.
    `all_in_kw` is the power of a data centre per device.
    """

    name: str
    family: str
    bf16_tflops: float | None
    fp8_tflops: float | None = None
    fp4_tflops: float | None = None
    int8_tops: float | None = None
    mem_gb: float | None = None
    mem_bw_gbs: float | None = None
    link_gbs: float | None = None
    domain: int = 1
    nic_gbs: float | None = None
    power_w: float | None = None
    all_in_kw: float | None = None

    @property
    def narrow_peak(self) -> float | None:
        """Dense peak of 8-bit products in TFLOP/s or TOP/s, the faster format; of bf16 where it has no 8-bit one."""
        narrow = [one for one in (self.fp8_tflops, self.int8_tops) if one is not None]
        return max(narrow, default=self.bf16_tflops)

    def peak(self, precision: str) -> float | None:
        """Dense peak in TFLOP/s for "BF16", "FP8" or "FP4"."""
        return {"BF16": self.bf16_tflops, "FP8": self.fp8_tflops, "FP4": self.fp4_tflops}[precision]

    @property
    def is_complete(self) -> bool:
        """Whether everything that a training forecast reads is known."""
        return None not in (self.bf16_tflops, self.mem_bw_gbs, self.link_gbs, self.nic_gbs, self.power_w)


def published_device(name: str) -> Device | None:
    """The device that a published result names; None if it is not in the table."""
    plain = re.sub(r" \(.*| die\b.*|-\d+T\b.*", "", name).strip()
    return next((device for key, _, device in _table() if plain == key), None)


@functools.cache
def pool_device(slug: str) -> Device:
    """The device of a chip of a pool. Raises IsthmusError for a chip that is not known."""
    chip = get_chip(slug)
    listed = next((device for _, of, device in _table() if of == slug), None)
    if listed is not None:
        return listed
    return _from_facts(chip)


def _from_facts(chip: Chip) -> Device:
    relative = next((device for _, of, device in _table() if of and get_chip(of).vendor == chip.vendor), None)
    domain = _value(chip, "scaleup_domain")
    return Device(
        name=chip.name,
        family=relative.family if relative is not None else chip.vendor.lower(),
        bf16_tflops=_value(chip, "bf16_tflops"),
        fp8_tflops=_value(chip, "fp8_tflops"),
        fp4_tflops=_value(chip, "fp4_tflops"),
        int8_tops=_value(chip, "int8_tops"),
        mem_gb=_value(chip, "mem_gb"),
        mem_bw_gbs=_value(chip, "mem_bw_gbs"),
        link_gbs=_value(chip, "scaleup_gbs_uni"),
        domain=int(domain) if domain else 1,
        nic_gbs=_value(chip, "nic_gbs_uni"),
        power_w=_value(chip, "tdp_w"),
    )


def with_measured(device: Device, tflops: float | None, link_gbs: float | None) -> Device:
    """The device with rates that a qualification measured in place of unknown ones."""
    changes: dict[str, float] = {}
    if device.bf16_tflops is None and tflops is not None:
        changes["bf16_tflops"] = tflops
    if device.link_gbs is None and link_gbs is not None:
        changes["link_gbs"] = link_gbs
    return replace(device, **changes)


def _value(chip: Chip, name: str) -> float | None:
    figure = chip.figures()[name]
    return None if figure is None or figure.value is None else float(figure.value)


@functools.cache
def _table() -> tuple[tuple[str, str, Device], ...]:
    return tuple(
        (
            row["name"],
            row["slug"],
            Device(
                name=row["slug"] or row["name"],
                family=row["family"],
                bf16_tflops=_number(row["bf16_tflops"]),
                fp8_tflops=_number(row["fp8_tflops"]),
                fp4_tflops=_number(row["fp4_tflops"]),
                int8_tops=_number(row["int8_tops"]),
                mem_gb=_number(row["mem_gb"]),
                mem_bw_gbs=_number(row["mem_bw_gbs"]),
                link_gbs=_number(row["scaleup_gbs_uni"]),
                domain=int(row["scaleup_domain"]),
                nic_gbs=_number(row["nic_gbs_uni"]),
                power_w=_number(row["tdp_w"]),
                all_in_kw=_number(row["all_in_kw"]),
            ),
        )
        for row in published_rows("devices")
    )


def _number(text: str) -> float | None:
    return float(text) if text else None
