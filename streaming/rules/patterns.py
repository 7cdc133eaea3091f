"""The four forms of pattern, each a pure function over the orders that take part.

    count          at least so many orders
    distinct       orders with at least so many different values of a field
    consecutive    orders whose values of a field make a run of at least so many consecutive integers
    sum            orders whose values of a field, none of them negative, add up to so much

in some interval of length `within`, both its ends included, of orders that are equal in some fields (`Equals`). Members are
all orders in such an interval; of `consecutive` those that make the run. All are monotone: one more order can only add
members. What they cost is O(n log n), without a step of Python for an order.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from streaming.rules.windows import (
    Ints,
    TimeOrder,
    consecutive_runs,
    crowded_among,
    distinct_in_intervals,
    first_cover,
    first_of_each,
    time_order,
)

EVIDENCE_ORDERS = 20  # an alert names at most so many orders for a reason
_NO_ROWS = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Finding:
    """The orders that have one reason, and why.

    Attributes:
        rows: their positions in the table.
        members: a row for each of them: positions of the orders that together make its pattern, itself among them; where they
            are fewer than others have, it is there again.
        value: what was found for each of them.
        limit: the threshold it is held against, or the condition.
    """

    rows: Ints
    members: Ints
    value: pl.Series
    limit: object


@dataclass(frozen=True)
class Equals:
    """The orders that take part in patterns, by the fields in which those of a pattern are equal.

    Attributes:
        keys: the values of these fields, of all orders of the table.
        ts: event time of all orders, microseconds.
        rows: positions of those that take part, sorted by keys and time.
    """

    keys: list[Ints]
    ts: Ints
    rows: Ints

    def crowded(self, needed: int, width: int) -> Ints:
        """The positions, ascending, of orders among so many so near in time: no others can be in a pattern of that many."""
        return crowded_among(self.rows, self.keys, self.ts, needed, width)

    def in_time_order(self, rows: Ints, width: int) -> TimeOrder:
        """These orders sorted by keys and time; positions are those in `rows`."""
        return time_order([key[rows] for key in self.keys], self.ts[rows], width)


def count(equals: Equals, at_least: int, width: int) -> Finding:
    """It belongs to `at_least` orders, the first and last at most `width` microseconds apart."""
    near = equals.crowded(at_least, width)
    if not len(near):
        return _nothing(at_least)
    order = equals.in_time_order(near, width)
    starts = np.flatnonzero(order.end - np.arange(len(near)) >= at_least)
    ends = order.end[starts]
    cover = first_cover(starts, ends, len(near))
    places = np.flatnonzero(cover >= 0)
    start, end = starts[cover[places]], ends[cover[places]]
    nearest = np.minimum(np.maximum(start, places - at_least + 1), end - at_least)
    members = nearest[:, None] + np.arange(at_least)
    return _pattern(near[order.rows], places, members, value=end - start, limit=at_least)


def consecutive(equals: Equals, of: Ints, at_least: int, width: int) -> Finding:
    """It belongs to orders of `at_least` consecutive values of `of`, all at most `width` microseconds apart."""
    near = equals.crowded(at_least, width)
    if not len(near):
        return _nothing(at_least)
    rows = near[np.lexsort([equals.ts[near], of[near], *(key[near] for key in reversed(equals.keys))])]
    changes = np.logical_or.reduce([np.diff(key[rows], prepend=key[rows[0]]) != 0 for key in equals.keys])
    runs = consecutive_runs(np.cumsum(changes), of[rows], equals.ts[rows], at_least, width)
    by_place = np.lexsort([runs.end.ravel(), runs.start.ravel()])
    starts, ends = runs.start.ravel()[by_place], runs.end.ravel()[by_place]
    cover = first_cover(starts, ends, len(rows))
    places = np.flatnonzero(cover >= 0)
    run, column = np.divmod(by_place[cover[places]], at_least)
    members = runs.start[run]
    members[np.arange(len(places)), column] = places
    return _pattern(rows, places, members, value=np.full(len(places), at_least), limit=at_least)


def distinct(equals: Equals, of: Ints, at_least: int, width: int) -> Finding:
    """It lies in some interval of `width` microseconds that holds at least so many different values of `of`."""
    near = equals.crowded(at_least, width)
    if not len(near):
        return _nothing(at_least)
    order = equals.in_time_order(near, width)
    values = of[near][order.rows]
    different = distinct_in_intervals(order, values)
    starts = np.flatnonzero(different >= at_least)
    cover = first_cover(starts, order.end[starts], len(near))
    places = np.flatnonzero(cover >= 0)
    used, interval = np.unique(cover[places], return_inverse=True)
    others = first_of_each(order, values, starts[used], at_least)[interval]
    is_own_value = values[others] == values[places][:, None]
    own = np.where(is_own_value.any(axis=1), is_own_value.argmax(axis=1), at_least - 1)
    others[np.arange(len(places)), own] = places
    return _pattern(near[order.rows], places, others, value=different[starts[cover[places]]], limit=at_least)


def total(equals: Equals, of: Ints, at_least: int, width: int) -> Finding:
    """It lies in some interval of `width` microseconds in which the values of `of` (none negative) add up to so much."""
    rows = equals.rows
    if not len(rows):
        return _nothing(at_least)
    order = equals.in_time_order(rows, width)
    summed = _running(of[rows][order.rows])
    sums = summed[order.end] - summed[np.arange(len(rows))]
    starts = np.flatnonzero(sums >= at_least)
    cover = first_cover(starts, order.end[starts], len(rows))
    places = np.flatnonzero(cover >= 0)
    start = starts[cover[places]]
    # The shortest stretch around each order that is enough: as few orders after it as will do, then as few before it.
    until = np.maximum(np.searchsorted(summed, summed[start] + at_least, side="left"), places + 1)
    since = np.minimum(np.searchsorted(summed, summed[until] - at_least, side="right") - 1, places)
    longest = int(min((until - since).max(initial=1), EVIDENCE_ORDERS))
    first = np.clip(places - longest // 2, since, np.maximum(since, until - longest))
    members = first[:, None] + np.arange(longest)
    members = np.where(members < until[:, None], members, places[:, None])
    # More than 64 bits hold is shown as the largest integer that they do.
    value = np.array([min(int(one), 2**63 - 1) for one in sums[starts]], np.int64)[cover[places]]
    return _pattern(rows[order.rows], places, members, value=value, limit=at_least)


def _running(values: Ints) -> NDArray[Any]:
    """The sum of the values before each place, and of all: as Python's integers where 64 bits may not hold them."""
    is_small = float(values.astype(np.float64).sum()) < 2.0**62
    return np.concatenate([[0], np.cumsum(values if is_small else values.astype(object))])


def _nothing(limit: int) -> Finding:
    return Finding(_NO_ROWS, _NO_ROWS[:, None], pl.Series([], dtype=pl.Int64), limit)


def _pattern(rows: Ints, places: Ints, members: Ints, *, value: Ints, limit: int) -> Finding:
    """What was found, from places in its own sort order to positions in the table."""
    too_many = members.shape[1] > EVIDENCE_ORDERS
    if too_many:
        own_first = np.argsort(members != places[:, None], axis=1, kind="stable")[:, :EVIDENCE_ORDERS]
        members = np.take_along_axis(members, np.sort(own_first, axis=1), axis=1)
    return Finding(rows[places], rows[members], pl.Series(value, dtype=pl.Int64), limit)
