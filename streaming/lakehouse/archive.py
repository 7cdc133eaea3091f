"""Archiving: what lies on Kafka goes into the lakehouse's three Delta tables, each message exactly once.

Three streams, each on its own: `orders` to bronze, `processed_orders` to silver, `orders_dead_letter` to quarantine. Bronze
is appended to, and Delta remembers with each append which micro-batch it was. The others are merged by a key.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from functools import reduce
from operator import and_, or_
from time import monotonic
from typing import Any

from delta.tables import DeltaMergeBuilder, DeltaTable
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from pyspark.sql.types import StringType, StructField, StructType, TimestampType
from rich.console import Console

from conf.errors import LakehouseError
from streaming.contract import EARLIEST, FRAUD, GENUINE, LATEST
from streaming.expressions import Expressions
from streaming.kafka import unread
from streaming.lakehouse.continuation import AppendId
from streaming.lakehouse.tables import (
    BRONZE,
    BRONZE_ORDERS,
    QUARANTINE,
    QUARANTINE_ORDERS,
    SILVER,
    SILVER_ORDERS,
    Table,
    commit,
    is_among,
    same,
)

SinkFunction = Callable[[DataFrame, int], None]
_Values = dict[str, str | Column]

_SECONDS_BETWEEN_LINES = 5.0
_EPOCH, _MICROSECOND = datetime(1970, 1, 1, tzinfo=UTC), timedelta(microseconds=1)


# --- bronze ----------------------------------------------------------------------------------------------------------


def as_received(messages: DataFrame) -> DataFrame:
    """Messages of Spark's Kafka source, headers included, as BRONZE."""
    return messages.select(
        *BRONZE.names[:5],
        F.col("timestampType").alias("timestamp_type"),
        "key",
        "headers",
        F.to_date(_dated("timestamp")).alias("received_date"),
    )


def _dated(timestamp: str) -> Column:
    """A timestamp as the contract has it: what a producer gives may be of a year that is no folder's name elsewhere."""
    first, last = (F.timestamp_micros(F.lit((moment - _EPOCH) // _MICROSECOND)) for moment in (EARLIEST, LATEST))
    return F.least(F.greatest(F.col(timestamp), first), last)


def append_to_bronze(lakehouse: str, topic: str, topic_id: str, files: int) -> SinkFunction:
    """Appends a micro-batch of `orders`, in at most so many files a day; one that bronze has already is left out.

    Delta knows a micro-batch by its number and its query: a new checkpoint is a new query, and has to begin where bronze ends.
    """

    def append(batch: DataFrame, batch_id: int) -> None:
        query_id = batch.sparkSession.sparkContext.getLocalProperty("sql.streaming.queryId") or ""
        writer = batch.transform(as_received).coalesce(files).write.format("delta").mode("append")
        writer = writer.option("txnAppId", str(AppendId(topic, topic_id, query_id))).option("txnVersion", batch_id)
        commit(lakehouse, BRONZE_ORDERS, lambda: writer.save(BRONZE_ORDERS.path(lakehouse)))

    return append


# --- silver ----------------------------------------------------------------------------------------------------------

_STANDING = ("reasons", "shadow_reasons", "suppressed_reasons", "rules_version", "screened_at")
_ORDER = [name for name in SILVER.names if name not in (*_STANDING, "status")]
_VERDICT = [field for field in SILVER.fields if field.name not in ("status", "event_date")]
_JSON = StructType(
    [StructField(field.name, StringType() if field.dataType == TimestampType() else field.dataType) for field in _VERDICT]
)


def verdicts(messages: DataFrame) -> DataFrame:
    """Messages of `processed_orders` as columns: `place`, `partition`, `offset`, SILVER without `status`, `is_readable`."""
    fields = F.from_json(F.col("value").cast("string"), _JSON)
    typed = {field.name: fields[field.name].try_cast(field.dataType) for field in _VERDICT}
    typed |= {name: _or_empty(typed[name]) for name in ("shadow_reasons", "suppressed_reasons")}
    required = {field.name: typed[field.name] for field in _VERDICT if not field.nullable}
    columns = messages.select(_place(), "partition", "offset", *(column.alias(name) for name, column in typed.items()))
    return columns.withColumns({"event_date": F.to_date("event_ts"), "is_readable": _all_there(required)})


def _or_empty(reasons: Column) -> Column:
    return F.coalesce(reasons, F.array().cast("array<string>"))


def merge_into_silver(lakehouse: str) -> SinkFunction:
    """Merges a micro-batch of `processed_orders`: reasons only accumulate, Fraud wins; the same again changes nothing.

    Raises:
        LakehouseError: a message is not a verdict.
    """

    expressions = Expressions()

    def merge(batch: DataFrame, _: int) -> None:
        with _kept(batch.transform(verdicts)) as rows:
            days = _days(rows, "event_date", "verdict", expressions)
            if days:
                silver = DeltaTable.forPath(batch.sparkSession, SILVER_ORDERS.path(lakehouse))
                commit(lakehouse, SILVER_ORDERS, lambda: _merged_verdicts(silver, rows, days).execute())

    return merge


def _merged_verdicts(silver: DeltaTable, rows: DataFrame, days: list[date]) -> DeltaMergeBuilder:
    given = F.sort_array(F.collect_list(F.struct("partition", "offset", *_STANDING)))
    orders = rows.groupBy("order_id").agg(*(F.first(name).alias(name) for name in _ORDER[1:]), given.alias("given"))
    first = _standing(lambda name: F.col("new.given")[0][name])
    stored = _standing(lambda name: F.col(f"stored.{name}"))
    of_order: _Values = {name: F.col(f"new.{name}") for name in _ORDER}
    return (
        silver.alias("stored")
        .merge(orders.alias("new"), same("order_id", "event_date") & is_among("stored.event_date", days))
        .whenMatchedUpdate(_accumulated(stored) != stored, _in_force(_accumulated(stored)))
        .whenNotMatchedInsert(values=of_order | _in_force(_accumulated(first)))
    )


def _standing(column: Callable[[str], Column]) -> Column:
    columns = {name: column(name) for name in _STANDING}
    columns["suppressed_reasons"] = _or_empty(columns["suppressed_reasons"])
    return F.struct(*(column.alias(name) for name, column in columns.items()))


def _accumulated(standing: Column) -> Column:
    """What stands (a struct of _STANDING) once the verdicts `new.given` have come, the oldest first."""

    def after(stands: Column, verdict: Column) -> Column:
        reasons, shadow, suppressed = (F.array_union(stands[name], verdict[name]) for name in _STANDING[:3])
        # Fraud wins: a reason that an order was given is none that was suppressed.
        united = [F.sort_array(one) for one in (reasons, shadow, F.array_except(suppressed, reasons))]
        lacks = [
            F.size(F.array_except(verdict["reasons"], stands["reasons"])) > 0,
            F.size(F.array_except(verdict["shadow_reasons"], stands["shadow_reasons"])) > 0,
            F.size(F.array_except(united[2], stands["suppressed_reasons"])) > 0,
        ]
        by = [F.when(reduce(or_, lacks), verdict[name]).otherwise(stands[name]) for name in ("rules_version", "screened_at")]
        return F.struct(*(column.alias(name) for name, column in zip(_STANDING, [*united, *by], strict=True)))

    return F.aggregate("new.given", standing, after)


def _in_force(standing: Column) -> _Values:
    status = F.when(F.size(standing["reasons"]) > 0, F.lit(FRAUD)).otherwise(F.lit(GENUINE))
    return {"status": status, **{name: standing[name] for name in _STANDING}}


# --- quarantine ------------------------------------------------------------------------------------------------------

_DEAD_LETTER = [field for field in QUARANTINE.fields if field.name not in ("value", "received_date")]


def dead_letters(messages: DataFrame) -> DataFrame:
    """Messages of `orders_dead_letter` as columns: QUARANTINE, `place` and `dead_letter` of its own, `is_readable`.

    The position of the message that it is about is in its headers. Of several of one name the first counts: screening writes
    one, and who passes a message on appends.
    """
    typed = {field.name: _header(field.name).cast("string").try_cast(field.dataType) for field in _DEAD_LETTER}
    columns = messages.select(
        _place(),
        F.struct("partition", "offset").alias("dead_letter"),
        "value",
        *(column.alias(name) for name, column in typed.items()),
    )
    return columns.withColumns({"received_date": F.to_date("received_at"), "is_readable": _all_there(typed)})


def _header(name: str) -> Column:
    return F.get(F.filter("headers", lambda header: header["key"] == name), 0)["value"]


def merge_into_quarantine(lakehouse: str) -> SinkFunction:
    """Merges a micro-batch of `orders_dead_letter`: of several letters about one message the first stands.

    Raises:
        LakehouseError: a message is not a dead letter.
    """

    expressions = Expressions()

    def merge(batch: DataFrame, _: int) -> None:
        with _kept(batch.transform(dead_letters)) as rows:
            days = _days(rows, "received_date", "dead letter", expressions)
            if days:
                quarantine = DeltaTable.forPath(batch.sparkSession, QUARANTINE_ORDERS.path(lakehouse))
                commit(lakehouse, QUARANTINE_ORDERS, lambda: _merged_dead_letters(quarantine, rows, days).execute())

    return merge


def _merged_dead_letters(quarantine: DeltaTable, rows: DataFrame, days: list[date]) -> DeltaMergeBuilder:
    first = F.min_by(F.struct(*QUARANTINE.names), "dead_letter").alias("first")
    dead_letters = rows.groupBy(*_POSITION).agg(first).select("first.*")
    is_here = same(*_POSITION, "received_date") & is_among("stored.received_date", days)
    return quarantine.alias("stored").merge(dead_letters.alias("new"), is_here).whenNotMatchedInsertAll()


_POSITION = ("topic", "partition", "offset")


# --- both merges -----------------------------------------------------------------------------------------------------


def _place() -> Column:
    return F.concat_ws("-", "topic", "partition", "offset").alias("place")


def _all_there(columns: dict[str, Column]) -> Column:
    return reduce(and_, (F.col(name).isNotNull() for name in columns))


@contextmanager
def _kept(rows: DataFrame) -> Iterator[DataFrame]:
    """Rows kept while they are merged, since a merge reads them several times."""
    rows.persist()
    try:
        yield rows
    finally:
        rows.unpersist()


def _days(rows: DataFrame, day: str, what: str, expressions: Expressions) -> list[date]:
    """The days that the rows belong to: a merge looks at those partitions only. Refuses a message that is not one of ours.

    From here on, and until the next micro-batch is here, expressions are evaluated as suits so many messages.
    """
    found = rows.groupBy(day, "is_readable").agg(F.min("place").alias("place"), F.count("*").alias("messages")).collect()
    expressions.suit(rows.sparkSession, sum(row["messages"] for row in found))
    for row in found:
        if not row["is_readable"]:
            raise LakehouseError(
                f"The message {row['place']} (topic, partition, offset) is not a {what} of finpro's: who else writes there?"
                " It and what came with it was not archived. docs/lakehouse.md says how to go on without it."
            )
    return [row[day] for row in found]


# --- progress --------------------------------------------------------------------------------------------------------


class ArchiveProgress:
    """Prints how many messages have gone into a table: at most a line every few seconds, and one at the end."""

    def __init__(self, table: Table, console: Console | None = None) -> None:
        self._name = table.name
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._first: int | None = None  # sum of the offsets where this run began
        self._shown_at, self._shown = monotonic(), 0

    def show(self, progress: Any, *, finished: bool = False) -> None:
        """Print where the stream stands, if that has changed; `progress` is Spark's own of the last micro-batch."""
        archived, now = self._archived(progress), monotonic()
        if not finished and (archived == self._shown or now - self._shown_at < _SECONDS_BETWEEN_LINES):
            return
        moment = "done" if finished else f"{datetime.now(UTC):%H:%M:%S}"
        parts = [f"{moment}  {self._name}: {archived:,} messages"]
        if not finished:
            parts.append(f"{(archived - self._shown) / (now - self._shown_at):,.0f}/s")
        lag = unread(progress)
        self._console.print(" | ".join(parts if lag is None else [*parts, f"lag {lag:,}"]))
        self._shown_at, self._shown = now, archived

    def _archived(self, progress: Any) -> int:
        """How many messages this run has archived: by the offsets, since not every micro-batch is shown here."""
        if not progress:
            return 0
        reached = sum(sum(partitions.values()) for partitions in json.loads(progress["sources"][0]["endOffset"]).values())
        if self._first is None:
            self._first = reached - progress["numInputRows"]
        return int(reached - self._first)
