"""Declared fields: from the bytes of a message, through rules and state, to what is announced. No JVM."""

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import polars as pl
import pyarrow as pa
import pytest

from conf.conditions import Declared
from conf.rules import FraudRules
from streaming.contract import NOTHING_DECLARED, UTC_MICROSECONDS, Contents, read_messages
from streaming.rules.conditions import with_declared_fields
from streaming.screening.chunks import pack_arrivals, unpack_arrivals
from streaming.screening.division import By, Division
from streaming.screening.pipeline import read_arrivals, screen_arrivals
from streaming.screening.recent import NOTHING_RECENT, Recent
from streaming.screening.sinks import encode_verdicts
from streaming.screening.state import MicroBatch, in_todays_form
from tests.oracle.bad_messages import encoded, good

FIELDS: Declared = {"device_id": "string", "tries": "int", "score": "number", "trusted": "bool"}
NOON = datetime(2026, 11, 1, 12, tzinfo=UTC)


def batch(*values: bytes) -> pa.RecordBatch:
    """Messages as Spark's Kafka source gives them."""
    columns = {
        "topic": pa.array(["orders"] * len(values)),
        "partition": pa.array([0] * len(values), pa.int32()),
        "offset": pa.array(range(len(values)), pa.int64()),
        "timestamp": pa.array([NOON] * len(values), pa.timestamp("us", "UTC")),
    }
    return pa.record_batch(columns | {"value": pa.array(values, pa.binary())})


def read(*values: bytes, declared: Declared = FIELDS) -> Contents:
    return read_messages(batch(*values), timedelta(seconds=60), NOON, declared)


def with_fields(**fields: Any) -> bytes:
    return encoded(good(**fields))


# --- the message -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        (
            {"device_id": "d1", "tries": 3, "score": 0.5, "trusted": True},
            '{"device_id":"d1","score":0.5,"tries":3,"trusted":true}',
        ),
        ({"tries": -(2**63), "device_id": None}, f'{{"tries":{-(2**63)}}}'),
        ({"score": 7, "other": "ignored"}, '{"score":7.0}'),
        ({"device_id": ""}, '{"device_id":""}'),
        (
            {"device_id": 'a"b\\u0000}\n€'},
            json.dumps({"device_id": 'a"b\\u0000}\n€'}, separators=(",", ":"), ensure_ascii=False),
        ),
        ({"device_id": None}, None),
        ({}, None),
    ],
)
def test_an_order_keeps_those_of_the_declared_fields_that_it_has(fields: dict[str, Any], kept: str | None) -> None:
    contents = read(with_fields(**fields), with_fields(order_id="plain"))
    assert contents.dead_letters.is_empty()
    assert contents.orders["attributes"].to_list() == [kept, None]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"device_id": 5}, "breaks the contract: Expected `str | null`, got `int` - at `$.device_id`"),
        ({"device_id": {"id": "d"}}, "breaks the contract: Expected `str | null`, got `object` - at `$.device_id`"),
        ({"device_id": "x" * 1_025}, "breaks the contract: Expected `str` of length <= 1024 - at `$.device_id`"),
        ({"device_id": "a\0b"}, "device_id holds a NUL character"),
        ({"tries": "3"}, "breaks the contract: Expected `int | null`, got `str` - at `$.tries`"),
        ({"tries": 2**63}, "at `$.tries`"),
        ({"tries": 1.5}, "breaks the contract: Expected `int | null`, got `float` - at `$.tries`"),
        ({"score": True}, "breaks the contract: Expected `float | null`, got `bool` - at `$.score`"),
        ({"trusted": 1}, "breaks the contract: Expected `bool | null`, got `int` - at `$.trusted`"),
    ],
)
def test_a_field_of_another_type_is_a_dead_letter_that_names_it(fields: dict[str, Any], reason: str) -> None:
    value = with_fields(**fields)
    contents = read(value, with_fields(order_id="beside"))
    assert contents.orders["order_id"].to_list() == ["beside"]
    (found,) = contents.dead_letters.to_dicts()
    assert reason in found["reason"]
    assert found["value"] == value
    assert read(value, declared=NOTHING_DECLARED).orders["attributes"].to_list() == [None], "nobody declared it"


def test_of_a_field_that_comes_twice_the_last_counts() -> None:
    twice = with_fields(device_id="last").replace(b"{", b'{"device_id": 5, ', 1)
    assert read(twice).orders["attributes"].to_list() == ['{"device_id":"last"}']


# --- rules -----------------------------------------------------------------------------------------------------------


def test_a_field_that_was_kept_as_one_of_another_kind_is_null() -> None:
    texts = ['{"x":"7"}', '{"x":7}', '{"x":0.5}', '{"x":true}', '{"x":"soon"}', "{}", None]
    orders = pl.DataFrame({"attributes": pl.Series(texts, dtype=pl.String)})

    def as_kind(kind: Any) -> list[Any]:
        return with_declared_fields(orders, {"x": kind})["x"].to_list()

    assert as_kind("string") == ["7", "7", "0.5", "true", "soon", None, None]
    assert as_kind("int") == [7, 7, None, None, None, None, None]
    assert as_kind("number") == [7.0, 7.0, 0.5, None, None, None, None]
    assert as_kind("bool") == [None, None, None, True, None, None, None]


RULES: dict[str, Any] = {
    "bad_device": {"when": "device_id = 'd666' or score > 0.9"},
    "one_device": {"by": ["product_id", "device_id"], "distinct": {"of": "user_id", "at_least": 2, "within": "10 s"}},
    "many_devices": {"by": ["user_id", "product_id"], "distinct": {"of": "device_id", "at_least": 3, "within": "10 s"}},
    "tries": {"by": ["product_id", "trusted"], "sum": {"of": "tries", "at_least": 10, "within": "10 s"}, "when": "not trusted"},
}


def rules_of(version: str = "1", fields: Declared = FIELDS, names: tuple[str, ...] = tuple(RULES)) -> FraudRules:
    return FraudRules.model_validate({"version": version, "fields": fields, "rules": {name: RULES[name] for name in names}})


@dataclass
class Stream:
    """Micro-batch after micro-batch; `verdicts` are those of the last one."""

    recents: dict[int, Recent] = field(default_factory=lambda: {0: NOTHING_RECENT})
    number: int = 0
    verdicts: pl.DataFrame = field(default_factory=pl.DataFrame)

    def feed(self, rules: FraudRules, *values: bytes) -> dict[str, str]:
        """Order → reasons, of the orders that have a verdict now."""
        arrivals = unpack_arrivals(pack_arrivals(read_arrivals(batch(*values), rules, NOON)))
        step = MicroBatch("query", Division(By.PRODUCT, 1), self.number)
        outcome = screen_arrivals([arrivals], self.recents, step, NOON, rules, None)
        self.recents, self.verdicts, self.number = outcome.recents, outcome.verdicts, self.number + 1
        return dict(outcome.verdicts.select("order_id", "given").iter_rows())


def order(order_id: str, user_id: int = 1, second: int = 0, **fields: Any) -> bytes:
    moment = f"2026-11-01T11:00:{second:02}Z"
    return encoded(good(order_id, user_id=user_id, created_date=moment, event_ts=moment, **fields))


def test_conditions_and_patterns_look_at_declared_fields_and_who_lacks_one_takes_no_part() -> None:
    found = Stream().feed(
        rules_of(),
        order("bad", device_id="d666", second=0),
        order("risky", user_id=2, score=0.95, second=1),
        order("a", user_id=3, device_id="d1", second=2),
        order("b", user_id=4, device_id="d1", second=3),
        order("c", user_id=3, device_id="d2", second=4),
        order("d", user_id=3, device_id="d3", second=5),
        order("e", user_id=8, tries=6, trusted=False, second=6),
        order("f", user_id=9, tries=4, trusted=False, second=7),
        order("g", user_id=10, tries=9, trusted=True, second=8),
        order("h", user_id=11, tries=9, second=9),
    )
    assert found == {
        "bad": "bad_device",
        "risky": "bad_device",
        "a": "many_devices,one_device",
        "b": "one_device",
        "c": "many_devices",
        "d": "many_devices",
        "e": "tries",
        "f": "tries",
        "g": "",
        "h": "",
    }


def test_the_state_holds_declared_fields_and_a_revision_says_them_again() -> None:
    stream, rules = Stream(), rules_of()
    assert stream.feed(rules, order("a", user_id=3, device_id="d1")) == {"a": ""}
    assert stream.feed(rules, order("b", user_id=4, device_id="d1", second=5)) == {"a": "one_device", "b": "one_device"}
    stored = stream.verdicts.with_columns(screened_at=pl.lit(NOON).cast(UTC_MICROSECONDS))
    encoded_verdicts = encode_verdicts(stored, "1").rows(named=True)
    assert [json.loads(row["verdict"])["attributes"] for row in encoded_verdicts] == [{"device_id": "d1"}] * 2
    alert = json.loads(encoded_verdicts[0]["alert"])
    assert (alert["attributes"], alert["evidence"]["one_device"]["value"]) == ({"device_id": "d1"}, 2)


def test_what_has_no_declared_fields_says_nothing_of_them() -> None:
    stream = Stream()
    stream.feed(rules_of(), order("a", device_id="d666"), order("b", second=40))
    stored = stream.verdicts.with_columns(screened_at=pl.lit(NOON).cast(UTC_MICROSECONDS))
    with_some = [json.loads(verdict) for verdict in encode_verdicts(stored, "1")["verdict"]]
    assert ["attributes" in verdict for verdict in with_some] == [True, False]
    none = encode_verdicts(stored.with_columns(attributes=pl.lit(None, pl.String)), "1")["verdict"].to_list()
    assert json.loads(none[1]) == with_some[1]
    assert json.loads(none[0]) == {name: said for name, said in with_some[0].items() if name != "attributes"}


def test_a_field_that_is_declared_while_the_stream_runs_is_known_of_orders_from_then_on() -> None:
    stream = Stream()
    before = rules_of("1", {"tries": "int"}, ())
    assert stream.feed(before, order("a", user_id=3, device_id="d1", tries=1)) == {"a": ""}
    after = rules_of("2")
    assert stream.feed(after, order("b", user_id=4, device_id="d1", second=2)) == {"b": ""}
    assert stream.feed(after, order("c", user_id=5, device_id="d1", second=4)) == {"b": "one_device", "c": "one_device"}
    retyped = rules_of("3", {**FIELDS, "device_id": "int"}, ("one_device",))
    assert stream.feed(retyped, order("d", user_id=6, device_id=1, second=6)) == {"d": ""}
    assert stream.feed(rules_of("4", {}, ()), order("e", user_id=7, device_id="d1", second=8)) == {"e": ""}


def test_a_segment_of_format_3_has_no_suppressed_reasons_and_one_of_format_2_no_declared_fields() -> None:
    stream = Stream()
    stream.feed(rules_of(), order("a"))
    (segment,) = stream.recents[0].segments
    assert in_todays_form(segment.orders.drop("attributes", "suppressed")).equals(segment.orders)
    assert in_todays_form(segment.orders.drop("suppressed")).equals(segment.orders)
