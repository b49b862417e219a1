"""The dossier, and the paper for an authority in both languages, as a browser shows and prints them."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import pytest

from isthmus.report_page.justify.gather import gather
from isthmus.report_page.justify.words import LANGUAGES
from isthmus.report_page.justify.write import write
from isthmus.stages import report
from tests.support.justified import justified_run
from tests.unit.test_report import Story

PHONE = 390
"""Pixels that a phone is wide."""
CAPPED = 'pools.home={chip="h200-sxm", count=76000, ranks=1}'
"""The chip that most records are about."""


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("papers")
    record = gather(justified_run(folder / "run", CAPPED), "CN")
    found = {language: folder / f"{language}.html" for language in LANGUAGES}
    for language, path in found.items():
        path.write_text(write(record, language), encoding="utf-8")
    return found


def printed_pages(driver, path: Path) -> int:
    driver.get(path.as_uri())
    printed = base64.b64decode(driver.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True})["data"])
    return len(re.findall(rb"/Type /Page\b", printed))


def width_on_a_phone(driver, path: Path) -> int:
    """Pixels that the page takes, with everything unfolded."""
    size = {"width": PHONE, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        driver.get(path.as_uri())
        driver.execute_script("document.querySelectorAll('details').forEach(one => { one.open = true })")
        return driver.execute_script("return document.documentElement.scrollWidth")
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_paper_is_printed_on_two_pages_at_most(driver, papers: dict[str, Path], language: str):
    assert 1 <= printed_pages(driver, papers[language]) <= 2


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_paper_does_not_scroll_sideways_on_a_phone(driver, papers: dict[str, Path], language: str):
    assert width_on_a_phone(driver, papers[language]) <= PHONE


@pytest.fixture(scope="module")
def dossier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run that has every record."""
    story = Story(tmp_path_factory.mktemp("dossier") / "run").whole()
    path = story.run.path / "report.html"
    path.write_text(report.compose(report.read_dossier(story.run)), encoding="utf-8")
    return path


def test_the_dossier_is_printed_on_eight_pages_at_most(driver, dossier: Path):
    assert 1 <= printed_pages(driver, dossier) <= 8


def test_the_dossier_does_not_scroll_sideways_on_a_phone(driver, dossier: Path):
    assert width_on_a_phone(driver, dossier) <= PHONE
