"""Running a command in this process."""

from __future__ import annotations

from typing import Any

import pytest

from ddil_ray.cli import main

__all__ = ["run"]


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of a command."""
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in arguments])
    output = capsys.readouterr()
    return ended.value.code or 0, output.out, output.err
