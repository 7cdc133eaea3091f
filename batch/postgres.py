"""Postgres access that everything shares: connections with clear errors, and numbered migrations."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import psycopg2
import tenacity
from psycopg2.extensions import connection as Connection

from conf.errors import PostgresError, PostgresUnavailable
from conf.settings import CONF_DIR

MIGRATIONS = CONF_DIR / "migrations"
_MIGRATION_LOCK = 0x66696E70726F  # "finpro": one migrator at a time

_UNREACHABLE = "it cannot be reached: is it running? `finpro up` starts the embedded one; FINPRO_POSTGRES_DSN names your own"
# What another try does not help against: part of the message → what to do.
_REFUSALS = {
    "password authentication failed|no password supplied": "it refused the user or password: correct FINPRO_POSTGRES_DSN",
    'database ".*" does not exist': "there is no such database: create it, or correct FINPRO_POSTGRES_DSN",
    "certificate": (
        "its certificate is not trusted: sslrootcert in FINPRO_POSTGRES_DSN must name the file of the authority that it comes"
        " from, and the host must be one that it names"
    ),
    "no encryption": "it demands TLS: add ?sslmode=verify-full&sslrootcert=… to FINPRO_POSTGRES_DSN",
    "does not support SSL": "it has no TLS, which sslmode in FINPRO_POSTGRES_DSN demands: turn it on there",
    "no pg_hba.conf entry": "its pg_hba.conf does not let this user in from here",
}


def describe(dsn: str) -> str:
    """`host:port/database` of a DSN, without user or password: safe for logs and messages."""
    parts = psycopg2.extensions.parse_dsn(dsn)
    return f"{parts.get('host', 'localhost')}:{parts.get('port', '5432')}/{parts.get('dbname', '')}"


def open_connection(dsn: str, *, application_name: str = "finpro", connect_timeout_seconds: int = 5) -> Connection:
    """Open a connection (not autocommit).

    Raises:
        PostgresError: unreachable, wrong password, no such database; says which and what to do, never the password.
    """
    try:
        where = describe(dsn)
    except psycopg2.ProgrammingError as error:
        raise PostgresError("FINPRO_POSTGRES_DSN is not a DSN: write postgresql://user:password@host:port/database") from error
    try:
        return psycopg2.connect(dsn, application_name=application_name, connect_timeout=connect_timeout_seconds)
    except psycopg2.OperationalError as error:
        text = str(error).strip()
        refused = next((advice for pattern, advice in _REFUSALS.items() if re.search(pattern, text)), None)
        kind, advice = (PostgresError, refused) if refused else (PostgresUnavailable, _UNREACHABLE)
        raise kind(f"Postgres at {where}: {advice}.\n({text.splitlines()[0]})") from error


@contextmanager
def connect(dsn: str, *, application_name: str = "finpro") -> Iterator[Connection]:
    """A connection for one block: committed at its end, rolled back on an error, closed either way."""
    connection = open_connection(dsn, application_name=application_name)
    try:
        with connection:
            yield connection
    finally:
        connection.close()


@contextmanager
def explained(dsn: str) -> Iterator[None]:
    """What Postgres reports inside the block is raised as a PostgresError that says where it was and what to do."""
    try:
        yield
    except psycopg2.errors.UndefinedTable as error:
        missing = str(error).splitlines()[0]
        raise PostgresError(f"Postgres at {describe(dsn)}: {missing}. `finpro migrate` creates finpro's tables.") from error
    except psycopg2.errors.InsufficientPrivilege as error:
        refused = str(error).splitlines()[0]
        raise PostgresError(
            f"Postgres at {describe(dsn)}: {refused}. Grant its user the role for this work, such as finpro_screen or"
            " finpro_export (docs/security.md)."
        ) from error
    except (psycopg2.OperationalError, psycopg2.InterfaceError) as error:
        raise PostgresUnavailable(f"Postgres at {describe(dsn)} does not answer: {str(error).strip()}") from error
    except psycopg2.Error as error:
        raise PostgresError(f"Postgres at {describe(dsn)}: {str(error).strip()}") from error


_Result = TypeVar("_Result")


def until_reachable(attempt: Callable[[], _Result], *, seconds: float = 60) -> _Result:
    """Call `attempt` until it no longer raises PostgresUnavailable, with growing pauses: Postgres may be restarting.

    Raises:
        PostgresUnavailable: that of the last attempt, once `seconds` have passed.
    """
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(PostgresUnavailable),
        wait=tenacity.wait_random_exponential(multiplier=0.1, max=5),
        stop=tenacity.stop_after_delay(seconds),
        reraise=True,
    )
    return retrying(attempt)


def migrations() -> list[tuple[int, Path]]:
    """The numbered migrations, in order."""
    found = [(int(path.name.split("_", 1)[0]), path) for path in MIGRATIONS.glob("[0-9]*_*.sql")]
    return sorted(found)


def migrate(dsn: str, *, on_warning: Callable[[str], None] = lambda text: None) -> list[str]:
    """Apply the migrations that this database lacks, all in one transaction; returns their names.

    `on_warning` hears what a migration had to leave undone.

    Safe to call from several processes at once: an advisory lock lets one migrate and the others find nothing to do.

    Raises:
        PostgresError: the database cannot be reached, or a migration fails (nothing of it stays).
    """
    applied: list[str] = []
    with connect(dsn, application_name="finpro migrate") as connection, connection.cursor() as cursor:
        cursor.execute("select pg_advisory_xact_lock(%s)", [_MIGRATION_LOCK])
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
