"""Where long code in the text may break on a narrow screen: after the punctuation between names. A hook of MkDocs."""

import re
from typing import Any

_BLOCKS = re.compile(r"(<pre.*?</pre>|<svg.*?</svg>)", re.DOTALL)
_CODE = re.compile(r"(?<=<code>)[^<]+(?=</code>)")
_PUNCTUATION = re.compile(r"(?<=\w)(\.|=|/|\[|\()(?=\S)")
# What fits the screen of any phone.
_SHORT = 30


def on_page_content(html: str, **kwargs: Any) -> str:
    """Mark the places in inline code."""
    parts = _BLOCKS.split(html)
    parts[::2] = [_CODE.sub(lambda found: _with_breaks(found[0]), part) for part in parts[::2]]
    return "".join(parts)


def _with_breaks(code: str) -> str:
    return code if len(code) <= _SHORT else _PUNCTUATION.sub(r"\1<wbr>", code)
