"""The six rules over a table of orders: by hand, and against the independent judge. No JVM."""

import random
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.former_rules import SIX, CoordinatedUsers, ForeignCountry, NightAmount, RepeatPurchase, SequentialUsers
from conf.rules import FraudRules
from streaming.contract import ORDER_SCHEMA
from streaming.rules.patterns import EVIDENCE_ORDERS, Finding
from streaming.rules.rules import findings
from tests.oracle import brute_force
from tests.oracle.brute_force import Order
from tests.oracle.order_sets import orders, rule_sets, shuffles, six_rules

DEFAULTS = FraudRules(version="test")
LARGEST = 2**63 - 1


def placed(order_id: str, at: str = "12:00:00", **changes: Any) -> Order:
    """An order that no rule minds, placed on a day in Jakarta at a time such as `12:00:00.000001`."""
    event_ts = datetime.fromisoformat(f"2026-10-15T{at}+07:00").astimezone(UTC)
    plain = Order(order_id, 1, 1, 1, "1000", 1_000, "ID", event_ts, event_ts, "web")
    return replace(plain, **changes)


def table(placed_orders: Sequence[Order]) -> pl.DataFrame:
    """The orders as the rules take them; where Kafka put them matters to no rule."""
    columns = {name: [getattr(order, name) for order in placed_orders] for name in Order.__dataclass_fields__}
    return pl.DataFrame(columns, schema={name: ORDER_SCHEMA[name] for name in columns})


def ids(placed_orders: Sequence[Order], finding: Finding) -> set[str]:
    """The ids of the orders that have the reason; no order may have it twice."""
    order_ids = [placed_orders[row].order_id for row in finding.rows]
    assert len(order_ids) == len(set(order_ids))
    return set(order_ids)


def evidence(placed_orders: Sequence[Order], finding: Finding) -> dict[str, tuple[set[str], Any]]:
    """Per order that has the reason: the order ids that together make the pattern, and the value found."""
    members = [{placed_orders[place].order_id for place in places} for places in finding.members]
    order_ids = [placed_orders[row].order_id for row in finding.rows]
    return dict(zip(order_ids, zip(members, finding.value, strict=True), strict=True))


def found(reason: str, placed_orders: Sequence[Order], rules: FraudRules = DEFAULTS) -> set[str]:
    """The ids of the orders that one rule finds."""
    return ids(placed_orders, findings(table(placed_orders), rules)[reason])


# --- each rule by hand --------------------------------------------------------------------------------------------


def test_there_are_six_rules_and_their_reasons_are_sorted() -> None:
    assert list(findings(table([]), DEFAULTS)) == list(SIX)


@pytest.mark.parametrize("reason", SIX)
def test_no_orders_have_no_reason(reason: str) -> None:
    assert found(reason, []) == set()


def test_an_order_from_abroad_is_foreign() -> None:
    pair = [placed("a"), placed("b", country="SG")]
    finding = findings(table(pair), DEFAULTS)["foreign_country"]
    assert evidence(pair, finding) == {"b": ({"b"}, "SG")}
    assert finding.limit == "ID"
    assert found("foreign_country", pair, six_rules(version="test", foreign_country=ForeignCountry(home="SG"))) == {"a"}


@pytest.mark.parametrize("reason", ["night_quantity", "night_amount"])
@pytest.mark.parametrize(
    ("at", "is_night"),
    [("23:59:59.999999", False), ("00:00:00", True), ("03:59:59.999999", True), ("04:00:00", False), ("12:00:00", False)],
)
def test_night_is_from_midnight_until_just_before_four(reason: str, at: str, is_night: bool) -> None:
    large = [placed("a", at, quantity=101, amount_numeric=100_000_001)]
    assert found(reason, large) == ({"a"} if is_night else set())


def test_night_follows_the_clocks_of_the_zone() -> None:
    """New York's clocks go back from 02:00 to 01:00 in that night: it is five hours long."""
    rules = FraudRules(version="test", time_zone="America/New_York")
    utc = {"a": "03:59:59.999999", "b": "04:00:00", "c": "08:59:59.999999", "d": "09:00:00"}
    times = {order_id: datetime.fromisoformat(f"2026-11-01T{time}+00:00") for order_id, time in utc.items()}
    night = [placed(order_id, quantity=101, event_ts=time) for order_id, time in times.items()]
    assert found("night_quantity", night, rules) == {"b", "c"}


def test_only_what_is_above_the_limits_counts_at_night() -> None:
    night = [
        placed("a", "01:00:00", quantity=100, amount_numeric=100_000_000),
        placed("b", "01:00:00", quantity=101, amount_numeric=100_000_000),
        placed("c", "01:00:00", quantity=100, amount_numeric=100_000_001),
    ]
    assert evidence(night, findings(table(night), DEFAULTS)["night_quantity"]) == {"b": ({"b"}, 101)}
    assert evidence(night, findings(table(night), DEFAULTS)["night_amount"]) == {"c": ({"c"}, 100_000_001)}
    no_more = six_rules(version="test", night_amount=NightAmount(above=LARGEST))
    assert found("night_amount", [placed("a", "01:00:00", amount_numeric=LARGEST)], no_more) == set()


def test_every_order_of_a_repeat_purchase_is_fraud_with_both_ends_of_the_interval() -> None:
    burst = [placed("c", "12:00:10"), placed("a", "12:00:00"), placed("b", "12:00:04", quantity=2)]
    finding = findings(table(burst), DEFAULTS)["repeat_purchase"]
    assert evidence(burst, finding) == {order_id: ({"a", "b", "c"}, 3) for order_id in "abc"}
    assert finding.limit == 3
    assert (
        found("repeat_purchase", [replace(burst[0], event_ts=burst[0].event_ts + timedelta(microseconds=1)), *burst[1:]])
        == set()
    )


def test_a_repeat_purchase_is_one_users_of_one_product() -> None:
    pair = [placed("a"), placed("b")]
    assert found("repeat_purchase", [*pair, placed("c", user_id=2)]) == set()
    assert found("repeat_purchase", [*pair, placed("c", product_id=2)]) == set()
    assert found("repeat_purchase", [*pair, placed("c", quantity=2)]) == {"a", "b", "c"}


def test_sequential_users_have_consecutive_ids_in_any_order_of_time() -> None:
    row = [placed("a", user_id=7), placed("b", "12:00:10", user_id=5), placed("c", "12:00:03", user_id=6)]
    finding = findings(table(row), DEFAULTS)["sequential_users"]
    assert evidence(row, finding) == {order_id: ({"a", "b", "c"}, 3) for order_id in "abc"}
    assert found("sequential_users", [replace(row[0], user_id=8), *row[1:]]) == set()
    assert found("sequential_users", [replace(row[0], quantity=2), *row[1:]]) == set()
    assert found("sequential_users", [replace(row[0], product_id=2), *row[1:]]) == set()
    late = replace(row[1], event_ts=row[1].event_ts + timedelta(microseconds=1))
    assert found("sequential_users", [row[0], late, row[2]]) == set()


def test_every_order_of_a_user_belongs_to_a_sequence_that_some_interval_holds() -> None:
    row = [
        placed("a", "12:00:00", user_id=5),
        placed("b", "12:00:01", user_id=6),
        placed("c", "12:00:02", user_id=7),
        placed("d", "12:00:10", user_id=5),
        placed("e", "12:00:12.000001", user_id=7),
        placed("f", "12:00:09", user_id=9),
    ]
    assert found("sequential_users", row) == {"a", "b", "c", "d"}


def test_consecutive_ids_end_where_the_numbers_end() -> None:
    row = [placed("a", user_id=LARGEST - 2), placed("b", user_id=LARGEST - 1), placed("c", user_id=LARGEST)]
    assert found("sequential_users", row) == {"a", "b", "c"}
    assert found("sequential_users", [replace(row[0], user_id=1), *row[1:]]) == set()


def test_coordinated_users_are_different_users_in_one_interval() -> None:
    three = [placed("a", user_id=5), placed("b", "12:00:05", user_id=50), placed("c", "12:00:10", user_id=500)]
    finding = findings(table(three), DEFAULTS)["coordinated_users"]
    assert evidence(three, finding) == {order_id: ({"a", "b", "c"}, 3) for order_id in "abc"}
    assert finding.limit == 3
    assert found("coordinated_users", [replace(three[0], user_id=50), *three[1:]]) == set()
    assert found("coordinated_users", [replace(three[0], quantity=2), *three[1:]]) == set()
    assert found("coordinated_users", [replace(three[0], product_id=2), *three[1:]]) == set()
    later = replace(three[2], event_ts=three[2].event_ts + timedelta(microseconds=1))
    assert found("coordinated_users", [*three[:2], later]) == set()


def test_each_pattern_has_an_interval_and_a_size_of_its_own() -> None:
    rules = six_rules(
        version="test",
        repeat_purchase=RepeatPurchase(orders=2, within=timedelta(0)),
        sequential_users=SequentialUsers(users=2, within=timedelta(seconds=1)),
        coordinated_users=CoordinatedUsers(users=2, within=timedelta(seconds=5)),
    )
    group = [
        placed("a", user_id=5),
        placed("b", user_id=5),
        placed("c", "12:00:01", user_id=6),
        placed("d", "12:00:05", user_id=7),
    ]
    assert found("repeat_purchase", group, rules) == {"a", "b"}
    assert found("sequential_users", group, rules) == {"a", "b", "c"}
    assert found("coordinated_users", group, rules) == {"a", "b", "c", "d"}


# --- against the judge --------------------------------------------------------------------------------------------


def assert_agrees(reason: str, placed_orders: list[Order], rules: FraudRules) -> None:
    """The rule finds what the judge finds, and its evidence alone convinces the judge."""
    finding = findings(table(placed_orders), rules)[reason]
    assert ids(placed_orders, finding) == brute_force.hits_of(placed_orders, reason, rules)
    convincing: dict[frozenset[int], set[str]] = {}
    for row, places in zip(finding.rows, finding.members.tolist(), strict=True):
        assert row in places
        assert len(places) == len(set(places))
        pattern = frozenset(places)
        if pattern not in convincing:
            convincing[pattern] = brute_force.hits_of([placed_orders[place] for place in places], reason, rules)
        assert placed_orders[row].order_id in convincing[pattern]


@pytest.mark.parametrize("reason", SIX)
@given(data=st.data(), rules=rule_sets())
def test_a_rule_finds_what_the_judge_finds_with_evidence_that_holds(
    reason: str, data: st.DataObject, rules: FraudRules
) -> None:
    assert_agrees(reason, data.draw(orders(rules)), rules)


@given(data=st.data(), rules=rule_sets())
def test_the_order_of_the_rows_changes_nothing(data: st.DataObject, rules: FraudRules) -> None:
    placed_orders = data.draw(orders(rules))
    shuffled = data.draw(shuffles(placed_orders))
    for reason in SIX:
        assert found(reason, shuffled, rules) == found(reason, placed_orders, rules)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("reason", ["repeat_purchase", "sequential_users", "coordinated_users"])
def test_a_crowd_around_one_hot_product_is_judged_the_same(reason: str, seed: int) -> None:
    choose = random.Random(seed)
    size = choose.choice((2, 3, 6))
    within = timedelta(seconds=choose.choice((0, 1, 10)))
    rules = six_rules(
        version="test",
        repeat_purchase=RepeatPurchase(orders=size, within=within),
        sequential_users=SequentialUsers(users=size, within=within),
        coordinated_users=CoordinatedUsers(users=size, within=within),
    )
    assert_agrees(reason, crowd(choose, users=choose.choice((3, 10, 200))), rules)


def crowd(choose: random.Random, *, users: int, size: int = 400) -> list[Order]:
    """Orders of one product within some minutes, many of them of one user and many at the same moment."""
    start = placed("first").event_ts
    share_of_one_user = choose.choice((0.1, 0.95))
    seconds = choose.choice((20, 200))
    return [
        placed(
            f"o{number}",
            user_id=1 if choose.random() < share_of_one_user else choose.randint(1, users),
            quantity=choose.choice((1, 1, 2)),
            event_ts=start + timedelta(seconds=choose.randrange(2 * seconds) / 2),
        )
        for number in range(size)
    ]


# --- evidence -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", ["repeat_purchase", "sequential_users", "coordinated_users"])
def test_evidence_names_at_most_twenty_orders_and_always_the_order_itself(reason: str) -> None:
    size = EVIDENCE_ORDERS + 5
    rules = six_rules(
        version="test",
        repeat_purchase=RepeatPurchase(orders=size),
        sequential_users=SequentialUsers(users=size),
        coordinated_users=CoordinatedUsers(users=size),
    )
    one_user = reason == "repeat_purchase"
    many = [placed(f"o{number}", user_id=1 if one_user else 1 + number) for number in range(size)]
    finding = findings(table(many), rules)[reason]
    assert ids(many, finding) == {order.order_id for order in many}
    for row, places in zip(finding.rows, finding.members.tolist(), strict=True):
        assert len(set(places)) == EVIDENCE_ORDERS == 20
        assert row in places


def test_the_value_counts_what_the_interval_holds() -> None:
    burst = [placed(f"o{number}", f"12:00:0{number}") for number in range(6)]
    finding = findings(table(burst), DEFAULTS)["repeat_purchase"]
    assert set(finding.value) == {6}
    cluster = [replace(order, user_id=10 * number + 1) for number, order in enumerate(burst)]
    finding = findings(table(cluster), DEFAULTS)["coordinated_users"]
    assert set(finding.value) == {6}


# --- size ---------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(120)
@pytest.mark.parametrize("users", [1, 50, 100_000])
def test_a_product_that_takes_every_order_is_screened_by_every_rule(users: int) -> None:
    """A hundred thousand orders in a hundred seconds: an inner loop over each one's neighbours would not come back."""
    size = 100_000
    number = pl.int_range(size, eager=True)
    start = placed("first").event_ts
    hot = pl.DataFrame({"order_id": number.cast(pl.String), "user_id": number % users + 1}).with_columns(
        product_id=pl.lit(1, pl.Int64),
        quantity=pl.lit(1, pl.Int64),
        amount_numeric=pl.lit(1_000, pl.Int64),
        country=pl.lit("ID"),
        event_ts=pl.lit(start).cast(ORDER_SCHEMA["event_ts"]) + (number * 1_000).cast(pl.Duration("us")),
    )
    hits = {reason: len(finding.rows) for reason, finding in findings(hot, DEFAULTS).items()}
    assert hits["repeat_purchase"] == (0 if users == size else size)
    assert hits["sequential_users"] == hits["coordinated_users"] == (0 if users == 1 else size)
