"""The profile of a raw table, or of one day of it: what is computed on both sides, and what must come out the same.

BigQuery computes it with one query, and so does Postgres where a run exports only what has changed. A run that reads every
row profiles the rows as they are read (`RowsRead`), which costs less than half; the fingerprint is Postgres's own there too.
Of a table that is partitioned by day (days.py) each day has a profile; that of the table is made of these.

Per integer and time column its sum, least and greatest value, times as microseconds since 1970 and dates as days; over the
text columns together a fingerprint: the sum, over the rows, of the first 32 bits of the MD5 of the row's texts. None of it
depends on the order of rows, and all of it is exact. FLOAT64 and NUMERIC columns are left out: sums of the one are not
exact, and the raw tables keep money as INT64.
"""

from binascii import unhexlify
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from functools import reduce
from typing import Any

import numpy as np
import pyarrow as pa
from psycopg2.extensions import cursor as Cursor

from batch.warehouse.days import PARTITIONED_BY, Range, ranges, within
from batch.warehouse.manifest import Column, Profile, TableProfile

Days = dict[date | None, TableProfile]
"""UTC day → the profile of its rows; of a table that is not partitioned: None → that of all rows."""
Ask = Callable[[str], list[dict[str, Any]]]
"""Gives the rows of a query to BigQuery."""

TEXTS = "(texts)"  # the key of the fingerprint: no column is called that
_FIGURES = ("sum", "min", "max", "fingerprint")
_ORDERED = ("INT64", "TIMESTAMP", "DATE")
_Order = slice | np.ndarray  # of a batch's rows: as they are, or by these positions
_EPOCH = date(1970, 1, 1)
_MICROSECONDS_A_DAY = 86_400_000_000


@dataclass(frozen=True)
class _Dialect:
    """How one of the two databases writes the parts of the query; `{}` stands for a quoted column or an expression."""

    quote: str
    sum: Mapping[str, str]  # by column or type: the exact sum of the values, as an integer
    extreme: Mapping[str, str]  # by column or type: the least or greatest value, as an integer
    text: Mapping[str, str]  # by type: a value as text, never null
    concatenated: Callable[[Iterable[str]], str]
    day: str  # the UTC day of a time
    time: str  # the type of a literal
    md5: str  # of a text, as 32 hexadecimal digits
    first_bits: str  # of such digits: the first 32, as an integer

    def figures(self, column: Column) -> list[str]:
        """Sum, least and greatest value of an integer or time column."""
        name, kind = self.quote.format(column.name), column.name if column.name in self.sum else column.type
        extreme = self.extreme[kind]
        return [self.sum[kind].format(name), extreme.format(f"min({name})"), extreme.format(f"max({name})")]

    def row_md5(self, columns: Sequence[Column]) -> str:
        """The MD5 of a row's texts, which a control character sets apart."""
        texts = [self.text[column.type].format(self.quote.format(column.name)) for column in columns]
        return self.md5.format(self.concatenated(texts))

    def query(self, table: str, columns: Sequence[Column]) -> str:
        """One scan of `table`, one row: the number of rows, the figures of each column, the fingerprint."""
        return f"select {self._expressions(columns)} from {table}"

    def query_by_day(self, table: str, columns: Sequence[Column], partitioned_by: str, found: Sequence[Range] | None) -> str:
        """The same for each UTC day that has rows, of all or of some ranges of days: the day first."""
        time = self.quote.format(partitioned_by)
        where = "" if found is None else f" where {within(time, self.time, found)}"
        return f"select {self.day.format(time)} as utc_day, {self._expressions(columns)} from {table}{where} group by 1"

    def _expressions(self, columns: Sequence[Column]) -> str:
        expressions = ["count(*)"]
        for column in _ordered(columns):
            expressions += self.figures(column)
        if texts := _texts(columns):
            expressions.append(f"sum({self.first_bits.format(self.row_md5(texts))})")
        return ", ".join(f"{expression} as f{position}" for position, expression in enumerate(expressions))


_POSTGRES = _Dialect(
    quote='"{}"',
    sum={
        "change_xid": "sum({}::text::bigint)",  # an xid8 has no sum
        "INT64": "sum({})",
        "TIMESTAMP": "sum(extract(epoch from {})) * 1000000",
        "DATE": "sum({} - date '1970-01-01')",
    },
    extreme={
        "change_xid": "{}::text::bigint",
        "INT64": "{}",
        "TIMESTAMP": "extract(epoch from {}) * 1000000",
        "DATE": "{} - date '1970-01-01'",
    },
    text={
        "STRING": "coalesce({}::text, chr(30))",
        "BOOL": "coalesce({}::text, chr(30))",
        # Most arrays are empty, and that is seen in a third of the time that it takes to join one.
        "ARRAY<STRING>": "case when cardinality({0}) > 0 then array_to_string({0}, ',') else '' end",
    },
    concatenated=lambda texts: " || chr(31) || ".join(texts),
    day="({} at time zone 'UTC')::date",
    time="timestamptz",
    md5="md5({})",
    first_bits="('x' || left({}, 8))::bit(32)::bigint",
)
_BIGQUERY = _Dialect(
    quote="`{}`",
    sum={
        "INT64": "sum(cast({} as bignumeric))",
        "TIMESTAMP": "sum(cast(unix_micros({}) as bignumeric))",
        "DATE": "sum(cast(unix_date({}) as bignumeric))",
    },
    extreme={"INT64": "{}", "TIMESTAMP": "unix_micros({})", "DATE": "unix_date({})"},
    text={
        "STRING": "coalesce({}, chr(30))",
        "BOOL": "coalesce(cast({} as string), chr(30))",
        "ARRAY<STRING>": "coalesce(array_to_string({}, ','), '')",
    },
    concatenated=lambda texts: f"concat({', chr(31), '.join(texts)})",
    day="date({})",
    time="timestamp",
    md5="to_hex(md5({}))",
    first_bits="cast(cast(concat('0x', substr({}, 1, 8)) as int64) as bignumeric)",  # their sum passes 64 bits at 2^31 rows
)


def source_profile(cursor: Cursor, table: str, columns: Sequence[Column]) -> TableProfile:
    """The profile of a Postgres table as the cursor's transaction sees it: one scan, about 1.2 s per million orders.

    Raises:
        psycopg2.Error: Postgres refuses; see batch.postgres.explained.
    """
    cursor.execute(_POSTGRES.query(table, columns))
    row = cursor.fetchone()
    assert row is not None  # noqa: S101  an aggregate without grouping gives one row
    return _profile(row, columns)


def source_days(
    cursor: Cursor, table: str, columns: Sequence[Column], days: Collection[date] | None = None
) -> dict[date, TableProfile]:
    """The profiles of some days of a partitioned Postgres table, or of all that have rows: of the former each has one.

    Each range of days is a query: in one for all of them, every row would be held against every range.

    Raises:
        psycopg2.Error: Postgres refuses; see batch.postgres.explained.
    """
    rows: list[tuple[Any, ...]] = []
    wanted: list[list[Range] | None] = [None] if days is None else [[one] for one in ranges(days)]
    for one in wanted:
        cursor.execute(_POSTGRES.query_by_day(table, columns, PARTITIONED_BY[table], one))
        rows += cursor.fetchall()
    return _by_day(rows, columns, days)


def destination_profile(ask: Ask, table: str, columns: Sequence[Column]) -> TableProfile:
    """The profile of a BigQuery table, given as `project.dataset.table`: one scan.

    Raises:
        google.api_core.exceptions.GoogleAPICallError: BigQuery refuses.
    """
    (row,) = ask(_BIGQUERY.query(f"`{table}`", columns))
    return _profile(list(row.values()), columns)


def destination_days(
    ask: Ask, table: str, columns: Sequence[Column], days: Collection[date] | None = None
) -> dict[date, TableProfile]:
    """The profiles of some days of a partitioned BigQuery table, read from their partitions alone, or of all that have rows.

    Raises:
        google.api_core.exceptions.GoogleAPICallError: BigQuery refuses.
    """
    if days is not None and not days:
        return {}
    name = table.rpartition(".")[2]
    found = None if days is None else ranges(days)
    rows = ask(_BIGQUERY.query_by_day(f"`{table}`", columns, PARTITIONED_BY[name], found))
    return _by_day([list(row.values()) for row in rows], columns, days)


def row_md5(columns: Sequence[Column]) -> str | None:
    """The SQL expression for the MD5 of a Postgres row's texts, 32 hexadecimal digits; None where no text is in it.

    Its first bits are what the fingerprint sums. Postgres needs longer to make a number of them than to send them all.
    """
    texts = _texts(columns)
    return _POSTGRES.row_md5(texts) if texts else None


class RowsRead:
    """The profiles of rows, made from their batches: over all rows of a table the same as Postgres's own."""

    def __init__(self, table: str, columns: Sequence[Column]) -> None:
        self._columns = columns
        self._partitioned_by = PARTITIONED_BY.get(table)
        self.days: Days = {}

    def add(self, batch: pa.RecordBatch) -> None:
        """Count these rows too: columns by name, and where there are texts their `row_md5` as TEXTS."""
        if not batch.num_rows:
            return
        days, order, starts = self._groups(batch)
        figures = {column.name: _figures(batch.column(column.name), order, starts) for column in _ordered(self._columns)}
        if _texts(self._columns):
            figures[TEXTS] = _fingerprints(batch.column(TEXTS), order, starts)
        rows = np.diff(starts, append=batch.num_rows)
        for number, day in enumerate(days):
            found = TableProfile(int(rows[number]), {name: each[number] for name, each in figures.items()})
            self.days[day] = together([self.days[day], found]) if day in self.days else found

    def _groups(self, batch: pa.RecordBatch) -> tuple[Sequence[date | None], _Order, np.ndarray]:
        """The days of a batch, how its rows are to be ordered by them, and where each one begins in that order."""
        if self._partitioned_by is None:
            return [None], slice(None), np.zeros(1, np.int64)
        times = batch.column(self._partitioned_by).cast(pa.int64()).to_numpy()
        numbers = times // _MICROSECONDS_A_DAY
        order: _Order = slice(None)
        if np.any(numbers[1:] < numbers[:-1]):
            order = np.argsort(numbers, kind="stable")
            numbers = numbers[order]
        days, starts = np.unique(numbers, return_index=True)
        return [_EPOCH + timedelta(days=int(day)) for day in days], order, starts


def together(profiles: Sequence[TableProfile]) -> TableProfile:
    """The profile of rows from those of their parts, at least one, which share no row."""
    return reduce(_joined, profiles)


def of_all_days(profiles: Iterable[TableProfile], columns: Sequence[Column]) -> TableProfile:
    """The profile of a table from those of its days, of which there may be none."""
    return together([empty_profile(columns), *profiles])


def empty_profile(columns: Sequence[Column]) -> TableProfile:
    """The profile of no rows."""
    return _profile((0, *[None] * (3 * len(_ordered(columns)) + 1)), columns)


def day_differences(source: Mapping[date, TableProfile], destination: Mapping[date, TableProfile]) -> list[str]:
    """What differs between days of both sides, with the day before it; one side may lack a day that has no rows."""
    found = []
    for day in sorted(source.keys() | destination.keys()):
        ours, theirs = source.get(day), destination.get(day)
        if ours is None or theirs is None or not (ours.rows and theirs.rows):
            rows = (each.rows if each else 0 for each in (ours, theirs))
            found += [f"{day}: {difference}" for difference in differences(*(TableProfile(count, {}) for count in rows))]
        else:
            found += [f"{day}: {difference}" for difference in differences(ours, theirs)]
    return found


def differences(source: TableProfile, destination: TableProfile) -> list[str]:
    """What differs between the two, one line a figure, such as `amount_numeric: sum 7 in Postgres, 8 in BigQuery`."""
    found = []
    if source.rows != destination.rows:
        found.append(_difference("rows", source.rows, destination.rows))
    for column in sorted(source.columns.keys() | destination.columns.keys()):
        ours, theirs = source.columns.get(column, {}), destination.columns.get(column, {})
        differing = [figure for figure in _FIGURES if ours.get(figure) != theirs.get(figure)]
        found += [_difference(f"{column}: {figure}", ours.get(figure), theirs.get(figure)) for figure in differing]
    return found


def _figures(values: pa.Array, order: _Order, starts: np.ndarray) -> list[dict[str, int | str | None]]:
    """Of integers, or of times and dates as integers, by day; exact, also where a sum is longer than 64 bits."""
    as_integers = (values.cast(pa.int32()) if pa.types.is_date32(values.type) else values).cast(pa.int64())
    numbers = as_integers.fill_null(0).to_numpy()[order]
    high, low = np.add.reduceat(numbers >> 32, starts), np.add.reduceat(numbers & 0xFFFFFFFF, starts)
    least, greatest, known = numbers, numbers, np.ones(len(starts))
    if values.null_count:
        valid = values.is_valid().to_numpy(zero_copy_only=False)[order]
        limits = np.iinfo(np.int64)
        least, greatest = np.where(valid, numbers, limits.max), np.where(valid, numbers, limits.min)
        known = np.add.reduceat(valid.astype(np.int64), starts)
    least, greatest = np.minimum.reduceat(least, starts), np.maximum.reduceat(greatest, starts)
    return [
        {"sum": str((int(high[day]) << 32) + int(low[day])), "min": int(least[day]), "max": int(greatest[day])}
        if known[day]
        else dict.fromkeys(("sum", "min", "max"))
        for day in range(len(starts))
    ]


def _fingerprints(md5s: pa.StringArray, order: _Order, starts: np.ndarray) -> list[dict[str, int | str | None]]:
    """By day the sum of the first 32 bits of each."""
    first, *_, end = np.frombuffer(md5s.buffers()[1], np.int32)[md5s.offset : md5s.offset + len(md5s) + 1]
    bits = np.frombuffer(unhexlify(md5s.buffers()[2][first:end]), ">u4")[::4].astype(np.int64)
    return [{"fingerprint": str(total)} for total in np.add.reduceat(bits[order], starts)]


def _joined(one: TableProfile, other: TableProfile) -> TableProfile:
    joined: Profile = {
        column: {figure: _JOIN[figure](value, other.columns[column][figure]) for figure, value in figures.items()}
        for column, figures in one.columns.items()
    }
    return TableProfile(one.rows + other.rows, joined)


def _known(join: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Of two figures that may be of no values at all."""
    return lambda one, other: join(one, other) if None not in (one, other) else one if other is None else other


_sum = _known(lambda one, other: str(int(one) + int(other)))
_JOIN = {"sum": _sum, "min": _known(min), "max": _known(max), "fingerprint": _sum}


def _profile(values: Sequence[Any], columns: Sequence[Column]) -> TableProfile:
    """A query's one row, read in the order in which the query was put together."""
    rows, *figures = values
    profile: Profile = {}
    for position, column in enumerate(_ordered(columns)):
        total, least, greatest = figures[3 * position : 3 * position + 3]
        profile[column.name] = {"sum": _digits(total), "min": _whole(least), "max": _whole(greatest)}
    if _texts(columns):
        profile[TEXTS] = {"fingerprint": _digits(figures[-1])}
    return TableProfile(rows, profile)


def _by_day(
    rows: Iterable[Sequence[Any]], columns: Sequence[Column], days: Collection[date] | None
) -> dict[date, TableProfile]:
    found = {day: _profile(values, columns) for day, *values in rows}
    return found if days is None else {day: found.get(day, empty_profile(columns)) for day in days}


def _ordered(columns: Sequence[Column]) -> list[Column]:
    return [column for column in columns if column.type in _ORDERED]


def _texts(columns: Sequence[Column]) -> list[Column]:
    return [column for column in columns if column.type in _POSTGRES.text]


def _whole(value: Any) -> int | None:
    return None if value is None else int(value)


def _digits(value: Any) -> str | None:
    """A sum may be longer than 64 bits, which JSON readers do not take as a number."""
    return None if value is None else str(int(value))


def _difference(what: str, ours: object, theirs: object) -> str:
    return f"{what} {ours} in Postgres, {theirs} in BigQuery"
