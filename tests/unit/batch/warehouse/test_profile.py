"""The profile of a table without databases: what is asked of them, how their answers are read and compared."""

from collections import Counter
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any, cast

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg2.extensions import cursor as Cursor

from batch.warehouse.manifest import Column, Profile, TableProfile
from batch.warehouse.profile import (
    TEXTS,
    RowsRead,
    day_differences,
    destination_days,
    destination_profile,
    differences,
    of_all_days,
    source_profile,
    together,
)
from tests.oracle.googlesql import GoogleSql

COLUMNS = [
    Column("order_id", "STRING"),
    Column("amount_numeric", "INT64"),
    Column("event_ts", "TIMESTAMP"),
    Column("day", "DATE"),
    Column("is_member", "BOOL"),
    Column("reasons", "ARRAY<STRING>"),
    Column("ratio", "FLOAT64"),
    Column("change_xid", "INT64"),
]
FIGURES: Profile = {
    "amount_numeric": {"sum": "27670116110564327421", "min": -5, "max": 2**63 - 1},
    "event_ts": {"sum": "1735689600000002", "min": -1, "max": 1_735_689_600_000_001},
    "day": {"sum": "20454", "min": 0, "max": 20454},
    "change_xid": {"sum": "12", "min": 5, "max": 7},
    TEXTS: {"fingerprint": "3860614417"},
}


class Recorder:
    """Stands for a connection to either database: remembers the query, gives one row."""

    def __init__(self, row: tuple[Any, ...]) -> None:
        self.row, self.query_text = row, ""

    def execute(self, query: str) -> None:
        self.query_text = query

    def fetchone(self) -> tuple[Any, ...]:
        return self.row

    def ask(self, query: str) -> list[dict[str, Any]]:
        self.query_text = query
        return [{f"f{position}": value for position, value in enumerate(self.row)}]


def test_both_databases_answers_are_read_into_the_same_profile() -> None:
    postgres = Recorder(
        (
            *(3, Decimal("27670116110564327421"), -5, 2**63 - 1),
            *(Decimal("1735689600000002.000000"), Decimal("-1.000000"), Decimal("1735689600000001.000000")),
            *(20454, 0, 20454, Decimal("12"), 5, 7, Decimal("3860614417")),
        )
    )
    emulated = Recorder(
        (
            *(3, Decimal("27670116110564327421.00000"), -5, 2**63 - 1),
            *(Decimal("1735689600000002.00000"), -1, 1_735_689_600_000_001),
            *(Decimal("20454.00000"), 0, 20454, Decimal("12.00000"), 5, 7, 3860614417),
        )
    )
    expected = TableProfile(3, FIGURES)
    assert source_profile(cast("Cursor", postgres), "raw_orders", COLUMNS) == expected
    assert destination_profile(emulated.ask, "p.d.raw_orders", COLUMNS) == expected


def test_an_empty_table_has_a_profile_of_nothing() -> None:
    empty = Recorder((0, *[None] * 13))
    nothing: Profile = {name: dict.fromkeys(figures) for name, figures in FIGURES.items()}
    assert source_profile(cast("Cursor", empty), "raw_orders", COLUMNS) == TableProfile(0, nothing)


def batch(*rows: tuple[Any, ...]) -> pa.RecordBatch:
    columns = zip(*rows, strict=True) if rows else [()] * 9
    return pa.RecordBatch.from_arrays(
        [pa.array(values, kind) for values, kind in zip(columns, READ.types, strict=True)], schema=READ
    )


def md5(first_bits: int) -> str:
    return f"{first_bits:08x}{'7' * 24}"


READ = pa.schema(
    [
        *[("order_id", pa.string()), ("amount_numeric", pa.int64()), ("event_ts", pa.timestamp("us", "UTC"))],
        *[("day", pa.date32()), ("is_member", pa.bool_()), ("reasons", pa.list_(pa.string())), ("ratio", pa.float64())],
        *[("change_xid", pa.int64()), (TEXTS, pa.string())],
    ]
)
ROWS: tuple[tuple[Any, ...], ...] = (
    ("a", 2**63 - 1, 1_735_689_600_000_001, 20454, True, ["x"], 0.5, 5, md5(2**32 - 1)),
    ("b", 2**63 - 1, 2, None, None, [], None, 7, md5(0)),
    ("c", -5, -1, 0, False, [], None, None, md5(1)),
)


@pytest.mark.parametrize("cut", range(4))
def test_rows_have_the_same_profile_however_they_are_cut_into_batches_and_parts(cut: int) -> None:
    parts: list[TableProfile] = []
    for rows in (ROWS[:cut], ROWS[cut:]):
        part = RowsRead("raw_users", COLUMNS)
        for row in rows:
            part.add(batch(row))
        part.add(batch())
        parts += part.days.values()
    assert together(parts) == TableProfile(
        3,
        {
            "amount_numeric": {"sum": "18446744073709551609", "min": -5, "max": 2**63 - 1},
            "event_ts": {"sum": "1735689600000002", "min": -1, "max": 1_735_689_600_000_001},
            "day": {"sum": "20454", "min": 0, "max": 20454},
            "change_xid": {"sum": "12", "min": 5, "max": 7},
            TEXTS: {"fingerprint": str(2**32)},
        },
    )
    whole = RowsRead("raw_users", COLUMNS)
    whole.add(batch(*ROWS))
    assert whole.days == {None: together(parts)}


def test_no_rows_have_the_profile_of_an_empty_table() -> None:
    nothing: Profile = {name: dict.fromkeys(figures) for name, figures in FIGURES.items()}
    assert of_all_days([], COLUMNS) == TableProfile(0, nothing)


EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
BY_DAY = [Column("order_id", "STRING"), Column("created_date", "TIMESTAMP"), Column("quantity", "INT64")]
BY_DAY_READ = pa.schema([("created_date", pa.timestamp("us", "UTC")), ("quantity", pa.int64()), (TEXTS, pa.string())])


def orders(*rows: tuple[datetime, int | None]) -> pa.RecordBatch:
    """Orders with the MD5 that their number gives them."""
    values = [[at for at, _ in rows], [quantity for _, quantity in rows], [md5(quantity or 0) for _, quantity in rows]]
    return pa.RecordBatch.from_arrays(
        [pa.array(each, kind) for each, kind in zip(values, BY_DAY_READ.types, strict=True)], schema=BY_DAY_READ
    )


@given(
    st.lists(
        st.tuples(
            st.integers(-(2**37), 2**37).map(lambda microseconds: EPOCH + timedelta(microseconds=microseconds)),
            st.none() | st.integers(0, 2**32 - 1),
        )
    ),
    st.integers(1, 5),
)
def test_rows_of_a_partitioned_table_are_profiled_by_their_utc_days_in_whatever_order_they_are_read(
    rows: list[tuple[datetime, int | None]], size: int
) -> None:
    read = RowsRead("raw_orders", BY_DAY)
    for first in range(0, len(rows), size):
        read.add(orders(*rows[first : first + size]))
    assert {day: profile.rows for day, profile in read.days.items()} == Counter(at.date() for at, _ in rows)
    for day, profile in read.days.items():
        quantities = [quantity for at, quantity in rows if at.date() == day]
        known = [quantity for quantity in quantities if quantity is not None]
        assert profile.columns["quantity"] == {
            "sum": str(sum(known)) if known else None,
            "min": min(known, default=None),
            "max": max(known, default=None),
        }
        assert profile.columns[TEXTS] == {"fingerprint": str(sum(known))}


def test_days_that_differ_are_named_and_a_day_without_rows_is_as_good_as_none() -> None:
    first, second, third = (date(2026, 11, day) for day in (1, 2, 3))
    empty = of_all_days([], COLUMNS)
    one, other = TableProfile(3, FIGURES), TableProfile(3, FIGURES | {TEXTS: {"fingerprint": "1"}})
    assert day_differences({first: empty, second: one, third: one}, {second: one, third: one}) == []
    assert day_differences({first: empty, second: one}, {first: one, second: other}) == [
        "2026-11-01: rows 0 in Postgres, 3 in BigQuery",
        "2026-11-02: (texts): fingerprint 3860614417 in Postgres, 1 in BigQuery",
    ]


def test_bigquery_accepts_the_query_and_sums_beyond_64_bits() -> None:
    recorder = Recorder((0, *[None] * 13))
    destination_profile(recorder.ask, "raw_orders", COLUMNS)
    google_sql = GoogleSql({"raw_orders": {column.name: column.type.lower() for column in COLUMNS}})
    statement = google_sql.check(recorder.query_text)
    types = [column.column.type.type_kind.name for column in statement.output_column_list]
    assert types == ["TYPE_INT64", *["TYPE_BIGNUMERIC", "TYPE_INT64", "TYPE_INT64"] * 4, "TYPE_BIGNUMERIC"]


def test_bigquery_accepts_the_query_by_day_and_reads_only_partitions_that_constants_name() -> None:
    asked: list[str] = []

    def ask(query: str) -> list[dict[str, Any]]:
        asked.append(query)
        return [{"utc_day": date(2026, 11, 1), "f0": 1, "f1": 2, "f2": 2, "f3": 2, "f4": 3, "f5": 3, "f6": 3, "f7": 7}]

    days = [date(2026, 11, 2), date(2026, 11, 1), date(2026, 11, 5)]
    found = destination_days(ask, "p.d.raw_orders", BY_DAY, days)
    assert {day: profile.rows for day, profile in found.items()} == {days[1]: 1, days[0]: 0, days[2]: 0}
    google_sql = GoogleSql({"raw_orders": {column.name: column.type.lower() for column in BY_DAY}})
    google_sql.check(asked[0].replace("p.d.", ""))
    assert asked[0].count("between timestamp '") == 2
    assert "between timestamp '2026-11-01 00:00:00+00' and timestamp '2026-11-02 23:59:59.999999+00'" in asked[0]
    assert destination_days(ask, "p.d.raw_orders", BY_DAY, []) == {}
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("destination", "found"),
    [
        (TableProfile(3, FIGURES), []),
        (TableProfile(2, FIGURES), ["rows 3 in Postgres, 2 in BigQuery"]),
        (
            TableProfile(3, FIGURES | {"change_xid": {"sum": "13", "min": 5, "max": 8}}),
            ["change_xid: sum 12 in Postgres, 13 in BigQuery", "change_xid: max 7 in Postgres, 8 in BigQuery"],
        ),
        (
            TableProfile(3, FIGURES | {TEXTS: {"fingerprint": "1"}}),
            ["(texts): fingerprint 3860614417 in Postgres, 1 in BigQuery"],
        ),
        (
            TableProfile(3, {name: figures for name, figures in FIGURES.items() if name != TEXTS}),
            ["(texts): fingerprint 3860614417 in Postgres, None in BigQuery"],
        ),
    ],
)
def test_every_figure_that_differs_is_named_with_both_values(destination: TableProfile, found: list[str]) -> None:
    assert differences(TableProfile(3, FIGURES), destination) == found
