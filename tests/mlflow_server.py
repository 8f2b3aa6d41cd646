"""`mlflow server` as a process of its own, which can be killed and started again at the same port."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["MlflowServer"]


class MlflowServer:
    """A server in `folder`.

    Args:
        folder: its working directory, and where its database lies.
        options: of `mlflow server`; without any, sqlite and artifacts in `folder`.
        environment: what it has beside this process's.
    """

    def __init__(self, folder: Path, options: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.uri, self._folder = f"http://127.0.0.1:{self.port}", folder
        self._options = options or (
            *("--backend-store-uri", f"sqlite:///{folder}/m.db", "--artifacts-destination", f"{folder}/artifacts"),
        )
        self._environment = {
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            **(environment or {}),
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start, and wait until it answers."""
        mlflow = str(Path(sys.executable).with_name("mlflow"))
        log = (self._folder / "server.log").open("ab")
        self._process = subprocess.Popen(
            [mlflow, "server", *self._options, "--port", str(self.port), "--workers", "1"],
            **{"cwd": self._folder, "start_new_session": True, "stdout": log, "stderr": log},
            env={**os.environ, **self._environment},
        )
        deadline = time.monotonic() + 150
        while not self._answers():
            assert self._process.poll() is None, (self._folder / "server.log").read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.05)

    @property
    def runs(self) -> bool:
        """Whether it was started, and not killed since."""
        return self._process is not None

    def kill(self) -> None:
        """End it at once."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                return True
        except OSError:
            return False
