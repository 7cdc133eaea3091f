"""Postgres access that everything shares: connections with clear errors, and numbered migrations."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg2
from psycopg2.extensions import connection as Connection

from conf.errors import PostgresError
from conf.settings import CONF_DIR

MIGRATIONS = CONF_DIR / "migrations"
_MIGRATION_LOCK = 0x66696E70726F  # "finpro": one migrator at a time


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
        if "password authentication failed" in text or "no password supplied" in text:
            advice = "Postgres refused the user or password: correct FINPRO_POSTGRES_DSN"
        elif re.search(r'database ".*" does not exist', text):
            advice = "there is no such database: create it, or correct FINPRO_POSTGRES_DSN"
        else:
            advice = "it cannot be reached: is it running? `finpro up` starts the embedded one; FINPRO_POSTGRES_DSN names your own"
        raise PostgresError(f"Postgres at {where}: {advice}.\n({text.splitlines()[-1]})") from error


@contextmanager
def connect(dsn: str, *, application_name: str = "finpro") -> Iterator[Connection]:
    """A connection for one block: committed at its end, rolled back on an error, closed either way."""
    connection = open_connection(dsn, application_name=application_name)
    try:
        with connection:
            yield connection
    finally:
        connection.close()


def migrations() -> list[tuple[int, Path]]:
    """The numbered migrations, in order."""
    found = [(int(path.name.split("_", 1)[0]), path) for path in MIGRATIONS.glob("[0-9]*_*.sql")]
    return sorted(found)


def migrate(dsn: str) -> list[str]:
    """Apply the migrations that this database lacks, all in one transaction; returns their names.

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
    return applied
