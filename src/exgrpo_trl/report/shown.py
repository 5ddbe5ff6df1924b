"""Stored text as a page shows it: data that nothing obeys, whatever it holds."""

from __future__ import annotations

import base64
import gzip
import json
import re
from typing import Any

# Characters that nobody sees, or that show others in another order; line breaks and tabs aside. Lone surrogates too.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)


def visible(text: str) -> str:
    r"""The text with escapes such as `\\u202e` in the place of what is not seen, or moves what is."""
    return _UNSEEN.sub(lambda match: ascii(match[0])[1:-1], text)


def cut(text: str, most: int) -> str:
    """The same, of at most so many characters, with the number of those that are left out."""
    if len(text) <= most:
        return visible(text)
    return f"{visible(text[:most])} [... {len(text) - most:,} more characters are left out of this page]"


def json_in_page(value: Any) -> str:
    """JSON that ends no element of a page and begins none."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def packed(value: Any) -> str:
    """JSON in gzip in base 64; the same for the same value."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode("ascii")
