"""The way of an order through screening: a Kafka message → an order → the recent orders of its product → a verdict, stored.

    messages ─ foreachBatch ─> ledger: open ─> [ read, look up, screen, store, announce (mapInArrow) ] ─> ledger: settle

What stands in brackets is one Spark job, whose result is a report a task. This module has its `Stages`, and what workers do in
them; `micro_batch` is the driver's part.

All neighbours of an order share its product, and so its bucket (see `division`). Where the partitions of the topic are the
buckets, the job is one stage: the task that reads a partition settles it. Otherwise a task parses what it reads, and shuffles
chunks (see `chunks`) to those that settle them. A worker announces only what Postgres holds; what fails is done again, and
doing it again changes nothing (see `sinks` and `state`).

Where rules have patterns across products, one more stage follows: the orders that were accepted are shuffled by other fields,
and what these rules find of them and of earlier ones is added to the verdicts that stand.
"""

import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from operator import itemgetter
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
from pyspark.sql.types import BinaryType, IntegerType, StructField, StructType

from conf.errors import KafkaRefused, StreamingError, TopicNotKeyed
from conf.rules import FraudRules
from conf.workers import freeze_imports
from streaming.contract import (
    MESSAGE_COLUMNS,
    NO_CLASHES,
    NO_DEAD_LETTERS,
    NO_ORDERS,
    clash_dead_letters,
    clashes_among,
    read_messages,
)
from streaming.jvm import ArrowStage
from streaming.kafka import ORDERS, TopicReader, as_messages
from streaming.rules.windows import ints
from streaming.screening.chunks import Arrivals, PartitionRead, bucket_keys, pack_arrivals, unpack_arrivals
from streaming.screening.division import By, Division
from streaming.screening.ledger import Entry, require_open
from streaming.screening.receipts import (
    REPORT,
    BucketState,
    Failed,
    NotKeyed,
    Receipt,
    Report,
    decode_report,
    encode_report,
    latencies,
)
from streaming.screening.recent import Recent, near, remembered
from streaming.screening.sinks import Announcer, KafkaSink, in_transaction, revise, store, stored_orders
from streaming.screening.state import MicroBatch, Newest, known_before, newest_before, remember_after, remembered_now
from streaming.screening.verdicts import (
    GAINED,
    JUDGED,
    NEWS,
    advance,
    epoch_us,
    further_fields,
    nothing_across,
    oldest_needed,
    screen,
    taking_part_across,
)

Batches = Iterator[pa.RecordBatch]

CHUNK = StructType([StructField("bucket", IntegerType()), StructField("payload", BinaryType())])
_EITHER = StructType([*CHUNK, *REPORT])  # a chunk or a report
_MESSAGE = "message"  # the one column of what is read
_TOLD = "finpro.micro_batch"  # the local property


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


class Told(NamedTuple):
    """What the driver tells the tasks of a micro-batch: nothing secret, as Spark's event log shows it.

    Attributes:
        entry: the micro-batch's row in the ledger.
        batch: which one it is, or which part of it.
        moment: its own time.
    """

    entry: Entry
    batch: MicroBatch
    moment: datetime


class Task(NamedTuple):
    """What a task needs to know of its micro-batch.

    Attributes:
        screening: of the query.
        entry, batch, moment: as the driver has told.
        rules: in force then, with their conditions parsed: to parse them costs a worker 0.4 s of imports.
    """

    screening: Screening
    entry: Entry
    batch: MicroBatch
    moment: datetime
    rules: FraudRules


def as_read(messages: DataFrame, tasks: int) -> DataFrame:
    """Messages of Spark's Kafka source as `Stages` take them."""
    # A worker knows the topic, and each text costs the JVM something.
    message = F.struct(*(name for name in MESSAGE_COLUMNS if name != "topic")).alias(_MESSAGE)
    return messages.select(message).coalesce(tasks)  # a task costs more than a partition


class Stages:
    """The stages of micro-batches that are screened by the same rules.

    Their functions go to the JVM once, with all that stays the same; what is new in a micro-batch its tasks are told by a local
    property of Spark's: to make functions anew takes 4 ms more of each. See decision 37.
    """

    def __init__(self, screening: Screening, rules: FraudRules) -> None:
        self.rules = rules
        self._tasks = screening.tasks

        def stage(work: Callable[[Task, Batches], Batches], schema: StructType) -> ArrowStage:
            return ArrowStage(partial(_in_task, work, screening, rules), schema)

        self._parse = stage(_parse, CHUNK)
        wrapped, schema = (_either, _EITHER) if rules.across_products else (_reporting, REPORT)
        self._screen_partitions = stage(partial(wrapped, _screen_partitions), schema)
        self._screen_buckets = stage(partial(wrapped, _screen_buckets), schema)
        self._screen_across = stage(partial(_reporting, _screen_across), REPORT)

    def run(self, messages: DataFrame, told: Told) -> list[Report]:
        """Screen, store and announce the messages (of `as_read`) of a micro-batch: a report a task."""
        context = messages.sparkSession.sparkContext
        context.setLocalProperty(_TOLD, msgspec.json.encode(told).decode())
        try:
            return [decode_report(row["report"]) for row in self._over(messages, told.batch.division).collect()]
        finally:
            context.setLocalProperty(_TOLD, None)  # type: ignore[arg-type]  # which removes it

    def _over(self, messages: DataFrame, division: Division) -> DataFrame:
        """Reports (receipts.REPORT) of messages: to run it is to screen, store and announce them."""
        if division.by is By.PARTITION:
            done = self._screen_partitions.over(messages, _MESSAGE)
        else:
            chunks = self._parse.over(messages, _MESSAGE).repartition(division.buckets, "bucket")
            done = self._screen_buckets.over(chunks, *CHUNK.names)
        if not self.rules.across_products:
            return done
        return self._screen_across.over(done.repartition(self._tasks, "bucket"), *_EITHER.names)


def warm_up(spark: SparkSession, workers: int, kafka: KafkaSink) -> None:
    """Start Python workers, their imports and producers now, beside the planning of the query that will use them."""

    def start() -> None:
        with suppress(Exception):  # a session that ends sooner makes it fail anywhere; what matters fails in the query too
            warmed_up = spark.range(0, workers, 1, workers).mapInArrow(partial(_unchanged, kafka), "id long")
            warmed_up.agg(F.count("id")).collect()

    threading.Thread(target=start, name="warm-up", daemon=True).start()


def _unchanged(kafka: KafkaSink, batches: Batches) -> Batches:
    """As this is a function of a module, a worker that is to call it imports the module."""
    freeze_imports()
    Announcer(kafka)
    return batches


# --- read ------------------------------------------------------------------------------------------------------------


_DEAD_LETTERS_HELD_BYTES = 8 << 20


class _Reading:
    """What a task has read so far. Orders are kept, dead letters only as long as they are not large: they have no bound."""

    def __init__(self, task: Task) -> None:
        self._rules, self._screening, self._read_at = task.rules, task.screening, task.entry.moment
        self._parts: list[Arrivals] = []
        self._dead_letters: list[pl.DataFrame] = []
        self.messages = 0
        self.dead_letters = 0

    def read(self, batches: Batches) -> Iterator[pl.DataFrame]:
        """Read messages; yields dead letters (DEAD_LETTER_SCHEMA) among them that cannot be kept."""
        for batch in batches:
            if batch.num_rows:
                topic = pa.repeat(self._screening.kafka.topics[ORDERS], batch.num_rows)
                message = pa.RecordBatch.from_struct_array(batch.column("message"))
                messages = pa.record_batch([topic, *message.columns], names=["topic", *message.schema.names])
                part = read_arrivals(messages, self._rules, self._read_at)
                self.messages += batch.num_rows
                self._parts.append(part._replace(dead_letters=NO_DEAD_LETTERS))
                self._dead_letters.append(part.dead_letters)
                if sum(int(one.estimated_size()) for one in self._dead_letters) > _DEAD_LETTERS_HELD_BYTES:
                    yield from self._dead_letters
                    self.dead_letters += sum(len(one) for one in self._dead_letters)
                    self._dead_letters = []

    def arrivals(self) -> Arrivals:
        """All that was read and not handed on. Among its dead letters are orders that use the id of another one among them."""
        orders = pl.concat([NO_ORDERS, *(part.orders for part in self._parts)])
        clashes = clashes_among(orders, partial(stored_orders, self._screening.dsn))
        dead_letters = pl.concat([NO_DEAD_LETTERS, *self._dead_letters, _read_again(self._screening, clashes)])
        return Arrivals(
            _reads_of_all(read for part in self._parts for read in part.reads), _without(orders, clashes), dead_letters
        )


def read_arrivals(messages: pa.RecordBatch, rules: FraudRules, read_at: datetime) -> Arrivals:
    """Read messages (`contract.MESSAGE_COLUMNS`) at `read_at`, the micro-batch's own time."""
    contents = read_messages(messages, rules.max_future_skew, read_at, rules.fields)
    return Arrivals(_reads(messages, contents.orders), contents.orders, contents.dead_letters)


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


def _reads_of_all(reads: Iterator[PartitionRead]) -> list[PartitionRead]:
    """What was read of each Kafka partition, piece by piece, as one."""
    whole: dict[int, PartitionRead] = {}
    for read in reads:
        known = whole.get(read.partition, read)
        newest = [one for one in (known.newest_us, read.newest_us) if one is not None]
        whole[read.partition] = PartitionRead(
            read.partition,
            min(known.first_offset, read.first_offset),
            max(known.last_offset, read.last_offset),
            max(newest, default=None),
        )
    return list(whole.values())


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


def _read_again(screening: Screening, clashes: pl.DataFrame) -> pl.DataFrame:
    """The messages of orders that clash (CLASH_SCHEMA) as dead letters: their bytes are on the `orders` topic still."""
    if clashes.is_empty():
        return NO_DEAD_LETTERS
    dead_letters = []
    ranges = clashes.group_by("partition").agg(first=pl.col("offset").min(), end=pl.col("offset").max() + 1)
    with TopicReader(screening.kafka.config, screening.kafka.topics[ORDERS]) as reader:
        for partition, first, end in ranges.iter_rows():
            dead_letters.append(clash_dead_letters(as_messages(reader.read(partition, first, end)), clashes))
    return pl.concat(dead_letters)


# --- the kinds of task -----------------------------------------------------------------------------------------------


_decode_told = msgspec.json.Decoder(Told).decode


def _in_task(work: Callable[[Task, Batches], Batches], screening: Screening, rules: FraudRules, batches: Batches) -> Batches:
    """The work of a task, which knows of its micro-batch what the driver has told."""
    context = TaskContext.get()
    told = context.getLocalProperty(_TOLD) if context else None
    if told is None:  # nothing is stored or announced but by the driver's word
        raise RuntimeError("Spark runs a stage of screening outside a micro-batch.")
    return work(Task(screening, *_decode_told(told), rules), batches)


def _reporting(work: Callable[[Task, Batches], Batches], task: Task, batches: Batches) -> Batches:
    """What the work of a task yields; where it fails for good, a report that says so, as Spark would try four times."""
    try:
        yield from work(task, batches)
    except (KafkaRefused, StreamingError) as error:
        yield _report(Report(failed=Failed.of(error)))


def _either(work: Callable[[Task, Batches], Batches], task: Task, batches: Batches) -> Batches:
    """What a task yields that hands its orders on: reports and chunks, as rows of one kind.

    One that has not accepted its part says so to all buckets, by a chunk without content: the micro-batch will be done again,
    and what a worker remembers of it has to be the same then.
    """
    kinds = {"bucket": pa.int32(), "payload": pa.binary(), "report": pa.binary()}
    for batch in _reporting(work, task, batches):
        given = dict(zip(batch.schema.names, batch.columns, strict=True))
        yield pa.record_batch({name: given.get(name, pa.nulls(batch.num_rows, kind)) for name, kind in kinds.items()})
        if any(decode_report(report.as_py()).receipt is None for report in given.get("report", ())):
            keys = bucket_keys(task.screening.tasks)
            yield pa.record_batch(
                [
                    pa.array(keys, kinds["bucket"]),
                    pa.array([b""] * len(keys), kinds["payload"]),
                    pa.nulls(len(keys), kinds["report"]),
                ],
                names=list(kinds),
            )


def _screen_partitions(task: Task, batches: Batches) -> Batches:
    """Screen the partitions that this task reads: each is a bucket."""
    freeze_imports()
    reading, announcer = _Reading(task), Announcer(task.screening.kafka)
    newest = _newest_before(task.screening, task.batch)
    for dead_letters in reading.read(batches):
        announcer.dead_letters(dead_letters)
    arrivals = reading.arrivals()
    try:
        task.batch.division.require_keyed(arrivals.orders)
    except TopicNotKeyed as error:
        announcer.wait()
        yield _report(Report(not_keyed=NotKeyed(str(error))))
        return
    if reading.messages:
        buckets = {read.partition for read in arrivals.reads}
        settled = _settle(task, announcer, newest, [arrivals], buckets)
        yield _report(Report(_with_dead_letters(settled.receipt, reading.dead_letters)))
        yield from _handed_on(task, [arrivals], settled.verdicts)


def _report(report: Report) -> pa.RecordBatch:
    return pa.record_batch({"report": pa.array([encode_report(report)], pa.binary())})


def _with_dead_letters(receipt: Receipt, dead_letters: int) -> Receipt:
    """With dead letters that were announced as soon as they were read."""
    return msgspec.structs.replace(
        receipt, messages=receipt.messages + dead_letters, dead_letters=receipt.dead_letters + dead_letters
    )


def _parse(task: Task, batches: Batches) -> Batches:
    """Read, and divide what was read among buckets."""
    freeze_imports()
    reading, division = _Reading(task), task.batch.division
    keys = bucket_keys(division.buckets)
    for dead_letters in reading.read(batches):
        yield _chunks(keys[:1], [Arrivals([], NO_ORDERS, dead_letters)])
    if reading.messages:
        yield _chunks(keys, divided(reading.arrivals(), division))


def _chunks(keys: Sequence[int], shares: Sequence[Arrivals]) -> pa.RecordBatch:
    payloads = [pack_arrivals(share) for share in shares]
    return pa.record_batch({"bucket": pa.array(keys, pa.int32()), "payload": pa.array(payloads, pa.binary())})


def _screen_buckets(task: Task, batches: Batches) -> Batches:
    """Screen the buckets whose chunks this task is given."""
    freeze_imports()
    keys, announcer = bucket_keys(task.batch.division.buckets), Announcer(task.screening.kafka)
    newest = _newest_before(task.screening, task.batch)
    arrivals, buckets, dead_letters = [], set(), 0
    for row in (row for batch in batches for row in batch.to_pylist()):
        part = unpack_arrivals(row["payload"])
        dead_letters += len(part.dead_letters)
        announcer.dead_letters(part.dead_letters)
        buckets.add(keys.index(row["bucket"]))
        arrivals.append(part._replace(dead_letters=NO_DEAD_LETTERS))
    if arrivals:
        settled = _settle(task, announcer, newest, arrivals, buckets)
        yield _report(Report(_with_dead_letters(settled.receipt, dead_letters)))
        yield from _handed_on(task, arrivals, settled.verdicts)


def _handed_on(task: Task, arrivals: list[Arrivals], verdicts: pl.DataFrame) -> Batches:
    """What rules across products may find something about, where there are any, of orders that were new and now stand.

    A chunk a bucket, which has a share for each of their fields.
    """
    if not task.rules.across_products:
        return
    buckets, accepted = task.screening.tasks, verdicts.remove("revision")
    reads = [read for part in arrivals for read in part.reads]
    shares: list[dict[str, bytes]] = [{} for _ in range(buckets)]
    for field, rules in task.rules.across_products.items():
        orders = taking_part_across(accepted, rules, field)
        bucket_of = _across(task, field).bucket_of(orders)
        for bucket, share in enumerate(shares):
            own = orders.filter(pl.Series(bucket_of == bucket))
            share[field] = pack_arrivals(Arrivals(reads, own, NO_DEAD_LETTERS))
    payloads = pa.array([msgspec.msgpack.encode(share) for share in shares], pa.binary())
    yield pa.record_batch({"bucket": pa.array(bucket_keys(buckets), pa.int32()), "payload": payloads})


def _across(task: Task, field: str) -> Division:
    further = further_fields(task.rules.across_products[field])
    return Division(By.FIELD, task.screening.tasks, " and ".join([field, *further]))


def _screen_across(task: Task, batches: Batches) -> Batches:
    """Screen the shares of what was accepted that this task is given, across products; reports are passed on."""
    freeze_imports()
    keys, announcer = bucket_keys(task.screening.tasks), Announcer(task.screening.kafka)
    shares: dict[tuple[str, int], list[Arrivals]] = defaultdict(list)
    is_whole = True
    for row in (row for batch in batches for row in batch.to_pylist()):
        if row["report"] is not None:
            yield pa.record_batch({"report": pa.array([row["report"]], pa.binary())})
        elif row["payload"]:
            for field, share in _decode_shares(row["payload"]).items():
                shares[field, keys.index(row["bucket"])].append(unpack_arrivals(share))
        else:
            is_whole = False
    for (field, bucket), arrivals in sorted(shares.items(), key=itemgetter(0)) if is_whole else ():
        yield _report(Report(_settle_across(task, announcer, field, arrivals, bucket)))


_decode_shares = msgspec.msgpack.Decoder(dict[str, bytes]).decode


# --- screen, store, announce -----------------------------------------------------------------------------------------


class _Settled(NamedTuple):
    """A task's part of a micro-batch that is stored and announced: what it came to, and its verdicts (VERDICT_SCHEMA)."""

    receipt: Receipt
    verdicts: pl.DataFrame


def _newest_before(screening: Screening, batch: MicroBatch) -> list[Newest]:
    """What Postgres has of the states before a micro-batch. A task that reads messages asks before it waits for the first."""
    return in_transaction(screening.dsn, lambda cursor: newest_before(cursor, batch))


def _settle(task: Task, announcer: Announcer, newest: list[Newest], arrivals: list[Arrivals], buckets: set[int]) -> _Settled:
    """Screen, store and announce a task's part of a micro-batch: once more without the orders that turn out to clash.

    An order whose id stands for another order is a dead letter, and no neighbour to anyone. Only Postgres knows all ids
    ever used; and of two workers that meet a new id at the same time, the first to store its order decides.
    """
    screening, batch, rules = task.screening, task.batch, task.rules.within_products
    clashes = NO_CLASHES
    seconds: dict[str, float] = defaultdict(float)
    with _timed(seconds, "screen_seconds"):
        known = known_before(newest, batch, buckets, partial(in_transaction, screening.dsn))
    while True:
        with _timed(seconds, "screen_seconds"):
            outcome = screen_arrivals(arrivals, known.recents, batch, task.entry.moment, rules, _backlog(task), clashes)
        with _timed(seconds, "store_seconds"):
            stored = store(
                screening.dsn,
                outcome.verdicts,
                rules.version,
                task.moment,
                since=task.entry.since,
                require=partial(require_open, entry=task.entry),
                and_then=partial(remember_after, batch=batch, known=known, after=outcome.recents),
                keeps_evidence=bool(task.rules.across_products),
            )
        if stored.clashes.is_empty():
            break
        clashes = pl.concat([clashes, stored.clashes])
    remembered_now(batch, outcome.recents)
    with _timed(seconds, "announce_seconds"):
        announcer.dead_letters(pl.concat([outcome.dead_letters, _read_again(screening, clashes)]))
        announcer.verdicts(stored.verdicts, rules.version)
        announcer.wait()
    waited = latencies(stored.verdicts, datetime.now(UTC))
    messages = sum(len(part.orders) + len(part.dead_letters) for part in arrivals)
    return _Settled(msgspec.structs.replace(outcome.receipt, messages=messages, **seconds, **waited), outcome.verdicts)


def _backlog(task: Task) -> int | None:
    """As `verdicts.advance` takes it: near its limit a micro-batch is part of a backlog, and so is each of its parts.

    One that is done again had a limit that is not known: it may have been near that.
    """
    most = task.screening.backlog_offsets
    return 1 if most is not None and (task.entry.is_again or 2 * task.entry.offsets >= most) else None


def _settle_across(task: Task, announcer: Announcer, field: str, arrivals: list[Arrivals], bucket: int) -> Receipt:
    """Screen what was accepted across products; store and announce what that adds to verdicts.

    That is later than what the task which accepted them has announced: with its reasons the time of a verdict grows.
    """
    screening, rules = task.screening, task.rules.across_products[field]
    batch = task.batch._replace(division=_across(task, field))
    seconds: dict[str, float] = defaultdict(float)
    with _timed(seconds, "screen_seconds"):
        known = known_before(_newest_before(screening, batch), batch, [bucket], partial(in_transaction, screening.dsn))
        outcome = screen_across(arrivals, known.recents, batch, task.entry.moment, rules, _backlog(task))
    with _timed(seconds, "store_seconds"):
        revised = revise(
            screening.dsn,
            outcome.verdicts,
            rules.version,
            task.moment,
            since=task.entry.since,
            require=partial(require_open, entry=task.entry),
            and_then=partial(remember_after, batch=batch, known=known, after=outcome.recents),
        ).verdicts
    remembered_now(batch, outcome.recents)
    with _timed(seconds, "announce_seconds"):
        announcer.verdicts(revised, rules.version)
        announcer.wait()
    nothing_new = latencies(revised.clear(), datetime.now(UTC))
    is_fraud_now = (revised["gained"] != "") & (revised["gained"] == revised["given"])
    receipt = msgspec.structs.replace(outcome.receipt, frauds=int(is_fraud_now.sum()), revisions=len(revised))
    return msgspec.structs.replace(receipt, **seconds, **nothing_new)


@contextmanager
def _timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    """Add what the block takes."""
    started = perf_counter()
    yield
    seconds[step] += perf_counter() - started


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
        backlog_offsets: see `verdicts.advance`.
        clashes: orders to leave out.
    """
    orders = pl.concat([NO_ORDERS, *(part.orders for part in arrivals)])
    orders = _without(orders, clashes).sort("received_at", "partition", "offset")
    dead_letters = pl.concat([NO_DEAD_LETTERS, *(part.dead_letters for part in arrivals)])
    verdicts, duplicates = screen(near(recents.values(), orders, 2 * rules.widest_window), orders, rules)
    reads = [read for part in arrivals for read in part.reads]
    after = _after(recents, verdicts, reads, batch, moment, rules, backlog_offsets)
    bucket_of, events_us = batch.division.bucket_of(orders), ints(orders["event_ts"])
    late = (_count((bucket_of == bucket) & (events_us < recent.watermark.us)) for bucket, recent in recents.items())
    given, gained, revision = verdicts["given"], verdicts["gained"], verdicts["revision"]
    is_fraud_now = (gained != "") & (gained == given)
    receipt = Receipt(
        rules_version=rules.version,
        orders=int((~revision).sum()),
        genuine=int((~revision & (given == "")).sum()),
        revisions=int(revision.sum()),
        frauds=int(is_fraud_now.sum()),
        by_reason=_by_reason(gained, rules),
        shadow_by_reason=_by_reason(verdicts["shadow_gained"], rules),
        suppressed_by_reason=_by_reason(verdicts["suppressed_gained"], rules),
        duplicates=duplicates,
        late=sum(late),
        dead_letters=len(dead_letters) + len(clashes),
        buckets=_states(after),
    )
    return Outcome(verdicts, dead_letters, after, receipt)


def screen_across(
    arrivals: list[Arrivals],
    recents: dict[int, Recent],
    batch: MicroBatch,
    moment: datetime,
    rules: FraudRules,
    backlog_offsets: int | None,
) -> Outcome:
    """Some buckets' part of what a micro-batch accepted, across products. Deterministic, whatever the order of `arrivals`.

    Its verdicts are those that gain a reason. What was counted when the orders were accepted is not counted again.

    Args:
        arrivals: as of `taking_part_across`.
        recents, batch, moment, backlog_offsets: as for `screen_arrivals`.
        rules: those of the division.
    """
    nothing, key = nothing_across(rules), batch.division.key
    orders = pl.concat([nothing.drop(*JUDGED), *(part.orders for part in arrivals if len(part.orders))])
    orders = orders.sort("event_ts", "order_id")
    known = near(recents.values(), orders, 2 * rules.widest_window, key, nothing)
    verdicts, _ = screen(known, orders, rules, key)
    reads = [read for part in arrivals for read in part.reads]
    after = _after(recents, verdicts, reads, batch, moment, rules, backlog_offsets)
    by_reason, shadow, suppressed = (_by_reason(verdicts[gained], rules) for gained in GAINED.values())
    receipt = Receipt(rules.version, 0, 0, 0, 0, by_reason, shadow, 0, 0, 0, _states(after, str(batch.division)), suppressed)
    gaining = verdicts.filter(pl.any_horizontal(pl.col(name) != "" for name in NEWS if name != "revision"))
    return Outcome(gaining, NO_DEAD_LETTERS, after, receipt)


def _after(
    recents: dict[int, Recent],
    verdicts: pl.DataFrame,
    reads: list[PartitionRead],
    batch: MicroBatch,
    moment: datetime,
    rules: FraudRules,
    backlog_offsets: int | None,
) -> dict[int, Recent]:
    """The states of buckets after a micro-batch that read so much and came to these verdicts."""
    bucket_of, after = batch.division.bucket_of(verdicts), {}
    for bucket, recent in recents.items():
        own_reads = [read for read in reads if batch.division.by is not By.PARTITION or read.partition == bucket]
        watermark = advance(recent.watermark, own_reads, rules.lateness, backlog_offsets, moment)
        oldest_us = oldest_needed(watermark.us, rules.widest_window)
        # Beyond now nothing is forgotten yet, whatever a clock that was ahead had the state forget.
        recent = recent._replace(oldest_us=min(recent.oldest_us, epoch_us(moment)))
        after[bucket] = remembered(recent, watermark, oldest_us, verdicts[np.flatnonzero(bucket_of == bucket)], batch.step)
    return after


def _states(after: dict[int, Recent], division: str = "") -> list[BucketState]:
    return [BucketState(bucket, recent.kept, recent.bytes, recent.watermark.us, division) for bucket, recent in after.items()]


def _count(found: NDArray[Any]) -> int:
    return int(np.count_nonzero(found))


def _by_reason(gained: pl.Series, rules: FraudRules) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for reasons, orders in gained.filter(gained != "").value_counts().iter_rows():
        counts.update(dict.fromkeys(reasons.split(","), orders))
    return {reason: counts[reason] for reason in rules.evaluated}
