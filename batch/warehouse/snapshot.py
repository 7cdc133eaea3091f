"""One snapshot of Postgres that many connections read: what they see agrees, whatever is written meanwhile.

A holder connection keeps a transaction open and exports its snapshot; readers, on any machine, import it by its name.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime

import adbc_driver_manager
import adbc_driver_postgresql
import psycopg2
import pyarrow as pa
from adbc_driver_manager import AdbcConnection, AdbcStatement
from psycopg2.extensions import cursor as Cursor

from batch.postgres import describe, explained, open_connection
from conf.errors import ExportError, PostgresError, PostgresUnavailable

_BEGIN = "begin isolation level repeatable read read only"
_EXPORT_LOCK = 0x65787072  # one export at a time: their order is then the order of their snapshots
_WAIT_FOR_LOCK = "60s"
_WAIT_FOR_READ = "10s"


@dataclass(frozen=True)
class Snapshot:
    """What readers need to import a snapshot, and what it says about itself.

    Attributes:
        dsn: of the database.
        name: as pg_export_snapshot gave it; good while the holder lives.
        visible: pg_current_snapshot's text.
        xmin: the oldest transaction that was still open: everything before it is in the snapshot, or rolled back.
        taken_at: when.
        oldest_transaction_seconds: how long that one had been open; 0 when none was.
        database: tells this database from any other, also from one of the same name.
    """

    dsn: str
    name: str
    visible: str
    xmin: int
    taken_at: datetime
    oldest_transaction_seconds: float
    database: str


@contextmanager
def held_snapshot(dsn: str, tables: Sequence[str]) -> Iterator[tuple[Snapshot, Cursor]]:
    """Hold a snapshot for one block; the cursor is the holder's own, inside it.

    The tables can be written but not altered or truncated meanwhile, and no other export of this database runs.

    Raises:
        ExportError: another export is running, for a minute or more.
        PostgresError: Postgres cannot be reached, or lacks the tables.
    """
    with explained(dsn), closing(open_connection(dsn, application_name="finpro export")) as connection:
        connection.autocommit = True  # transactions are begun and ended here by hand
        with connection.cursor() as cursor:
            _exclude_other_exports(cursor)
            cursor.execute(_BEGIN)
            # Before the first query, which takes the snapshot: nothing may change a table's columns after it.
            cursor.execute(f"lock table {', '.join(tables)} in access share mode")
            cursor.execute("set local idle_in_transaction_session_timeout = 0; set local statement_timeout = 0")
            yield _taken(dsn, cursor), cursor


def _exclude_other_exports(cursor: Cursor) -> None:
    cursor.execute("select set_config('lock_timeout', %s, false)", [_WAIT_FOR_LOCK])
    try:
        cursor.execute("select pg_advisory_lock(%s)", [_EXPORT_LOCK])
    except psycopg2.errors.LockNotAvailable as error:
        raise ExportError("Another export of this database is running: wait for its end, then start again.") from error
    cursor.execute("reset lock_timeout")


def _taken(dsn: str, cursor: Cursor) -> Snapshot:
    # Whose transaction it is may be hidden from this user: then the age of the visible ones is what is known.
    cursor.execute("""
        select pg_export_snapshot(), pg_current_snapshot()::text, pg_snapshot_xmin(pg_current_snapshot())::text::bigint, now(),
               coalesce((select extract(epoch from now() - min(begun)) from (
                   select xact_start as begun from pg_stat_activity where backend_xid is not null
                   union all select prepared from pg_prepared_xacts) as open), 0)::float8,
               (select system_identifier from pg_control_system()) || '/' || oid
        from pg_database where datname = current_database()""")
    name, visible, xmin, taken_at, oldest, database = cursor.fetchone() or ()
    return Snapshot(dsn, name, visible, xmin, taken_at, max(oldest, 0.0), database)


@contextmanager
def reader(snapshot: Snapshot) -> Iterator[Callable[[str], Iterator[pa.RecordBatch]]]:
    """What gives the rows of a query as Arrow batches of the snapshot, on a connection of its own; one query at a time.

    It goes by ADBC's own interface, not by its DB-API, which imports pandas and polars: a third of a second for each process.

    Raises:
        PostgresError: Postgres is gone, or the snapshot is: its holder has ended.
    """
    try:
        with (
            adbc_driver_postgresql.connect(snapshot.dsn) as database,
            AdbcConnection(database) as connection,
            AdbcStatement(connection) as statement,
        ):
            # Who wants to alter a table waits for the holder, and would be waited for in turn, for ever.
            wait = f"set local lock_timeout = '{_WAIT_FOR_READ}'"
            for command in (_BEGIN, f"set transaction snapshot '{snapshot.name}'", wait):
                statement.set_sql_query(command)
                statement.execute_update()

            def read(query: str) -> Iterator[pa.RecordBatch]:
                statement.set_sql_query(query)
                stream, _rows = statement.execute_query()
                try:
                    yield from pa.RecordBatchReader.from_stream(stream)
                except (OSError, pa.ArrowException) as error:  # what ADBC reports between batches, as Arrow passes it on
                    raise _stopped(snapshot, str(error).strip().splitlines()[0], is_away=isinstance(error, OSError)) from error

            yield read
    except adbc_driver_manager.Error as error:
        where = f"Postgres at {describe(snapshot.dsn)}"
        if "snapshot" in str(error):
            raise PostgresError(f"{where}: the export's snapshot is gone, its holder was cut off. Export again.") from error
        if "lock timeout" in str(error):
            raise PostgresError(f"{where}: someone waits to alter the table. Export again when that is done.") from error
        raise _stopped(snapshot, str(error), is_away=isinstance(error, adbc_driver_manager.OperationalError)) from error


def _stopped(snapshot: Snapshot, why: str, *, is_away: bool) -> PostgresError:
    kind = PostgresUnavailable if is_away else PostgresError
    return kind(f"Postgres at {describe(snapshot.dsn)} stopped the reading: {why}. Export again.")
