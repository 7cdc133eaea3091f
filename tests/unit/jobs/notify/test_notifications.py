"""What people are told, and that it reaches Discord: a real HTTP server answers well, badly, late or not at all."""

import logging
import os
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from pydantic import SecretStr

from batch.warehouse.monitoring import Finding, FraudHour
from conf.errors import NotificationError, PostgresError, SettingsError
from conf.settings import Settings, load_settings
from jobs.notify.notices import Notice, command_ended, consistency, digest, scrubbed, task_failed
from jobs.notify.notifications import announced, payload, send, send_aside
from tests.runs.webhook import TOKEN, Answer, Webhook

HELLO = Notice("hello", "world")


def settings_for(url: str) -> Settings:
    return Settings(discord_webhook_url=SecretStr(url))


def limited(seconds: float, **headers: str) -> Answer:
    return Answer(429, headers, f'{{"message": "You are being rate limited.", "retry_after": {seconds}, "global": false}}')


def test_a_notice_arrives_as_one_embed_that_mentions_nobody() -> None:
    webhook = Webhook()
    with webhook.serving() as url:
        send(settings_for(url), Notice("@everyone", "look here @here <@1> <@&2>", 0x2E7D32))

    (message,) = webhook.received
    assert message["embeds"] == [{"title": "@everyone", "description": "look here @here <@1> <@&2>", "color": 0x2E7D32}]
    assert message["allowed_mentions"] == {"parse": []}
    assert not message.get("content")


@pytest.mark.parametrize("answer", [limited(0.6), limited(9, **{"Retry-After": "1"})], ids=["in the body", "in the header"])
def test_a_429_is_waited_out_for_as_long_as_it_says(answer: Answer) -> None:
    webhook = Webhook(answer, Answer())
    with webhook.serving() as url:
        send(settings_for(url), HELLO)

    asked = float(answer.headers.get("Retry-After", 0.6))
    assert len(webhook.received) == 2
    assert asked <= webhook.times[1] - webhook.times[0] < asked + 1


def test_a_429_that_asks_for_more_than_the_patience_is_given_up_at_once() -> None:
    webhook, begin = Webhook(limited(3600)), time.monotonic()
    with webhook.serving() as url, pytest.raises(NotificationError, match=r"takes no more for now \(429\)"):
        send(settings_for(url), HELLO, patience_seconds=5)

    assert len(webhook.received) == 1
    assert time.monotonic() - begin < 2


@pytest.mark.parametrize("asked", ["-1", "nan", "inf", "soon"])
def test_a_429_with_nonsense_for_a_pause_is_tried_again_soon(asked: str) -> None:
    webhook = Webhook(limited(0, **{"Retry-After": asked}), Answer())
    with webhook.serving() as url:
        send(settings_for(url), HELLO, patience_seconds=10)

    assert len(webhook.received) == 2


def test_a_500_is_tried_again_until_it_is_taken() -> None:
    webhook = Webhook(Answer(500, body="<html>oops</html>"), Answer(502), Answer(204, body=""))
    with webhook.serving() as url:
        send(settings_for(url), HELLO)

    assert len(webhook.received) == 3


def test_a_webhook_that_is_gone_is_not_asked_twice() -> None:
    webhook = Webhook(Answer(404, body='{"message": "Unknown Webhook", "code": 10015}'))
    with webhook.serving() as url, pytest.raises(NotificationError, match=r"\(404\).*FINPRO_DISCORD_WEBHOOK_URL"):
        send(settings_for(url), HELLO)

    assert len(webhook.received) == 1


@pytest.mark.parametrize("slow", [Answer(seconds=60), Answer(seconds_a_byte=2)], ids=["silent", "byte by byte"])
def test_a_slow_webhook_costs_the_patience_and_gets_the_message_once(slow: Answer) -> None:
    webhook, begin = Webhook(slow), time.monotonic()
    with webhook.serving() as url, pytest.raises(NotificationError, match="within 1 s"):
        send(settings_for(url), HELLO, patience_seconds=1)
    waited = time.monotonic() - begin

    assert waited < 2
    assert len(webhook.received) == 1


def test_where_nobody_listens_the_attempt_ends_within_the_patience() -> None:
    begin = time.monotonic()
    with Webhook().serving() as url:
        pass
    with pytest.raises(NotificationError, match="cannot be reached"):
        send(settings_for(url), HELLO, patience_seconds=1)

    assert time.monotonic() - begin < 3


@pytest.mark.parametrize("answer", [Answer(), Answer(500), Answer(404), limited(0), Answer(seconds=60), None])
def test_the_webhook_is_in_no_log_and_no_error(answer: Answer | None, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    webhook, failure = Webhook(answer or Answer()), ""
    with webhook.serving() as url:
        if answer:
            failure = outcome(url)
    if not answer:
        failure = outcome(url)

    assert TOKEN not in caplog.text + failure


def outcome(url: str) -> str:
    """The whole stack trace of a failed attempt, with every cause."""
    code = "import logging, sys; logging.basicConfig(level=0)\nfrom tests.unit.jobs.notify.test_notifications import *\n"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINPRO_DISCORD_WEBHOOK_URL", url)
        done = subprocess.run(
            [sys.executable, "-c", f"{code}send(load_settings(), HELLO, patience_seconds=1)"], capture_output=True, text=True
        )
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    "url",
    [
        "http://discord.com/api/webhooks/1/x",
        "http://192.168.1.7/x",
        "discord.com/api/webhooks/1/x",
        "ftp://127.0.0.1/x",
        "https:///x",
    ],
)
def test_a_webhook_that_is_neither_https_nor_on_this_machine_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINPRO_DISCORD_WEBHOOK_URL", url)
    with pytest.raises(SettingsError, match=r"FINPRO_DISCORD_WEBHOOK_URL: .*https://") as refused:
        load_settings()

    assert url not in str(refused.value)


@pytest.mark.parametrize(
    "url", ["https://discord.com/api/webhooks/1/x", "http://127.0.0.1:1/x", "http://localhost/x", "http://[::1]/x"]
)
def test_https_and_this_machine_are_fine(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINPRO_DISCORD_WEBHOOK_URL", url)

    assert load_settings().get("discord_webhook_url") == url
    assert url not in repr(load_settings())


def test_a_notice_sent_aside_arrives_after_the_process_that_sent_it_has_ended(
    monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    webhook = Webhook(limited(0.5), Answer())
    code = "from tests.unit.jobs.notify.test_notifications import *; send_aside(load_settings(), HELLO)"
    with webhook.serving() as url:
        monkeypatch.setenv("FINPRO_DISCORD_WEBHOOK_URL", url)
        subprocess.run([sys.executable, "-c", code], check=True)
        webhook.wait_for(2)
        log = wait_for_log(home, "sent: hello")

    assert webhook.texts == ["hello\nworld"] * 2
    assert TOKEN not in log


def wait_for_log(home: Path, text: str) -> str:
    deadline = time.monotonic() + 20
    while text not in (log := Path(home, "logs", "notifications.log").read_text()):
        assert time.monotonic() < deadline, log
        time.sleep(0.05)
    return log


def test_a_silent_webhook_does_not_delay_who_sends_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    webhook = Webhook(Answer(seconds=60))
    with webhook.serving() as url:
        monkeypatch.setenv("FINPRO_DISCORD_WEBHOOK_URL", url)
        begin = time.monotonic()
        send_aside(load_settings(), HELLO)
        assert time.monotonic() - begin < 1
        webhook.wait_for(1)


def test_a_command_that_fails_tells_why_and_fails_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    webhook = Webhook()
    with webhook.serving() as url:
        monkeypatch.setenv("FINPRO_DISCORD_WEBHOOK_URL", url)
        with pytest.raises(PostgresError, match="it is down"), announced(load_settings(), "reconcile", wanted=True):
            raise PostgresError("it is down")
        webhook.wait_for(1)

    assert webhook.texts == ["finpro reconcile failed\n```\nit is down\n```"]


def test_a_command_asked_to_notify_without_a_webhook_says_so_before_it_begins() -> None:
    with (
        pytest.raises(SettingsError, match="FINPRO_DISCORD_WEBHOOK_URL is not set"),
        announced(Settings(), "validate", wanted=True),
    ):
        pytest.fail("it began")


def test_a_machine_that_can_start_no_process_loses_the_notice_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", os.devnull)

    send_aside(settings_for("http://127.0.0.1:1/x"), HELLO)


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://finpro:hunter2secret@db:5432/finpro refused",
        "POST https://discord.com/api/webhooks/12/hunter2secret failed",
        'kafka.sasl.jaas.config: ScramLoginModule required username=u password="hunter2secret";',
        "{'api_key': 'hunter2secret', 'a': 1}",
        "FINPRO_KAFKA_PASSWORD=hunter2secret",
        "Authorization: Bearer hunter2secret",
        "access token: hunter2secret",
        "-----BEGIN PRIVATE KEY-----\nhunter2secret\n-----END PRIVATE KEY-----",
        "-----BEGIN RSA PRIVATE KEY-----\nhunter2secret",
    ],
)
def test_what_looks_like_a_secret_is_not_told(text: str) -> None:
    assert "hunter2secret" not in scrubbed(text)


def test_the_secrets_of_the_settings_are_not_told_wherever_they_stand() -> None:
    settings = Settings(kafka_password=SecretStr("correct horse"), postgres_dsn=SecretStr("postgresql://u:battery-staple@h/d"))

    assert scrubbed("login correct horse, then battery-staple", settings) == "login ***, then ***"


def test_advice_about_passwords_is_told_as_it_is() -> None:
    text = "Postgres at db:5432/finpro: Postgres refused the user or password: correct FINPRO_POSTGRES_DSN"

    assert scrubbed(text) == text


def test_a_failed_task_is_told_with_dag_run_try_error_and_log() -> None:
    notice = task_failed(
        "ingest.load", "manual__1", attempt=3, error=ValueError("no ```such``` table"), log_url="http://airflow/log"
    )

    assert notice.title == "ingest.load failed"
    assert "run `manual__1`, try 3" in notice.text
    assert "[log](http://airflow/log)" in notice.text
    assert notice.text.count("```") == 2
    assert "such" in notice.text


def test_a_long_error_is_cut_to_what_discord_takes() -> None:
    body = payload(command_ended("transform", "x" * 100_000))
    (embed,) = body["embeds"]

    assert len(embed["description"]) < 2000
    assert embed["description"].endswith(" …\n```")


def test_consistency_is_a_table_and_bad_news_when_one_table_differs() -> None:
    good = Finding("r1", "manual", "raw_users", 20_000, 20_000, "Consistent")
    bad = Finding("r1", "manual", "raw_orders", 1_234_567, 1_234_566, "Inconsistent")

    assert consistency([good]).title == "Run r1 is Consistent"
    assert consistency([good, bad]).title == "Run r1 is Inconsistent"
    assert consistency([good, bad]).colour != consistency([good]).colour
    assert consistency([good, bad]).text == (
        "```\n"
        "table        Postgres   BigQuery  status\n"
        "raw_users      20,000     20,000  Consistent\n"
        "raw_orders  1,234,567  1,234,566  Inconsistent\n"
        "```"
    )


def test_a_digest_sums_the_hours_and_shows_local_time() -> None:
    begin = datetime(2026, 11, 22, 16, tzinfo=UTC)
    hours = [
        FraudHour(begin, 1_000, 30, 5_000_000, {"night_amount": 10, "repeat_purchase": 25}),
        FraudHour(begin + timedelta(hours=1), 0, 0, 0, {}),
    ]

    assert digest(hours, "Asia/Jakarta").title == "Fraud from 22 Nov 23:00 to 01:00 WIB"
    assert digest(hours, "Asia/Jakarta").text == (
        "30 of 1,000 orders (3.0%), worth Rp5,000,000.\n"
        "```\n"
        "hour          orders  frauds  by reason\n"
        "22 Nov 23:00   1,000      30  repeat_purchase 25, night_amount 10\n"
        "23 Nov 00:00       0       0\n"
        "```"
    )


def test_a_digest_of_two_days_is_within_what_discord_takes() -> None:
    reasons = {f"a_rather_long_reason_{number}": 1_000_000 for number in range(6)}
    hours = [FraudHour(datetime(2026, 1, 1, tzinfo=UTC), 10**9, 10**8, 10**15, reasons)] * 48

    assert len(digest(hours, "Asia/Jakarta").text) < 4096
