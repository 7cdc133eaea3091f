"""One snapshot of Postgres that many connections read: what they see agrees, whatever is written meanwhile.

A holder connection keeps a transaction open and exports its snapshot; readers, on any machine, import it by its name.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

import adbc_driver_manager
import pyarrow as pa
from adbc_driver_manager import AdbcStatement
from psycopg2.extensions import cursor as Cursor

from batch.arrow_sessions import arrow_session
from batch.postgres import LockHeld, begun, connect, explained, open_connection, take_lock, told_of_silence
from batch.sessions import BULK, describe
from conf.errors import ExportError, PostgresError, PostgresUnavailable

_BEGIN = "begin isolation level repeatable read read only"
_EXPORT_LOCK = 0x65787072  # one export at a time: their order is then the order of their snapshots
_WAIT_FOR_LOCK_SECONDS = 60.0
_WAIT_FOR_TABLES = f"{BULK.lock}s"
_WAIT_FOR_READ = "10s"


@dataclass(frozen=True)
class Snapshot:
    """What readers need to import a snapshot, and what it says about itself.

    Attributes:
        dsn: of the database.
        name: as pg_export_snapshot gave it; good while the holder lives.
        visible: pg_current_snapshot's text.
        xmin: the oldest transaction that was still open: everything before it is in the snapshot, or rolled back.
        xmax: the first one that had not begun, as far as the snapshot knows: nothing from it on is in the snapshot.
        taken_at: when.
        oldest_transaction_seconds: how long that one had been open; 0 when none was.
        database: tells this database from any other, also from one of the same name.
    """

    dsn: str
    name: str
    visible: str
    xmin: int
    xmax: int
    taken_at: datetime
    oldest_transaction_seconds: float
    database: str


class Held(NamedTuple):
    """A snapshot that is held.

    Attributes:
        snapshot: for readers.
        cursor: the holder's own, inside the snapshot.
        lock: of the connection that keeps other exports out.
    """

    snapshot: Snapshot
    cursor: Cursor
    lock: Cursor

    def require(self) -> None:
        """Check that the snapshot and the lock are held to this moment: else another export may have overtaken this one.

        Raises:
            psycopg2.Error: one of them is lost.
        """
        self.cursor.execute("select 1")
        self.lock.execute("select 1")


@contextmanager
def held_snapshot(dsn: str, tables: Sequence[str], say: Callable[[str], None] = lambda line: None) -> Iterator[Held]:
    """Hold a snapshot for one block.

    The tables can be written but not altered or truncated meanwhile, and no other export of this database runs: `say` hears
    for whom this one waits, and when Postgres falls silent. The lock has a connection of its own, in a transaction that is open
    as long: the snapshot has to be taken after it, and behind a pooler a lock that is no transaction's would be left to others.

    Raises:
        ExportError: another export is running, or somebody holds its lock, for a minute or more.
        PostgresError: Postgres cannot be reached, or lacks the tables.
    """
    with (
        explained(dsn),
        told_of_silence(dsn, say),
        connect(dsn, application_name="finpro export lock", limits=BULK) as alone,
        alone.cursor() as lock,
        closing(open_connection(dsn, application_name="finpro export", limits=BULK)) as connection,
    ):
        _exclude_other_exports(lock, say)
        connection.autocommit = True  # transactions are begun and ended here by hand
        with connection.cursor() as cursor:
            cursor.execute(_BEGIN)
            # Before the first query, which takes the snapshot: nothing may change a table's columns after it.
            cursor.execute(f"set local lock_timeout = '{_WAIT_FOR_TABLES}'")
            cursor.execute(f"lock table {', '.join(tables)} in access share mode")
            begun(cursor)
            yield Held(_taken(dsn, cursor), cursor, lock)


@contextmanager
def own_snapshot(dsn: str, application_name: str) -> Iterator[tuple[Snapshot, Cursor]]:
    """A snapshot and a cursor inside it, for one block, whatever exports and writers do meanwhile.

    Raises:
        PostgresError: Postgres cannot be reached.
    """
    with closing(open_connection(dsn, application_name=application_name, limits=BULK)) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(_BEGIN)
            begun(cursor)
            yield _taken(dsn, cursor), cursor


def _exclude_other_exports(cursor: Cursor, say: Callable[[str], None]) -> None:
    try:
        take_lock(
            cursor,
            _EXPORT_LOCK,
            seconds=_WAIT_FOR_LOCK_SECONDS,
            on_wait=lambda holder: say(f"waiting for another export of this database: {holder}"),
        )
    except LockHeld as held:
        raise ExportError(
            f"Another export of this database is running, or somebody holds its lock: {held}. Wait for its end, or end it, then"
            " start again."
        ) from held


def _taken(dsn: str, cursor: Cursor) -> Snapshot:
    # Whose transaction it is may be hidden from this user: then the age of the visible ones is what is known.
    cursor.execute("""
        select pg_export_snapshot(), pg_current_snapshot()::text, pg_snapshot_xmin(pg_current_snapshot())::text::bigint,
               pg_snapshot_xmax(pg_current_snapshot())::text::bigint, now(),
               coalesce((select extract(epoch from now() - min(begun)) from (
                   select xact_start as begun from pg_stat_activity where backend_xid is not null
                   union all select prepared from pg_prepared_xacts) as open), 0)::float8,
               (select system_identifier from pg_control_system()) || '/' || oid
        from pg_database where datname = current_database()""")
    name, visible, xmin, xmax, taken_at, oldest, database = cursor.fetchone() or ()
    return Snapshot(dsn, name, visible, xmin, xmax, taken_at, max(oldest, 0.0), database)


@contextmanager
def reader(snapshot: Snapshot) -> Iterator[Callable[[str], Iterator[pa.RecordBatch]]]:
    """What gives the rows of a query as Arrow batches of the snapshot, on a connection of its own; one query at a time.

    It goes by ADBC's own interface, not by its DB-API, which imports pandas and polars: a third of a second for each process.

    Raises:
        PostgresError: Postgres is gone, or the snapshot is: its holder has ended.
    """
    try:
        with (
            arrow_session(snapshot.dsn, application_name="finpro export reader", limits=BULK) as session,
            AdbcStatement(session.connection) as statement,
        ):
            # Who wants to alter a table waits for the holder, and would be waited for in turn, for ever.
            wait = f"set local lock_timeout = '{_WAIT_FOR_READ}'"
            for command in (_BEGIN, f"set transaction snapshot '{snapshot.name}'", session.at_begin, wait):
                if command:
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
