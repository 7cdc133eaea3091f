"""The order contract: every kind of message, read one by one and in company, against the independent judge. No JVM."""

import json
import re
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming.contract import (
    CLASH_SCHEMA,
    DEAD_LETTER_SCHEMA,
    EARLIEST,
    LATEST,
    MESSAGE_COLUMNS,
    ORDER_SCHEMA,
    TIME_OF_READING,
    Contents,
    clash_dead_letters,
    read_messages,
)
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
from tests.oracle.brute_force import LONG_AFTER, NO_TIMESTAMP, Message, Order, Unreadable, read
from tests.oracle.order_sets import OrderSet, order_sets

SPARK_TYPES = {
    "topic": pa.string(),
    "partition": pa.int32(),
    "offset": pa.int64(),
    "timestamp": pa.timestamp("us", "UTC"),
    "value": pa.binary(),
}


def contents(
    messages: Sequence[Message], max_future_skew: timedelta = MAX_FUTURE_SKEW, read_at: datetime = LONG_AFTER
) -> Contents:
    """What the contract makes of messages that come as Spark's Kafka source hands them over."""
    columns = {name: pa.array([getattr(m, name) for m in messages], SPARK_TYPES[name]) for name in MESSAGE_COLUMNS}
    return read_messages(pa.RecordBatch.from_pydict(columns), max_future_skew, read_at)


def contents_of(values: Sequence[bytes | None]) -> Contents:
    return contents([message(value, offset=offset) for offset, value in enumerate(values)])


def orders_of(result: Contents) -> dict[tuple[int, int], Order]:
    """The orders read, by partition and offset."""
    columns = list(Order.__dataclass_fields__)
    rows = result.orders.iter_rows(named=True)
    return {(row["partition"], row["offset"]): Order(**{name: row[name] for name in columns}) for row in rows}


def judged(message: Message, max_future_skew: timedelta, read_at: datetime) -> Order | None:
    try:
        return read(message, max_future_skew, read_at)
    except Unreadable:
        return None


def assert_agrees(
    messages: Sequence[Message], max_future_skew: timedelta = MAX_FUTURE_SKEW, read_at: datetime = LONG_AFTER
) -> None:
    """Each message is the same order to both readers, or a dead letter to both: bytes, place and a reason kept."""
    result = contents(messages, max_future_skew, read_at)
    read_orders = orders_of(result)
    dead_letters = {(row["partition"], row["offset"]): row for row in result.dead_letters.iter_rows(named=True)}
    assert len(result.orders) + len(result.dead_letters) == len(messages)
    for one in messages:
        place = (one.partition, one.offset)
        order = judged(one, max_future_skew, read_at)
        assert read_orders.get(place) == order, one.value
        if order is None:
            assert dead_letters[place]["value"] == one.value
            assert dead_letters[place]["reason"]


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
        "attributes": None,
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


@pytest.mark.parametrize("name", ["event_ts", "created_date"])
def test_a_kafka_timestamp_that_lies_in_the_future_does_not_vouch_for_a_time_of_the_order(name: str) -> None:
    """Where the topic carries the producer's timestamps, one clock gives both."""
    ahead = RECEIVED + timedelta(minutes=50)
    honest, from_the_future = good("honest"), good("ahead", **{name: ahead.isoformat()})
    messages = [message(encoded(one), offset=offset, timestamp=ahead) for offset, one in enumerate((honest, from_the_future))]
    result = contents(messages, read_at=RECEIVED)
    assert result.orders["order_id"].to_list() == ["honest"]
    assert result.dead_letters["reason"].to_list() == [
        f"{name} lies in the future of 2026-11-01T03:00:00.000000Z, when it was read, as its Kafka timestamp does"
    ]


def test_a_message_without_a_kafka_timestamp_is_judged_by_the_time_of_reading() -> None:
    at_limit, beyond = (
        message(encoded(good(str(more), event_ts=(RECEIVED + MAX_FUTURE_SKEW + more).isoformat())), timestamp=NO_TIMESTAMP)
        for more in (timedelta(0), timedelta(microseconds=1))
    )
    result = contents([at_limit, beyond], read_at=RECEIVED)
    assert result.orders["order_id"].to_list() == ["0:00:00"]
    assert result.dead_letters["reason"].to_list() == [
        "event_ts lies in the future of 2026-11-01T03:00:00.000000Z, when it was read; it has no Kafka timestamp"
    ]


def test_which_timestamp_an_order_is_ahead_of_is_the_earlier_one() -> None:
    late = good("late", event_ts=(RECEIVED + timedelta(hours=1)).isoformat())
    result = contents([message(encoded(late))], read_at=RECEIVED + timedelta(days=1))
    assert result.dead_letters["reason"].to_list() == ["event_ts lies in the future of its Kafka timestamp"]


FAR_US = {"before the year 1": -63_000_000_000_000_000, "after the year 9999": 1_764_000_000_000_000_000}


@pytest.mark.parametrize("when", FAR_US)
def test_a_dead_letter_names_a_kafka_timestamp_that_no_calendar_holds_and_is_dated_within_it(when: str) -> None:
    stamped = batch([b"not json", encoded(good())], timestamp_us=FAR_US[when])
    result = read_messages(stamped, MAX_FUTURE_SKEW, RECEIVED)
    dead_letter = result.dead_letters.row(0, named=True)
    assert dead_letter["reason"].endswith(f"(its Kafka timestamp lies {when})")
    assert dead_letter["received_at"] == (EARLIEST if "before" in when else LATEST)
    is_order = "after" in when
    assert result.orders["order_id"].to_list() == ["good-1"] * is_order
    assert len(clash_dead_letters(stamped, pl.DataFrame([(0, 1, "good-1")], CLASH_SCHEMA, orient="row"))) == 1


def test_an_order_of_the_last_year_is_not_vouched_for_by_a_timestamp_in_microseconds() -> None:
    stamped = batch([encoded(good(event_ts="9999-12-31T00:00:00Z"))], timestamp_us=FAR_US["after the year 9999"])
    result = read_messages(stamped, MAX_FUTURE_SKEW, RECEIVED)
    assert result.orders.is_empty()
    assert re.search(TIME_OF_READING, result.dead_letters["reason"][0])


def batch(values: Sequence[bytes], *, timestamp_us: int) -> pa.RecordBatch:
    """Values in one partition, with one Kafka timestamp, as Spark gives them: it may be one that no datetime holds."""
    columns = {
        "topic": ["orders"] * len(values),
        "partition": [0] * len(values),
        "offset": list(range(len(values))),
        "timestamp": [timestamp_us] * len(values),
        "value": list(values),
    }
    return pa.RecordBatch.from_pydict({name: pa.array(rows, SPARK_TYPES[name]) for name, rows in columns.items()})


# --- bad messages -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)
def test_every_kind_of_bad_message_is_a_dead_letter_and_its_neighbours_are_orders(bad: BadMessage) -> None:
    result = contents_of([encoded(good("before")), bad.value, encoded(good("after"))])
    assert result.orders["order_id"].to_list() == ["before", "after"]
    dead_letter = result.dead_letters.row(0, named=True)
    assert (dead_letter["topic"], dead_letter["partition"], dead_letter["offset"]) == ("orders", 0, 1)
    assert (dead_letter["value"], dead_letter["received_at"]) == (bad.value, RECEIVED)
    assert bad.words.lower() in dead_letter["reason"].lower()
    assert dead_letter["reason"]


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
    dead_letter = contents([record]).dead_letters.row(0, named=True)
    assert (dead_letter["partition"], dead_letter["offset"]) == (3, 41)


# --- against the judge --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_mutated_messages_are_good_or_bad_as_the_judge_says(seed: int) -> None:
    values = [mutation.value for mutation in mutations(seed, 300)]
    assert_agrees([message(value, offset=offset) for offset, value in enumerate(values)])


@given(
    drawn=st.lists(
        st.tuples(*(st.sampled_from((0, 59, 60, 61, 3_000, 10**12, -(10**12), None)) for _ in range(3))), min_size=1, max_size=8
    )
)
def test_orders_of_any_clocks_are_read_as_the_judge_reads_them(drawn: list[tuple[int | None, ...]]) -> None:
    """Seconds that the event, the creation and the Kafka timestamp lie ahead of the reading; None: there is no timestamp."""
    messages = []
    for offset, (event, created, stamped) in enumerate(drawn):
        times = {"event_ts": moved(event or 0).isoformat(), "created_date": moved(created or 0).isoformat()}
        timestamp = NO_TIMESTAMP if stamped is None else moved(stamped)
        messages.append(message(encoded(good(f"order-{offset}", **times)), offset=offset, timestamp=timestamp))
    assert_agrees(messages, read_at=RECEIVED)


def moved(seconds: int) -> datetime:
    """So many seconds from RECEIVED; what lies beyond the calendar is its first or last moment."""
    try:
        return RECEIVED + timedelta(seconds=seconds)
    except OverflowError:
        return LATEST if seconds > 0 else EARLIEST


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


NAMES = st.sampled_from([*good(), "amount_numeric", "note"])
RAW_VALUES = st.one_of(
    st.sampled_from(list(good().values())).map(json.dumps),
    st.sampled_from(
        ("null", "0", "-1", "2", "1e400", '""', '"x"', "[]", '{"quantity": 0}', rf'"{chr(92)}ud800"', "nul", '"\0"')
    ),
)


@given(drawn=st.lists(st.tuples(st.lists(st.tuples(NAMES, RAW_VALUES), max_size=4), st.randoms()), max_size=12))
def test_of_a_name_given_more_than_once_the_last_value_counts_as_the_judge_says(drawn: list[tuple[Any, Any]]) -> None:
    """Whatever stands before it, as long as it is JSON."""
    values = []
    for number, (more, choose) in enumerate(drawn):
        pairs = [(name, json.dumps(value)) for name, value in good(f"order-{number}").items()]
        for pair in more:
            pairs.insert(choose.randint(0, len(pairs)), pair)
        values.append("{" + ", ".join(f'"{name}": {value}' for name, value in pairs) + "}")
    assert_agrees([message(value.encode(), offset=offset) for offset, value in enumerate(values)])


LAYERS = (("[", "]"), ('{"a":', "}"), ('["]}\\"]",', "]"), ("[[[]],", "]"), ('{"{{": [], "[": ', "}"))


@st.composite
def nested(draw: st.DrawFn) -> str:
    """JSON of about as many levels as a message may have, with brackets in texts and side by side."""
    layers = draw(st.lists(st.sampled_from(LAYERS), min_size=1, max_size=4)) * 110
    layers = layers[: draw(st.sampled_from((0, 1, 50, 97, 98, 99, 100, 101, 110)))]
    inner = draw(st.sampled_from(("1", '"[[[["', "[]", "[[]]", "")))
    return "".join(opening for opening, _ in layers) + inner + "".join(closing for _, closing in reversed(layers))


@given(drawn=st.lists(nested() | pieces("[", "{", "]", "}", '"', "\\", "[" * 98, "]" * 98, longest=8), max_size=6))
def test_what_is_nested_is_read_as_the_judge_reads_it(drawn: list[str]) -> None:
    values = [encoded(good(f"order-{number}", path="@@")).replace(b'"@@"', path.encode()) for number, path in enumerate(drawn)]
    assert_agrees([message(value, offset=offset) for offset, value in enumerate(values)])


def test_how_deep_a_message_may_be_nested_does_not_depend_on_how_deep_the_call_is() -> None:
    value = encoded(good(path="@@")).replace(b'"@@"', b"[" * 99 + b"]" * 99)

    def called(deeper: int) -> int:
        return called(deeper - 1) if deeper else len(contents_of([value]).orders)

    assert called(0) == called(600) == 1
