"""Every setting of finpro, typed, from the environment, `.env`, or the embedded platform that `finpro up` started."""

import os
import re
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from dotenv import dotenv_values
from pydantic import Field, FilePath, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from conf.errors import SettingsError, up_command

CONF_DIR = Path(__file__).resolve().parent


def project_root() -> Path:
    """The checkout finpro runs from, or the current directory where it is installed as a package."""
    root = CONF_DIR.parent
    return root if (root / "pyproject.toml").exists() else Path.cwd()


def finpro_home() -> Path:
    """Where the embedded platform, checkpoints and logs live: `FINPRO_HOME`, else `.finpro/` in the checkout."""
    return Path(os.environ.get("FINPRO_HOME", "").strip() or project_root() / ".finpro").absolute()


def embedded_env_file() -> Path:
    """The settings of the running embedded platform: written by `finpro up`, removed by `finpro down`."""
    return finpro_home() / "env"


DATASETS = ("bigquery_dataset", "bigquery_core_dataset", "bigquery_marts_dataset")
_GOOGLE_CLOUD = ("gcp_project", "gcs_bucket", *DATASETS, "storage_emulator_host", "bigquery_emulator_host")


class _EmbeddedPlatform(PydanticBaseSettingsSource):
    """The lowest-ranking source: what `finpro up` wrote."""

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        return None, field_name, False

    def __call__(self) -> dict[str, Any]:
        path = embedded_env_file()
        if not path.exists():
            return {}
        known = {variable(name): name for name in self.settings_cls.model_fields}
        found = {known[key]: value for key, value in dotenv_values(path).items() if key in known and value is not None}
        # A project or bucket named elsewhere is not in the emulators: what leads to those goes together.
        elsewhere = {
            name for name in ("gcp_project", "gcs_bucket") if self.current_state.get(name) not in (None, found.get(name))
        }
        return {name: value for name, value in found.items() if not elsewhere or name not in _GOOGLE_CLOUD}


class Settings(BaseSettings):
    """One field a setting: `kafka_bootstrap_servers` is `FINPRO_KAFKA_BOOTSTRAP_SERVERS`, and so on."""

    model_config = SettingsConfigDict(
        env_prefix="FINPRO_",
        env_file=".env",
        extra="ignore",
        env_ignore_empty=True,
        frozen=True,
        hide_input_in_errors=True,
        validate_by_name=True,
        validate_by_alias=True,
    )

    kafka_bootstrap_servers: str | None = Field(None, description="Kafka brokers, host:port[,host:port]")
    kafka_security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        "PLAINTEXT", description="how to talk to the brokers"
    )
    kafka_ssl_ca_location: FilePath | None = Field(
        None, description="PEM file of the authorities that the brokers' certificates come from; by default the system's"
    )
    kafka_sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] | None = Field(
        None, description="PLAIN, SCRAM-SHA-256 or SCRAM-SHA-512"
    )
    kafka_username: str | None = Field(None, description="SASL user")
    kafka_password: SecretStr | None = Field(None, description="SASL password")
    topic_prefix: str = Field("", description="put before every topic name, to share a broker")
    postgres_dsn: SecretStr | None = Field(None, description="postgresql://user:password@host:port/database")
    checkpoints: str = Field(
        default_factory=lambda: str(finpro_home() / "checkpoints"), description="where streaming queries keep their state"
    )
    lakehouse: str = Field(
        default_factory=lambda: str(finpro_home() / "lakehouse"), description="where the Delta tables lie: a path or gs://"
    )
    lakehouse_retention_days: int = Field(
        7, ge=0, le=30, description="how long files that a Delta table no longer needs are kept: as far back one can look"
    )
    gcp_project: str | None = Field(None, description="Google Cloud project of the bucket and the dataset")
    gcs_bucket: str | None = Field(None, description="bucket for the exported files")
    bigquery_dataset: str = Field("finpro", description="dataset of the raw tables")
    bigquery_core_dataset: str = Field(
        default_factory=lambda given: f"{given['bigquery_dataset']}_core",
        description="dataset of dimensions, fact and history; by default that of the raw tables, with _core behind it",
    )
    bigquery_marts_dataset: str = Field(
        default_factory=lambda given: f"{given['bigquery_dataset']}_marts",
        description="dataset of the marts; by default that of the raw tables, with _marts behind it",
    )
    bigquery_location: str | None = Field(
        None, description="where the dataset lives, such as EU; by default BigQuery finds out"
    )
    bigquery_max_bytes_billed: int | None = Field(
        None,
        ge=1,
        description="the most bytes that one statement may be charged for: a larger one is refused, and costs nothing",
    )
    # Google's own names: its libraries and tools obey them as well.
    storage_emulator_host: str | None = Field(
        None, validation_alias="STORAGE_EMULATOR_HOST", description="URL of a Cloud Storage emulator"
    )
    bigquery_emulator_host: str | None = Field(
        None, validation_alias="BIGQUERY_EMULATOR_HOST", description="URL of a BigQuery emulator"
    )
    schedule_time_zone: str = Field("Asia/Jakarta", description="time zone of Airflow's schedules: that of the fraud rules")
    rules: Path = Field(CONF_DIR / "fraud_rules.toml", description="the fraud rules file")
    ledger_days: int = Field(30, ge=1, description="how many days the ledger of screening is kept")
    metrics_host: str = Field("127.0.0.1", description="address at which a streaming job serves its metrics")
    metrics_port: int | None = Field(
        None, ge=0, le=65535, description="port of a streaming job's metrics; 0 is any free one; each job has a default"
    )
    discord_webhook_url: SecretStr | None = Field(None, description="webhook of the Discord channel that hears of runs")

    @field_validator("*", mode="before")
    @classmethod
    def _without_wrapping(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, SecretStr):
            value = value.get_secret_value()
        return _unwrapped(value, info.field_name or "") if isinstance(value, str) else value

    @field_validator("topic_prefix")
    @classmethod
    def _part_of_a_topic(cls, value: str) -> str:
        if not re.fullmatch(r"[a-zA-Z0-9._-]*", value):
            raise ValueError("Kafka's topics have letters, digits, dots, underscores and hyphens only")
        return value

    @field_validator("schedule_time_zone")
    @classmethod
    def _a_time_zone(cls, value: str) -> str:
        try:
            ZoneInfo(value)
        except (ZoneInfoNotFoundError, ValueError):
            raise ValueError("there is no such time zone: write Asia/Jakarta or Europe/Berlin, for example") from None
        return value

    @field_validator("gcs_bucket")
    @classmethod
    def _a_buckets_name(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[a-z0-9]([a-z0-9._-]*[a-z0-9])?", value):
            raise ValueError("a bucket's name has small letters, digits, dots, underscores and hyphens only")
        return value

    @field_validator("discord_webhook_url")
    @classmethod
    def _encrypted_on_its_way(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            url = urlsplit(value.get_secret_value())
            if not url.hostname or not (url.scheme == "https" or (url.scheme == "http" and _is_loopback(url.hostname))):
                raise ValueError("must be an https:// URL; http:// only to this machine itself")
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, dotenv_settings, _EmbeddedPlatform(settings_cls)

    @property
    def bigquery_datasets(self) -> tuple[str, str, str]:
        """The datasets of the warehouse: of the raw tables, of the core, of the marts."""
        return self.bigquery_dataset, self.bigquery_core_dataset, self.bigquery_marts_dataset

    def get(self, name: str) -> str | None:
        """The value of a setting as text, or None; secrets come as plain text."""
        value = getattr(self, name)
        if value is None:
            return None
        return value.get_secret_value() if isinstance(value, SecretStr) else str(value)

    def require(self, name: str) -> str:
        """The value of a setting that this command cannot do without; secrets come as plain text.

        Raises:
            SettingsError: it is not set; the message says where it was looked for and how to set it.
        """
        value = self.get(name)
        if value is None:
            raise SettingsError(_missing(name))
        return value

    def topic(self, name: str) -> str:
        """The full name of one of finpro's topics."""
        return self.topic_prefix + name


def _unwrapped(value: str, name: str) -> str:
    """A value without what files and Kubernetes secrets put around it: white space. Quotes and comments cannot be dropped.

    A password may have blanks, quotes and `#` of its own: of that one only line breaks at the end go.

    Raises:
        ValueError: quotes or a comment are around it, or a line break is in it.
    """
    if name == "kafka_password":
        return value.rstrip("\r\n")
    value = value.strip()
    if not value and name != "topic_prefix":
        raise ValueError("is blank: give it a value, or unset it")
    if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
        raise ValueError("the value still has its quotes: write it without them")
    is_conninfo = name == "postgres_dsn" and not value.startswith("postgres")  # host=… password='a # b'
    if re.search(r"\s#", value) and not is_conninfo:
        raise ValueError("the value still has a comment behind it: write it without one")
    if re.search(r"[\r\n]", value):
        raise ValueError("the value has a line break in it")
    return value


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def variable(name: str) -> str:
    """The environment variable of a setting."""
    alias = Settings.model_fields[name].validation_alias
    return alias if isinstance(alias, str) else f"FINPRO_{name.upper()}"


def _variable_of(place: int | str) -> str:
    """The environment variable of what pydantic names by its field or by its alias."""
    name = str(place)
    return variable(name.lower()) if name.lower() in Settings.model_fields else name


def _missing(name: str) -> str:
    dotenv, embedded = Path(".env").absolute(), embedded_env_file()
    looked = [
        "the environment (not set)",
        f"{dotenv} ({'not in it' if dotenv.exists() else 'no such file'})",
        f"{embedded} ({'not in it' if embedded.exists() else 'the embedded platform is not up'})",
    ]
    description = Settings.model_fields[name].description
    return (
        f"{variable(name)} is not set ({description}).\n"
        f"Looked in: {'; '.join(looked)}.\n"
        f"Run `{up_command()}` for the embedded platform, or set it: export {variable(name)}=…"
    )


def load_settings() -> Settings:
    """Read the settings.

    Raises:
        SettingsError: a value cannot be used; names the variable, never prints the value.
    """
    try:
        return Settings()
    except ValidationError as error:
        problems = "\n".join(f"  {_variable_of(e['loc'][0])}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors())
        raise SettingsError(f"Settings that cannot be used:\n{problems}") from error
