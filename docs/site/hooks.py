"""Takes pages into the site that lie outside docs/, and lets links lead where the site has what they name.

Pages are written to be read in the repository too, so their links are paths in it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
TAKEN_IN = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "benchmarks/README.md": "benchmarks.md",
    "cluster/README.md": "cluster.md",
    "ddil_ray/runtime/README.md": "runtime.md",
}
"""Path in the repository -> page of the site."""
_FENCE = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(!?)\[([^\]]+)\]\(([^)#\s:]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from elsewhere."""
    for source, page in TAKEN_IN.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to what the repository has into links to what the site has."""
    parts = _FENCE.split(markdown)
    parts[::2] = [_LINK.sub(lambda link: _rewritten(link, page.file.src_uri), text) for text in parts[::2]]
    return "".join(parts)


def in_repository(page: str) -> str:
    """Path in the repository of a page of the site."""
    return next((source for source, taken in TAKEN_IN.items() if taken == page), f"docs/{page}")


def _rewritten(link: re.Match[str], page: str) -> str:
    """The link as the site needs it; text where the repository has a file that the site has not.

    One that leads nowhere stays, for the build to complain of.
    """
    picture, text, target, anchor = link.group(1), link.group(2), link.group(3), link.group(4) or ""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(in_repository(page)), target))
    if path.startswith("docs/") or path in TAKEN_IN:
        place = TAKEN_IN.get(path) or path.removeprefix("docs/")
        return f"{picture}[{text}]({posixpath.relpath(place, posixpath.dirname(page) or '.')}{anchor})"
    return text if (ROOT / path).exists() else link.group(0)
