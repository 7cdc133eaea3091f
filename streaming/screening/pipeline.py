"""Screening on Spark: Kafka messages → orders → what is remembered of their products → verdicts in the sinks.

    read, parse, screen, store, announce (mapInArrow) ─> receipts (foreachBatch)

All neighbours of an order share its product, and so its bucket (see `division`). Where the partitions of the topic are the
buckets, a micro-batch is one stage: the task that reads a partition settles it. Otherwise a task parses what it reads, and
shuffles a chunk a bucket (see `chunks`) to those that settle it. What is settled is done before Spark commits the micro-batch:
what fails is done again, and doing it again changes nothing (see `sinks` and `state`).
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
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray
from pyspark import TaskContext
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from conf.rules import FraudRules
from conf.workers import spare_imports
from streaming.contract import (
    MESSAGE_COLUMNS,
    NO_CLASHES,
    NO_DEAD_LETTERS,
    NO_ORDERS,
    NO_TIMESTAMP,
    clash_letters,
    clashes_among,
    read_messages,
)
from streaming.kafka import ORDERS, TopicReader, as_messages
from streaming.rules.live import RULES_PROPERTY, LiveRules, rules_of_micro_batch
from streaming.rules.rules import REASONS
from streaming.rules.windows import ints
from streaming.screening.chunks import Arrivals, PartitionRead, bucket_keys, pack_arrivals, unpack_arrivals
from streaming.screening.division import By, Division
from streaming.screening.recent import Recent, near, remembered
from streaming.screening.sinks import KafkaSink, announce, in_transaction, store, stored_orders
from streaming.screening.state import MicroBatch, known_before, remember_after, remembered_now
from streaming.screening.verdicts import advance, epoch_us, oldest_needed, screen

CHUNK = "bucket int, payload binary"
RECEIPT = "receipt string, newest timestamp"
TIME_PROPERTY = "finpro.time"


@dataclass(frozen=True)
class Screening:
    """What every part of the query needs to know; travels to the workers.

    Attributes:
        tasks: the most that screen side by side.
        backlog_offsets: the query's limit of offsets a micro-batch, None where it has none.
        dsn: of Postgres.
        kafka: the sink.
    """

    tasks: int
    backlog_offsets: int | None
    dsn: str
    kafka: KafkaSink


# Upper bounds of the counts of a latency; one more count is of what took longer.
LATENCY_BOUNDS_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class BucketState(msgspec.Struct, frozen=True):
    """How a bucket is after a micro-batch.

    Attributes:
        bucket: which one.
        kept: orders remembered.
        bytes: their size in memory.
        watermark_us: epoch microseconds.
    """

    bucket: int
    kept: int
    bytes: int
    watermark_us: int


class Receipt(msgspec.Struct, frozen=True):
    """What one task made of one micro-batch, in numbers.

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
        buckets: how the buckets are that it had orders of.
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
    buckets: list[BucketState]
    screen_seconds: float = 0.0
    store_seconds: float = 0.0
    announce_seconds: float = 0.0
    event_latency: list[int] = []
    event_latency_seconds: float = 0.0
    kafka_latency: list[int] = []
    kafka_latency_seconds: float = 0.0


def screened(messages: DataFrame, screening: Screening, division: Division, lateness: timedelta) -> DataFrame:
    """The screening query over Kafka messages (`contract.MESSAGE_COLUMNS`): one row (RECEIPT) a task and micro-batch.

    Fails with `TopicNotKeyed` where a partition is a bucket, and the topic turns out not to be keyed by product.

    Buckets keep watermarks of their own, which also wait for partitions that a backlog has left behind
    (`screening.advance`), and evict by them. The one that Spark is told is for its UI and metrics, with the `lateness` of
    the start; what the buckets go by is in the rules, which may change.
    """
    read = messages.select(*MESSAGE_COLUMNS).coalesce(screening.tasks)  # a task costs more than a partition
    if division.by is By.PARTITION:
        settled = read.mapInArrow(_settle_partitions(screening, division), RECEIPT)
    else:
        chunks = read.mapInArrow(_parse(screening, division), CHUNK).repartition(division.buckets, "bucket")
        settled = chunks.mapInArrow(_settle_bucket(screening, division), RECEIPT)
    return settled.withWatermark("newest", f"{lateness // timedelta(milliseconds=1)} milliseconds")


def warm_up(spark: SparkSession, workers: int) -> None:
    """Start Python workers and their imports now, beside the planning of the query that will use them."""

    def start() -> None:
        with suppress(Exception):  # a session that ends sooner makes it fail anywhere; what matters fails in the query too
            spark.range(0, workers, 1, workers).mapInArrow(_unchanged, "id long").agg(F.count("id")).collect()

    threading.Thread(target=start, name="warm-up", daemon=True).start()


def _unchanged(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """As this is a function of a module, a worker that is to call it imports the module."""
    spare_imports()
    return batches


Batches = Iterator[pa.RecordBatch]


class _Task(NamedTuple):
    """What a task knows of its micro-batch.

    Attributes:
        batch: which one.
        time: its own, the same on a replay.
        rules: in force at that time.
    """

    batch: MicroBatch
    time: datetime
    rules: FraudRules


def _task(division: Division) -> _Task:
    properties: Any = TaskContext.get()
    time = datetime.fromtimestamp(int(properties.getLocalProperty(TIME_PROPERTY)) / 1000, UTC)
    query_id, number = map(properties.getLocalProperty, ("sql.streaming.queryId", "streaming.sql.batchId"))
    return _Task(MicroBatch(query_id, division, int(number)), time, rules_of_micro_batch(time))


def _settle_partitions(screening: Screening, division: Division) -> Callable[[Batches], Batches]:
    def settle_partitions(batches: Batches) -> Batches:
        spare_imports()
        messages, task = _in_one_piece(batches), _task(division)
        stored = partial(stored_orders, screening.dsn)
        arrivals = [read_arrivals(messages, task.rules, task.time, stored)] if messages else []
        for part in arrivals:
            division.require_at_home(part.orders)
        yield _settle(screening, task, arrivals, {read.partition for part in arrivals for read in part.reads})

    return settle_partitions


def _parse(screening: Screening, division: Division) -> Callable[[Batches], Batches]:
    keys = pa.array(bucket_keys(division.buckets), pa.int32())

    def parse(batches: Batches) -> Batches:
        spare_imports()
        messages = _in_one_piece(batches)
        if messages:
            task = _task(division)
            arrivals = read_arrivals(messages, task.rules, task.time, partial(stored_orders, screening.dsn))
            payloads = [pack_arrivals(share) for share in divided(arrivals, division)]
            yield pa.record_batch({"bucket": keys, "payload": pa.array(payloads, pa.binary())})

    return parse


def _settle_bucket(screening: Screening, division: Division) -> Callable[[Batches], Batches]:
    keys = bucket_keys(division.buckets)

    def settle_bucket(batches: Batches) -> Batches:
        spare_imports()
        rows = [row for batch in batches for row in batch.to_pylist()]
        arrivals = [unpack_arrivals(row["payload"]) for row in rows]
        yield _settle(screening, _task(division), arrivals, {keys.index(row["bucket"]) for row in rows})

    return settle_bucket


def _in_one_piece(batches: Batches) -> pa.RecordBatch | None:
    """A task's part of a micro-batch, no more than the query's limit: at once, for the sake of `clashes_among`."""
    read = list(batches)
    pieces = pa.Table.from_batches(read).combine_chunks().to_batches() if read else []
    return pieces[0] if pieces else None


def read_arrivals(
    messages: pa.RecordBatch, rules: FraudRules, read_at: datetime, stored: Callable[[Sequence[str]], pl.DataFrame]
) -> Arrivals:
    """Read messages (`contract.MESSAGE_COLUMNS`) at `read_at`, the micro-batch's own time.

    Among the dead letters are orders that use the id of another one read here (`contract.clashes_among`, which asks `stored`).
    """
    contents = read_messages(messages, rules.max_future_skew, read_at)
    clashes = clashes_among(contents.orders, stored)
    orders = _without(contents.orders, clashes)
    letters = pl.concat([contents.dead_letters, clash_letters(messages, clashes)])
    return Arrivals(_reads(messages, orders), orders, letters)


def divided(arrivals: Arrivals, division: Division) -> list[Arrivals]:
    """Each bucket's share of what a task read. Dead letters go with the first bucket's."""
    bucket_of = division.bucket_of(arrivals.orders)
    return [
        Arrivals(
            arrivals.reads,
            arrivals.orders.filter(pl.Series(bucket_of == bucket)),
            arrivals.dead_letters if bucket == 0 else arrivals.dead_letters.clear(),
        )
        for bucket in range(division.buckets)
    ]


def _without(orders: pl.DataFrame, clashes: pl.DataFrame) -> pl.DataFrame:
    return orders.join(clashes, on=["partition", "offset"], how="anti") if len(clashes) else orders


def _reads(messages: pa.RecordBatch, orders: pl.DataFrame) -> list[PartitionRead]:
    """What was read of each Kafka partition."""
    partitions, offsets = (messages.column(name).to_numpy() for name in ("partition", "offset"))
    of_order, events_us = ints(orders["partition"]), ints(orders["event_ts"])
    reads = []
    for partition in np.unique(partitions):
        read, events = offsets[partitions == partition], events_us[of_order == partition]
        newest_us = int(events.max()) if len(events) else None
        reads.append(PartitionRead(int(partition), int(read.min()), int(read.max()), newest_us))
    return reads


def _settle(screening: Screening, task: _Task, arrivals: list[Arrivals], buckets: set[int]) -> pa.RecordBatch:
    """Screen, store and announce a task's part of a micro-batch: once more without the orders that turn out to clash.

    An order whose id stands for another order is a dead letter, and no neighbour to anyone. Only Postgres knows all ids
    ever used; and of two workers that meet a new id at the same time, the first to store its order decides.

    Returns one row (RECEIPT); none where there was nothing to read.
    """
    batch, screened_at, rules = task
    clashes = NO_CLASHES
    seconds: dict[str, float] = defaultdict(float)
    with _timed(seconds, "screen_seconds"):
        known = in_transaction(screening.dsn, lambda cursor: known_before(cursor, batch, buckets))
    while True:
        with _timed(seconds, "screen_seconds"):
            outcome = screen_arrivals(arrivals, known.recents, batch, screened_at, rules, screening.backlog_offsets, clashes)
        remember = partial(remember_after, batch=batch, known=known, after=outcome.recents)
        with _timed(seconds, "store_seconds"):
            stored = store(screening.dsn, outcome.verdicts, rules.version, screened_at, remember)
        if stored.clashes.is_empty():
            break
        clashes = pl.concat([clashes, stored.clashes])
    remembered_now(batch, outcome.recents)
    letters = pl.concat([outcome.dead_letters, _read_again(screening.kafka, clashes)])
    with _timed(seconds, "announce_seconds"):
        announce(screening.kafka, stored.verdicts, letters, rules.version, screened_at)
    waited = latencies(stored.verdicts.remove("revision"), datetime.now(UTC))
    receipt = msgspec.structs.replace(outcome.receipt, **seconds, **waited)
    newest = max((read.newest_us for part in arrivals for read in part.reads if read.newest_us is not None), default=None)
    receipts = [msgspec.json.encode(receipt).decode()] if arrivals else []
    return pa.record_batch(
        {"receipt": pa.array(receipts, pa.string()), "newest": pa.array([newest] * len(receipts), pa.timestamp("us", "UTC"))}
    )


@contextmanager
def _timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    """Add what the block takes."""
    started = perf_counter()
    yield
    seconds[step] += perf_counter() - started


def latencies(orders: pl.DataFrame, announced_at: datetime) -> dict[str, Any]:
    """The fields of a receipt that say how long after `event_ts` and `received_at` these orders were announced.

    Those that have no Kafka timestamp are left out of the latter.
    """
    measured: dict[str, Any] = {}
    announced_us = round(announced_at.timestamp() * 1_000_000)
    for name, since in (("event_latency", "event_ts"), ("kafka_latency", "received_at")):
        known = orders.filter(pl.col(since) != NO_TIMESTAMP) if since == "received_at" else orders
        microseconds = announced_us - known[since].to_physical().to_numpy()
        seconds = np.maximum(microseconds, 0) / 1_000_000  # an event time may be a little ahead
        bounds = np.searchsorted(LATENCY_BOUNDS_SECONDS, seconds)
        measured[name] = np.bincount(bounds, minlength=len(LATENCY_BOUNDS_SECONDS) + 1).tolist()
        measured[f"{name}_seconds"] = float(seconds.sum())
    return measured


def _read_again(kafka: KafkaSink, clashes: pl.DataFrame) -> pl.DataFrame:
    """The messages of orders that clash (CLASH_SCHEMA) as dead letters: their bytes are on the `orders` topic still."""
    letters = [NO_DEAD_LETTERS]
    if clashes.is_empty():
        return letters[0]
    ranges = clashes.group_by("partition").agg(first=pl.col("offset").min(), end=pl.col("offset").max() + 1)
    with TopicReader(kafka.config, kafka.topics[ORDERS]) as reader:
        for partition, first, end in ranges.iter_rows():
            letters.append(clash_letters(as_messages(reader.read(partition, first, end)), clashes))
    return pl.concat(letters)


class Outcome(NamedTuple):
    """What a task makes of its part of a micro-batch.

    Attributes:
        verdicts: VERDICT_SCHEMA.
        dead_letters: DEAD_LETTER_SCHEMA.
        recents: bucket → its next state.
        receipt: in numbers, without what is not known yet.
    """

    verdicts: pl.DataFrame
    dead_letters: pl.DataFrame
    recents: dict[int, Recent]
    receipt: Receipt


def screen_arrivals(
    arrivals: list[Arrivals],
    recents: dict[int, Recent],
    batch: MicroBatch,
    moment: datetime,
    rules: FraudRules,
    backlog_offsets: int | None,
    clashes: pl.DataFrame = NO_CLASHES,
) -> Outcome:
    """Some buckets' part of a micro-batch. Deterministic, whatever the order of `arrivals`.

    Orders at the positions of `clashes` (CLASH_SCHEMA) are left out.

    Args:
        arrivals: what was read of these buckets.
        recents: bucket → state, of these buckets.
        batch: which micro-batch it is.
        moment: its own time.
        rules: in force.
        backlog_offsets: see `screening.advance`.
        clashes: orders to leave out.
    """
    orders = pl.concat([NO_ORDERS, *(part.orders for part in arrivals)])
    orders = _without(orders, clashes).sort("received_at", "partition", "offset")
    letters = pl.concat([NO_DEAD_LETTERS, *(part.dead_letters for part in arrivals)])
    verdicts, duplicates = screen(near(recents.values(), orders, 2 * rules.widest_window), orders, rules)
    reads = [read for part in arrivals for read in part.reads]
    bucket_of, events_us = batch.division.bucket_of(orders), ints(orders["event_ts"])
    bucket_of_verdict = batch.division.bucket_of(verdicts)
    after, late = {}, 0
    for bucket, recent in recents.items():
        own_reads = [read for read in reads if batch.division.by is By.PRODUCT or read.partition == bucket]
        frontier = advance(recent.frontier, own_reads, rules.lateness, backlog_offsets, moment)
        oldest_us = oldest_needed(frontier.watermark_us, rules.widest_window)
        # Beyond now nothing is forgotten yet, whatever a clock that was ahead had the state forget.
        recent = recent._replace(oldest_us=min(recent.oldest_us, epoch_us(moment)))
        changed = verdicts[np.flatnonzero(bucket_of_verdict == bucket)]
        after[bucket] = remembered(recent, frontier, oldest_us, changed, batch.number)
        late += _count((bucket_of == bucket) & (events_us < recent.frontier.watermark_us))
    given, gained, shadow_gained, revision = (
        verdicts[name].to_numpy() for name in ("given", "gained", "shadow_gained", "revision")
    )
    receipt = Receipt(
        rules_version=rules.version,
        orders=_count(~revision),
        genuine=_count(~revision & (given == 0)),
        revisions=_count(revision),
        frauds=_count((gained > 0) & (gained == given)),
        by_reason=_by_reason(gained),
        shadow_by_reason=_by_reason(shadow_gained),
        duplicates=duplicates,
        late=late,
        dead_letters=len(letters) + len(clashes),
        buckets=[
            BucketState(bucket, recent.kept, recent.bytes, recent.frontier.watermark_us) for bucket, recent in after.items()
        ],
    )
    return Outcome(verdicts, letters, after, receipt)


def _count(found: NDArray[Any]) -> int:
    return int(np.count_nonzero(found))


def _by_reason(gained: NDArray[np.uint8]) -> dict[str, int]:
    return {reason: _count(gained & (1 << bit)) for bit, reason in enumerate(REASONS)}


def receipts_to(
    reports: Sequence[Callable[[list[Receipt]], None]], rules: LiveRules, spark: SparkSession
) -> Callable[[DataFrame, int], None]:
    """For `foreachBatch` of a query of this session: runs a micro-batch and reports its receipts; then Spark commits it."""

    execution: Any = None

    def collect(settled: DataFrame, _batch_id: int) -> None:
        nonlocal execution
        execution = execution or _execution(spark)
        # As a column of the query (`current_timestamp`) the time would be a literal, and the plan compiled anew each time.
        time = execution.lastExecution().offsetSeqMetadata().batchTimestampMs()
        # This is the thread that runs the micro-batch: its tasks get the properties.
        spark.sparkContext.setLocalProperty(TIME_PROPERTY, str(time))
        spark.sparkContext.setLocalProperty(RULES_PROPERTY, rules.for_micro_batch())
        # To collect the DataFrame would be, for Spark, a query within the query: with a plan to be described, and events.
        rows = settled._jdf.queryExecution().toRdd().collect()
        if receipts := [msgspec.json.decode(row.getString(0), type=Receipt) for row in rows]:
            for report in reports:
                report(receipts)
        rules.settled()

    return collect


def _execution(spark: SparkSession) -> Any:
    """Spark's own object for the query that this thread runs."""
    return spark._jsparkSession.streams().get(spark.sparkContext.getLocalProperty("sql.streaming.queryId")).streamingQuery()
