"""Where verdicts go: Postgres and Kafka, written by the workers, in an order that no failure can spoil.

A micro-batch is settled in three steps, each of which may be repeated:

1. *stage*: every worker copies its verdicts into `staging_orders` under a tag of its own;
2. *merge*: one transaction moves the rows of the tags that succeeded into `raw_orders`;
3. *announce*: the workers send to Kafka what now stands in `raw_orders`.

Nothing is announced that Postgres does not hold. A batch that is replayed after a crash stages the same rows, merges
nothing new, and announces the same records again.
"""

import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from typing import Any, TypeVar

import adbc_driver_manager
import adbc_driver_postgresql.dbapi as adbc
import confluent_kafka
import polars as pl
import psycopg2
import pyarrow as pa
from psycopg2 import sql
from psycopg2.extensions import connection as Connection
from psycopg2.extensions import cursor as Cursor

from batch.postgres import describe, explained, open_connection, until_reachable
from conf.errors import KafkaError, PostgresError, PostgresUnavailable
from streaming.chunks import Verdicts, unpack_table
from streaming.contract import CONTENT, DEAD_LETTER_SCHEMA
from streaming.kafka import FRAUD_ALERT, ORDERS_DEAD_LETTER, PROCESSED_ORDERS
from streaming.rules import REASONS
from streaming.screening import FRAUD, GENUINE, VERDICT_SCHEMA, reason_bits, reason_lists

_ORDER_FIELDS = (
    "order_id",
    "user_id",
    "product_id",
    "quantity",
    "amount",
    "amount_numeric",
    "country",
)
_STAGED = (
    *_ORDER_FIELDS,
    "created_date",
    "event_ts",
    "source",
    "reasons",
    "partition",
    "offset",
    "received_at",
    "revision",
)
_ISO_MICROSECONDS = "%Y-%m-%dT%H:%M:%S%.6f%:z"
_SEND_TIMEOUT_SECONDS = 30


_Result = TypeVar("_Result")


# --- stage -----------------------------------------------------------------------------------------------------------


def stage(dsn: str, verdicts: pl.DataFrame) -> str:
    """Copy verdicts (VERDICT_SCHEMA) into `staging_orders`; returns the tag that marks them.

    Runs on a worker. Waits while Postgres restarts.

    Raises:
        PostgresError: it stays unreachable, or refuses.
    """
    tag = uuid.uuid4().hex
    if verdicts.is_empty():
        return tag
    reasons = "{" + reason_lists(verdicts["given"]).list.join(",") + "}"
    rows = verdicts.with_columns(reasons=reasons).select(pl.lit(tag).alias("tag"), *_STAGED)
    until_reachable(lambda: _copy(dsn, rows))
    return tag


def _copy(dsn: str, rows: pl.DataFrame) -> None:
    try:
        connection = _worker_connection(dsn)
        with connection.cursor() as cursor:
            cursor.adbc_ingest(
                "staging_orders",
                rows.to_arrow(compat_level=pl.CompatLevel.oldest()),
                mode="append",
            )
        connection.commit()
    except adbc_driver_manager.Error as error:
        raise _refusal(dsn, error) from error


@cache
def _worker_connection(dsn: str) -> adbc.Connection:
    """One connection a worker process, kept between micro-batches."""
    return adbc.connect(dsn)


# --- merge -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Merged:
    """The outcome of a merge.

    Attributes:
        screen_again: why nothing was merged and the batch has to be screened once more: messages were found that use
            another order's id (`order_conflicts` now keeps them out), or Postgres crashed and lost what was staged.
        met_known_orders: some of the orders were in `raw_orders` already (a replay, or a duplicate older than the
            state): what to announce has to be looked up there.
    """

    screen_again: str | None = None
    met_known_orders: bool = False


_NEW_ORDERS = """
    insert into raw_orders (order_id, user_id, product_id, quantity, amount, amount_numeric, country, created_date, event_ts,
                            status, source, reasons, rules_version, screened_at)
    select order_id, user_id, product_id, quantity, amount, amount_numeric, country, created_date, event_ts,
           case reasons when '{}' then 'Genuine' else 'Fraud' end, source, reasons::text[], %(rules_version)s, %(screened_at)s
    from staging_orders
    where tag = any(%(tags)s) and not revision
    order by order_id
"""
# Postgres inserts a third faster without an eye on conflicts, and nearly always there are none.
_NEW_ORDERS_AMONG_KNOWN = _NEW_ORDERS + "on conflict (order_id) do nothing"

# Reasons only accumulate, and Fraud wins: replays and any order of arrival end in the same table.
_FURTHER_REASONS = """
    update raw_orders as stored
    set reasons = (select array_agg(distinct reason collate "C" order by reason collate "C")
                   from unnest(stored.reasons || staged.reasons::text[]) as reason),
        status = 'Fraud', rules_version = %(rules_version)s, screened_at = %(screened_at)s, change_xid = pg_current_xact_id()
    from staging_orders as staged
    where staged.tag = any(%(tags)s) and (staged.revision or %(met_known_orders)s)
      and stored.order_id = staged.order_id and not staged.reasons::text[] <@ stored.reasons
"""

# Of all messages with one order_id the first received stands: a stored order, else the earliest in this batch.
_CONFLICTS = sql.SQL("""
    with claims as (
        select order_id, "partition", "offset", received_at, true as staged, row({content}) as content
        from staging_orders where tag = any(%(tags)s)
        union all
        select order_id, null, null, '-infinity', false, row({content})
        from raw_orders where order_id in (select order_id from staging_orders where tag = any(%(tags)s))
    ), standing as (
        select *, first_value(content) over (
            partition by order_id order by received_at, "partition", "offset") as standing_content
        from claims
    )
    insert into order_conflicts (topic, "partition", "offset", order_id)
    select %(topic)s, "partition", "offset", order_id from standing
    where staged and content <> standing_content
    on conflict do nothing
""").format(content=sql.SQL(", ").join(map(sql.Identifier, CONTENT)))


class OrderStore:
    """The driver's access to `raw_orders`: one connection, opened again when Postgres has dropped it."""

    def __init__(self, dsn: str) -> None:
        """Connect.

        Raises:
            PostgresError: unreachable, refused, or a table is missing.
        """
        self._dsn = dsn
        self._connection: Connection | None = None
        self._transaction(_require_tables)

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.close()

    def clear_staging(self) -> None:
        """Empty the staging table. Called where no worker of this query can be writing to it."""
        until_reachable(lambda: self._transaction(lambda cursor: cursor.execute("truncate staging_orders")))

    def merge(
        self, *, tags: list[str], orders: int, revisions: int, topic: str, rules_version: str, screened_at: datetime
    ) -> Merged:
        """Move staged verdicts into `raw_orders`, in one transaction. Repeating it changes nothing.

        Args:
            tags: of the workers that succeeded.
            orders, revisions: how many rows of each kind they staged.
            topic: the orders topic, for the position of a conflict.
            rules_version, screened_at: what these verdicts carry.

        Raises:
            PostgresError: Postgres stays unreachable, or refuses.
        """
        values = {"tags": tags, "rules_version": rules_version, "screened_at": screened_at, "topic": topic}
        expected = (orders, revisions)
        return until_reachable(lambda: self._transaction(lambda cursor: _merge(cursor, values, expected)))

    def _transaction(self, work: Callable[[Cursor], _Result]) -> _Result:
        if self._connection is None or self._connection.closed:
            self._connection = open_connection(self._dsn, application_name="finpro screen")
        try:
            with explained(self._dsn), self._connection as connection, connection.cursor() as cursor:
                return work(cursor)
        except PostgresUnavailable:
            self._connection.close()
            raise


def _require_tables(cursor: Cursor) -> None:
    for table in ("raw_orders", "staging_orders", "order_conflicts"):
        cursor.execute(sql.SQL("select from {} limit 0").format(sql.Identifier(table)))


def _merge(cursor: Cursor, values: dict[str, Any], expected: tuple[int, int]) -> Merged:
    cursor.execute("savepoint nothing_merged")
    with suppress(psycopg2.errors.UniqueViolation):
        if _moved(cursor, values, met_known_orders=False) == expected:
            return Merged()
    cursor.execute("rollback to savepoint nothing_merged")
    cursor.execute("select count(*) from staging_orders where tag = any(%(tags)s)", values)
    if cursor.fetchone() != (sum(expected),):
        return Merged(screen_again="Postgres lost what was staged")
    cursor.execute(_CONFLICTS, values)
    if cursor.rowcount:
        return Merged(screen_again="orders with a used order_id were found")
    _moved(cursor, values, met_known_orders=True)
    return Merged(met_known_orders=True)


def _moved(cursor: Cursor, values: dict[str, Any], *, met_known_orders: bool) -> tuple[int, int]:
    """Move what can be moved; how many orders were new, and how many got further reasons."""
    cursor.execute(_NEW_ORDERS_AMONG_KNOWN if met_known_orders else _NEW_ORDERS, values)
    inserted = cursor.rowcount
    cursor.execute(_FURTHER_REASONS, values | {"met_known_orders": met_known_orders})
    return inserted, cursor.rowcount


def conflicts_among(dsn: str, messages: pa.RecordBatch) -> dict[int, str]:
    """Row → order id of those messages that were found to use another order's id. Runs on a worker.

    Raises:
        PostgresError: Postgres stays unreachable, or refuses.
    """
    places = pl.DataFrame({name: pl.Series(messages.column(name)) for name in ("topic", "partition", "offset")})
    oldest = places["offset"].min()
    query = 'select topic, "partition", "offset", order_id from order_conflicts where topic = $1 and "offset" >= $2'
    found = until_reachable(lambda: _rows(dsn, query, (places["topic"][0], oldest)))
    if not found:
        return {}
    conflicts = pl.DataFrame(found, schema=[*places.columns, "order_id"], orient="row").cast(places.schema)
    return dict(places.with_row_index().join(conflicts, on=places.columns).select("index", "order_id").iter_rows())


def _rows(dsn: str, query: str, values: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    try:
        connection = _worker_connection(dsn)
        with connection.cursor() as cursor:
            cursor.execute(query, values)
            rows: list[tuple[Any, ...]] = cursor.fetchall()
        connection.commit()
    except adbc_driver_manager.Error as error:
        raise _refusal(dsn, error) from error
    return rows


def _refusal(dsn: str, error: adbc_driver_manager.Error) -> PostgresError:
    """What went wrong, after dropping the connection it went wrong on: a lost one is worth another try."""
    _worker_connection.cache_clear()
    kind = PostgresUnavailable if isinstance(error, adbc_driver_manager.OperationalError) else PostgresError
    return kind(f"Postgres at {describe(dsn)}: {error}")


# --- announce --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KafkaSink:
    """Where and how the workers send: plain values, so that it can travel to them.

    Attributes:
        config: of a librdkafka client.
        topics: full name of each of finpro's topics.
    """

    config: dict[str, Any]
    topics: dict[str, str]


def announce(sink: KafkaSink, dsn: str, verdicts: Verdicts, rules_version: str, *, look_up: bool) -> None:
    """Send one bucket's verdicts, alerts and dead letters to Kafka, and wait until the brokers have them.

    Runs on a worker. With `look_up`, what is sent is what `raw_orders` holds of these orders, and only as far as this
    micro-batch wrote it.

    Raises:
        KafkaError: a record was not taken.
        PostgresError: `look_up`, and Postgres stays unreachable.
    """
    table = unpack_table(verdicts.verdicts, VERDICT_SCHEMA)
    screened_at = datetime.fromtimestamp(verdicts.screened_at_us / 1_000_000, UTC)
    if look_up:
        table = _as_stored(dsn, verdicts.tag, screened_at, table)
    records = encode_verdicts(table, rules_version, screened_at)
    alerts = records.filter(pl.col("alert").is_not_null())
    producer = _Sender(sink.config)
    producer.send(sink.topics[PROCESSED_ORDERS], records["order_id"], records["verdict"])
    producer.send(sink.topics[FRAUD_ALERT], alerts["order_id"], alerts["alert"])
    producer.send_dead_letters(
        sink.topics[ORDERS_DEAD_LETTER],
        unpack_table(verdicts.dead_letters, DEAD_LETTER_SCHEMA),
    )
    producer.wait()


def _as_stored(dsn: str, tag: str, screened_at: datetime, verdicts: pl.DataFrame) -> pl.DataFrame:
    """The verdicts that this micro-batch wrote, with the reasons that stand in `raw_orders`."""
    query = (
        "select staged.order_id, array_to_string(stored.reasons, ',') from staging_orders as staged"
        " join raw_orders as stored using (order_id) where staged.tag = $1 and stored.screened_at = $2"
    )
    staged = "select count(*) from staging_orders where tag = $1"
    if until_reachable(lambda: _rows(dsn, staged, (tag,))) != [(len(verdicts),)]:
        raise PostgresError(f"Postgres at {describe(dsn)} lost what was staged: start again, the micro-batch is replayed")
    rows = until_reachable(lambda: _rows(dsn, query, (tag, screened_at)))
    given = [reason_bits(filter(None, reasons.split(","))) for _, reasons in rows]
    stored = pl.DataFrame(
        {"order_id": [row[0] for row in rows], "stored": given},
        schema={"order_id": pl.String, "stored": pl.UInt8},
    )
    return verdicts.join(stored, on="order_id", maintain_order="left").with_columns(given="stored").drop("stored")


def encode_verdicts(verdicts: pl.DataFrame, rules_version: str, screened_at: datetime) -> pl.DataFrame:
    """Verdicts (VERDICT_SCHEMA) as JSON: columns `order_id`, `verdict`, and `alert` (null where genuine)."""
    evidence = [pl.lit(f'"{reason}":') + pl.col(f"evidence_{reason}") for reason in REASONS]
    iso = {name: pl.col(name).dt.strftime(_ISO_MICROSECONDS) for name in ("created_date", "event_ts")}
    is_fraud = pl.col("given") > 0
    verdict = pl.struct(
        *_ORDER_FIELDS,
        iso["created_date"],
        iso["event_ts"],
        pl.when(is_fraud).then(pl.lit(FRAUD)).otherwise(pl.lit(GENUINE)).alias("status"),
        "source",
        "reasons",
        pl.lit(rules_version).alias("rules_version"),
        pl.lit(screened_at.isoformat(timespec="microseconds")).alias("screened_at"),
    ).struct.json_encode()
    all_evidence = pl.concat_str(evidence, separator=",", ignore_nulls=True)
    alert = pl.col("verdict").str.strip_suffix("}") + ',"evidence":{' + all_evidence + "}}"
    return (
        verdicts.with_columns(reasons=reason_lists(verdicts["given"]))
        .with_columns(verdict=verdict)
        .select("order_id", "verdict", pl.when(is_fraud).then(alert).alias("alert"))
    )


class _Sender:
    """Sends records and remembers whether any was refused."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._servers = config["bootstrap.servers"]
        self._producer = _worker_producer(tuple(sorted(config.items())))
        self._refused: list[str] = []

    def send(self, topic: str, keys: pl.Series, values: pl.Series) -> None:
        records = [{"key": key, "value": value} for key, value in zip(keys, values, strict=True)]
        while records:
            self._producer.produce_batch(topic, records, on_delivery=self._delivered)
            records = [record for record in records if "_error" in record]
            if records:  # the client's queue is full
                self._producer.poll(0.05)

    def send_dead_letters(self, topic: str, letters: pl.DataFrame) -> None:
        for letter in letters.iter_rows(named=True):
            position = f"{letter['topic']}-{letter['partition']}-{letter['offset']}"
            headers: dict[str, str | bytes | None] = {
                name: str(letter[name]) for name in ("reason", "topic", "partition", "offset", "received_at")
            }
            self._producer.produce(
                topic,
                letter["value"],
                position,
                headers=headers,
                on_delivery=self._delivered,
            )

    def wait(self) -> None:
        unsent = self._producer.flush(_SEND_TIMEOUT_SECONDS)
        if unsent or self._refused:
            why = self._refused[0] if self._refused else f"no answer within {_SEND_TIMEOUT_SECONDS} s"
            raise KafkaError(f"Kafka at {self._servers} did not take {unsent or len(self._refused)} records: {why}")

    def _delivered(self, error: Any, record: Any) -> None:
        if error is not None:
            self._refused.append(f"{record.topic()}: {error.str()}")


@cache
def _worker_producer(config: tuple[tuple[str, Any], ...]) -> confluent_kafka.Producer:
    """One idempotent producer a worker process, kept between micro-batches."""
    return confluent_kafka.Producer(
        {
            **dict(config),
            "enable.idempotence": True,
            "acks": "all",
            "compression.type": "lz4",
            "linger.ms": 5,
            "batch.num.messages": 100_000,
            "queue.buffering.max.messages": 1_000_000,
            "message.timeout.ms": _SEND_TIMEOUT_SECONDS * 1000,
            "delivery.report.only.error": True,
            "log_level": 2,
        }
    )
