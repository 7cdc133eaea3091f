"""UTC days, by which raw_orders is partitioned: conditions that name them by constants, which is what BigQuery prunes by."""

from collections.abc import Collection, Iterator, Sequence
from datetime import date
from itertools import pairwise

PARTITIONED_BY = {"raw_orders": "created_date"}  # raw table → the time whose UTC day decides
_MOST_RANGES = 100  # in one condition: where days are more scattered, some between them are read as well

Range = tuple[date, date]  # the first and the last day of it


def ranges(days: Collection[date]) -> list[Range]:
    """The days as ranges of successive ones; where these were many, the narrowest gaps between them are closed."""
    ordered = sorted(days)
    gaps = [(later - earlier).days for earlier, later in pairwise(ordered)]
    widest = sorted(gaps, reverse=True)
    close = max(1, widest[_MOST_RANGES - 1]) if len(widest) >= _MOST_RANGES else 1
    found: list[Range] = []
    for day in ordered:
        if found and (day - found[-1][1]).days <= close:
            found[-1] = (found[-1][0], day)
        else:
            found.append((day, day))
    return found


def chunks(days: Collection[date], most: int) -> Iterator[list[date]]:
    """The days in order, `most` at a time."""
    ordered = sorted(days)
    for first in range(0, len(ordered), most):
        yield ordered[first : first + most]


def within(column: str, type_name: str, found: Sequence[Range]) -> str:
    """The condition that a time lies on one of the days; `type_name` is that of its literals: timestamp, timestamptz."""
    parts = (
        f"{column} between {type_name} '{first} 00:00:00+00' and {type_name} '{last} 23:59:59.999999+00'"
        for first, last in found
    )
    return f"({' or '.join(parts)})" if found else "false"
