"""Durations as people write them: seconds, or text with a unit."""

import re
from datetime import timedelta
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, PlainSerializer

_UNITS = {"ms": "milliseconds", "s": "seconds", "sec": "seconds", "m": "minutes", "min": "minutes", "h": "hours"}
_UNITS |= {unit: unit for unit in ("milliseconds", "seconds", "minutes", "hours")}
_UNITS |= {unit.removesuffix("s"): unit for unit in ("seconds", "minutes", "hours")}


def _duration(value: Any) -> timedelta:
    """Seconds as a number, or text with a unit."""
    if isinstance(value, timedelta):
        return value
    try:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return timedelta(seconds=value)
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]+)", value.strip()) if isinstance(value, str) else None
        if match and match[2] in _UNITS:
            return timedelta(**{_UNITS[match[2]]: float(match[1])})
    except (OverflowError, ValueError):  # no number, or more than there is time
        pass
    raise ValueError('is not a duration: write seconds (10) or text such as "10 s", "500 ms", "2 min"')


def _within_a_day(value: timedelta) -> timedelta:
    if value < timedelta(0):
        raise ValueError("must not be negative")
    if value > timedelta(days=1):
        raise ValueError("must be at most a day: every order of that long is kept in state")
    return value


# As JSON it is seconds, which `_duration` reads.
Duration = Annotated[
    timedelta, BeforeValidator(_duration), AfterValidator(_within_a_day), PlainSerializer(timedelta.total_seconds)
]
