"""Settings of the build are in pyproject.toml; this makes the long description of a package index from README.md.

Links and images of README.md are relative.  A package index cannot follow them, so each becomes an address below the
project's address, which `[project.urls]` in pyproject.toml states once as `Repository`.  Without it the description has
no images, and the text of a relative link stands without its link.
"""

import re
import tomllib
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)\s]+)\)")


def long_description(text: str, address: str | None) -> str:
    """`text` in Markdown with links that work outside the repository."""

    def absolute(found: re.Match[str]) -> str:
        image, words, path = found.groups()
        if address is None:
            return "" if image else words
        return f"{image}[{words}]({address.rstrip('/')}/{'raw' if image else 'blob'}/HEAD/{path})"

    return LINK.sub(absolute, text)


def address() -> str | None:
    project = tomllib.loads((HERE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project.get("urls", {}).get("Repository")


if __name__ == "__main__":
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    setup(long_description=long_description(readme, address()), long_description_content_type="text/markdown")
