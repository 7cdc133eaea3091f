"""What turned out about orders, as the lakehouse has it: a copy of Postgres's `order_outcomes`, without its words.

Statements are never changed, and their numbers are in the order of commits (migration 015): so what is there up to a number
is complete, and what has come since is copied.
"""

from contextlib import closing
from datetime import datetime

import polars as pl
import pyarrow as pa
from delta.tables import DeltaTable
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import to_arrow_schema

from batch.frames import read_frame
from batch.postgres import explained, open_connection
from batch.sessions import BULK
from streaming.lakehouse.tables import OUTCOMES, OUTCOMES_OF_ORDERS, commit, create_table, is_among, same

_AT_ONCE = 200_000  # statements that are copied in one go

_MOMENT = pl.Datetime("us", "UTC")
_COLUMNS = {
    "outcome_id": pl.Int64(),
    "order_id": pl.String(),
    "outcome": pl.String(),
    "reviewed_by": pl.String(),
    "decided_at": _MOMENT,
    "source": pl.String(),
    "ingested_at": _MOMENT,
}
_READ = {name: pl.Int64() if kind == _MOMENT else kind for name, kind in _COLUMNS.items()}  # moments as microseconds
_SELECTED = ", ".join(
    f"(extract(epoch from {name}) * 1000000)::bigint" if kind == _MOMENT else name for name, kind in _COLUMNS.items()
)
_STATEMENT = ("order_id", "decided_at", "outcome", "reviewed_by")  # what makes two the same


def archive_outcomes(spark: SparkSession, lakehouse: str, dsn: str) -> int:
    """Copy the statements that Postgres has and the lakehouse lacks. Returns how many were looked at.

    Where Postgres no longer has the newest that was copied, it was restored to an earlier moment: then all are looked at.

    Raises:
        PostgresError: Postgres does not answer or lacks the table, or this login may not read it.
        LakehouseError: the table cannot be written.
    """
    copied = 0
    with explained(dsn), closing(open_connection(dsn, application_name="finpro archive", limits=BULK)) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute("select from order_outcomes limit 1")
            if not cursor.rowcount:
                return 0
            create_table(spark, lakehouse, OUTCOMES_OF_ORDERS)
            after = 0
            if newest := _newest(spark, lakehouse):
                cursor.execute("select from order_outcomes where outcome_id = %s and order_id = %s", newest)
                after = newest[0] if cursor.rowcount else 0
            while True:
                query = (
                    f"select {_SELECTED} from order_outcomes where outcome_id > {after} order by outcome_id limit {_AT_ONCE}"
                )
                rows = read_frame(cursor, query, _READ).cast(pl.Schema(_COLUMNS))
                if rows.is_empty():
                    return copied
                _merge(spark, lakehouse, rows)
                after, copied = int(rows["outcome_id"][-1]), copied + len(rows)


def outcomes_at(spark: SparkSession, lakehouse: str, until: datetime | None) -> DataFrame | None:
    """`order_id` and `outcome` of each order of which something was stated: by the newest statement decided up to `until`.

    None where no statement was ever archived.
    """
    path = OUTCOMES_OF_ORDERS.path(lakehouse)
    if not DeltaTable.isDeltaTable(spark, path):
        return None
    stated = spark.read.format("delta").load(path)
    if until:
        stated = stated.where((F.col("decided_date") <= F.lit(until).cast("date")) & (F.col("decided_at") <= F.lit(until)))
    newest = F.max_by("outcome", F.struct("decided_at", "outcome_id"))
    return stated.groupBy("order_id").agg(newest.alias("outcome"))


def _newest(spark: SparkSession, lakehouse: str) -> tuple[int, str] | None:
    """The number of the statement that was taken last of those that are there, and its order."""
    stated = spark.read.format("delta").load(OUTCOMES_OF_ORDERS.path(lakehouse))
    (row,) = stated.agg(F.max(F.struct("outcome_id", "order_id")).alias("newest")).collect()
    return tuple(row["newest"]) if row["newest"] else None


def _merge(spark: SparkSession, lakehouse: str, rows: pl.DataFrame) -> None:
    dated = rows.with_columns(decided_date=pl.col("decided_at").dt.date()).select(OUTCOMES.names)
    table = pa.table(dated.to_arrow()).cast(to_arrow_schema(OUTCOMES, timezone="UTC"))
    days = dated["decided_date"].unique().sort().to_list()
    stated = spark.createDataFrame(table, OUTCOMES)
    is_there = same(*_STATEMENT) & is_among("stored.decided_date", days)
    target = DeltaTable.forPath(spark, OUTCOMES_OF_ORDERS.path(lakehouse)).alias("stored")
    commit(lakehouse, OUTCOMES_OF_ORDERS, target.merge(stated.alias("new"), is_there).whenNotMatchedInsertAll().execute)
