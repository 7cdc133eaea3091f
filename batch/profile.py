"""The profile of a raw table: what Postgres and BigQuery each compute over all of it, and what must come out the same.

Per integer and time column its sum, least and greatest value, times as microseconds since 1970 and dates as days; over the
text columns together a fingerprint: the sum, over the rows, of the first 32 bits of the MD5 of the row's texts. None of it
depends on the order of rows, and all of it is exact. FLOAT64 and NUMERIC columns are left out: sums of the one are not
exact, and the raw tables keep money as INT64.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from google.cloud import bigquery
from psycopg2.extensions import cursor as Cursor

from batch.manifest import Column

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
    fingerprint_of: str  # a text: the sum of its hashes

    def figures(self, column: Column) -> list[str]:
        """Sum, least and greatest value of an integer or time column."""
        name, kind = self.quote.format(column.name), column.name if column.name in self.sum else column.type
        extreme = self.extreme[kind]
        return [self.sum[kind].format(name), extreme.format(f"min({name})"), extreme.format(f"max({name})")]

    def fingerprint(self, columns: Sequence[Column]) -> str:
        """The sum of the hashes of the rows' texts, which a control character sets apart."""
        texts = [self.text[column.type].format(self.quote.format(column.name)) for column in columns]
        return self.fingerprint_of.format(self.concatenated(texts))

    def query(self, table: str, columns: Sequence[Column]) -> str:
        """One scan of `table`, one row: the number of rows, the figures of each column, the fingerprint."""
        expressions = ["count(*)"]
        for column in _ordered(columns):
            expressions += self.figures(column)
        if texts := _texts(columns):
            expressions.append(self.fingerprint(texts))
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
        "ARRAY<STRING>": "coalesce(array_to_string({}, ','), '')",
    },
    concatenated=lambda texts: " || chr(31) || ".join(texts),
    fingerprint_of="sum(('x' || left(md5({}), 8))::bit(32)::bigint)",
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
    fingerprint_of="sum(cast(concat('0x', substr(to_hex(md5({})), 1, 8)) as int64))",
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


def destination_profile(client: bigquery.Client, table: str, columns: Sequence[Column]) -> TableProfile:
    """The profile of a BigQuery table, given as `project.dataset.table`: one scan, never from the query cache.

    Raises:
        google.api_core.exceptions.GoogleAPICallError: BigQuery refuses.
    """
    uncached = bigquery.QueryJobConfig(use_query_cache=False)
    (row,) = client.query(_BIGQUERY.query(f"`{table}`", columns), job_config=uncached).result()
    return _profile(row.values(), columns)


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
