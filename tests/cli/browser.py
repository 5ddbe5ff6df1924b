"""Debian's Chromium, or another one of the system, as Playwright drives it: nothing is fetched for it."""

import os
import re
import shutil
from contextlib import contextmanager
from importlib.util import find_spec

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Of a page that is opened from a file, so that whatever else is asked for was asked by the page.
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
BROWSER, DRIVER = "a browser (apt-get install chromium)", "playwright (the extra `dev`)"


@contextmanager
def launched():
    """A browser. Without one the tests are skipped, unless REQUIRE_BROWSER is set: then they fail."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    missing = [name for name, is_there in ((BROWSER, found), (DRIVER, find_spec("playwright"))) if not is_there]
    if missing:
        (pytest.fail if os.environ.get("REQUIRE_BROWSER") else pytest.skip)(f"needs {' and '.join(missing)}")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=list(FLAGS))
        try:
            yield browser
        finally:
            browser.close()


class Opened:
    """A page with what went wrong in it, and what it asked for."""

    def __init__(self, browser, file, **context):
        self.context = browser.new_context(**context)
        self.page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        self.errors, self.requests = [], []
        self.page.on("console", lambda message: self.errors.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri())
        self.address = file.as_uri()

    def close(self):
        """Close it; nothing has gone wrong, and nobody was asked for anything but the file."""
        self.context.close()
        assert self.errors == []
        assert self.requests == [self.address]


@contextmanager
def opened(browser, file, **context):
    """The page of a file, once its table is there; see `Opened`."""
    page = Opened(browser, file, **context)
    page.page.locator("#found").filter(has_text=re.compile(".")).wait_for()
    yield page.page
    page.close()
