"""What is stored in `raw_orders` and announced of it, on a real Postgres and Kafka, without Spark."""

import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime, timedelta
from multiprocessing import get_context
from typing import Any

import msgspec
import polars as pl
import pytest

from batch.postgres import connect
from conf.settings import Settings
from streaming.contract import DEAD_LETTER_SCHEMA
from streaming.kafka import FRAUD_ALERT, ORDERS_DEAD_LETTER, PROCESSED_ORDERS, TOPICS, librdkafka_config
from streaming.screening.sinks import (
    Announcer,
    KafkaSink,
    Revised,
    Stored,
    encode_verdicts,
    revise,
    store,
    stored_orders,
)
from streaming.screening.verdicts import VERDICT_SCHEMA, reason_lists, reason_text
from tests.runs.screening import consume

BATCH_TIME = datetime(2026, 11, 1, 12, 0, 0, 123000, tzinfo=UTC)
RECEIVED = datetime(2026, 11, 1, 11, 59, tzinfo=UTC)


@pytest.fixture
def dsn(settings: Settings) -> str:
    return settings.require("postgres_dsn")


EVIDENCE = {"order_ids": ["a"], "value": 1, "limit": 1}


def verdict(
    order_id: str,
    *reasons: str,
    shadow: Sequence[str] = (),
    suppressed: Sequence[str] = (),
    offset: int = 0,
    revision: bool = False,
    **changes: Any,
) -> dict[str, Any]:
    every = sorted({*reasons, *shadow, *suppressed})
    return (
        {
            "order_id": order_id,
            "user_id": 1,
            "product_id": 1,
            "quantity": 2,
            "amount": "Rp.1.000",
            "amount_numeric": 1000,
            "country": "ID",
            "created_date": RECEIVED,
            "event_ts": RECEIVED,
            "source": 'it\'s a "test", {of} \\ things',
            "partition": 0,
            "offset": offset,
            "received_at": RECEIVED + timedelta(milliseconds=offset),
            "given": reason_text(reasons),
            "shadow": reason_text(shadow),
            "suppressed": reason_text(suppressed),
            "gained": reason_text(reasons),
            "shadow_gained": reason_text(shadow),
            "suppressed_gained": reason_text(suppressed),
            "revision": revision,
        }
        | {"evidence": json.dumps(dict.fromkeys(every, EVIDENCE)) if every else None}
        | changes
    )


def table(rows: Sequence[dict[str, Any]]) -> pl.DataFrame:
    return pl.DataFrame([{name: row.get(name) for name in VERDICT_SCHEMA} for row in rows], schema=VERDICT_SCHEMA)


def put(dsn: str, *rows: dict[str, Any], at: datetime = BATCH_TIME) -> Stored:
    return store(dsn, table(rows), "1", at)


def clashes_of(dsn: str, rows: Sequence[dict[str, Any]]) -> int:
    return len(put(dsn, *rows).clashes)


def places(outcome: Stored) -> list[tuple[int, int, str]]:
    return outcome.clashes.rows()


def standing(outcome: Stored) -> dict[str, list[str]]:
    verdicts = outcome.verdicts
    return dict(zip(verdicts["order_id"], reason_lists(verdicts["given"]).to_list(), strict=True))


def stored(dsn: str) -> dict[str, list[Any]]:
    with connect(dsn) as connection, connection.cursor() as cursor:
        cursor.execute("select order_id, status, reasons, screened_at from raw_orders")
        return {order_id: rest for order_id, *rest in cursor.fetchall()}


def test_a_revision_unites_reasons_and_a_replay_changes_nothing_and_is_announced_again(dsn: str) -> None:
    first = (verdict("a", "night_amount"), verdict("b", offset=1))
    assert standing(put(dsn, *first)) == {"a": ["night_amount"], "b": []}
    later = BATCH_TIME + timedelta(seconds=1)
    revisions = (verdict("a", "coordinated_users", revision=True), verdict("b", "repeat_purchase", offset=1, revision=True))
    united = {"a": ["coordinated_users", "night_amount"], "b": ["repeat_purchase"]}
    assert standing(put(dsn, *revisions, at=later)) == united
    expected = {order_id: ["Fraud", reasons, later] for order_id, reasons in united.items()}
    assert stored(dsn) == expected
    assert standing(put(dsn, *revisions, at=later)) == united
    assert standing(put(dsn, *first, at=later + timedelta(seconds=1))) == {}
    assert stored(dsn) == expected


def shadow_reasons(dsn: str) -> dict[str, tuple[str, list[str], list[str]]]:
    with connect(dsn) as connection, connection.cursor() as cursor:
        cursor.execute("select order_id, status, reasons, shadow_reasons from raw_orders")
        return {order_id: (status, reasons, shadow) for order_id, status, reasons, shadow in cursor.fetchall()}


def test_shadow_reasons_accumulate_beside_the_reasons_and_make_no_order_fraud(dsn: str) -> None:
    put(dsn, verdict("a", "night_amount"), verdict("b", shadow=["night_amount"], offset=1))
    assert shadow_reasons(dsn) == {"a": ("Fraud", ["night_amount"], []), "b": ("Genuine", [], ["night_amount"])}
    revisions = (
        verdict("a", shadow=["repeat_purchase"], revision=True),
        verdict("b", shadow=["coordinated_users"], offset=1, revision=True),
    )
    later = BATCH_TIME + timedelta(seconds=1)
    expected = {
        "a": ("Fraud", ["night_amount"], ["repeat_purchase"]),
        "b": ("Genuine", [], ["coordinated_users", "night_amount"]),
    }
    first, replayed = put(dsn, *revisions, at=later), put(dsn, *revisions, at=later)
    assert shadow_reasons(dsn) == expected
    for outcome in (first, replayed):
        shadow = dict(zip(outcome.verdicts["order_id"], reason_lists(outcome.verdicts["shadow"]).to_list(), strict=True))
        assert shadow == {order_id: found for order_id, (_, _, found) in expected.items()}
    put(dsn, verdict("b", "night_amount", offset=1, revision=True), at=later + timedelta(seconds=1))
    assert shadow_reasons(dsn)["b"] == ("Fraud", ["night_amount"], ["coordinated_users", "night_amount"])


def suppressed_reasons(dsn: str) -> dict[str, tuple[str, list[str], list[str]]]:
    with connect(dsn) as connection, connection.cursor() as cursor:
        cursor.execute("select order_id, status, reasons, suppressed_reasons from raw_orders")
        return {order_id: (status, reasons, suppressed) for order_id, status, reasons, suppressed in cursor.fetchall()}


@pytest.mark.parametrize("is_revision", [True, False])
def test_suppressed_reasons_accumulate_and_one_that_the_order_is_given_moves_whichever_comes_first(
    dsn: str, is_revision: bool
) -> None:
    """As revisions, which are written straight, and as orders that are known, which are compared first."""
    put(dsn, verdict("a", suppressed=["night_amount", "repeat_purchase"]), verdict("b", "night_amount", offset=1))
    assert suppressed_reasons(dsn) == {
        "a": ("Genuine", [], ["night_amount", "repeat_purchase"]),
        "b": ("Fraud", ["night_amount"], []),
    }
    later = (
        verdict("a", "repeat_purchase", suppressed=["coordinated_users"], revision=is_revision),
        verdict("b", suppressed=["night_amount", "repeat_purchase"], offset=1, revision=is_revision),
    )
    expected = {
        "a": ("Fraud", ["repeat_purchase"], ["coordinated_users", "night_amount"]),
        "b": ("Fraud", ["night_amount"], ["repeat_purchase"]),
    }
    for _ in range(2):
        outcome = put(dsn, *later, at=BATCH_TIME + timedelta(seconds=1))
        assert suppressed_reasons(dsn) == expected
        said = dict(zip(outcome.verdicts["order_id"], reason_lists(outcome.verdicts["suppressed"]).to_list(), strict=True))
        assert said == {order_id: suppressed for order_id, (_, _, suppressed) in expected.items()}
    before = stored(dsn)
    less = verdict("a", suppressed=["repeat_purchase", "night_amount"], revision=is_revision)
    put(dsn, less, at=BATCH_TIME + timedelta(seconds=9))
    assert stored(dsn) == before


def attributes(dsn: str) -> dict[str, Any]:
    with connect(dsn) as connection, connection.cursor() as cursor:
        cursor.execute("select order_id, attributes from raw_orders")
        return dict(cursor.fetchall())


def test_declared_fields_are_stored_as_json_and_of_an_order_sent_again_the_first_stand(dsn: str) -> None:
    device = '{"device_id":"a\\"b é","score":0.25,"trusted":false}'
    put(dsn, verdict("a", attributes=device), verdict("b", offset=1))
    again = put(dsn, verdict("a", "night_amount", attributes='{"device_id":"other"}'), at=BATCH_TIME + timedelta(seconds=1))
    assert again.clashes.is_empty()
    assert attributes(dsn) == {"a": {"device_id": 'a"b é', "score": 0.25, "trusted": False}, "b": None}
    put(dsn, verdict("c", attributes=device, offset=2), verdict("a", offset=0), at=BATCH_TIME + timedelta(seconds=2))
    assert attributes(dsn)["c"] == {"device_id": 'a"b é', "score": 0.25, "trusted": False}


def test_of_known_orders_only_what_this_batch_wrote_is_announced_as_it_stands(dsn: str) -> None:
    put(dsn, verdict("old", "night_amount"), verdict("older", "night_amount", offset=1))
    later = BATCH_TIME + timedelta(seconds=1)
    outcome = put(dsn, verdict("old", "repeat_purchase"), verdict("older", offset=1), verdict("new", offset=2), at=later)
    assert standing(outcome) == {"old": ["night_amount", "repeat_purchase"], "new": []}


def test_a_replay_of_new_orders_and_a_revision_is_announced_whole(dsn: str) -> None:
    put(dsn, verdict("a"))
    later = BATCH_TIME + timedelta(seconds=1)
    batch = (verdict("a", "repeat_purchase", revision=True), verdict("b", "repeat_purchase", offset=1))
    first, replayed = put(dsn, *batch, at=later), put(dsn, *batch, at=later)
    assert standing(first) == standing(replayed) == {"a": ["repeat_purchase"], "b": ["repeat_purchase"]}


@pytest.mark.parametrize("changes", [{"product_id": 2}, {"quantity": 3}, {"amount_numeric": 999}, {"event_ts": BATCH_TIME}])
def test_a_used_order_id_with_other_content_is_a_clash_and_nothing_is_stored(dsn: str, changes: dict[str, Any]) -> None:
    put(dsn, verdict("a", offset=3))
    outcome = put(dsn, verdict("b", offset=7), verdict("a", offset=8, **changes))
    assert places(outcome) == [(0, 8, "a")]
    assert set(stored(dsn)) == {"a"}
    assert standing(put(dsn, verdict("b", offset=7))) == {"b": []}


def test_of_two_new_orders_with_one_id_the_first_received_stands(dsn: str) -> None:
    assert places(put(dsn, verdict("a", offset=9, quantity=5), verdict("a", offset=4))) == [(0, 9, "a")]


def test_the_same_order_with_its_amount_in_other_words_is_no_clash(dsn: str) -> None:
    put(dsn, verdict("a"))
    assert put(dsn, verdict("a", amount="IDR 1000")).clashes.is_empty()


def test_what_is_stored_under_an_id_is_found_whatever_the_id_looks_like(dsn: str) -> None:
    ids = ["plain", 'a"b', "it's", "a,b", "{c}", "back\\slash", "\x1f", "toko é", "NULL"]
    put(dsn, *(verdict(order_id, offset=offset) for offset, order_id in enumerate(ids)))
    assert sorted(stored_orders(dsn, [*ids, "unknown"])["order_id"]) == sorted(ids)


def test_two_workers_that_meet_the_same_new_ids_end_with_one_order_each_and_the_other_knows(dsn: str) -> None:
    one = [verdict(str(number), offset=number) for number in range(2_000)]
    other = [verdict(str(number), offset=number, partition=1, product_id=2) for number in reversed(range(2_000))]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as workers:
        assert sorted(workers.map(clashes_of, [dsn, dsn], [one, other])) == [0, 2_000]
    assert len(stored(dsn)) == 2_000


def add(dsn: str, *rows: dict[str, Any], at: datetime, version: str = "2") -> Revised:
    return revise(dsn, table(rows), version, at)


def given(added: Revised) -> dict[str, list[Any]]:
    """What is answered: reasons, version and time of each order."""
    found = added.verdicts.with_columns(reasons=reason_lists(added.verdicts["given"]))
    columns = ("order_id", "reasons", "rules_version", "screened_at")
    return {order_id: rest for order_id, *rest in found.select(columns).rows()}


def test_further_reasons_are_united_with_those_there_and_answered_again_until_the_time_is_another(dsn: str) -> None:
    put(dsn, verdict("a", "night_amount"), verdict("b", offset=1), verdict("same", "night_amount", offset=2))
    later = BATCH_TIME + timedelta(seconds=9)
    further = [
        verdict("a", "repeat_purchase"),
        verdict("b", "night_amount", shadow=["repeat_purchase"]),
        verdict("same", "night_amount"),
    ]
    expected = {"a": [["night_amount", "repeat_purchase"], "2", later], "b": [["night_amount"], "2", later]}
    first, again = add(dsn, *further, at=later), add(dsn, *further, at=later)
    assert given(first) == given(again) == expected
    assert stored(dsn) == {order_id: ["Fraud", reasons, at] for order_id, (reasons, _, at) in expected.items()} | {
        "same": ["Fraud", ["night_amount"], BATCH_TIME]
    }
    assert shadow_reasons(dsn)["b"] == ("Fraud", ["night_amount"], ["repeat_purchase"])
    assert given(add(dsn, *further, at=later + timedelta(seconds=1))) == {}


def test_what_a_stream_has_added_at_the_same_time_is_answered_too_and_the_time_only_grows(dsn: str) -> None:
    put(dsn, verdict("before"), verdict("after", offset=1))
    later = BATCH_TIME + timedelta(seconds=9)
    newest = later + timedelta(seconds=5)  # of a stream, which has come first
    put(dsn, verdict("before", "night_amount", revision=True), at=newest)
    further = [verdict("before", "repeat_purchase"), verdict("after", "repeat_purchase")]
    grown = newest + timedelta(microseconds=1)
    assert given(add(dsn, *further, at=later)) == {
        "before": [["night_amount", "repeat_purchase"], "2", grown],
        "after": [["repeat_purchase"], "2", later],
    }
    assert standing(put(dsn, verdict("after", "night_amount", revision=True), at=newest)) == {
        "after": ["night_amount", "repeat_purchase"]
    }
    assert given(add(dsn, *further, at=later))["after"] == [["night_amount", "repeat_purchase"], "1", newest]


def meet(dsn: str, reason: str) -> list[tuple[str, datetime, str]]:
    """Revise 1,000 orders, a hundred at a time: what is to be announced of each. One reason is a stream's."""
    said = []
    for first in range(0, 1_000, 100):
        rows = [verdict(str(number), reason, offset=number, revision=True) for number in range(first, first + 100)]
        at = BATCH_TIME + timedelta(seconds=1)
        verdicts = (put(dsn, *rows, at=at) if reason == "night_amount" else add(dsn, *rows, at=at)).verdicts
        said += verdicts.select("order_id", "screened_at", "given").rows()
    return said


def test_a_stream_and_an_application_that_meet_have_both_reasons_under_the_greatest_time(dsn: str) -> None:
    put(dsn, *(verdict(str(number), offset=number) for number in range(1_000)))
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as workers:
        said = [one for part in workers.map(meet, [dsn, dsn], ["night_amount", "repeat_purchase"]) for one in part]
    newest = {order_id: reasons for order_id, _, reasons in sorted(said, key=lambda one: one[1])}
    assert newest == {str(number): "night_amount,repeat_purchase" for number in range(1_000)}
    assert {tuple(reasons) for _, reasons, _ in stored(dsn).values()} == {("night_amount", "repeat_purchase")}


def test_an_order_that_is_gone_or_another_is_left_out_and_what_was_forgotten_stays_so(dsn: str) -> None:
    put(dsn, verdict("a", attributes='{"device_id":"d1"}'), verdict("b", attributes='{"device_id":"d2"}', offset=1))
    with connect(dsn) as connection, connection.cursor() as cursor:
        cursor.execute("update raw_orders set attributes = null where order_id = 'a'")
    further = [
        *(verdict("a", "night_amount", attributes='{"device_id":"d1"}'), verdict("gone", "night_amount")),
        verdict("b", "night_amount", quantity=9),
    ]
    added = add(dsn, *further, at=BATCH_TIME + timedelta(seconds=1))
    assert (added.verdicts.select("order_id", "attributes").rows(), added.left_out) == ([("a", None)], 2)
    assert stored(dsn).keys() == {"a", "b"}
    assert stored(dsn)["b"][1] == []


def announced(settings: Settings, topic: str) -> dict[str, dict[str, Any]]:
    return {record.key().decode(): msgspec.json.decode(record.value()) for record in consume(settings, topic)}


def announcer(settings: Settings, **changes: Any) -> Announcer:
    return Announcer(KafkaSink(librdkafka_config(settings), {topic: settings.topic(topic) for topic in TOPICS}, **changes))


def test_a_verdict_is_announced_with_its_reasons_and_an_alert_with_evidence(settings: Settings) -> None:
    rows = table([verdict("a", "foreign_country", "night_amount", shadow=["repeat_purchase"]), verdict("b", offset=1)])
    saying = announcer(settings)
    saying.verdicts(rows.with_columns(screened_at=pl.lit(BATCH_TIME).cast(pl.Datetime("us", "UTC"))), "v1")
    saying.wait()
    verdicts, alerts = announced(settings, PROCESSED_ORDERS), announced(settings, FRAUD_ALERT)
    assert verdicts["b"] == {
        "order_id": "b",
        "user_id": 1,
        "product_id": 1,
        "quantity": 2,
        "amount": "Rp.1.000",
        "amount_numeric": 1000,
        "country": "ID",
        "created_date": "2026-11-01T11:59:00.000000+00:00",
        "event_ts": "2026-11-01T11:59:00.000000+00:00",
        "status": "Genuine",
        "source": 'it\'s a "test", {of} \\ things',
        "reasons": [],
        "shadow_reasons": [],
        "rules_version": "v1",
        "screened_at": "2026-11-01T12:00:00.123000+00:00",
    }
    assert verdicts["a"]["reasons"] == ["foreign_country", "night_amount"]
    assert verdicts["a"]["shadow_reasons"] == ["repeat_purchase"]
    assert alerts == {"a": verdicts["a"] | {"evidence": {"foreign_country": EVIDENCE, "night_amount": EVIDENCE}}}


def dead_letters(*values: bytes | None) -> pl.DataFrame:
    """Dead letters of these values, of the topic's first messages."""
    rows = [
        {"topic": "orders", "partition": 3, "offset": offset, "received_at": RECEIVED, "value": value, "reason": "é" * 600}
        for offset, value in enumerate(values)
    ]
    return pl.DataFrame(rows, DEAD_LETTER_SCHEMA)


def test_a_dead_letter_has_all_bytes_or_the_first_ones_with_its_size_and_always_its_place(settings: Settings) -> None:
    saying = announcer(settings, dead_letter_bytes=10)
    saying.dead_letters(dead_letters(b"\xff\0ten bytes", b"\xff", None, b""))
    saying.wait()
    records = {record.key().decode(): record for record in consume(settings, ORDERS_DEAD_LETTER)}
    headers = {key: {name: value.decode() for name, value in record.headers()} for key, record in records.items()}
    assert {key: record.value() for key, record in records.items()} == {
        "orders-3-0": b"\xff\0ten byte",
        "orders-3-1": b"\xff",
        "orders-3-2": None,
        "orders-3-3": b"",
    }
    assert headers["orders-3-0"] == headers["orders-3-1"] | {"offset": "0", "size": "11"}
    assert headers["orders-3-1"] == {
        "reason": "é" * 500,
        "topic": "orders",
        "partition": "3",
        "offset": "1",
        "received_at": "2026-11-01 11:59:00+00:00",
    }


def revised(dsn: str, *rows: dict[str, Any], at: datetime, since: datetime | None = None) -> pl.DataFrame:
    """What another task adds, which knows less of an order."""
    less = table(rows).drop("amount", "source", "attributes", "partition", "offset", "received_at")
    return revise(dsn, less, "1", at, since=since).verdicts.sort("order_id")


def kept(dsn: str, *rows: dict[str, Any], at: datetime = BATCH_TIME) -> Stored:
    return store(dsn, table(rows), "1", at, keeps_evidence=True)


def evidence(verdicts: pl.DataFrame) -> dict[str, set[str]]:
    rows = verdicts.select("order_id", "evidence").iter_rows()
    return {order_id: set(json.loads(text)) if text else set() for order_id, text in rows}


def test_what_two_tasks_find_of_an_order_is_united_and_whoever_announces_it_has_all_the_evidence(dsn: str) -> None:
    device = '{"device_id":"a\\"b é","score":0.25,"trusted":false}'
    kept(dsn, verdict("a", "night_amount", attributes=device), verdict("b", offset=1))
    found = (verdict("a", "spree", shadow=["rush"], revision=True), verdict("b", "spree", revision=True))
    for _ in range(2):  # done again, it adds nothing, and announces the same
        whole = revised(dsn, *found, at=BATCH_TIME)
        assert evidence(whole) == {"a": {"night_amount", "rush", "spree"}, "b": {"spree"}}
        assert whole["given"].to_list() == ["night_amount,spree", "spree"]
        assert whole["attributes"].to_list() == [device, None]
        assert set(whole["screened_at"]) == {BATCH_TIME + timedelta(microseconds=1)}, "later than what it adds to"
    again = kept(dsn, verdict("a", "night_amount", attributes=device), verdict("b", offset=1))
    first, second = (encode_verdicts(verdicts.sort("order_id"), "1") for verdicts in (whole, again.verdicts))
    assert first.equals(second), "of one time there is one record, whoever sends it"
    later = BATCH_TIME + timedelta(seconds=1)
    further = kept(dsn, verdict("a", "repeat_purchase", revision=True), at=later)
    assert evidence(further.verdicts) == {"a": {"night_amount", "repeat_purchase", "rush", "spree"}}
    assert revised(dsn, *found, at=later, since=later)["order_id"].to_list() == ["a"]
    assert stored(dsn)["b"] == ["Fraud", ["spree"], BATCH_TIME + timedelta(microseconds=1)]
