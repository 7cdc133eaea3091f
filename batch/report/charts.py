"""Charts of daily figures as geometry: everything in percent of the plot, so that a page can stretch it and no text scales."""

import math
from collections.abc import Sequence
from datetime import date, timedelta
from typing import NamedTuple

_MOST_TICKS = 4
_MOST_LABELS = 5
_BAR_SHARE = 0.72  # of a day's width
_WIDEST_BAR = 9.0  # percent of the plot


class Bar(NamedTuple):
    """A day's bar: `row` is the day's place in the series; SVG's y runs downwards."""

    row: int
    x: float
    y: float
    width: float
    height: float


class Tick(NamedTuple):
    """A grid line: its value, and its height in percent from the bottom."""

    value: float
    height: float


class DayLabel(NamedTuple):
    """A day named under the plot, and the middle of its bar."""

    day: date
    x: float


class DailyChart(NamedTuple):
    """Bars a day, and a line over them as an SVG path."""

    bars: list[Bar]
    line: str
    ticks: list[Tick]
    labels: list[DayLabel]


def daily_chart(
    days: Sequence[date], bars: Sequence[float], line: Sequence[float] = (), *, carry_on: bool = False
) -> DailyChart:
    """Lay out figures of some days (ascending, not empty, none negative); days between them stay empty.

    Args:
        days: the days that have figures.
        bars: a figure a day; empty for a chart of the line alone.
        line: a figure a day, drawn as a level that lasts the day; empty for none.
        carry_on: over an empty day the line keeps its level, as a running total does; otherwise it breaks off.
    """
    first = days[0]
    places = [(day - first).days for day in days]
    width = 100 / (places[-1] + 1)
    top, ticks = _scale(max([*bars, *line]))
    bar_width = min(width * _BAR_SHARE, _WIDEST_BAR)
    return DailyChart(
        bars=[
            Bar(row, (place + 0.5) * width - bar_width / 2, 100 * (1 - value / top), bar_width, 100 * value / top)
            for row, (place, value) in enumerate(zip(places, bars, strict=False))
        ],
        line=_steps(places, [100 * (1 - value / top) for value in line], width, carry_on=carry_on),
        ticks=ticks,
        labels=[DayLabel(first + timedelta(days=place), (place + 0.5) * width) for place in _spread(places[-1] + 1)],
    )


def _scale(highest: float) -> tuple[int, list[Tick]]:
    """The top of the plot and its grid lines: whole, round numbers, a few of them. (Floats would miss a great one.)"""
    least_top = math.ceil(max(highest, 1))
    least_step = -(-least_top // _MOST_TICKS)
    magnitude = 10 ** (len(str(least_step)) - 1)
    step = next(step for tenths in (10, 20, 25, 50, 100) if (step := -(-tenths * magnitude // 10)) >= least_step)
    count = -(-least_top // step)
    return step * count, [Tick(step * number, 100 * number / count) for number in range(count + 1)]


def _steps(places: Sequence[int], heights: Sequence[float], width: float, *, carry_on: bool) -> str:
    parts: list[str] = []
    end = None
    for place, height in zip(places, heights, strict=False):
        joined = end is not None and (carry_on or place == end)
        parts.append(f"H{place * width:.3f}V{height:.3f}" if joined else f"M{place * width:.3f} {height:.3f}")
        end = place + 1
        parts.append(f"H{end * width:.3f}")
    return "".join(parts)


def _spread(days: int) -> list[int]:
    """Which of so many days are named: the first, the last, and some evenly between."""
    if days <= _MOST_LABELS:
        return list(range(days))
    return [round(number * (days - 1) / (_MOST_LABELS - 1)) for number in range(_MOST_LABELS)]
