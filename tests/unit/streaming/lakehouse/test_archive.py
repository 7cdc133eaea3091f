"""What the archive needs no JVM for: its lines of progress, its names, and which jobs have Delta."""

import io
import json
from typing import Any

import pytest
from rich.console import Console

from jobs.spark import submit
from jobs.spark.submit import spark_submit
from streaming.lakehouse.archive import ArchiveProgress
from streaming.lakehouse.continuation import AppendId
from streaming.lakehouse.tables import BRONZE_ORDERS, TABLES


def progress(end: int, rows: int, behind: int = 0) -> dict[str, Any]:
    """What Spark says of a micro-batch of two partitions."""
    read, latest = ({"orders": {"0": reached - 1, "1": 1}} for reached in (end, end + behind))
    source = {"endOffset": json.dumps(read), "latestOffset": json.dumps(latest)}
    return {"numInputRows": rows, "sources": [source]}


def test_messages_are_counted_by_offsets_though_not_every_micro_batch_is_seen() -> None:
    output = io.StringIO()
    shown = ArchiveProgress(BRONZE_ORDERS, Console(file=output, width=200))
    shown.show(None)
    shown.show(progress(1_100, rows=100))
    shown.show(progress(5_000, rows=10), finished=True)
    assert output.getvalue() == "done  bronze/orders: 4,000 messages | lag 0\n"


def test_the_end_is_told_though_nothing_came() -> None:
    output = io.StringIO()
    ArchiveProgress(BRONZE_ORDERS, Console(file=output)).show(None, finished=True)
    assert output.getvalue() == "done  bronze/orders: 0 messages\n"


def test_an_append_id_is_read_back_from_its_text() -> None:
    one = AppendId("orders", "Bx7-_w", "6f1c")
    assert AppendId.parse(str(one)) == one


def test_tables_lie_below_the_lakehouse_however_it_is_spelled() -> None:
    assert [table.path("gs://b/lake/") for table in TABLES] == [
        "gs://b/lake/bronze/orders",
        "gs://b/lake/silver/orders",
        "gs://b/lake/quarantine/orders",
    ]


def test_only_a_job_that_asks_for_it_has_delta_in_its_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "spark_jars", list)
    archive = spark_submit("archive_orders", [], master="local[2]", memory="1g", conf=[], delta=True)
    screen = spark_submit("screen_orders", [], master="local[2]", memory="1g", conf=[])
    assert any("DeltaSparkSessionExtension" in word for word in archive)
    assert not any("delta" in word.lower() for word in screen)
