"""What is left of the messages of somebody who is forgotten: all that the contract reads, and nothing besides."""

from typing import Any

import msgspec
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming.contract import LATEST, NO_TIMESTAMP, Contents, read_messages
from streaming.lakehouse.erased_messages import ERASED_HEADER, Left, dead_letter_of, left_of
from streaming.lakehouse.tables import BRONZE
from tests.oracle.bad_messages import BAD
from tests.oracle.lakes import purchase
from tests.oracle.order_sets import spelled

WHO, SECRET = 7, b"xanthippe"
PLAIN = spelled(purchase("o1", WHO, 0))
FIELDS: dict[str, Any] = msgspec.json.decode(PLAIN)
HEADERS = pa.list_(pa.struct([("key", pa.string()), ("value", pa.binary())]))


def left(value: bytes | None, key: bytes | None = None, headers: list[tuple[str, bytes]] | None = None) -> Left | None:
    given_headers = None if headers is None else [{"key": name, "value": text} for name, text in headers]
    batch = pa.record_batch(
        {
            "value": pa.array([value], pa.binary()),
            "key": pa.array([key], pa.binary()),
            "headers": pa.array([given_headers], HEADERS),
        }
    )
    return left_of(batch, {WHO, 70, 10**18}, "2026-11-29T10:00:00+00:00").get(0)


def read(value: bytes) -> Contents:
    """A message as the contract reads it, long after it came: the order in it, or the dead letter."""
    places = {"topic": ["orders"], "partition": pa.array([0], pa.int32()), "offset": pa.array([0], pa.int64())}
    times = pa.array([NO_TIMESTAMP], pa.timestamp("us", "UTC"))
    batch = pa.record_batch(places | {"timestamp": times, "value": pa.array([value], pa.binary())})
    return read_messages(batch, LATEST - LATEST, LATEST)


def encoded(**fields: Any) -> bytes:
    return msgspec.json.encode(FIELDS | fields)


@pytest.mark.parametrize("spelling", range(12))
def test_an_order_is_read_as_before_and_holds_only_what_the_contract_names(spelling: int) -> None:
    value = spelled(purchase("o1", WHO, 0), spelling)
    found = left(value)
    if b"campaign" not in value:
        assert found is None
        return
    assert found is not None
    assert b"campaign" not in found.value
    assert read(found.value).orders.equals(read(value).orders)
    assert left(found.value, found.key, [(header["key"], header["value"]) for header in found.headers or ()]) is None


@pytest.mark.parametrize(
    "value",
    [
        encoded(note="xanthippe"),
        encoded(note={"deep": [{"xanthippe": None}]}, user_id=f"U{WHO}"),
        b'{"source": "xanthippe", ' + PLAIN[1:],
        PLAIN[:-1] + b', "big": 1' + b"0" * 5000 + b', "note": "xanthippe"}',
    ],
    ids=["a field", "nested", "a value that a later one replaces", "a number beyond Python's"],
)
def test_whatever_else_is_in_an_order_goes(value: bytes) -> None:
    found = left(value)
    assert found is not None
    assert SECRET not in found.value
    assert not found.is_dead_letter
    assert read(found.value).orders.equals(read(value).orders)


def test_declared_fields_go_and_what_broke_their_declaration_still_breaks_the_contract() -> None:
    values = [encoded(email="xanthippe@example.com"), encoded(email=["xanthippe"])]
    batch = pa.record_batch(
        {
            "value": pa.array(values, pa.binary()),
            "key": pa.array([None, None], pa.binary()),
            "headers": pa.array([None, None], HEADERS),
        }
    )
    found = left_of(batch, {WHO}, "2026-11-29T10:00:00+00:00", {"email": "string"})
    assert msgspec.json.decode(found[0].value) == FIELDS
    assert (found[1].value, found[1].is_dead_letter) == (dead_letter_of(WHO), True)


def test_headers_and_a_key_of_its_own_go_and_those_of_the_platform_stay() -> None:
    headers = [("label", b"night_amount,repeat_purchase"), ("trace", SECRET), ("label", b"Xanthippe of Athens")]
    found = left(PLAIN, SECRET, headers)
    assert found is not None
    assert (found.value, found.key) == (PLAIN, None)
    kept = [(header["key"], header["value"]) for header in found.headers or ()]
    assert kept == [headers[0], (ERASED_HEADER, b"2026-11-29T10:00:00+00:00")]
    for key in (b"5", b"o1", b"7", None):
        assert left(PLAIN, key, headers[:1]) is None
        assert left(PLAIN, key, []) is None


@pytest.mark.parametrize(
    "value",
    [
        encoded(quantity=0, note="xanthippe"),
        encoded(country="xanthippe"),
        encoded(user_id=f"u00{WHO}", source="xanthippe\0"),
        encoded(note="xanthippe")[:-9],
        msgspec.json.encode([FIELDS, "xanthippe"]),
        b'{"user\\u005fid": "U\\u0037", "note": "xanthippe"}',
        b'\xff{"user_id" : 7, "note": "xanthippe"}',
    ],
)
def test_of_a_message_that_breaks_the_contract_only_whose_it_was_is_left_and_it_still_breaks_it(value: bytes) -> None:
    assert read(value).orders.is_empty()
    found = left(value, SECRET, [("trace", SECRET)])
    assert found is not None
    assert (found.value, found.key, found.is_dead_letter, found.is_new) == (dead_letter_of(WHO), None, True, True)
    assert read(found.value).orders.is_empty()
    again = left(found.value, found.key, [(header["key"], header["value"]) for header in found.headers or ()])
    assert again is not None, "its letter may come into quarantine later"
    assert not again.is_new


@given(value=st.binary(max_size=60) | st.sampled_from([message.value for message in BAD]))
def test_messages_of_others_and_of_nobody_stay(value: bytes | None) -> None:
    if value and (b'"user_id"' in value or b"user" in value):
        return
    assert left(value, SECRET, [("trace", SECRET)]) is None
    for user_id in (77, 8, "U17", 700, 10**19):
        assert left(encoded(user_id=user_id, note="xanthippe"), SECRET, [("trace", SECRET)]) is None
        assert left(encoded(user_id=user_id, quantity=0, note="xanthippe"), SECRET, [("trace", SECRET)]) is None


def test_bronze_has_the_columns_that_are_looked_at() -> None:
    assert {"value", "key", "headers"} <= set(BRONZE.names)
