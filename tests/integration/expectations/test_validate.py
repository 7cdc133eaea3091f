"""`finpro validate` on the embedded platform: what passes, and that every expectation fails when it is broken."""

import socket
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from batch.warehouse.bigquery import load
from conf.errors import ExpectationsFailed, GoogleCloudError
from conf.settings import Settings, variable
from expectations.outcome import Outcome, data_docs
from jobs.cli import main
from jobs.local.platform import Platform
from jobs.validate import validate
from tests.conftest import own_warehouse
from tests.oracle.bigquery_refusals import QUOTA_EXCEEDED
from tests.oracle.marts import fill, insert_order
from tests.oracle.strict_bigquery import StrictBigQuery
from tests.runs.exports import execute, export_run, tamper

RUN = "run-1"

# What somebody does to a raw table in BigQuery, and what the gate says about it.
TAMPERED = [
    ("raw_users", "set email = 'a@b' where user_id in (1, 2)", "no two users share an email"),
    ("raw_users", "set user_id = 4 where user_id = 3", "every user has a user_id of its own"),
    ("raw_users", "set name = null where user_id = 5", "name is never null"),
    ("raw_products", "set currency = 'USD' where product_id = 1", "every price is in rupiah"),
    ("raw_products", "set cost = -1 where product_id = 2", "no cost is negative"),
    ("raw_products", "set cost = price where product_id = 3", "every price is above its cost"),
    ("raw_products", "set product_name = 'a' where product_id in (4, 5)", "no two products share a name"),
    ("raw_orders", "set order_id = 'unknown user' where order_id = 'unknown both'", "every order has an order_id of its own"),
    ("raw_orders", "set quantity = 0 where order_id = 'last of a day'", "every order is for one piece or more"),
    ("raw_orders", "set amount_numeric = -1 where order_id = 'first of a day'", "no amount is negative"),
    ("raw_orders", "set amount = 'Rp 70.001' where order_id = 'last of a day'", "the amount's text and its number agree"),
    ("raw_orders", "set country = 'Id' where order_id = 'last of a day'", "every country is two capital letters"),
    ("raw_orders", "set event_ts = '2126-01-01 00:00:00+00' where order_id = 'last of a day'", "no order is from the future"),
    ("raw_orders", "set status = 'Pending' where order_id = 'last of a day'", "every order is Genuine or Fraud"),
    (
        "raw_orders",
        "set reasons = ['A b'] where order_id = 'after days without any'",
        "every reason is a name that a rule can have",
    ),
    (
        "raw_orders",
        "set suppressed_reasons = reasons where order_id = 'tied 1'",
        "no reason that an order has is suppressed too",
    ),
    ("raw_orders", "set status = 'Fraud' where order_id = 'worth nothing'", "an order is Fraud exactly when it has a reason"),
    ("raw_orders", "set screened_at = null where order_id = 'worth nothing'", "screened_at is never null"),
]


@pytest.fixture(scope="module")
def loaded(platform: Platform) -> Iterator[Settings]:
    """A warehouse with users, products and orders, loaded."""
    with own_warehouse(platform) as settings:
        fill(settings)
        export_run(settings, RUN)
        load(settings, RUN)
        yield settings


def gate(settings: Settings) -> tuple[list[Outcome], list[str]]:
    said: list[str] = []
    return validate(settings, None, say=said.append).outcomes, said


def test_what_was_loaded_passes_and_orders_of_unknown_users_and_products_are_counted(
    loaded: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    connect = socket.socket.connect

    def note(self: socket.socket, where: Any) -> None:
        asked.append(where)
        connect(self, where)

    monkeypatch.setattr(socket.socket, "connect", note)
    outcomes, said = gate(loaded)
    warned = {outcome.expected: outcome.unexpected for outcome in outcomes if not outcome.holds}
    assert warned == {
        "every order is a known user's": 42,
        "every order is for a known product": 3,
        "an order was created within a day before the export": 1,
    }
    assert said[0].startswith("warning: raw_orders: every order is a known user's (42 rows: order_id ")
    assert f"run {RUN}: {len(outcomes) - 3} of {len(outcomes)} expectations hold, 3 warn, 0 fail" in said
    assert {where[0] for where in asked} == {"127.0.0.1"}
    pages = "".join(page.read_text(encoding="utf-8") for page in data_docs().glob(f"validations/*/{RUN}/*/*.html"))
    assert all(outcome.expected.replace("'", "&#39;") in pages or outcome.expected in pages for outcome in outcomes)


def test_a_gate_that_bigquery_does_not_let_ask_says_so_and_blames_no_row(
    loaded: Settings, strict_bigquery: StrictBigQuery
) -> None:
    with (
        strict_bigquery.refusing(QUOTA_EXCEEDED, "raw_users"),
        strict_bigquery.listening() as jobs,
        pytest.raises(GoogleCloudError, match=r"QueryUsagePerDay.*no right is missing"),
    ):
        gate(loaded)
    assert len(jobs) > 10
    assert all(job["labels"] == {"dag": "manual", "run": RUN, "step": "validate"} for job in jobs)
    ((recorded,),) = execute(loaded, "select jobs from ingestion_steps where step = 'validate'")
    assert recorded >= len(jobs) - 1  # of this try and those before it, but for the refused one


def test_a_day_with_far_fewer_orders_than_that_day_of_the_weeks_before_is_worth_a_warning(loaded: Settings) -> None:
    for week in range(1, 5):
        at = datetime.now(UTC) - timedelta(days=7 * week, hours=1)
        for number in range(100):  # that the day of so few orders is not chance
            insert_order(loaded, f"week {week}, {number}", at.isoformat())
    insert_order(loaded, "of today", (datetime.now(UTC) - timedelta(hours=1)).isoformat())
    export_run(loaded, "run-2")
    load(loaded, "run-2")
    _, said = gate(loaded)
    (warning,) = [line for line in said if "the last day brought" in line]
    assert warning.startswith("warning: recent_orders: ")
    assert "orders 1, least_before 1" in warning
    assert not [line for line in said if "an order was created within a day" in line]


def test_a_table_that_is_not_loaded_is_named(settings: Settings) -> None:
    export_run(settings, RUN)
    with pytest.raises(ExpectationsFailed, match="order_outcomes, raw_orders, raw_products, raw_users: not in the dataset"):
        gate(settings)


def test_every_way_to_break_a_table_is_named_with_its_rows_and_stops_what_follows(
    platform: Platform, loaded: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for table, change, _ in TAMPERED:
        tamper(loaded, f"update {{}}.{table} {change}")
    own = {variable(name): loaded.require(name) for name in ("postgres_dsn", "gcs_bucket", "bigquery_dataset")}
    for name, value in (platform.environment() | own).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["finpro", "validate", "--run-id", RUN])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == ExpectationsFailed.exit_code
    printed = capsys.readouterr()
    for table, _, expected in TAMPERED:
        assert f"{table}: {expected} (" in printed.err
    assert "no order is from the future (1 row: order_id last of a day, event_ts 2126-01-01 00:00:00+00:00)" in printed.err
    assert f"{len(TAMPERED)} fail" in printed.out
