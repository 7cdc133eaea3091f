"""How streaming queries are stopped."""

import time
from pathlib import Path
from threading import Event
from typing import Any
from unittest.mock import create_autospec

import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.streaming import StreamingQuery

from jobs.spark.streaming_job import Query, run_until_stopped
from streaming.screening.metrics import QueryMetrics


class Silent:
    """Tells nobody."""

    def show(self, progress: Any, *, finished: bool = False) -> None: ...


def test_a_micro_batch_that_has_begun_is_finished_however_slow_the_stop_is(
    spark_session: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = StreamingQuery.stop

    def slow_stop(query: StreamingQuery) -> None:
        time.sleep(0.5)  # meanwhile the next micro-batch is due
        usual(query)

    monkeypatch.setattr(StreamingQuery, "stop", slow_stop)
    begun, finished, asked = [], [], Event()

    def work(rows: DataFrame, number: int) -> None:
        begun.append(number)
        if number == 1:
            asked.set()
        rows.selectExpr("java_method('java.lang.Thread', 'sleep', 200L)").collect()
        finished.append(number)

    source = spark_session.readStream.format("rate-micro-batch").option("rowsPerBatch", 1).load()
    writer = (
        source.writeStream.queryName("busy").option("checkpointLocation", str(tmp_path)).trigger(processingTime="0 seconds")
    )
    run_until_stopped([Query(writer, work, Silent())], create_autospec(QueryMetrics, instance=True), asked)
    assert begun == finished == [0, 1]
