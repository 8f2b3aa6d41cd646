"""Where data, models and results may lie: which URLs are followed, and what stays inside its folder.

Configs and data come from others: a URL in them must not make this machine ask addresses inside its network, and a name
must not lead out of the folder that it belongs to.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from ddil_ray.errors import ConfigError, DataError

__all__ = ["SCHEMES", "TRACKING_SCHEMES", "allowed", "check_links", "check_url", "is_below"]

SCHEMES = ("abfs", "abfss", "az", "file", "gcs", "gs", "hf", "memory", "s3")
"""Of URLs that are read and written."""
TRACKING_SCHEMES = ("databricks", "file", "http", "https", "mysql", "postgresql", "sqlite")
"""Of tracking servers and stores, without a driver such as `+psycopg2`."""


def allowed(place: str, schemes: Iterable[str] = SCHEMES) -> str:
    """`place`, a path or a URL, if its scheme is one of `schemes`.

    Raises:
        ValueError: another scheme, or one filesystem behind another, as in `zip://a.zip::https://host/a.zip`.
    """
    scheme, separator, _ = place.partition("://")
    known = ", ".join(schemes)
    if "::" in place:
        raise ValueError(f"must be a path or one URL of {known}, not one behind another")
    if separator and scheme.partition("+")[0] not in schemes:
        off = "; web addresses are off: fetch it first, or copy it to a bucket" if scheme in ("http", "https") else ""
        raise ValueError(f"must be a path or a URL of {known}{off}")
    return place


def check_url(place: str, field: str) -> str:
    """`place`, which was given as `field`, if `allowed`.

    Raises:
        ConfigError: it is not.
    """
    try:
        return allowed(place)
    except ValueError as error:
        raise ConfigError(f"`{field}` {error} (found {place!r})") from None


def is_below(name: str) -> bool:
    """Whether the relative path `name`, which data gave, can only lead below the folder it is relative to."""
    path = PurePosixPath(name.replace("\\", "/"))
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name


def check_links(
    fs: Any,
    root: str,
    paths: Iterable[str],
    *,
    field: str = "data.source",
    then: str = "Copy it there, or name a folder that holds both.",
) -> None:
    """See that no link among `paths`, or in the folders that they are in, leads out of `root`, which may be a link.

    Args:
        fs: fsspec filesystem; only local ones have links.
        root: a folder or file.
        paths: files, in it.
        field: that names `root`, for the message.
        then: what the user does about it, as sentences.

    Raises:
        DataError: names the link.
    """
    if not isinstance(fs, LocalFileSystem):
        return
    top = os.path.realpath(root)
    real = functools.cache(os.path.realpath)
    for path in paths:
        folder, _, name = path.rpartition("/")
        target = os.path.realpath(path) if os.path.islink(path) else f"{real(folder)}/{name}"
        if target != top and not target.startswith(f"{top.rstrip('/')}/"):
            raise DataError(
                f"`{field}` must hold what it consists of, but {path} is a link to {target}, outside. {then}"
            )
