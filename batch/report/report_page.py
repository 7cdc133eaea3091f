"""The report: what the marts say, as one HTML page that needs no network, no script and no other file."""

from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime
from pathlib import Path
from typing import NamedTuple

from batch.report.charts import DailyChart, daily_chart
from batch.report.marts import Marts, Row
from batch.report.pages import page_template
from conf.former_rules import SIX


class Expectation(NamedTuple):
    """What the gate found about one expectation: whether it stops what follows, and in words what breaks it."""

    table: str
    expected: str
    holds: bool
    severity: str
    stops: bool
    found: str


class Gate(NamedTuple):
    """What the gate found about one export run."""

    run_id: str
    expectations: Sequence[Expectation]


class Surroundings(NamedTuple):
    """What a page says beyond the marts.

    `gate` is None when none has run; `links` are title → address relative to the page; `time_zone` decides what a day is.
    """

    gate: Gate | None
    links: Mapping[str, str]
    time_zone: str
    rules_version: str
    written_at: datetime


def render_report(marts: Marts, surroundings: Surroundings, *, locale: str = "en") -> str:
    """The page, as HTML. Every figure also stands in a `data` element with its exact value.

    Args:
        marts: the figures.
        surroundings: what else the page says.
        locale: how numbers and dates are written; the words are English.

    Raises:
        SettingsError: there is no such locale.
    """
    template = page_template(Path(__file__).with_name("report.html.j2"), locale=locale, time_zone=surroundings.time_zone)
    return template.render(
        marts=marts,
        **surroundings._asdict(),
        language="en",
        reasons=_by_size(marts.reasons),
        frauds=_frauds(marts.trend),
        saved_by_day=_saved_by_day(marts.saved),
        saved_in_all=_saved_in_all(marts.saved),
        saved=marts.totals["saved_amount"],
        consistency=_consistency(marts.monitoring),
        rule_names=SIX,
        now=surroundings.written_at.astimezone(UTC),
    )


def _frauds(trend: Sequence[Row]) -> DailyChart:
    averages = [row["fraud_orders_7d_avg"] for row in trend]
    return daily_chart(_days(trend), [row["fraud_orders"] for row in trend], averages)


def _saved_by_day(saved: Sequence[Row]) -> DailyChart:
    return daily_chart(_days(saved), [row["saved_amount"] for row in saved])


def _saved_in_all(saved: Sequence[Row]) -> DailyChart:
    return daily_chart(_days(saved), [], [row["cumulative_saved_amount"] for row in saved], carry_on=True)


def _days(rows: Sequence[Row]) -> list[date]:
    return [row["order_date"] for row in rows]


def _by_size(reasons: Row) -> list[tuple[str, int]]:
    return sorted(((name, reasons[name]) for name in SIX), key=lambda pair: (-pair[1], pair[0]))


def _consistency(monitoring: Sequence[Row]) -> str:
    """`Consistent` or `Inconsistent` for the newest run, or nothing before the first."""
    newest = [row["status"] for row in monitoring if row["run_id"] == monitoring[0]["run_id"]]
    return "" if not newest else "Consistent" if set(newest) == {"Consistent"} else "Inconsistent"
