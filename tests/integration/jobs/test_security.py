"""On a Kafka and a Postgres that demand TLS and a login, finpro works, with few rights, and shows its secrets nowhere."""

import json
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import psycopg2
import pytest
from pydantic import SecretStr

from batch.postgres import connect, migrate, open_connection
from batch.reference_data import generate
from conf.errors import KafkaError, PostgresError, PostgresUnavailable, SettingsError
from conf.rules import load_rules
from conf.settings import Settings, load_settings, variable
from jobs.local.platform import Platform
from jobs.local.ports import LOOPBACK
from streaming.kafka import (
    FRAUD_ALERT,
    ORDERS,
    ORDERS_DEAD_LETTER,
    PROCESSED_ORDERS,
    TOPICS,
    OrdersKept,
    create_topics,
    existing_topics,
    librdkafka_config,
    orders_kept,
)
from streaming.shop.producer import produce
from tests.runs import screening as runs
from tests.runs.commands import finpro_process
from tests.runs.exports import make_room_for_spark
from tests.runs.screening import alter_topic
from tests.runs.secured_servers import BROKER_PASSWORD, BROKER_USER, Authority, SecuredBroker, SecuredPostgres
from tests.runs.spark_events import event_log

KAFKA_SECRET, POSTGRES_SECRET = "geheim-kafka-7531", "geheim-postgres-8642"
KAFKA_PASSWORD = f"""{KAFKA_SECRET}"'\\ %;="""  # what is special in a JAAS configuration
POSTGRES_PASSWORD = f"{POSTGRES_SECRET}@/:%?"  # and in a URL
FIRST_ROLES = ("finpro_generate", "finpro_produce", "finpro_screen", "finpro_export", "finpro_reconcile", "finpro_monitor")
ROLES = (*FIRST_ROLES, "finpro_outcomes", "finpro_rules")


@dataclass(frozen=True)
class Secured:
    """The servers; `settings` log in as the owner of the tables, and as who may do all in Kafka."""

    kafka: SecuredBroker
    postgres: SecuredPostgres
    stranger: Authority
    settings: Settings

    def as_user(self, role: str) -> Settings:
        """Settings of the logins that may do only what this role's command does."""
        own = {
            "kafka_sasl_mechanism": "SCRAM-SHA-512",
            "kafka_username": role,
            "kafka_password": SecretStr(KAFKA_PASSWORD),
            "postgres_dsn": SecretStr(self.postgres.secured_dsn(f"user_of_{role}", POSTGRES_PASSWORD)),
        }
        return self.settings.model_copy(update=own)


@pytest.fixture(scope="module")
def secured(another_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("authorities")
    authority, stranger = Authority(folder, "authority"), Authority(folder, "stranger")
    kafka, postgres = SecuredBroker(another_home, authority), SecuredPostgres(another_home, authority)
    try:
        kafka.start()
        postgres.start()
        postgres.daemon.wait_until(postgres.answers, seconds=60)
        postgres.create_database()
        postgres.demand_tls()
        migrate(postgres.owner_dsn())
        for role in ROLES:
            postgres.create_user(f"user_of_{role}", POSTGRES_PASSWORD, role)
        kafka.daemon.wait_until(kafka.answers, seconds=60)
        kafka.create_user("finpro_produce", KAFKA_PASSWORD, reads=[], writes=[ORDERS])
        verdicts = [PROCESSED_ORDERS, FRAUD_ALERT, ORDERS_DEAD_LETTER]
        kafka.create_user("finpro_screen", KAFKA_PASSWORD, reads=[ORDERS], writes=verdicts)
        settings = Settings(
            kafka_bootstrap_servers=kafka.address,
            kafka_security_protocol="SASL_SSL",
            kafka_ssl_ca_location=authority.certificate,
            kafka_sasl_mechanism="PLAIN",
            kafka_username=BROKER_USER,
            kafka_password=SecretStr(BROKER_PASSWORD),
            postgres_dsn=SecretStr(postgres.owner_dsn()),
            checkpoints=str(folder / "checkpoints"),
        )
        create_topics(settings)
        yield Secured(kafka, postgres, stranger, settings)
    finally:
        kafka.stop()
        postgres.stop()


# --- refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "advice"),
    [
        ("kafka_password", "FINPRO_KAFKA_PASSWORD"),
        ("kafka_ssl_ca_location", "FINPRO_KAFKA_SSL_CA_LOCATION"),
        ("kafka_security_protocol", "FINPRO_KAFKA_SECURITY_PROTOCOL"),
    ],
)
def test_kafka_lets_nobody_in_with_a_wrong_setting_and_the_error_names_it(secured: Secured, wrong: str, advice: str) -> None:
    value = {
        "kafka_password": SecretStr("another"),
        "kafka_ssl_ca_location": secured.stranger.certificate,
        "kafka_security_protocol": "PLAINTEXT",
    }[wrong]

    with pytest.raises(KafkaError, match=advice) as caught:
        existing_topics(secured.as_user("finpro_screen").model_copy(update={wrong: value}))

    assert KAFKA_SECRET not in str(caught.value)


def test_a_refused_password_that_still_has_its_quotes_is_told(secured: Secured) -> None:
    quoted = secured.as_user("finpro_screen").model_copy(update={"kafka_password": SecretStr(f"'{KAFKA_PASSWORD}'")})

    with pytest.raises(KafkaError, match="the password has quotes around it") as caught:
        existing_topics(quoted)

    assert KAFKA_SECRET not in str(caught.value)


def test_kafka_lets_in_by_plain_and_by_scram_and_shows_the_topics_that_a_login_may_use(secured: Secured) -> None:
    assert existing_topics(secured.settings).keys() >= set(TOPICS)
    assert existing_topics(secured.as_user("finpro_screen")).keys() == set(TOPICS)
    assert existing_topics(secured.as_user("finpro_produce")).keys() == {ORDERS}


def test_a_login_without_a_mechanism_names_the_setting(secured: Secured) -> None:
    with pytest.raises(SettingsError, match="FINPRO_KAFKA_SASL_MECHANISM is not set"):
        librdkafka_config(secured.settings.model_copy(update={"kafka_sasl_mechanism": None}))


def test_a_file_that_holds_no_authority_is_refused_with_the_reason(tmp_path: Path) -> None:
    empty = tmp_path / "empty.pem"
    empty.touch()
    settings = Settings(kafka_bootstrap_servers=f"{LOOPBACK}:1", kafka_security_protocol="SSL", kafka_ssl_ca_location=empty)

    with pytest.raises(KafkaError, match=r"ssl\.ca\.location failed"):
        existing_topics(settings)


@pytest.mark.parametrize(
    ("name", "value"),
    [("kafka_ssl_ca_location", "/no/such.pem"), ("kafka_security_protocol", "TLS"), ("kafka_sasl_mechanism", "MD5")],
)
def test_a_setting_that_cannot_be_used_names_itself(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(variable(name), value)

    with pytest.raises(SettingsError, match=variable(name)):
        load_settings()


@pytest.mark.parametrize(
    ("right", "wrong", "advice"),
    [
        ("authority.pem", "stranger.pem", "sslrootcert in FINPRO_POSTGRES_DSN must name"),
        ("authority.pem", "missing.pem", "sslrootcert in FINPRO_POSTGRES_DSN must name"),
        (f"@{LOOPBACK}", "@localhost", "the host must be one that it names"),
        ("verify-full", "disable", "add \\?sslmode=verify-full"),
        ("geheim", "another", "refused the user or password: correct FINPRO_POSTGRES_DSN"),
    ],
)
def test_postgres_lets_nobody_in_with_a_wrong_dsn_and_the_error_says_what_is_wrong(
    secured: Secured, right: str, wrong: str, advice: str
) -> None:
    dsn = secured.as_user("finpro_screen").require("postgres_dsn")
    open_connection(dsn).close()

    with pytest.raises(PostgresError, match=advice) as caught:
        open_connection(dsn.replace(right, wrong))

    assert not isinstance(caught.value, PostgresUnavailable), "another try does not help"
    assert POSTGRES_SECRET not in str(caught.value)


def test_a_login_that_may_not_ask_how_orders_are_kept_is_not_kept_from_its_work(secured: Secured) -> None:
    alter_topic(secured.settings, ORDERS, message_timestamp_type="CreateTime")
    try:
        assert orders_kept(secured.settings).dates
        assert orders_kept(secured.as_user("finpro_screen")) == OrdersKept()
    finally:
        alter_topic(secured.settings, ORDERS, message_timestamp_type="LogAppendTime")


# --- least privilege -----------------------------------------------------------------------------------------------------

READS_ORDERS = "select count(*) from raw_orders"
READS_USERS = "select email from raw_users"
ADDS_ORDERS = "insert into raw_orders select * from raw_orders"
ADDS_USERS = "insert into raw_users select * from raw_users"
READS_FINDINGS = "select status from ingestion_monitoring"
FINDS = "insert into ingestion_monitoring select * from ingestion_monitoring"
LEAVES_A_WITNESS = "insert into export_runs select * from export_runs"
KEEPS_DAYS = "update day_profiles set rows = rows"
READS_DELETIONS = "select key from deleted_rows"
FORGETS_DELETIONS = "delete from deleted_rows"
READS_PROMOTIONS = "select why from rules_promotions"
PROMOTES = "insert into rules_promotions select * from rules_promotions"
READS_APPLICATIONS = "select why from rules_applications, rules_application_days"
APPLIES = "insert into rules_applications select * from rules_applications"
READS_WHO_IS_FORGOTTEN = "select user_id from forgotten_users"
READS_OUTCOMES = "select outcome from order_outcomes"
STATES = (
    "insert into order_outcomes (order_id, outcome, reviewed_by, decided_at, source) values ('o', 'fraud', 'a', now(), 'file')"
)
MAY = {
    "finpro_generate": {READS_USERS, ADDS_USERS, READS_WHO_IS_FORGOTTEN},
    "finpro_produce": {READS_USERS},
    "finpro_screen": {READS_ORDERS, ADDS_ORDERS, READS_APPLICATIONS},
    "finpro_export": {
        *(READS_ORDERS, READS_USERS, LEAVES_A_WITNESS, KEEPS_DAYS, READS_DELETIONS, FORGETS_DELETIONS),
        *(READS_WHO_IS_FORGOTTEN, READS_OUTCOMES),
    },
    "finpro_reconcile": {FINDS, READS_FINDINGS, READS_ORDERS, READS_DELETIONS, READS_OUTCOMES},
    "finpro_monitor": {READS_ORDERS, READS_FINDINGS},
    "finpro_outcomes": {READS_ORDERS, READS_OUTCOMES, STATES},
    "finpro_rules": {READS_PROMOTIONS, PROMOTES, READS_APPLICATIONS, APPLIES},
}
NOBODY_MAY = {
    "delete from raw_orders",
    "truncate raw_orders",
    "drop table raw_orders",
    "create table mine ()",
    "insert into schema_migrations values (99, 'mine')",
    "insert into deleted_rows (table_name) values ('raw_orders')",
    "delete from export_runs",
    "update rules_promotions set why = 'another'",
    "update rules_applications set why = 'another'",
    "insert into forgotten_users (user_id) values (1)",
    "update order_outcomes set reason = null",
}


@pytest.mark.parametrize("role", ROLES)
def test_a_role_may_do_its_own_work_and_nobody_elses(secured: Secured, role: str) -> None:
    allowed = set()
    for statement in set().union(*MAY.values(), NOBODY_MAY):
        with connect(secured.as_user(role).require("postgres_dsn")) as connection, connection.cursor() as cursor:
            try:
                cursor.execute(statement)
                allowed.add(statement)
            except psycopg2.errors.InsufficientPrivilege:
                connection.rollback()

    assert allowed == MAY[role]


def test_a_user_who_may_not_create_roles_migrates_and_hears_what_is_missing(secured: Secured) -> None:
    dsn = secured.postgres.owner_dsn()
    roles = ", ".join(FIRST_ROLES)
    with connect(dsn) as connection, connection.cursor() as cursor:
        cursor.execute("delete from schema_migrations where name = '006_roles.sql'")
    superuser = secured.postgres.dsn("postgres", "finpro")
    with connect(superuser) as connection, connection.cursor() as cursor:
        cursor.execute("alter role finpro nocreaterole; alter role finpro_screen rename to hidden")
    try:
        warnings: list[str] = []
        assert migrate(dsn, on_warning=warnings.append) == ["006_roles.sql"]
        assert len(warnings) == 1
        assert roles.replace(", finpro_monitor", " and finpro_monitor") in warnings[0]
        assert "conf/migrations/006_roles.sql" in warnings[0]
    finally:
        with connect(superuser) as connection, connection.cursor() as cursor:
            cursor.execute("alter role finpro createrole; alter role hidden rename to finpro_screen")


# --- the jobs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
    return port


@pytest.fixture
def watched() -> Iterator[set[str]]:
    """The command lines of all processes that this machine ran meanwhile."""
    seen: set[str] = set()
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.2):
            for process in psutil.process_iter(["cmdline"]):
                seen.add(" ".join(process.info["cmdline"] or ()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    yield seen
    over.set()
    watcher.join()


@contextmanager
def environment_of(settings: Settings) -> Iterator[None]:
    """Commands started inside see these settings."""
    with pytest.MonkeyPatch.context() as patch:
        for name in Settings.model_fields:
            value = settings.get(name)
            if value is not None:
                patch.setenv(variable(name), value)
        yield


def shown_by_the_ui(port: int) -> str:
    """The pages and the answers of a driver's UI that tell of settings, plans and queries."""
    api = f"http://{LOOPBACK}:{port}/api/v1/applications"
    application = json.loads(page(api))[0]["id"]
    executions = json.loads(page(f"{api}/{application}/sql?length=100"))
    paths = ["environment/", "jobs/", "stages/", "storage/", "SQL/", "StreamingQuery/"]
    paths += [f"SQL/execution/?id={one['id']}" for one in executions[-3:]]
    paths += [f"api/v1/applications/{application}/{part}" for part in ("environment", "jobs", "stages", "sql?details=true")]
    assert executions
    return "".join(page(f"http://{LOOPBACK}:{port}/{path}") for path in paths)


def page(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as answer:  # noqa: S310
        text: str = answer.read().decode()
    return text


def files_below(*folders: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}


def assert_secret(*places: Any) -> None:
    for place in places:
        for secret in (KAFKA_SECRET, POSTGRES_SECRET):
            assert secret not in str(place)


@pytest.mark.timeout(300)
def test_orders_are_produced_and_screened_over_tls_with_few_rights_and_no_secret_shows(
    secured: Secured, home: Path, tmp_path: Path, unused_port: int, watched: set[str]
) -> None:
    generate(secured.settings.require("postgres_dsn"), user_count=200, product_count=50, seed=1)
    produced = produce(secured.as_user("finpro_produce"), orders=800, rate=0, seed=3, bursts=0.3)
    events = tmp_path / "events"
    options = [*event_log(events), "--conf", "spark.ui.enabled=true", "--conf", f"spark.ui.port={unused_port}"]
    with environment_of(secured.as_user("finpro_screen")):
        process = runs.start_screen(*options)
        try:
            wait_until_stored(secured.settings, produced.orders, process)
            seen = shown_by_the_ui(unused_port)
            process.send_signal(signal.SIGTERM)
            said, _ = process.communicate(timeout=60)
        finally:
            if process.poll() is None:
                runs.kill_group(process)

    assert process.returncode == 0, said
    runs.assert_agrees(runs.outcome(secured.settings), runs.judged(secured.settings, load_rules(secured.settings.rules)))
    written = files_below(events, home / "logs", Path(secured.settings.checkpoints))
    assert any(b"SparkListenerSQLExecutionStart" in content for content in written.values())
    assert any("finpro screen_orders" in line for line in watched)
    assert_secret(said, seen, watched, written)


@pytest.mark.usefixtures("spark_session")
def test_a_login_that_may_not_announce_is_told_which_right_it_lacks(secured: Secured, tmp_path: Path) -> None:
    secured.kafka.create_user("reads_only", KAFKA_PASSWORD, reads=[ORDERS], writes=[])
    generate(secured.settings.require("postgres_dsn"), user_count=200, product_count=50, seed=1)
    produce(secured.as_user("finpro_produce"), orders=10, rate=0, seed=4)
    own = {"kafka_username": "reads_only", "checkpoints": str(tmp_path)}
    with environment_of(secured.as_user("finpro_screen").model_copy(update=own)):
        started = time.monotonic()
        refused = runs.run_screen("--available-now")
    assert refused.returncode == 3, refused.stderr
    assert "fraud_alert, orders_dead_letter, processed_orders, or the login reads_only has no right on it" in refused.stderr
    assert "Write on the others" in refused.stderr
    assert time.monotonic() - started < 30


@pytest.mark.timeout(300)
def test_an_export_reads_over_tls_with_few_rights_and_no_secret_shows(
    secured: Secured, platform: Platform, home: Path, tmp_path: Path, watched: set[str]
) -> None:
    generate(secured.settings.require("postgres_dsn"), user_count=200, product_count=50, seed=1)
    make_room_for_spark(secured.settings)
    events = tmp_path / "events"
    cloud = {name: platform.settings().get(name) for name in ("gcp_project", "gcs_bucket", "storage_emulator_host")}
    with environment_of(secured.as_user("finpro_export").model_copy(update=cloud)):
        done = finpro_process("export", *event_log(events))

    assert done.returncode == 0, done.stderr
    assert "raw_users: 200 of 200 rows" in done.stdout
    assert any("finpro export_raw" in line for line in watched)
    assert any(path.is_relative_to(events) for path in files_below(events))
    assert_secret(done.stdout, done.stderr, watched, files_below(events, home / "logs"))


def wait_until_stored(settings: Settings, orders: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    stored = 0
    while stored < orders:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"{stored} of {orders} orders stored"
        time.sleep(0.5)
        with connect(settings.require("postgres_dsn")) as connection, connection.cursor() as cursor:
            cursor.execute(READS_ORDERS)
            ((stored,),) = cursor.fetchall()
