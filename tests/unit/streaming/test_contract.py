"""The order contract: every kind of message, read one by one and in company, against the independent judge. No JVM."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming.contract import DEAD_LETTER_SCHEMA, MESSAGE_COLUMNS, ORDER_SCHEMA, Contents, read_messages
from tests.oracle.bad_messages import (
    BAD,
    MAX_FUTURE_SKEW,
    RECEIVED,
    BadMessage,
    encoded,
    good,
    message,
    mutations,
    unusual,
)
from tests.oracle.brute_force import Message, Order, Unreadable, read
from tests.oracle.order_sets import OrderSet, order_sets

SPARK_TYPES = {
    "topic": pa.string(),
    "partition": pa.int32(),
    "offset": pa.int64(),
    "timestamp": pa.timestamp("us", "UTC"),
    "value": pa.binary(),
}


def contents(messages: Sequence[Message], max_future_skew: timedelta = MAX_FUTURE_SKEW) -> Contents:
    """What the contract makes of messages that come as Spark's Kafka source hands them over."""
    columns = {name: pa.array([getattr(m, name) for m in messages], SPARK_TYPES[name]) for name in MESSAGE_COLUMNS}
    return read_messages(pa.RecordBatch.from_pydict(columns), max_future_skew)


def contents_of(values: Sequence[bytes | None]) -> Contents:
    return contents([message(value, offset=offset) for offset, value in enumerate(values)])


def orders_of(result: Contents) -> dict[tuple[int, int], Order]:
    """The orders read, by partition and offset."""
    columns = list(Order.__dataclass_fields__)
    rows = result.orders.iter_rows(named=True)
    return {(row["partition"], row["offset"]): Order(**{name: row[name] for name in columns}) for row in rows}


def judged(message: Message, max_future_skew: timedelta) -> Order | None:
    try:
        return read(message, max_future_skew)
    except Unreadable:
        return None


def assert_agrees(messages: Sequence[Message], max_future_skew: timedelta = MAX_FUTURE_SKEW) -> None:
    """Each message is the same order to both readers, or a dead letter to both: bytes, place and a reason kept."""
    result = contents(messages, max_future_skew)
    read_orders = orders_of(result)
    letters = {(row["partition"], row["offset"]): row for row in result.dead_letters.iter_rows(named=True)}
    assert len(result.orders) + len(result.dead_letters) == len(messages)
    for one in messages:
        place = (one.partition, one.offset)
        order = judged(one, max_future_skew)
        assert read_orders.get(place) == order, one.value
        if order is None:
            assert letters[place]["value"] == one.value
            assert letters[place]["reason"]


# --- good messages ------------------------------------------------------------------------------------------------


def test_a_good_message_becomes_an_order_with_the_types_of_the_contract() -> None:
    result = contents([message(encoded(good()), offset=7)])
    assert result.orders.schema == ORDER_SCHEMA
    assert result.dead_letters.schema == DEAD_LETTER_SCHEMA
    assert result.dead_letters.is_empty()
    assert result.orders.row(0, named=True) == {
        "order_id": "good-1",
        "user_id": 17,
        "product_id": 203,
        "quantity": 2,
        "amount": "Rp.1.250.000",
        "amount_numeric": 1_250_000,
        "country": "ID",
        "created_date": datetime.fromisoformat("2026-10-31T03:15:30Z"),
        "event_ts": datetime.fromisoformat("2026-10-31T03:15:30.123456Z"),
        "source": "web",
        "partition": 0,
        "offset": 7,
        "received_at": RECEIVED,
    }


def test_no_messages_are_no_orders_and_no_dead_letters() -> None:
    result = contents([])
    assert (result.orders.schema, result.dead_letters.schema) == (ORDER_SCHEMA, DEAD_LETTER_SCHEMA)
    assert result.orders.is_empty()
    assert result.dead_letters.is_empty()


@pytest.mark.parametrize(("name", "value"), unusual())
def test_an_odd_message_that_keeps_the_contract_is_an_order(name: str, value: bytes) -> None:
    assert orders_of(contents([message(value)])) == {(0, 0): read(message(value), MAX_FUTURE_SKEW)}


@pytest.mark.parametrize("name", ["event_ts", "created_date"])
def test_a_time_may_be_ahead_of_kafkas_by_the_skew_and_no_more(name: str) -> None:
    limit = RECEIVED + MAX_FUTURE_SKEW
    at_limit = encoded(good("at", **{name: limit.isoformat()}))
    beyond = encoded(good("beyond", **{name: (limit + timedelta(microseconds=1)).isoformat()}))
    result = contents_of([at_limit, beyond])
    assert result.orders["order_id"].to_list() == ["at"]
    assert result.dead_letters["offset"].to_list() == [1]
    assert name in result.dead_letters["reason"][0]


# --- bad messages -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)
def test_every_kind_of_bad_message_is_a_dead_letter_and_its_neighbours_are_orders(bad: BadMessage) -> None:
    result = contents_of([encoded(good("before")), bad.value, encoded(good("after"))])
    assert result.orders["order_id"].to_list() == ["before", "after"]
    letter = result.dead_letters.row(0, named=True)
    assert (letter["topic"], letter["partition"], letter["offset"]) == ("orders", 0, 1)
    assert (letter["value"], letter["received_at"]) == (bad.value, RECEIVED)
    assert bad.words.lower() in letter["reason"].lower()
    assert letter["reason"]


def test_bad_messages_do_not_cancel_each_other_out() -> None:
    """All kinds in one run, each after a good one: nothing shifts from one row to another."""
    values = [value for number, bad in enumerate(BAD) for value in (encoded(good(f"good-{number}")), bad.value)]
    result = contents_of(values)
    assert result.orders["order_id"].to_list() == [f"good-{number}" for number in range(len(BAD))]
    assert result.orders["offset"].to_list() == [2 * number for number in range(len(BAD))]
    assert result.dead_letters["value"].to_list() == [bad.value for bad in BAD]


def test_a_run_of_nothing_but_bad_messages_holds_no_order() -> None:
    result = contents_of([bad.value for bad in BAD])
    assert result.orders.is_empty()
    assert len(result.dead_letters) == len(BAD)


def test_the_position_of_a_dead_letter_is_kept() -> None:
    record = Message("orders", 3, 41, RECEIVED, b"\xff\x00key", b"not json")
    letter = contents([record]).dead_letters.row(0, named=True)
    assert (letter["partition"], letter["offset"]) == (3, 41)


# --- against the judge --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_mutated_messages_are_good_or_bad_as_the_judge_says(seed: int) -> None:
    values = [mutation.value for mutation in mutations(seed, 300)]
    assert_agrees([message(value, offset=offset) for offset, value in enumerate(values)])


@given(drawn=order_sets())
def test_orders_in_any_words_are_read_as_the_judge_reads_them(drawn: OrderSet) -> None:
    assert_agrees(drawn.messages, drawn.rules.max_future_skew)


def pieces(*texts: str, longest: int = 4) -> st.SearchStrategy[str]:
    """Texts put together from pieces that make sense here, or nearly do."""
    return st.lists(st.sampled_from(texts), max_size=longest).map("".join)


AMOUNTS = st.one_of(
    pieces("Rp", "rp", ".", ". ", " ", "IDR", "1", "0", "12", ".000", ",", "-", "\n", "\uff10", "\u0131", "R"),
    st.builds(
        str.__add__,
        st.sampled_from(("", "Rp", "Rp.", "rP. ", "IDR ", "Rp ", "idr", "Rp  ")),
        st.integers(0, 2**63).map(str) | st.integers(0, 2**63).map(lambda rupiah: f"{rupiah:,}".replace(",", ".")),
    ),
)
IDS = pieces("U", "P", "u", "0", "1", "17", "-", " ", "\u0663", "9223372036854775807", "9223372036854775808", "\n")
TIMES = st.builds(
    lambda day, separator, time, fraction, offset: day + separator + time + fraction + offset,
    st.sampled_from(
        ("2026-10-31", "2024-02-29", "2026-02-29", "0001-01-01", "9999-12-31", "0000-01-01", "1969-12-31", "2026-1-1")
    ),
    st.sampled_from(("T", "t", " ", "", "_")),
    st.sampled_from(("10:15:30", "00:00:00", "23:59:59", "24:00:00", "23:59:60", "10:15", "10", "1:2:3", "10:60:00")),
    st.sampled_from(("", ".1", ".123456", ".1234567", ".999999999", ".", ",5", "." + "1" * 30, ".1e3")),
    st.sampled_from(
        ("Z", "z", "+07:00", "-0700", "+07", "+7", "-00:00", "+23:59", "+24:00", "+07:60", "", "+07:00:30", " Z", "UTC")
    ),
)
CHANGES: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.fixed_dictionaries({"amount": AMOUNTS, "amount_numeric": st.none()}),
    st.fixed_dictionaries({"user_id": IDS | st.integers(-1, 2**64), "product_id": IDS | st.integers(1, 2**64)}),
    st.fixed_dictionaries({"event_ts": TIMES}),
    st.fixed_dictionaries({"created_date": TIMES}),
    st.fixed_dictionaries({"country": pieces("I", "D", "id", "\u00ce", " ", "\n", longest=3)}),
    st.fixed_dictionaries({"order_id": st.text(max_size=300), "source": st.text(max_size=300)}),
    st.dictionaries(
        st.sampled_from(list(good())),
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        min_size=1,
        max_size=2,
    ),
)


@given(drawn=st.lists(CHANGES, min_size=1, max_size=20))
def test_fields_with_nearly_right_values_are_read_as_the_judge_reads_them(drawn: list[dict[str, Any]]) -> None:
    values = [encoded(good(f"order-{number}") | change) for number, change in enumerate(drawn)]
    assert_agrees([message(value, offset=offset) for offset, value in enumerate(values)])


@given(drawn=st.lists(st.binary(max_size=40) | st.none() | st.text(max_size=20).map(str.encode), max_size=20))
def test_arbitrary_bytes_are_dead_letters(drawn: list[bytes | None]) -> None:
    assert_agrees([message(value, offset=offset) for offset, value in enumerate(drawn)])
