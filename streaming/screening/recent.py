"""What a bucket remembers: its recent orders, in segments that are written once.

So that remembering does not cost as much again with every micro-batch, each adds one segment of what it changed, and segments
are put together when they are of like size, as in a log-structured merge tree (O'Neil et al., 1996): an order is written
anew a few times while it is remembered, not once a micro-batch.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from itertools import count
from typing import NamedTuple

import numpy as np
import polars as pl

from streaming.rules.windows import Bools, Ints, Spans, ints, spans
from streaming.screening.division import KEY
from streaming.screening.verdicts import NEVER_US, NEWS, NO_RECENT, Watermark

_MANY = 2_000  # rows that are worth an index, where they are several times as many as the keys asked for
_FEW = 1_000  # rows that are not worth writing anew only because they are forgotten


@dataclass(frozen=True, eq=False)
class Segment:
    """Some recent orders.

    Attributes:
        batch: the micro-batch that made it, which makes no other in its bucket.
        newest_us: the newest event time among them, epoch microseconds.
        revises: whether an earlier segment may hold some of them too, as they were before.
        orders: RECENT_SCHEMA, or across products as `verdicts.nothing_across`, with the reasons and evidence given so far.
    """

    batch: int
    newest_us: int
    revises: bool
    orders: pl.DataFrame

    @cached_property
    def keys(self) -> Ints:
        """What orders have in common that may be neighbours: the product, or across products the `key`."""
        return ints(self.orders[KEY if KEY in self.orders.columns else "product_id"])

    @cached_property
    def events_us(self) -> Ints:
        """The event time of each order, epoch microseconds."""
        return ints(self.orders["event_ts"])

    def held_by(self, wanted: Spans) -> Bools:
        """Which of its orders lie in the stretch of their key: of many orders only those of the wanted keys are looked at.

        From the second time on: to make an index takes as long as to look at all of them once or twice, and in a backlog the
        next micro-batch has other segments.
        """
        if next(self._times_asked) == 0 or len(self.keys) < max(_MANY, 4 * len(wanted.group)):
            return wanted.hold(self.keys, self.events_us)
        rows, keys = self._by_key
        first, end = np.searchsorted(keys, wanted.group, "left"), np.searchsorted(keys, wanted.group, "right")
        size = end - first
        near = rows[np.repeat(end - np.cumsum(size), size) + np.arange(size.sum())]
        held = np.zeros(len(keys), bool)
        held[near] = wanted.hold(self.keys[near], self.events_us[near])
        return held

    @cached_property
    def _times_asked(self) -> "count[int]":
        return count()

    @cached_property
    def _by_key(self) -> tuple[Ints, Ints]:
        """The rows in the order of their keys, and these."""
        rows = np.argsort(self.keys, kind="stable")
        return rows, self.keys[rows]


class Recent(NamedTuple):
    """A bucket's state: the orders that later ones may still form patterns with.

    Attributes:
        watermark: how far the bucket has come.
        oldest_us: orders older than this are forgotten, epoch microseconds.
        segments: the others; of an order that is in several, the last counts.
    """

    watermark: Watermark = Watermark()
    oldest_us: int = NEVER_US
    segments: tuple[Segment, ...] = ()

    @property
    def kept(self) -> int:
        """How many orders are not forgotten; one that is in several segments counts in each."""
        return sum(int(np.count_nonzero(segment.events_us >= self.oldest_us)) for segment in self.segments)

    @property
    def bytes(self) -> int:
        """The size of the segments in memory."""
        return sum(int(segment.orders.estimated_size()) for segment in self.segments)


NOTHING_RECENT = Recent()


def near(
    recents: Iterable[Recent],
    arrivals: pl.DataFrame,
    distance: timedelta,
    key: str = "product_id",
    nothing: pl.DataFrame = NO_RECENT,
) -> pl.DataFrame:
    """The orders remembered that arrivals may have as neighbours: of their products, or keys, and near in time.

    They have the columns of `nothing`, which is what there is where none are.
    """
    widened = spans(ints(arrivals[key]), ints(arrivals["event_ts"]), distance // timedelta(microseconds=1))
    segments = [(segment, recent.oldest_us) for recent in recents for segment in recent.segments]
    return _taken(segments, lambda segment: segment.held_by(widened)) if segments else nothing


def whole(recent: Recent) -> pl.DataFrame:
    """All orders remembered."""
    return _taken([(segment, recent.oldest_us) for segment in recent.segments]) if recent.segments else NO_RECENT


def remembered(recent: Recent, after: Watermark, oldest_us: int, changed: pl.DataFrame, batch: int) -> Recent:
    """The state after a micro-batch.

    Args:
        recent: the state before it.
        after: how far the bucket has come.
        oldest_us: orders older than this can form no pattern with an on-time order any more.
        changed: orders that are new or no longer as they were (`verdicts.screen`; the latter are revisions).
        batch: the number of the micro-batch.
    """
    oldest_us = max(oldest_us, recent.oldest_us)
    segments = [segment for segment in recent.segments if segment.newest_us >= oldest_us]
    added = Segment(batch, 0, bool(changed["revision"].any()), changed[[name for name in changed.columns if name not in NEWS]])
    before = Recent(after, oldest_us, tuple(segments))
    is_kept = added.events_us >= oldest_us
    if not is_kept.any() and before.kept:
        return before
    first = _first_to_join([len(segment.orders) for segment in segments], len(changed), before.kept + len(changed))
    if any(segment.batch == batch for segment in segments):  # what came from elsewhere with this very micro-batch
        first = 0
    joined = _joined([*segments[first:], added], oldest_us, is_all=first == 0)
    return before._replace(segments=(*segments[:first], *joined))


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
    orders = _taken([(segment, oldest_us) for segment in segments]).rechunk()
    if orders.is_empty():
        return []
    revises = not is_all and any(segment.revises for segment in segments)
    return [Segment(segments[-1].batch, int(ints(orders["event_ts"]).max()), revises, orders)]


def _taken(segments: list[tuple[Segment, int]], is_wanted: Callable[[Segment], Bools] | None = None) -> pl.DataFrame:
    """What segments, at least one, hold that is not older than their `oldest_us`, each order once: of those wanted."""
    rows = np.concatenate([segment.events_us >= oldest_us for segment, oldest_us in segments])
    if is_wanted:
        rows &= np.concatenate([is_wanted(segment) for segment, _ in segments])
    orders = pl.concat([segment.orders for segment, _ in segments])[np.flatnonzero(rows)]
    revised = any(segment.revises for segment, _ in segments)
    return orders.unique("order_id", keep="last", maintain_order=True) if revised else orders
