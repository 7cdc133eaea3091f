"""The report: what the marts say, as one HTML page that needs no network, no script and no other file."""

from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime
from pathlib import Path
from typing import NamedTuple

from batch.report.charts import DailyChart, daily_chart
from batch.report.marts import WEEKS, Marts, Row
from batch.report.pages import page_template

LEAST_REVIEWED = 20  # hits of a rule, from which on precision is told: as mart_rule_quality has it of a week


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

    `gate` is None when none has run; `links` are title → address relative to the page; `time_zone` decides what a day is;
    `rules` are the names of those in force, which are shown although they have hit nothing.
    """

    gate: Gate | None
    links: Mapping[str, str]
    time_zone: str
    rules_version: str
    rules: Sequence[str]
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
        weeks=WEEKS,
        least_reviewed=LEAST_REVIEWED,
        language="en",
        reasons=_with_those_of_none(marts.reasons, surroundings.rules),
        reasons_of=_by_day(marts.reasons_by_day),
        rule_quality=_with_precision(marts.rule_quality),
        frauds=_frauds(marts.trend),
        saved_by_day=_saved_by_day(marts.saved),
        saved_in_all=_saved_in_all(marts.saved),
        saved=marts.totals["saved_amount"],
        consistency=_consistency(marts.monitoring),
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


def _with_those_of_none(reasons: Sequence[Row], rules: Sequence[str]) -> list[Row]:
    """Reasons, the most frequent first, and behind them the rules that have hit nothing."""
    found = {row["reason"] for row in reasons}
    return [*reasons, *({"reason": rule, "orders": 0, "amount": 0} for rule in sorted(rules) if rule not in found)]


def _with_precision(rules: Sequence[Row]) -> list[Row]:
    """Rules with the share of frauds among the reviewed ones of their hits; None where these are few."""
    return [
        dict(row) | {"precision": row["confirmed"] / row["reviewed"] if row["reviewed"] >= LEAST_REVIEWED else None}
        for row in rules
    ]


def _by_day(reasons: Sequence[Row]) -> dict[date, list[Row]]:
    of: dict[date, list[Row]] = {}
    for row in reasons:
        of.setdefault(row["order_date"], []).append(row)
    return of


def _consistency(monitoring: Sequence[Row]) -> str:
    """`Consistent` or `Inconsistent` for the newest run, or nothing before the first."""
    newest = [row["status"] for row in monitoring if row["run_id"] == monitoring[0]["run_id"]]
    return "" if not newest else "Consistent" if set(newest) == {"Consistent"} else "Inconsistent"
