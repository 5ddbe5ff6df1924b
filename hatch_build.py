"""The address of the repository in what PyPI shows: from the environment variable REPOSITORY, where there is one."""

import os
import re
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

PAPER = "https://arxiv.org/abs/2510.02245"


class RepositoryAddress(MetadataHookInterface):
    """
    Fills in the addresses that hatch-fancy-pypi-readme has begun with `REPOSITORY/` (see pyproject.toml).

    Without an address pictures go, and of links the text stays, so that no page has dead ones.
    """

    def update(self, metadata: dict[str, Any]) -> None:
        address = os.environ.get("REPOSITORY", "").rstrip("/")
        readme = metadata["readme"]
        metadata["urls"] = {"Paper": PAPER}
        if address:
            readme["text"] = readme["text"].replace("](REPOSITORY/", f"]({address}/")
            metadata["urls"] |= {
                "Repository": address,
                "Issues": f"{address}/issues",
                "Changelog": f"{address}/blob/v{metadata['version']}/CHANGELOG.md",
            }
        else:
            readme["text"] = re.sub(r"!\[[^\]]*\]\(REPOSITORY/[^)]*\)\n*", "", readme["text"])
            readme["text"] = re.sub(r"\[([^\]]*)\]\(REPOSITORY/[^)]*\)", r"\1", readme["text"])
