"""The errors a user can meet; each message names the field, the rule, what was found and what to do, and no secret."""

from __future__ import annotations

import os
import traceback

from ddil_ray.redact import redact

__all__ = [
    "ConfigError",
    "DataError",
    "DdilError",
    "RunFailedError",
    "RunStoppedError",
    "ShapeError",
    "StaleStateError",
    "StateError",
    "StreamLostError",
    "first_line",
    "last_line",
    "what_was_raised",
]


def first_line(error: BaseException) -> str:
    """What a foreign error says, for quoting inside a message: its first line, or its name where it says nothing."""
    return redact((str(error).strip() or type(error).__name__).splitlines()[0])


def last_line(error: BaseException) -> str:
    """As `first_line`, of what Ray says, which has a traceback in front: its last line."""
    return redact((str(error).strip() or type(error).__name__).splitlines()[-1].strip())


def what_was_raised(error: BaseException) -> str:
    """A foreign error for quoting: its type, first line and, in parentheses, where it was raised.

    That is the last line of a file: those of Python's import machinery, which has none, say nothing. A SyntaxError says
    by itself where it is.
    """
    text = f"{type(error).__name__}: {first_line(error)}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<frozen ")]
    if isinstance(error, SyntaxError) or not frames:
        return text
    return f"{text} ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno} in {frames[-1].name})"


class DdilError(Exception):
    """Any failure that ddil-ray explains in one message."""

    exit_code = 2
    """What a command exits with: 2 for bad input, 1 for a run that failed."""

    def __str__(self) -> str:
        return redact(super().__str__())


class ConfigError(DdilError, ValueError):
    """A setting, or a combination of settings, that cannot work."""


class DataError(DdilError, ValueError):
    """Training data that cannot be read, or that does not fit the teacher."""


class ShapeError(DdilError, ValueError):
    """A tensor whose shape breaks a documented contract."""


class StaleStateError(DdilError, RuntimeError):
    """A rollout state older than the staleness bound reached the trainer."""

    exit_code = 1


class RunStoppedError(DdilError, RuntimeError):
    """A run that a signal ended, and what it left; commands exit with 128 + the signal's number."""

    def __init__(self, message: str, *, signal: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal


class RunFailedError(DdilError, RuntimeError):
    """A run that started and could not go on; commands exit with code 1 on it."""

    exit_code = 1


class StateError(RunFailedError):
    """States that reached the trainer and that nothing can be learnt from."""


class StreamLostError(RunFailedError):
    """A stream of states that broke off, by the fault of no setting and no model: another start may go on with it."""
