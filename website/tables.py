"""Tables of text for narrow screens: cells know their column, and site.css makes cards of rows. A hook of MkDocs."""

import html as entities
import re
from typing import Any

_TABLE = re.compile(r"<table>(.*?)</table>", re.DOTALL)
_ROW = re.compile(r"<tr>.*?</tr>", re.DOTALL)
_HEAD = re.compile(r"<th[^>]*>(.*?)</th>", re.DOTALL)
_CELL = re.compile(r"<td([^>]*)>(.*?)</td>", re.DOTALL)
_TAG = re.compile(r"<[^>]+>")
# Characters of a cell from which a table is one of text; tables of numbers scroll.
_LONG = 45


def on_page_content(html: str, **kwargs: Any) -> str:
    """Mark tables of text, and name the column in each of their cells."""
    return _TABLE.sub(_labelled, html)


def _labelled(table: re.Match[str]) -> str:
    labels = [_text(head) for head in _HEAD.findall(table[1])]
    if max((len(_text(cell)) for _, cell in _CELL.findall(table[1])), default=0) < _LONG:
        return table[0]

    def row(found: re.Match[str]) -> str:
        names = iter(labels)
        return _CELL.sub(lambda cell: f'<td{cell[1]} data-label="{next(names)}">{cell[2]}</td>', found[0])

    return f"<table data-stacked>{_ROW.sub(row, table[1])}</table>"


def _text(cell: str) -> str:
    return entities.escape(entities.unescape(_TAG.sub("", cell)).strip(), quote=True)
