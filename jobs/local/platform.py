"""The embedded platform: a real Kafka, a real Postgres, and emulators of Cloud Storage and BigQuery, under finpro's home.

For one machine, and no installation.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import typer
from dotenv import dotenv_values

from batch.postgres import migrate
from conf.errors import PlatformError
from conf.settings import Settings, embedded_env_file, finpro_home, load_settings, variable
from jobs.local.bigquery import PROJECT, BigQueryEmulator
from jobs.local.class_archive import archiving
from jobs.local.gcs import StorageEmulator
from jobs.local.kafka import KafkaBroker
from jobs.local.ports import is_free, remembered_ports
from jobs.local.postgres import OWNER, PostgresServer
from jobs.local.private_files import exclusive_lock, write_private
from streaming.kafka import create_topics

_START_SECONDS = 90
_STARTS = 3
_PARTITIONS = 4
_BUCKET = _DATASET = "finpro"

Service = KafkaBroker | PostgresServer | StorageEmulator | BigQueryEmulator


@dataclass(frozen=True)
class Platform:
    """The services of one home."""

    kafka: KafkaBroker
    postgres: PostgresServer
    gcs: StorageEmulator
    bigquery: BigQueryEmulator

    @classmethod
    def at(cls, home: Path) -> "Platform":
        """The platform that lives in `home`, running or not."""
        gcs = StorageEmulator(home)
        return cls(KafkaBroker(home), PostgresServer(home), gcs, BigQueryEmulator(home, gcs.objects))

    @property
    def services(self) -> tuple[Service, ...]:
        """In the order in which they start, side by side."""
        return self.bigquery, self.kafka, self.postgres, self.gcs

    def environment(self) -> dict[str, str]:
        """The settings that lead to this platform; they contain a password."""
        return {
            "FINPRO_KAFKA_BOOTSTRAP_SERVERS": self.kafka.address,
            "FINPRO_POSTGRES_DSN": self.postgres.dsn(OWNER, OWNER),
            "FINPRO_GCP_PROJECT": PROJECT,
            "FINPRO_GCS_BUCKET": _BUCKET,
            "FINPRO_BIGQUERY_DATASET": _DATASET,
            "STORAGE_EMULATOR_HOST": self.gcs.url,
            "BIGQUERY_EMULATOR_HOST": self.bigquery.url,
        }

    def outranked(self) -> list[str]:
        """Those of its settings that lead elsewhere, by the environment or `.env`."""
        ours, found = self.environment(), load_settings()
        return [
            variable(field)
            for field in Settings.model_fields
            if found.get(field) != ours.get(variable(field), found.get(field))
        ]

    def settings(self) -> Settings:
        """Settings that lead here whatever the environment says."""
        return Settings(
            kafka_bootstrap_servers=self.kafka.address,
            kafka_security_protocol="PLAINTEXT",
            kafka_sasl_mechanism=None,
            topic_prefix="",
            postgres_dsn=self.postgres.dsn(OWNER, OWNER),
            gcp_project=PROJECT,
            gcs_bucket=_BUCKET,
            bigquery_dataset=_DATASET,
            bigquery_core_dataset=f"{_DATASET}_core",
            bigquery_marts_dataset=f"{_DATASET}_marts",
            bigquery_location=None,
            storage_emulator_host=self.gcs.url,
            bigquery_emulator_host=self.bigquery.url,
        )


def up() -> Platform:
    """Start what does not run, wait until it answers, and bring what it holds up to date. Idempotent.

    Raises:
        PlatformError: something cannot be started; names its log.
    """
    own_home()
    with archiving():
        return start()


def start(on_ready: Callable[[Platform, Service], None] = lambda platform, service: None) -> Platform:
    """`up`, without the archive of Spark's classes.

    Args:
        on_ready: hears of each service as soon as it can be worked with: Postgres is the first, BigQuery the last. By then
            all of them have begun to start.

    Raises:
        PlatformError: something cannot be started; names its log.
    """
    with _the_home() as home:
        platform = Platform.at(home)
        for service in platform.services:
            if service.daemon.process() is None:
                typer.echo(f"Starting {service.daemon.name} …", err=True)
                service.start()
        for service in (platform.postgres, platform.gcs, platform.kafka, platform.bigquery):  # as long as each takes
            _wait(service)
            _bring_up_to_date(service, platform.settings())
            on_ready(platform, service)
        write_private(embedded_env_file(), "".join(f"{name}={value}\n" for name, value in platform.environment().items()))
    return platform


def down() -> list[str]:
    """Stop what runs; returns the names. Data stay. Works when something has died already."""
    with _the_home() as home:
        embedded_env_file().unlink(missing_ok=True)
        return [service.daemon.name for service in Platform.at(home).services if service.stop()]


def environment() -> dict[str, str]:
    """The settings that lead to the embedded platform, as `up` wrote them.

    Raises:
        PlatformError: it is not up.
    """
    path = embedded_env_file()
    if not path.exists():
        raise PlatformError(f"The embedded platform is not up ({path} does not exist): run `finpro up` first.")
    return {name: value for name, value in dotenv_values(path).items() if value is not None}


def own_home() -> Path:
    """finpro's home, made where it is missing.

    Raises:
        PlatformError: it is another user's: what this one starts there, the other could neither read nor stop.
    """
    home = finpro_home()
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    if home.stat().st_uid != os.geteuid():
        raise PlatformError(f"{home} belongs to user id {home.stat().st_uid}: run finpro as that user, or set FINPRO_HOME.")
    return home


@contextmanager
def _the_home() -> Iterator[Path]:
    """finpro's home, with its lock held.

    Raises:
        PlatformError: it is another user's.
    """
    home = own_home()
    with exclusive_lock(home / "lock", on_wait=lambda: typer.echo("Another finpro up or down is at work: waiting …", err=True)):
        yield home


def _wait(service: Service) -> None:
    """Wait for a service; one that lost its port to another program while it was starting gets a new one."""
    for attempt in range(1, _STARTS + 1):
        try:
            service.daemon.wait_until(service.answers, seconds=_START_SECONDS)
            return
        except PlatformError:
            if attempt == _STARTS or not _lost_its_port(service):
                raise
            service.start()


def _bring_up_to_date(service: Service, settings: Settings) -> None:
    """Make what finpro needs of a service and is missing there."""
    match service:
        case PostgresServer():
            service.create_database()
            migrate(settings.require("postgres_dsn"))
        case KafkaBroker():
            create_topics(settings, partitions=_PARTITIONS)
        case StorageEmulator():
            service.create_bucket(settings)
        case BigQueryEmulator():
            service.create_datasets(settings)


def _lost_its_port(service: Service) -> bool:
    ports = remembered_ports(service.daemon.home)
    return service.daemon.process() is None and not all(is_free(ports[name]) for name in service.ports)
