"""The metrics of a real `finpro screen`, against what it stored; and what `finpro status` says of it, alive and killed."""

import json
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from batch.postgres import connect
from conf.former_rules import SIX
from conf.rules import load_rules
from conf.settings import Settings
from jobs.spark.running_job import find_job
from tests.runs.commands import FINPRO
from tests.runs.screening import by_product, dense_orders, kill_group, repeated, send, start_screen

ORDERS = 400
PATIENCE_SECONDS = 120

Series = dict[tuple[str, ...], float]


def shown() -> Series:
    """What the job's endpoint shows: a name and the values of its labels → the value."""
    job = find_job("screen")
    if job is None or job.metrics_url is None:
        return {}
    text = requests.get(job.metrics_url, timeout=5).text
    families = text_string_to_metric_families(text)
    return {(sample.name, *sample.labels.values()): sample.value for family in families for sample in family.samples}


def wait_until(holds: Callable[[Series], bool]) -> Series:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not holds(series := shown()):
        assert time.monotonic() < deadline, series
        time.sleep(0.3)
    return series


def status() -> tuple[int, dict[str, dict[str, Any]]]:
    """`finpro status --json`: the exit code, and what it says of each part."""
    done = subprocess.run([FINPRO, "status", "--json"], capture_output=True, text=True, timeout=120)
    return done.returncode, {part["part"]: part for part in json.loads(done.stdout)["parts"]}


@pytest.fixture
def screening(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[str]]:
    """A running `finpro screen` that has orders to screen, some of them twice, and two messages that are none."""
    monkeypatch.setenv("FINPRO_METRICS_PORT", "0")
    rules = load_rules(settings.rules)
    start = datetime.now(UTC) - timedelta(hours=1)
    orders = dense_orders(ORDERS, rules, seed=6, start=start, step=timedelta(seconds=1))
    send(settings, [*repeated(orders, seed=6), (b"not JSON", 0), (None, 1)])
    process = start_screen("--trigger", "0 seconds")
    yield process
    if process.poll() is None:
        kill_group(process)


def stored(settings: Settings) -> list[tuple[str, list[str]]]:
    with connect(settings.require("postgres_dsn")) as connection, connection.cursor() as cursor:
        cursor.execute("select status, reasons from raw_orders")
        return cursor.fetchall()


def test_metrics_agree_with_what_is_stored_and_status_with_the_job(
    settings: Settings, screening: subprocess.Popen[str]
) -> None:
    messages = ORDERS + ORDERS // 20 + 2
    series = wait_until(lambda now: now.get(("finpro_query_input_rows_total", "screen_orders"), 0) >= messages)

    rows = stored(settings)
    reasons = Counter(reason for _, given in rows for reason in given)
    assert series["finpro_orders_total",] == len(rows) == ORDERS
    assert series["finpro_verdicts_total", "Fraud"] == sum(status == "Fraud" for status, _ in rows)
    assert {reason: series["finpro_fraud_reasons_total", reason] for reason in SIX} == {
        reason: reasons[reason] for reason in SIX
    }
    assert series["finpro_query_input_rows_total", "screen_orders"] == messages
    assert series["finpro_duplicates_total",] + series["finpro_dead_letters_total",] == messages - ORDERS
    assert series["finpro_order_latency_seconds_count", "kafka"] == ORDERS
    assert series["finpro_screening_step_seconds_sum", "store"] > 0
    assert series["finpro_state_orders",] > 0
    assert series["finpro_rules_info", load_rules(settings.rules).version] == 1

    idle = wait_until(
        lambda now: (
            now["finpro_query_heartbeat_timestamp_seconds", "screen_orders"]
            > series["finpro_query_heartbeat_timestamp_seconds", "screen_orders"]
        )
    )
    last_batch = "finpro_query_last_batch_timestamp_seconds", "screen_orders"
    assert idle[last_batch] == series[last_batch], "a query that is idle says so, without a micro-batch"

    exit_code, parts = status()
    assert parts["screen"]["state"] == "ok"
    assert ", 0 messages wait" in parts["screen"]["text"]
    assert (exit_code, parts["Kafka"]["state"], parts["Postgres"]["state"]) == (0, "ok", "ok")

    kill_group(screening)
    send(settings, by_product(dense_orders(7, load_rules(settings.rules), seed=7, start=datetime.now(UTC), step=timedelta(0))))
    exit_code, parts = status()
    assert find_job("screen") is None
    assert "7 messages wait" in parts["screen"]["text"]
