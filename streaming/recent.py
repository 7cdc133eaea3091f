"""What a bucket remembers: its recent orders, in segments that are written once.

So that remembering does not cost as much again with every micro-batch, each adds one segment of what it changed, and segments
are put together when they are of like size, as in a log-structured merge tree (O'Neil et al., 1996): an order is written
anew a few times while it is remembered, not once a micro-batch.
"""

from collections.abc import Iterable
from datetime import timedelta
from typing import NamedTuple

import polars as pl

from streaming.screening import NEVER_US, RECENT_SCHEMA, Frontier

_ALL = pl.lit(value=True)
_FEW = 1_000  # rows that are not worth writing anew only because they are forgotten


class Segment(NamedTuple):
    """Some recent orders.

    Attributes:
        batch: the micro-batch that made it, which makes no other in its bucket.
        newest_us: the newest event time among them, epoch microseconds.
        revises: whether an earlier segment may hold some of them too, as they were before.
        orders: RECENT_SCHEMA, with the reasons and evidence given so far.
    """

    batch: int
    newest_us: int
    revises: bool
    orders: pl.DataFrame


class Recent(NamedTuple):
    """A bucket's state: the orders that later ones may still form patterns with.

    Attributes:
        frontier: how far the bucket has come.
        oldest_us: orders older than this are forgotten, epoch microseconds.
        segments: the others; of an order that is in several, the last counts.
    """

    frontier: Frontier = Frontier()
    oldest_us: int = NEVER_US
    segments: tuple[Segment, ...] = ()

    @property
    def kept(self) -> int:
        """How many orders are not forgotten; one that is in several segments counts in each."""
        return sum(int((segment.orders["event_ts"].to_physical() >= self.oldest_us).sum()) for segment in self.segments)

    @property
    def bytes(self) -> int:
        """The size of the segments in memory."""
        return sum(int(segment.orders.estimated_size()) for segment in self.segments)


NOTHING_RECENT = Recent()


def near(recents: Iterable[Recent], arrivals: pl.DataFrame, distance: timedelta) -> pl.DataFrame:
    """The orders remembered (RECENT_SCHEMA) that may be neighbours of arrivals, and no more others than is cheap to tell."""
    if arrivals.is_empty():
        return pl.DataFrame(schema=RECENT_SCHEMA)
    events, width_us = arrivals["event_ts"].to_physical(), distance // timedelta(microseconds=1)
    is_in_time = pl.col("event_ts").to_physical().is_between(events.min() - width_us, events.max() + width_us)  # type: ignore[operator]
    is_near = is_in_time & pl.col("product_id").is_in(arrivals["product_id"].unique().implode())
    tables = [_whole(recent.segments, recent.oldest_us, is_near) for recent in recents]
    return pl.concat([pl.DataFrame(schema=RECENT_SCHEMA), *tables])


def whole(recent: Recent) -> pl.DataFrame:
    """All orders remembered (RECENT_SCHEMA)."""
    return _whole(recent.segments, recent.oldest_us, _ALL)


def remembered(recent: Recent, after: Frontier, oldest_us: int, changed: pl.DataFrame, batch: int) -> Recent:
    """The state after a micro-batch.

    Args:
        recent: the state before it.
        after: how far the bucket has come.
        oldest_us: orders older than this can form no pattern with an on-time order any more.
        changed: orders that are new or no longer as they were (RECENT_SCHEMA, and a column `revision`: the latter).
        batch: the number of the micro-batch.
    """
    oldest_us = max(oldest_us, recent.oldest_us)
    segments = [segment for segment in recent.segments if segment.newest_us >= oldest_us]
    changed = changed.filter(_is_since(oldest_us))
    added = Segment(batch, 0, bool(changed["revision"].any()), changed.select(RECENT_SCHEMA.names()))
    kept = Recent(after, oldest_us, tuple(segments)).kept + len(changed)
    first = _first_to_join([len(segment.orders) for segment in segments], len(changed), kept)
    if any(segment.batch == batch for segment in segments):  # what came from elsewhere with this very micro-batch
        first = 0
    if first < len(segments) or len(changed):
        segments[first:] = _joined([*segments[first:], added], oldest_us, is_all=first == 0)
    return Recent(after, oldest_us, tuple(segments))


def _first_to_join(rows: list[int], added: int, kept: int) -> int:
    """The first of the segments, of so many rows, to be joined by those added: 0 where most of all is to be forgotten."""
    if sum(rows) + added > 2 * kept + _FEW:
        return 0
    first = len(rows)
    while first and rows[first - 1] < 2 * added:
        first -= 1
        added += rows[first]
    return first


def _joined(segments: list[Segment], oldest_us: int, *, is_all: bool) -> list[Segment]:
    """Segments as one, made by the last of them: none where nothing is left. `is_all`: there is no earlier segment."""
    orders = _whole(segments, oldest_us, _ALL).rechunk()
    if orders.is_empty():
        return []
    newest_us: int = orders["event_ts"].to_physical().max()  # type: ignore[assignment]
    revises = not is_all and any(segment.revises for segment in segments)
    return [Segment(segments[-1].batch, newest_us, revises, orders)]


def _whole(segments: Iterable[Segment], oldest_us: int, wanted: pl.Expr) -> pl.DataFrame:
    """What segments hold (RECENT_SCHEMA), each order once: of those wanted, and not forgotten."""
    tables = [segment.orders.filter(wanted & _is_since(oldest_us)) for segment in segments]
    orders = pl.concat([pl.DataFrame(schema=RECENT_SCHEMA), *tables])
    revised = any(segment.revises for segment in segments)
    return orders.unique("order_id", keep="last", maintain_order=True) if revised else orders


def _is_since(oldest_us: int) -> pl.Expr:
    return pl.col("event_ts").to_physical() >= oldest_us
