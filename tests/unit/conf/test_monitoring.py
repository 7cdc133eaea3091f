"""Alerts, dashboards and runbook agree with each other, and with what the jobs' endpoint really shows."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml  # type: ignore[import-untyped]
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from prometheus_client import CollectorRegistry

from conf.settings import CONF_DIR, project_root
from jobs.health.textfile import HealthMetrics
from jobs.spark.running_job import METRICS_PORTS
from streaming.screening.metrics import QueryMetrics, ScreeningMetrics

MONITORING = CONF_DIR / "monitoring"
DASHBOARDS = sorted((MONITORING / "grafana" / "dashboards").glob("*.json"))
ALERTS_TEST = project_root() / "tests" / "alerts_test.yml"
# What Prometheus and its client library add by themselves.
FROM_PROMETHEUS = {"up", "process_start_time_seconds", "process_resident_memory_bytes"}
READ_BY_STATUS = {"finpro_query_input_rows_per_second"}
TARGET_LABELS = {"job", "instance", "service"}


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def shown() -> dict[str, set[str]]:
    """The series that the endpoint of a streaming job, or the file of the status command, can show, each with its labels."""
    registry = CollectorRegistry()
    QueryMetrics(registry)
    ScreeningMetrics(registry)
    HealthMetrics(registry)
    series: dict[str, set[str]] = {}
    for collector in list(registry._collector_to_names):
        for family in collector.collect():
            labels = set(getattr(collector, "_labelnames", ())) or {name for one in family.samples for name in one.labels}
            suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(family.type, [""])
            series |= {family.name + suffix: labels | ({"le"} if suffix == "_bucket" else set()) for suffix in suffixes}
    return series | {name: set() for name in FROM_PROMETHEUS}


def queried(value: Any) -> Iterator[str]:
    """The queries in a dashboard: of its panels, annotations and variables."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "expr":
                yield inner
            elif key == "query" and isinstance(inner, str) and (listed := re.fullmatch(r"label_values\((.+), \w+\)", inner)):
                yield listed[1]
            else:
                yield from queried(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from queried(inner)


EXPRESSIONS = {f"alert {rule['alert']}": rule["expr"] for rule in alerts()} | {
    f"{path.stem} {number}": expression
    for path in DASHBOARDS
    for number, expression in enumerate(queried(json.loads(path.read_text())))
}


def selectors(expression: str) -> list[promql_parser.VectorSelector]:
    """The series that an expression selects; dashboards leave the interval to Grafana."""
    found: list[promql_parser.VectorSelector] = []

    def visit(node: promql_parser.Expr) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node)

    promql_parser.walk(promql_parser.parse(expression.replace("$__rate_interval", "1m")), visit)
    return found


@pytest.mark.parametrize("expression", EXPRESSIONS.values(), ids=EXPRESSIONS.keys())
def test_every_query_is_promql_over_series_and_labels_that_a_job_shows(expression: str) -> None:
    series = shown()

    chosen = selectors(expression)

    assert chosen
    for selector in chosen:
        assert selector.name in series
        assert {matcher.name for matcher in selector.matchers.matchers} <= series[selector.name] | TARGET_LABELS


@pytest.mark.parametrize("rule", alerts(), ids=lambda rule: rule["alert"])
def test_every_alert_says_how_urgent_it_is_and_leads_to_its_section_of_the_runbook(rule: dict[str, Any]) -> None:
    page, anchor = rule["annotations"]["runbook"].split("#")
    sections = re.findall(r"^#+ (.+)$", Path(project_root(), page).read_text(), re.MULTILINE)

    assert rule["labels"]["severity"] in {"page", "ticket"}
    assert rule["annotations"]["summary"]
    assert anchor == rule["alert"].lower()
    assert rule["alert"] in sections


def test_every_metric_is_watched_by_a_dashboard_an_alert_or_the_status_command() -> None:
    watched = {selector.name for expression in EXPRESSIONS.values() for selector in selectors(expression)} | READ_BY_STATUS

    assert {family(name) for name in shown()} == {family(name) for name in watched if name}


def family(series: str) -> str:
    """A histogram's series are one metric."""
    return re.sub(r"_(bucket|sum|count)$", "", series)


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_grafana_s_own_schema_knows_every_field_of_a_dashboard(path: Path) -> None:
    register_default_plugins()
    written = json.loads(path.read_text())

    read = json.loads(JSONEncoder().encode(Dashboard.from_json(written)))

    assert list(lost(written, read)) == []


def lost(written: Any, read: Any, where: str = "") -> Iterator[str]:
    """The fields that are not there any more, or have another value, once the schema's types have read them."""
    if isinstance(written, dict) and isinstance(read, dict):
        for key, value in written.items():
            yield from lost(value, read.get(key), f"{where}.{key}")
    elif isinstance(written, list) and isinstance(read, list) and len(written) == len(read):
        for number, value in enumerate(written):
            yield from lost(value, read[number], f"{where}[{number}]")
    elif written != read:
        yield where


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_every_panel_reads_the_provisioned_data_source_and_says_what_it_shows(path: Path) -> None:
    provisioned = yaml.safe_load((MONITORING / "grafana/provisioning/datasources/prometheus.yml").read_text())
    uids = {source["uid"] for source in provisioned["datasources"]}
    panels = [panel for panel in json.loads(path.read_text())["panels"] if panel["type"] != "row"]

    assert {panel["datasource"]["uid"] for panel in panels} == uids
    assert [panel["title"] for panel in panels if not panel["description"]] == []
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_prometheus_looks_for_each_job_at_its_port() -> None:
    targets = yaml.safe_load((MONITORING / "targets" / "jobs.yml").read_text())

    found = {entry["labels"]["service"]: int(entry["targets"][0].split(":")[1]) for entry in targets}

    assert found == METRICS_PORTS


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: apt install prometheus)")
@pytest.mark.parametrize(
    "command",
    [["check", "config", str(MONITORING / "prometheus.yml")], ["test", "rules", str(ALERTS_TEST)]],
    ids=["its configuration", "what each alert fires on, and what not"],
)
def test_prometheus_s_own_tool_accepts(command: list[str]) -> None:
    done = subprocess.run(["promtool", *command], capture_output=True, text=True, timeout=60)

    assert done.returncode == 0, done.stdout + done.stderr
