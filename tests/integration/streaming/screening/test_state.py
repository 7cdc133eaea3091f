"""What screening remembers between micro-batches, in a real Postgres: kept, moved, done again, cleared away, and missed."""

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from functools import partial
from typing import Any

import msgspec
import polars as pl
import pytest

from batch.postgres import connect
from conf.errors import StreamingError
from conf.settings import Settings
from streaming.screening import state
from streaming.screening.division import By, Division
from streaming.screening.recent import NOTHING_RECENT, Recent, remembered, whole
from streaming.screening.sinks import in_transaction
from streaming.screening.state import Known, MicroBatch, known_before, newest_before, remember_after, remembered_now
from streaming.screening.verdicts import RECENT_SCHEMA, Watermark
from tests.oracle.kafka_keys import keyed_partition

BY_PARTITION, BY_PRODUCT = Division(By.PARTITION, 4), Division(By.PRODUCT, 2)
START = datetime(2026, 11, 1, tzinfo=UTC)


@pytest.fixture
def dsn(settings: Settings) -> str:
    return settings.require("postgres_dsn")


@pytest.fixture(autouse=True)
def as_in_a_new_worker() -> Iterator[None]:
    state._segments.clear()
    yield
    state._segments.clear()


def orders(products: Iterable[int], batch: int, given: int = 0) -> pl.DataFrame:
    """One order of each product, placed in the second of the micro-batch's number; `given` makes it a revision of the first."""
    empty: dict[str, Any] = dict.fromkeys(RECENT_SCHEMA.names())
    first = 0 if given else batch
    common = empty | {"given": "a" * given, "event_ts": START.replace(second=first)}
    rows = [common | {"order_id": f"{first}-{product}", "product_id": product} for product in products]
    return pl.DataFrame(rows, RECENT_SCHEMA).with_columns(revision=pl.lit(value=bool(given)))


def known(dsn: str, batch: MicroBatch, buckets: Iterable[int]) -> Known:
    """What a task knows of buckets before a micro-batch."""
    newest = in_transaction(dsn, lambda cursor: newest_before(cursor, batch))
    return known_before(newest, batch, buckets, partial(in_transaction, dsn))


def write(dsn: str, batch: MicroBatch, known: Known, after: dict[int, Recent]) -> None:
    def work(cursor: Any) -> bool:
        remember_after(cursor, batch, known, after)
        return True

    in_transaction(dsn, work)


def settle(dsn: str, batch: MicroBatch, changed: pl.DataFrame, oldest_second: int = 0) -> dict[int, Recent]:
    """What a task does with the state in a micro-batch that changes these orders."""
    bucket_of = batch.division.bucket_of(changed)
    buckets = {int(bucket) for bucket in bucket_of}
    before = known(dsn, batch, buckets)
    watermark = Watermark({0: batch.number}, batch.number)
    oldest_us = round(START.replace(second=oldest_second).timestamp()) * 1_000_000
    after = {
        bucket: remembered(recent, watermark, oldest_us, changed.filter(pl.Series(bucket_of == bucket)), batch.step)
        for bucket, recent in before.recents.items()
    }
    write(dsn, batch, before, after)
    remembered_now(batch, after)
    return after


def found(dsn: str, batch: MicroBatch) -> dict[str, int]:
    """Order → whether it has a reason, as the next micro-batch would find them."""
    recents = known(dsn, batch, range(batch.division.buckets)).recents
    tables = {bucket: whole(recent) for bucket, recent in recents.items() if recent.segments}
    for bucket, table in tables.items():
        assert set(batch.division.bucket_of(table)) <= {bucket}
    return {
        order_id: len(given) for table in tables.values() for order_id, given in table.select("order_id", "given").iter_rows()
    }


def rows(dsn: str) -> list[tuple[Any, ...]]:
    with connect(dsn) as connection, connection.cursor() as cursor:
        cursor.execute("select division, bucket, batch from screening_state order by 1, 2, 3")
        return cursor.fetchall()


@pytest.mark.parametrize("division", [BY_PARTITION, BY_PRODUCT], ids=str)
def test_what_one_worker_remembered_another_one_finds(dsn: str, division: Division) -> None:
    after = settle(dsn, MicroBatch("q", division, 0), orders(range(1, 9), 0))
    after |= settle(dsn, MicroBatch("q", division, 1), orders([2], 1))
    state._segments.clear()
    recents = known(dsn, MicroBatch("q", division, 2), range(division.buckets)).recents
    for bucket, recent in recents.items():
        kept = after.get(bucket, NOTHING_RECENT)
        assert recent[:2] == kept[:2]
        assert [(one.batch, one.newest_us, one.revises) for one in recent.segments] == [
            (one.batch, one.newest_us, one.revises) for one in kept.segments
        ]
        assert whole(recent).equals(whole(kept))


def test_a_micro_batch_that_is_done_again_finds_what_it_found_and_ends_in_the_same(dsn: str) -> None:
    settle(dsn, MicroBatch("q", BY_PARTITION, 0), orders(range(1, 9), 0))
    for _ in range(2):
        settle(dsn, MicroBatch("q", BY_PARTITION, 1), orders([1, 2], 1, given=4))
        state._segments.clear()
    assert found(dsn, MicroBatch("q", BY_PARTITION, 2)) == {f"0-{product}": 4 * (product < 3) for product in range(1, 9)}
    assert set(found(dsn, MicroBatch("q", BY_PARTITION, 1)).values()) == {0}, "a replay of it needs the state before it"


def test_another_query_knows_nothing_of_it(dsn: str) -> None:
    settle(dsn, MicroBatch("q", BY_PARTITION, 0), orders([1], 0))
    assert found(dsn, MicroBatch("another", BY_PARTITION, 1)) == {}


def test_it_moves_with_its_products_when_they_are_divided_otherwise(dsn: str) -> None:
    settle(dsn, MicroBatch("q", BY_PARTITION, 0), orders(range(1, 9), 0))
    settle(dsn, MicroBatch("q", BY_PRODUCT, 1), orders([2], 1))  # of the two buckets only one
    state._segments.clear()
    of_before = {f"0-{product}": 0 for product in range(1, 9)}
    assert found(dsn, MicroBatch("q", BY_PRODUCT, 2)) == of_before | {"1-2": 0}
    settle(dsn, MicroBatch("q", BY_PRODUCT, 2), orders([1, 2], 2, given=4))
    settle(dsn, MicroBatch("q", BY_PARTITION, 3), orders([3], 3))
    state._segments.clear()
    revised = of_before | {"0-1": 4, "0-2": 4, "1-2": 0, "3-3": 0}
    assert found(dsn, MicroBatch("q", BY_PARTITION, 4)) == revised, "the newest of several states of an order counts"
    assert found(dsn, MicroBatch("q", Division(By.PARTITION, 6), 4)) == revised, "the topic has got more partitions"


def test_a_micro_batch_begun_by_one_division_and_done_again_by_the_other_counts_as_that_one_left_it(dsn: str) -> None:
    settle(dsn, MicroBatch("q", BY_PARTITION, 0), orders([1, 2], 0))
    settle(dsn, MicroBatch("q", BY_PARTITION, 1), orders([1], 1))  # one of its tasks; another one met a stray
    settle(dsn, MicroBatch("q", BY_PRODUCT, 1), orders([1, 2, 3], 1))
    state._segments.clear()
    whole = {f"{batch}-{product}": 0 for batch, product in [(0, 1), (0, 2), (1, 1), (1, 2), (1, 3)]}
    assert found(dsn, MicroBatch("q", BY_PARTITION, 2)) == whole
    assert found(dsn, MicroBatch("q", BY_PRODUCT, 2)) == whole


def test_rows_that_no_micro_batch_needs_any_more_go(dsn: str) -> None:
    product = next(product for product in range(1, 99) if keyed_partition(product, 4) == 2)
    for number in range(59):
        settle(dsn, MicroBatch("q", BY_PARTITION, number), orders([product] * 3, number), oldest_second=max(0, number - 10))
        assert len(rows(dsn)) <= 12
    assert {row[:2] for row in rows(dsn)} == {("partition/4", 2)}


def test_a_later_part_of_a_micro_batch_finds_the_earlier_one_and_forgets_nothing_that_the_whole_needs(dsn: str) -> None:
    settle(dsn, MicroBatch("q", BY_PARTITION, 0), orders([1], 0))
    for part in range(3):
        settle(dsn, MicroBatch("q", BY_PARTITION, 1, part), orders([1] * 9, 1 + part), oldest_second=1 + part)
    assert found(dsn, MicroBatch("q", BY_PARTITION, 2)) == {"3-1": 0}
    state._segments.clear()
    assert found(dsn, MicroBatch("q", BY_PARTITION, 1)) == {"0-1": 0}, "it may be done again, from its first part"


def test_a_state_of_the_format_before_parts_is_read_and_one_of_a_newer_format_refused(dsn: str) -> None:
    settle(dsn, MicroBatch("q", BY_PARTITION, 1), orders([1], 1))
    with connect(dsn) as connection, connection.cursor() as cursor:
        cursor.execute("select state from screening_state")
        kept = msgspec.msgpack.decode(bytes(cursor.fetchone()[0]))  # type: ignore[index]
        (segment,) = kept["segments"]
        before = {name: value for name, value in kept.items() if name != "format"} | {"segments": [segment | {"batch": 1}]}
        cursor.execute("update screening_state set state = %s", [msgspec.msgpack.encode(before)])
    state._segments.clear()
    assert found(dsn, MicroBatch("q", BY_PARTITION, 2)) == {"1-1": 0}
    with connect(dsn) as connection, connection.cursor() as cursor:
        cursor.execute("update screening_state set state = %s", [msgspec.msgpack.encode(kept | {"format": 9})])
    with pytest.raises(StreamingError, match="written by a newer version of finpro"):
        found(dsn, MicroBatch("q", BY_PARTITION, 2))


def test_a_row_that_is_gone_is_told(dsn: str) -> None:
    settle(dsn, MicroBatch("q", BY_PARTITION, 0), orders([1] * 9, 0))
    settle(dsn, MicroBatch("q", BY_PARTITION, 1), orders([1], 1))
    with connect(dsn) as connection, connection.cursor() as cursor:
        cursor.execute("delete from screening_state where batch = 0")
    state._segments.clear()
    with pytest.raises(StreamingError, match="screening_state in Postgres lacks the row"):
        found(dsn, MicroBatch("q", BY_PARTITION, 2))


def test_divisions_across_products_know_nothing_of_others_but_of_their_own_in_other_buckets(dsn: str) -> None:
    settle(dsn, MicroBatch("q", BY_PRODUCT, 0), orders([1, 2], 0))
    by_user, by_country = (Division(By.FIELD, 2, of) for of in ("user_id", "country"))
    users = orders([1, 2, 3], 1).with_columns(key="product_id").drop("amount", "attributes")
    settle(dsn, MicroBatch("q", by_user, 1), users)
    state._segments.clear()
    of_users = {"1-1": 0, "1-2": 0, "1-3": 0}
    assert found(dsn, MicroBatch("q", by_user, 2)) == of_users
    assert found(dsn, MicroBatch("q", Division(By.FIELD, 3, "user_id"), 2)) == of_users
    assert found(dsn, MicroBatch("q", by_country, 2)) == found(dsn, MicroBatch("q", Division(By.FIELD, 2, "user"), 2)) == {}
    assert found(dsn, MicroBatch("q", BY_PRODUCT, 2)) == found(dsn, MicroBatch("q", BY_PARTITION, 2)) == {"0-1": 0, "0-2": 0}
