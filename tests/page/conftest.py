"""One server and one browser for all tests of the page."""

from __future__ import annotations

import pytest

from isthmus.engines.local.api.server import Server
from isthmus.engines.local.api.service import load_service
from tests.support.engine_bundle import write_small_bundle
from tests.support.page_browser import Page, start_browser
from tests.support.page_server import Scripted, live

EXAMPLES = ["Use 1, 2 and 3 to reach 6.", "Use 3, 4 and 5 to reach 23."]


@pytest.fixture(scope="session")
def application(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page") / "small"
    write_small_bundle(folder)
    service = load_service(folder, seal="0f1e2d3c4b5a", pool="away", slots=4)
    service.examples = EXAMPLES
    return Scripted(Server(service, page=True).app())


@pytest.fixture(scope="session")
def url(application):
    with live(application) as url:
        yield url


@pytest.fixture(scope="session")
def driver(tmp_path_factory):
    driver = start_browser(tmp_path_factory.mktemp("profile"))
    yield driver
    driver.quit()


@pytest.fixture
def server(application):
    """The application, with no scripts and nothing asked."""
    application.reset()
    return application


@pytest.fixture
def page(driver, url, server):
    """The page with empty storage, loaded on a desktop. At the end no script may have failed or been stopped."""
    page = Page(driver, url)
    page.clear()
    page.open()
    yield page
    assert page.complaints() == []
    assert not server.scripts, "a script was not asked for"


@pytest.fixture(scope="module")
def in_page(driver, url):
    """The value of an async function's body that has the page's modules at hand."""
    page = Page(driver, url)
    page.open()
    return page.later


@pytest.fixture
def rendered(in_page):
    """A function from markdown texts to the page's HTML for them."""
    code = """
        const { render } = await import("/markdown.js");
        return given[0].map((text) => {
          const root = document.createElement("div");
          root.append(render(text));
          return root.innerHTML;
        });
        """
    return lambda texts: in_page(code, texts)
