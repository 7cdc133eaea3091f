"""Rules for orders of before, of tables made by hand: what is new, what is asked for, and how it is told."""

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from typing import Any

import polars as pl
import pytest
from rich.console import Console

from conf.errors import ApplicationRefused
from conf.rules import FraudRules
from jobs.rules.apply import figures_of, to_go_on_with
from streaming.contract import ORDER_SCHEMA
from streaming.history.application import Further, _counted, _part
from streaming.history.rescreening import Period
from streaming.rules.promotion import history, told
from streaming.rules.proposals import Application
from streaming.rules.recorded import RulesInForce
from streaming.screening.sinks import STORED_SCHEMA, encode_verdicts

DAY = datetime(2026, 11, 22, tzinfo=UTC)
SINCE, UNTIL = DAY + timedelta(hours=6), DAY + timedelta(days=2, hours=6)
RULES = FraudRules.model_validate({"version": "2"})


def application(days_left: Sequence[date] = (), **changes: Any) -> Application:
    at = DAY + timedelta(days=9)
    return replace(Application(1, "2", SINCE, UNTIL, at, "sari", "INC-481", 40, days_left), **changes)


def screened(*orders: tuple[datetime, list[str], list[str]]) -> pl.DataFrame:
    """Orders of a moment, with the reasons that they have and those that rules find, worth 10 rupiah each."""
    rows = [{"event_ts": moment, "before": before, "reasons": found, "amount_numeric": 10} for moment, before, found in orders]
    schema = {"before": pl.List(pl.String), "reasons": pl.List(pl.String)}
    return pl.DataFrame(rows, schema_overrides=schema | {"event_ts": pl.Datetime("us", "UTC")})


def test_only_reasons_that_an_order_lacks_are_new_and_only_orders_of_the_period() -> None:
    orders = screened(
        (SINCE, [], ["b", "a"]),
        (SINCE, [], ["a", "b"]),
        (SINCE, ["a"], ["a", "b"]),
        (SINCE, ["a", "gone"], ["a"]),
        (SINCE - timedelta(microseconds=1), [], ["a"]),
        (UNTIL, [], ["a"]),
        (UNTIL - timedelta(microseconds=1), ["gone"], ["a"]),
    )
    found = _counted(Period(SINCE, UNTIL))(orders).sort("day", "gained").rows()
    assert [(day, gained, new, orders, int(amount)) for day, gained, new, orders, amount in found] == [
        (DAY.date(), "a,b", True, 2, 20),
        (DAY.date(), "b", False, 1, 10),
        (date(2026, 11, 24), "a", False, 1, 10),
    ]


def test_a_day_of_an_application_ends_with_the_day_or_with_the_application() -> None:
    assert _part(application(), DAY.date()) == (SINCE, DAY + timedelta(days=1))
    assert _part(application(), date(2026, 11, 23)) == (DAY + timedelta(days=1), DAY + timedelta(days=2))
    assert _part(application(), date(2026, 11, 24)) == (DAY + timedelta(days=2), UNTIL)
    last = _part(application(until=None), date.max)
    assert last == (datetime(9999, 12, 31, tzinfo=UTC), None)


def test_an_order_with_two_new_reasons_counts_for_both_and_once_in_all() -> None:
    found = [
        Further(DAY.date(), frozenset({"a", "b"}), True, 3, 30),
        Further(DAY.date(), frozenset({"a"}), False, 2, 20),
    ]
    assert figures_of(found) == {
        "orders": 5,
        "become_fraud": 3,
        "reasons": {"a": {"orders": 5, "amount": 50}, "b": {"orders": 3, "amount": 30}},
    }


def test_only_an_application_of_the_same_rules_and_orders_is_gone_on_with() -> None:
    console, left = Console(quiet=True), [DAY.date()]
    period = Period(SINCE, UNTIL)
    assert to_go_on_with([], RULES, period, console) is None
    assert to_go_on_with([application()], RULES, period, console) is None
    assert to_go_on_with([application(left)], RULES, period, console) == application(left)
    assert to_go_on_with([application(left, version="1")], RULES, period, console) is None
    with pytest.raises(ApplicationRefused, match=r"--since 2026-11-22T06:00:00\+00:00 --until 2026-11-24T06:00:00\+00:00"):
        to_go_on_with([application(left)], RULES, Period(SINCE, None), console)


def test_a_revision_of_an_order_of_before_names_the_application_and_no_other_does() -> None:
    order: dict[str, Any] = {
        name: DAY if dtype.is_temporal() else 1 if dtype.is_integer() else "x" for name, dtype in ORDER_SCHEMA.items()
    }
    order |= {"given": "dear", "shadow": "", "evidence": "{}", "attributes": '{"device_id":"d1"}', "screened_at": DAY}
    verdicts = pl.DataFrame([{name: order.get(name) for name in STORED_SCHEMA}], schema=STORED_SCHEMA)
    [(_, *marked)] = encode_verdicts(verdicts, "2", application=3).rows()
    [(_, *unmarked)] = encode_verdicts(verdicts, "2").rows()
    for one, other in zip(marked, unmarked, strict=True):
        assert json.loads(one) == json.loads(other) | {"application": 3}
        assert "application" not in json.loads(other)


def test_the_history_of_the_rules_says_to_what_they_were_applied() -> None:
    versions = history([RulesInForce(DAY, RULES)], [])
    lines = told(versions, [application([DAY.date()], until=None, why="INC-1")]).splitlines()
    assert lines == [
        "2026-11-22 00:00:00 UTC  2  -     (the file was written by hand)",
        "2026-12-01 00:00:00 UTC  2  sari  (applied to 40 orders of before, since 2026-11-22 06:00:00 UTC, 1 days left) INC-1",
    ]
