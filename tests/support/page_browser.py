"""Headless Chromium, and how the tests of the page look at it."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from tests.support.page_server import DEADLINE_S

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--disable-sync",
    "--disable-quic",
)
MISSING = "the page is tested in Chromium, which is not installed: apt-get install chromium chromium-driver"
Result = TypeVar("Result")


def start_browser(profile: Path) -> webdriver.Chrome:
    """A browser with an empty profile. Skips the test if there is none, unless ISTHMUS_REQUIRE_BROWSER is 1."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        if os.environ.get("ISTHMUS_REQUIRE_BROWSER") == "1":
            pytest.fail(MISSING)
        pytest.skip(MISSING)
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=Service(driver))


def wait(condition: Callable[[], Result], what: str = "it") -> Result:
    """The first true result of `condition`."""
    end = time.monotonic() + DEADLINE_S
    while True:
        try:
            result = condition()
        except StaleElementReferenceException:
            result = None
        if result:
            return result
        assert time.monotonic() < end, f"{what} did not happen within {DEADLINE_S} s"
        time.sleep(0.03)


class Page:
    """The chat page in a browser."""

    def __init__(self, driver: webdriver.Chrome, url: str):
        self.driver, self.url = driver, url

    def open(self, width: int = 1200, height: int = 800, dark: bool = False, fragment: str = "") -> None:
        """Load the page at a size in CSS pixels, and wait until it knows what is served."""
        self.size(width, height)
        self.prefer(dark)
        self.driver.get(f"{self.url}/{fragment}")
        self.ready()

    def ready(self) -> None:
        wait(lambda: self.js("return document.querySelectorAll('#facts div').length > 0"), "the facts")

    def reload(self) -> None:
        self.driver.refresh()
        self.ready()

    def clear(self) -> None:
        """Forget what earlier tests stored, and what they logged."""
        self.driver.get(f"{self.url}/icon.svg")
        self.js("localStorage.clear(); sessionStorage.clear()")
        self.driver.get_log("browser")

    def size(self, width: int, height: int) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def prefer(self, dark: bool = False, reduced: bool = True) -> None:
        """What the system asks of pages. Without motion, what is clicked stands still."""
        features = [
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
            {"name": "prefers-reduced-motion", "value": "reduce" if reduced else "no-preference"},
        ]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def js(self, code: str, *arguments: Any) -> Any:
        return self.driver.execute_script(code, *arguments)

    def later(self, code: str, *arguments: Any) -> Any:
        """The value of an async function's body."""
        start = "const [...given] = arguments, done = given.pop();"
        body = f"{start} (async () => {{ {code} }})().then(done, (error) => done(String(error)))"
        return self.driver.execute_async_script(body, *arguments)

    def find(self, selector: str) -> WebElement:
        """The last visible element of a selector."""
        return wait(
            lambda: next((e for e in reversed(self.all(selector)) if e.is_displayed()), None), f"a visible {selector}"
        )

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def click(self, selector: str) -> None:
        self.find(selector).click()

    def press(self, *keys: str) -> None:
        """Press keys where the focus is."""
        ActionChains(self.driver).send_keys(*keys).perform()

    def chord(self, *keys: str) -> None:
        """Hold all keys but the last while the last is pressed."""
        actions = ActionChains(self.driver)
        for key in keys[:-1]:
            actions.key_down(key)
        actions.send_keys(keys[-1])
        for key in keys[:-1]:
            actions.key_up(key)
        actions.perform()

    def text(self, selector: str) -> str:
        """The text of the last element of a selector, hidden or not; empty if there is none."""
        return self.js("return [...document.querySelectorAll(arguments[0])].at(-1)?.textContent ?? ''", selector)

    def texts(self, selector: str) -> list[str]:
        return self.js("return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", selector)

    def shows(self, selector: str, text: str) -> None:
        wait(lambda: text in self.text(selector), f"{text!r} in {selector}")

    def visible(self, selector: str) -> bool:
        return any(element.is_displayed() for element in self.all(selector))

    def style(self, selector: str, name: str) -> str:
        code = "return getComputedStyle([...document.querySelectorAll(arguments[0])].at(-1))[arguments[1]]"
        return self.js(code, selector, name)

    def focused(self, selector: str) -> bool:
        return self.js("return document.activeElement?.matches(arguments[0]) ?? false", selector)

    def ask(self, text: str) -> None:
        """Write a message and send it with Enter."""
        box = self.find("#prompt")
        box.send_keys(text + "\n")

    def idle(self) -> None:
        """Wait until no answer of this conversation is on its way."""
        wait(lambda: self.js("return document.getElementById('stop').hidden"), "the end of the answer")

    def stored(self) -> list[dict[str, Any]]:
        """The stored conversations."""
        code = (
            "return Object.entries(localStorage).filter(([key]) => key.startsWith('isthmus.conversation.'))"
            ".map(([, value]) => { try { return JSON.parse(value) } catch { return null } }).filter(Boolean)"
        )
        return self.js(code)

    def complaints(self) -> list[str]:
        """What the browser logged about scripts: errors, and what the page's policy stopped."""
        words = ("Uncaught", "Content Security Policy", "Content-Security-Policy", "Trusted")
        return [
            entry["message"]
            for entry in self.driver.get_log("browser")
            if any(word in entry["message"] for word in words)
        ]
