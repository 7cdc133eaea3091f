"""Where verdicts go: Postgres, then Kafka.

A bucket's part of a micro-batch is *stored* by its worker in one transaction, and then *announced*; either may be repeated.
Nothing is announced that Postgres does not hold. A part that is done again after a crash stores nothing new, and announces the
same records again.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import adbc_driver_manager
import msgspec
import numpy as np
import polars as pl
import pyarrow as pa

from batch.arrow_sessions import ArrowCursor, ArrowSession, open_arrow_session, reported
from batch.postgres import connect, explained, require_rights, until_reachable
from batch.sessions import USUAL
from conf.errors import FinproError, KafkaError
from conf.settings import Settings
from streaming.contract import CLASH_SCHEMA, CONTENT, FRAUD, GENUINE, NO_CLASHES, UTC_MICROSECONDS
from streaming.kafka import FRAUD_ALERT, ORDERS_DEAD_LETTER, PROCESSED_ORDERS, TOPICS, largest_message, librdkafka_config
from streaming.screening.columns_to_kafka import ColumnProducer
from streaming.screening.verdicts import KINDS, NEWS, VERDICT_SCHEMA, decode_evidence, evidence_for, reason_lists, reason_text

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
    "attributes",
    "suppressed_reasons",
)
_POSITION = ("partition", "offset", "received_at")
_ISO_MICROSECONDS = "%Y-%m-%dT%H:%M:%S%.6f%:z"
_IS_FRAUD = pl.col("given") != ""
_STATUS = pl.when(_IS_FRAUD).then(pl.lit(FRAUD)).otherwise(pl.lit(GENUINE)).alias("status")
_UNIQUE_VIOLATION = "23505"
_CONTENT_SCHEMA = pl.Schema({name: VERDICT_SCHEMA[name] for name in ("order_id", *CONTENT)})
# Verdicts that Postgres holds, with the time that each has there.
STORED_SCHEMA = pl.Schema({**VERDICT_SCHEMA, "screened_at": UTC_MICROSECONDS})


_Result = TypeVar("_Result")


# --- store -----------------------------------------------------------------------------------------------------------


class Stored(NamedTuple):
    """What became of verdicts in `raw_orders`.

    Attributes:
        verdicts: STORED_SCHEMA; those to be announced, with the reasons of each kind and the time that now stand.
        clashes: CLASH_SCHEMA; orders whose id stands for another order. Where there are any, nothing was stored.
    """

    verdicts: pl.DataFrame
    clashes: pl.DataFrame


def _nothing(_cursor: ArrowCursor) -> None:
    pass


def store(
    dsn: str,
    verdicts: pl.DataFrame,
    rules_version: str,
    screened_at: datetime,
    *,
    since: datetime | None = None,
    require: Callable[[ArrowCursor], None] = _nothing,
    and_then: Callable[[ArrowCursor], None] = _nothing,
    keeps_evidence: bool = False,
) -> Stored:
    """Write a task's verdicts (VERDICT_SCHEMA) into `raw_orders`, in one transaction. Repeating it changes nothing.

    Runs on a worker. New orders are copied straight into the table, which refuses them when one of them is known: only
    then (a replay, a duplicate older than the state, a used order_id) is looked closer. Waits while Postgres restarts.

    Args:
        dsn: of Postgres.
        verdicts: at most one a stored order.
        rules_version, screened_at: what these verdicts carry.
        since: what was stored from then on is this micro-batch's own work, to be announced again; by default `screened_at`.
        require: checks in the transaction, before anything is written, that it may be.
        and_then: what else belongs into the transaction, where it is not given up.
        keeps_evidence: whether others find reasons for the same orders: then what is returned has the evidence of all.

    Raises:
        PostgresError: Postgres stays unreachable, or refuses.
    """
    rows = _rows(verdicts, rules_version, screened_at)
    work = _Work(require, rows, since or screened_at, and_then, keeps_evidence=keeps_evidence)
    revised = in_transaction(dsn, work.copy_new)
    if revised is not None:
        new = verdicts.remove("revision").with_columns(screened_at=pl.lit(screened_at).cast(UTC_MICROSECONDS))
        return Stored(pl.concat([new, _as_standing(verdicts, revised)]) if len(revised) else new, NO_CLASHES)
    clashes, standing = in_transaction(dsn, work.merge_known)
    return Stored(_as_standing(verdicts, standing), clashes)


def _rows(verdicts: pl.DataFrame, rules_version: str, screened_at: datetime) -> pl.DataFrame:
    """Verdicts (VERDICT_SCHEMA, or less of an order) as `raw_orders` has them."""
    lists = [reason_lists(verdicts[column]).alias(name) for column, name in KINDS.items()]
    return (
        verdicts.hstack(lists)
        .with_columns(
            _STATUS,
            rules_version=pl.lit(rules_version),
            screened_at=pl.lit(screened_at).cast(UTC_MICROSECONDS),
        )
        .sort("order_id")  # two workers that meet wait for each other, in one order
    )


class Revised(NamedTuple):
    """What became of further reasons for stored orders.

    Attributes:
        verdicts: those that have got some since the time that was given, as they now stand: STORED_SCHEMA and `rules_version`,
            with the evidence for all of their reasons that is known.
        left_out: how many orders Postgres does not hold, or holds with other content.
    """

    verdicts: pl.DataFrame
    left_out: int


def revise(
    dsn: str,
    verdicts: pl.DataFrame,
    rules_version: str,
    screened_at: datetime,
    *,
    since: datetime | None = None,
    require: Callable[[ArrowCursor], None] = _nothing,
    and_then: Callable[[ArrowCursor], None] = _nothing,
) -> Revised:
    """Give orders in `raw_orders` further reasons, in one transaction. No order is inserted; repeating it changes nothing.

    Runs on a worker. What it answers is what `raw_orders` then holds, declared fields too: somebody may have been forgotten.
    Waits while Postgres restarts.

    Args:
        dsn, rules_version, screened_at, since, require, and_then: as for `store`.
        verdicts: VERDICT_SCHEMA, or less of an order than that; at most one an order.

    Raises:
        PostgresError: Postgres stays unreachable, or refuses.
    """
    rows, since = _rows(verdicts, rules_version, screened_at), since or screened_at
    content = [name for name in _CONTENT_SCHEMA if name in rows.columns]

    def work(cursor: ArrowCursor) -> tuple[pl.DataFrame, int]:
        require(cursor)
        known, standing = rows, pl.DataFrame(schema=_WHOLE_SCHEMA | {"evidence": pl.String()})
        if len(rows):
            stored = _fetched(cursor, _LOCKED, _CONTENT_SCHEMA, (_ids(rows),))
            known = rows.join(stored, on=content, how="semi", nulls_equal=True)
        if len(known):
            cursor.execute(f"{_REVISED} {_FURTHER_REASONS}", (_as_json(known),))
            standing = _fetched(cursor, _WHOLE, _WHOLE_SCHEMA, (_ids(known), since.isoformat()))
            standing = _with_evidence(cursor, known, standing)
        and_then(cursor)
        return standing, len(rows) - len(known)

    standing, left_out = in_transaction(dsn, work)
    attributes = pl.Series([_as_given(text) for text in standing["attributes"]], dtype=pl.String)
    position = {name: pl.lit(None, VERDICT_SCHEMA[name]) for name in _POSITION}
    whole = standing.with_columns(attributes=attributes, **_reason_texts(standing), **position)
    whole = whole.join(verdicts.select("order_id", *NEWS), on="order_id")
    return Revised(whole.select(*STORED_SCHEMA.names(), "rules_version"), left_out)


def _ids(rows: pl.DataFrame) -> str:
    return json.dumps(rows["order_id"].to_list())


def _as_given(attributes: str | None) -> str | None:
    """Attributes as jsonb spells them, as they were stored."""
    if attributes is None:
        return None
    return msgspec.json.encode(dict(sorted(_decode_attributes(attributes).items()))).decode()


_decode_attributes = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


_STANDING_SCHEMA = pl.Schema(
    {
        "order_id": pl.String(),
        **dict.fromkeys(KINDS.values(), pl.List(pl.String())),
        "screened_at": UTC_MICROSECONDS,
    }
)


class _Work(NamedTuple):
    """What belongs into one transaction: see `store`."""

    require: Callable[[ArrowCursor], None]
    rows: pl.DataFrame
    since: datetime
    and_then: Callable[[ArrowCursor], None]
    keeps_evidence: bool

    def copy_new(self, cursor: ArrowCursor) -> pl.DataFrame | None:
        """Copy new orders and add the reasons of revised ones: what stands of these. None where one is not that new."""
        self.require(cursor)
        revised = _copy_new(cursor, self.rows)
        if revised is not None:
            revised = self._with_evidence(cursor, revised)
            self.and_then(cursor)
        return revised

    def merge_known(self, cursor: ArrowCursor) -> tuple[pl.DataFrame, pl.DataFrame]:
        """Merge verdicts some of which were stored before: the clashes, or else the reasons that stand of those written now."""
        self.require(cursor)
        clashes, standing = _merge_known(cursor, self.rows, self.since)
        if clashes.is_empty():
            standing = self._with_evidence(cursor, standing)
            self.and_then(cursor)
        return clashes, standing

    def _with_evidence(self, cursor: ArrowCursor, standing: pl.DataFrame) -> pl.DataFrame:
        return _with_evidence(cursor, self.rows, standing) if self.keeps_evidence else standing


def _copy_new(cursor: ArrowCursor, rows: pl.DataFrame) -> pl.DataFrame | None:
    revised = rows.filter("revision")
    standing = pl.DataFrame(schema=_STANDING_SCHEMA)
    try:
        if len(revised) < len(rows):
            _copy(cursor, "raw_orders", rows.remove("revision") if len(revised) else rows, _STORED)
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
    return standing


def _merge_known(cursor: ArrowCursor, rows: pl.DataFrame, since: datetime) -> tuple[pl.DataFrame, pl.DataFrame]:
    _copy_screened(cursor, rows)
    clashes = _fetched(cursor, _CLASHES, CLASH_SCHEMA)
    if len(clashes):
        return clashes, pl.DataFrame(schema=_STANDING_SCHEMA)
    cursor.execute(_NEW_ORDERS)
    cursor.execute(_FURTHER_REASONS)
    return clashes, _fetched(cursor, _WRITTEN_NOW, _STANDING_SCHEMA, (since.isoformat(),))


def _as_standing(verdicts: pl.DataFrame, standing: pl.DataFrame) -> pl.DataFrame:
    """Those of the verdicts that are among the standing ones (STORED_SCHEMA), with the reasons and time of these."""
    texts = _reason_texts(standing)
    verdicts = verdicts.drop(*texts, *({"evidence"} & set(standing.columns)))
    return verdicts.join(standing.with_columns(**texts), on="order_id").select(STORED_SCHEMA.names())


# Reason → evidence as text: so the bytes of an alert are the same whoever sends it.
_NOTE = """
    insert into screening_evidence (order_id, evidence)
    select order_id, evidence from jsonb_to_recordset($1::jsonb) as noted (order_id text, evidence jsonb) order by order_id
    on conflict (order_id) do update
    set evidence = screening_evidence.evidence || excluded.evidence, noted_at = excluded.noted_at
"""
_NOTED = """
    select order_id, evidence::text as noted from screening_evidence
    where order_id in (select jsonb_array_elements_text($1::jsonb))
"""
_decode_noted = msgspec.json.Decoder(dict[str, str]).decode


def _with_evidence(cursor: ArrowCursor, rows: pl.DataFrame, standing: pl.DataFrame) -> pl.DataFrame:
    """What stands, with the `evidence` for all of its reasons, whoever found them. Notes before what `rows` have."""
    found = rows.select("order_id", "evidence").drop_nulls()
    if len(found):
        texts = [{name: bytes(part).decode() for name, part in decode_evidence(text).items()} for text in found["evidence"]]
        noted = [{"order_id": order_id, "evidence": text} for order_id, text in zip(found["order_id"], texts, strict=True)]
        cursor.execute(_NOTE, (json.dumps(noted),))
    all_noted = _fetched(cursor, _NOTED, pl.Schema({"order_id": pl.String(), "noted": pl.String()}), (_ids(standing),))
    whole = pl.Series("evidence", [_as_evidence(text) for text in all_noted["noted"]], dtype=pl.String)
    return standing.join(all_noted.select("order_id", whole), on="order_id", how="left")


def _as_evidence(noted: str) -> str:
    """Evidence as alerts have it, of what is noted."""
    return "{" + ",".join(f'"{reason}":{text}' for reason, text in sorted(_decode_noted(noted).items())) + "}"


def _reason_texts(standing: pl.DataFrame) -> dict[str, pl.Series]:
    """Reasons as Postgres has them, as texts of their columns in screening."""
    return {column: pl.Series(map(reason_text, standing[name]), dtype=pl.String) for column, name in KINDS.items()}


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

_STILL_SUPPRESSED = """array(
    select distinct reason collate "C" from unnest(stored.suppressed_reasons || screened.suppressed_reasons) as reason
    where reason <> all (stored.reasons || screened.reasons) order by 1
)"""

# Reasons only accumulate, and Fraud wins, also over a reason that was suppressed: replays and any order of arrival end in the
# same table. With them the time grows, also where a micro-batch is done again in other parts: who reads verdicts takes the one
# of the greatest time.
_FURTHER_REASONS = f"""
    update raw_orders as stored
    set reasons = {_UNITED.format(reasons="reasons")}, shadow_reasons = {_UNITED.format(reasons="shadow_reasons")},
        suppressed_reasons = {_STILL_SUPPRESSED},
        status = case when screened.status = 'Fraud' then 'Fraud' else stored.status end,
        rules_version = screened.rules_version, change_xid = pg_current_xact_id(),
        screened_at = greatest(screened.screened_at, stored.screened_at + interval '1 microsecond')
    from screened
    where stored.order_id = screened.order_id
      and not (
          screened.reasons <@ stored.reasons and screened.shadow_reasons <@ stored.shadow_reasons
          and screened.suppressed_reasons <@ (stored.suppressed_reasons || stored.reasons)
      )
"""

# What a revision brings, in the place of the table above.
_REVISED = """
    with screened as (
        select * from jsonb_to_recordset($1::jsonb) as revised (
            order_id text, status text, reasons text[], shadow_reasons text[], suppressed_reasons text[], rules_version text,
            screened_at timestamptz
        )
    )
"""


def _as_json(revised: pl.DataFrame) -> str:
    columns = ("order_id", "status", *KINDS.values(), "rules_version")
    return revised.select(*columns, pl.col("screened_at").dt.strftime(_ISO_MICROSECONDS)).write_json()


_STANDING = ", ".join(f"stored.{name}" for name in _STANDING_SCHEMA)

# Who revises may meet another at an order: they wait for each other, in one order.
_LOCKED = """
    select {columns} from raw_orders
    where order_id in (select jsonb_array_elements_text($1::jsonb)) order by order_id for update
""".format(columns=", ".join(_CONTENT_SCHEMA))

_WHOLE_SCHEMA = pl.Schema(
    {
        **{name: VERDICT_SCHEMA[name] for name in (*_ORDER_FIELDS, "created_date", "event_ts", "source", "attributes")},
        **{name: dtype for name, dtype in _STANDING_SCHEMA.items() if name != "order_id"},
        "rules_version": pl.String(),
    }
)
_WHOLE = """
    select {columns} from raw_orders as stored
    where order_id in (select jsonb_array_elements_text($1::jsonb)) and screened_at >= $2::timestamptz order by order_id
""".format(columns=", ".join(f"{name}::text" if name == "attributes" else name for name in _WHOLE_SCHEMA))

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

_WRITTEN_NOW = f"""
    select {_STANDING} from raw_orders as stored join screened using (order_id)
    where stored.screened_at >= $1::timestamptz
"""


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
    """Verdicts on stored orders (VERDICT_SCHEMA) as they stand in `raw_orders` (STORED_SCHEMA). Runs on a worker.

    Raises:
        PostgresError: Postgres stays unreachable, or refuses.
    """
    query = f"select {_STANDING} from raw_orders as stored where order_id in (select jsonb_array_elements_text($1::jsonb))"
    rows = in_transaction(dsn, lambda cursor: _fetched(cursor, query, _STANDING_SCHEMA, (_ids(verdicts),)))
    return _as_standing(verdicts, rows)


_NEEDED_RIGHTS = {
    "raw_orders": ("select", "insert", "update"),
    "screening_state": ("select", "insert", "update", "delete"),
    "screening_ledger": ("select", "insert", "update", "delete"),
    "screening_drivers": ("select", "insert", "update"),
    "screening_evidence": ("select", "insert", "update", "delete"),
}


def require_tables(dsn: str) -> None:
    """Check that Postgres answers and has the tables that screening writes, and that this login may.

    Raises:
        PostgresError: unreachable, refused, a table or a right is missing.
    """
    with explained(dsn), connect(dsn, application_name="finpro screen") as connection, connection.cursor() as cursor:
        require_rights(cursor, "finpro_screen", _NEEDED_RIGHTS)


def _copy_screened(cursor: ArrowCursor, rows: pl.DataFrame) -> None:
    cursor.execute(_SCREENED)
    _copy(cursor, "screened", rows, (*_STORED, *_POSITION), temporary=True)


def _copy(cursor: ArrowCursor, table: str, rows: pl.DataFrame, columns: Sequence[str], *, temporary: bool = False) -> None:
    # ADBC copies a text byte by byte, also into a column of jsonb, whose binary form begins with the number of its version.
    attributes = ("\x01" + pl.col("attributes")).alias("attributes")
    arrow = rows.select(attributes if name == "attributes" else name for name in columns)
    cursor.copy(table, arrow.to_arrow(compat_level=pl.CompatLevel.oldest()), temporary=temporary)


def _fetched(cursor: ArrowCursor, query: str, schema: pl.Schema, values: tuple[Any, ...] = ()) -> pl.DataFrame:
    return pl.DataFrame(cursor.execute(query, values)).cast(schema)


def in_transaction(dsn: str, work: Callable[[ArrowCursor], _Result]) -> _Result:
    """Do `work` in one transaction of this worker process's connection; undone where it returns None or raises.

    Raises:
        PostgresError: Postgres stays unreachable, or refuses.
    """
    return until_reachable(lambda: _transaction(dsn, work))


def _transaction(dsn: str, work: Callable[[ArrowCursor], _Result]) -> _Result:
    session = _worker_connection(dsn)
    connection, cursor = session.connection, ArrowCursor(session.connection)
    try:
        try:
            if session.at_begin:
                cursor.execute(session.at_begin)
            result = work(cursor)
        except FinproError:
            connection.rollback()
            raise
        if result is None:
            connection.rollback()
        else:
            connection.commit()
    except adbc_driver_manager.Error as error:
        _worker_connection.cache_clear()
        raise reported(dsn, error) from error
    return result


@lru_cache(maxsize=1)
def _worker_connection(dsn: str) -> ArrowSession:
    """One connection a worker process, kept between micro-batches. Its transactions are ended here."""
    session = open_arrow_session(dsn, application_name="finpro screen worker", limits=USUAL)
    session.connection.set_autocommit(False)
    return session


# --- announce --------------------------------------------------------------------------------------------------------

_SLICE = 20_000  # rows that are encoded at once
_REASON_CHARACTERS = 500


@dataclass(frozen=True)
class KafkaSink:
    """Where and how the workers send: plain values, so that it can travel to them.

    Attributes:
        config: of a librdkafka client.
        topics: full name of each of finpro's topics.
        dead_letter_bytes: the largest message that a dead letter holds whole.
    """

    config: dict[str, Any]
    topics: dict[str, str]
    dead_letter_bytes: int = 1_000_000


# A dead letter has a key and headers beside its value, and Kafka adds a little of its own.
_OVERHEAD_BYTES = 4_096


def kafka_sink(settings: Settings) -> KafkaSink:
    """The sink that settings name. A dead letter holds as much as its topic takes."""
    topics = {name: settings.topic(name) for name in TOPICS}
    most = largest_message(settings, ORDERS_DEAD_LETTER) - _OVERHEAD_BYTES
    return KafkaSink(librdkafka_config(settings), topics, max(most, 1))


class Announcer:
    """Sends what a task has to say, through this worker process's producer. Runs on a worker.

    Every method raises KafkaError where a record is not taken.
    """

    def __init__(self, sink: KafkaSink) -> None:
        self._sink = sink
        with self._producing():  # a new one has its id, for which it waits half a second, when there is something to say
            pass

    def verdicts(self, verdicts: pl.DataFrame, rules_version: str, application: int | None = None) -> None:
        """Send verdicts (STORED_SCHEMA), and alerts; `application` as for `encode_verdicts`."""
        with self._producing() as producer:
            for part in verdicts.iter_slices(_SLICE):
                encoded = encode_verdicts(part, rules_version, application)
                frauds = encoded.drop_nulls("alert")
                for topic, column, said in ((PROCESSED_ORDERS, "verdict", encoded), (FRAUD_ALERT, "alert", frauds)):
                    if len(said):
                        producer.send(self._sink.topics[topic], _binary(said["order_id"]), _binary(said[column]))

    def dead_letters(self, dead_letters: pl.DataFrame) -> None:
        """Send dead letters (DEAD_LETTER_SCHEMA).

        Of a message that is too large for one its beginning is kept, and a header `size` says how many bytes it had.
        """
        if dead_letters.is_empty():
            return
        most = self._sink.dead_letter_bytes
        keys = dead_letters.select(pl.concat_str("topic", "partition", "offset", separator="-")).to_series()
        headers = [_headers(dead_letter) for dead_letter in dead_letters.drop("value").iter_rows(named=True)]
        sizes = dead_letters["value"].bin.size()
        values = dead_letters["value"]
        if (sizes > most).any():
            values = pl.Series([value and value[:most] for value in values], dtype=pl.Binary)
            headers = [
                [*named, ("size", str(size).encode())] if size is not None and size > most else named
                for named, size in zip(headers, sizes, strict=True)
            ]
        with self._producing() as producer:
            producer.send_with_headers(self._sink.topics[ORDERS_DEAD_LETTER], _binary(keys), _binary(values), headers)

    def wait(self) -> None:
        """Wait until the brokers have all of it."""
        with self._producing() as producer:
            producer.wait()

    @contextmanager
    def _producing(self) -> Iterator[ColumnProducer]:
        """This process's producer: whoever comes after an error gets a new one."""
        producer = _worker_producer(tuple(sorted(self._sink.config.items())))
        try:
            yield producer
        except KafkaError:
            _worker_producer.cache_clear()
            producer.close()
            raise


def _headers(dead_letter: dict[str, Any]) -> list[tuple[str, bytes]]:
    said = dead_letter | {"reason": dead_letter["reason"][:_REASON_CHARACTERS]}
    return [(name, str(said[name]).encode()) for name in ("reason", "topic", "partition", "offset", "received_at")]


def _binary(values: pl.Series) -> pa.Array:
    return values.cast(pl.Binary).to_arrow(compat_level=pl.CompatLevel.oldest())


@lru_cache(maxsize=1)
def _worker_producer(config: tuple[tuple[str, Any], ...]) -> ColumnProducer:
    """One producer a worker process, kept between micro-batches."""
    return ColumnProducer(dict(config))


def encode_verdicts(verdicts: pl.DataFrame, rules_version: str, application: int | None = None) -> pl.DataFrame:
    """Verdicts (STORED_SCHEMA) as JSON: columns `order_id`, `verdict`, and `alert` (null where genuine).

    What has no declared fields says nothing of them, and what has no suppressed reasons nothing of these. Only revisions of
    orders of before name an `application`, its number.
    """
    verdict = _verdict(rules_version)
    if verdicts["attributes"].null_count() < len(verdicts):
        attributes = (',"attributes":' + pl.col("attributes")).fill_null("")
        verdict = verdict.str.strip_suffix("}") + attributes + "}"
    if (verdicts["suppressed"] != "").any():
        names = ',"suppressed_reasons":["' + pl.col("suppressed").str.replace_all(",", '","', literal=True) + '"]'
        suppressed = pl.when(pl.col("suppressed") != "").then(names).otherwise(pl.lit(""))
        verdict = verdict.str.strip_suffix("}") + suppressed + "}"
    if application is not None:
        verdict = verdict.str.strip_suffix("}") + f',"application":{application}' + "}"
    alert = pl.col("verdict").str.strip_suffix("}") + ',"evidence":' + pl.col("evidence") + "}"
    lists = [reason_lists(verdicts[column]).alias(KINDS[column]) for column in ("given", "shadow")]
    return (
        verdicts.hstack(lists)
        .with_columns(verdict=verdict, evidence=_alerted(verdicts))
        .select("order_id", "verdict", pl.when(_IS_FRAUD).then(alert).alias("alert"))
    )


@lru_cache(maxsize=16)
def _verdict(rules_version: str) -> pl.Expr:
    """A verdict as JSON, of what every order has."""
    iso = {name: pl.col(name).dt.strftime(_ISO_MICROSECONDS) for name in ("created_date", "event_ts", "screened_at")}
    return pl.struct(
        *_ORDER_FIELDS,
        iso["created_date"],
        iso["event_ts"],
        _STATUS,
        "source",
        "reasons",
        "shadow_reasons",
        pl.lit(rules_version).alias("rules_version"),
        iso["screened_at"],
    ).struct.json_encode()


def _alerted(verdicts: pl.DataFrame) -> pl.Series:
    """The evidence for the reasons of each fraud, as JSON: none for those of other kinds, which few have beside them."""
    has_others = (verdicts["shadow"] != "") | (verdicts["suppressed"] != "")
    both = np.flatnonzero(((verdicts["given"] != "") & has_others).to_numpy())
    evidence = verdicts["evidence"].fill_null("{}")
    if not len(both):
        return evidence
    texts = [evidence_for(reasons, text) for reasons, text in zip(verdicts["given"][both], evidence[both], strict=True)]
    return evidence.scatter(both, pl.Series(texts, dtype=pl.String))
