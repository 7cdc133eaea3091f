"""The judge judged: small examples worked out by hand, and what must hold for every set of orders."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.former_rules import CoordinatedUsers, RepeatPurchase, SequentialUsers
from conf.rules import FraudRules
from tests.oracle.bad_messages import BAD, MAX_FUTURE_SKEW, RECEIVED, BadMessage, encoded, good, message, mutations, unusual
from tests.oracle.brute_force import Order, Unreadable, as_given, judge, read, screen
from tests.oracle.order_sets import OrderSet, order_sets, orders, rule_sets, shuffles, six_rules, spelled, to_messages

RULES = FraudRules(version="test")


def placed(order_id: str, at: str = "12:00:00", **changes: Any) -> Order:
    """An order that no rule minds, placed on a day in Jakarta at a time such as `12:00:00.000001`."""
    event_ts = datetime.fromisoformat(f"2026-10-15T{at}+07:00").astimezone(UTC)
    plain = Order(order_id, 1, 1, 1, "1000", 1_000, "ID", event_ts, event_ts, "web")
    return replace(plain, **changes)


def reasons(found: Sequence[Order], rules: FraudRules = RULES) -> dict[str, list[str]]:
    """The reasons of those orders that have any."""
    return {order_id: verdict.reasons for order_id, verdict in screen(found, rules).items() if verdict.reasons}


# --- the order contract -------------------------------------------------------------------------------------------


def test_a_good_message_is_read_field_by_field() -> None:
    assert read(message(encoded(good())), MAX_FUTURE_SKEW) == Order(
        order_id="good-1",
        user_id=17,
        product_id=203,
        quantity=2,
        amount="Rp.1.250.000",
        amount_numeric=1_250_000,
        country="ID",
        created_date=datetime(2026, 10, 31, 3, 15, 30, tzinfo=UTC),
        event_ts=datetime(2026, 10, 31, 3, 15, 30, 123456, tzinfo=UTC),
        source="web",
    )


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)
def test_every_kind_of_bad_message_is_refused_in_words_that_name_the_trouble(bad: BadMessage) -> None:
    with pytest.raises(Unreadable) as refused:
        read(message(bad.value), MAX_FUTURE_SKEW)
    assert bad.words.lower() in str(refused.value).lower()
    assert str(refused.value)


@pytest.mark.parametrize(("name", "value"), unusual())
def test_an_odd_message_that_keeps_the_contract_is_read(name: str, value: bytes) -> None:
    assert read(message(value), MAX_FUTURE_SKEW).order_id


@pytest.mark.parametrize(
    ("text", "rupiah"),
    [("Rp.1.250.000", 1_250_000), ("IDR 1250000", 1_250_000), ("rp. 1.250", 1_250), ("999", 999), ("Rp0", 0), ("007", 7)],
)
def test_an_amount_is_whole_rupiah(text: str, rupiah: int) -> None:
    value = encoded(good(amount=text, amount_numeric=None))
    assert read(message(value), MAX_FUTURE_SKEW).amount_numeric == rupiah


@pytest.mark.parametrize("name", ["event_ts", "created_date"])
def test_a_time_may_be_ahead_of_kafkas_by_the_skew_and_no_more(name: str) -> None:
    limit = RECEIVED + MAX_FUTURE_SKEW
    read(message(encoded(good(**{name: limit.isoformat()}))), MAX_FUTURE_SKEW)
    with pytest.raises(Unreadable, match=f"{name} is too far in the future"):
        read(message(encoded(good(**{name: (limit + timedelta(microseconds=1)).isoformat()}))), MAX_FUTURE_SKEW)


def test_digits_after_the_microseconds_are_cut_off() -> None:
    value = encoded(good(event_ts="2026-10-31T03:15:30.9999999Z"))
    assert read(message(value), MAX_FUTURE_SKEW).event_ts == datetime(2026, 10, 31, 3, 15, 30, 999_999, tzinfo=UTC)


def test_the_same_order_again_changes_nothing_in_whatever_words() -> None:
    order = placed("a", amount="Rp.1.000")
    judgement = judge(to_messages([order] * 6, spellings=range(6)), RULES)
    assert judgement.duplicates == 5
    assert judgement.dead_letters == {}
    assert [(verdict.order_id, verdict.amount, verdict.status) for verdict in judgement.orders.values()] == [
        ("a", "Rp.1.000", "Genuine")
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"user_id": 2},
        {"product_id": 2},
        {"quantity": 2},
        {"amount": "1001", "amount_numeric": 1_001},
        {"country": "SG"},
        {"created_date": datetime(2026, 10, 1, tzinfo=UTC)},
        {"event_ts": datetime(2026, 10, 15, 5, 0, 0, 1, tzinfo=UTC)},
        {"source": "mobile"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_used_id_with_other_content_is_a_dead_letter_and_the_first_stands(change: dict[str, Any]) -> None:
    first, second = placed("a"), placed("a", **change)
    judgement = judge(to_messages([first, second, first]), RULES)
    assert judgement.dead_letters.keys() == {("orders", 0, 1)}
    assert judgement.duplicates == 1
    assert judgement.orders["a"].content == first.content


def test_first_received_is_by_kafkas_time_unless_told_otherwise() -> None:
    first, second = to_messages([placed("a"), placed("a", quantity=2)])
    assert judge([second, first], RULES).orders["a"].quantity == 1
    assert judge([second, first], RULES, received=as_given).orders["a"].quantity == 2


def test_a_dead_letter_counts_for_no_rule() -> None:
    burst = [placed("a"), placed("b"), placed("b", quantity=7)]
    assert judge(to_messages(burst), RULES).orders.keys() == {"a", "b"}
    assert all(verdict.status == "Genuine" for verdict in judge(to_messages(burst), RULES).orders.values())


@pytest.mark.parametrize("seed", range(3))
def test_mutations_are_good_and_bad_and_the_same_for_a_seed(seed: int) -> None:
    found = mutations(seed, 300)
    assert found == mutations(seed, 300)
    bad = sum(mutation.problem is not None for mutation in found)
    assert 150 < bad < 280


# --- the six rules ------------------------------------------------------------------------------------------------


def test_an_order_from_abroad_is_foreign() -> None:
    assert reasons([placed("a"), placed("b", country="SG")]) == {"b": ["foreign_country"]}


@pytest.mark.parametrize(
    ("at", "is_night"),
    [("23:59:59.999999", False), ("00:00:00", True), ("03:59:59.999999", True), ("04:00:00", False), ("12:00:00", False)],
)
def test_night_is_from_midnight_until_just_before_four(at: str, is_night: bool) -> None:
    large = placed("a", at, quantity=101, amount_numeric=100_000_001)
    assert reasons([large]) == ({"a": ["night_amount", "night_quantity"]} if is_night else {})


def test_only_what_is_above_the_limits_counts_at_night() -> None:
    at_limits = placed("a", "01:00:00", quantity=100, amount_numeric=100_000_000)
    assert reasons([at_limits]) == {}
    assert reasons([replace(at_limits, quantity=101)]) == {"a": ["night_quantity"]}
    assert reasons([replace(at_limits, amount_numeric=100_000_001)]) == {"a": ["night_amount"]}


@pytest.mark.parametrize(
    ("utc", "is_night"),
    [
        ("2026-11-01T03:59:59.999999", False),
        ("2026-11-01T04:00:00", True),
        ("2026-11-01T08:59:59.999999", True),
        ("2026-11-01T09:00:00", False),
    ],
)
def test_night_follows_the_clocks_of_the_zone(utc: str, is_night: bool) -> None:
    """New York's clocks go back from 02:00 to 01:00 in that night: it is five hours long."""
    rules = FraudRules(version="test", time_zone="America/New_York")
    order = placed("a", quantity=101, event_ts=datetime.fromisoformat(utc).replace(tzinfo=UTC))
    assert reasons([order], rules) == ({"a": ["night_quantity"]} if is_night else {})


def test_the_first_hours_of_the_calendar_have_a_local_time_west_of_greenwich() -> None:
    rules = FraudRules(version="test", time_zone="America/New_York")
    at = {"a": "0001-01-01T00:00:00+00:00", "b": "0001-01-01T05:00:00+00:00"}
    ancient = [placed(order_id, quantity=101, event_ts=datetime.fromisoformat(time)) for order_id, time in at.items()]
    assert reasons(ancient, rules) == {"b": ["night_quantity"]}


def test_every_order_of_a_repeat_purchase_is_fraud_the_first_one_too() -> None:
    burst = [placed("a", "12:00:00"), placed("b", "12:00:04", quantity=2), placed("c", "12:00:10", quantity=3)]
    assert reasons(burst) == {order_id: ["repeat_purchase"] for order_id in "abc"}


def test_an_interval_includes_both_ends_and_nothing_beyond() -> None:
    beyond = [placed("a", "12:00:00"), placed("b", "12:00:04"), placed("c", "12:00:10.000001")]
    assert reasons(beyond) == {}
    assert reasons([*beyond, placed("d", "12:00:14")]) == {order_id: ["repeat_purchase"] for order_id in "bcd"}


def test_a_burst_longer_than_an_interval_is_fraud_wherever_some_interval_holds_enough() -> None:
    at = {"a": "12:00:00", "b": "12:00:05", "c": "12:00:10", "d": "12:00:15", "e": "12:00:26", "f": "12:00:27"}
    assert reasons([placed(order_id, time) for order_id, time in at.items()]).keys() == set("abcd")


def test_a_repeat_purchase_is_one_users_of_one_product() -> None:
    assert reasons([placed("a"), placed("b"), placed("c", user_id=9)]) == {}
    assert reasons([placed("a"), placed("b"), placed("c", product_id=2)]) == {}


def test_orders_at_the_same_moment_are_together_even_when_nothing_may_lie_between() -> None:
    rules = six_rules(version="test", repeat_purchase=RepeatPurchase(orders=3, within=timedelta(0)))
    tied = [placed("a"), placed("b"), placed("c"), placed("d", "12:00:00.000001")]
    assert reasons(tied, rules) == {order_id: ["repeat_purchase"] for order_id in "abc"}


def test_sequential_users_have_consecutive_ids_in_any_order_of_time() -> None:
    row = [placed("a", user_id=7), placed("b", "12:00:10", user_id=5), placed("c", "12:00:03", user_id=6)]
    assert reasons(row) == {order_id: ["coordinated_users", "sequential_users"] for order_id in "abc"}


def test_a_gap_between_users_breaks_the_sequence() -> None:
    row = [placed("a", user_id=5), placed("b", user_id=6), placed("c", user_id=8)]
    assert reasons(row) == {order_id: ["coordinated_users"] for order_id in "abc"}


def test_a_user_outside_the_sequence_is_only_coordinated() -> None:
    row = [placed("a", user_id=5), placed("b", user_id=6), placed("c", user_id=7), placed("d", user_id=20)]
    found = reasons(row)
    assert found["d"] == ["coordinated_users"]
    assert found["a"] == ["coordinated_users", "sequential_users"]


def test_every_order_of_a_user_within_the_interval_belongs_to_the_sequence() -> None:
    row = [
        placed("a", "12:00:00", user_id=5),
        placed("b", "12:00:01", user_id=6),
        placed("c", "12:00:02", user_id=7),
        placed("d", "12:00:10", user_id=5),
        placed("e", "12:00:12", user_id=7),
        placed("f", "12:00:12.000001", user_id=6),
    ]
    sequential = {order_id for order_id, found in reasons(row).items() if "sequential_users" in found}
    assert sequential == set("abcdef")
    without = [order for order in row if order.order_id != "d"]
    assert {order_id for order_id, found in reasons(without).items() if "sequential_users" in found} == set("abc")


def test_users_are_together_only_over_one_product_and_one_quantity() -> None:
    users = [placed("a", user_id=5), placed("b", user_id=6)]
    assert reasons([*users, placed("c", user_id=7, product_id=2)]) == {}
    assert reasons([*users, placed("c", user_id=7, quantity=2)]) == {}


def test_coordinated_users_are_different_users() -> None:
    same = [placed("a", user_id=5), placed("b", user_id=9), placed("c", "12:00:20", user_id=5)]
    assert reasons(same) == {}
    several = [*same, placed("d", "12:00:10", user_id=13), placed("e", "12:00:10", user_id=13)]
    assert reasons(several) == {order_id: ["coordinated_users"] for order_id in "abde"}


def test_each_rule_has_an_interval_of_its_own() -> None:
    rules = six_rules(
        version="test",
        sequential_users=SequentialUsers(users=2, within=timedelta(seconds=1)),
        coordinated_users=CoordinatedUsers(users=2, within=timedelta(seconds=5)),
    )
    pair = [placed("a", user_id=5), placed("b", "12:00:05", user_id=6)]
    assert reasons(pair, rules) == {order_id: ["coordinated_users"] for order_id in "ab"}


def test_reasons_add_up_and_are_sorted() -> None:
    burst = [placed(order_id, "00:00:00", country="MY", quantity=101) for order_id in "abc"]
    assert reasons(burst)["a"] == ["foreign_country", "night_quantity", "repeat_purchase"]


# --- every set of orders ------------------------------------------------------------------------------------------


@given(data=st.data(), rules=rule_sets())
def test_one_more_order_never_takes_a_reason_away(data: st.DataObject, rules: FraudRules) -> None:
    everything = data.draw(orders(rules))
    before = screen(everything[:-1], rules)
    after = screen(everything, rules)
    for order_id, verdict in before.items():
        assert set(verdict.reasons) <= set(after[order_id].reasons)


@given(data=st.data(), rules=rule_sets())
def test_no_order_matters_to_one_of_another_product_or_further_away_than_the_widest_interval(
    data: st.DataObject, rules: FraudRules
) -> None:
    everything = data.draw(orders(rules))
    for order_id, verdict in screen(everything, rules).items():
        near = [
            other
            for other in everything
            if other.product_id == verdict.product_id and abs(other.event_ts - verdict.event_ts) <= rules.widest_window
        ]
        assert screen(near, rules)[order_id] == verdict


@given(data=st.data(), drawn=order_sets())
def test_the_order_of_the_messages_changes_nothing(data: st.DataObject, drawn: OrderSet) -> None:
    shuffled = data.draw(shuffles(drawn.messages))
    assert judge(shuffled, drawn.rules) == judge(drawn.messages, drawn.rules)


@given(drawn=order_sets())
def test_every_message_is_an_order_a_duplicate_or_a_dead_letter(drawn: OrderSet) -> None:
    judgement = judge(drawn.messages, drawn.rules)
    assert len(judgement.orders) + judgement.duplicates + len(judgement.dead_letters) == len(drawn.messages)
    assert all((verdict.status == "Fraud") == bool(verdict.reasons) for verdict in judgement.orders.values())


@given(drawn=order_sets(on_time=True))
def test_on_time_messages_come_within_lateness_of_the_newest_event(drawn: OrderSet) -> None:
    newest = datetime.min.replace(tzinfo=UTC)
    for received in drawn.messages:
        event_ts = read(received, drawn.rules.max_future_skew).event_ts
        newest = max(newest, event_ts)
        assert event_ts >= newest - drawn.rules.lateness


@given(data=st.data(), rules=rule_sets(), spelling=st.integers(0, 1_000))
def test_every_spelling_of_an_order_says_the_same(data: st.DataObject, rules: FraudRules, spelling: int) -> None:
    order = data.draw(orders(rules, max_size=1))[0]
    received = order.event_ts + timedelta(seconds=1)
    respelled = read(message(spelled(order, spelling), timestamp=received), MAX_FUTURE_SKEW)
    assert respelled.content == order.content
