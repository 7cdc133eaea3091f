"""Where verdicts go: Postgres, then Kafka, written by the worker that gave them.

A bucket's part of a micro-batch is *stored* in one transaction and then *announced*; either may be repeated. Nothing is
announced that Postgres does not hold. A part that is replayed after a crash stores nothing new, and announces the same
records again.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import adbc_driver_manager
import adbc_driver_postgresql.dbapi as adbc
import confluent_kafka
import polars as pl

from batch.arrow_sessions import ArrowSession, open_arrow_session, reported
from batch.postgres import connect, explained, require_rights, until_reachable
from batch.sessions import USUAL
from conf.errors import KafkaError
from streaming.contract import CLASH_SCHEMA, CONTENT, FRAUD, GENUINE, NO_CLASHES, UTC_MICROSECONDS
from streaming.kafka import FRAUD_ALERT, ORDERS_DEAD_LETTER, PROCESSED_ORDERS
from streaming.rules.rules import REASONS
from streaming.screening.verdicts import VERDICT_SCHEMA, reason_bits, reason_lists

_ORDER_FIELDS = (
    "order_id",
    "user_id",
    "product_id",
    "quantity",
    "amount",
    "amount_numeric",
    "country",
)
_STORED = (
    *_ORDER_FIELDS,
    "created_date",
    "event_ts",
    "status",
    "source",
    "reasons",
    "shadow_reasons",
    "rules_version",
    "screened_at",
)
_POSITION = ("partition", "offset", "received_at")
_ISO_MICROSECONDS = "%Y-%m-%dT%H:%M:%S%.6f%:z"
_SEND_TIMEOUT_SECONDS = 30
_UNIQUE_VIOLATION = "23505"
_CONTENT_SCHEMA = pl.Schema({name: VERDICT_SCHEMA[name] for name in ("order_id", *CONTENT)})


_Result = TypeVar("_Result")


# --- store -----------------------------------------------------------------------------------------------------------


class Stored(NamedTuple):
    """What became of verdicts in `raw_orders`.

    Attributes:
        verdicts: VERDICT_SCHEMA; those to be announced, with the reasons and shadow reasons that now stand.
        clashes: CLASH_SCHEMA; orders whose id stands for another order. Where there are any, nothing was stored.
    """

    verdicts: pl.DataFrame
    clashes: pl.DataFrame


def _nothing_more(_cursor: adbc.Cursor) -> None:
    pass


def store(
    dsn: str,
    verdicts: pl.DataFrame,
    rules_version: str,
    screened_at: datetime,
    and_then: Callable[[adbc.Cursor], None] = _nothing_more,
) -> Stored:
    """Write a task's verdicts (VERDICT_SCHEMA) into `raw_orders`, in one transaction. Repeating it changes nothing.

    Runs on a worker. New orders are copied straight into the table, which refuses them when one of them is known: only
    then (a replay, a duplicate older than the state, a used order_id) is looked closer. Waits while Postgres restarts.

    Args:
        dsn: of Postgres.
        verdicts: at most one a stored order.
        rules_version, screened_at: what these verdicts carry.
        and_then: what else belongs into the transaction, where it is not given up.

    Raises:
        PostgresError: Postgres stays unreachable, or refuses.
    """
    given = verdicts["given"]
    rows = verdicts.with_columns(
        status=pl.when(given > 0).then(pl.lit(FRAUD)).otherwise(pl.lit(GENUINE)),
        reasons=reason_lists(given),
        shadow_reasons=reason_lists(verdicts["shadow"]),
        rules_version=pl.lit(rules_version),
        screened_at=pl.lit(screened_at).cast(UTC_MICROSECONDS),
    ).sort("order_id")  # two workers that meet wait for each other, in one order
    revised = in_transaction(dsn, lambda cursor: _copy_new(cursor, rows, and_then))
    if revised is not None:
        new = verdicts.remove("revision")
        return Stored(pl.concat([new, _as_standing(verdicts, revised)]) if len(revised) else new, NO_CLASHES)
    clashes, standing = in_transaction(dsn, lambda cursor: _merge_known(cursor, rows, and_then))
    return Stored(_as_standing(verdicts, standing), clashes)


_STANDING_SCHEMA = pl.Schema({"order_id": pl.String(), "reasons": pl.List(pl.String()), "shadow_reasons": pl.List(pl.String())})


def _copy_new(cursor: adbc.Cursor, rows: pl.DataFrame, and_then: Callable[[adbc.Cursor], None]) -> pl.DataFrame | None:
    """Copy new orders and add the reasons of revised ones: what stands of these. None where one is not that new."""
    new, revised = rows.remove("revision"), rows.filter("revision")
    standing = pl.DataFrame(schema=_STANDING_SCHEMA)
    try:
        if len(new):
            _copy(cursor, "raw_orders", new.select(_STORED))
    except adbc_driver_manager.IntegrityError as error:
        if error.sqlstate != _UNIQUE_VIOLATION:
            raise
        return None
    if len(revised):
        standing = _fetched(
            cursor, f"{_REVISED} {_FURTHER_REASONS} returning {_STANDING}", _STANDING_SCHEMA, (_as_json(revised),)
        )
        if len(standing) != len(revised):
            return None
    and_then(cursor)
    return standing


def _merge_known(
    cursor: adbc.Cursor, rows: pl.DataFrame, and_then: Callable[[adbc.Cursor], None]
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Merge verdicts some of which were stored before: the clashes, or else the reasons that stand of those written now."""
    _copy_screened(cursor, rows)
    clashes = _fetched(cursor, _CLASHES, CLASH_SCHEMA)
    if len(clashes):
        return clashes, pl.DataFrame(schema=_STANDING_SCHEMA)
    cursor.execute(_NEW_ORDERS)
    cursor.execute(_FURTHER_REASONS)
    standing = _fetched(cursor, _WRITTEN_NOW, _STANDING_SCHEMA)
    and_then(cursor)
    return clashes, standing


def _as_standing(verdicts: pl.DataFrame, standing: pl.DataFrame) -> pl.DataFrame:
    """The verdicts that this micro-batch wrote, with the reasons that stand in `raw_orders`."""
    bits = {
        column: pl.Series([reason_bits(reasons) for reasons in standing[name]], dtype=pl.UInt8)
        for column, name in (("given", "reasons"), ("shadow", "shadow_reasons"))
    }
    return verdicts.drop(*bits).join(standing.with_columns(**bits), on="order_id").select(VERDICT_SCHEMA.names())


_SCREENED = """
    create temporary table if not exists screened on commit delete rows as
    select {columns}, 0::int as "partition", 0::bigint as "offset", now() as received_at from raw_orders with no data
""".format(columns=", ".join(_STORED))

_NEW_ORDERS = """
    insert into raw_orders ({columns}) select {columns} from screened order by order_id on conflict (order_id) do nothing
""".format(columns=", ".join(_STORED))

_UNITED = """array(
    select distinct reason collate "C" from unnest(stored.{reasons} || screened.{reasons}) as reason order by 1
)"""

# Reasons only accumulate, and Fraud wins: replays and any order of arrival end in the same table.
_FURTHER_REASONS = f"""
    update raw_orders as stored
    set reasons = {_UNITED.format(reasons="reasons")}, shadow_reasons = {_UNITED.format(reasons="shadow_reasons")},
        status = case when screened.status = 'Fraud' then 'Fraud' else stored.status end,
        rules_version = screened.rules_version, screened_at = screened.screened_at, change_xid = pg_current_xact_id()
    from screened
    where stored.order_id = screened.order_id
      and not (screened.reasons <@ stored.reasons and screened.shadow_reasons <@ stored.shadow_reasons)
"""

# What a revision brings, in the place of the table above.
_REVISED = """
    with screened as (
        select * from jsonb_to_recordset($1::jsonb) as revised (
            order_id text, status text, reasons text[], shadow_reasons text[], rules_version text, screened_at timestamptz
        )
    )
"""


def _as_json(revised: pl.DataFrame) -> str:
    columns = ("order_id", "status", "reasons", "shadow_reasons", "rules_version")
    return revised.select(*columns, pl.col("screened_at").dt.strftime(_ISO_MICROSECONDS)).write_json()


_STANDING = "stored.order_id, stored.reasons, stored.shadow_reasons"

# Of all messages with one order_id the first received stands: a stored order, else the earliest in this micro-batch.
_CLASHES = """
    with claims as (
        select order_id, "partition", "offset", received_at, true as is_screened, row({content}) as content from screened
        union all
        select order_id, null, null, '-infinity', false, row({content})
        from raw_orders where order_id in (select order_id from screened)
    ), standing as (
        select *, first_value(content) over (
            partition by order_id order by received_at, "partition", "offset") as standing_content
        from claims
    )
    select "partition", "offset", order_id from standing where is_screened and content <> standing_content
""".format(content=", ".join(CONTENT))

_WRITTEN_NOW = f"select {_STANDING} from raw_orders as stored join screened using (order_id, screened_at)"


def stored_orders(dsn: str, order_ids: Sequence[str]) -> pl.DataFrame:
    """What `raw_orders` holds under these ids: `order_id` and CONTENT. Runs on a worker.

    Raises:
        PostgresError: Postgres stays unreachable, or refuses.
    """
    columns = ", ".join(_CONTENT_SCHEMA)
    query = f"select {columns} from raw_orders where order_id in (select jsonb_array_elements_text($1::jsonb))"
    values = (json.dumps(order_ids),)
    return in_transaction(dsn, lambda cursor: _fetched(cursor, query, _CONTENT_SCHEMA, values))


def standing(dsn: str, verdicts: pl.DataFrame) -> pl.DataFrame:
    """Verdicts on stored orders (VERDICT_SCHEMA), with the reasons that stand in `raw_orders`. Runs on a worker.

    Raises:
        PostgresError: Postgres stays unreachable, or refuses.
    """
    query = f"select {_STANDING} from raw_orders as stored where order_id in (select jsonb_array_elements_text($1::jsonb))"
    values = (json.dumps(verdicts["order_id"].to_list()),)
    rows = in_transaction(dsn, lambda cursor: _fetched(cursor, query, _STANDING_SCHEMA, values))
    return _as_standing(verdicts, rows)


_NEEDED_RIGHTS = {
    "raw_orders": ("select", "insert", "update"),
    "screening_state": ("select", "insert", "update", "delete"),
}


def require_tables(dsn: str) -> None:
    """Check that Postgres answers and has the tables that screening writes, and that this login may.

    Raises:
        PostgresError: unreachable, refused, a table or a right is missing.
    """
    with explained(dsn), connect(dsn, application_name="finpro screen") as connection, connection.cursor() as cursor:
        cursor.execute("select from raw_orders, screening_state limit 0")
        require_rights(cursor, "finpro_screen", _NEEDED_RIGHTS)


def _copy_screened(cursor: adbc.Cursor, rows: pl.DataFrame) -> None:
    cursor.execute(_SCREENED)
    _copy(cursor, "screened", rows.select(*_STORED, *_POSITION), temporary=True)


def _copy(cursor: adbc.Cursor, table: str, rows: pl.DataFrame, *, temporary: bool = False) -> None:
    arrow = rows.to_arrow(compat_level=pl.CompatLevel.oldest())
    cursor.adbc_ingest(table, arrow, mode="append", temporary=temporary)


def _fetched(cursor: adbc.Cursor, query: str, schema: pl.Schema, values: tuple[Any, ...] = ()) -> pl.DataFrame:
    cursor.execute(query, values)
    return pl.DataFrame(cursor.fetch_arrow_table()).cast(schema)


def in_transaction(dsn: str, work: Callable[[adbc.Cursor], _Result]) -> _Result:
    """Do `work` in one transaction of this worker process's connection; undone where it returns None or raises.

    Raises:
        PostgresError: Postgres stays unreachable, or refuses.
    """
    return until_reachable(lambda: _transaction(dsn, work))


def _transaction(dsn: str, work: Callable[[adbc.Cursor], _Result]) -> _Result:
    session, connection = _worker_connection(dsn)
    try:
        with connection.cursor() as cursor:
            if session.at_begin:
                cursor.execute(session.at_begin).fetchall()
            result = work(cursor)
        if result is None:
            connection.rollback()
        else:
            connection.commit()
    except adbc_driver_manager.Error as error:
        _worker_connection.cache_clear()
        raise reported(dsn, error) from error
    return result


@lru_cache(maxsize=1)
def _worker_connection(dsn: str) -> tuple[ArrowSession, adbc.Connection]:
    """One connection a worker process, kept between micro-batches."""
    session = open_arrow_session(dsn, application_name="finpro screen worker", limits=USUAL)
    return session, adbc.Connection(session.database, session.connection)


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


def announce(sink: KafkaSink, verdicts: pl.DataFrame, letters: pl.DataFrame, rules_version: str, screened_at: datetime) -> None:
    """Send verdicts (VERDICT_SCHEMA), alerts and dead letters (DEAD_LETTER_SCHEMA), and wait until the brokers have them.

    Runs on a worker.

    Raises:
        KafkaError: a record was not taken.
    """
    records = encode_verdicts(verdicts, rules_version, screened_at)
    alerts = records.filter(pl.col("alert").is_not_null())
    producer = _Sender(sink.config)
    producer.send(sink.topics[PROCESSED_ORDERS], records["order_id"], records["verdict"])
    producer.send(sink.topics[FRAUD_ALERT], alerts["order_id"], alerts["alert"])
    producer.send_dead_letters(sink.topics[ORDERS_DEAD_LETTER], letters)
    producer.wait()


def encode_verdicts(verdicts: pl.DataFrame, rules_version: str, screened_at: datetime) -> pl.DataFrame:
    """Verdicts (VERDICT_SCHEMA) as JSON: columns `order_id`, `verdict`, and `alert` (null where genuine)."""
    evidence = [
        pl.when(pl.col("given") & (1 << bit) > 0).then(pl.lit(f'"{reason}":') + pl.col(f"evidence_{reason}"))
        for bit, reason in enumerate(REASONS)
    ]
    iso = {name: pl.col(name).dt.strftime(_ISO_MICROSECONDS) for name in ("created_date", "event_ts")}
    is_fraud = pl.col("given") > 0
    verdict = pl.struct(
        *_ORDER_FIELDS,
        iso["created_date"],
        iso["event_ts"],
        pl.when(is_fraud).then(pl.lit(FRAUD)).otherwise(pl.lit(GENUINE)).alias("status"),
        "source",
        "reasons",
        "shadow_reasons",
        pl.lit(rules_version).alias("rules_version"),
        pl.lit(screened_at.isoformat(timespec="microseconds")).alias("screened_at"),
    ).struct.json_encode()
    all_evidence = pl.concat_str(evidence, separator=",", ignore_nulls=True)
    alert = pl.col("verdict").str.strip_suffix("}") + ',"evidence":{' + all_evidence + "}}"
    return (
        verdicts.with_columns(reasons=reason_lists(verdicts["given"]), shadow_reasons=reason_lists(verdicts["shadow"]))
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
        records = [{"key": key, "value": value} for key, value in zip(keys.to_list(), values.to_list(), strict=True)]
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


@lru_cache(maxsize=1)
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
