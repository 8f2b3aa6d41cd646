"""Pins dashboard, alerts and scrape configuration to the table of metrics, and the page on them to both."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import jsonschema
import pytest
import yaml
from clusters import KUBERAY, ROOT, SCHEMAS, documents, strict
from markdown.extensions.toc import slugify
from observability import ALERTS, DASHBOARD, FOLDER, asked, panels, questions, selectors
from pages import blocks
from ray._common.utils import get_default_ray_temp_dir
from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

from ddil_ray.runtime.metrics import METRICS

PAGE = ROOT / "docs" / "monitoring.md"
BY_NAME = {metric.exported: metric for metric in METRICS}
RULES = Path(__file__).with_name("alerts.test.yml")


@pytest.mark.parametrize("expression", questions())
def test_dashboard_and_alerts_ask_for_metrics_that_there_are_by_tags_that_they_have(expression):
    found = selectors(expression)
    assert found
    for selector in found:
        assert {m.name for m in selector.matchers.matchers} <= set(BY_NAME[selector.name].tags)
    for group in re.findall(r"\bby \(([^)]*)\)", expression):
        assert all(set(re.split(r",\s*", group)) <= set(BY_NAME[s.name].tags) for s in found)


def test_a_mistake_in_an_expression_would_be_noticed():
    with pytest.raises(ValueError, match="unclosed"):
        selectors("sum by (run) (rate(ray_ddil_rows_made_total[5m])")
    assert [s.name for s in selectors("ray_ddil_stepp > 3 and ray_ddil_step")] == ["ray_ddil_stepp", "ray_ddil_step"]


def test_every_metric_is_on_the_dashboard():
    shown = {selector.name for panel in panels() for e in asked(panel) for selector in selectors(e)}
    assert shown == BY_NAME.keys()


def test_every_panel_is_of_the_chosen_runs_in_the_unit_of_its_metrics():
    units = {"ratio": "percentunit", "seconds": "s", "bytes": "bytes"}
    for panel in panels():
        (unit,) = {panel["fieldConfig"]["defaults"]["unit"]}
        for target, expression in zip(panel["targets"], asked(panel), strict=True):
            found = selectors(expression)
            assert target["expr"].count('run=~"$run"') == len(found)
            ends = {selector.name.rpartition("_")[2] for selector in found}
            if "/" not in expression:
                assert {units.get(end, "short") for end in ends} == {unit}, panel["title"]


def test_the_dashboard_is_one_that_grafana_loads():
    """The keys that Grafana's importer needs; what it says of them itself was not tried."""
    assert DASHBOARD["uid"] == "ddil-ray"
    assert DASHBOARD["schemaVersion"] >= 36
    assert [v["name"] for v in DASHBOARD["templating"]["list"]] == ["datasource", "run"]
    assert len({panel["id"] for panel in panels()}) == len(panels()) > 20
    taken = set()
    for panel in panels():
        at = panel["gridPos"]
        cells = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert max(x for x, _ in cells) < 24
        assert not cells & taken
        taken |= cells
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


def test_a_link_of_an_alert_leads_to_its_section_and_every_section_has_an_alert():
    text = PAGE.read_text()
    sections = {slugify(title, "-") for title in re.findall(r"^### (.+)$", text, re.MULTILINE)}
    links = [alert["annotations"]["runbook_url"].partition("#") for alert in ALERTS]
    assert {start for start, _, _ in links} == {"{{ $externalLabels.runbooks }}"}
    assert {anchor for _, _, anchor in links} == sections
    assert len(sections) == len(ALERTS)
    assert "`spec.externalLabels.runbooks`" in text  # where there is no prometheus.yml
    (config,) = documents(FOLDER / "prometheus.yml")
    page = config["global"]["external_labels"]["runbooks"].rpartition("/")[2]
    assert page == PAGE.with_suffix(".html").name
    assert {alert["labels"]["severity"] for alert in ALERTS} == {"page", "ticket"}


def test_the_page_has_every_metric_with_its_tags_and_meaning():
    table = {}
    for row in re.findall(r"^\| `(ray_ddil_\w+)` \|(.*)\|$", PAGE.read_text(), re.MULTILINE):
        tags, meaning, keys = (cell.strip() for cell in row[1].split("|"))
        table[row[0]] = (tags, meaning, keys)
    assert table.keys() == BY_NAME.keys()
    for metric in METRICS:
        tags, meaning, keys = table[metric.exported]
        assert re.findall(r"`(\w+)`", tags) == [tag for tag in metric.tags if tag != "run"]
        assert meaning == metric.help
        assert (f"`{metric.key}<{metric.tag}>`" if metric.tag else f"`{metric.key}`") in keys


def test_prometheus_finds_the_nodes_where_the_head_lists_them(monkeypatch):
    for name in ("TMPDIR", "RAY_TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    (config,) = documents(FOLDER / "prometheus.yml")
    (job,) = config["scrape_configs"]
    assert job["file_sd_configs"] == [{"files": [f"{get_default_ray_temp_dir()}/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"]}]
    assert [(FOLDER / name).exists() for name in config["rule_files"]] == [True]


def fits_its_schema(document):
    kinds = json.loads((SCHEMAS / "prometheus-operator.json").read_text())
    jsonschema.Draft202012Validator(strict(kinds[document["kind"]])).validate(document)


def test_a_mistake_in_a_document_of_the_prometheus_operator_would_be_noticed():
    (monitor,) = documents(FOLDER / "podmonitor.yaml")
    monitor["spec"]["podMetricsEndpoints"][0]["interval"] = "10"
    with pytest.raises(jsonschema.ValidationError, match="'10' does not match"):
        fits_its_schema(monitor)


def test_the_pod_monitor_meets_every_pod_and_its_port_and_the_policy_lets_it():
    (monitor,) = documents(FOLDER / "podmonitor.yaml")
    fits_its_schema(monitor)
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    (cluster,) = documents(KUBERAY / "base" / "raycluster.yaml")
    groups = [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]
    ports = set()
    for pod in (group["template"] for group in groups):
        labels = pod["metadata"]["labels"]
        assert labels.items() >= monitor["spec"]["selector"]["matchLabels"].items()
        named = {port["name"]: port["containerPort"] for port in pod["spec"]["containers"][0]["ports"]}
        ports.add(named[endpoint["port"]])
    (policy,) = documents(KUBERAY / "base" / "networkpolicy.yaml")
    opened = [rule["ports"] for rule in policy["spec"]["ingress"] if "monitoring" in json.dumps(rule["from"])]
    assert opened == [[{"protocol": "TCP", "port": port} for port in ports]]


def test_the_page_makes_a_prometheus_rule_of_the_alerts():
    (block,) = [b.text for b in blocks(PAGE) if "PrometheusRule" in b.text]
    script = block[block.index("{") :].replace(" | kubectl apply -f -", "")
    made = subprocess.run(["bash", "-euc", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    rule = yaml.safe_load(made)
    assert rule["kind"] == "PrometheusRule"
    fits_its_schema(rule)
    assert rule["spec"]["groups"][0]["rules"] == ALERTS
    (monitor,) = documents(FOLDER / "podmonitor.yaml")
    assert rule["metadata"]["labels"]["release"] == monitor["metadata"]["labels"]["release"]


def test_every_alert_goes_off_when_it_should_and_not_before():
    """By Prometheus' own tool, on the series of `alerts.test.yml`."""
    if shutil.which("promtool") is None:
        pytest.skip("promtool, of Debian's package prometheus, is not installed")
    assert {case["alertname"] for case in _cases()} == {alert["alert"] for alert in ALERTS}
    done = subprocess.run(["promtool", "test", "rules", RULES], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    done = subprocess.run(["promtool", "check", "config", FOLDER / "prometheus.yml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def _cases():
    return [case for test in yaml.safe_load(RULES.read_text())["tests"] for case in test["alert_rule_test"]]
