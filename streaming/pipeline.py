"""Screening on Spark: Kafka messages → chunks of orders → a bucket's state → verdicts, and their settlement.

    parse (mapInArrow, one task a Kafka partition) ─ shuffle by bucket ─> screen and stage (state) ─> merge ─> announce

Orders are bucketed by product, because all neighbours of an order share its product. Spark carries one row per task and
bucket, not one per order: see `chunks`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from pyspark.sql.streaming.state import GroupState, GroupStateTimeout

from conf.rules import FraudRules
from streaming.chunks import (
    Arrivals,
    PartitionRead,
    Recent,
    Verdicts,
    bucket_keys,
    pack,
    pack_table,
    unpack,
    unpack_table,
)
from streaming.contract import (
    DEAD_LETTER_SCHEMA,
    MESSAGE_COLUMNS,
    ORDER_SCHEMA,
    dead_letters,
    read_messages,
)
from streaming.rules import REASONS
from streaming.screening import RECENT_SCHEMA, Frontier, advance, evict, screen
from streaming.sinks import KafkaSink, OrderStore, announce, conflicts_between, stage

CHUNK = "bucket int, event_time timestamp, payload binary"
RECENT = "payload binary"
SETTLEMENT = "receipt string, payload binary"


@dataclass(frozen=True)
class Screening:
    """What every part of the query needs to know; travels to the workers.

    Attributes:
        rules: the thresholds in force.
        buckets: into how many parts products are divided: the most tasks that can screen side by side.
        backlog_offsets: the query's limit of offsets a micro-batch, None where it has none.
        dsn: of Postgres.
        kafka: the sink.
    """

    rules: FraudRules
    buckets: int
    backlog_offsets: int | None
    dsn: str
    kafka: KafkaSink


class Receipt(msgspec.Struct, frozen=True):
    """What one bucket made of one micro-batch, in numbers. Times are epoch microseconds."""

    tag: str
    screened_at_us: int
    orders: int
    revisions: int
    frauds: int
    by_reason: dict[str, int]
    duplicates: int
    late: int
    dead_letters: int
    kept: int
    watermark_us: int


def screened(messages: DataFrame, screening: Screening) -> DataFrame:
    """The screening query over Kafka messages (`contract.MESSAGE_COLUMNS`): one row (SETTLEMENT) a bucket and micro-batch.

    The watermark that Spark is told trails the newest event of all partitions; the buckets keep their own, which also
    waits for partitions that a backlog has left behind (`screening.advance`), and evict by that one. Spark therefore
    must not drop rows by its own: no event-time timeout is set.
    """
    return (
        messages.select(*MESSAGE_COLUMNS)
        .mapInArrow(_parse(screening), CHUNK)
        .withWatermark(
            "event_time",
            f"{round(screening.rules.lateness.total_seconds() * 1000)} milliseconds",
        )
        .groupBy("bucket")
        .applyInPandasWithState(
            _screen_bucket(screening),
            SETTLEMENT,
            RECENT,
            "append",
            GroupStateTimeout.NoTimeout,
        )
    )


def _parse(
    screening: Screening,
) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    keys = np.array(bucket_keys(screening.buckets), np.int32)

    def parse(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for messages in batches:
            if messages.num_rows:
                yield _chunks(messages, screening, keys)

    return parse


def _chunks(messages: pa.RecordBatch, screening: Screening, keys: Any) -> pa.RecordBatch:
    """Messages of one partition as one chunk a bucket; dead letters go with the first."""
    orders, letters = _without_conflicts(messages, screening)
    offsets = messages.column("offset")
    newest = orders["event_ts"].max()
    read = PartitionRead(
        partition=messages.column("partition")[0].as_py(),
        first_offset=offsets[0].as_py(),
        last_offset=offsets[-1].as_py(),
        newest_us=None if newest is None else orders["event_ts"].to_physical().max(),  # type: ignore[arg-type]
    )
    bucket = orders["product_id"] % screening.buckets
    payloads = [
        pack(
            Arrivals(
                read,
                pack_table(orders.filter(bucket == number)),
                pack_table(letters) if number == 0 else b"",
            )
        )
        for number in range(screening.buckets)
    ]
    event_time = pa.array([newest] * screening.buckets, pa.timestamp("us", "UTC"))
    return pa.record_batch(
        {
            "bucket": pa.array(keys),
            "event_time": event_time,
            "payload": pa.array(payloads, pa.binary()),
        }
    )


def _without_conflicts(messages: pa.RecordBatch, screening: Screening) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Orders and dead letters; messages that were found to use another order's id are among the latter."""
    orders, letters = read_messages(messages, screening.rules.max_future_skew)
    offsets = messages.column("offset")
    topic, partition = (
        messages.column("topic")[0].as_py(),
        messages.column("partition")[0].as_py(),
    )
    conflicts = conflicts_between(screening.dsn, topic, partition, offsets[0].as_py(), offsets[-1].as_py())
    if not conflicts:
        return orders, letters
    rows = {offsets.index(offset).as_py(): order_id for offset, order_id in conflicts.items()}
    reasons = {row: f"order_id {order_id} is used by another order, received before" for row, order_id in rows.items()}
    aside = dead_letters(messages, reasons)
    return orders.filter(~pl.col("offset").is_in(list(conflicts))), pl.concat([letters, aside])


def _screen_bucket(
    screening: Screening,
) -> Callable[[Any, Iterator[pd.DataFrame], GroupState], Iterator[pd.DataFrame]]:
    def screen_bucket(key: Any, chunks: Iterator[pd.DataFrame], state: GroupState) -> Iterator[pd.DataFrame]:
        arrivals = [unpack(payload, Arrivals) for chunk in chunks for payload in chunk["payload"]]
        recent = unpack(state.get[0], Recent) if state.exists else None
        receipt, verdicts, remaining = _screen_arrivals(screening, arrivals, recent, state.getCurrentProcessingTimeMs())
        state.update((pack(remaining),))
        yield pd.DataFrame(
            {
                "receipt": [msgspec.json.encode(receipt).decode()],
                "payload": [pack(verdicts)],
            }
        )

    return screen_bucket


def _screen_arrivals(
    screening: Screening,
    arrivals: list[Arrivals],
    recent: Recent | None,
    batch_time_ms: int,
) -> tuple[Receipt, Verdicts, Recent]:
    """One bucket's part of a micro-batch: verdicts staged in Postgres, and what to remember."""
    rules = screening.rules
    arrivals.sort(key=lambda chunk: (chunk.read.partition, chunk.read.first_offset))  # shuffles come in any order
    orders = pl.concat(
        [
            pl.DataFrame(schema=ORDER_SCHEMA),
            *(unpack_table(chunk.orders, ORDER_SCHEMA) for chunk in arrivals),
        ]
    )
    orders = orders.sort("received_at", "partition", "offset")
    before = Frontier(recent.newest_us, recent.watermark_us) if recent else Frontier()
    after = advance(
        before,
        [chunk.read for chunk in arrivals],
        rules.lateness,
        screening.backlog_offsets,
    )
    outcome = screen(unpack_table(recent.orders if recent else b"", RECENT_SCHEMA), orders, rules)
    remaining = evict(outcome.recent, after.watermark_us, rules.widest_window)
    letters = [unpack_table(chunk.dead_letters, DEAD_LETTER_SCHEMA) for chunk in arrivals if chunk.dead_letters]
    verdicts = outcome.verdicts
    tag = stage(screening.dsn, verdicts)
    revisions = int(verdicts["revision"].sum())
    receipt = Receipt(
        tag=tag,
        screened_at_us=batch_time_ms * 1000,
        orders=len(verdicts) - revisions,
        revisions=revisions,
        frauds=int((verdicts["gained"] == verdicts["given"]).filter(verdicts["given"] > 0).sum()),
        by_reason={reason: int((verdicts["gained"] & (1 << bit) > 0).sum()) for bit, reason in enumerate(REASONS)},
        duplicates=outcome.duplicates,
        late=int((orders["event_ts"].to_physical() < before.watermark_us).sum()),
        dead_letters=sum(map(len, letters)),
        kept=len(remaining),
        watermark_us=after.watermark_us,
    )
    return (
        receipt,
        Verdicts(
            tag,
            receipt.screened_at_us,
            pack_table(verdicts),
            pack_table(pl.concat(letters)) if letters else b"",
        ),
        Recent(after.newest_us, after.watermark_us, pack_table(remaining)),
    )


@dataclass
class Settlement:
    """Settles each micro-batch (`foreachBatch`): merge what the workers staged, then let them announce it.

    Attributes:
        store: the driver's access to Postgres.
        topic: full name of the orders topic.
        report: told of each batch that was settled.
    """

    screening: Screening
    store: OrderStore
    topic: str
    report: Callable[[list[Receipt]], None]

    def __call__(self, settlements: DataFrame, batch_id: int) -> None:
        """Settle one micro-batch; when this returns, Spark commits it."""
        while not self._settled(settlements):
            continue  # messages that use another order's id were found, and are set aside from here on

    def _settled(self, settlements: DataFrame) -> bool:
        self.store.clear_staging()
        kept = settlements.persist()  # screening, and its staging, must run once, not once per step
        try:
            receipts = [msgspec.json.decode(row.receipt, type=Receipt) for row in kept.select("receipt").collect()]
            if not receipts:
                return True
            merged = self.store.merge(
                tags=[receipt.tag for receipt in receipts],
                orders=sum(receipt.orders for receipt in receipts),
                revisions=sum(receipt.revisions for receipt in receipts),
                topic=self.topic,
                rules_version=self.screening.rules.version,
                screened_at=datetime.fromtimestamp(receipts[0].screened_at_us / 1_000_000, UTC),
            )
            if merged.screen_again:
                return False
            sent = kept.select("payload").mapInArrow(_announce(self.screening, look_up=merged.met_known_orders), "sent long")
            sent.agg(F.sum("sent")).collect()
        finally:
            kept.unpersist()
        self.report(receipts)
        return True


def _announce(screening: Screening, *, look_up: bool) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    def announce_each(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for payload in batch.column("payload").to_pylist():
                announce(
                    screening.kafka,
                    screening.dsn,
                    unpack(payload, Verdicts),
                    screening.rules.version,
                    look_up=look_up,
                )
            yield pa.record_batch({"sent": pa.array([batch.num_rows], pa.int64())})

    return announce_each
