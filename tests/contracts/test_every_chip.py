"""What every vendor's file, every chip and every folder of tables must hold; the parameters are what is found."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

from isthmus import chips
from isthmus.chips import FIGURES, Presence, Vendor, load_chips, vendor_of, vendors
from isthmus.chips.rehearse import can_rehearse, profile_of
from isthmus.chips.rehearse.tables import NUMERIC_KINDS, STATUSES, families

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
    for rule in (*profile.dtypes.values(), *profile.collectives, *profile.numerics):
        assert rule.behaviour and has_source(rule)
    for operators in profile.formats.values():
        assert all(name in profile.operators for name in operators)


def has_source(row: object) -> bool:
    return len(getattr(row, "source", "")) > 5 and set(getattr(row, "standing", "").split(", ")) <= STANDINGS


@pytest.mark.parametrize("slug", REHEARSABLE)
def test_every_link_and_rate_of_a_rehearsed_chip_is_a_sourced_number(slug: str):
    profile = profile_of(slug)
    for link in profile.links:
        assert has_source(link) and link.op and link.fabric
        assert link.bandwidth_gbs is not None or link.latency_us is not None
        assert all(number is None or number > 0 for number in (link.bandwidth_gbs, link.latency_us, link.ranks))
    for rate in profile.rates:
        assert has_source(rate) and rate.conditions and 0 < rate.per_chip_hour < 1
    assert len({rate.cause for rate in profile.rates}) == len(profile.rates)
    declared = chips.get_chip(slug).scaleup_gbs_uni
    link = profile.link("within node")
    assert (link and link.bandwidth_gbs) == (declared and declared.value)


@pytest.mark.parametrize("slug", REHEARSABLE)
def test_what_a_rehearsed_chip_computes_otherwise_names_operators_that_are_there(slug: str):
    profile = profile_of(slug)
    bases = {name.partition(".")[0] for name in profile.operators}
    for row in profile.numerics:
        assert row.kind in NUMERIC_KINDS and set(row.operators) <= bases, row
    for rule in profile.dtypes.values():
        assert (rule.stands_in is not None) == (rule.action == "substitute")


@pytest.mark.parametrize("family", sorted(families()))
def test_every_row_of_a_family_concerns_a_chip_or_a_generation_that_is_there(family: str):
    members = [slug for slug in load_chips() if vendor_of(slug).rehearsal == family]
    extended = {base["family"] for name in families() for base in rows(name, "extends")}
    generations = {chips.get_chip(slug).generation for slug in members}
    assert members or family in extended
    for table in ("links", "rates"):
        for row in rows(family, table):
            assert set(row["chips"].split("|")) <= set(members), row
    for table in ("dtypes", "collectives", "numerics"):
        for row in rows(family, table):
            assert set(filter(None, row["generations"].split("|"))) <= generations, row


def rows(family: str, table: str) -> list[dict[str, str]]:
    path = resources.files("isthmus.chips.rehearse") / family / f"{table}.csv"
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines())) if path.is_file() else []


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
