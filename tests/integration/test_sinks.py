"""The merge into `raw_orders` and what is announced of it, on a real Postgres and Kafka, without Spark."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import polars as pl
import pyarrow as pa
import pytest

from batch.postgres import connect
from conf.errors import PostgresError
from conf.settings import Settings
from streaming.chunks import Verdicts, pack_table
from streaming.contract import DEAD_LETTER_SCHEMA
from streaming.kafka import FRAUD_ALERT, ORDERS, PROCESSED_ORDERS, TOPICS, librdkafka_config
from streaming.screening import VERDICT_SCHEMA, reason_bits
from streaming.sinks import KafkaSink, Merged, OrderStore, announce, conflicts_among, stage
from tests.screening_runs import consume

BATCH_TIME = datetime(2026, 11, 1, 12, 0, 0, 123000, tzinfo=UTC)
RECEIVED = datetime(2026, 11, 1, 11, 59, tzinfo=UTC)


@pytest.fixture
def dsn(settings: Settings) -> str:
    return settings.require("postgres_dsn")


@pytest.fixture
def store(dsn: str) -> OrderStore:
    return OrderStore(dsn)


def verdict(order_id: str, *reasons: str, offset: int = 0, revision: bool = False, **changes: Any) -> dict[str, Any]:
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
            "given": reason_bits(reasons),
            "gained": reason_bits(reasons),
            "revision": revision,
        }
        | {f"evidence_{reason}": '{"order_ids":["a"],"value":1,"limit":1}' for reason in reasons}
        | changes
    )


def table(rows: Sequence[dict[str, Any]]) -> pl.DataFrame:
    return pl.DataFrame([{name: row.get(name) for name in VERDICT_SCHEMA} for row in rows], schema=VERDICT_SCHEMA)


def merged(store: OrderStore, dsn: str, rows: Sequence[dict[str, Any]], *, at: datetime = BATCH_TIME, lost: int = 0) -> Merged:
    """Stage these rows and merge them; `lost` of them are said to have been staged, and were not."""
    tag = stage(dsn, table(rows))
    revisions = sum(row["revision"] for row in rows)
    return store.merge(
        tags=[tag], orders=len(rows) - revisions + lost, revisions=revisions, topic="orders", rules_version="1", screened_at=at
    )


def places(*where: tuple[int, int]) -> pa.RecordBatch:
    """Messages of the `orders` topic by partition and offset."""
    partitions, offsets = zip(*where, strict=True)
    columns = {"topic": pa.array(["orders"] * len(where)), "partition": pa.array(partitions, pa.int32())}
    return pa.record_batch(columns | {"offset": pa.array(offsets, pa.int64())})


def stored(dsn: str) -> dict[str, list[Any]]:
    with connect(dsn) as connection, connection.cursor() as cursor:
        cursor.execute("select order_id, status, reasons, screened_at from raw_orders")
        return {order_id: rest for order_id, *rest in cursor.fetchall()}


def test_a_revision_unites_reasons_and_a_replay_changes_nothing(store: OrderStore, dsn: str) -> None:
    first = [verdict("a", "night_amount"), verdict("b", offset=1)]
    assert merged(store, dsn, first) == Merged()
    later = BATCH_TIME + timedelta(seconds=1)
    revision = [verdict("a", "coordinated_users", revision=True), verdict("b", "repeat_purchase", offset=1, revision=True)]
    assert merged(store, dsn, revision, at=later) == Merged()
    expected = {
        "a": ["Fraud", ["coordinated_users", "night_amount"], later],
        "b": ["Fraud", ["repeat_purchase"], later],
    }
    assert stored(dsn) == expected
    assert merged(store, dsn, revision, at=later) == Merged(met_known_orders=True)
    assert merged(store, dsn, first, at=later + timedelta(seconds=1)) == Merged(met_known_orders=True)
    assert stored(dsn) == expected


@pytest.mark.parametrize("changes", [{"product_id": 2}, {"quantity": 3}, {"amount_numeric": 999}, {"event_ts": BATCH_TIME}])
def test_a_used_order_id_with_other_content_is_set_aside_and_nothing_is_merged(
    store: OrderStore, dsn: str, changes: dict[str, Any]
) -> None:
    merged(store, dsn, [verdict("a", offset=3)])
    outcome = merged(store, dsn, [verdict("b", offset=7), verdict("a", offset=8, **changes)])
    assert outcome.screen_again
    assert set(stored(dsn)) == {"a"}
    assert conflicts_among(dsn, places((0, 7), (0, 8), (1, 8), (0, 9))) == {1: "a"}
    assert conflicts_among(dsn, places((0, 9), (1, 8))) == {}


def test_of_two_new_orders_with_one_id_the_first_received_stands(store: OrderStore, dsn: str) -> None:
    assert merged(store, dsn, [verdict("a", offset=9, quantity=5), verdict("a", offset=4)]).screen_again
    assert conflicts_among(dsn, places((0, 4), (0, 9))) == {1: "a"}


def test_the_same_order_with_its_amount_in_other_words_is_no_conflict(store: OrderStore, dsn: str) -> None:
    merged(store, dsn, [verdict("a")])
    assert merged(store, dsn, [verdict("a", amount="IDR 1000")]) == Merged(met_known_orders=True)


def test_rows_that_postgres_has_lost_make_the_batch_be_screened_again(store: OrderStore, dsn: str) -> None:
    assert merged(store, dsn, [verdict("a")], lost=1).screen_again
    assert stored(dsn) == {}


def test_rows_of_a_failed_attempt_are_not_merged_and_are_cleared(store: OrderStore, dsn: str) -> None:
    stage(dsn, table([verdict("of a failed attempt")]))
    merged(store, dsn, [verdict("a")])
    assert set(stored(dsn)) == {"a"}
    store.clear_staging()
    with connect(dsn) as connection, connection.cursor() as cursor:
        cursor.execute("select count(*) from staging_orders")
        assert cursor.fetchone() == (0,)


def announced(settings: Settings, topic: str) -> dict[str, dict[str, Any]]:
    return {record.key().decode(): msgspec.json.decode(record.value()) for record in consume(settings, topic)}


def test_a_verdict_is_announced_with_its_reasons_and_an_alert_with_evidence(settings: Settings, dsn: str) -> None:
    rows = table([verdict("a", "foreign_country", "night_amount"), verdict("b", offset=1)])
    sink = KafkaSink(librdkafka_config(settings), {topic: settings.topic(topic) for topic in TOPICS})
    payload = Verdicts(
        "tag", round(BATCH_TIME.timestamp() * 1_000_000), pack_table(rows), pack_table(pl.DataFrame(schema=DEAD_LETTER_SCHEMA))
    )
    announce(sink, dsn, payload, "v1", look_up=False)
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
        "rules_version": "v1",
        "screened_at": "2026-11-01T12:00:00.123000+00:00",
    }
    assert verdicts["a"]["reasons"] == ["foreign_country", "night_amount"]
    evidence = {"order_ids": ["a"], "value": 1, "limit": 1}
    assert alerts == {"a": verdicts["a"] | {"evidence": {"foreign_country": evidence, "night_amount": evidence}}}


def test_of_known_orders_only_what_this_batch_wrote_is_announced_as_it_stands(
    settings: Settings, store: OrderStore, dsn: str
) -> None:
    merged(store, dsn, [verdict("old", "night_amount"), verdict("older", "night_amount", offset=1)])
    store.clear_staging()
    later = BATCH_TIME + timedelta(seconds=1)
    rows = [verdict("old", "repeat_purchase"), verdict("older", offset=1), verdict("new", offset=2)]
    tag = stage(dsn, table(rows))
    outcome = store.merge(tags=[tag], orders=3, revisions=0, topic=ORDERS, rules_version="1", screened_at=later)
    assert outcome == Merged(met_known_orders=True)
    sink = KafkaSink(librdkafka_config(settings), {topic: settings.topic(topic) for topic in TOPICS})
    announce(sink, dsn, Verdicts(tag, round(later.timestamp() * 1_000_000), pack_table(table(rows)), b""), "1", look_up=True)
    verdicts = announced(settings, PROCESSED_ORDERS)
    assert {order_id: found["reasons"] for order_id, found in verdicts.items()} == {
        "old": ["night_amount", "repeat_purchase"],
        "new": [],
    }


def test_an_announcement_that_needs_what_postgres_has_lost_fails(settings: Settings, dsn: str) -> None:
    sink = KafkaSink(librdkafka_config(settings), {topic: settings.topic(topic) for topic in TOPICS})
    payload = Verdicts("no such tag", 0, pack_table(table([verdict("a")])), b"")
    with pytest.raises(PostgresError, match="lost what was staged"):
        announce(sink, dsn, payload, "1", look_up=True)
