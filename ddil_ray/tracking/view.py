"""The live view of a run on a terminal; plain lines where there is none."""

from __future__ import annotations

import logging
import os
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ddil_ray.redact import redact

__all__ = ["View"]

_LINE_EVERY_S = 10.0
_log = logging.getLogger(__name__)


class View:
    """Shows the newest record of a run; use as a context manager.

    Args:
        console: where to; standard error by default, so that standard output stays free for results.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self._live = self.console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[facts]}"),
            console=self.console,
            transient=True,
        )
        self._task = self._progress.add_task("starting", total=None, facts="", visible=self._live)
        self._last_line = 0.0
        self._checkpoint = -1
        self._shift: list[str] = []

    def __enter__(self) -> View:
        if self._live:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._progress.stop()

    def say(self, text: str) -> None:
        """Print a line above the live view, without secrets; a log line where Ray's logs are JSON, once they are."""
        if os.environ.get("RAY_LOGGING_CONFIG_ENCODING") and logging.getLogger().hasHandlers():
            _log.info(redact(text))
        else:
            self.console.print(redact(text), markup=False, soft_wrap=True)

    def show(self, record: dict[str, float]) -> None:
        """Take in a record of metrics."""
        self._checkpoint = int(record.get("checkpoint/step", self._checkpoint))
        if "rollout/nonfinite" in record:
            self._shift = _shift_facts(record)
        if "loss" not in record:
            return
        step, total = int(record["step"]), int(record["total_steps"])
        description = f"phase {int(record['phase']) + 1}" if "phase" in record else "training"
        self.progress(description, step, total, self._facts(record), unit="step ")

    def progress(self, description: str, done: int, total: int, facts: str, *, unit: str = "") -> None:
        """Show how far something is; where there is no live view, as a line now and then."""
        self._progress.update(self._task, description=description, completed=done, total=total, facts=facts)
        due = time.monotonic() - self._last_line > _LINE_EVERY_S or done == total
        if not self._live and due:
            self._last_line = time.monotonic()
            self.say(f"{description}  {unit}{done}/{total}  {facts}")

    def _facts(self, record: dict[str, float]) -> str:
        parts = [
            f"loss {record['loss']:.4g}",
            f"{record['throughput/samples_per_s']:.0f} samples/s",
        ]
        if "trainer/stall_share" in record:
            parts.append(f"stall {record['trainer/stall_share']:.0%}")
        if "staleness/max" in record:
            parts.append(f"staleness {record['staleness/p50']:.0f}/{record['staleness/max']:.0f}")
        fill = sum(v for k, v in record.items() if k.startswith("replay/fill/"))
        if fill:
            parts.append(f"replay {fill:.0f}")
        dropped = {k.rpartition("/")[2]: v for k, v in record.items() if k.startswith("rows/dropped/") and v}
        if dropped:
            parts.append("dropped " + ", ".join(f"{name} {rows:.0f}" for name, rows in dropped.items()))
        parts += self._shift
        if self._checkpoint >= 0:
            parts.append(f"checkpoint {self._checkpoint}")
        return "  ".join(parts)


def _shift_facts(record: dict[str, float]) -> list[str]:
    """The largest energy distance with what chance gives there, and the errors, mean over steps (`training.shift`)."""

    def steps(name: str) -> dict[str, float]:
        return {k.removeprefix(name): v for k, v in record.items() if k.startswith(name)}

    energy, facts = steps("shift/energy/"), []
    if energy:
        worst = max(energy, key=energy.__getitem__)
        facts.append(f"shift {energy[worst]:.2g} (chance {record[f'shift/floor/{worst}']:.2g})")
    visited, forward = (list(steps(f"shift/error_{where}/").values()) for where in ("visited", "forward"))
    if visited and forward:
        facts.append(f"error {sum(visited) / len(visited):.2g}/{sum(forward) / len(forward):.2g}")
    if record["rollout/nonfinite"]:
        facts.append(f"{record['rollout/nonfinite']:.0f} NaN or infinite")
    return facts
