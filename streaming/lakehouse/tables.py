"""The lakehouse: Delta tables of orders, where they lie, and what columns they have.

Bronze is every message as received, silver the verdict in force for each order, quarantine the dead letters; and, beside
silver, what turned out about orders.
"""

import fcntl
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from functools import reduce
from operator import and_
from pathlib import Path
from typing import Any

import tenacity
from delta.exceptions import (
    ConcurrentAppendException,
    ConcurrentDeleteDeleteException,
    ConcurrentDeleteReadException,
    ConcurrentWriteException,
)
from delta.tables import DeltaTable
from py4j.protocol import Py4JError
from pyspark.errors import PySparkException
from pyspark.sql import Column, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import (
    ArrayType,
    BinaryType,
    DataType,
    DateType,
    IntegerType,
    LongType,
    StringType,
    StructField,
    StructType,
    TimestampType,
)

from conf.errors import LakehouseError

_TRIES = 10


def _columns(*, required: dict[str, DataType], optional: dict[str, DataType] | None = None) -> StructType:
    fields = [StructField(name, dtype, nullable=False) for name, dtype in required.items()]
    return StructType(fields + [StructField(name, dtype) for name, dtype in (optional or {}).items()])


_TEXTS = ArrayType(StringType())
_HEADERS = ArrayType(_columns(required={}, optional={"key": StringType(), "value": BinaryType()}))

# A message of `orders`, byte for byte. The first columns are those of contract.MESSAGE_COLUMNS.
BRONZE = _columns(
    required={
        "topic": StringType(),
        "partition": IntegerType(),
        "offset": LongType(),
        "timestamp": TimestampType(),  # Kafka's
    },
    optional={
        "value": BinaryType(),
        "timestamp_type": IntegerType(),  # 0: the producer's time, 1: the broker's
        "key": BinaryType(),
        "headers": _HEADERS,
        "received_date": DateType(),  # day of `timestamp`, UTC; within the years 1 to 9999
    },
)

# The verdict in force: one row an order. `amount_numeric` is whole rupiah.
SILVER = _columns(
    required={
        "order_id": StringType(),
        "user_id": LongType(),
        "product_id": LongType(),
        "quantity": LongType(),
        "amount": StringType(),
        "amount_numeric": LongType(),
        "country": StringType(),
        "created_date": TimestampType(),
        "event_ts": TimestampType(),
        "status": StringType(),
        "source": StringType(),
        "reasons": _TEXTS,
        "shadow_reasons": _TEXTS,
        "rules_version": StringType(),  # these two are of the verdict that last added something
        "screened_at": TimestampType(),
    },
    optional={
        "event_date": DateType(),  # day of `event_ts`, UTC
        "attributes": StringType(),  # the declared fields that the order has: a JSON object by name
        "suppressed_reasons": _TEXTS,  # null where the order was archived before there were any
    },
)

# A dead letter: one row a message of `orders` that could not be read, by its position there.
QUARANTINE = _columns(
    required={
        "topic": StringType(),
        "partition": IntegerType(),
        "offset": LongType(),
        "received_at": TimestampType(),
    },
    optional={
        "value": BinaryType(),
        "reason": StringType(),
        "received_date": DateType(),  # day of `received_at`, UTC
    },
)


# A statement about an order: a copy of Postgres's order_outcomes, without the words.
OUTCOMES = _columns(
    required={
        "outcome_id": LongType(),
        "order_id": StringType(),
        "outcome": StringType(),
        "reviewed_by": StringType(),
        "decided_at": TimestampType(),
        "source": StringType(),
        "ingested_at": TimestampType(),
    },
    optional={"decided_date": DateType()},  # day of `decided_at`, UTC
)


@dataclass(frozen=True)
class Table:
    """One table of the lakehouse.

    Attributes:
        name: folder below the lakehouse.
        schema: its columns.
        day: the column that partitions it.
        time: the column that `maintain` orders it by.
        properties: Delta's own.
    """

    name: str
    schema: StructType
    day: str
    time: str
    properties: dict[str, str]

    def path(self, lakehouse: str) -> str:
        """Where it lies in a lakehouse."""
        return f"{lakehouse.rstrip('/')}/{self.name}"

    def in_sql(self, lakehouse: str) -> str:
        """Its name in a statement."""
        path = self.path(lakehouse).replace("`", "``")
        return f"delta.`{path}`"


BRONZE_ORDERS = Table("bronze/orders", BRONZE, "received_date", "timestamp", {})
# A revision marks its order's old row as deleted, and does not write all other rows of that file again.
SILVER_ORDERS = Table("silver/orders", SILVER, "event_date", "event_ts", {"delta.enableDeletionVectors": "true"})
QUARANTINE_ORDERS = Table("quarantine/orders", QUARANTINE, "received_date", "received_at", {})
TABLES = (BRONZE_ORDERS, SILVER_ORDERS, QUARANTINE_ORDERS)
OUTCOMES_OF_ORDERS = Table("silver/outcomes", OUTCOMES, "decided_date", "decided_at", {})  # there once there is an outcome


def bronze_orders(lakehouse: str) -> str:
    """Where bronze lies: BRONZE."""
    return BRONZE_ORDERS.path(lakehouse)


def silver_orders(lakehouse: str) -> str:
    """Where silver lies: SILVER."""
    return SILVER_ORDERS.path(lakehouse)


def quarantine_orders(lakehouse: str) -> str:
    """Where quarantine lies: QUARANTINE."""
    return QUARANTINE_ORDERS.path(lakehouse)


def create_tables(spark: SparkSession, lakehouse: str) -> None:
    """Create those of TABLES that do not exist, and add the columns that one of an earlier version lacks.

    Raises:
        LakehouseError: the lakehouse cannot be written.
    """
    for table in TABLES:
        create_table(spark, lakehouse, table)


def create_table(spark: SparkSession, lakehouse: str, table: Table) -> None:
    """Create a table where it does not exist, or add the columns that it lacks.

    Raises:
        LakehouseError: the lakehouse cannot be written.
    """
    try:
        builder = DeltaTable.createIfNotExists(spark).location(table.path(lakehouse)).addColumns(table.schema)
        for key, value in table.properties.items():
            builder = builder.property(key, value)
        commit(lakehouse, table, builder.partitionedBy(table.day).execute)
        _add_columns(spark, lakehouse, table)
    except (OSError, Py4JError, PySparkException) as error:
        why = str(error).strip().splitlines()[0]
        raise LakehouseError(
            f"{lakehouse} cannot be written: is FINPRO_LAKEHOUSE right, and is this user allowed there?\n({why})"
        ) from error


def _add_columns(spark: SparkSession, lakehouse: str, table: Table) -> None:
    """Add the optional columns that the table lacks."""
    there = set(DeltaTable.forPath(spark, table.path(lakehouse)).toDF().columns)
    missing = [f"{field.name} {field.dataType.simpleString()}" for field in table.schema if field.name not in there]
    if missing:
        statement = f"alter table {table.in_sql(lakehouse)} add columns ({', '.join(missing)})"
        commit(lakehouse, table, lambda: spark.sql(statement))


def bronze_ends(spark: SparkSession, lakehouse: str, topic: str) -> dict[int, int]:
    """Partition of `topic` (a full name) → the offset after the last one that bronze holds. Reads two columns of all bronze."""
    bronze = spark.read.format("delta").load(bronze_orders(lakehouse)).where(F.col("topic") == topic)
    ends = bronze.groupBy("partition").agg((F.max("offset") + 1).alias("end"))
    return {row["partition"]: row["end"] for row in ends.collect()}


def is_among(day: str, days: Sequence[date]) -> Column:
    """Whether a column is one of these days: a condition by which a merge looks at those partitions only."""
    # As text: Python writes the year 1 as `1`, which Java takes for no date.
    return F.col(day).isin([F.expr(f"date'{one.isoformat()}'") for one in days])


def same(*names: str) -> Column:
    """Whether a merge's `stored` and `new` rows are the same in these columns."""
    return reduce(and_, (F.col(f"stored.{name}") == F.col(f"new.{name}") for name in names))


def commit(lakehouse: str, table: Table, write: Callable[[], Any]) -> None:
    """Write to a table; once more when another process has meanwhile replaced the files that this write had read.

    Raises:
        LakehouseError: that has happened too often.
    """
    conflicts = (
        ConcurrentAppendException,
        ConcurrentDeleteDeleteException,
        ConcurrentDeleteReadException,
        ConcurrentWriteException,
    )
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(conflicts),
        wait=tenacity.wait_random_exponential(multiplier=0.2, max=5),
        stop=tenacity.stop_after_attempt(_TRIES),
        reraise=True,
    )
    try:
        with _turn(lakehouse, table):
            retrying(write)
    except conflicts as error:
        raise LakehouseError(
            f"Another process changed {table.path(lakehouse)} each of {_TRIES} times that this one tried to: start again, and"
            " run `finpro maintain` once at a time."
        ) from error


@contextmanager
def _turn(lakehouse: str, table: Table) -> Iterator[None]:
    """Keep other processes of this machine from writing to a table during a block.

    An object store refuses the second of two commits with one number. A local file system does not (Delta renames a file
    there, which replaces one of that name), so writers on a local path take turns.
    """
    folder = table.path(lakehouse).removeprefix("file:")
    if "://" in folder:
        yield
        return
    lock = Path(folder).with_suffix(".lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
