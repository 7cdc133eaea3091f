"""What finpro asks of Spark beyond its public API, on a real Spark."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pyarrow as pa
import pytest
from py4j.clientserver import JavaClient
from pyspark.sql import SparkSession
from pyspark.sql.types import LongType, StructField, StructType

from streaming.jvm import ArrowStage

SUMS = StructType([StructField("sum", LongType())])


def summed(times: int, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    numbers = [number for batch in batches for column in batch.columns for number in column.to_pylist()]
    yield pa.record_batch({"sum": pa.array([times * sum(numbers)], pa.int64())})


def test_a_stage_is_what_map_in_arrow_is_and_goes_to_the_jvm_once_for_many_plans(
    spark_session: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[str] = []
    send = JavaClient.send_command

    def counted(client: JavaClient, command: str, *others: Any, **named: Any) -> Any:
        sent.append(command)
        return send(client, command, *others, **named)

    monkeypatch.setattr(JavaClient, "send_command", counted)
    stage, calls = ArrowStage(partial(summed, 3), SUMS), []
    for rows in (spark_session.range(1, 5, 1, 1), spark_session.range(5, 9, 1, 1)):
        usual = rows.mapInArrow(partial(summed, 3), SUMS).collect()
        sent.clear()
        made = stage.over(rows, "id")
        calls.append(len(sent))
        assert made.collect() == usual
    assert calls[0] > 10
    assert calls[1] == 1  # which makes the plan
