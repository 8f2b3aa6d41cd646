"""What a job's working directory would upload, as Ray's own code finds it: refuses what looks secret or is large.

    python cluster/check_upload.py [FOLDER]

Exits with 1 and a line for each file that should stay, else with 0 and the size of the upload.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from ray._private.runtime_env.packaging import _dir_travel

__all__ = ["LARGE", "problems", "uploaded"]

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
    """Files that Ray would upload: all but what .rayignore and .gitignore name."""
    found: list[Path] = []
    _dir_travel(folder.absolute(), [], found.append, include_gitignore=True, logger=logging.getLogger(__name__))
    return [path for path in found if path.is_file()]


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


def main(folder: Path) -> int:
    """Print, and give the exit code."""
    found = sorted(problems(folder))
    for problem in found:
        print(problem, file=sys.stderr)
    if found:
        print(f"{len(found)} files should not leave {folder}: name them in {folder / '.rayignore'}.", file=sys.stderr)
        return 1
    files = uploaded(folder)
    print(f"{len(files)} files, {sum(path.stat().st_size for path in files) / 2**20:.1f} MiB before compression")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else ".")))
