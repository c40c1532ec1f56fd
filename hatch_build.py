"""The metadata that needs public addresses: the links of the description on PyPI, and ``project.urls``.

A release fills in the addresses in ``pyproject.toml``, ``[tool.hatch.metadata.hooks.custom]``, and nowhere else.
"""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

# In Markdown: code, which stays as it is, or a link or picture whose target is neither an address nor an anchor.
_LINK = re.compile(
    r"""
    ^```.*?^```$ | `[^`\n]+`(?!\])
    | (?P<picture>!?)
      (?P<text>\[(?:[^\[\]]|!\[[^\]]*\]\([^)]*\))*\])  # a picture may be the text of a link
      \((?P<path>(?![a-z]+:|\#)[^)\s]+)\)
    """,
    re.DOTALL | re.MULTILINE | re.VERBOSE,
)


class CustomMetadataHook(MetadataHookInterface):
    """Sets ``readme`` and ``urls``."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Called by hatchling before it writes the metadata of a wheel or an sdist."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        addresses = {name: value.rstrip("/") for name, value in self.config.items() if name != "path"}
        if addresses["repository"]:
            text = with_absolute_links(text, addresses, metadata["version"])
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
        metadata["urls"] = urls(addresses, metadata["version"])


def with_absolute_links(text: str, addresses: dict[str, str], version: str) -> str:
    """Return Markdown whose relative links and pictures lead to the files of a release in the public repository."""

    def absolute(match: re.Match[str]) -> str:
        if match["path"] is None:
            return match[0]
        inner = _LINK.sub(absolute, match["text"][1:-1])
        return f"{match['picture']}[{inner}]({address(match['path'], bool(match['picture']))})"

    def address(path: str, picture: bool) -> str:
        template = addresses["pictures" if picture else "files"]
        return template.format(repository=addresses["repository"], version=version, path=path)

    return _LINK.sub(absolute, text)


def urls(addresses: dict[str, str], version: str) -> dict[str, str]:
    """Return ``project.urls``: none without a repository."""
    if not addresses["repository"]:
        return {}
    changelog = addresses["files"].format(repository=addresses["repository"], version=version, path="CHANGELOG.md")
    found = {"Repository": addresses["repository"], "Changelog": changelog}
    return {**found, "Documentation": addresses["documentation"]} if addresses["documentation"] else found
