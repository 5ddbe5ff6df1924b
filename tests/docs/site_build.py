"""The built site, and what its HTML says."""

import os
import subprocess
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pages import ROOT

# Attributes by which a browser fetches something; links that a reader follows are none.
_FETCHED = {("script", "src"), ("link", "href"), ("img", "src"), ("iframe", "src"), ("source", "src"), ("use", "href")}


def build(folder: Path) -> str:
    """Build the site; what the build said. With --quiet it would not see its own warnings, and --strict do nothing."""
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert built.returncode == 0, built.stdout
    return built.stdout


@dataclass
class Html(HTMLParser):
    """Ids, links, fetched resources and the text of the article of a page."""

    path: Path
    ids: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    text: str = ""

    def __post_init__(self) -> None:
        super().__init__()
        self._depth = self._silent = 0
        self.feed(self.path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.ids |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        self.fetched += [values[name] for of, name in _FETCHED if of == tag and name in values]
        self._depth += tag == "article"
        self._silent += tag == "pre"
        if self._depth:
            self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        self._depth -= tag == "article"
        self._silent -= tag == "pre"

    def handle_data(self, data: str) -> None:
        if self._depth and not self._silent:
            self.text += data


def dead_links(pages: dict[Path, Html]) -> list[str]:
    """Links and resources of pages that lead to no file, or to no place in it."""
    dead = []
    for path, page in pages.items():
        for link in (*page.links, *page.fetched):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            anchor = unquote(parts.fragment)
            if not target.is_file() or (anchor and target in pages and anchor not in pages[target].ids):
                dead.append(f"{path.name}: {link}")
    return dead
