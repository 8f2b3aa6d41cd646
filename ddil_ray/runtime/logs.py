"""Log lines that say which run and role they are of, for whoever gathers those of many processes.

Ray writes the logs of a job as JSON where its driver has RAY_LOGGING_CONFIG_ENCODING=JSON: one object per line, with
the ids of job, node, worker and actor. What is added here stands beside these.
"""

from __future__ import annotations

import logging

__all__ = ["name_logs"]


class _Names(logging.Filter):
    """Lets all pass, with names."""

    def __init__(self, run: str, role: str) -> None:
        super().__init__()
        self._run, self._role = run, role

    def filter(self, record: logging.LogRecord) -> bool:
        vars(record).update(run=self._run, role=self._role)
        return True


def name_logs(run: str, role: str) -> None:
    """Let what this process logs from now on have `run` and `role`, in place of those it had."""
    for handler in logging.getLogger().handlers:
        for former in [f for f in handler.filters if isinstance(f, _Names)]:
            handler.removeFilter(former)
        handler.addFilter(_Names(run, role))
