"""Verdicts and dead letters out of the lakehouse, through the sinks of the stream: what a repair and a replay announce.

All of it may be done twice. Reasons are only ever added, in Postgres and by whoever reads the topics.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

import polars as pl
import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from streaming.contract import DEAD_LETTER_SCHEMA, ORDER_SCHEMA, UTC_MICROSECONDS
from streaming.screening.sinks import Announcer, KafkaSink, standing, store
from streaming.screening.verdicts import GAINED, KINDS, VERDICT_SCHEMA, reason_text

_ORDER_COLUMNS = (*ORDER_SCHEMA.names(), *KINDS.values(), "rules_version", "evidence")

Send = Callable[[pl.DataFrame], "Published"]


@dataclass(frozen=True)
class Sinks:
    """Where to; travels to the workers.

    Attributes:
        dsn: of Postgres.
        kafka: the topics.
        screened_at: the time that the verdicts carry.
    """

    dsn: str
    kafka: KafkaSink
    screened_at: datetime


class Published(NamedTuple):
    """How many were announced, and how many were not since Postgres holds another order under their id."""

    announced: int
    clashes: int


def publish_orders(orders: DataFrame, sinks: Sinks) -> Published:
    """Store orders with their verdicts, and announce what then stands in Postgres.

    Args:
        orders: columns of `contract.ORDER_SCHEMA`, the lists of reasons (`verdicts.KINDS`), `rules_version` and `evidence`.
        sinks: where to.

    Raises:
        PostgresError, KafkaError: through Spark, as text.
    """

    def send(table: pl.DataFrame) -> Published:
        parts = table.partition_by("rules_version", as_dict=True).items()
        sent = [_send_verdicts(as_verdicts(part), str(version), sinks) for (version,), part in parts]
        return Published(sum(one.announced for one in sent), sum(one.clashes for one in sent))

    return on_executors(orders.select(*_ORDER_COLUMNS), send)


def publish_dead_letters(dead_letters: DataFrame, sinks: Sinks) -> Published:
    """Announce dead letters (columns of `contract.DEAD_LETTER_SCHEMA`)."""

    def send(table: pl.DataFrame) -> Published:
        announcer = Announcer(sinks.kafka)
        announcer.dead_letters(table.cast(DEAD_LETTER_SCHEMA))
        announcer.wait()
        return Published(len(table), 0)

    return on_executors(dead_letters.select(*DEAD_LETTER_SCHEMA.names()), send)


def as_verdicts(orders: pl.DataFrame) -> pl.DataFrame:
    """As screening hands them to the sinks (VERDICT_SCHEMA)."""
    texts = {column: pl.Series(map(reason_text, orders[name]), dtype=pl.String) for column, name in KINDS.items()}
    gained = {GAINED[column]: text for column, text in texts.items()}
    orders = orders.with_columns(**texts, **gained, revision=pl.lit(value=False))
    return orders.select(pl.col(name).cast(dtype) for name, dtype in VERDICT_SCHEMA.items())


def _send_verdicts(verdicts: pl.DataFrame, rules_version: str, sinks: Sinks) -> Published:
    stored = store(sinks.dsn, verdicts, rules_version, sinks.screened_at)
    remaining = verdicts.join(stored.clashes, on=["partition", "offset"], how="anti")
    if len(stored.clashes):
        store(sinks.dsn, remaining, rules_version, sinks.screened_at)
    announcer, screened_at = Announcer(sinks.kafka), pl.lit(sinks.screened_at).cast(UTC_MICROSECONDS)
    announcer.verdicts(standing(sinks.dsn, remaining).with_columns(screened_at=screened_at), rules_version)
    announcer.wait()
    return Published(len(remaining), len(stored.clashes))


def on_executors(rows: DataFrame, send: Send) -> Published:
    """Hand rows to `send` where they are, table by table, and add up what it returns. It may get a table twice."""

    def work(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            if batch.num_rows:
                sent = send(pl.from_arrow(batch))  # type: ignore[arg-type]
                yield pa.record_batch({name: pa.array([count], pa.int64()) for name, count in sent._asdict().items()})

    counts = rows.mapInArrow(work, "announced bigint, clashes bigint")
    (total,) = counts.agg(*(F.coalesce(F.sum(name), F.lit(0)) for name in Published._fields)).collect()
    return Published(*total)
