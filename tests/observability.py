"""What cluster/observability asks Prometheus, and what a Ray exports."""

from __future__ import annotations

import json
import re
import urllib.request
from typing import Any

import promql_parser
import yaml
from clusters import CLUSTER
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample
from runs import small_run

from ddil_ray.config import RunConfig

__all__ = ["ALERTS", "DASHBOARD", "FOLDER", "asked", "panels", "questions", "samples", "selectors", "troubled_run"]

FOLDER = CLUSTER / "observability"
DASHBOARD: dict[str, Any] = json.loads((FOLDER / "dashboard.json").read_text())
(_GROUP,) = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"]
ALERTS: list[dict[str, Any]] = _GROUP["rules"]
_VARIABLES = {"$__rate_interval": "40s", "$run": ".+"}


def panels() -> list[dict[str, Any]]:
    """Panels of the dashboard."""
    return DASHBOARD["panels"]


def asked(panel: dict[str, Any]) -> list[str]:
    """The expressions of a panel, with values for Grafana's variables."""
    expressions = []
    for target in panel["targets"]:
        expression = target["expr"]
        for name, value in _VARIABLES.items():
            expression = expression.replace(name, value)
        expressions.append(expression)
    return expressions


def questions() -> list[str]:
    """All expressions of dashboard and alerts."""
    return [e for panel in panels() for e in asked(panel)] + [alert["expr"] for alert in ALERTS]


def selectors(expression: str) -> list[promql_parser.VectorSelector]:
    """The series that an expression reads."""
    found: list[promql_parser.VectorSelector] = []

    def visit(node: promql_parser.Expr) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node)

    promql_parser.walk(promql_parser.parse(expression), visit)
    return found


def samples(port: int) -> list[Sample]:
    """What is exported of runs on a metrics port."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    ours = "\n".join(line for line in text.splitlines() if re.match(r"(# \w+ )?ray_ddil_", line))
    return [sample for family in text_string_to_metric_families(ours + "\n") for sample in family.samples]


def troubled_run(name: str, output: str) -> RunConfig:
    """A long run in which what is counted goes wrong: an actor dies, states and a loss are NaN, rows get too old."""
    return small_run(
        name=name,
        output=output,
        teacher={"model": "faulty:troubled", "guidance": 1.0},
        trainer={"steps": 20_000},
        replay={"reuse": 4, "max_staleness": 13},
        checkpoint={"every": 100},
        faults={"max_poisoned": 0.2},
        shift={"enabled": True, "every": 8, "num_samples": 32},
    )
