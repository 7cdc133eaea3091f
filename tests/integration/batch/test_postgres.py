"""Connections to a real Postgres: in whatever it is set to, wherever its tables are, and when it does not answer."""

import shutil
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import adbc_driver_postgresql
import psutil
import psycopg2
import pyarrow as pa
import pytest

from batch.arrow_sessions import ArrowCursor, arrow_session
from batch.postgres import connect, migrate, open_connection, told_of_silence, until_reachable
from batch.sessions import USUAL, describe
from batch.warehouse import snapshot as snapshots
from batch.warehouse.manifest import TABLES
from batch.warehouse.snapshot import held_snapshot, reader
from conf.errors import ExportError, PostgresError, PostgresUnavailable
from jobs.local.platform import Platform
from jobs.local.ports import LOOPBACK, accepts_connections
from jobs.local.private_files import private_directory, write_private
from jobs.local.unprivileged import Unprivileged
from streaming.screening import sinks
from streaming.screening.sinks import in_transaction, require_tables
from tests.runs.archive import wait_until
from tests.runs.commands import finpro
from tests.runs.logins import HASTY, login, own_schema, user_of
from tests.runs.silent_servers import Options, Relay


class Database:
    """A database of a test's own, and logins for it."""

    def __init__(self, platform: Platform, opened: ExitStack) -> None:
        name = f"test_{uuid.uuid4().hex[:12]}"
        platform.postgres.create_database(name)
        opened.callback(platform.postgres.drop_database, name)
        self._platform, self._opened, self.name = platform, opened, name
        self.dsn = platform.postgres.dsn("finpro", name)
        self.superuser = platform.postgres.dsn("postgres", name)

    def login(self, *roles: str, hasty: bool = False) -> str:
        """The DSN of a new login that has these roles."""
        return self._opened.enter_context(login(self._platform, self.dsn, *roles, hasty=hasty))

    def own_schema(self, login: str) -> None:
        """Give a login a schema of its name, in which there is an older table of orders."""
        own_schema(self._platform, self.dsn, login)


@pytest.fixture
def empty(platform: Platform) -> Iterator[Database]:
    with ExitStack() as opened:
        yield Database(platform, opened)


@pytest.fixture
def database(empty: Database) -> Database:
    migrate(empty.dsn)
    return empty


@pytest.fixture(autouse=True)
def own_worker_connection() -> Iterator[None]:
    sinks._worker_connection.cache_clear()
    yield
    sinks._worker_connection.cache_clear()


def run(dsn: str, *statements: str) -> list[tuple[Any, ...]]:
    with connect(dsn) as connection, connection.cursor() as cursor:
        for statement in statements:
            cursor.execute(statement)
        return cursor.fetchall() if cursor.description else []


def fetched(query: str) -> Callable[[ArrowCursor], list[Any]]:
    return lambda cursor: cursor.rows(query)


def copy_a_query_id(cursor: ArrowCursor) -> bool:
    """Copy a row, the way verdicts are copied."""
    row = {"query_id": ["q"], "division": ["d"], "bucket": [0], "batch": [0], "state": [b""], "orders": [b""]}
    types = pa.schema({"bucket": pa.int32(), "batch": pa.int64()})
    columns = {name: pa.array(values, types.field(name).type if name in types.names else None) for name, values in row.items()}
    cursor.copy("screening_state", pa.table(columns))
    return True


# --- how a connection begins -------------------------------------------------------------------------------------------

SETTINGS = """
    select name, setting from pg_settings
    where name in ('statement_timeout', 'lock_timeout', 'idle_in_transaction_session_timeout', 'idle_session_timeout',
                   'transaction_timeout', 'client_encoding')
"""
EXPECTED = {
    "statement_timeout": "600000",
    "lock_timeout": "60000",
    "idle_in_transaction_session_timeout": "120000",
    "idle_session_timeout": "0",
    "transaction_timeout": "0",
    "client_encoding": "UTF8",
}


def test_every_connection_has_a_name_and_limits_of_our_own_whatever_the_role_is_set_to(database: Database) -> None:
    dsn = database.login("finpro_screen", "finpro_export", hasty=True)
    run(database.superuser, f"alter role {user_of(dsn)} set client_encoding = 'LATIN1'")
    with closing(open_connection(dsn)) as connection, connection.cursor() as cursor:
        cursor.execute(SETTINGS)
        assert dict(cursor.fetchall()) == EXPECTED
    assert dict(in_transaction(dsn, fetched(SETTINGS))) == EXPECTED
    with held_snapshot(dsn, TABLES) as held, reader(held.snapshot) as rows:
        held.cursor.execute(SETTINGS)
        unlimited = {**EXPECTED, "statement_timeout": "0", "idle_in_transaction_session_timeout": "0"}
        assert dict(held.cursor.fetchall()) == unlimited
        (batch,) = rows("select current_setting('statement_timeout') as statement_timeout")
        assert batch.to_pylist() == [{"statement_timeout": "0"}]
        named = run(database.dsn, "select application_name from pg_stat_activity where datname = current_database()")
    names = {name for (name,) in named} - {"finpro"}
    assert names == {"finpro screen worker", "finpro export lock", "finpro export", "finpro export reader"}


def test_a_process_asks_for_the_types_of_a_database_once_and_keeps_no_connection_for_it(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    ask = adbc_driver_postgresql.connect

    def counted(conninfo: str) -> object:
        asked.append(conninfo)
        return ask(conninfo)

    monkeypatch.setattr(adbc_driver_postgresql, "connect", counted)
    for _ in range(3):
        with arrow_session(database.dsn, application_name="three times", limits=USUAL) as session:
            assert ArrowCursor(session.connection).rows("select 'ü'::text, 1::int8") == [("ü", 1)]
    assert len(asked) == 1
    connected = "select count(*) from pg_stat_activity where application_name = 'three times'"
    wait_until(lambda: run(database.dsn, connected) == [(0,)])


@pytest.mark.skipif(sys.platform != "linux", reason="sockets are looked at in Linux's way")
@pytest.mark.parametrize("driver", ["psycopg2", "adbc"])
def test_a_connection_notices_within_a_minute_that_the_network_is_gone(platform: Platform, driver: str) -> None:
    dsn = platform.postgres.dsn("finpro", "finpro")
    port = urlsplit(dsn).port
    before = sockets_to(port)
    with closing(open_connection(dsn)) if driver == "psycopg2" else arrow_session(dsn, application_name="finpro", limits=USUAL):
        (opened,) = sockets_to(port) - before
        with socket.fromfd(opened, socket.AF_INET, socket.SOCK_STREAM) as end:
            assert end.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)
            assert [end.getsockopt(socket.IPPROTO_TCP, option) for option in options] == [15, 5, 4, 45_000]


def sockets_to(port: int | None) -> set[int]:
    return {one.fd for one in psutil.Process().net_connections() if one.raddr and one.raddr.port == port and one.fd >= 0}


def test_what_the_dsn_says_counts_more_than_our_limits(database: Database) -> None:
    dsn = f"{database.dsn}?options={quote('-c statement_timeout=3s')}"
    assert run(dsn, "show statement_timeout") == [("3s",)]
    assert run(dsn, "show lock_timeout") == [("1min",)]


# --- behind a pooler ---------------------------------------------------------------------------------------------------


@contextmanager
def pooled(platform: Platform, options: Options) -> Iterator[Relay]:
    relay = Relay(int(platform.postgres.address.rpartition(":")[2]), options)
    yield relay
    relay.close()


@pytest.mark.parametrize("options", [Options.REFUSED, Options.SWALLOWED], ids=lambda options: options.name.lower())
def test_behind_a_pooler_that_knows_no_options_each_transaction_has_its_limits_and_leaves_none(
    platform: Platform, database: Database, options: Options
) -> None:
    direct = database.login("finpro_screen", "finpro_export", hasty=True)
    database.own_schema(direct)
    with pooled(platform, options) as relay:
        dsn = relay.dsn(direct)
        found = dict(run(dsn, SETTINGS))
        assert found == EXPECTED
        assert in_transaction(dsn, copy_a_query_id)
        assert states(database.dsn) == [(1,)]
        assert dict(in_transaction(dsn, fetched(SETTINGS))) == EXPECTED
        with held_snapshot(dsn, TABLES) as held, reader(held.snapshot) as rows:
            (batch,) = rows("select pg_sleep(0.3)::text as slept")
            assert batch.num_rows == 1
            held.require()
        with closing(open_connection(dsn)) as connection, connection.cursor() as cursor:
            cursor.execute("select current_setting('statement_timeout'), current_schema()")
            assert cursor.fetchall() == [(HASTY["statement_timeout"], user_of(direct))], "nothing of ours is left behind"
        if options is Options.REFUSED:
            with pytest.raises(PostgresError, match="a pooler refuses the options in FINPRO_POSTGRES_DSN"):
                open_connection(relay.dsn(direct, options="-csearch_path%3Dshop"))


def test_pgbouncer_in_transaction_mode_gives_one_clients_settings_and_locks_to_no_other(
    platform: Platform, database: Database, home: Path
) -> None:
    with pgbouncer(platform, database, home) as dsn:
        for _ in range(2):
            assert in_transaction(dsn, fetched("select current_setting('search_path')")) == [('"public"',)]
            with held_snapshot(dsn, TABLES) as held, reader(held.snapshot) as rows:
                assert next(rows("select 1 as one")).num_rows == 1
                held.require()
        assert migrate(dsn) == []
        with closing(psycopg2.connect(dsn)) as another, another.cursor() as cursor:
            cursor.execute("select current_setting('statement_timeout'), current_setting('search_path')")
            assert cursor.fetchall() == [("0", '"$user", public')]
            cursor.execute("select count(*) from pg_locks where locktype = 'advisory'")
            assert cursor.fetchall() == [(0,)]


@contextmanager
def pgbouncer(platform: Platform, database: Database, home: Path) -> Iterator[str]:
    binary = shutil.which("pgbouncer")
    if binary is None:
        pytest.skip("pgbouncer is not installed")
    folder = private_directory(home / f"pgbouncer-{database.name}")
    with socket.create_server((LOOPBACK, 0)) as free:
        port = free.getsockname()[1]
    server = urlsplit(database.dsn)
    write_private(
        folder / "pgbouncer.ini",
        f"[databases]\n* = host={LOOPBACK} port={server.port} user={server.username} password={server.password}\n"
        f"[pgbouncer]\nlisten_addr = {LOOPBACK}\nlisten_port = {port}\nunix_socket_dir =\nauth_type = any\n"
        "pool_mode = transaction\n",
    )
    account = Unprivileged.find(folder, [binary, "--version"])
    account.own(folder)
    command = account.command([binary, "--quiet", str(folder / "pgbouncer.ini")])
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            wait_for(lambda: accepts_connections(port))
            yield server._replace(netloc=f"{LOOPBACK}:{port}").geturl()
        finally:
            process.terminate()


# --- what a role is set to ---------------------------------------------------------------------------------------------


def test_an_export_a_worker_and_status_outlast_what_their_role_is_set_to(database: Database) -> None:
    dsn = database.login("finpro_screen", "finpro_export", "finpro_monitor", hasty=True)
    assert in_transaction(dsn, fetched("select pg_sleep(0.3), 1"))[0][1] == 1
    (pid,) = in_transaction(dsn, fetched("select pg_backend_pid()"))
    with held_snapshot(dsn, TABLES) as held, reader(held.snapshot) as rows:
        (batch,) = rows("select 1 as one, pg_sleep(0.3)::text as slept")
        assert batch.num_rows == 1
        held.require()
    time.sleep(0.3)
    assert in_transaction(dsn, fetched("select pg_backend_pid()")) == [pid], "its connection is the same"
    with locked_by_psql(database.dsn, "lock table ingestion_monitoring in access exclusive mode", seconds=0.3):
        assert run(dsn, "select count(*) from ingestion_monitoring") == [(0,)]


@contextmanager
def locked_by_psql(dsn: str, statement: str, seconds: float) -> Iterator[None]:
    """Somebody holds a lock for some seconds from the beginning of the block on."""
    with closing(open_connection(dsn, application_name="psql")) as other, other.cursor() as cursor:
        cursor.execute(statement)
        timer = threading.Timer(seconds, other.rollback)
        timer.start()
        yield
        timer.join()


# --- where the tables are ----------------------------------------------------------------------------------------------


def states(dsn: str) -> list[tuple[Any, ...]]:
    return run(dsn, "select count(*) from screening_state")


def test_rows_land_in_finpros_tables_when_a_schema_is_named_like_the_login(database: Database) -> None:
    dsn = database.login("finpro_screen")
    run(database.superuser, f"create schema authorization {user_of(dsn)}")
    require_tables(dsn)
    assert in_transaction(dsn, copy_a_query_id)
    assert states(database.dsn) == [(1,)]


def test_rows_land_in_finpros_tables_when_the_logins_schema_has_an_older_table_of_that_name(database: Database) -> None:
    dsn = database.login("finpro_screen")
    database.own_schema(dsn)
    require_tables(dsn)
    assert in_transaction(dsn, copy_a_query_id)
    assert states(database.dsn) == [(1,)]
    assert run(database.superuser, f"select count(*) from {user_of(dsn)}.screening_state") == [(0,)]


def test_rows_land_in_finpros_tables_when_the_search_path_begins_with_another_schema(database: Database) -> None:
    run(database.dsn, "create schema shop")
    dsn = f"{database.dsn}?options=-csearch_path%3Dshop%2Cpublic"
    require_tables(dsn)
    assert in_transaction(dsn, copy_a_query_id)
    assert states(database.dsn) == [(1,)]


def test_the_tables_are_made_in_the_schema_of_the_search_path_and_found_without_it(empty: Database) -> None:
    run(empty.dsn, 'create schema "Shop ""1"""')
    path = quote('"Shop\\ ""1"""')
    assert migrate(f"{empty.dsn}?options=-csearch_path%3D{path}")
    found = run(empty.dsn, "select relnamespace::regnamespace::text from pg_class where relname = 'raw_orders'")
    assert found == [('"Shop ""1"""',)]
    assert migrate(empty.dsn) == [], "they are not made once more in public"
    assert in_transaction(empty.dsn, copy_a_query_id)
    assert states(empty.dsn) == [(1,)]


def test_tables_in_two_schemas_are_refused_until_the_dsn_names_one(database: Database) -> None:
    run(database.dsn, "create schema shop")
    run(
        database.dsn,
        "create table shop.raw_orders as table raw_orders",
        "create table shop.schema_migrations as table schema_migrations",
    )
    assert run(database.dsn, "select 1") == [(1,)], "shop is not in its search_path"
    with pytest.raises(PostgresError, match=r"in several schemas, public, shop, .* \?options=-csearch_path%3DSCHEMA"):
        require_tables(f"{database.dsn}?options=-csearch_path%3Dshop%2Cpublic")
    assert run(f"{database.dsn}?options=-csearch_path%3Dshop", "select current_schema()") == [("shop",)]


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
def test_a_database_that_cannot_hold_every_text_is_refused_by_its_encoding(
    platform: Platform, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    server, name = platform.postgres.dsn("postgres", "postgres"), f"test_{uuid.uuid4().hex[:12]}"
    with closing(open_connection(server)) as connection, connection.cursor() as cursor:
        connection.autocommit = True
        cursor.execute(f"create database {name} encoding '{encoding}' locale_provider libc locale 'C' template template0")
    dsn = platform.postgres.dsn("postgres", name)
    for attempt in (migrate, require_tables, lambda dsn: in_transaction(dsn, fetched("select 1"))):
        with pytest.raises(PostgresError, match=f"encoding is {encoding}.*create database finpro encoding 'UTF8'"):
            attempt(dsn)
    ended = finpro("migrate", FINPRO_POSTGRES_DSN=dsn)
    assert ended.returncode == 4
    assert f"encoding is {encoding}" in ended.stderr
    assert "Traceback" not in ended.stderr
    platform.postgres.drop_database(name)


# --- rights ------------------------------------------------------------------------------------------------------------


def test_a_missing_right_is_named_at_the_start(database: Database) -> None:
    dsn = database.login("finpro_monitor")
    run(database.dsn, f"grant select on screening_state to {user_of(dsn)}")
    missing = (
        "may not insert on raw_orders, update on raw_orders, insert on screening_state, update on screening_state,"
        " delete on screening_state, insert on screening_ledger, update on screening_ledger, delete on screening_ledger,"
        " insert on screening_drivers, update on screening_drivers, select on screening_evidence, insert on screening_evidence,"
        " update on screening_evidence, delete on screening_evidence: grant finpro_screen"
    )
    with pytest.raises(PostgresError, match=missing):
        require_tables(dsn)


def test_a_worker_gives_the_same_advice_on_a_missing_right_and_a_missing_table(database: Database, empty: Database) -> None:
    dsn = database.login("finpro_monitor")
    works = (copy_a_query_id, fetched("select * from screening_state"))
    for work in works:
        with pytest.raises(PostgresError, match=r"^\S+ \S+ \S+: permission denied for table \w+\. Grant its user") as caught:
            in_transaction(dsn, work)
        assert not isinstance(caught.value, PostgresUnavailable)
    run(database.dsn, "drop table screening_state")
    for work in works:
        with pytest.raises(PostgresError, match=r'relation "\S+" does not exist\. `finpro migrate` creates'):
            in_transaction(database.dsn, work)


def test_who_may_not_create_tables_is_told_so(empty: Database) -> None:
    dsn = empty.login()
    with pytest.raises(PostgresError, match=r"permission denied for schema public.* a schema of its search_path"):
        migrate(dsn)


# --- locks -------------------------------------------------------------------------------------------------------------


def test_who_holds_the_exports_lock_is_named(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "_WAIT_FOR_LOCK_SECONDS", 0.5)
    said: list[str] = []
    with closing(open_connection(database.dsn, application_name="psql")) as other, other.cursor() as cursor:
        cursor.execute(f"select pg_backend_pid(), pg_advisory_lock({snapshots._EXPORT_LOCK})")
        (pid, _) = cursor.fetchone() or ()
        holder = rf"process {pid} \(psql, user finpro, connected since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d UTC\)"
        with (
            pytest.raises(ExportError, match=f"somebody holds its lock: {holder}"),
            held_snapshot(database.dsn, TABLES, said.append),
        ):
            pass
        assert len(said) == 1
        other.rollback()
        cursor.execute(f"select pg_advisory_unlock({snapshots._EXPORT_LOCK})")
    with held_snapshot(database.dsn, TABLES):
        pass


def test_a_migration_says_for_whom_it_waits_and_goes_on(empty: Database) -> None:
    said: list[str] = []
    with locked_by_psql(empty.dsn, "select pg_advisory_xact_lock(0x66696E70726F)", seconds=0.5):
        assert len(migrate(empty.dsn, on_warning=said.append)) > 5
    assert [text for text in said if "is being migrated by process" in text and "(psql, user finpro" in text]


# --- silence -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def relay(platform: Platform) -> Iterator[Relay]:
    relay = Relay(int(platform.postgres.address.rpartition(":")[2]))
    yield relay
    relay.close()


SOON = {"connect_timeout": "2", "keepalives_idle": "1", "keepalives_interval": "1", "tcp_user_timeout": "1500"}


@pytest.mark.skipif(sys.platform != "linux", reason="packets are dropped in Linux's way")
def test_a_worker_goes_on_after_a_silence_of_the_network(database: Database, relay: Relay) -> None:
    dsn = relay.dsn(database.dsn, **SOON)
    assert in_transaction(dsn, copy_a_query_id)
    with relay.silence():
        for words in ("does not answer", "cannot be reached"):
            with pytest.raises(PostgresUnavailable, match=words):
                sinks._transaction(dsn, fetched("select 1"))
        stored = threading.Thread(
            target=in_transaction, args=(dsn, fetched("update screening_state set batch = 1 returning 1"))
        )
        stored.start()
        time.sleep(1)
    stored.join(30)
    assert run(database.dsn, "select batch from screening_state") == [(1,)]


@pytest.mark.skipif(sys.platform != "linux", reason="packets are dropped in Linux's way")
def test_a_silence_of_the_network_ends_an_export_with_a_message(database: Database, relay: Relay) -> None:
    dsn = relay.dsn(database.dsn, **SOON)
    with (
        pytest.raises(PostgresUnavailable, match="stopped the reading"),
        held_snapshot(dsn, TABLES) as held,
        reader(held.snapshot) as rows,
        relay.silence(),
    ):
        list(rows("select 1 as one"))


@pytest.mark.skipif(sys.platform != "linux", reason="packets are dropped in Linux's way")
def test_an_export_that_has_lost_its_lock_in_a_silence_does_not_take_itself_for_alone(database: Database, relay: Relay) -> None:
    dsn = relay.dsn(database.dsn, **SOON)
    with pytest.raises(PostgresUnavailable, match="does not answer"), held_snapshot(dsn, TABLES) as held, relay.silence():
        held.require()


def test_a_server_that_acknowledges_and_never_answers_is_told_of_and_so_is_its_return(database: Database, relay: Relay) -> None:
    dsn, said = relay.dsn(database.dsn, connect_timeout="2"), list[str]()
    answers: list[Any] = []
    with told_of_silence(dsn, said.append, every_seconds=0.2):
        with relay.frozen():
            waiting = threading.Thread(target=lambda: answers.append(in_transaction(dsn, fetched("select 1"))))
            waiting.start()
            wait_for(lambda: len(said) == 1)
        waiting.join(10)
        wait_for(lambda: len(said) == 2)
    assert answers == [[(1,)]]
    assert said[0].startswith(f"Postgres at {describe(dsn)}: it cannot be reached")
    assert said[1].startswith(f"Postgres at {describe(dsn)} answers again, after ")


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.05)


def test_a_try_that_took_long_itself_is_followed_by_others() -> None:
    tries: list[float] = []

    def slow() -> None:
        tries.append(time.monotonic())
        if len(tries) == 1:
            time.sleep(0.3)
            raise PostgresUnavailable

    until_reachable(slow, seconds=0.2)
    assert len(tries) == 2


def test_the_owner_of_the_embedded_database_logs_in_without_work_that_would_hold_up_who_guesses(platform: Platform) -> None:
    with closing(open_connection(platform.postgres.dsn("postgres", "postgres"))) as connection, connection.cursor() as cursor:
        cursor.execute("select rolpassword from pg_authid where rolname = 'finpro'")
        (verifier,) = cursor.fetchone() or ("",)
    password = platform.postgres.dsn("finpro", "finpro").split(":")[2].partition("@")[0]
    assert verifier.startswith("SCRAM-SHA-256$1:")
    assert len(password) >= 32  # 24 random bytes
