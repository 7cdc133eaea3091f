"""Fixtures for everyone: a finpro home of the session's own, and on demand a real Kafka and Postgres in it.

Nothing starts for a test that does not ask for `platform` or `settings`.
"""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import hypothesis
import pytest
from confluent_kafka.admin import AdminClient

from batch.postgres import migrate
from conf.settings import Settings, finpro_home
from jobs.local.platform import Platform, down, up
from jobs.local.private_files import exclusive_lock, private_directory
from streaming.kafka import TOPICS, create_topics, existing_topics, librdkafka_config

pytest.register_assert_rewrite("tests.screening_runs")

# How long an example takes says nothing on a busy machine. CI tries the same examples every time; elsewhere they are new.
hypothesis.settings.register_profile(
    "finpro", deadline=None, derandomize="CI" in os.environ, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("finpro")


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
def _own_home(homes: Path, name: str) -> Iterator[Path]:
    home = private_directory(homes / f"{name}{os.getpid()}-{uuid.uuid4().hex[:8]}")
    with exclusive_lock(home / "session.lock", on_wait=_alive):
        yield home
        shutil.rmtree(home)


@pytest.fixture(scope="session", autouse=True)
def home() -> Iterator[Path]:
    """A finpro home for this session: no test sees the developer's platform, `.env` or FINPRO_ variables."""
    homes = private_directory(finpro_home() / "tests")
    _sweep(homes)
    with _own_home(homes, "") as home, pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("FINPRO_")]:
            patch.delenv(name)
        patch.setitem(Settings.model_config, "env_file", None)
        patch.setenv("FINPRO_HOME", str(home))
        yield home


@pytest.fixture(scope="module")
def another_home(home: Path) -> Iterator[Path]:
    """One more home, for tests of the platform itself; its name is one that careless code trips over."""
    with _own_home(home.parent, "a home, with a blank ") as another:
        yield another


@pytest.fixture(scope="session")
def platform(home: Path) -> Iterator[Platform]:
    """A running embedded Kafka and Postgres, stopped at the end of the session."""
    try:
        yield up()
    finally:
        down()


@pytest.fixture
def settings(platform: Platform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    """Settings for a database and topics of this test's own, empty and up to date; commands it starts see them as well."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    platform.postgres.create_database(name)
    values = {
        "FINPRO_KAFKA_BOOTSTRAP_SERVERS": platform.kafka.address,
        "FINPRO_TOPIC_PREFIX": f"{name}_",
        "FINPRO_POSTGRES_DSN": platform.postgres.dsn("finpro", name),
        "FINPRO_CHECKPOINTS": str(tmp_path / "checkpoints"),
    }
    for variable, value in values.items():
        monkeypatch.setenv(variable, value)
    settings = Settings()
    migrate(settings.require("postgres_dsn"))
    create_topics(settings, partitions=4)
    yield settings
    _delete_topics(settings)
    platform.postgres.drop_database(name)


def _delete_topics(settings: Settings) -> None:
    ours = {settings.topic(topic) for topic in TOPICS} & existing_topics(settings)
    admin = AdminClient(librdkafka_config(settings))
    for deleted in admin.delete_topics(sorted(ours)).values() if ours else ():
        deleted.result(timeout=20)
