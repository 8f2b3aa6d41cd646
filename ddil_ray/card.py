"""Model cards: what a reader of an exported folder must know, as README.md with the hub's metadata.

A card names no path, host or credential of the machine that wrote it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import HfApi, ModelCard, ModelCardData

from ddil_ray.factory import is_factory

__all__ = [
    "PLACE",
    "Base",
    "License",
    "add_section",
    "base_of",
    "call_with",
    "markdown_table",
    "public_name",
    "write_card",
]

_TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

{{ description }}

## Use

{{ usage }}

## How it was made

{% for name, fact in facts.items() -%}
- {{ name }}: {{ fact }}
{% endfor %}"""

PLACE = "path/to/this/folder"
"""What a card says in the place of its folder."""

_HUB = "https://huggingface.co"
_PACKAGES = ("ddil-ray", "diffusers", "torch", "transformers", "peft")
_UNKNOWN = "unknown"
_LONGEST = 200
"""Characters of what is taken over from another card."""


@dataclass(frozen=True)
class License:
    """A licence as the hub's metadata names it: an id, with name and link where the id is `other`."""

    id: str = _UNKNOWN
    name: str | None = None
    link: str | None = None

    def __str__(self) -> str:
        if self.id == _UNKNOWN:
            return "unknown: see the teacher's"
        said = self.name or self.id
        return f"[{said}]({self.link})" if self.link else said


@dataclass(frozen=True)
class Base:
    """The model that another was made from."""

    name: str
    hub_id: str | None = None
    license: License = License()


def base_of(spec: str, folder: Path | None, *, license: str | None = None) -> Base:
    """What a card says of the model that `teacher.model` = `spec` names.

    Args:
        spec: see `ddil_ray.models.load_model`.
        folder: where it was loaded from, if it was; its card, or that on the hub, gives the licence.
        license: in place of the one that the card gives.
    """
    hub_id = None if _is_local(spec) else spec
    found = License(license) if license else _license_in(folder, hub_id)
    return Base(hub_id or (spec if _is_code(spec) else public_name(spec)), hub_id, found)


def _is_code(spec: str) -> bool:
    return spec.startswith("builtin:") or is_factory(spec)


def _is_local(spec: str) -> bool:
    return _is_code(spec) or "://" in spec or Path(spec).exists()


def _license_in(folder: Path | None, hub_id: str | None) -> License:
    """The licence that the metadata of a folder's card states, or that of the hub's card where it has none.

    A link within the hub's repository becomes one to its page there.
    """
    card = folder / "README.md" if folder else None
    try:
        if card and card.is_file():
            data = ModelCard.load(card, ignore_metadata_errors=True).data
        else:
            data = HfApi().model_info(hub_id, timeout=10).card_data if hub_id else None
    except Exception:  # the hub's, its transport's, or YAML's
        data = None
    if data is None:
        return License()
    named, name, link = (_short(data.get(f"license{part}")) for part in ("", "_name", "_link"))
    if link and "://" not in link:
        link = f"{_HUB}/{hub_id}/blob/main/{link}" if hub_id else None
    return License(named or _UNKNOWN, name, link)


def _short(value: Any) -> str | None:
    """`value` if it may stand in a line of a card: others wrote it, and YAML has lists, numbers and dates too."""
    if not isinstance(value, str) or len(value) > _LONGEST or not value.isprintable() or set(value) & set("<>[]()`"):
        return None
    return value


def public_name(source: str) -> str:
    """The last part of a path or URL: without folders, credentials and query."""
    if "://" in source:
        parts = urlsplit(source)
        source = parts.path.rstrip("/") or parts.hostname or ""
    return re.split(r"[/\\]", source.rstrip("/\\"))[-1]


def write_card(
    folder: Path,
    *,
    title: str,
    description: str,
    usage: str,
    library: str,
    pipeline_tag: str | None = None,
    base: Base | None = None,
    tags: Sequence[str] = (),
    facts: Mapping[str, str] | None = None,
) -> None:
    """Write `folder`/README.md.

    Args:
        folder: of the model.
        title, description: in Markdown, as the rest.
        usage: how to sample it.
        library: the hub's name of what loads it.
        pipeline_tag: the hub's name of what it does.
        base: the teacher; None for a model trained on data alone.
        tags: besides those that all models of this library have.
        facts: by name, in order.
    """
    license = base.license if base else None
    data = ModelCardData(
        license=license.id if license else None,
        license_name=license.name if license else None,
        license_link=license.link if license else None,
        library_name=library,
        pipeline_tag=pipeline_tag,
        base_model=base.hub_id if base else None,
        tags=["diffusion", "distillation", "ddil", *tags],
    )
    about = {"teacher": base.name, "licence of the teacher": str(base.license)} if base else {}
    card = ModelCard.from_template(
        data,
        template_str=_TEMPLATE,
        title=title,
        description=description,
        usage=usage,
        facts={**about, **(facts or {}), "made with": _versions()},
    )
    card.save(folder / "README.md")


def add_section(folder: Path, title: str, text: str) -> None:
    """Add a section to the card in `folder`, if it has one; a section that has this title already is replaced."""
    with _changed(folder) as card:
        kept = [part.strip() for part in re.split(r"^(?=## )", card.text, flags=re.MULTILINE)]
        parts = [part for part in kept if not part.startswith(f"## {title}\n")]
        card.text = "\n" + "\n\n".join([*parts, f"## {title}\n\n{text}"]) + "\n"


def call_with(folder: Path, arguments: str = "", *, place: str = PLACE) -> None:
    """Change how the card in `folder`, if it has one, loads the pipeline: from `place`, with more `arguments`."""
    more = f", {arguments}" if arguments else ""
    with _changed(folder) as card:
        card.text = card.text.replace(f'from_pretrained("{PLACE}"', f'from_pretrained("{place}"{more}', 1)


@contextlib.contextmanager
def _changed(folder: Path) -> Iterator[Any]:
    """The card in `folder`, saved again after; one that is kept nowhere if there is none."""
    path = folder / "README.md"
    card = ModelCard.load(path) if path.is_file() else ModelCard("---\n{}\n---\n")
    yield card
    if path.is_file():
        card.save(path)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _versions() -> str:
    """Versions of those packages that are installed."""
    found = []
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{package} {importlib.metadata.version(package)}")
    return ", ".join(found)
