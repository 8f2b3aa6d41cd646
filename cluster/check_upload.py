"""What a job's working directory would upload, as Ray's own code finds it: refuses what looks secret or is large.

    python cluster/check_upload.py [FOLDER] [--module FOLDER] [--pack FILE.zip]

Exits with 1 and a line for each file that should stay, else with 0. `--pack` writes it into an archive, with a folder
of Python code if one is named: a package as Ray makes it, but compressed.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

__all__ = ["LARGE", "pack", "problems", "uploaded"]

LARGE = 10 * 2**20
"""Bytes of a file that is too large to go with every job."""
_SECRET_NAME = re.compile(
    r"(?i)^(\.env.*|.*\.(pem|key|p12|pfx|jks|kdbx|keytab|ppk|secret|token)|id_(rsa|dsa|ecdsa|ed25519).*|[._]netrc|\.pgpass"
    r"|\.(pypirc|npmrc|git-credentials|databrickscfg|s3cfg|boto)|.*credentials.*|.*service[-_]account.*\.json|secrets\..*"
    r"|auth_token)$"
)
_SECRET_FOLDER = {".ssh", ".aws", ".azure", ".gnupg", ".kube", ".docker", ".ray", ".huggingface"}
_PRIVATE_KEY = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----")
_HEAD = 4096


def uploaded(folder: Path) -> list[Path]:
    """Files that Ray would upload: all but what .rayignore, .gitignore and its own list name."""
    found: list[Path] = []
    top = folder.absolute()
    excludes = [_get_excludes(top, get_runtime_env_default_excludes())]
    _dir_travel(top, excludes, found.append, include_gitignore=True, logger=logging.getLogger(__name__))
    return sorted(path for path in found if path.is_file())


def problems(folder: Path) -> Iterator[str]:
    """Why files that would be uploaded should not be, a line each."""
    top = folder.resolve()
    for path in uploaded(folder):
        name, size = path.relative_to(folder.absolute()), path.stat().st_size
        if _SECRET_NAME.match(path.name) or _SECRET_FOLDER & set(name.parts):
            yield f"{name} looks like a secret by its name"
        elif _is_private_key(path):
            yield f"{name} holds a private key"
        if not path.resolve().is_relative_to(top):
            yield f"{name} is reached by a link that leaves the folder"
        if size > LARGE:
            yield f"{name} has {size / 2**20:.0f} MiB"


def _is_private_key(path: Path) -> bool:
    with path.open("rb") as file:
        return _PRIVATE_KEY.search(file.read(_HEAD)) is not None


def pack(folder: Path, module: Path | None, package: Path) -> None:
    """Write what is uploaded of `folder`, and of `module` under its name, to the archive `package`."""
    with ZipFile(package, "w", ZIP_DEFLATED, strict_timestamps=False) as archive:
        for path in uploaded(folder):
            archive.write(path, path.relative_to(folder.absolute()))
        for path in uploaded(module) if module else []:
            archive.write(path, path.relative_to(module.absolute().parent))


def main(folder: Path, module: Path | None, package: Path | None) -> int:
    """Look, pack and print; the exit code."""
    looked = [folder, module] if module else [folder]
    for place in looked:
        found = sorted(problems(place))
        for problem in found:
            print(problem, file=sys.stderr)
        if found:
            print(f"{len(found)} files should not leave {place}: name them in {place / '.rayignore'}.", file=sys.stderr)
            return 1
    files = [path for place in looked for path in uploaded(place)]
    print(f"{len(files)} files, {sum(path.stat().st_size for path in files) / 1e6:.2f} MB before compression")
    if package:
        pack(folder, module, package)
        print(f"{package.stat().st_size / 1e6:.2f} MB to upload")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="What a job would upload.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("."))
    parser.add_argument("--module", type=Path)
    parser.add_argument("--pack", type=Path)
    given = parser.parse_args()
    sys.exit(main(given.folder, given.module, given.pack))
