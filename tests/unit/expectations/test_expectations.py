"""The suites and outcomes of the gate, without a warehouse. Great Expectations takes seconds to import: not at the top."""

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from expectations.outcome import GateRun, Outcome, Severity, read_gate_run, write_gate_run
from tests.oracle.googlesql import GoogleSql

RAW_TABLES = {
    "raw_users": {"user_id": "int64"},
    "raw_products": {"product_id": "int64", "price": "int64", "cost": "int64"},
    "raw_orders": {
        "order_id": "string",
        "user_id": "int64",
        "product_id": "int64",
        "amount": "string",
        "amount_numeric": "int64",
        "created_date": "timestamp",
        "status": "string",
        "reasons": "array<string>",
        "suppressed_reasons": "array<string>",
    },
    "order_outcomes": {"outcome_id": "int64", "decided_at": "timestamp"},
}


@pytest.fixture(scope="module")
def suites() -> dict[str, list[Any]]:
    from expectations.suites import suites

    return dict(suites("project.dataset", datetime(2026, 11, 29, 12, tzinfo=UTC)))


def test_only_orders_of_unknown_users_and_products_are_worth_a_mere_warning(suites: dict[str, list[Any]]) -> None:
    warned = [expected.description for suite in suites.values() for expected in suite if expected.severity == "warning"]
    assert warned == [
        "every order is a known user's",
        "every order is for a known product",
        "an order was created within a day before the export",
        "the last day brought at least half the least, at most twice the most, of the same day of the four weeks before",
    ]


def test_every_expectation_says_in_words_of_its_own_what_it_expects(suites: dict[str, list[Any]]) -> None:
    for suite in suites.values():
        words = [expected.description for expected in suite]
        assert all(words)
        assert len(set(words)) == len(words)


def test_bigquery_accepts_every_query_of_the_suites(suites: dict[str, list[Any]]) -> None:
    google_sql = GoogleSql(RAW_TABLES)
    queries = [
        (table, expected.unexpected_rows_query)
        for table, suite in suites.items()
        for expected in suite
        if hasattr(expected, "unexpected_rows_query")
    ]
    assert len(queries) == 10
    for table, query in queries:
        batch = f"(select * from {'raw_orders' if table == 'recent_orders' else table} where true) as subselect"
        assert google_sql.columns(re.sub(r"`project\.dataset\.(\w+)`", r"\1", query.format(batch=batch)))


@pytest.mark.parametrize(
    ("severity", "holds", "error", "stops"),
    [
        (Severity.FAIL, False, None, True),
        (Severity.WARN, False, None, False),
        (Severity.FAIL, True, None, False),
        (Severity.WARN, False, "no such column", True),
    ],
)
def test_what_fails_or_cannot_be_checked_stops_a_run_and_a_warning_does_not(
    severity: Severity, holds: bool, error: str | None, stops: bool
) -> None:
    assert Outcome("raw_orders", "", severity, holds, error=error).stops is stops


@pytest.mark.parametrize(
    ("outcome", "said"),
    [
        (Outcome("t", "e", Severity.FAIL, False, 1_234, ({"order_id": "a", "n": 1},)), "t: e (1,234 rows: order_id a, n 1; …)"),
        (Outcome("t", "e", Severity.FAIL, False, 1, ({"order_id": "a"},)), "t: e (1 row: order_id a)"),
        (Outcome("t", "e", Severity.FAIL, False, None, ({"rows": 2, "expected": 3},)), "t: e (rows 2, expected 3)"),
        (Outcome("t", "e", Severity.FAIL, False, error="boom"), "t: e (could not be checked: boom)"),
    ],
)
def test_an_outcome_says_how_many_rows_break_it_and_shows_some(outcome: Outcome, said: str) -> None:
    assert str(outcome) == said


def test_what_the_gate_found_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    outcomes = [
        Outcome("raw_users", "a", Severity.FAIL, True, 0),
        Outcome("raw_orders", "b", Severity.WARN, False, 2, ({"order_id": "ö", "user_id": 7},)),
        Outcome("raw_orders", "c", Severity.FAIL, False, error="boom"),
    ]
    write_gate_run(tmp_path, GateRun("run-1", outcomes))
    assert read_gate_run(tmp_path) == GateRun("run-1", outcomes)


def test_where_no_gate_has_run_nothing_was_found(tmp_path: Path) -> None:
    assert read_gate_run(tmp_path / "nothing") is None
