"""What every vendor's file, every chip and every folder of tables must hold; the parameters are what is found."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from isthmus import chips
from isthmus.chips import FIGURES, Presence, Vendor
from isthmus.chips._registry import load_chips, vendors
from isthmus.chips.rehearse import can_rehearse, profile_of
from isthmus.chips.rehearse.tables import STATUSES, families

STANDINGS = {"documented", "read in code", "assumed"}
REHEARSABLE = [slug for slug in load_chips() if can_rehearse(slug)]


@pytest.mark.parametrize("name", vendors())
def test_a_vendor_has_chips_and_can_look_for_them(name: str):
    vendor = vendors()[name]
    assert isinstance(vendor, Vendor) and vendor.chips()
    assert vendor.rehearsal is None or vendor.rehearsal in families()
    look = vendor.detect()
    assert isinstance(look, Presence)
    for found in look.found:
        assert found.chip is None or found.chip in {chip.slug for chip in vendor.chips()}
        assert found.device.partition(":")[0] == vendor.device


@pytest.mark.parametrize("name", vendors())
def test_a_vendors_file_loads_without_torch(name: str):
    code = f"import sys, isthmus.chips.{name} as file; file.VENDOR.chips(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_slugs_are_unique():
    slugs = [chip.slug for vendor in vendors().values() for chip in vendor.chips()]
    assert len(slugs) == len(set(slugs)) == len(load_chips())


@pytest.mark.parametrize("slug", load_chips())
def test_every_number_of_a_chip_is_declared_with_a_source(slug: str):
    chip = chips.get_chip(slug)
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", slug) and chip.name and chip.capabilities.source
    for name, figure in chip.figures().items():
        if figure is not None:
            assert figure.kind == "declared" and figure.unit == FIGURES[name][1] and len(figure.source) > 5
            assert figure.value is not None or figure.low is not None
            assert figure.value is None or figure.value > 0
    assert chips.device_for(slug)


@pytest.mark.parametrize("slug", REHEARSABLE)
def test_every_rule_of_a_rehearsed_chip_has_a_source_and_a_standing(slug: str):
    profile = profile_of(slug)
    assert profile.chip == slug and len(profile.operators) > 100
    for row in profile.operators.values():
        assert row.status in STATUSES and row.version and row.source and set(row.standing.split(", ")) <= STANDINGS
    for rule in (*profile.dtypes.values(), *profile.collectives):
        assert rule.behaviour and rule.source and rule.standing in STANDINGS
    for operators in profile.formats.values():
        assert all(name in profile.operators for name in operators)


NEW_CHIP = """
from isthmus.chips import Capabilities, Chip, Found, Presence, Vendor
from isthmus.run import Figure

ABLE = Capabilities("a data sheet", formats=("fp32",))
HERE = Found("Newcomer", "newchip-1", "x", "cpu")
PEAK = Figure(value=123.0, unit="TFLOPS", kind="declared", source="a data sheet")


def chips():
    return [Chip("newchip-1", "New Chip 1", "Newcomer", ABLE, bf16_tflops=PEAK)]


VENDOR = Vendor("Newcomer", device="cpu", chips=chips, detect=lambda: Presence((HERE,)))
"""


def test_a_new_chip_is_one_new_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "newcomer.py").write_text(NEW_CHIP)
    monkeypatch.setattr(chips, "__path__", [*chips.__path__, str(tmp_path)])
    vendors.cache_clear()
    load_chips.cache_clear()
    try:
        assert chips.get_chip("newchip-1").bf16_tflops.value == 123.0
        assert "newchip-1" in {found.chip for found in chips.present().found}
    finally:
        vendors.cache_clear()
        load_chips.cache_clear()
        sys.modules.pop("isthmus.chips.newcomer", None)
