"""Where the contestants meet: an embedded platform of the benchmark's own, and on it a fresh place for every run."""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from confluent_kafka import Consumer, TopicPartition
from pydantic import SecretStr

from batch.postgres import connect, migrate, open_connection
from conf.settings import Settings, finpro_home
from jobs.local.platform import Platform, down, up
from jobs.local.postgres import OWNER, SUPERUSER
from jobs.local.private_files import exclusive_lock, private_directory
from streaming.kafka import create_topics, librdkafka_config

PARTITIONS = 4
RULES = Path(__file__).with_name("rules.toml")


@dataclass(frozen=True)
class Stage:
    """One run's place: a database and a folder of its own; topics may be shared, so that all read the same backlog."""

    settings: Settings
    folder: Path

    @property
    def checkpoints(self) -> Path:
        """Where the run's streaming query keeps its record."""
        return Path(self.settings.checkpoints)

    @property
    def log(self) -> Path:
        """What the run printed."""
        return self.folder / "output.log"

    @property
    def environment(self) -> dict[str, str]:
        """What leads a command here, whatever the surroundings say."""
        return {
            "FINPRO_KAFKA_BOOTSTRAP_SERVERS": self.settings.require("kafka_bootstrap_servers"),
            "FINPRO_KAFKA_SECURITY_PROTOCOL": self.settings.kafka_security_protocol,
            "FINPRO_POSTGRES_DSN": self.settings.require("postgres_dsn"),
            "FINPRO_TOPIC_PREFIX": self.settings.topic_prefix,
            "FINPRO_CHECKPOINTS": self.settings.checkpoints,
            "FINPRO_RULES": str(self.settings.rules),
        }

    def stored(self) -> dict[str, int]:
        """The orders in `raw_orders`, and the frauds among them."""
        with connect(self.settings.require("postgres_dsn")) as connection, connection.cursor() as cursor:
            cursor.execute("select count(*), count(*) filter (where status = 'Fraud') from raw_orders")
            return dict(zip(("orders", "frauds"), cursor.fetchone() or (), strict=True))

    def messages(self, name: str) -> int:
        """How many messages the topic has got so far."""
        topic = self.settings.topic(name)
        with closing(Consumer(librdkafka_config(self.settings) | {"group.id": "benchmark"})) as consumer:
            partitions = consumer.list_topics(topic, timeout=10).topics[topic].partitions
            return sum(consumer.get_watermark_offsets(TopicPartition(topic, number), timeout=10)[1] for number in partitions)


class Arena:
    """A running platform that is nobody else's."""

    def __init__(self, platform: Platform) -> None:
        self._platform, self.runs = platform, 0

    @contextmanager
    def stage(self, prefix: str) -> Iterator[Stage]:
        """A fresh database and folder, and topics with this prefix. The database goes when the run is over."""
        self.runs += 1
        database = f"run_{self.runs}"
        folder = private_directory(finpro_home() / "runs" / database)
        self._platform.postgres.create_database(database)
        fresh = {
            "postgres_dsn": SecretStr(self._platform.postgres.dsn(OWNER, database)),
            "topic_prefix": prefix,
            "checkpoints": str(folder / "checkpoints"),
            "rules": RULES,
        }
        settings = self._platform.settings().model_copy(update=fresh)
        migrate(settings.require("postgres_dsn"))
        create_topics(settings, partitions=PARTITIONS)
        self._write_out()
        try:
            yield Stage(settings, folder)
        finally:
            self._platform.postgres.drop_database(database)

    def _write_out(self) -> None:
        """Let Postgres write out what the last run left in memory: no run pays for the one before."""
        with closing(open_connection(self._platform.postgres.dsn(SUPERUSER, SUPERUSER))) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute("checkpoint")


@contextmanager
def arena() -> Iterator[Arena]:
    """An arena for one block, in a home of its own below finpro's. After a failure its logs stay until the next one."""
    home = finpro_home() / "benchmark"
    private_directory(home.parent)
    waiting = partial(print, "Another benchmark is running: waiting for it …", file=sys.stderr)
    with exclusive_lock(home.with_name("benchmark.lock"), on_wait=waiting), _finpro_home(home):
        _demolish(home)
        try:
            yield Arena(up())
        except BaseException:
            down()
            raise
        _demolish(home)


@contextmanager
def _finpro_home(home: Path) -> Iterator[None]:
    before = os.environ.get("FINPRO_HOME")
    os.environ["FINPRO_HOME"] = str(home)
    try:
        yield
    finally:
        os.environ.pop("FINPRO_HOME")
        if before is not None:
            os.environ["FINPRO_HOME"] = before


def _demolish(home: Path) -> None:
    """Stop what runs in a home, and delete it: a benchmark that was killed leaves both."""
    down()
    shutil.rmtree(home, ignore_errors=True)
