"""Where files lie: the one place that opens filesystems, with retries and time-outs of our own, and full disks.

To give a scheme settings of its own: a row in `_SETTINGS`. What may be opened at all is for `open_url` to say.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec

__all__ = ["appears_whole", "make_folder", "no_room", "of_storage", "open_url", "room_at"]

_S3_CLIENT = {
    "retries": {"mode": "standard", "total_max_attempts": 8},
    "connect_timeout": 5,
    "read_timeout": 15,
}
"""Of botocore: eight tries with growing pauses of at most 1, 2, 4, ... 20 s, so some 35 s; seconds without a byte."""
_S3_TRIES = 2
"""Of s3fs around those of botocore: it alone sees that an answer broke off. Its own five would wait for half an hour
for a server that never answers."""


def _s3() -> dict[str, Any]:
    """Settings of S3, below those that the user has made in fsspec's own config; listings are never remembered."""
    try:
        from s3fs import S3FileSystem
    except ImportError:  # fsspec says what to install
        return {}
    S3FileSystem.retries = _S3_TRIES  # which no argument sets, nor is it pickled with a filesystem
    theirs = fsspec.config.conf.get("s3", {})
    return {"use_listings_cache": False, **theirs, "config_kwargs": {**_S3_CLIENT, **theirs.get("config_kwargs", {})}}


_SETTINGS: dict[str, Callable[[], dict[str, Any]]] = {"s3": _s3, "s3a": _s3}
"""What filesystems are opened with, by scheme."""
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az"}
_SERVICES = ("adlfs", "aiohttp", "botocore", "fsspec", "gcsfs")
"""Libraries whose errors are of a storage."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def open_url(where: str) -> tuple[Any, str]:
    """The filesystem of a path or fsspec URL, and the path on it.

    Failing requests to S3 are made again for some 35 s; one that is never answered is given up after 15 s, and all its
    repetitions after five minutes, ten for one that reads. Then the filesystem's own error is raised.

    Args:
        where: a path or URL; URLs may be chained, as in `simplecache::s3://bucket/file`.
    """
    links = where.split("::")
    return fsspec.core.url_to_fs(where, **{s: make() for s, make in _SETTINGS.items() if _is_in(s, links)})  # type: ignore[no-any-return]


def _is_in(scheme: str, links: list[str]) -> bool:
    return any(link.partition("://")[0] == scheme for link in links if "://" in link)


def appears_whole(fs: Any) -> bool:
    """Whether a file of this filesystem is there once all of it is, as in object stores, or while it is written too."""
    protocols = fs.protocol if isinstance(fs.protocol, (tuple, list)) else (fs.protocol,)
    return not _OBJECT_STORES.isdisjoint(protocols)


def make_folder(fs: Any, folder: str) -> None:
    """Make a folder and those above it, where there are such things: an object store would look for its bucket, and
    make one that is not there."""
    if not appears_whole(fs):
        fs.makedirs(folder, exist_ok=True)


def of_storage(error: BaseException) -> bool:
    """Whether an error is of a filesystem, or of the service or library behind one."""
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _SERVICES


def no_room(error: BaseException | None) -> bool:
    """Whether `error`, or what it came from, tells of a full disk, also in a library's own words."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if any(os.strerror(number) in str(error) for number in _FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


def room_at(path: Path) -> str:
    """How much room the disk of `path` has left, as far as it can be asked."""
    try:
        usage = shutil.disk_usage(path)
    except OSError as error:  # its mount is gone
        return f"its disk does not answer: {error.strerror}"
    return f"{usage.free / 2**20:,.0f} of {usage.total / 2**20:,.0f} MiB are free there"
