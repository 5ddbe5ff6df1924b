"""A real browser for the built pages: Debian's Chromium, driven by Playwright."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = [
    f"--{name}"
    for name in (
        *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run"),
        *("disable-background-networking", "disable-component-update", "disable-sync"),
    )
]


def skip(reason: str) -> None:
    """Skip the test, unless REQUIRE_BROWSER is set: then it fails."""
    (pytest.fail if os.environ.get("REQUIRE_BROWSER") else pytest.skip)(reason)


@contextmanager
def browser() -> Iterator[Any]:
    """Chromium, or a skipped test where there is none."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        skip("playwright is not installed")
    chromium = next(filter(None, map(shutil.which, NAMES)), None)
    if chromium is None:
        skip("there is no browser: apt-get install chromium")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield started
        started.close()


# Words of inline code and headings that stand on more than one line. A path or an address may break after a character
# that is no part of a name.
BROKEN_NAMES = r"""() => {
  const broken = [];
  const names = "article :not(pre) > code, article h1, article h2, article h3, article h4";
  for (const element of document.querySelectorAll(names)) {
    const walker = document.createTreeWalker(element, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
      for (const found of walker.currentNode.data.matchAll(/[\w]+/g)) {
        const range = document.createRange();
        range.setStart(walker.currentNode, found.index);
        range.setEnd(walker.currentNode, found.index + found[0].length);
        const lines = new Set([...range.getClientRects()].map(box => Math.round(box.top)));
        if (lines.size > 1) broken.push(element.textContent + ": " + found[0]);
      }
    }
  }
  return broken;
}"""

# What reaches beyond the right edge of the page, and is in nothing that scrolls.
TOO_WIDE = r"""() => {
  const wide = [];
  for (const element of document.querySelectorAll("article *")) {
    const box = element.getBoundingClientRect();
    if (box.width === 0 || box.right <= document.documentElement.clientWidth + 0.5) continue;
    let parent = element;
    while (parent && !/auto|scroll|hidden/.test(getComputedStyle(parent).overflowX)) parent = parent.parentElement;
    if (!parent || parent === document.body || parent === document.documentElement)
      wide.push(element.tagName + " " + element.textContent.trim().slice(0, 60));
  }
  return wide;
}"""

# Tables of text that a reader would have to scroll sideways.
WIDE_TABLES = r"""() => [...document.querySelectorAll("article table[data-stacked]")]
  .filter(table => table.scrollWidth > table.closest(".md-typeset__scrollwrap").clientWidth + 1)
  .map(table => table.textContent.trim().slice(0, 60))"""
