"""The paper for an authority as a browser shows and prints it, in both languages."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import pytest

from isthmus.report_page.justify.gather import gather
from isthmus.report_page.justify.words import LANGUAGES
from isthmus.report_page.justify.write import write
from tests.support.justified import justified_run

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


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_paper_is_printed_on_two_pages_at_most(driver, papers: dict[str, Path], language: str):
    driver.get(papers[language].as_uri())
    printed = base64.b64decode(driver.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True})["data"])
    assert 1 <= len(re.findall(rb"/Type /Page\b", printed)) <= 2


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_paper_does_not_scroll_sideways_on_a_phone(driver, papers: dict[str, Path], language: str):
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    )
    try:
        driver.get(papers[language].as_uri())
        assert driver.execute_script("return document.documentElement.scrollWidth") <= 390
        assert driver.execute_script("return document.documentElement.scrollHeight") > 844
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
