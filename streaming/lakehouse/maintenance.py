"""Upkeep of the lakehouse: the small files of a day become few, ordered by time, and unneeded ones are deleted."""

from dataclasses import dataclass
from datetime import timedelta
from functools import partial

from delta.tables import DeltaTable
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from conf.errors import LakehouseError, SettingsError
from streaming.jvm import delta_files
from streaming.lakehouse.tables import Table, commit

# A day of a million orders is a file or two: a reader of an hour skips the others by their times.
TARGET_FILE_BYTES = 128 * 2**20

_SHUFFLE_PARTITIONS = "spark.sql.shuffle.partitions"
_SINCE_VACUUM = 100  # commits, of which the newest vacuum is one: the archive may have added some meanwhile
PROPERTIES: dict[str, str | int | bool] = {
    "spark.databricks.delta.optimize.maxFileSize": TARGET_FILE_BYTES,
    "spark.databricks.io.skipping.mdc.sortWithinFiles": True,
    # A vacuum lists a table's folders, one a day, and would start ten thousand tasks for it.
    "spark.sql.sources.parallelPartitionDiscovery.parallelism": 16,
    _SHUFFLE_PARTITIONS: 16,
    # The table's history then says what a vacuum deleted.
    "spark.databricks.delta.vacuum.logging.enabled": True,
    # Delta refuses less than a week; what may be too short here is for `require_retention` to say.
    "spark.databricks.delta.retentionDurationCheck.enabled": False,
}


@dataclass(frozen=True)
class Size:
    """How many files a table consists of, and their bytes."""

    files: int
    bytes: int

    def __str__(self) -> str:
        return f"{self.files:,} files, {self.bytes / 2**20:,.1f} MiB"


@dataclass(frozen=True)
class Upkeep:
    """What was done to a table.

    Attributes:
        table: its name.
        days: how many of its days were written anew.
        before, after: its size.
        deleted: how many files were deleted that it had not needed for longer than the retention.
    """

    table: str
    days: int
    before: Size
    after: Size
    deleted: int


def require_retention(days: int, *, force: bool) -> None:
    """Check that files are kept long enough for those who read them now: a backtest or an audit reads the state it found.

    Raises:
        SettingsError: they are not, and nobody forces it.
    """
    if days < 1 and not force:
        raise SettingsError(
            "FINPRO_LAKEHOUSE_RETENTION_DAYS=0 would delete files that a running backtest, audit or archive still needs, and"
            " the way back to earlier versions. Keep at least 1 day; --force when nothing else uses the lakehouse."
        )


def maintain(spark: SparkSession, lakehouse: str, table: Table, retention: timedelta) -> Upkeep:
    """Compact the days of a table that lie in many files, each ordered by time, and delete files that it no longer needs.

    Safe beside the archive: on a local path they take turns, elsewhere the one that comes second to a day tries again.

    Args:
        spark: with PROPERTIES.
        lakehouse: a path, or gs://bucket/folder.
        table: one of its tables.
        retention: how long ago a file must have been replaced to be deleted.

    Raises:
        LakehouseError: the table is not there, or is written by others all the time.
    """
    path = table.path(lakehouse)
    if not DeltaTable.isDeltaTable(spark, path):
        raise LakehouseError(f"{path} is no table of the lakehouse: `finpro archive` creates them.")
    delta, before = DeltaTable.forPath(spark, path), _size(spark, path)
    days = _days_in_pieces(spark, path, table.day)
    for day in days:
        ordered = delta.optimize().where(f"{table.day} = '{day}'")
        commit(lakehouse, table, partial(ordered.executeZOrderBy, table.time))
    deleted = vacuum(spark, lakehouse, table, retention)
    return Upkeep(table.name, len(days), before, _size(spark, path), deleted)


def _size(spark: SparkSession, path: str) -> Size:
    count, total = F.count("*"), F.coalesce(F.sum("size"), F.lit(0))
    return Size(*delta_files(spark, path).agg(count, total).collect()[0])


def _days_in_pieces(spark: SparkSession, path: str, day: str) -> list[str]:
    """The days that lie in more files than they need. One that was compacted is left alone until something is added."""
    files = delta_files(spark, path).groupBy(F.col("partitionValues")[day].alias("day"))
    sizes = files.agg(F.count("*").alias("files"), F.sum("size").alias("bytes"))
    in_pieces = F.col("files") > F.floor(F.col("bytes") / TARGET_FILE_BYTES) + 1
    return [row["day"] for row in sizes.where(in_pieces).orderBy("day").collect()]


def vacuum(spark: SparkSession, lakehouse: str, table: Table, retention: timedelta, *, lite: bool = False) -> int:
    """Delete files that a table has not consisted of for so long; returns how many.

    Args:
        spark: with PROPERTIES.
        lakehouse: a path, or gs://bucket/folder.
        table: one of its tables.
        retention: whole hours.
        lite: only those that the table's log knows, without a look at what lies in its folders.

    Raises:
        LakehouseError: others write to the table all the time.
    """
    hours = retention // timedelta(hours=1)
    statement = f"vacuum {table.in_sql(lakehouse)} {'lite ' if lite else ''}retain {hours} hours"
    # It shuffles names of files, six times: one task holds a million of them, and each further one costs it more than they do.
    spark.conf.set(_SHUFFLE_PARTITIONS, 1)
    try:
        commit(lakehouse, table, lambda: spark.sql(statement))
    finally:
        spark.conf.set(_SHUFFLE_PARTITIONS, PROPERTIES[_SHUFFLE_PARTITIONS])
    return _deleted(DeltaTable.forPath(spark, table.path(lakehouse)))


def _deleted(delta: DeltaTable) -> int:
    """How many files the newest vacuum of a table has deleted, as its history says."""
    vacuums = delta.history(_SINCE_VACUUM).where(F.col("operation") == "VACUUM END")
    newest = vacuums.orderBy(F.desc("version")).select("operationMetrics").first()
    return int(newest["operationMetrics"]["numDeletedFiles"]) if newest else 0
