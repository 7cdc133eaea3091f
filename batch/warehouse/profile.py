"""The profile of a raw table: what is computed over all of it on both sides, and what must come out the same.

BigQuery computes it with one query, and so does Postgres where a run exports only what has changed. A run that reads every
row profiles the rows as they are read (`RowsRead`), which costs less than half; the fingerprint is Postgres's own there too.

Per integer and time column its sum, least and greatest value, times as microseconds since 1970 and dates as days; over the
text columns together a fingerprint: the sum, over the rows, of the first 32 bits of the MD5 of the row's texts. None of it
depends on the order of rows, and all of it is exact. FLOAT64 and NUMERIC columns are left out: sums of the one are not
exact, and the raw tables keep money as INT64.
"""

from binascii import unhexlify
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from psycopg2.extensions import cursor as Cursor

from batch.warehouse.manifest import Column

if TYPE_CHECKING:
    from google.cloud import bigquery

Profile = dict[str, dict[str, int | str | None]]

TEXTS = "(texts)"  # the key of the fingerprint: no column is called that
_FIGURES = ("sum", "min", "max", "fingerprint")
_ORDERED = ("INT64", "TIMESTAMP", "DATE")


@dataclass(frozen=True)
class TableProfile:
    """All rows of a table: how many, and their profile."""

    rows: int
    columns: Profile


@dataclass(frozen=True)
class _Dialect:
    """How one of the two databases writes the parts of the query; `{}` stands for a quoted column or an expression."""

    quote: str
    sum: Mapping[str, str]  # by column or type: the exact sum of the values, as an integer
    extreme: Mapping[str, str]  # by column or type: the least or greatest value, as an integer
    text: Mapping[str, str]  # by type: a value as text, never null
    concatenated: Callable[[Iterable[str]], str]
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
        expressions = ["count(*)"]
        for column in _ordered(columns):
            expressions += self.figures(column)
        if texts := _texts(columns):
            expressions.append(f"sum({self.first_bits.format(self.row_md5(texts))})")
        named = (f"{expression} as f{position}" for position, expression in enumerate(expressions))
        return f"select {', '.join(named)} from {table}"


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
        "STRING": "coalesce({}, chr(30))",
        "BOOL": "coalesce({}::text, chr(30))",
        # Most arrays are empty, and that is seen in a third of the time that it takes to join one.
        "ARRAY<STRING>": "case when cardinality({0}) > 0 then array_to_string({0}, ',') else '' end",
    },
    concatenated=lambda texts: " || chr(31) || ".join(texts),
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


def destination_profile(client: "bigquery.Client", table: str, columns: Sequence[Column]) -> TableProfile:
    """The profile of a BigQuery table, given as `project.dataset.table`: one scan, never from the query cache.

    Raises:
        google.api_core.exceptions.GoogleAPICallError: BigQuery refuses.
    """
    from google.cloud import bigquery  # half a second, which the export has no use for

    uncached = bigquery.QueryJobConfig(use_query_cache=False)
    (row,) = client.query(_BIGQUERY.query(f"`{table}`", columns), job_config=uncached).result()
    return _profile(row.values(), columns)


def row_md5(columns: Sequence[Column]) -> str | None:
    """The SQL expression for the MD5 of a Postgres row's texts, 32 hexadecimal digits; None where no text is in it.

    Its first bits are what the fingerprint sums. Postgres needs longer to make a number of them than to send them all.
    """
    texts = _texts(columns)
    return _POSTGRES.row_md5(texts) if texts else None


class RowsRead:
    """The profile of rows, made from their batches: over all rows of a table the same as `source_profile`."""

    def __init__(self, columns: Sequence[Column]) -> None:
        self._columns = columns
        self.profile = _profile((0, *[None] * (3 * len(columns) + 1)), columns)  # as of an empty table

    def add(self, batch: pa.RecordBatch) -> None:
        """Count these rows too: columns by name, and where there are texts their `row_md5` as TEXTS."""
        figures: Profile = {column.name: _figures(batch.column(column.name)) for column in _ordered(self._columns)}
        if _texts(self._columns):
            figures[TEXTS] = {"fingerprint": _fingerprint(batch.column(TEXTS))}
        self.profile = together([self.profile, TableProfile(batch.num_rows, figures)])


def together(profiles: Sequence[TableProfile]) -> TableProfile:
    """The profile of a table from those of its parts, at least one, which share no row."""
    return reduce(_joined, profiles)


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


def _figures(values: pa.Array) -> dict[str, int | str | None]:
    """Of integers, or of times and dates as integers; exact, also where the sum is longer than 64 bits."""
    days = values.cast(pa.int32()) if pa.types.is_date32(values.type) else values
    numbers = days.drop_null().cast(pa.int64()).to_numpy()
    if not len(numbers):
        return dict.fromkeys(("sum", "min", "max"))
    high, low = numbers >> 32, numbers & 0xFFFFFFFF
    total = (int(high.sum(dtype=np.int64)) << 32) + int(low.sum(dtype=np.int64))
    return {"sum": str(total), "min": int(numbers.min()), "max": int(numbers.max())}


def _fingerprint(md5s: pa.StringArray) -> str | None:
    """The sum of the first 32 bits of each; nothing of no rows."""
    if not len(md5s):
        return None
    first, *_, end = np.frombuffer(md5s.buffers()[1], np.int32)[md5s.offset : md5s.offset + len(md5s) + 1]
    bits = np.frombuffer(unhexlify(md5s.buffers()[2][first:end]), ">u4")[::4]
    return str(bits.sum(dtype=np.int64))


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
