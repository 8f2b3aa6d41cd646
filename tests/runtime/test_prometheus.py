"""A local stack: Debian's Prometheus scrapes a live run as it is shipped to, and a browser looks at its pages."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import ray
import yaml
from browser import browser_command, look
from clusters import documents
from observability import ALERTS, FOLDER, asked, panels, troubled_run
from runs import when

from ddil_ray.errors import RunStoppedError
from ddil_ray.runtime.run import distill

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.usefixtures("ray_cluster"),
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus, a Debian package, is not installed"),
]


@pytest.fixture
def server(tmp_path):
    """URL of a Prometheus with the shipped configuration, but for where this Ray is and how often it is asked."""
    (config,) = documents(FOLDER / "prometheus.yml")
    nodes = [f"127.0.0.1:{node['MetricsExportPort']}" for node in ray.nodes() if node["Alive"]]
    (tmp_path / "nodes.json").write_text(json.dumps([{"labels": {"job": "ray"}, "targets": nodes}]))
    config["scrape_configs"][0]["file_sd_configs"] = [{"files": [str(tmp_path / "nodes.json")]}]
    config["rule_files"] = [str(FOLDER / name) for name in config["rule_files"]]
    config["global"] |= {"scrape_interval": "5s", "evaluation_interval": "5s"}
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["prometheus", f"--config.file={tmp_path}/prometheus.yml", f"--web.listen-address=127.0.0.1:{port}"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([*command, f"--storage.tsdb.path={tmp_path}/data"], stderr=log, stdout=log)
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait(30)


def _ask(url, path, **parameters):
    """What the server's interface answers; None while it does not."""
    try:
        with urllib.request.urlopen(f"{url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}", timeout=10) as answer:
            return json.load(answer)["data"]
    except urllib.error.URLError:
        return None


def _unanswered(url, expressions):
    return [e for e in expressions if not (_ask(url, "query", query=e) or {"result": []})["result"]]


def test_every_panel_has_data_while_a_run_trains_and_an_alert_goes_off(server, run_dir, tmp_path):
    left, alerts = [e for panel in panels() for e in asked(panel)], []
    names = [alert["alert"] for alert in ALERTS]

    def all_there():
        time.sleep(1)
        left[:] = _unanswered(server, left)
        alerts[:] = [a for a in (_ask(server, "alerts") or {"alerts": []})["alerts"] if a["labels"]["run"] == "stack"]
        return not left and "DdilStatesNotFinite" in {alert["labels"]["alertname"] for alert in alerts}

    def act():
        _pictures(server, Path(os.environ.get("DDIL_SCREENSHOTS", tmp_path)))
        os.kill(os.getpid(), signal.SIGTERM)

    stopped = when(all_there, act, timeout_s=240)
    with pytest.raises(RunStoppedError):
        distill(troubled_run("stack", run_dir))
    assert stopped.result(), (left, alerts)
    (group,) = _ask(server, "rules")["groups"]
    assert [(rule["name"], rule["health"]) for rule in group["rules"]] == [(name, "ok") for name in names]
    link = next(a for a in alerts if a["labels"]["alertname"] == "DdilStatesNotFinite")["annotations"]["runbook_url"]
    assert link == "http://127.0.0.1:8000/monitoring.html#states-are-not-finite"


def _pictures(url, folder):
    """Prometheus' own pages of the run, as a reader sees them: its alerts, and a graph each of some metrics.

    Debian's has the classic pages alone.
    """
    if browser_command() is None:
        return
    graphs = {}
    for i, metric in enumerate(("stall_ratio", "actor_busy_ratio", "queue_bytes", "loss")):
        graphs |= {f"g{i}.expr": f"ray_ddil_{metric}", f"g{i}.tab": 0, f"g{i}.range_input": "5m"}
    pages = {
        "alerts": ("alerts", rf"/{ALERTS[0]['alert']}/"),
        "graphs": (f"graph?{urllib.parse.urlencode(graphs)}", "/(stack[^]*){4}/"),
    }
    for name, (path, pattern) in pages.items():
        ready = f"{pattern}.test(document.body.innerText)"
        look(f"{url}/classic/{path}", width=1280, dark=False, picture=folder / f"prometheus-{name}.png", ready=ready)
