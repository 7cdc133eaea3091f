"""What a bucket remembers: its recent orders, in segments that are packed once.

The state passes through Spark whole with every micro-batch. So that packing it does not cost as much again, a micro-batch
adds one segment of what it changed, and segments are put together when they are of like size, as in a log-structured
merge tree (O'Neil et al., 1996): an order is packed anew a few times while it is remembered, not once a micro-batch. A worker
keeps the tables of the segments that it has met.
"""

from functools import lru_cache

import msgspec
import polars as pl

from streaming.chunks import pack_table, unpack_table
from streaming.screening import NEVER_US, RECENT_SCHEMA, Frontier

_TABLES_KEPT = 128  # by each worker: some eight a bucket are in use
_FEW = 1_000  # rows that are not worth packing anew only because they are forgotten


class Segment(msgspec.Struct, frozen=True):
    """Some recent orders.

    Attributes:
        orders: their table (RECENT_SCHEMA).
        rows: how many.
        newest_us: the newest event time among them.
        revises: whether an earlier segment may hold some of them too, as they were before.
    """

    orders: bytes
    rows: int
    newest_us: int
    revises: bool


class Recent(msgspec.Struct, frozen=True, omit_defaults=True):
    """A bucket's state: the orders that later ones may still form patterns with.

    Attributes:
        newest_us: the newest event time read from each partition so far, epoch microseconds.
        watermark_us: orders older than this came too late to meet all their neighbours.
        oldest_us: orders older than this are forgotten.
        kept: how many there are that are not.
        segments: these, with the reasons and evidence given so far; of an order that is in several, the last counts.
        orders: all of them in one table, in a checkpoint from before there were segments.
    """

    newest_us: dict[int, int]
    watermark_us: int
    oldest_us: int = NEVER_US
    kept: int = 0
    segments: list[Segment] = []
    orders: bytes = b""


NOTHING_RECENT = Recent({}, Frontier().watermark_us)


def recalled(recent: Recent) -> pl.DataFrame:
    """The orders remembered (RECENT_SCHEMA)."""
    if recent.orders:
        return _from_before(recent.orders)
    tables = [_unpacked(segment.orders) for segment in recent.segments]
    return _joined(tables, recent.oldest_us, revised=any(segment.revises for segment in recent.segments))


def remembered(recent: Recent, after: Frontier, oldest_us: int, known: pl.DataFrame, changed: pl.DataFrame) -> Recent:
    """The state after a micro-batch.

    Args:
        recent: the state before it.
        after: how far the bucket has come.
        oldest_us: orders older than this can form no pattern with an on-time order any more.
        known: all orders there are now (RECENT_SCHEMA), the old ones too.
        changed: those of them that are new or no longer as they were (with a column `revision`: the latter).
    """
    oldest_us = max(oldest_us, recent.oldest_us)
    segments = [segment for segment in recent.segments if segment.newest_us >= oldest_us]
    changed = _since(changed, oldest_us)
    kept = int((known["event_ts"].to_physical() >= oldest_us).sum())
    first = _first_to_join([segment.rows for segment in segments], len(changed), kept)
    if first is None or recent.orders:
        segments = _packed(_since(known, oldest_us), revises=False)
    elif len(changed):
        joined = segments[first:]
        tables = [*(_unpacked(segment.orders) for segment in joined), changed.select(RECENT_SCHEMA.names())]
        revises = bool(changed["revision"].any()) or any(segment.revises for segment in joined)
        segments = segments[:first] + _packed(_joined(tables, oldest_us, revised=revises), revises=revises)
    return Recent(after.newest_us, after.watermark_us, oldest_us, kept, segments)


def _first_to_join(rows: list[int], added: int, kept: int) -> int | None:
    """The first of the segments, of so many rows, to be joined by those added; None where all is to be packed anew."""
    if sum(rows) > 2 * kept + _FEW:
        return None
    first = len(rows)
    while first and rows[first - 1] < 2 * added:
        first -= 1
        added += rows[first]
    return first


def _packed(orders: pl.DataFrame, *, revises: bool) -> list[Segment]:
    if orders.is_empty():
        return []
    newest_us: int = orders["event_ts"].to_physical().max()  # type: ignore[assignment]
    return [Segment(pack_table(orders), len(orders), newest_us, revises)]


def _joined(tables: list[pl.DataFrame], oldest_us: int, *, revised: bool) -> pl.DataFrame:
    """Tables of orders as one, without what is forgotten."""
    orders = _since(pl.concat([pl.DataFrame(schema=RECENT_SCHEMA), *tables]), oldest_us)
    return orders.unique("order_id", keep="last", maintain_order=True) if revised else orders


def _since(orders: pl.DataFrame, oldest_us: int) -> pl.DataFrame:
    return orders.filter(pl.col("event_ts").to_physical() >= oldest_us)


@lru_cache(maxsize=_TABLES_KEPT)
def _unpacked(orders: bytes) -> pl.DataFrame:
    return unpack_table(orders, RECENT_SCHEMA)


def _from_before(orders: bytes) -> pl.DataFrame:
    """The table of a checkpoint from before there were segments, or even shadow reasons."""
    table = unpack_table(orders, RECENT_SCHEMA)
    if "shadow" not in table.columns:
        table = table.with_columns(shadow=pl.lit(0, pl.UInt8)).select(RECENT_SCHEMA.names())
    return table
