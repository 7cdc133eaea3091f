"""Fixtures for everyone: a finpro home of the session's own, and on demand the embedded platform in it.

Nothing starts for a test that does not ask for `platform` or `settings`.
"""

import gc
import logging
import os
import re
import shlex
import shutil
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import psycopg2
import pytest
from confluent_kafka.admin import AdminClient
from pydantic import SecretStr

import __main__
import tests
from batch.google_cloud import bigquery_client, storage_client
from batch.postgres import migrate
from conf.settings import CONF_DIR, Settings, finpro_home, variable
from jobs.local.kafka import KafkaBroker
from jobs.local.platform import Platform, down, up
from jobs.local.ports import bypass_proxies
from jobs.local.private_files import exclusive_lock, private_directory
from jobs.spark.submit import environment, spark_submit
from streaming.kafka import ORDER_OUTCOMES, TOPICS, create_topics, existing_topics, librdkafka_config
from tests.oracle.strict_bigquery import StrictBigQuery
from tests.runs.homes import guarded

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

pytest.register_assert_rewrite("tests.runs.screening", "tests.runs.archive")

# How long an example takes says nothing on a busy machine. CI tries the same examples every time; elsewhere they are new.
hypothesis.settings.register_profile(
    "finpro", deadline=None, derandomize="CI" in os.environ, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("finpro")

if not hasattr(__main__, "__file__"):  # as in the processes of pytest-xdist, which PySpark would take for doctests
    __main__.__file__ = tests.__file__

bypass_proxies()  # as the finpro command does
os.environ["AIRFLOW_HOME"] = str(finpro_home() / "airflow-of-tests")  # read, and made, when Airflow is imported


def pytest_collection_finish() -> None:
    """What all tests have imported is no garbage: to look among half a million objects takes 0.4 s, each time."""
    gc.freeze()


def pytest_unconfigure() -> None:
    """Airflow, once imported, logs what everyone tells; py4j tells of its end when the output that it goes to is closed."""
    logging.getLogger("py4j").setLevel(logging.WARNING)


# One Spark for hundreds of small jobs: to compile each of their plans takes longer than to interpret it, and nobody looks up
# how they went. (What runs as a process of its own compiles, as everywhere else.) Its JVM lives long enough for what it does
# most, which is to plan, to be compiled twice: with four times the calls that Java waits for, planning takes half the time.
_COMPILED_TWICE = "-XX:TieredStopAtLevel=4 -XX:CompileThresholdScaling=1"  # what Java is told last counts
_LATER = "-XX:Tier4InvocationThreshold=20000 -XX:Tier4MinInvocationThreshold=4000 -XX:Tier4CompileThreshold=40000"
_DEFAULTS = (CONF_DIR / "spark-defaults.conf").read_text(encoding="utf-8")
(_AS_EVERYWHERE,) = re.findall(r"^spark\.driver\.extraJavaOptions +(.+)$", _DEFAULTS, re.MULTILINE)
_SPARK = [
    f"spark.driver.extraJavaOptions={_AS_EVERYWHERE} {_COMPILED_TWICE} {_LATER}",
    "spark.sql.codegen.wholeStage=false",
    "spark.sql.codegen.factoryMode=NO_CODEGEN",
    "spark.sql.execution.arrow.maxRecordsPerBatch=150",  # so that a task reads several, as with much more data
    "spark.ui.retainedJobs=20",
    "spark.ui.retainedStages=20",
    "spark.sql.ui.retainedExecutions=20",
]


class SessionAlive(Exception):
    """The session that owns a test home is still running."""


def _alive() -> None:
    raise SessionAlive


def _sweep(homes: Path) -> None:
    """Stop and delete what sessions left behind that were killed: their lock is free, their servers may still run."""
    for home in homes.glob("*/"):
        try:
            with exclusive_lock(home / "session.lock", on_wait=_alive), pytest.MonkeyPatch.context() as patch:
                patch.setenv("FINPRO_HOME", str(home))
                down()
                shutil.rmtree(home)
        except SessionAlive:
            continue


@contextmanager
def _own_home(homes: Path, name: str, *others: Path, swept: bool = False) -> Iterator[Path]:
    """A home for one block, once what killed sessions left is `swept`; no other session takes a new home for a left one.

    What runs in it or in the `others` ends with the block, and with this process.
    """
    with ExitStack() as held:
        with exclusive_lock(homes / "lock", on_wait=lambda: None):
            if swept:
                _sweep(homes)
            home = private_directory(homes / f"{name}{os.getpid()}-{uuid.uuid4().hex[:8]}")
            held.enter_context(exclusive_lock(home / "session.lock", on_wait=_alive))
        held.enter_context(guarded(home, *others))
        yield home
        shutil.rmtree(home)


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finpro home for this session: no test sees the developer's platform, `.env` or FINPRO_ variables."""
    homes = private_directory(finpro_home() / "tests")
    with _own_home(homes, "", tmp_path_factory.getbasetemp(), swept=True) as home, pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("FINPRO_") or name.endswith("_EMULATOR_HOST")]:
            patch.delenv(name)
        patch.setitem(Settings.model_config, "env_file", None)
        patch.setenv("FINPRO_HOME", str(home))
        patch.setenv("FINPRO_METRICS_PORT", "0")  # the usual one may be taken, by another session for instance
        yield home


@pytest.fixture(scope="module")
def another_home(home: Path) -> Iterator[Path]:
    """One more home, for tests of the platform itself; its name is one that careless code trips over."""
    with _own_home(home.parent, "a home, with a blank ") as another:
        yield another


@pytest.fixture(scope="session")
def strict_bigquery() -> Iterator[StrictBigQuery]:
    """What this process sends to BigQuery, each statement refused that the real one would refuse."""
    strict = StrictBigQuery()
    with strict.installed():
        yield strict
    assert strict.refused == []  # some libraries keep to themselves what they are told


@pytest.fixture(scope="session")
def platform(home: Path, strict_bigquery: StrictBigQuery) -> Iterator[Platform]:
    """The running embedded platform, stopped at the end of the session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KafkaBroker, "java_options", _compiled_once(home))
        try:
            yield up()
        finally:
            down()


def _compiled_once(home: Path) -> Path:
    """Java's options for a broker that does too little for too many tests to be worth compiling twice."""
    options = home / "kafka-java.options"
    options.write_text(KafkaBroker.java_options.read_text() + "-XX:TieredStopAtLevel=1\n")
    return options


@pytest.fixture(scope="session")
def spark_session(platform: Platform) -> Iterator["SparkSession"]:
    """A Spark in this process, with Delta, that reaches the platform's Cloud Storage: one for all tests, and for their jobs."""
    from pyspark.sql import SparkSession

    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment("tests", master="local[2,4]").items():
            patch.setenv(name, value)
        _, *options, _ = spark_submit("tests", [], master="local[2,4]", memory="1500m", conf=_SPARK, delta=True)
        patch.setenv("PYSPARK_SUBMIT_ARGS", shlex.join([*options, "pyspark-shell"]))
        session = SparkSession.builder.config("spark.sql.shuffle.partitions", 2).getOrCreate()
        yield session
        session.stop()


@pytest.fixture(autouse=True)
def nothing_cached(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a test has had Spark cache goes with it: a session keeps such plans, and looks among them for each new one."""
    yield
    if "spark_session" in request.fixturenames:
        request.getfixturevalue("spark_session").catalog.clearCache()


@contextmanager
def own_warehouse(platform: Platform) -> Iterator[Settings]:
    """Settings for a database with finpro's tables, a bucket and a dataset: of one's own, empty, deleted afterwards."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    _copy_database(platform, _migrated(platform), name)
    own = {"postgres_dsn": SecretStr(platform.postgres.dsn("finpro", name)), "gcs_bucket": name, "bigquery_dataset": name}
    own |= {"bigquery_core_dataset": f"{name}_core", "bigquery_marts_dataset": f"{name}_marts"}
    settings = platform.settings().model_copy(update=own)
    platform.gcs.create_bucket(settings)
    platform.bigquery.create_datasets(settings)
    yield settings
    for dataset in settings.bigquery_datasets:
        bigquery_client(settings).delete_dataset(dataset, delete_contents=True, not_found_ok=True)
    storage_client(settings).bucket(name).delete(force=True)
    platform.postgres.drop_database(name)


@cache
def _migrated(platform: Platform) -> str:
    """An empty database with finpro's tables, to be copied for each test, which would migrate one of its own otherwise."""
    name = "migrated"
    platform.postgres.create_database(name)
    migrate(platform.postgres.dsn("finpro", name))
    return name


def _copy_database(platform: Platform, original: str, name: str) -> None:
    with closing(psycopg2.connect(platform.postgres.dsn("postgres", "postgres"))) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(f"create database {name} template {original} strategy file_copy owner finpro")


@contextmanager
def own_settings(platform: Platform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    """`own_warehouse` with checkpoints and names of topics of one's own; commands that a test starts see these settings too."""
    with own_warehouse(platform) as warehouse:
        own = {name: warehouse.require(name) for name in ("postgres_dsn", "gcs_bucket", "bigquery_dataset")}
        own |= {"topic_prefix": f"{own['gcs_bucket']}_", "checkpoints": str(tmp_path / "checkpoints")}
        own |= {"lakehouse": str(tmp_path / "lakehouse")}
        for name, value in (platform.environment() | {variable(field): value for field, value in own.items()}).items():
            monkeypatch.setenv(name, value)
        yield Settings()


@pytest.fixture
def settings(platform: Platform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    """`own_settings` and their topics."""
    with own_settings(platform, tmp_path, monkeypatch) as settings:
        create_topics(settings, partitions=4)
        yield settings
        _delete_topics(settings)


def _delete_topics(settings: Settings) -> None:
    ours = {settings.topic(topic) for topic in (*TOPICS, ORDER_OUTCOMES)} & existing_topics(settings).keys()
    admin = AdminClient(librdkafka_config(settings))
    for deleted in admin.delete_topics(sorted(ours)).values() if ours else ():
        deleted.result(timeout=20)
