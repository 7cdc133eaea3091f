"""Pages that need no network, no script and no other file: how they are made, and how values are written on them."""

from datetime import date, datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from babel import Locale, UnknownLocaleError
from babel.dates import format_date, format_datetime
from babel.numbers import format_compact_decimal, format_decimal, format_percent
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from conf.errors import SettingsError

_NOTHING = Markup('<span class="nothing" title="unknown">\N{EN DASH}</span>')


def page_template(path: Path, *, locale: str, time_zone: str) -> Template:
    """A page's template, with the parts and the style that all pages share and the filters that write values.

    Args:
        path: of the template.
        locale: how numbers and dates are written.
        time_zone: of the times shown.

    Raises:
        SettingsError: there is no such locale.
    """
    environment = Environment(
        loader=FileSystemLoader([path.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= _Written(_locale(locale), ZoneInfo(time_zone)).filters()
    return environment.get_template(path.name)


def write_page(path: Path, page: str) -> Path:
    """Write a page and return its full path. One that was there before stays until the new one is complete."""
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(page, encoding="utf-8")
    return unfinished.replace(path)


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
