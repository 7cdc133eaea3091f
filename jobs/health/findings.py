"""What a check finds, and times in words."""

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import NamedTuple

from conf.settings import Settings

# A schedule of once an hour, and an hour for the run itself.
STALE_RUN = timedelta(hours=2)


class State(Enum):
    """How a part fares; `OFF` is one that is not used here."""

    OK = "ok"
    OFF = "off"
    WARN = "warn"
    DOWN = "down"


class Finding(NamedTuple):
    """What a check saw; `at` is when the run ended that it saw, of those parts that have runs."""

    state: State
    text: str
    at: datetime | None = None


Check = Callable[[Settings], Finding]


def dated(at: datetime, text: str) -> Finding:
    """A finding about something that a schedule should do again every hour."""
    is_stale = datetime.now(UTC) - at > STALE_RUN
    return Finding(State.WARN if is_stale else State.OK, f"{text} {age(at)} ago", at)


def age(at: datetime) -> str:
    """How long ago that was, as `duration`."""
    return duration(datetime.now(UTC) - at)


def duration(length: timedelta) -> str:
    """`12 s`, `3 min`, `5 h`, `2 days`."""
    seconds = max(length.total_seconds(), 0)
    for unit, of_seconds in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * of_seconds:
            return f"{seconds // of_seconds:.0f} {unit}"
    return f"{seconds:.0f} s"


def milliseconds_since(started: float) -> str:
    """`1,234 ms` since `time.monotonic()` was `started`."""
    return f"{(time.monotonic() - started) * 1000:,.0f} ms"
