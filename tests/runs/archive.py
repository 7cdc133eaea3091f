"""Running the real `finpro archive` and `finpro maintain`, and reading the lakehouse back."""

import json
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
from pyspark.sql import SparkSession

from batch.postgres import connect
from conf.settings import Settings
from streaming.kafka import ORDERS, ORDERS_DEAD_LETTER
from streaming.lakehouse.tables import SILVER, bronze_orders, quarantine_orders, silver_orders
from tests.runs.commands import FINPRO, finpro
from tests.runs.screening import consume, sender


@dataclass(frozen=True)
class Given:
    """A verdict as it is sent: which order, with what reasons, by which rules."""

    order: int
    reasons: Sequence[str] = ()
    shadow_reasons: Sequence[str] | None = None
    suppressed_reasons: Sequence[str] = ()
    version: str = "1"
    second: int = 0

    def encoded(self) -> bytes:
        """As the bytes of a message on `processed_orders`."""
        hours = timedelta(hours=self.order)
        moment = (datetime(2026, 11, 21, 22, 0, 0, 1, tzinfo=UTC) + hours).isoformat(timespec="microseconds")
        others = {} if self.shadow_reasons is None else {"shadow_reasons": self.shadow_reasons}
        others |= {"suppressed_reasons": self.suppressed_reasons} if self.suppressed_reasons else {}
        fields = {
            "order_id": f"o{self.order}",
            "user_id": 2**62,
            "product_id": 2,
            "quantity": 3,
            "amount": "Rp.1.000",
            "amount_numeric": 1_000,
            "country": "ID",
            "created_date": moment,
            "event_ts": moment,
            "status": "Fraud" if self.reasons else "Genuine",
            "source": "web",
            "reasons": self.reasons,
            "rules_version": self.version,
            "screened_at": f"2026-11-22T10:00:{self.second:02}.000001+00:00",
        }
        return json.dumps(fields | others).encode()


def archive_all(**environment: str) -> None:
    """Archive what is there, with small micro-batches."""
    finished = finpro("archive", "--available-now", "--max-offsets-per-trigger", "1500", **environment)
    assert finished.returncode == 0, finished.stderr


def start_archive(*options: str) -> subprocess.Popen[str]:
    """Start `finpro archive` in a process group of its own."""
    return subprocess.Popen(
        [FINPRO, "archive", *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def committed(path: str) -> int:
    """How many commits a Delta table on this machine has seen."""
    return len(list(Path(path, "_delta_log").glob("*[0-9].json")))


def wait_until(true: Callable[[], bool], seconds: float = 240) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not so after {seconds:.0f} s"
        time.sleep(0.05)


def rows(spark: SparkSession, path: str, version: int | None = None) -> pl.DataFrame:
    """What a Delta table holds, now or in a version."""
    reader = spark.read.format("delta")
    reader = reader if version is None else reader.option("versionAsOf", version)
    return pl.DataFrame(reader.load(path).toArrow())


def send_messages(settings: Settings, topic: str, messages: list[dict[str, Any]]) -> None:
    """Put messages on a topic, given as what confluent-kafka's `produce` takes."""
    producer = sender(settings)
    for message in messages:
        producer.produce(settings.topic(topic), **message)
    assert producer.flush(60) == 0


def messages_of(settings: Settings, topic: str = ORDERS) -> list[tuple[Any, ...]]:
    """A topic as `as_messages` gives bronze."""
    return [
        (
            record.topic(),
            record.partition(),
            record.offset(),
            datetime.fromtimestamp(record.timestamp()[1] / 1000, UTC),
            record.timestamp()[0] - 1,  # the client counts from 1
            record.key(),
            record.value(),
            record.headers(),
        )
        for record in consume(settings, topic)
    ]


def as_messages(bronze: pl.DataFrame) -> list[tuple[Any, ...]]:
    """Bronze in the order of the topic: topic, partition, offset, time, its type, key, value, headers."""
    bronze = bronze.sort("topic", "partition", "offset")
    headers = [each and [(header["key"], header["value"]) for header in each] for each in bronze["headers"].to_list()]
    columns = bronze.select("topic", "partition", "offset", "timestamp", "timestamp_type", "key", "value").rows()
    return [(*row, each) for row, each in zip(columns, headers, strict=True)]


def raw_orders(settings: Settings) -> list[dict[str, Any]]:
    """`raw_orders` as silver has it."""
    columns = [name for name in SILVER.names if name != "event_date"]
    with connect(settings.require("postgres_dsn")) as connection, connection.cursor() as cursor:
        cursor.execute(f"select {', '.join(columns)} from raw_orders order by order_id")
        return [dict(zip(columns, row, strict=True)) for row in cursor.fetchall()]


def dead_letters(settings: Settings) -> set[tuple[Any, ...]]:
    """What `orders_dead_letter` says, as quarantine has it."""
    dead_letters = [(dict(record.headers()), record.value()) for record in consume(settings, ORDERS_DEAD_LETTER)]
    return {
        (
            headers["topic"].decode(),
            int(headers["partition"]),
            int(headers["offset"]),
            datetime.fromisoformat(headers["received_at"].decode()),
            value,
            headers["reason"].decode(),
        )
        for headers, value in dead_letters
    }


def assert_lakehouse_agrees(spark: SparkSession, settings: Settings) -> None:
    """Bronze is the topic, silver is `raw_orders`, quarantine is the dead letters; and each row lies in its day."""
    bronze, silver, quarantine = (
        rows(spark, path(settings.lakehouse)) for path in (bronze_orders, silver_orders, quarantine_orders)
    )
    assert as_messages(bronze) == messages_of(settings)
    assert silver.drop("event_date").sort("order_id").to_dicts() == raw_orders(settings)
    quarantined = quarantine.drop("received_date").rows()
    assert set(quarantined) == dead_letters(settings)
    assert len(quarantined) == len(set(quarantined))
    for frame, day, moment in (
        (bronze, "received_date", "timestamp"),
        (silver, "event_date", "event_ts"),
        (quarantine, "received_date", "received_at"),
    ):
        assert (frame[day] == frame[moment].dt.date()).all()
