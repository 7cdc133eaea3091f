"""Screening on Spark: Kafka messages → chunks of orders → a bucket's state → verdicts, and their settlement.

    parse (mapInArrow) ─ shuffle by bucket ─> screen and stage (state) ─> merge ─> announce

Orders are bucketed by product, because all neighbours of an order share its product. Spark carries one row per task and
bucket, not one per order: see `chunks`.
"""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import msgspec
import pandas as pd
import polars as pl
import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.streaming.state import GroupState, GroupStateTimeout

from conf.errors import MicroBatchReplay
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
from streaming.sinks import KafkaSink, OrderStore, announce, conflicts_among, stage

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
    lateness_ms = screening.rules.lateness // timedelta(milliseconds=1)
    return (
        messages.select(*MESSAGE_COLUMNS)
        .coalesce(screening.buckets)  # a task costs more than a partition
        .mapInArrow(_parse(screening), CHUNK)
        .withWatermark("event_time", f"{lateness_ms} milliseconds")
        .groupBy("bucket")
        .applyInPandasWithState(_screen_bucket(screening), SETTLEMENT, RECENT, "append", GroupStateTimeout.NoTimeout)
    )


def warm_up(spark: SparkSession, workers: int) -> None:
    """Start Python workers and their imports now, beside the planning of the query that will use them."""
    job = spark.range(0, workers, 1, workers).mapInArrow(_unchanged, "id long").agg(F.count("id"))
    threading.Thread(target=job.collect, name="warm-up", daemon=True).start()


def _unchanged(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """As this is a function of a module, a worker that is to call it imports the module."""
    return batches


def _parse(screening: Screening) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    keys = pa.array(bucket_keys(screening.buckets), pa.int32())

    def parse(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for messages in batches:
            if not messages.num_rows:
                continue
            conflicts = conflicts_among(screening.dsn, messages)
            arrivals = read_arrivals(messages, screening.rules, screening.buckets, conflicts)
            newest = max((read.newest_us for read in arrivals[0].reads if read.newest_us is not None), default=None)
            event_time = pa.array([newest] * screening.buckets, pa.timestamp("us", "UTC"))
            payloads = pa.array([pack(share) for share in arrivals], pa.binary())
            yield pa.record_batch({"bucket": keys, "event_time": event_time, "payload": payloads})

    return parse


def read_arrivals(messages: pa.RecordBatch, rules: FraudRules, buckets: int, conflicts: dict[int, str]) -> list[Arrivals]:
    """Read messages (`contract.MESSAGE_COLUMNS`), and divide the orders by bucket.

    Dead letters go with the first bucket's share. `conflicts` (row → order id) are messages that were found to use the id
    of another order: they are dead letters as well.
    """
    contents = read_messages(messages, rules.max_future_skew)
    reasons = {row: f"order_id {order_id} is used by another order, received before" for row, order_id in conflicts.items()}
    aside = dead_letters(messages, reasons)
    orders = contents.orders.join(aside, on=["partition", "offset"], how="anti") if conflicts else contents.orders
    letters = pl.concat([contents.dead_letters, aside])
    reads = _reads(messages, orders)
    shares = [orders.filter(pl.col("product_id") % buckets == bucket) for bucket in range(buckets)]
    return [
        Arrivals(reads, pack_table(share), pack_table(letters) if bucket == 0 else b"") for bucket, share in enumerate(shares)
    ]


def _reads(messages: pa.RecordBatch, orders: pl.DataFrame) -> list[PartitionRead]:
    """What was read of each Kafka partition."""
    places = pl.DataFrame({name: pl.Series(messages.column(name)) for name in ("partition", "offset")})
    ranges = places.group_by("partition").agg(first=pl.col("offset").min(), last=pl.col("offset").max())
    newest = orders.group_by("partition").agg(newest=pl.col("event_ts").to_physical().max())
    return [PartitionRead(*row) for row in ranges.join(newest, on="partition", how="left").sort("partition").iter_rows()]


def _screen_bucket(screening: Screening) -> Callable[[Any, Iterator[pd.DataFrame], GroupState], Iterator[pd.DataFrame]]:
    def screen_bucket(key: Any, chunks: Iterator[pd.DataFrame], state: GroupState) -> Iterator[pd.DataFrame]:
        arrivals = [unpack(payload, Arrivals) for chunk in chunks for payload in chunk["payload"]]
        recent = unpack(state.get[0], Recent) if state.exists else NOTHING_RECENT
        outcome = screen_arrivals(arrivals, recent, screening.rules, screening.backlog_offsets)
        state.update((pack(outcome.recent),))
        tag = stage(screening.dsn, outcome.verdicts)
        screened_at_us = state.getCurrentProcessingTimeMs() * 1000  # the micro-batch's own time, the same on a replay
        receipt = Receipt(tag=tag, screened_at_us=screened_at_us, **outcome.counts)
        payload = Verdicts(tag, screened_at_us, pack_table(outcome.verdicts), pack_table(outcome.dead_letters))
        yield pd.DataFrame({"receipt": [msgspec.json.encode(receipt).decode()], "payload": [pack(payload)]})

    return screen_bucket


NOTHING_RECENT = Recent({}, Frontier().watermark_us, b"")


class BucketOutcome(NamedTuple):
    """What a bucket makes of a micro-batch: `verdicts` (VERDICT_SCHEMA), `dead_letters`, state, and a receipt's numbers."""

    verdicts: pl.DataFrame
    dead_letters: pl.DataFrame
    recent: Recent
    counts: dict[str, Any]


def screen_arrivals(arrivals: list[Arrivals], recent: Recent, rules: FraudRules, backlog_offsets: int | None) -> BucketOutcome:
    """One bucket's part of a micro-batch, from its shares of what was read. Deterministic, whatever their order."""
    arrivals = sorted(arrivals, key=lambda share: (share.reads[0].partition, share.reads[0].first_offset))
    orders = _concatenated([share.orders for share in arrivals], ORDER_SCHEMA).sort("received_at", "partition", "offset")
    letters = _concatenated([share.dead_letters for share in arrivals], DEAD_LETTER_SCHEMA)
    before = Frontier(recent.newest_us, recent.watermark_us)
    after = advance(before, [read for share in arrivals for read in share.reads], rules.lateness, backlog_offsets)
    outcome = screen(unpack_table(recent.orders, RECENT_SCHEMA), orders, rules)
    remaining = evict(outcome.recent, after.watermark_us, rules.widest_window)
    verdicts = outcome.verdicts
    given, gained = verdicts["given"], verdicts["gained"]
    revisions = int(verdicts["revision"].sum())
    counts = {
        "orders": len(verdicts) - revisions,
        "revisions": revisions,
        "frauds": int(((gained > 0) & (gained == given)).sum()),
        "by_reason": {reason: int((gained & (1 << bit) > 0).sum()) for bit, reason in enumerate(REASONS)},
        "duplicates": outcome.duplicates,
        "late": int((orders["event_ts"].to_physical() < before.watermark_us).sum()),
        "dead_letters": len(letters),
        "kept": len(remaining),
        "watermark_us": after.watermark_us,
    }
    return BucketOutcome(verdicts, letters, Recent(after.newest_us, after.watermark_us, pack_table(remaining)), counts)


def _concatenated(tables: list[bytes], schema: pl.Schema) -> pl.DataFrame:
    return pl.concat([pl.DataFrame(schema=schema), *(unpack_table(table, schema) for table in tables if table)])


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
        """Settle one micro-batch; when this returns, Spark commits it.

        Raises:
            MicroBatchReplay: nothing was merged, and the query has to start again. Evaluating `settlements` once more
                would not do: Spark keeps what it has shuffled, and so would not read the messages again.
        """
        self.store.clear_staging()
        kept = settlements.persist()  # screening, and its staging, must run once, not once per step
        try:
            receipts = [msgspec.json.decode(row.receipt, type=Receipt) for row in kept.select("receipt").collect()]
            if not receipts:
                return
            merged = self.store.merge(
                tags=[receipt.tag for receipt in receipts],
                orders=sum(receipt.orders for receipt in receipts),
                revisions=sum(receipt.revisions for receipt in receipts),
                topic=self.topic,
                rules_version=self.screening.rules.version,
                screened_at=datetime.fromtimestamp(receipts[0].screened_at_us / 1_000_000, UTC),
            )
            if merged.screen_again:
                raise MicroBatchReplay(f"micro-batch {batch_id}: {merged.screen_again}")
            sent = kept.select("payload").mapInArrow(_announce(self.screening, look_up=merged.met_known_orders), "sent long")
            sent.collect()
        finally:
            kept.unpersist()
        self.report(receipts)


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
