"""
Docstrings in the style of Hugging Face as Markdown: sections become lists, and references become links.

An extension of griffe, for the page of the API (mkdocs.yml).
"""

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
import yaml

# Names of others that docstrings refer to.
EXTERNAL = {
    "accelerate.Accelerator": "https://huggingface.co/docs/accelerate/package_reference/accelerator",
    "accelerate.PartialState": "https://huggingface.co/docs/accelerate/package_reference/state",
    "datasets.Dataset": "https://huggingface.co/docs/datasets/package_reference/main_classes",
    "datasets.IterableDataset": "https://huggingface.co/docs/datasets/package_reference/main_classes",
    "torch.utils.data.Sampler": "https://docs.pytorch.org/docs/stable/data.html",
    "transformers.HfArgumentParser": "https://huggingface.co/docs/transformers/internal/trainer_utils",
    "trl.GRPOConfig": "https://huggingface.co/docs/trl/grpo_trainer",
    "trl.GRPOTrainer": "https://huggingface.co/docs/trl/grpo_trainer",
}
API_PAGE = Path(__file__).parents[1] / "docs" / "api.md"

_REFERENCE = re.compile(r"\[`(~?)([\w.]+)`\](?![(\[])")
_TABLE = re.compile(r"^\|.*\n\|[ |:-]+\|\n(?:\|.*\n?)+", re.MULTILINE)
_SECTION = re.compile(r"(Args|Parameters|Attributes|Returns|Raises|Example):")
_TITLES = {"Args": "Parameters"}
_DIRECTIVE = re.compile(r"^::: (\S+)\n((?:    .*\n)*)", re.MULTILINE)
# The first colon outside of code and brackets ends the head of an entry.
_HEAD = re.compile(r"((?:`[^`]*`|\([^)]*(?:\([^)]*\)[^)]*)*\)|[^:`(])+):(?: (.*))?")


def documented(page: str) -> dict[str, str]:
    """Paths of the objects on the page of the API, by their short names."""
    paths = {}
    for path, options in _DIRECTIVE.findall(page):
        members = ((yaml.safe_load(options) or {}).get("options") or {}).get("members") or []
        is_module = path.rpartition(".")[2].islower() and members
        for found in [f"{path}.{member}" for member in members] if is_module else [path]:
            paths[found.rpartition(".")[2]] = found
    return paths


def link(reference: re.Match[str], paths: dict[str, str]) -> str:
    """Markdown for a reference such as [`~trl.GRPOTrainer`]; the tilde leaves out all but the last name."""
    is_short, name = bool(reference[1]), reference[2]
    shown = name.rpartition(".")[2] if is_short else name
    if name in EXTERNAL:
        return f"[`{shown}`]({EXTERNAL[name]})"
    of_package = name.removeprefix("exgrpo_trl.")
    if of_package == name and name.split(".")[0].islower() and "." in name:
        raise ValueError(f"[`{name}`] refers to something of others: add its address to EXTERNAL in {__file__}.")
    own = of_package.split(".")
    for position, part in enumerate(own):
        if part in paths:
            return f"[`{shown}`][{'.'.join([paths[part], *own[position + 1 :]])}]"
    return f"`{shown}`"  # no part of the page


def as_markdown(docstring: str, paths: dict[str, str]) -> str:
    """
    A docstring as Markdown.

    Args:
        docstring: Its text, without indentation.
        paths: Paths of documented objects by name.
    """
    parts = [
        text if title is None else f"{_TITLES.get(title, title)}\n{{: .doc-section }}\n\n{_list(text, title)}"
        for title, text in _sections(docstring)
    ]
    # Code blocks are no text.
    split = re.split(r"(^```.*?^```$)", "\n\n".join(parts), flags=re.DOTALL | re.MULTILINE)
    return "".join(
        part if part.startswith("```") else _REFERENCE.sub(lambda found: link(found, paths), _without_tables(part))
        for part in split
    )


def _without_tables(text: str) -> str:
    """Tables as lists, which are never wider than their column: the first cell of a row names the others."""
    return _TABLE.sub(lambda found: _table_as_list(found[0]), text)


def _table_as_list(table: str) -> str:
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    entries = [
        f"{first}\n:   {'; '.join(f'{name}: {cell}' for name, cell in zip(header[1:], cells, strict=True))}\n"
        for first, *cells in rows
    ]
    return "\n".join(entries)


def _sections(docstring: str) -> Iterator[tuple[str | None, str]]:
    """Titles of the sections, None for what is none, and their text without its indentation."""
    title: str | None = None
    lines: list[str] = []
    for line in [*docstring.splitlines(), None]:
        begins = line is not None and _SECTION.fullmatch(line)
        ends = line is None or begins or (title is not None and line.strip() and not line.startswith(" "))
        if ends:
            if lines or title:
                yield title, textwrap.dedent("\n".join(lines)).strip("\n")
            title, lines = (begins[1] if begins else None), []
        if line is not None and not begins:
            lines.append(line)


def _list(text: str, title: str) -> str:
    """Entries of a section as a list of definitions."""
    if title == "Example":
        return text
    if title == "Returns" and not _is_entry(text):
        return text
    entries: list[str] = []
    for line in text.splitlines():
        if line.startswith("> "):  # a heading among parameters
            entries += ["", f"{line[2:]}\n{{: .doc-subsection }}", ""]
        elif line.strip() and not line.startswith(" "):
            head, rest = _split(line)
            entries += ["", _typeset(head, title), f":   {rest}".rstrip() if rest else ":   "]
        elif entries and entries[-1] == ":   ":
            entries[-1] += line.strip()
        else:
            entries.append(line)
    return "\n".join(entries).strip("\n")


def _is_entry(text: str) -> bool:
    return _HEAD.fullmatch(text.splitlines()[0]) is not None and text.splitlines()[0].endswith(":")


def _split(line: str) -> tuple[str, str]:
    found = _HEAD.fullmatch(line)
    return (found[1], found[2] or "") if found else (line.rstrip(":"), "")


def _typeset(head: str, title: str) -> str:
    """The name of an entry as code, if it is none yet, and its type as it is."""
    if head.startswith(("`", "[")):
        return head
    names, bracket, types = head.partition(" (")
    typeset = ", ".join(name if name == "..." else f"`{name}`" for name in names.split(", "))
    return f"{typeset} {bracket.strip()}{types}" if bracket else typeset


class HuggingFaceDocstrings(griffe.Extension):
    """Rewrites the docstrings of the package before they are shown."""

    def __init__(self) -> None:
        self.paths = documented(API_PAGE.read_text())

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value, self.paths)
