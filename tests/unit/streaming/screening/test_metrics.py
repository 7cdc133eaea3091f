"""What a streaming job's metrics say, and that they can fail nothing."""

import json
import logging
import socket
from pathlib import Path
from typing import Any

import pytest
import requests
from prometheus_client import CollectorRegistry

from conf.settings import Settings
from jobs.spark.running_job import METRICS_PORTS, find_job, made_known
from streaming.screening.metrics import QueryMetrics, ScreeningMetrics
from streaming.screening.receipts import LATENCY_BOUNDS_SECONDS, BucketState, Receipt

NONE_MEASURED = [0] * (len(LATENCY_BOUNDS_SECONDS) + 1)


def receipt(**fields: Any) -> Receipt:
    nothing: dict[str, Any] = dict.fromkeys(
        ("orders", "genuine", "revisions", "frauds", "duplicates", "late", "dead_letters"), 0
    )
    defaults = {"rules_version": "1", "by_reason": {}, "shadow_by_reason": {}, "buckets": [BucketState(0, 0, 0, -1)]}
    latencies = {"event_latency": NONE_MEASURED, "kafka_latency": NONE_MEASURED}
    return Receipt(**nothing | defaults | latencies | fields)


def progress_of(query: str, *, read: dict[str, int], latest: dict[str, int], **durations: int) -> dict[str, Any]:
    """As much of Spark's progress as is used; offsets of the one topic by partition, durations in milliseconds."""
    return {
        "name": query,
        "numInputRows": sum(read.values()),
        "inputRowsPerSecond": 12.5,
        "durationMs": durations,
        "sources": [{"endOffset": json.dumps({"orders": read}), "latestOffset": json.dumps({"orders": latest})}],
    }


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def test_receipts_of_all_buckets_and_batches_add_up(registry: CollectorRegistry) -> None:
    metrics = ScreeningMetrics(registry)

    metrics.settled([receipt(orders=3, genuine=2, frauds=1, by_reason={"night_amount": 1}), receipt(orders=1, genuine=1)])
    metrics.settled([receipt(orders=2, genuine=2, late=1, shadow_by_reason={"night_amount": 2})])
    metrics.settled([receipt(suppressed_by_reason={"night_amount": 4})])

    assert registry.get_sample_value("finpro_orders_total") == 6
    assert registry.get_sample_value("finpro_verdicts_total", {"status": "Genuine"}) == 5
    assert registry.get_sample_value("finpro_verdicts_total", {"status": "Fraud"}) == 1
    assert registry.get_sample_value("finpro_fraud_reasons_total", {"reason": "night_amount"}) == 1
    assert registry.get_sample_value("finpro_shadow_reasons_total", {"reason": "night_amount"}) == 2
    assert registry.get_sample_value("finpro_suppressed_reasons_total", {"reason": "night_amount"}) == 4
    assert registry.get_sample_value("finpro_late_orders_total") == 1


def test_state_is_that_of_all_buckets_after_their_last_micro_batch(registry: CollectorRegistry) -> None:
    metrics = ScreeningMetrics(registry)

    metrics.settled([receipt(buckets=[BucketState(0, 100, 1000, 7_000_000), BucketState(1, 1, 10, 7_000_000)])])
    metrics.settled([receipt(buckets=[BucketState(0, 5, 50, 9_000_000)]), receipt(buckets=[BucketState(2, 6, 0, 8_000_000)])])

    assert registry.get_sample_value("finpro_state_orders") == 12
    assert registry.get_sample_value("finpro_state_bytes") == 60
    assert registry.get_sample_value("finpro_watermark_timestamp_seconds") == 8


def test_latency_is_a_cumulative_histogram_of_what_the_receipts_counted(registry: CollectorRegistry) -> None:
    metrics = ScreeningMetrics(registry)
    counts = [1, 2, *NONE_MEASURED[3:], 4]

    metrics.settled([receipt(kafka_latency=counts, kafka_latency_seconds=1200.5)])
    metrics.settled([receipt(kafka_latency=counts, kafka_latency_seconds=0.5)])

    def bucket(bound: str) -> float | None:
        return registry.get_sample_value("finpro_order_latency_seconds_bucket", {"since": "kafka", "le": bound})

    assert (bucket("0.1"), bucket("0.25"), bucket("300.0"), bucket("+Inf")) == (2, 6, 6, 14)
    assert registry.get_sample_value("finpro_order_latency_seconds_sum", {"since": "kafka"}) == 1201
    assert registry.get_sample_value("finpro_order_latency_seconds_count", {"since": "event"}) == 0


def test_one_version_of_the_rules_is_in_force_and_a_refused_file_shows_until_one_is_taken_up(
    registry: CollectorRegistry,
) -> None:
    metrics = ScreeningMetrics(registry)

    def version(name: str) -> float | None:
        return registry.get_sample_value("finpro_rules_info", {"version": name})

    metrics.settled([receipt(rules_version="1")])
    metrics.rules_refused("1", "not TOML")
    assert (version("1"), registry.get_sample_value("finpro_rules_refused")) == (1, 1)

    metrics.rules_taken_up("2")
    assert (version("1"), version("2"), registry.get_sample_value("finpro_rules_refused")) == (None, 1, 0)


def test_lag_is_what_kafka_has_beyond_the_micro_batch_and_nothing_once_a_query_is_idle(registry: CollectorRegistry) -> None:
    metrics = QueryMetrics(registry)
    metrics.started("screen_orders")

    def lag() -> float | None:
        return registry.get_sample_value("finpro_query_lag_messages", {"query": "screen_orders"})

    read, latest = {"0": 10, "1": 20}, {"0": 15, "1": 20, "2": 3}
    metrics.progressed(progress_of("screen_orders", read=read, latest=latest, triggerExecution=500, addBatch=400))
    assert lag() == 8

    metrics.idle("screen_orders")
    assert lag() == 0


def test_an_idle_query_is_heard_of_but_has_ended_no_micro_batch(
    registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = QueryMetrics(registry)

    def at(name: str) -> float | None:
        return registry.get_sample_value(f"finpro_query_{name}_timestamp_seconds", {"query": "q"})

    monkeypatch.setattr("time.time", lambda: 100.0)
    metrics.started("q")
    metrics.progressed(progress_of("q", read={}, latest={}, triggerExecution=1))
    monkeypatch.setattr("time.time", lambda: 200.0)
    metrics.idle("q")

    assert (at("heartbeat"), at("last_batch")) == (200, 100)


def test_phases_add_up_and_the_whole_is_not_one_of_them(registry: CollectorRegistry) -> None:
    metrics = QueryMetrics(registry)

    for _ in range(2):
        metrics.progressed(progress_of("q", read={}, latest={}, triggerExecution=500, addBatch=400, walCommit=50))

    phases = {
        sample.labels["phase"]: sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == "finpro_query_phase_seconds_total"
    }
    assert phases == {"addBatch": 0.8, "walCommit": 0.1}
    assert registry.get_sample_value("finpro_query_batch_seconds_sum", {"query": "q"}) == 1


def test_a_query_that_failed_is_not_active_and_counted(registry: CollectorRegistry) -> None:
    metrics = QueryMetrics(registry)

    metrics.started("good")
    metrics.started("bad")
    metrics.ended("good", failed=False)
    metrics.ended("bad", failed=True)

    assert registry.get_sample_value("finpro_query_active", {"query": "good"}) == 0
    assert registry.get_sample_value("finpro_query_failures_total", {"query": "good"}) == 0
    assert registry.get_sample_value("finpro_query_failures_total", {"query": "bad"}) == 1


def test_what_the_metrics_cannot_understand_is_logged_and_stops_nothing(
    registry: CollectorRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        QueryMetrics(registry).progressed({"name": "nonsense"})
        ScreeningMetrics(registry).settled(["nonsense"])  # type: ignore[list-item]

    assert [record.message for record in caplog.records] == [
        "metrics are incomplete: progressed failed",
        "metrics are incomplete: settled failed",
    ]


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FINPRO_HOME", str(tmp_path))
    return tmp_path


def test_a_running_job_is_found_with_its_metrics_and_gone_afterwards(own_home: Path, registry: CollectorRegistry) -> None:
    ScreeningMetrics(registry).settled([receipt(orders=3)])

    with made_known("screen", registry, Settings(metrics_port=0)):
        job = find_job("screen")
        assert job
        assert job.metrics_url
        assert "finpro_orders_total 3.0" in requests.get(job.metrics_url, timeout=5).text
        assert (own_home / "run" / "screen.json").stat().st_mode & 0o077 == 0
        assert find_job("archive") is None

    assert find_job("screen") is None
    assert list((own_home / "run").iterdir()) == []


def test_a_record_that_a_killed_job_left_behind_is_no_job(own_home: Path, registry: CollectorRegistry) -> None:
    with made_known("screen", registry, Settings(metrics_port=0)):
        left_behind = (own_home / "run" / "screen.json").read_text()
    (own_home / "run" / "screen.json").write_text(left_behind.replace('"create_time": 1', '"create_time": 9'))

    assert find_job("screen") is None


def test_a_taken_port_is_said_and_another_one_used(
    own_home: Path, registry: CollectorRegistry, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FINPRO_METRICS_PORT")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setitem(METRICS_PORTS, "screen", port)
        with made_known("screen", registry, Settings()):
            job = find_job("screen")

    assert job
    assert job.metrics_url
    assert f":{port}/" not in job.metrics_url
    assert f"metrics are at {job.metrics_url} instead" in capsys.readouterr().err


def test_a_job_that_can_serve_no_metrics_runs_all_the_same(
    own_home: Path, registry: CollectorRegistry, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = Settings(metrics_host="192.0.2.1")  # an address that is no machine's

    with made_known("screen", registry, nowhere):
        job = find_job("screen")

    assert job
    assert job.metrics_url is None
    assert "metrics cannot be served at 192.0.2.1" in capsys.readouterr().err
