"""Puts pictures that are drawn into the page itself, where they take the colours of its theme. A hook of MkDocs."""

import re
from pathlib import Path
from typing import Any

_IMAGE = re.compile(r'<img alt="[^"]*" src="(images/[\w-]+\.svg)" ?/?>')
_SPACE = re.compile(r">\s+<")


def on_page_content(html: str, *, config: Any, **kwargs: Any) -> str:
    """Replace images by what is in their files."""

    def drawn(found: re.Match[str]) -> str:
        text = (Path(config["docs_dir"]) / found[1]).read_text()
        return f'<span class="flow">{_SPACE.sub("><", text).strip()}</span>'

    return _IMAGE.sub(drawn, html)
