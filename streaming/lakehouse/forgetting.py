"""Somebody is forgotten in the lakehouse: their messages in bronze and dead letters in quarantine say only what they have to.

What was replaced is deleted at once, and with it the way back to versions of before. In silver their orders lose the declared
fields: of the others the user's number is the only one that tells of a person.
"""

from collections.abc import Collection, Iterator, Sequence
from datetime import date, datetime, timedelta
from functools import reduce
from itertools import pairwise
from typing import NamedTuple

import pyarrow as pa
from delta.tables import DeltaTable
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import to_arrow_schema
from pyspark.sql.types import BooleanType, StructField, StructType

from conf.conditions import Declared
from conf.errors import LakehouseError
from streaming.contract import NOTHING_DECLARED
from streaming.lakehouse.erased_messages import left_of
from streaming.lakehouse.maintenance import vacuum
from streaming.lakehouse.tables import BRONZE, BRONZE_ORDERS, QUARANTINE_ORDERS, SILVER_ORDERS, Table, commit, is_among, same
from streaming.small_files import Folder

_POSITION = ("topic", "partition", "offset", "received_date")
_TYPES = {field.name: field for field in BRONZE.fields}
# What is left of messages: where they lie, what stands there, and as erased_messages.Left.
_LEFT = StructType(
    [
        *(_TYPES[name] for name in (*_POSITION, "value", "key", "headers")),
        StructField("is_dead_letter", BooleanType(), nullable=False),
        StructField("is_new", BooleanType(), nullable=False),
    ]
)
# Of an attempt to write that died, which no version knows. A younger one may belong to somebody who is about to commit it.
_ORPHANS = timedelta(hours=24)


class Forgot(NamedTuple):
    """What was erased: messages of bronze, verdicts of silver, dead letters of quarantine, and replaced files."""

    messages_of_bronze: int
    verdicts: int
    dead_letters: int
    files_deleted: int


def forget_in_lakehouse(
    spark: SparkSession,
    lakehouse: str,
    users: Collection[int],
    erased_at: datetime,
    declared: Sequence[tuple[datetime, Declared]],
    *,
    dry_run: bool,
) -> Forgot | None:
    """Erase what bronze, silver and quarantine hold of these users beyond the contract, and the files that held it.

    All of bronze is read. Beside the archive this is safe: see `tables.commit`. Who reads a table meanwhile may miss a file.

    Args:
        spark: with maintenance.PROPERTIES.
        lakehouse: a path, or gs://bucket/folder.
        users: who is forgotten.
        erased_at: marks the messages that are changed.
        declared: which fields the rules declared since when, the oldest first.
        dry_run: count only.

    Returns:
        None where there is no lakehouse.

    Raises:
        LakehouseError: another process writes all the time, or an unfinished replay holds copies.
    """
    bronze, quarantine = (BRONZE_ORDERS.path(lakehouse), QUARANTINE_ORDERS.path(lakehouse))
    if not DeltaTable.isDeltaTable(spark, bronze):
        return None
    _require_no_draft(spark, lakehouse)
    ever = {name: kind for _, fields in declared for name, kind in fields.items()}
    messages = _as_declared(spark.read.format("delta").load(bronze), declared)
    left = reduce(DataFrame.unionByName, (_left(part, frozenset(users), erased_at, then) for part, then in messages)).persist()
    dead_letters = _dead_letters(spark.read.format("delta").load(quarantine), left, frozenset(users), erased_at, ever).persist()
    has_attributes = F.col("user_id").isin(list(users)) & F.col("attributes").isNotNull()
    silver = DeltaTable.forPath(spark, SILVER_ORDERS.path(lakehouse))
    try:
        new = left.where("is_new")
        changed, dead_letter_count, files = new.count(), dead_letters.count(), 0
        verdicts = silver.toDF().where(has_attributes).count() if "attributes" in silver.toDF().columns else 0
        if not dry_run:
            _replace(spark, lakehouse, BRONZE_ORDERS, new, ("value", "key", "headers"))
            _replace(spark, lakehouse, QUARANTINE_ORDERS, dead_letters, ("value",))
            tables = [BRONZE_ORDERS, QUARANTINE_ORDERS]
            if verdicts:
                commit(lakehouse, SILVER_ORDERS, lambda: silver.update(has_attributes, {"attributes": F.lit(None)}))
            if ever:
                _purge(spark, lakehouse, SILVER_ORDERS)
                tables.append(SILVER_ORDERS)
            files = sum(_delete_replaced(spark, lakehouse, table) for table in tables)
    finally:
        left.unpersist()
        dead_letters.unpersist()
    return Forgot(changed, verdicts, dead_letter_count, files)


def _require_no_draft(spark: SparkSession, lakehouse: str) -> None:
    if Folder(spark, f"{lakehouse.rstrip('/')}/replay", "FINPRO_LAKEHOUSE").names():
        raise LakehouseError(
            f"{lakehouse}/replay holds copies of messages, of a replay that has not come to its end:"
            " `finpro screen --from-bronze` goes on with it. Then forget again."
        )


def _as_declared(messages: DataFrame, declared: Sequence[tuple[datetime, Declared]]) -> list[tuple[DataFrame, Declared]]:
    """Messages (of bronze) divided by the fields that were declared when they were received."""
    if not declared:
        return [(messages, NOTHING_DECLARED)]
    changes = [(since, fields) for (_, before), (since, fields) in pairwise(declared) if fields != before]
    parts, until_now = [], F.lit(True)
    for since, fields in reversed(changes):
        parts.append((messages.where(until_now & (F.col("timestamp") >= F.lit(since))), fields))
        until_now = F.col("timestamp") < F.lit(since)
    return [*parts, (messages.where(until_now), declared[0][1])]


def _left(messages: DataFrame, users: frozenset[int], erased_at: datetime, declared: Declared) -> DataFrame:
    """What is left of these users' messages (of bronze): _LEFT, of those alone that hold more or break the contract."""
    schema, at = to_arrow_schema(_LEFT, timezone="UTC"), erased_at.isoformat(timespec="seconds")

    def find(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            found = left_of(batch, users, at, declared)
            places = batch.select(_POSITION).take(pa.array(found.keys(), pa.int64())).to_pylist()
            rows = [place | one._asdict() for place, one in zip(places, found.values(), strict=True)]
            if rows:
                yield pa.RecordBatch.from_pylist(rows, schema=schema)

    return messages.select(*_POSITION, "value", "key", "headers").mapInArrow(find, _LEFT)


def _dead_letters(
    quarantine: DataFrame, left: DataFrame, users: frozenset[int], erased_at: datetime, ever_declared: Declared
) -> DataFrame:
    """What is left of these users' dead letters: a position and a value, of those alone that hold more.

    Whose a dead letter is says its own message in bronze, of which a large one has the beginning only; or, where the archive
    has no message yet, the dead letter.
    """
    own = quarantine.select("*", F.lit(None).cast("binary").alias("key"))
    own = own.withColumn("headers", F.lit(None).cast(_TYPES["headers"].dataType))
    of_themselves = _left(own, users, erased_at, ever_declared).where("is_new").select(*_POSITION, "value")
    of_bronze = left.where("is_dead_letter").select(*_POSITION, F.col("value").alias("left"))
    of_bronze = quarantine.join(of_bronze, list(_POSITION)).where(F.col("value") != F.col("left"))
    of_bronze = of_bronze.select(*_POSITION, F.col("left").alias("value"))
    return of_bronze.unionByName(of_themselves.join(of_bronze, list(_POSITION), "left_anti"))


def _replace(spark: SparkSession, lakehouse: str, table: Table, rows: DataFrame, columns: tuple[str, ...]) -> None:
    """Put the columns of rows in the place of what stands at their positions."""
    days: list[date] = [row[table.day] for row in rows.select(table.day).distinct().collect()]
    if not days:
        return
    is_there = same(*_POSITION) & is_among(f"stored.{table.day}", days)

    def write() -> None:
        stored = DeltaTable.forPath(spark, table.path(lakehouse)).alias("stored")
        stored.merge(rows.alias("new"), is_there).whenMatchedUpdate(set={name: f"new.{name}" for name in columns}).execute()

    commit(lakehouse, table, write)


def _purge(spark: SparkSession, lakehouse: str, table: Table) -> None:
    """Write those files anew that hold rows which are only marked as deleted."""
    commit(lakehouse, table, lambda: spark.sql(f"reorg table {table.in_sql(lakehouse)} apply (purge)"))


def _delete_replaced(spark: SparkSession, lakehouse: str, table: Table) -> int:
    """Delete the files that the table no longer consists of; returns how many.

    Those that its log knows go at once (`lite` looks there, and not at what lies in the folders, where others' files may wait
    for their commit); those of attempts that died, once they are a day old.
    """
    orphans = vacuum(spark, lakehouse, table, _ORPHANS)
    return orphans + vacuum(spark, lakehouse, table, timedelta(0), lite=True)
