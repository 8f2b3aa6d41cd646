"""Running a command, in this process or in one of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ddil_ray.cli import main

__all__ = ["run", "started"]

_HERE = Path(__file__).parent
_MAIN = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal; a shell has it ignored behind itself
from ddil_ray.cli import main
main()
"""


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of a command."""
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in arguments])
    output = capsys.readouterr()
    return ended.value.code or 0, output.out, output.err


def started(*arguments: Any) -> subprocess.Popen[str]:
    """A command as a process with a Ray of its own, which finds factories in tests/; what it says is captured."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(_HERE), str(_HERE.parent)]), "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-c", _MAIN, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
