"""The raw tables of Postgres as Parquet files in Cloud Storage: every reader on one snapshot, one manifest a run.

A run exports the rows that its snapshot shows and that changed since the run before it: those a transaction wrote that is
not older than the oldest one open at that run's snapshot. So a transaction that commits late comes with the next run, rows
may come twice, and none is missed.
"""

import logging
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import cast

from google.cloud.storage import Bucket
from psycopg2.extensions import cursor as Cursor
from py4j.protocol import Py4JJavaError
from pyspark import Accumulator, SparkContext
from pyspark.errors import PySparkException

from batch.google_cloud import explained, open_bucket
from batch.warehouse.manifest import (
    TABLES,
    Column,
    Manifest,
    TableExport,
    check_run_id,
    find_manifest,
    newest_manifest,
    write_manifest,
)
from batch.warehouse.profile import TableProfile, source_profile, together
from batch.warehouse.slices import ExportedSlice, Slice, SourceColumn, described, export_slice, folder
from batch.warehouse.snapshot import Snapshot, held_snapshot
from conf.errors import ExportError, FinproError, raised_elsewhere
from conf.settings import Settings
from conf.workers import freeze_imports

_SLICE_BYTES = 64 * 2**20  # of the table: about 350,000 orders, a second's work
_MOST_SLICES = 9_000  # of a table: BigQuery loads 10,000 files in one job, so those of a huge table are larger
_FEW_ROWS = 200_000  # so many changed rows are one slice, read by the index on change_xid
_FEW_SLICES = 3  # exported before Spark would have started: a second each
_PROGRESS_SECONDS = 5

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A raw table as the snapshot shows it, and the slices to export: of every row, or of what has changed."""

    table: str
    key: list[str]
    columns: list[SourceColumn]
    slices: list[Slice]
    every_row: bool

    @property
    def described(self) -> list[Column]:
        """The columns as BigQuery is to have them."""
        return described(self.table, self.columns)


def new_run_id(now: datetime) -> str:
    """The run id of an export that begins now."""
    return now.astimezone(UTC).strftime("%Y%m%dT%H%M%SZ")


def export(
    start_spark: Callable[[], SparkContext],
    settings: Settings,
    run_id: str,
    *,
    full: bool = False,
    since: datetime | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Manifest:
    """Make a run, or find it finished: its manifest. What an attempt at it that died has left is deleted.

    Args:
        start_spark: gives the Spark on which the readers run, as many at a time as it has cores. Called when there is much
            to read.
        settings: of Postgres and the bucket.
        run_id: names the run for good.
        full: export every row, not only what changed since the newest finished run.
        since: export again what has changed since this moment: since the newest run that began before it.
        say: hears of the progress, line by line.

    Raises:
        PostgresError: Postgres refuses, or is gone.
        GoogleCloudError: Cloud Storage refuses, or is gone.
        ExportError: another export is running, or a column's type cannot be exported.
    """
    check_run_id(run_id)
    bucket = open_bucket(settings)
    with explained(settings):
        finished = find_manifest(bucket, run_id)
    if finished:
        return finished  # without a wait for whatever export is running
    with explained(settings), held_snapshot(settings.require("postgres_dsn"), TABLES, say) as held:
        snapshot, cursor = held.snapshot, held.cursor
        finished = find_manifest(bucket, run_id)
        if finished:
            return finished
        began = datetime.now(UTC)
        columns = {table: columns_of(cursor, table) for table in TABLES}
        since_xid = None if full else _since_xid(newest_manifest(bucket, since), snapshot, columns, say)
        sources = [_source(cursor, table, columns[table], since_xid) for table in TABLES]
        with ThreadPoolExecutor(1, "profile") as beside:
            known = beside.submit(_known_to_postgres, cursor, sources)
            write = partial(export_slice, snapshot=snapshot, settings=settings, run_id=run_id)
            exported = _export_slices(start_spark, [part for source in sources for part in source.slices], write, say)
            tables = [_exported(source, exported[source.table], known.result()[source.table]) for source in sources]
        _keep_only(bucket, run_id, [file.name for table in tables for file in table.files])
        manifest = Manifest(
            run_id=run_id,
            full=since_xid is None,
            since_xid=since_xid,
            snapshot=snapshot.visible,
            xmin=snapshot.xmin,
            started_at=began,
            finished_at=datetime.now(UTC),
            oldest_transaction_seconds=snapshot.oldest_transaction_seconds,
            tables=tables,
            database=snapshot.database,
        )
        held.require()
        write_manifest(bucket, manifest)
        return manifest


# --- what to export ----------------------------------------------------------------------------------------------------


def columns_of(cursor: Cursor, table: str) -> list[SourceColumn]:
    """The columns of a table, in its order."""
    cursor.execute(
        """
        select attname, format_type(atttypid, null)
        from pg_attribute where attrelid = %s::regclass and attnum > 0 and not attisdropped
        order by attnum""",
        [table],
    )
    return [SourceColumn(*row) for row in cursor.fetchall()]


def _since_xid(
    previous: Manifest | None, snapshot: Snapshot, columns: dict[str, list[SourceColumn]], say: Callable[[str], None]
) -> int | None:
    """The transaction from which on rows are exported; None when the runs so far are nothing to go on from."""
    if previous is None:
        return None
    if previous.database != snapshot.database or previous.xmin > snapshot.xmin:
        say(f"this database is not the one of run {previous.run_id}, or is older: exporting every row")
        return None
    known = {table.table: table.columns for table in previous.tables}
    changed = [table for table in TABLES if known.get(table) != described(table, columns[table])]
    if changed:
        # A new column has values, its default, in rows that no transaction wrote since.
        say(f"the columns of {', '.join(changed)} have changed since run {previous.run_id}: exporting every row")
        return None
    return previous.xmin


def _source(cursor: Cursor, table: str, columns: list[SourceColumn], since: int | None) -> Source:
    described(table, columns)
    every_row = since is None
    conditions = _all_rows(cursor, table) if since is None else _changed_rows(cursor, table, since)
    slices = [Slice(table, number, columns, condition, profiled=every_row) for number, condition in enumerate(conditions)]
    return Source(table, _primary_key(cursor, table), columns, slices, every_row)


def _primary_key(cursor: Cursor, table: str) -> list[str]:
    cursor.execute(
        """
        select attname
        from pg_index join pg_attribute on attrelid = indrelid and attnum = any (indkey)
        where indrelid = %s::regclass and indisprimary
        order by array_position(indkey, attnum)""",
        [table],
    )
    return [name for (name,) in cursor.fetchall()]


def _all_rows(cursor: Cursor, table: str) -> list[str]:
    """Conditions that cut a table by its blocks, so that each reader scans its own part of the file.

    The last one has no end: it is right also where the table has grown meanwhile.
    """
    cursor.execute("select pg_relation_size(%s::regclass), current_setting('block_size')::bigint", [table])
    size, block_bytes = cursor.fetchone() or (0, 1)
    blocks = max(1, size // block_bytes)
    starts = range(0, blocks, max(_SLICE_BYTES // block_bytes, blocks // _MOST_SLICES + 1))
    ends = [f" and ctid < '({start},0)'" for start in starts[1:]] + [""]
    return [f"ctid >= '({start},0)'{end}" for start, end in zip(starts, ends, strict=True)]


def _changed_rows(cursor: Cursor, table: str, since: int) -> list[str]:
    """Conditions for the rows of transactions from `since` on: few are read by their index, many by blocks as well."""
    changed = f"change_xid >= '{since}'::xid8"
    cursor.execute(f"select count(*) from (select from {table} where {changed} limit {_FEW_ROWS + 1}) as changed")
    (count,) = cursor.fetchone() or (0,)
    if count == 0:
        return []
    if count <= _FEW_ROWS:
        return [changed]
    return [f"{blocks} and {changed}" for blocks in _all_rows(cursor, table)]


# --- the run -----------------------------------------------------------------------------------------------------------


def _known_to_postgres(cursor: Cursor, sources: Sequence[Source]) -> dict[str, TableProfile]:
    """What Postgres says of the whole tables: their profiles, or no more than their rows where these are profiled when read."""
    return {
        source.table: TableProfile(_rows(cursor, source.table), {})
        if source.every_row
        else source_profile(cursor, source.table, source.described)
        for source in sources
    }


def _rows(cursor: Cursor, table: str) -> int:
    cursor.execute(f"select count(*) from {table}")
    (rows,) = cursor.fetchone() or (0,)
    return int(rows)


def _export_slices(
    start_spark: Callable[[], SparkContext],
    slices: Sequence[Slice],
    write: Callable[[Slice], ExportedSlice],
    say: Callable[[str], None],
) -> dict[str, list[ExportedSlice]]:
    """Of each table what became of its slices, each by the attempt that succeeded.

    A slice is a task of Spark. But until Spark has started this process exports slices too; when there are few, it is done
    sooner than that. What fails here is left to Spark, which tries again.
    """
    waiting, exported, rows = deque(slices), list[ExportedSlice](), _Rows()
    enough = threading.Event()

    def export_here() -> None:
        while not enough.is_set() and (part := _next(waiting)):
            try:
                exported.append(write(part))
                rows.here += _rows_in(exported[-1])
            except Exception as error:
                _log.warning("slice %d of %s is left to Spark, which tries again: %s", part.number, part.table, error)
                waiting.append(part)
                return

    with _progress(rows, say), ThreadPoolExecutor(1, "until Spark has started") as beside:
        here = beside.submit(export_here)
        if len(slices) <= _FEW_SLICES:
            here.result()
        if waiting or len(slices) > _FEW_SLICES:  # what is in this process's hands now may yet be left to Spark
            try:
                spark = _with_workers(start_spark)
            finally:
                enough.set()
            rows.in_tasks = spark.accumulator(0)
            exported += _export_in_tasks(spark, waiting, write, rows.in_tasks)
            here.result()
            exported += _export_in_tasks(spark, waiting, write, rows.in_tasks)
    by_table: dict[str, list[ExportedSlice]] = {table: [] for table in TABLES}
    for done in exported:
        by_table[done.table].append(done)
    return by_table


def _with_workers(start_spark: Callable[[], SparkContext]) -> SparkContext:
    """Spark, once its workers have started."""
    try:
        spark = start_spark()
        spark.parallelize(range(spark.defaultParallelism), spark.defaultParallelism).foreach(_get_ready)
    except (PySparkException, Py4JJavaError) as error:
        raise _cause(error) from error
    return spark


def _get_ready(_task: int) -> None:
    """For a first task of each worker: it has started, and has imported what the next ones need."""
    freeze_imports()


def _export_in_tasks(
    spark: SparkContext, waiting: deque[Slice], write: Callable[[Slice], ExportedSlice], rows: Accumulator[int]
) -> list[ExportedSlice]:
    """Export all that waits, one task a slice."""
    slices = [part for _ in range(len(waiting)) if (part := _next(waiting))]

    def task(part: Slice) -> ExportedSlice:
        freeze_imports()
        done = write(part)
        rows.add(_rows_in(done))
        return done

    try:
        return spark.parallelize(slices, len(slices)).map(task).collect() if slices else []
    except PySparkException as error:
        raise _cause(error) from error


def _next(waiting: deque[Slice]) -> Slice | None:
    """Take one; None when none is left, which another thread may have seen to a moment ago."""
    try:
        return waiting.popleft()
    except IndexError:
        return None


def _rows_in(done: ExportedSlice) -> int:
    return done.file.rows if done.file else 0


class _Rows:
    """The rows exported so far, by this process and in tasks."""

    def __init__(self) -> None:
        self.here, self.in_tasks = 0, cast("Accumulator[int] | None", None)

    @property
    def total(self) -> int:
        """Both together."""
        return self.here + (self.in_tasks.value if self.in_tasks else 0)


@contextmanager
def _progress(rows: _Rows, say: Callable[[str], None]) -> Iterator[None]:
    """Tell of the rows exported so far, every few seconds."""
    began, done = time.monotonic(), threading.Event()

    def watch() -> None:
        while not done.wait(_PROGRESS_SECONDS):
            say(f"{rows.total:,} rows, {rows.total / (time.monotonic() - began):,.0f} rows/s")

    watcher = threading.Thread(target=watch, name="progress", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def _cause(error: PySparkException | Py4JJavaError) -> FinproError:
    text = str(error)
    last_line = re.findall(r"^(?:Caused by: )?[\w.]+(?:Error|Exception)\b.*", text, re.MULTILINE)
    return raised_elsewhere(text) or ExportError(
        f"The export failed, and left nothing that counts: {last_line[-1] if last_line else text}\nExport again;"
        " --debug shows where it failed."
    )


def _keep_only(bucket: Bucket, run_id: str, names: Sequence[str]) -> None:
    """Delete a run's other objects: those of tasks, or whole attempts at the run, that failed."""
    keep = set(names)
    for table in TABLES:
        for blob in bucket.list_blobs(prefix=folder(table, run_id)):
            if blob.name not in keep:
                blob.delete()


def _exported(source: Source, slices: Sequence[ExportedSlice], known: TableProfile) -> TableExport:
    files = sorted((part.file for part in slices if part.file), key=lambda file: file.name)
    profile = _of_all_rows(source, slices, known) if source.every_row else known
    return TableExport(
        table=source.table,
        key=source.key,
        columns=source.described,
        files=files,
        rows=sum(file.rows for file in files),
        source_rows=profile.rows,
        source_profile=profile.columns,
    )


def _of_all_rows(source: Source, slices: Sequence[ExportedSlice], known: TableProfile) -> TableProfile:
    """The profile of a table from those of its slices, which together must have been given every row."""
    profile = together([part.profile for part in slices if part.profile])
    if profile.rows != known.rows:
        raise ExportError(
            f"{source.table} has {known.rows:,} rows in the snapshot, of which {profile.rows:,} were read: the run counts for"
            " nothing. Export again; if that happens again, it is a defect of finpro."
        )
    return profile
