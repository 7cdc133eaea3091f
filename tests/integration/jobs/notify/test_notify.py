"""`finpro notify` and `--notify` as a person or cron meets them: real commands, a real Postgres, a webhook of our own."""

import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from batch.warehouse.bigquery import load
from batch.warehouse.monitoring import fraud_by_hour
from conf.settings import Settings
from tests.runs.exports import execute, export_run, fill, insert_orders, tamper
from tests.runs.webhook import TOKEN, Answer, Webhook

FINPRO = str(Path(sys.executable).with_name("finpro"))


@pytest.fixture
def webhook(monkeypatch: pytest.MonkeyPatch) -> Iterator[Webhook]:
    """A webhook that the commands of this test find in their settings."""
    webhook = Webhook()
    with webhook.serving() as url:
        monkeypatch.setenv("FINPRO_DISCORD_WEBHOOK_URL", url)
        yield webhook


def finpro(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([FINPRO, *arguments], capture_output=True, text=True)


def screened_at(settings: Settings, first: int, last: int, moment: datetime) -> None:
    execute(
        settings,
        "update raw_orders set screened_at = %s where substr(order_id, 2)::int between %s and %s",
        *(moment, first, last),
    )


def test_hours_are_counted_by_verdict_and_reason_and_a_quiet_one_is_there(settings: Settings) -> None:
    begin = datetime(2026, 11, 22, 10, tzinfo=UTC)
    insert_orders(settings, 1, 40)
    execute(settings, "update raw_orders set amount_numeric = 1000, reasons = '{night_amount}' where order_id = 'O20'")
    execute(settings, "update raw_orders set amount_numeric = 500 where order_id = 'O10'")
    screened_at(settings, 1, 20, begin)
    screened_at(settings, 21, 25, begin + timedelta(hours=3) - timedelta(microseconds=1))
    screened_at(settings, 26, 40, begin + timedelta(hours=3))

    first, quiet, last = fraud_by_hour(settings.require("postgres_dsn"), begin, begin + timedelta(hours=3))
    assert (first.hour, first.orders, first.frauds, first.amount) == (begin, 20, 2, 1500)
    assert first.reasons == {"night_amount": 2, "foreign_country": 1}
    assert (quiet.orders, quiet.frauds, quiet.amount, quiet.reasons) == (0, 0, 0, {})
    assert (last.hour, last.orders, last.frauds, last.reasons) == (begin + timedelta(hours=2), 5, 0, {})


def test_the_digest_of_the_last_hour_is_one_message(settings: Settings, webhook: Webhook) -> None:
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - timedelta(hours=1)
    insert_orders(settings, 1, 30)
    screened_at(settings, 1, 30, hour + timedelta(minutes=59))
    done = finpro("notify", "digest")

    assert (done.returncode, done.stderr) == (0, "")
    (text,) = webhook.texts
    assert "3 of 30 orders (10.0%)" in text
    assert "foreign_country 3, night_amount 3" in text


def test_what_reconciliation_found_is_told_and_that_it_differs(settings: Settings, webhook: Webhook) -> None:
    fill(settings, orders=50)
    export_run(settings, "a-run")
    load(settings)
    good = finpro("reconcile", "--notify")
    webhook.wait_for(1)
    tamper(settings, "delete from {}.raw_orders where order_id = 'O7'")
    bad = finpro("reconcile", "--notify")
    webhook.wait_for(3)

    assert (good.returncode, bad.returncode) == (0, 6)
    assert webhook.texts[0].startswith("Run a-run is Consistent\n")
    told = {text.split("\n")[0]: text for text in webhook.texts[1:]}
    assert ["raw_orders", "50", "49", "Inconsistent"] in [
        line.split() for line in told["Run a-run is Inconsistent"].splitlines()
    ]
    assert "raw_orders.rows" in told["finpro reconcile failed"]
    assert finpro("notify", "consistency", "--run-id", "a-run").returncode == 0
    assert webhook.texts[3] == told["Run a-run is Inconsistent"]


def test_a_webhook_that_never_answers_neither_fails_nor_delays_a_command(settings: Settings, webhook: Webhook) -> None:
    fill(settings)
    export_run(settings, "a-run")
    load(settings)
    begin = time.monotonic()
    plain = finpro("reconcile")
    usual = time.monotonic() - begin
    webhook.answers = [Answer(seconds=60)]
    begin = time.monotonic()
    told = finpro("reconcile", "--notify")
    took = time.monotonic() - begin
    webhook.wait_for(1)

    assert (told.returncode, told.stdout, told.stderr) == (plain.returncode, plain.stdout, plain.stderr)
    assert took < usual + 5


def test_a_message_asked_for_by_name_that_does_not_get_through_is_an_error(settings: Settings, webhook: Webhook) -> None:
    webhook.answers = [Answer(404)]
    done = finpro("notify", "digest")

    assert done.returncode == 16
    assert "is the webhook that FINPRO_DISCORD_WEBHOOK_URL names still there?" in done.stderr
    assert TOKEN not in done.stdout + done.stderr


def test_a_run_that_nobody_reconciled_is_not_made_up(settings: Settings, webhook: Webhook) -> None:
    done = finpro("notify", "consistency", "--run-id", "never")

    assert done.returncode == 16
    assert "Run never has not been reconciled" in done.stderr
    assert webhook.received == []
