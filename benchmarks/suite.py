"""All benchmarks of speed, one after the other, and the goals that they met and missed."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
from measuring import RESULTS, show_goals

SCRIPTS = ("data_path", "peers", "overhead", "sync", "staleness", "pools", "stream_start", "scaling")
"""In the order in which they run; each can be run alone, and is left out where it is not there."""


def run(script: str, out: Path, *, quick: bool) -> dict[str, Any] | None:
    """Run one benchmark; what it wrote, None where it failed."""
    result = out / f"{script}.json"
    command = [sys.executable, str(Path(__file__).with_name(f"{script}.py")), "--out", str(result)]
    ended = subprocess.run([*command, "--quick"] if quick else command)
    if ended.returncode:
        return None
    content: dict[str, Any] = json.loads(result.read_text())
    return content


def main() -> None:
    """Run the suite."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON files")
    parser.add_argument("--quick", action="store_true", help="a small part of the work: whether all of it runs")
    parser.add_argument("--only", nargs="+", choices=SCRIPTS, default=SCRIPTS, help="these alone")
    args = parser.parse_args()
    console, started, goals, failed = Console(width=140), time.perf_counter(), [], []
    timings = Table("benchmark", "seconds", title="Benchmarks")
    for script in args.only:
        if not Path(__file__).with_name(f"{script}.py").exists():
            continue
        before = time.perf_counter()
        found = run(script, args.out, quick=args.quick)
        timings.add_row(script, f"{time.perf_counter() - before:.0f}" + ("" if found else ", FAILED"))
        if found is None:
            failed.append(script)
        else:
            goals += found.get("goals", [])
    console.print(timings)
    show_goals(goals, console)
    met = sum(goal["met"] for goal in goals)
    print(f"{met} of {len(goals)} goals met in {time.perf_counter() - started:.0f} s; all figures in {args.out}")
    if failed:
        sys.exit(f"These benchmarks failed: {', '.join(failed)}.")


if __name__ == "__main__":
    main()
