"""The raw tables of Postgres as Parquet files in Cloud Storage: every reader on one snapshot, one manifest a run.

A run exports the rows that its snapshot shows and that changed since the run before it: those a transaction wrote that is
not older than the oldest one open at that run's snapshot. So a transaction that commits late comes with the next run, rows
may come twice, and none is missed. What was deleted comes as well. Where transaction ids do not tell what has changed, as in a
database that was restored (changes.py), a run exports every row.
"""

import logging
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime
from functools import partial
from typing import NamedTuple, cast

from google.cloud.storage import Bucket
from psycopg2.extensions import cursor as Cursor
from py4j.protocol import Py4JJavaError
from pyspark import Accumulator, SparkContext
from pyspark.errors import PySparkException

from batch.forgotten import require_all_known
from batch.google_cloud import explained, open_bucket
from batch.postgres import connect
from batch.sessions import BULK
from batch.warehouse.changes import (
    Window,
    Witness,
    bear_witness,
    changed_days,
    changed_rows,
    deleted_slice,
    deletions,
    end_of_epoch,
    forget_deletions,
    keep_days,
    new_witness,
    with_kept_days,
)
from batch.warehouse.days import PARTITIONED_BY
from batch.warehouse.manifest import (
    TABLES,
    Column,
    Manifest,
    TableExport,
    TableProfile,
    check_run_id,
    find_manifest,
    newest_manifest,
    write_manifest,
)
from batch.warehouse.profile import Days, of_all_days, source_days, source_profile, together
from batch.warehouse.slices import ExportedSlice, Slice, SourceColumn, described, export_slice, folder
from batch.warehouse.snapshot import Held, Snapshot, held_snapshot
from conf.errors import ExportError, FinproError, raised_elsewhere
from conf.settings import Settings
from conf.workers import freeze_imports

_SLICE_BYTES = 64 * 2**20  # of the table: about 350,000 orders, a second's work
_MOST_SLICES = 9_000  # of a table: BigQuery loads 10,000 files in one job, so those of a huge table are larger
_FEW_SLICES = len(TABLES)  # one of each: exported before Spark would have started, in a second each at most
_PROGRESS_SECONDS = 5
_STAYS_IN_POSTGRES = {"order_outcomes": ("reason",)}  # words that may name a person

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A raw table as the snapshot shows it, and the slices to export: of every row, or of what has changed.

    `days` are the changed ones of a table that is partitioned by day; None where any may have changed.
    """

    table: str
    key: list[str]
    columns: list[SourceColumn]
    slices: list[Slice]
    every_row: bool
    days: list[date] | None = None

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
        ExportError: another export is running, a column's type cannot be exported, or this Postgres does not know of somebody
            who was forgotten.
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
        require_all_known(cursor, bucket)
        began = datetime.now(UTC)
        columns = {table: columns_of(cursor, table) for table in TABLES}
        start = _start(bucket, cursor, snapshot, columns, full=full, since=since, say=say)
        sources = [_source(cursor, table, columns[table], start) for table in TABLES]
        with ThreadPoolExecutor(1, "profile") as beside:
            known = beside.submit(_known_to_postgres, cursor, sources)
            write = partial(export_slice, snapshot=snapshot, settings=settings, run_id=run_id)
            exported = _export_slices(start_spark, [part for source in sources for part in source.slices], write, say)
            profiles = {source.table: _profiles(source, exported[source.table], known.result()) for source in sources}
        tables = [_exported(cursor, source, exported[source.table], profiles[source.table]) for source in sources]
        _keep_only(bucket, run_id, [file.name for table in tables for file in (*table.files, *table.deleted)])
        manifest = Manifest(
            run_id=run_id,
            full=start.window is None,
            since_xid=start.window.since if start.window else None,
            snapshot=snapshot.visible,
            xmin=snapshot.xmin,
            started_at=began,
            finished_at=datetime.now(UTC),
            oldest_transaction_seconds=snapshot.oldest_transaction_seconds,
            tables=tables,
            database=snapshot.database,
            number=start.witness.number,
            since_number=start.newest.number if start.newest and start.window else None,
            epoch=start.witness.epoch,
            token=start.witness.token,
            asked_for=full,
        )
        _leave_witness(held, start.witness, run_id, sources, profiles)
        held.require()
        write_manifest(bucket, manifest)
        _forget_deletions(snapshot)
        return manifest


# --- what to export ----------------------------------------------------------------------------------------------------


def columns_of(cursor: Cursor, table: str) -> list[SourceColumn]:
    """The columns of a table that are exported, in its order."""
    cursor.execute(
        """
        select attname, format_type(atttypid, null)
        from pg_attribute where attrelid = %s::regclass and attnum > 0 and not attisdropped
        order by attnum""",
        [table],
    )
    return [SourceColumn(*row) for row in cursor.fetchall() if row[0] not in _STAYS_IN_POSTGRES.get(table, ())]


class _Start(NamedTuple):
    """Where a run begins: with every row (`window` is None), or in the transactions after another run, upon the `newest`.

    The window has deletions from some tables.
    """

    newest: Manifest | None
    window: Window | None
    witness: Witness
    deleted_from: Collection[str] = ()


def _start(
    bucket: Bucket,
    cursor: Cursor,
    snapshot: Snapshot,
    columns: dict[str, list[SourceColumn]],
    *,
    full: bool,
    since: datetime | None,
    say: Callable[[str], None],
) -> _Start:
    newest = newest_manifest(bucket)
    ended = end_of_epoch(cursor, newest, snapshot) if newest else None
    witness = new_witness(cursor, newest, goes_on=ended is None)
    base = None if full else newest_manifest(bucket, since) if since else newest
    if base and not ended:
        ended = end_of_epoch(cursor, base, snapshot)
    if ended:
        say(f"{ended}: exporting every row")
    if ended or base is None:
        return _Start(newest, None, witness)
    known = {table.table: table.columns for table in base.tables}
    changed = [table for table in TABLES if known.get(table) != described(table, columns[table])]
    if changed:
        # A new column has values, its default, in rows that no transaction wrote since.
        say(f"the columns of {', '.join(changed)} have changed since run {base.run_id}: exporting every row")
        return _Start(newest, None, witness)
    window = Window(base.xmin, snapshot.xmax)
    deleted = deletions(cursor, window)
    if deleted.truncated:
        say(f"{', '.join(deleted.truncated)} was truncated since run {base.run_id}: exporting every row")
        return _Start(newest, None, witness)
    return _Start(newest, window, witness, deleted.rows.keys())


def _source(cursor: Cursor, table: str, columns: list[SourceColumn], start: _Start) -> Source:
    described(table, columns)
    key, window = _primary_key(cursor, table), start.window
    if window is None:
        slices = [
            Slice(table, number, columns, condition, profiled=True) for number, condition in enumerate(_all_rows(cursor, table))
        ]
        return Source(table, key, columns, slices, every_row=True)
    conditions = changed_rows(cursor, table, window, _all_rows(cursor, table))
    slices = [Slice(table, number, columns, condition) for number, condition in enumerate(conditions)]
    if table in start.deleted_from:
        slices.append(deleted_slice(table, next(column for column in columns if column.name == key[0]), window))
    days = changed_days(cursor, table, window) if table in PARTITIONED_BY else None
    return Source(table, key, columns, slices, every_row=False, days=days)


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


# --- the run -----------------------------------------------------------------------------------------------------------


def _known_to_postgres(cursor: Cursor, sources: Sequence[Source]) -> dict[str, Days]:
    """What Postgres says of the tables: of the changed days of a partitioned one, of the whole of another; where every row is
    profiled when it is read, no more than how many there are."""
    return {source.table: _known(cursor, source) for source in sources}


def _known(cursor: Cursor, source: Source) -> Days:
    if source.every_row:
        return {None: TableProfile(_rows(cursor, source.table), {})}
    if source.days is None:
        return {None: source_profile(cursor, source.table, source.described)}
    return dict(source_days(cursor, source.table, source.described, source.days).items())


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


def _profiles(source: Source, slices: Sequence[ExportedSlice], known: dict[str, Days]) -> Days:
    """The profiles of a table, by day where it is partitioned: of every row as it was read, or as Postgres says."""
    if not source.every_row:
        return known[source.table]
    read: Days = {}
    for part in slices:
        for day, profile in part.profiles.items():
            read[day] = together([read[day], profile]) if day in read else profile
    rows, expected = sum(profile.rows for profile in read.values()), known[source.table][None].rows
    if rows != expected:
        raise ExportError(
            f"{source.table} has {expected:,} rows in the snapshot, of which {rows:,} were read: the run counts for"
            " nothing. Export again; if that happens again, it is a defect of finpro."
        )
    return read


def _exported(cursor: Cursor, source: Source, slices: Sequence[ExportedSlice], profiles: Days) -> TableExport:
    files = sorted((part.file for part in slices if part.file and not part.deleted), key=lambda file: file.name)
    deleted = [part.file for part in slices if part.file and part.deleted]
    by_day = _by_day(profiles)
    whole, day_count = of_all_days(profiles.values(), source.described), len(by_day)
    if source.days is not None:
        whole, day_count = with_kept_days(cursor, source.table, source.described, by_day)
    return TableExport(
        table=source.table,
        key=source.key,
        columns=source.described,
        files=files,
        rows=sum(file.rows for file in files),
        source_rows=whole.rows,
        source_profile=whole.columns,
        deleted=deleted,
        deleted_rows=sum(file.rows for file in deleted),
        days=None if source.days is None else by_day,
        day_count=day_count,
    )


def _by_day(profiles: Days) -> dict[date, TableProfile]:
    """Those of a partitioned table; none of another."""
    return {day: profile for day, profile in profiles.items() if day is not None}


def _leave_witness(held: Held, witness: Witness, run_id: str, sources: Sequence[Source], profiles: dict[str, Days]) -> None:
    """Leave what the next run needs to go on from this one, in one transaction.

    Should this run come to nothing after all, the next one goes on from the run before it, and so looks at these days again.
    """
    dsn = held.snapshot.dsn
    with connect(dsn, application_name="finpro export", limits=BULK) as connection, connection.cursor() as cursor:
        bear_witness(cursor, witness, run_id, held.snapshot)
        for source in sources:
            if source.table in PARTITIONED_BY:
                keep_days(cursor, source.table, _by_day(profiles[source.table]), all_days=source.every_row)


def _forget_deletions(snapshot: Snapshot) -> None:
    with connect(snapshot.dsn, application_name="finpro export", limits=BULK) as connection, connection.cursor() as cursor:
        forget_deletions(cursor, Window(snapshot.xmin, snapshot.xmax))
