"""Who stands near whom: intervals over orders in time order, as whole-column operations.

Everything here takes numpy columns of equal length and costs O(n log n), whatever the data: a hot product, a user with
thousands of orders or thousands of users in one interval make no loop longer.
"""

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


def ints(column: pl.Series) -> Ints:
    """An integer column without nulls, or one of times (as microseconds), as numpy."""
    values = column.to_numpy()
    return values.view(np.int64) if values.dtype.itemsize == 8 else values.astype(np.int64)


@dataclass(frozen=True)
class TimeOrder:
    """Orders sorted by group, then time: every interval of a group is a slice.

    Attributes:
        rows: position in the table of the order at each place.
        group: number of its group, 0 upwards, ascending.
        ts: its event time, microseconds.
        end: one past the last place of the same group whose time is at most `ts + width` (both ends belong).
    """

    rows: Ints
    group: Ints
    ts: Ints
    end: Ints


def time_order(keys: list[Ints], ts: Ints, width: int) -> TimeOrder:
    """Sort orders by group (equal keys) and time, and find the interval of length `width` that starts at each."""
    rows = np.lexsort([ts, *reversed(keys)])
    group = _numbered([key[rows] for key in keys])
    times = ts[rows]
    instants, rank = np.unique(times, return_inverse=True)
    last_rank = np.searchsorted(instants, times + width, side="right") - 1
    # Group and rank in one number: the ranks keep it far below 64 bits, which times themselves would not.
    places = group * len(instants) + rank
    end = np.searchsorted(places, group * len(instants) + last_rank, side="right")
    return TimeOrder(rows, group, times, end)


def _numbered(sorted_keys: list[Ints]) -> Ints:
    """Number the runs of equal keys, 0 upwards."""
    changes = [key[1:] != key[:-1] for key in sorted_keys]
    starts = np.logical_or.reduce(changes) if len(sorted_keys[0]) else np.zeros(0, bool)
    return np.concatenate([np.zeros(min(1, len(sorted_keys[0])), np.int64), np.cumsum(starts)])


def distinct_in_intervals(order: TimeOrder, value: Ints) -> Ints:
    """How many different values the interval that starts at each place holds.

    An occurrence of a value is its first in interval i when it lies in it and the one before it does not: from the
    first interval that reaches it, or the one after its predecessor's place, whichever is later. So the number of
    occurrences that are first in some interval up to i is a running count, and all places before i are among them.
    """
    places = np.arange(len(order.rows))
    reached_by = np.searchsorted(order.end, places, side="right")
    first_from = np.maximum(reached_by, _previous(order.group, value) + 1)
    return np.cumsum(np.bincount(first_from, minlength=len(places))) - places


def _previous(group: Ints, value: Ints) -> Ints:
    """The place of the same value's previous occurrence in the same group, or -1."""
    places = np.arange(len(value))
    by_value = np.lexsort([places, value, group])
    same = (np.diff(group[by_value]) == 0) & (np.diff(value[by_value]) == 0)
    previous = np.full(len(value), -1)
    previous[by_value[1:][same]] = by_value[:-1][same]
    return previous


def first_cover(start: Ints, end: Ints, length: int) -> Ints:
    """For each place below `length`, the first of the slices `start:end` (both ascending) that covers it, or -1."""
    places = np.arange(length)
    candidate = np.searchsorted(end, places, side="right")
    inside = candidate < len(start)
    covered = np.zeros(length, bool)
    covered[inside] = start[candidate[inside]] <= places[inside]
    return np.where(covered, candidate, -1)


@dataclass(frozen=True)
class Runs:
    """Orders of `length` users with consecutive ids in one group, all in one interval: one entry a run found.

    Attributes:
        start, end: per run (row) and user (column), the slice of places that hold this user's orders in the interval.
    """

    start: Ints
    end: Ints


def consecutive_runs(group: Ints, user: Ints, ts: Ints, length: int, width: int) -> Runs:
    """Every run of `length` consecutive users in a group with orders at most `width` apart.

    The columns are sorted by group, user, time. For each order, taken as the earliest of its run, ask whether each user
    near it in id has an order in the interval that it starts; a run is `length` neighbours in a row that all do.
    """
    pair = _numbered([group, user])  # one number for each user of each group: consecutive ids have consecutive numbers
    pair_group, pair_user = _firsts(pair, group), _firsts(pair, user)
    instants, rank = np.unique(ts, return_inverse=True)
    last_rank = np.searchsorted(instants, ts + width, side="right") - 1
    places = pair * len(instants) + rank

    def slice_of(distance: int) -> tuple[Ints, Ints]:
        """The orders of the user whose id is `distance` away, in the interval: an empty slice where there is none."""
        other = pair + distance
        exists = (other >= 0) & (other < len(pair_user))
        known = np.where(exists, other, pair)
        exists &= (pair_group[known] == group) & (pair_user[known] - user == distance)
        start = np.searchsorted(places, known * len(instants) + rank, side="left")
        end = np.searchsorted(places, known * len(instants) + last_rank, side="right")
        return start, np.where(exists, end, start)

    slices = {distance: slice_of(distance) for distance in range(1 - length, length)}
    found = [_runs_from(slices, lowest, length) for lowest in range(1 - length, 1)]
    return Runs(
        np.concatenate([run.start for run in found]),
        np.concatenate([run.end for run in found]),
    )


def _runs_from(slices: dict[int, tuple[Ints, Ints]], lowest: int, length: int) -> Runs:
    """The runs whose lowest user id is `lowest` away from the order that starts the interval."""
    start = np.column_stack([slices[distance][0] for distance in range(lowest, lowest + length)])
    end = np.column_stack([slices[distance][1] for distance in range(lowest, lowest + length)])
    complete = (end > start).all(axis=1)
    return Runs(start[complete], end[complete])


def _firsts(number: Ints, column: Ints) -> Ints:
    return column[np.flatnonzero(np.diff(number, prepend=-1))]


def crowded_among(rows: Ints, keys: list[Ints], ts: Ints, needed: int, width: int) -> Ints:
    """Those of the rows that lie among `needed` of them of one group (equal keys) at most `width` apart, ascending.

    All others can be in no pattern of that many orders, which is nearly all of them: so what costs more is asked of few.

    Args:
        rows: of the columns, sorted by group and time.
        keys, ts: columns.
        needed: orders.
        width: microseconds.
    """
    if len(rows) < needed:
        return rows[:0]
    first, last = rows[: len(rows) - needed + 1], rows[needed - 1 :]
    is_crowd = ts[last] - ts[first] <= width
    for key in keys:
        is_crowd &= key[first] == key[last]
    starts = np.flatnonzero(is_crowd)
    return np.sort(rows[first_cover(starts, starts + needed, len(rows)) >= 0])


@dataclass(frozen=True)
class Spans:
    """One stretch of time for each of some groups.

    Attributes:
        group: ascending.
        since, until: its stretch, both ends included, microseconds.
    """

    group: Ints
    since: Ints
    until: Ints

    def hold(self, group: Ints, ts: Ints) -> Bools:
        """Which rows lie in the stretch of their group."""
        if not len(self.group):
            return np.zeros(len(group), bool)
        place = np.minimum(np.searchsorted(self.group, group), len(self.group) - 1)
        held: Bools = (self.group[place] == group) & (self.since[place] <= ts) & (ts <= self.until[place])
        return held


def spans(group: Ints, ts: Ints, distance: int) -> Spans:
    """From the first to the last row of each group, and `distance` further at both ends."""
    rows = np.lexsort([ts, group])
    groups, firsts = np.unique(group[rows], return_index=True)
    lasts = np.append(firsts[1:], len(rows))[: len(firsts)] - 1
    return Spans(groups, ts[rows[firsts]] - distance, ts[rows[lasts]] + distance)


def first_of_each(order: TimeOrder, value: Ints, starts: Ints, count: int) -> Ints:
    """The places of the first `count` different values in the intervals that start at these places (one row each).

    Each of the intervals must hold that many.
    """
    previous = _previous(order.group, value)
    look_ahead = np.arange(4 * count)
    window = np.minimum(starts[:, None] + look_ahead, order.end[starts][:, None] - 1)
    is_first = (previous[window] < starts[:, None]) & (look_ahead < (order.end[starts] - starts)[:, None])
    nearest = np.argsort(~is_first, axis=1, kind="stable")[:, :count]
    found = np.take_along_axis(window, nearest, axis=1)
    for row in np.flatnonzero(is_first.sum(axis=1) < count):  # a value repeated far beyond the look-ahead
        start = starts[row]
        found[row] = start + np.flatnonzero(previous[start : order.end[start]] < start)[:count]
    return found
