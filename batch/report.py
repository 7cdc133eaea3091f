"""The report: what the marts say, as one HTML page that needs no network, no script and no other file."""

from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

from babel import Locale, UnknownLocaleError
from babel.dates import format_date, format_datetime
from babel.numbers import format_compact_decimal, format_decimal, format_percent
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from batch.charts import DailyChart, daily_chart
from batch.marts import Marts, Row
from conf.errors import SettingsError
from conf.rules import RULE_NAMES

_NOTHING = Markup('<span class="nothing" title="unknown">\N{EN DASH}</span>')


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
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= _Written(_locale(locale), ZoneInfo(surroundings.time_zone)).filters()
    return environment.get_template("report.html.j2").render(
        marts=marts,
        **surroundings._asdict(),
        language="en",
        reasons=_by_size(marts.reasons),
        frauds=_frauds(marts.trend),
        saved_by_day=_saved_by_day(marts.saved),
        saved_in_all=_saved_in_all(marts.saved),
        saved=marts.saved[-1]["cumulative_saved_amount"],
        consistency=_consistency(marts.monitoring),
        rule_names=RULE_NAMES,
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
    return sorted(((name, reasons[name]) for name in RULE_NAMES), key=lambda pair: (-pair[1], pair[0]))


def _consistency(monitoring: Sequence[Row]) -> str:
    """`Consistent` or `Inconsistent` for the newest run, or nothing before the first."""
    newest = [row["status"] for row in monitoring if row["run_id"] == monitoring[0]["run_id"]]
    return "" if not newest else "Consistent" if set(newest) == {"Consistent"} else "Inconsistent"


def _locale(name: str) -> Locale:
    try:
        return Locale.parse(name.replace("-", "_"))
    except (UnknownLocaleError, ValueError, TypeError) as error:
        raise SettingsError(f'"{name}" is not a locale: write en, en_ID or id, for example.') from error


class _Written:
    """How values are written: for people in a locale, and exactly for machines."""

    def __init__(self, locale: Locale, time_zone: ZoneInfo) -> None:
        self.locale = locale
        self.time_zone = time_zone

    def filters(self) -> dict[str, Any]:
        written = (self.whole, self.rupiah, self.short_rupiah, self.axis, self.percent, self.day, self.moment)
        return {filter_.__name__: filter_ for filter_ in written} | {"words": self.words, "per_day": self.per_day}

    def whole(self, value: int | None) -> Markup:
        return _NOTHING if value is None else _data(value, format_decimal(value, locale=self.locale))

    def per_day(self, value: float) -> Markup:
        return _data(value, format_decimal(value, format="#,##0.0", locale=self.locale))

    def rupiah(self, value: int | None) -> Markup:
        return _NOTHING if value is None else _data(value, self._money(format_decimal(value, locale=self.locale)))

    def short_rupiah(self, value: int) -> Markup:
        exact = self._money(format_decimal(value, locale=self.locale))
        return Markup('<data value="{}" title="{}">{}</data>').format(value, exact, self._money(self._compact(value, 2)))

    def axis(self, value: float) -> str:
        return self._compact(value, 1)

    def percent(self, value: float | None) -> Markup:
        return _NOTHING if value is None else _data(value, format_percent(value, format="#,##0.0%", locale=self.locale))

    def day(self, value: date, style: str = "d MMM") -> Markup:
        written = format_date(value, style, locale=self.locale)
        return Markup('<time datetime="{}">{}</time>').format(value.isoformat(), written)

    def moment(self, value: datetime, style: str = "d MMM y, HH:mm") -> Markup:
        written = format_datetime(value, style, tzinfo=self.time_zone, locale=self.locale)
        return Markup('<time datetime="{}">{}</time>').format(value.isoformat(), written)

    @staticmethod
    def words(name: str) -> str:
        """`night_quantity` as words."""
        return name.replace("_", " ")

    def _compact(self, value: float, digits: int) -> str:
        return format_compact_decimal(value, fraction_digits=digits, locale=self.locale)

    @staticmethod
    def _money(number: str) -> str:
        sign, digits = ("\N{MINUS SIGN}", number[1:]) if number.startswith("-") else ("", number)
        return f"{sign}Rp\N{NO-BREAK SPACE}{digits}"


def _data(value: float, written: str) -> Markup:
    return Markup('<data value="{}">{}</data>').format(value, written)
