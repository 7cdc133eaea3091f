"""UTC days, by which tables are partitioned: conditions that name them by constants, which is what BigQuery prunes by."""

from collections.abc import Collection, Iterator, Sequence
from datetime import date
from itertools import pairwise

PARTITIONED_BY = {"raw_orders": "created_date", "order_outcomes": "decided_at"}  # table → the time whose UTC day decides
_MOST_RANGES = 100  # in one condition: where days are more scattered, some between them are read as well

Range = tuple[date, date]  # the first and the last day of it


def ranges(days: Collection[date], most: int | None = _MOST_RANGES) -> list[Range]:
    """The days as ranges of successive ones; where these were more than `most`, the narrowest gaps between them are closed.

    None is for who writes what lies between them too: each gap stays.
    """
    ordered = sorted(days)
    if not ordered:
        return []
    gaps = [place for place, (before, after) in enumerate(pairwise(ordered), 1) if (after - before).days > 1]
    widest = sorted(gaps, key=lambda place: ordered[place - 1] - ordered[place])  # which is negative
    begins = [0, *sorted(widest if most is None else widest[: most - 1])]
    return [(ordered[begin], ordered[end - 1]) for begin, end in zip(begins, [*begins[1:], len(ordered)], strict=True)]


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
