"""Write the tables and goals of `results/*.json` into a document, between the marks of their names.

`<!-- table: sync -->` ... `<!-- end -->` takes the table `sync` of whichever result has it; `<!-- table: goals -->` the
goals of all results.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from measuring import RESULTS

MARK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
GOALS = ("goal", "measured", "bound", "met")


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def goal_rows(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Goals of all results, as they are shown."""
    return [
        [
            goal["name"],
            f"{goal['measured']:.3g}",
            f"{'>=' if goal['at_least'] else '<='} {goal['bound']:g}",
            "yes" if goal["met"] else "**no**",
        ]
        for result in results
        for goal in result.get("goals", [])
    ]


def main() -> None:
    """Refresh a document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).parents[1] / "docs" / "performance.md"
    parser.add_argument("document", type=Path, nargs="?", default=default)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    results = [json.loads(path.read_text()) for path in sorted(args.results.glob("*.json"))]
    suite = [result for result in results if "tables" in result]
    tables = {table["name"]: markdown(table["columns"], table["rows"]) for r in suite for table in r["tables"]}
    tables["goals"] = markdown(GOALS, goal_rows(suite))
    text = args.document.read_text()
    missing = {name for _, name, _ in MARK.findall(text)} - set(tables)
    args.document.write_text(MARK.sub(lambda m: m[1] + tables.get(m[2], "not measured\n") + m[3], text))
    print(f"{args.document} refreshed" + (f"; no result has {', '.join(sorted(missing))}" if missing else ""))


if __name__ == "__main__":
    main()
