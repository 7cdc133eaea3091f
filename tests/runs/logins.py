"""Logins of a test's own on the platform's Postgres, and what an administrator may have set them to."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from batch.postgres import connect
from jobs.local.platform import Platform

HASTY = {"statement_timeout": "50ms", "lock_timeout": "50ms", "transaction_timeout": "200ms", "idle_session_timeout": "200ms"}


@contextmanager
def login(platform: Platform, dsn: str, *roles: str, hasty: bool = False) -> Iterator[str]:
    """The DSN of a new login for a database, which has these roles; a `hasty` one is set to time limits that nothing keeps."""
    name, parts = f"login_{uuid.uuid4().hex[:12]}", urlsplit(dsn)
    superuser = platform.postgres.dsn("postgres", parts.path.strip("/"))
    settings = HASTY if hasty else {}
    with connect(superuser) as connection, connection.cursor() as cursor:
        cursor.execute(f"create role {name} login password 'p'")
        for role in roles:
            cursor.execute(f"grant {role} to {name}")
        for setting, value in settings.items():
            cursor.execute(f"alter role {name} set {setting} = '{value}'")
    yield parts._replace(netloc=f"{name}:p@{platform.postgres.address}").geturl()
    with connect(superuser) as connection, connection.cursor() as cursor:
        cursor.execute(f"drop owned by {name} cascade")
        cursor.execute(f"drop role {name}")


def user_of(dsn: str) -> str:
    """The user that a DSN names."""
    return str(urlsplit(dsn).username)


def own_schema(platform: Platform, dsn: str, login: str) -> None:
    """Give a login a schema of its name, in which there is an older table of orders."""
    name = user_of(login)
    with connect(platform.postgres.dsn("postgres", urlsplit(dsn).path.strip("/"))) as connection, connection.cursor() as cursor:
        cursor.execute(f"create schema authorization {name}")
        for table in ("raw_orders", "screening_state"):
            cursor.execute(f"create table {name}.{table} as table public.{table}")
            cursor.execute(f"alter table {name}.{table} owner to {name}")
