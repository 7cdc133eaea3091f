"""Airflow's callbacks, called as Airflow calls them: through the provider's hook, to a real HTTP server."""

import json
import logging
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from conf.errors import NotificationError, SettingsError
from jobs.airflow import notifier as dag_notifier
from jobs.airflow.exports import export_run_id
from jobs.airflow.notifier import DAG_SUCCEEDED, RUN_RECONCILED, TASK_FAILED, Discord, FinproDiscordHook
from jobs.airflow.settings import task_settings
from jobs.notify.notices import Notice
from jobs.notify.notifications import deliver
from tests.runs.webhook import TOKEN, Answer, Webhook

BEGIN = datetime(2026, 11, 22, tzinfo=UTC)


@pytest.fixture
def webhook(monkeypatch: pytest.MonkeyPatch) -> Iterator[Webhook]:
    webhook = Webhook()
    with webhook.serving() as url:
        monkeypatch.setenv("FINPRO_DISCORD_WEBHOOK_URL", url)
        yield webhook


def context(**more: Any) -> Any:
    begun = datetime.now(UTC) - timedelta(seconds=75)
    run = SimpleNamespace(dag_id="ingest", run_id="manual__1", run_after=BEGIN, start_date=begun)
    ti = SimpleNamespace(dag_id="ingest", task_id="load", run_id="manual__1", try_number=3, log_url="http://airflow/log")
    return {"dag_run": run, "ti": ti, "exception": ValueError("postgresql://u:hunter2@db/x is down")} | more


def test_a_dag_that_succeeded_is_told_with_its_run_and_time(webhook: Webhook) -> None:
    DAG_SUCCEEDED(context())

    assert webhook.texts == ["ingest succeeded\nrun `manual__1`\nIt took 0:01:15."]
    assert webhook.received[0]["allowed_mentions"] == {"parse": []}


def test_a_task_that_failed_is_told_with_dag_task_run_try_error_and_log(webhook: Webhook) -> None:
    TASK_FAILED(context())

    assert webhook.texts == [
        "ingest.load failed\nrun `manual__1`, try 3\n```\npostgresql://u:***@db/x is down\n```\n[log](http://airflow/log)"
    ]


def test_a_task_that_was_killed_has_no_error_and_is_told_all_the_same(webhook: Webhook) -> None:
    TASK_FAILED(context(exception=None))

    assert "it was killed, or timed out" in webhook.texts[0]


@pytest.mark.parametrize("answer", [Answer(404), Answer(500), Answer(seconds=60)], ids=["refused", "broken", "silent"])
def test_a_webhook_that_is_no_use_fails_nothing_and_is_in_no_log(
    webhook: Webhook, answer: Answer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(dag_notifier, "deliver", partial(deliver, patience_seconds=1))
    webhook.answers, begin = [answer], time.monotonic()
    DAG_SUCCEEDED(context())

    assert time.monotonic() - begin < 3
    assert TOKEN not in caplog.text


def test_without_a_webhook_nothing_is_asked_of_anybody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FINPRO_DISCORD_WEBHOOK_URL", raising=False)
    asked: list[object] = []

    def say(*_: object) -> Notice:
        asked.append(1)
        return Notice("", "")

    Discord(say)(context())
    assert asked == []


def test_consistency_is_told_of_the_run_itself_and_not_of_the_newest_one(
    webhook: Webhook, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str | None] = []

    def told(_: object, run_id: str | None = None) -> Notice:
        asked.append(run_id)
        return Notice("", "")

    monkeypatch.setattr(dag_notifier, "run_consistency", told)
    RUN_RECONCILED(context())
    assert asked == [export_run_id(BEGIN, "manual__1")]


def test_a_notice_that_cannot_be_made_fails_nothing(webhook: Webhook, caplog: pytest.LogCaptureFixture) -> None:
    def say(*_: object) -> Notice:
        raise NotificationError("no run has been reconciled")

    Discord(say)(context())
    RUN_RECONCILED(context())

    assert webhook.received == []


def test_settings_come_from_the_connection_that_a_secrets_backend_gives_before_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FINPRO_GCS_BUCKET", "of-the-environment")
    monkeypatch.setenv("FINPRO_GCP_PROJECT", "of-the-environment")
    extra = {"gcs_bucket": "of-the-connection", "postgres_dsn": "postgresql://u:geheim@db/finpro"}
    monkeypatch.setenv("FINPRO_POSTGRES_DSN", "")  # so that it is put back
    monkeypatch.setenv("AIRFLOW_CONN_FINPRO", json.dumps({"conn_type": "generic", "extra": extra}))
    settings = task_settings()
    assert (settings.gcs_bucket, settings.gcp_project) == ("of-the-connection", "of-the-environment")
    assert settings.get("postgres_dsn") == "postgresql://u:geheim@db/finpro"


@pytest.mark.parametrize(
    ("extra", "said"), [({"gcs_buckets": "x"}, "no setting of finpro's: gcs_buckets"), (["x"], "not a JSON object")]
)
def test_a_connection_that_is_no_use_is_told(monkeypatch: pytest.MonkeyPatch, extra: Any, said: str) -> None:
    monkeypatch.setenv("AIRFLOW_CONN_FINPRO", json.dumps({"conn_type": "generic", "extra": json.dumps(extra)}))
    with pytest.raises(SettingsError, match=said):
        task_settings()


def test_the_connection_is_the_webhook_of_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINPRO_DISCORD_WEBHOOK_URL", "https://discord.com/api/webhooks/12/a-token")
    hook = FinproDiscordHook(http_conn_id="any")
    hook.get_conn()

    assert hook.url_from_endpoint(hook.webhook_endpoint) == "https://discord.com/api/webhooks/12/a-token"
