"""What the pages of the documentation hold: blocks of code, with what they are called, and commands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from commandlines import meant, words_of

__all__ = ["ROOT", "Block", "Command", "blocks", "commands", "pages"]

ROOT = Path(__file__).parents[1]
_FENCE = re.compile(r'^```(\w*)(?: title="([^"]+)")?\n(.*?)^```$', re.DOTALL | re.MULTILINE)
_INLINE = re.compile(r"`(ddil-ray [^`]+)`")
_NAMED = re.compile(r"# ([\w-]+\.yaml)(?=\s)")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    name: str | None
    """Its title, or the file name that its first line is a comment of."""
    text: str


@dataclass(frozen=True)
class Command:
    """`ddil-ray` as a page calls it."""

    page: str
    arguments: tuple[str, ...]
    whole: bool
    """Whether it can be copied as it is; else it stands in a sentence, and may leave things out."""

    def __str__(self) -> str:
        return f"{self.page}: {' '.join(self.arguments)}"


def pages() -> list[Path]:
    """The README, and everything that the documentation site shows."""
    taken_in = ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"]
    beside = [ROOT / folder / "README.md" for folder in ("benchmarks", "cluster", "ddil_ray/runtime")]
    return [*(ROOT / name for name in taken_in), *beside, *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found = []
    for language, title, text in _FENCE.findall(page.read_text()):
        named = _NAMED.match(text) if language == "yaml" else None
        found.append(Block(language, title or (named.group(1) if named else None), text))
    return found


def commands(page: Path) -> Iterator[Command]:
    """The commands of a page: those of its shell blocks, also as `pipelines/<name>.py`, and those in its sentences."""
    name = str(page.relative_to(ROOT))
    for block in blocks(page):
        if block.language == "bash":
            for line in block.text.replace("\\\n", " ").splitlines():
                called = _called(line)
                if called is not None:
                    yield Command(name, called, whole="..." not in called)
    for text in _INLINE.findall(_FENCE.sub("", page.read_text())):
        yield Command(name, tuple(text.split()[1:]), whole=False)


def _called(line: str) -> tuple[str, ...] | None:
    """The arguments of `ddil-ray` in a line of a shell; None where it calls something else."""
    if "ddil-ray" not in line and "pipelines/" not in line:
        return None
    words = words_of(line)
    job = words[words.index("--") + 1 :] if "--" in words else words  # what `ray job submit` is given
    program, *arguments = meant(job) or [""]
    return tuple(arguments) if program == "ddil-ray" else None
