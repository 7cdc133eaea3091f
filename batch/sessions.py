"""How each connection of finpro's to Postgres begins, whichever driver it is of: its name, its limits, its schema; and errors.

A server takes limits of one's own when a connection starts. A pooler such as PgBouncer does not, and what one of its clients
sets there is what the next one finds: behind it each transaction begins with what it needs, for itself alone.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import psycopg2
from psycopg2.extensions import make_dsn, parse_dsn

from conf.errors import PostgresError, PostgresUnavailable, up_command

_Connection = TypeVar("_Connection")


class Limits(NamedTuple):
    """For how many seconds a connection may do a thing; 0 is for as long as it takes. What a role is set to does not count.

    Attributes:
        statement: the server works on one statement.
        lock: a statement waits for a lock.
        idle_in_transaction: a transaction is open, and nothing is asked for.
    """

    statement: int = 600
    lock: int = 60
    idle_in_transaction: int = 120

    def settings(self) -> dict[str, str]:
        """By the names that every Postgres has for them."""
        return {
            "statement_timeout": f"{self.statement}s",
            "lock_timeout": f"{self.lock}s",
            "idle_in_transaction_session_timeout": f"{self.idle_in_transaction}s",
        }


USUAL = Limits()
BULK = Limits(statement=0, idle_in_transaction=0)  # reads or writes whole tables
QUICK = Limits(statement=10, lock=5, idle_in_transaction=10)  # an answer that somebody waits for

# A server that falls silent, without a word to say so, is noticed within a minute: after a request it has not taken, by
# tcp_user_timeout; while it owes an answer, by keepalives.
_SILENCE = {
    "connect_timeout": "5",
    "keepalives": "1",
    "keepalives_idle": "15",
    "keepalives_interval": "5",
    "keepalives_count": "4",
    "tcp_user_timeout": "45000",  # milliseconds
}
# The server's side of it: what a client holds that has vanished is free after as long.
_SILENCE_OF_CLIENTS = {
    "tcp_keepalives_idle": "15",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "4",
    "tcp_user_timeout": "45s",
}
# A pooler may swallow a connection's options instead of refusing them: then this one is not there afterwards.
_DIRECT = "finpro.direct"
_NO_OPTIONS = "unsupported startup parameter|command-line options"


def _parsed(dsn: str) -> dict[str, Any]:
    try:
        return parse_dsn(dsn)
    except psycopg2.ProgrammingError:  # which quotes from the DSN
        raise PostgresError(
            "FINPRO_POSTGRES_DSN is not a DSN: write postgresql://user:password@host:port/database, with what is special in a"
            " URL percent-encoded"
        ) from None


def describe(dsn: str) -> str:
    """`host:port/database` of a DSN, without user or password: safe for logs and messages.

    Raises:
        PostgresError: it is not a DSN.
    """
    parts = _parsed(dsn)
    return f"{parts.get('host', 'localhost')}:{parts.get('port', '5432')}/{parts.get('dbname', '')}"


def conninfo(dsn: str, application_name: str, limits: Limits, *, by_options: bool = True) -> str:
    """A DSN as libpq is to have it; `by_options` says whether the limits go with it. What the DSN says of them counts more.

    Raises:
        PostgresError: it is not a DSN.
    """
    parts = _parsed(dsn)
    own = parts.pop("options", os.environ.get("PGOPTIONS", ""))
    limited = [f"-c {name}={value}" for name, value in (_SILENCE_OF_CLIENTS | limits.settings()).items()]
    options = [f"-c {_DIRECT}=1", *limited, own] if by_options else [own]
    fixed = {"application_name": application_name, "client_encoding": "UTF8", "options": " ".join(options).strip()}
    return make_dsn(**_SILENCE | parts | {name: value for name, value in fixed.items() if value})


def dial(
    dsn: str,
    application_name: str,
    limits: Limits,
    connect: Callable[[str], _Connection],
    error_of_driver: type[Exception],
) -> _Connection:
    """Open a connection by a driver's `connect`; without limits where a pooler refuses them.

    Raises:
        PostgresError: it is not a DSN; unreachable, wrong password, no such database: says which and what to do, never the
            password.
    """
    try:
        return connect(conninfo(dsn, application_name, limits))
    except error_of_driver as error:
        if not re.search(_NO_OPTIONS, str(error)):
            raise _refused(dsn, str(error)) from error
    try:
        return connect(conninfo(dsn, application_name, limits, by_options=False))
    except error_of_driver as error:
        raise _refused(dsn, str(error)) from error


# --- at the start ----------------------------------------------------------------------------------------------------

# finpro's tables are where `migrate` has noted that it made them. The login's search_path may lead elsewhere: to a schema that
# is named like the login, or to an older table.
ARRIVAL = f"""
    with places as (
        select nspname::text as name, nspname = any (current_schemas(false)) as on_path
        from pg_namespace as place
        where has_schema_privilege(oid, 'usage') and nspname !~ '^pg_(temp|toast)'
          and exists (select from pg_class where relnamespace = place.oid and relname = 'raw_orders' and relkind in ('r', 'p'))
          and exists (
              select from pg_class join pg_attribute on attrelid = pg_class.oid
              where relnamespace = place.oid and relname = 'schema_migrations' and attname = 'applied_at'
          )
    )
    select pg_encoding_to_char(encoding)::text as encoding,
           array(select name from places order by name) as places,
           array(select name from places where on_path order by name) as on_path,
           current_setting('{_DIRECT}', true) is not null as is_direct,
           current_setting('server_version_num')::integer as version
    from pg_database where datname = current_database()
"""
# A connection may be idle, and a transaction take, as long as it likes: limit → the version since which there is one.
_UNLIMITED = {"idle_session_timeout": 140_000, "transaction_timeout": 170_000}


class Arrival(NamedTuple):
    """What a connection has to do once it is open.

    Attributes:
        at_once: a statement to be committed; '' where there is nothing to set.
        at_begin: a statement that each transaction has to begin with; '' where nothing is needed.
    """

    at_once: str
    at_begin: str


def arrived(dsn: str, row: Sequence[Any], limits: Limits) -> Arrival:
    """What follows from the answer to ARRIVAL.

    Raises:
        PostgresError: finpro cannot work in this database; says why and what to do.
    """
    encoding, places, on_path, is_direct, version = row
    if encoding != "UTF8":
        raise PostgresError(
            f"Postgres at {describe(dsn)}: this database's encoding is {encoding}, which cannot hold every order: make one in"
            " UTF8 (create database finpro encoding 'UTF8' template template0) and name it in FINPRO_POSTGRES_DSN"
        )
    own = places if len(places) == 1 else on_path
    if len(places) > 1 and len(own) != 1:
        raise PostgresError(
            f"Postgres at {describe(dsn)}: finpro's tables are in several schemas, {', '.join(places)}, and it is not plain"
            " which are meant: name one at the end of FINPRO_POSTGRES_DSN, ?options=-csearch_path%3DSCHEMA, or drop what is"
            " not needed any more"
        )
    settings = {"search_path": _identifier(own[0])} if own else {}
    settings |= {name: "0" for name, since in _UNLIMITED.items() if version >= since}
    if is_direct:
        return Arrival(_set(settings, local=False), "")
    return Arrival("", _set(limits.settings() | settings, local=True))


def _set(settings: Mapping[str, str], *, local: bool) -> str:
    calls = [f"set_config('{name}', {_literal(value)}, {local})" for name, value in settings.items()]
    return f"select {', '.join(calls)}" if calls else ""


def _identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


# --- errors ----------------------------------------------------------------------------------------------------------

_UNREACHABLE = (
    f"it cannot be reached: is it running? `{up_command()}` starts the embedded one; FINPRO_POSTGRES_DSN names your own"
)
# What another try does not help against: part of the message → what to do.
_REFUSALS = {
    "password authentication failed|no password supplied": "it refused the user or password: correct FINPRO_POSTGRES_DSN",
    'database ".*" does not exist|no such database': "there is no such database: create it, or correct FINPRO_POSTGRES_DSN",
    "certificate": (
        "its certificate is not trusted: sslrootcert in FINPRO_POSTGRES_DSN must name the file of the authority that it comes"
        " from, and the host must be one that it names"
    ),
    "no encryption": "it demands TLS: add ?sslmode=verify-full&sslrootcert=… to FINPRO_POSTGRES_DSN",
    "does not support SSL": "it has no TLS, which sslmode in FINPRO_POSTGRES_DSN demands: turn it on there",
    "no pg_hba.conf entry": "its pg_hba.conf does not let this user in from here",
    _NO_OPTIONS: "a pooler refuses the options in FINPRO_POSTGRES_DSN: name the database itself, or leave them out",
}


def _refused(dsn: str, text: str) -> PostgresError:
    """The error of a connection that could not be opened, from the driver's text."""
    reason = _reason(text)
    advice = next((advice for pattern, advice in _REFUSALS.items() if re.search(pattern, text)), None)
    kind = PostgresError if advice else PostgresUnavailable
    return kind(f"Postgres at {describe(dsn)}: {advice or _UNREACHABLE}.\n({reason})")


class _Advice(NamedTuple):
    """What to do about an error, and whether another try is worth it."""

    text: str
    passes: bool = False


_LOCKED = "something holds a lock that is waited for: docs/runbook.md (FinproQuerySilent) has the query that says who"
# Postgres's error code → what to do.
_ADVICE = {
    "42P01": _Advice(
        "`finpro migrate` creates finpro's tables; where they are there, grant this user usage on their schema"
        " (docs/security.md)"
    ),
    "42501": _Advice(
        "Grant its user the role for this work, such as finpro_screen or finpro_export; who migrates owns finpro's tables, or"
        " may create some in a schema of its search_path (docs/security.md)"
    ),
    "3F000": _Advice("Its search_path names no schema that is there and that this user may use"),
    "55P03": _Advice(_LOCKED, passes=True),
    "57014": _Advice("The statement took longer than finpro lets it, or was cancelled by hand", passes=True),
    "40P01": _Advice("Two transactions were in each other's way", passes=True),
    "40001": _Advice("Two transactions were in each other's way", passes=True),
    "25006": _Advice(
        "It only reads, as a standby does: FINPRO_POSTGRES_DSN must lead to the primary (target_session_attrs=read-write)",
        passes=True,
    ),
}
# ADBC does not always say the code.
_CODES = {
    'relation ".*" does not exist': "42P01",
    "permission denied for|must be owner of": "42501",
    "due to lock timeout": "55P03",
    "due to statement timeout|due to user request": "57014",
}


def trouble(dsn: str, text: str, code: str | None, *, is_away: bool) -> PostgresError:
    """The error of this family for what a driver reports on an open connection.

    Args:
        dsn: where.
        text: the driver's.
        code: Postgres's own, where the driver says it.
        is_away: whether the driver takes the connection for lost.
    """
    reason = _reason(text)
    code = code or next((code for pattern, code in _CODES.items() if re.search(pattern, text)), None)
    advice = _ADVICE.get(code or "")
    if advice:
        kind = PostgresUnavailable if advice.passes else PostgresError
        return kind(f"Postgres at {describe(dsn)}: {reason}. {advice.text}.")
    if is_away:
        return PostgresUnavailable(f"Postgres at {describe(dsn)} does not answer: {reason}")
    return PostgresError(f"Postgres at {describe(dsn)}: {reason}")


def _reason(text: str) -> str:
    """The line that matters of what a driver says: ADBC puts words of its own before and behind it."""
    found = re.search(r"(?:ERROR|FATAL|PANIC): +(.*)", text)
    return found[1].strip() if found and "Query was: " in text else (text.strip().splitlines() or ["no reason given"])[0]
