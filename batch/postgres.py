"""Postgres access that everything shares: connections with clear errors, locks, rights, and numbered migrations."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import psycopg2
import tenacity
from psycopg2.extensions import connection as Connection
from psycopg2.extensions import cursor as Cursor

from batch.sessions import ARRIVAL, BULK, QUICK, USUAL, Limits, arrived, describe, dial, trouble
from conf.errors import PostgresError, PostgresUnavailable
from conf.settings import CONF_DIR

MIGRATIONS = CONF_DIR / "migrations"
_MIGRATION_LOCK = 0x66696E70726F  # "finpro": one migrator at a time
_LOCK_POLL_SECONDS = 0.2
_LONGEST_MIGRATION_SECONDS = 600


class _Connection(Connection):
    """A connection that knows what each of its transactions has to begin with (see `sessions.Arrival`)."""

    at_begin = ""


def open_connection(dsn: str, *, application_name: str = "finpro", limits: Limits = USUAL) -> Connection:
    """Open a connection (not autocommit) in the schema of finpro's tables.

    Raises:
        PostgresError: it is not a DSN; unreachable, wrong password, no such database, or one that finpro cannot work in: says
            which and what to do, never the password.
    """

    def connected(conninfo: str) -> _Connection:
        return psycopg2.connect(conninfo, connection_factory=_Connection)

    connection = dial(dsn, application_name, limits, connected, psycopg2.OperationalError)
    try:
        with explained(dsn), connection, connection.cursor() as cursor:
            cursor.execute(ARRIVAL)
            arrival = arrived(dsn, cursor.fetchone() or (), limits)
            connection.at_begin = arrival.at_begin
            if arrival.at_once:
                cursor.execute(arrival.at_once)
    except BaseException:
        connection.close()
        raise
    return connection


@contextmanager
def connect(dsn: str, *, application_name: str = "finpro", limits: Limits = USUAL) -> Iterator[Connection]:
    """A connection for one block, and one transaction: committed at its end, rolled back on an error, closed either way."""
    connection = open_connection(dsn, application_name=application_name, limits=limits)
    try:
        with connection.cursor() as cursor:
            begun(cursor)
        yield connection
        connection.commit()
    except BaseException:
        with suppress(psycopg2.Error):  # it may be this connection that is lost, which the error tells of
            connection.rollback()
        raise
    finally:
        connection.close()


def begun(cursor: Cursor) -> None:
    """To be called at the begin of a transaction: behind a pooler it sets what elsewhere the connection is set to."""
    at_begin = getattr(cursor.connection, "at_begin", "")
    if at_begin:
        cursor.execute(at_begin)


@contextmanager
def explained(dsn: str) -> Iterator[None]:
    """What Postgres reports inside the block is raised as a PostgresError that says where it was and what to do."""
    try:
        yield
    except psycopg2.Error as error:
        is_away = isinstance(error, psycopg2.OperationalError | psycopg2.InterfaceError)
        raise trouble(dsn, str(error), error.pgcode, is_away=is_away) from error


# --- locks -----------------------------------------------------------------------------------------------------------

_HOLDER = """
    select pid, coalesce(nullif(application_name, ''), 'unnamed'), usename::text,
           to_char(backend_start at time zone 'UTC', 'YYYY-MM-DD HH24:MI:SS')
    from pg_locks left join pg_stat_activity using (pid)
    where locktype = 'advisory' and granted and objsubid = 1
      and pg_locks.database = (select oid from pg_database where datname = current_database())
      and classid = (%(key)s::bigint >> 32)::oid and objid = (%(key)s::bigint & 4294967295)::oid
"""


class LockHeld(Exception):
    """An advisory lock is held by another session; says whose."""


def take_lock(cursor: Cursor, key: int, *, seconds: float, on_wait: Callable[[str], None]) -> None:
    """Take an advisory lock for as long as the cursor's transaction lasts; `on_wait` hears who has it, once, if it is taken.

    It asks again and again: so who holds the lock can be told, and no snapshot is held meanwhile.

    Raises:
        LockHeld: for `seconds`.
    """
    give_up, is_told = time.monotonic() + seconds, False
    while True:
        cursor.execute("select pg_try_advisory_xact_lock(%s)", [key])
        if cursor.fetchone() == (True,):
            return
        cursor.execute(_HOLDER, {"key": key})
        holder = _described(cursor.fetchone())
        if holder and not is_told:
            is_told = True
            on_wait(holder)
        if time.monotonic() > give_up:
            raise LockHeld(holder or "somebody")
        time.sleep(_LOCK_POLL_SECONDS)


def _described(holder: tuple[Any, ...] | None) -> str | None:
    """A row of _HOLDER in words; None where the lock has been given up meanwhile."""
    if holder is None:
        return None
    pid, application, user, since = holder
    connected = f", connected since {since} UTC" if since else ""  # hidden from who may not see others' activity
    return f"process {pid} ({application}, user {user}{connected})"


# --- rights ----------------------------------------------------------------------------------------------------------


def require_rights(cursor: Cursor, role: str, needed: Mapping[str, Sequence[str]]) -> None:
    """Check that the login may do what a role is for.

    Args:
        cursor: of the login's connection.
        role: who may: such as finpro_screen.
        needed: table → select, insert, update, delete.

    Raises:
        PostgresError: it may not; names each right that is missing.
        psycopg2.Error: a table is missing; see `explained`.
    """
    asked = [(f"{right} on {table}", table, right) for table, rights in needed.items() for right in rights]
    answers = ", ".join(["has_table_privilege(%s, %s)"] * len(asked))
    cursor.execute(f"select current_user::text, {answers}", [part for _, *parts in asked for part in parts])
    user, *allowed = cursor.fetchone() or ("this user",)
    missing = [name for (name, *_), may in zip(asked, allowed, strict=True) if not may]
    if missing:
        raise PostgresError(
            f"Postgres at {describe(cursor.connection.dsn)}: {user} may not {', '.join(missing)}: grant {role} to {user}"
            " (docs/security.md)."
        )


# --- silence ---------------------------------------------------------------------------------------------------------

_Result = TypeVar("_Result")


def until_reachable(attempt: Callable[[], _Result], *, seconds: float = 60) -> _Result:
    """Call `attempt` until it no longer raises PostgresUnavailable, with growing pauses: Postgres may be restarting.

    Raises:
        PostgresUnavailable: that of the last attempt, once `seconds` have passed since the first failed.
    """
    failed_at: list[float] = []

    def is_enough(_state: tenacity.RetryCallState) -> bool:
        failed_at.append(time.monotonic())  # an attempt may itself have waited for long
        return failed_at[-1] - failed_at[0] >= seconds

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(PostgresUnavailable),
        wait=tenacity.wait_random_exponential(multiplier=0.1, max=5),
        stop=is_enough,
        reraise=True,
    )
    return retrying(attempt)


@contextmanager
def told_of_silence(dsn: str, say: Callable[[str], None], *, every_seconds: float = 30) -> Iterator[None]:
    """While the block waits for Postgres by other connections, `say` hears when it does not answer, and when it does again.

    What a connection waits for can be kept from it without an end that it would notice: by a server that is frozen, by
    something in between that goes on to acknowledge. A new connection has a time limit.
    """
    over = threading.Event()

    def watch() -> None:
        silent_since: datetime | None = None
        while not over.wait(every_seconds):
            asked_at = datetime.now(UTC)
            try:
                open_connection(dsn, application_name="finpro watch", limits=QUICK).close()
            except PostgresUnavailable as error:
                if silent_since is None and not over.is_set():
                    silent_since = asked_at
                    say(f"{str(error).splitlines()[0]} What waits for it goes on once it answers.")
            except PostgresError:
                continue  # which is for those to say who work with it
            else:
                if silent_since is not None:
                    seconds = (datetime.now(UTC) - silent_since).total_seconds()
                    say(f"Postgres at {describe(dsn)} answers again, after {seconds:,.0f} s")
                    silent_since = None

    watcher = threading.Thread(target=watch, name="watch of Postgres", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()


# --- migrations ------------------------------------------------------------------------------------------------------


def migrations() -> list[tuple[int, Path]]:
    """The numbered migrations, in order."""
    found = [(int(path.name.split("_", 1)[0]), path) for path in MIGRATIONS.glob("[0-9]*_*.sql")]
    return sorted(found)


def migrate(dsn: str, *, on_warning: Callable[[str], None] = lambda text: None) -> list[str]:
    """Apply the migrations that this database lacks, all in one transaction; returns their names.

    `on_warning` hears what a migration had to leave undone, and for whom this one waits.

    Safe to call from several processes at once: an advisory lock lets one migrate and the others find nothing to do.

    Raises:
        PostgresError: the database cannot be reached or cannot be finpro's, somebody holds the lock for long, or a migration
            fails (nothing of it stays).
    """
    applied: list[str] = []
    where = f"Postgres at {describe(dsn)}"
    with (
        explained(dsn),
        connect(dsn, application_name="finpro migrate", limits=BULK) as connection,
        connection.cursor() as cursor,
    ):
        try:
            take_lock(
                cursor,
                _MIGRATION_LOCK,
                seconds=_LONGEST_MIGRATION_SECONDS,
                on_wait=lambda holder: on_warning(f"{where} is being migrated by {holder}: waiting for its end"),
            )
        except LockHeld as held:
            raise PostgresError(f"{where} has been migrated by {held} for long: wait for its end, or end it.") from held
        cursor.execute(
            "create table if not exists schema_migrations"
            " (version integer primary key, name text not null, applied_at timestamptz not null default now())"
        )
        cursor.execute("select version from schema_migrations")
        done = {version for (version,) in cursor.fetchall()}
        for version, path in migrations():
            if version in done:
                continue
            try:
                cursor.execute(path.read_text(encoding="utf-8"))
            except psycopg2.Error as error:
                raise PostgresError(f"Migration {path.name} failed on {describe(dsn)}: {str(error).strip()}") from error
            cursor.execute("insert into schema_migrations (version, name) values (%s, %s)", [version, path.name])
            applied.append(path.name)
        for notice in connection.notices:
            if notice.startswith("WARNING:"):
                on_warning(notice.removeprefix("WARNING:").strip())
    return applied
