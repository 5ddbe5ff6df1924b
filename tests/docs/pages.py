"""
The pages of the documentation, and the fenced blocks of code in them.

A block that cannot run on one CPU says so in a comment above it, which the built page does not show:

    <!-- not run: needs two machines -->

What can be checked of it without running it is checked all the same.
"""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# What is printed, cited or drawn, and not run.
SHOWN = {"text", "bibtex"}

_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>[\w-]*).*?\n(?P<code>.*?)^(?P=indent)```[ ]*$", re.DOTALL | re.MULTILINE
)
_MARK = re.compile(r"<!-- not run: (?P<reason>.+?) -->\s*\Z", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: where it stands, its language and code, and why it does not run, if it says so."""

    page: Path
    line: int
    language: str
    code: str
    not_run: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path, text: str | None = None) -> list[Block]:
    """All fenced blocks of a page, in order; indented ones without their indentation."""
    text = page.read_text() if text is None else text
    blocks = []
    for found in _FENCE.finditer(text):
        mark = _MARK.search(text[: found.start()])
        indent = len(found["indent"])
        code = "".join(line[indent:] if line.strip() else line for line in found["code"].splitlines(keepends=True))
        line = text.count("\n", 0, found.start()) + 1
        blocks.append(Block(page, line, found["language"], code, mark and mark["reason"]))
    return blocks


def blocks_in(language: str) -> list[Block]:
    """The blocks of all pages in a language."""
    return [block for page in PAGES for block in blocks_of(page) if block.language == language]
