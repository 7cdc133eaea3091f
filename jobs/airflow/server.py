"""`finpro airflow`: Airflow with finpro's DAGs on this machine, over the embedded platform, for as long as the command runs."""

import hashlib
import importlib.util
import json
import os
import signal
import sys
import time
from base64 import urlsafe_b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import requests

from conf.errors import PlatformError
from conf.settings import CONF_DIR, finpro_home
from jobs.local.platform import Platform, up
from jobs.local.ports import LOOPBACK, claim_ports
from jobs.local.private_files import private_directory, secret, write_private
from jobs.local.processes import Daemon, run_once

DAGS = Path(__file__).resolve().parents[1] / "dags"
_DATABASE = "airflow"
_USER = "admin"
# What runs, in the order in which it starts. Nothing here defers a task, so there is no triggerer; the API server reads the
# tasks' logs from disk, so the scheduler need not serve them on a port, which would not be on loopback.
_COMPONENTS = {"api-server": [], "scheduler": ["--skip-serve-logs"], "dag-processor": []}
_START_SECONDS = 180
_STOP_SECONDS = 20

Say = Callable[[str], None]


def run_airflow(*, stop: Callable[[], bool], say: Say) -> None:
    """Start the embedded platform where it does not run, and Airflow; return when `stop()`, with Airflow ended.

    A task that runs by then gets some seconds to finish; what is killed is made again when Airflow runs again.

    Raises:
        PlatformError: Airflow is not installed, or a part of it cannot be started, or has died; names its log.
    """
    _require_airflow()
    platform = up()
    platform.postgres.create_database(_DATABASE)
    home = private_directory(finpro_home() / "airflow")
    port = claim_ports(finpro_home(), ("airflow",))["airflow"]
    environment = airflow_environment(platform, home, port)
    say("Preparing Airflow's database …")
    prepare(environment, home)
    with _running(environment) as daemons:
        _wait_until_healthy(daemons, port, stop)
        say(f"Airflow is at http://{LOOPBACK}:{port}, user {_USER}; the password is in {_password_file(home)}")
        say("Ctrl-C stops it.")
        while not stop():
            _require_alive(daemons)
            time.sleep(0.5)
        say("Stopping Airflow …")


def airflow_environment(platform: Platform, home: Path, port: int) -> dict[str, str]:
    """This process's environment, and how Airflow is to run; a variable of Airflow's that is set already stands.

    It contains passwords.
    """
    key = secret(home / "secrets" / "key")
    url = f"http://{LOOPBACK}:{port}"
    ours = {
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__CORE__DAGS_FOLDER": str(DAGS),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
        "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
        "AIRFLOW__CORE__PARALLELISM": "4",
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{url}/execution/",
        "AIRFLOW__CORE__FERNET_KEY": urlsafe_b64encode(hashlib.sha256(key.encode()).digest()).decode(),
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": f"{_USER}:admin",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(_password_file(home)),
        "AIRFLOW__API__HOST": LOOPBACK,
        "AIRFLOW__API__PORT": str(port),
        "AIRFLOW__API__BASE_URL": url,
        "AIRFLOW__API__SECRET_KEY": secret(home / "secrets" / "session"),
        "AIRFLOW__API_AUTH__JWT_SECRET": secret(home / "secrets" / "tokens"),
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": platform.postgres.dsn("finpro", _DATABASE).replace("://", "+psycopg2://", 1),
        # A task or scheduler that was killed is missed within a minute, not after five.
        "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "60",
        "AIRFLOW__SCHEDULER__ORPHANED_TASKS_CHECK_INTERVAL": "30",
        "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
        "AIRFLOW_CONN_SPARK_DEFAULT": json.dumps({"conn_type": "spark", "host": "local[*,4]"}),
    }
    return {**ours, **os.environ, "FINPRO_HOME": str(finpro_home())}


def prepare(environment: dict[str, str], home: Path) -> None:
    """Make, or bring up to date, Airflow's tables, its pools and the file with its user's password.

    Raises:
        PlatformError: Airflow refuses; with what it said.
    """
    if not _password_file(home).exists():  # Airflow would make one itself, and print the password into its log
        write_private(_password_file(home), json.dumps({_USER: secret(home / "secrets" / _USER)}))
    for command in (["db", "migrate"], ["pools", "import", str(CONF_DIR / "airflow_pools.json")]):
        run_once([_airflow(), *command], cwd=home, failure="Airflow's database cannot be prepared", environment=environment)


def _require_airflow() -> None:
    if importlib.util.find_spec("airflow") is None:
        raise PlatformError("Airflow is not installed: `make airflow` in the checkout, or pip install 'finpro[airflow]'.")


def _password_file(home: Path) -> Path:
    return home / "secrets" / "users.json"


@contextmanager
def _running(environment: dict[str, str]) -> Iterator[list[Daemon]]:
    daemons = [Daemon(f"airflow-{component}", finpro_home()) for component in _COMPONENTS]
    try:
        _stop(daemons)  # those of a command that was killed
        for daemon, (component, options) in zip(daemons, _COMPONENTS.items(), strict=True):
            daemon.start([_airflow(), component, *options], environment=environment, cwd=Path.cwd())
        yield daemons
    finally:
        _stop(daemons)


def _stop(daemons: list[Daemon]) -> None:
    for daemon in reversed(daemons):
        daemon.stop(first=signal.SIGTERM, patience_seconds=_STOP_SECONDS)


def _wait_until_healthy(daemons: list[Daemon], port: int, stop: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not (stop() or _is_healthy(port)):
        _require_alive(daemons)
        if time.monotonic() > deadline:
            raise PlatformError(f"Airflow is not healthy after {_START_SECONDS} s; its logs: {_logs(daemons)}")
        time.sleep(0.5)


def _is_healthy(port: int) -> bool:
    try:
        health = requests.get(f"http://{LOOPBACK}:{port}/api/v2/monitor/health", timeout=5).json()
    except (requests.RequestException, ValueError):
        return False
    return all(health[part]["status"] == "healthy" for part in ("metadatabase", "scheduler", "dag_processor"))


def _require_alive(daemons: list[Daemon]) -> None:
    for daemon in daemons:
        if daemon.process() is None:
            raise PlatformError(daemon.explain(f"{daemon.name} has ended"))


def _logs(daemons: list[Daemon]) -> str:
    return ", ".join(str(daemon.log) for daemon in daemons)


def _airflow() -> str:
    return str(Path(sys.executable).parent / "airflow")
