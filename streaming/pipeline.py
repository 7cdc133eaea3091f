"""Screening on Spark: Kafka messages → chunks of orders → a bucket's state → verdicts in the sinks.

    parse (mapInArrow) ─ shuffle by bucket ─> screen, store, announce (state) ─> receipts (foreachBatch)

Orders are bucketed by product, because all neighbours of an order share its product. Spark carries one row per task and
bucket, not one per order: see `chunks`. A bucket settles its part of a micro-batch where it screens it, before Spark commits
the state: what fails is done again, and doing it again changes nothing (see `sinks`).
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.streaming.state import GroupState, GroupStateTimeout

from conf.rules import FraudRules
from conf.workers import spare_imports
from streaming.chunks import (
    Arrivals,
    PartitionRead,
    bucket_keys,
    pack,
    pack_table,
    unpack,
    unpack_table,
)
from streaming.contract import (
    DEAD_LETTER_SCHEMA,
    MESSAGE_COLUMNS,
    NO_CLASHES,
    ORDER_SCHEMA,
    clash_letters,
    clashes_among,
    read_messages,
)
from streaming.kafka import ORDERS, TopicReader, as_messages
from streaming.live_rules import RULES_PROPERTY, LiveRules, rules_of_micro_batch
from streaming.recent import NOTHING_RECENT, Recent, recalled, remembered
from streaming.rules import REASONS
from streaming.screening import Frontier, advance, oldest_needed, screen
from streaming.sinks import KafkaSink, announce, store, stored_orders

CHUNK = "bucket int, event_time timestamp, payload binary"
RECENT = "payload binary"
RECEIPT = "receipt string"


@dataclass(frozen=True)
class Screening:
    """What every part of the query needs to know; travels to the workers.

    Attributes:
        buckets: into how many parts products are divided: the most tasks that can screen side by side.
        backlog_offsets: the query's limit of offsets a micro-batch, None where it has none.
        dsn: of Postgres.
        kafka: the sink.
    """

    buckets: int
    backlog_offsets: int | None
    dsn: str
    kafka: KafkaSink


# Upper bounds of the counts of a latency; one more count is of what took longer.
LATENCY_BOUNDS_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Receipt(msgspec.Struct, frozen=True):
    """What one bucket made of one micro-batch, in numbers.

    Attributes:
        rules_version: what it was screened by.
        orders: new orders.
        genuine: those of them that went out as Genuine.
        revisions: orders that went out again, with a further reason or shadow reason.
        frauds: orders that became Fraud.
        by_reason, shadow_by_reason: reason → orders that gained it.
        duplicates: arrivals that were known.
        late: orders behind the watermark.
        dead_letters: messages that broke the contract, or used the id of another order.
        kept, state_bytes: orders in the state, and their size.
        watermark_us: of this bucket, epoch microseconds.
        screen_seconds, store_seconds, announce_seconds: what these steps took.
        event_latency, kafka_latency: how many new orders were announced so long after their event time, and after Kafka
            received them: a count for each of LATENCY_BOUNDS_SECONDS, not cumulative, and one for what lies beyond.
        event_latency_seconds, kafka_latency_seconds: the sums.
    """

    rules_version: str
    orders: int
    genuine: int
    revisions: int
    frauds: int
    by_reason: dict[str, int]
    shadow_by_reason: dict[str, int]
    duplicates: int
    late: int
    dead_letters: int
    kept: int
    state_bytes: int
    watermark_us: int
    screen_seconds: float = 0.0
    store_seconds: float = 0.0
    announce_seconds: float = 0.0
    event_latency: list[int] = []
    event_latency_seconds: float = 0.0
    kafka_latency: list[int] = []
    kafka_latency_seconds: float = 0.0


def screened(messages: DataFrame, screening: Screening, lateness: timedelta) -> DataFrame:
    """The screening query over Kafka messages (`contract.MESSAGE_COLUMNS`): one row (RECEIPT) a bucket and micro-batch.

    The watermark that Spark is told trails the newest event of all partitions; the buckets keep their own, which also
    waits for partitions that a backlog has left behind (`screening.advance`), and evict by that one. Spark therefore
    must not drop rows by its own: no event-time timeout is set. Its `lateness` is that of the start, for its UI and
    metrics; what the buckets go by is in the rules, which may change.
    """
    return (
        # Spark's current time is that of the micro-batch, the same on a replay.
        messages.select(*MESSAGE_COLUMNS, F.current_timestamp().alias("batch_time"))
        .coalesce(screening.buckets)  # a task costs more than a partition
        .mapInArrow(_parse(screening), CHUNK)
        .withWatermark("event_time", f"{lateness // timedelta(milliseconds=1)} milliseconds")
        .select("bucket", "payload")  # where the column goes on, each task compiles a predicate on the watermark anew
        .groupBy("bucket")
        .applyInPandasWithState(_screen_bucket(screening), RECEIPT, RECENT, "append", GroupStateTimeout.NoTimeout)
    )


def warm_up(spark: SparkSession, workers: int) -> None:
    """Start Python workers and their imports now, beside the planning of the query that will use them."""
    job = spark.range(0, workers, 1, workers).mapInArrow(_unchanged, "id long").agg(F.count("id"))

    def start() -> None:
        with suppress(Exception):  # a session that ends sooner makes it fail anywhere; what matters fails in the query too
            job.collect()

    threading.Thread(target=start, name="warm-up", daemon=True).start()


def _unchanged(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """As this is a function of a module, a worker that is to call it imports the module."""
    spare_imports()
    return batches


def _parse(screening: Screening) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    keys = pa.array(bucket_keys(screening.buckets), pa.int32())

    def parse(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        spare_imports()
        read = list(batches)  # no more than the query's limit of a micro-batch, and at once: see `clashes_among`
        messages = pa.Table.from_batches(read).combine_chunks().to_batches() if read else []
        for batch in messages:
            rules = rules_of_micro_batch(batch.column("batch_time")[0].as_py())
            arrivals = read_arrivals(batch, rules, screening.buckets, partial(stored_orders, screening.dsn))
            newest = max((read.newest_us for read in arrivals[0].reads if read.newest_us is not None), default=None)
            event_time = pa.array([newest] * screening.buckets, pa.timestamp("us", "UTC"))
            payloads = pa.array([pack(share) for share in arrivals], pa.binary())
            yield pa.record_batch({"bucket": keys, "event_time": event_time, "payload": payloads})

    return parse


def read_arrivals(
    messages: pa.RecordBatch, rules: FraudRules, buckets: int, stored: Callable[[Sequence[str]], pl.DataFrame]
) -> list[Arrivals]:
    """Read messages (`contract.MESSAGE_COLUMNS`), and divide the orders by bucket.

    Dead letters go with the first bucket's share; among them are orders that use the id of another one read here
    (`contract.clashes_among`, which asks `stored`).
    """
    contents = read_messages(messages, rules.max_future_skew)
    clashes = clashes_among(contents.orders, stored)
    orders = _without(contents.orders, clashes)
    letters = pl.concat([contents.dead_letters, clash_letters(messages, clashes)])
    reads = _reads(messages, orders)
    shares = [orders.filter(pl.col("product_id") % buckets == bucket) for bucket in range(buckets)]
    # What is read once, by the next stage, is not worth more than a quick compression.
    return [
        Arrivals(reads, pack_table(share, "lz4"), pack_table(letters, "lz4") if bucket == 0 else b"")
        for bucket, share in enumerate(shares)
    ]


def _without(orders: pl.DataFrame, clashes: pl.DataFrame) -> pl.DataFrame:
    return orders.join(clashes, on=["partition", "offset"], how="anti") if len(clashes) else orders


def _reads(messages: pa.RecordBatch, orders: pl.DataFrame) -> list[PartitionRead]:
    """What was read of each Kafka partition."""
    places = pl.DataFrame({name: pl.Series(messages.column(name)) for name in ("partition", "offset")})
    ranges = places.group_by("partition").agg(first=pl.col("offset").min(), last=pl.col("offset").max())
    newest = orders.group_by("partition").agg(newest=pl.col("event_ts").to_physical().max())
    return [PartitionRead(*row) for row in ranges.join(newest, on="partition", how="left").sort("partition").iter_rows()]


def _screen_bucket(screening: Screening) -> Callable[[Any, Iterator[pd.DataFrame], GroupState], Iterator[pd.DataFrame]]:
    def screen_bucket(key: Any, chunks: Iterator[pd.DataFrame], state: GroupState) -> Iterator[pd.DataFrame]:
        spare_imports()
        arrivals = [unpack(payload, Arrivals) for chunk in chunks for payload in chunk["payload"]]
        recent = unpack(state.get[0], Recent) if state.exists else NOTHING_RECENT
        # The micro-batch's own time, the same on a replay.
        screened_at = datetime.fromtimestamp(state.getCurrentProcessingTimeMs() / 1000, UTC)
        outcome = _settle(screening, arrivals, recent, screened_at)
        state.update((pack(outcome.recent),))
        yield pd.DataFrame({"receipt": [msgspec.json.encode(outcome.receipt).decode()]})

    return screen_bucket


def _settle(screening: Screening, arrivals: list[Arrivals], recent: Recent, screened_at: datetime) -> "BucketOutcome":
    """Screen, store and announce a bucket's part of a micro-batch: once more without the orders that turn out to clash.

    An order whose id stands for another order is a dead letter, and no neighbour to anyone. Only Postgres knows all ids
    ever used; and of two workers that meet a new id at the same time, the first to store its order decides.
    """
    rules, clashes = rules_of_micro_batch(screened_at), NO_CLASHES
    seconds: dict[str, float] = defaultdict(float)
    while True:
        with _timed(seconds, "screen_seconds"):
            outcome = screen_arrivals(arrivals, recent, rules, screening.backlog_offsets, clashes)
        with _timed(seconds, "store_seconds"):
            stored = store(screening.dsn, outcome.verdicts, rules.version, screened_at)
        if stored.clashes.is_empty():
            break
        clashes = pl.concat([clashes, stored.clashes])
    letters = pl.concat([outcome.dead_letters, _read_again(screening.kafka, clashes)])
    with _timed(seconds, "announce_seconds"):
        announce(screening.kafka, stored.verdicts, letters, rules.version, screened_at)
    waited = latencies(stored.verdicts.remove("revision"), datetime.now(UTC))
    return outcome._replace(receipt=msgspec.structs.replace(outcome.receipt, **seconds, **waited))


@contextmanager
def _timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    """Add what the block takes."""
    started = perf_counter()
    yield
    seconds[step] += perf_counter() - started


def latencies(orders: pl.DataFrame, announced_at: datetime) -> dict[str, Any]:
    """The fields of a receipt that say how long after `event_ts` and `received_at` these orders were announced."""
    measured: dict[str, Any] = {}
    announced_us = round(announced_at.timestamp() * 1_000_000)
    for name, since in (("event_latency", "event_ts"), ("kafka_latency", "received_at")):
        microseconds = announced_us - orders[since].to_physical().to_numpy()
        seconds = np.maximum(microseconds, 0) / 1_000_000  # an event time may be a little ahead
        bounds = np.searchsorted(LATENCY_BOUNDS_SECONDS, seconds)
        measured[name] = np.bincount(bounds, minlength=len(LATENCY_BOUNDS_SECONDS) + 1).tolist()
        measured[f"{name}_seconds"] = float(seconds.sum())
    return measured


def _read_again(kafka: KafkaSink, clashes: pl.DataFrame) -> pl.DataFrame:
    """The messages of orders that clash (CLASH_SCHEMA) as dead letters: their bytes are on the `orders` topic still."""
    letters = [pl.DataFrame(schema=DEAD_LETTER_SCHEMA)]
    if clashes.is_empty():
        return letters[0]
    ranges = clashes.group_by("partition").agg(first=pl.col("offset").min(), end=pl.col("offset").max() + 1)
    with TopicReader(kafka.config, kafka.topics[ORDERS]) as reader:
        for partition, first, end in ranges.iter_rows():
            letters.append(clash_letters(as_messages(reader.read(partition, first, end)), clashes))
    return pl.concat(letters)


class BucketOutcome(NamedTuple):
    """What a bucket makes of a micro-batch: `verdicts` (VERDICT_SCHEMA), `dead_letters`, the next state, and a receipt."""

    verdicts: pl.DataFrame
    dead_letters: pl.DataFrame
    recent: Recent
    receipt: Receipt


def screen_arrivals(
    arrivals: list[Arrivals],
    recent: Recent,
    rules: FraudRules,
    backlog_offsets: int | None,
    clashes: pl.DataFrame = NO_CLASHES,
) -> BucketOutcome:
    """One bucket's part of a micro-batch, from its shares of what was read. Deterministic, whatever their order.

    Orders at the positions of `clashes` (CLASH_SCHEMA) are left out.
    """
    arrivals = sorted(arrivals, key=lambda share: (share.reads[0].partition, share.reads[0].first_offset))
    orders = _without(_concatenated([share.orders for share in arrivals], ORDER_SCHEMA), clashes)
    orders = orders.sort("received_at", "partition", "offset")
    letters = _concatenated([share.dead_letters for share in arrivals], DEAD_LETTER_SCHEMA)
    before = Frontier(recent.newest_us, recent.watermark_us)
    after = advance(before, [read for share in arrivals for read in share.reads], rules.lateness, backlog_offsets)
    outcome = screen(recalled(recent), orders, rules)
    oldest_us = oldest_needed(after.watermark_us, rules.widest_window)
    remaining = remembered(recent, after, oldest_us, outcome.recent, outcome.verdicts)
    verdicts = outcome.verdicts
    given, gained, revision = verdicts["given"], verdicts["gained"], verdicts["revision"]
    receipt = Receipt(
        rules_version=rules.version,
        orders=int((~revision).sum()),
        genuine=int((~revision & (given == 0)).sum()),
        revisions=int(revision.sum()),
        frauds=int(((gained > 0) & (gained == given)).sum()),
        by_reason=_by_reason(gained),
        shadow_by_reason=_by_reason(verdicts["shadow_gained"]),
        duplicates=outcome.duplicates,
        late=int((orders["event_ts"].to_physical() < before.watermark_us).sum()),
        dead_letters=len(letters) + len(clashes),
        kept=remaining.kept,
        state_bytes=sum(len(segment.orders) for segment in remaining.segments),
        watermark_us=after.watermark_us,
    )
    return BucketOutcome(verdicts, letters, remaining, receipt)


def _by_reason(gained: pl.Series) -> dict[str, int]:
    return {reason: int((gained & (1 << bit) > 0).sum()) for bit, reason in enumerate(REASONS)}


def _concatenated(tables: list[bytes], schema: pl.Schema) -> pl.DataFrame:
    return pl.concat([pl.DataFrame(schema=schema), *(unpack_table(table, schema) for table in tables if table)])


def receipts_to(reports: Sequence[Callable[[list[Receipt]], None]], rules: LiveRules) -> Callable[[DataFrame, int], None]:
    """For `foreachBatch`: runs a micro-batch and reports its receipts, a few numbers a bucket; then Spark commits it."""

    def collect(settled: DataFrame, _batch_id: int) -> None:
        # This is the thread that runs the micro-batch: its tasks get the property.
        settled.sparkSession.sparkContext.setLocalProperty(RULES_PROPERTY, rules.for_micro_batch())
        if receipts := [msgspec.json.decode(row.receipt, type=Receipt) for row in settled.collect()]:
            for report in reports:
                report(receipts)
        rules.settled()

    return collect
