"""What is around a setting's value, and not of it, is dropped or told; what may be of it stays."""

from pathlib import Path

import pytest

from conf.errors import SettingsError
from conf.settings import Settings, embedded_env_file, load_settings, variable

GOOD = {
    "kafka_bootstrap_servers": "kafka:9092",
    "kafka_security_protocol": "SASL_SSL",
    "kafka_sasl_mechanism": "SCRAM-SHA-512",
    "kafka_username": "finpro",
    "topic_prefix": "shop_",
    "postgres_dsn": "postgresql://finpro:geheim@db:5432/finpro",
    "checkpoints": "gs://bucket/checkpoints",
    "lakehouse": "/data/lakehouse",
    "lakehouse_retention_days": "3",
    "gcp_project": "project",
    "gcs_bucket": "bucket",
    "bigquery_dataset": "shop",
    "bigquery_core_dataset": "shop_dbt",
    "bigquery_marts_dataset": "shop_report",
    "bigquery_location": "EU",
    "bigquery_max_bytes_billed": "1099511627776",
    "storage_emulator_host": "http://127.0.0.1:1",
    "bigquery_emulator_host": "http://127.0.0.1:2",
    "schedule_time_zone": "Europe/Berlin",
    "rules": "conf/fraud_rules.toml",
    "ledger_days": "7",
    "metrics_host": "127.0.0.1",
    "metrics_port": "9108",
    "discord_webhook_url": "https://discord.com/api/webhooks/1/geheim",
}
FILE, PASSWORD = "kafka_ssl_ca_location", "kafka_password"


def test_every_setting_is_tried_here() -> None:
    assert {*GOOD, FILE, PASSWORD} == set(Settings.model_fields)


def test_core_and_marts_have_datasets_of_their_own_named_after_that_of_the_raw_tables() -> None:
    assert Settings(bigquery_dataset="shop").bigquery_datasets == ("shop", "shop_core", "shop_marts")
    assert Settings(bigquery_dataset="shop", bigquery_marts_dataset="bi").bigquery_datasets == ("shop", "shop_core", "bi")


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("around", ["{}\n", " {}\r\n", "\t{} "], ids=repr)
def test_white_space_around_a_value_is_dropped(monkeypatch: pytest.MonkeyPatch, name: str, around: str) -> None:
    monkeypatch.setenv(variable(name), around.format(GOOD[name]))

    assert load_settings().require(name) == GOOD[name]


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize(
    ("around", "words"),
    [
        ('"{}"', "still has its quotes"),
        ("'{}'\n", "still has its quotes"),
        ("{} # of the shop", "still has a comment behind it"),
        ("{}\n# of the shop", "still has a comment behind it"),
        (" \n", "is blank"),
    ],
    ids=["double quotes", "single quotes", "comment", "comment in a line of its own", "blank"],
)
def test_quotes_and_comments_around_a_value_are_told_without_the_value(
    monkeypatch: pytest.MonkeyPatch, name: str, around: str, words: str
) -> None:
    monkeypatch.setenv(variable(name), around.format(GOOD[name]))
    if (name, words) == ("topic_prefix", "is blank"):
        assert load_settings().topic_prefix == ""
        return

    with pytest.raises(SettingsError, match=f"{variable(name)}: .*{words}") as caught:
        load_settings()

    assert "geheim" not in str(caught.value)


def test_a_file_that_ends_in_a_newline_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "ca.pem").touch()
    monkeypatch.setenv(variable(FILE), f"{tmp_path}/ca.pem\n")

    assert load_settings().require(FILE) == str(tmp_path / "ca.pem")


@pytest.mark.parametrize("password", ["a # b", '"quoted"', " blank before and after ", "#", "'", "tab\tinside"])
def test_a_password_keeps_all_but_the_line_break_at_its_end(monkeypatch: pytest.MonkeyPatch, password: str) -> None:
    monkeypatch.setenv(variable(PASSWORD), f"{password}\r\n")

    assert load_settings().require(PASSWORD) == password


def test_a_dsn_of_words_may_have_such_a_password_too(monkeypatch: pytest.MonkeyPatch) -> None:
    dsn = r"host=db user=finpro password='it\'s # geheim' dbname=finpro"
    monkeypatch.setenv("FINPRO_POSTGRES_DSN", f"{dsn}\n")

    assert load_settings().require("postgres_dsn") == dsn


@pytest.mark.parametrize(
    ("name", "value"),
    [("topic_prefix", "shop/"), ("topic_prefix", "a b"), ("gcs_bucket", "a b"), ("gcs_bucket", "gs://bucket")],
)
def test_a_name_that_no_service_would_take_is_told_at_once(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(variable(name), value)

    with pytest.raises(SettingsError, match=variable(name)):
        load_settings()


def test_finpro_home_may_end_in_a_newline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FINPRO_HOME", f"{tmp_path}\n")

    assert embedded_env_file() == tmp_path / "env"
