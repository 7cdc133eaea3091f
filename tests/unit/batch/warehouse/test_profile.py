"""The profile of a table without databases: what is asked of them, how their answers are read and compared."""

from decimal import Decimal
from typing import Any, cast

import pyarrow as pa
import pytest
from google.cloud import bigquery
from psycopg2.extensions import cursor as Cursor

from batch.warehouse.manifest import Column
from batch.warehouse.profile import (
    TEXTS,
    Profile,
    RowsRead,
    TableProfile,
    destination_profile,
    differences,
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

    def query(self, query: str, job_config: bigquery.QueryJobConfig) -> "Recorder":
        assert job_config.use_query_cache is False
        self.query_text = query
        return self

    def result(self) -> list[bigquery.Row]:
        return [bigquery.Row(self.row, {f"f{position}": position for position in range(len(self.row))})]


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
    assert destination_profile(cast("bigquery.Client", emulated), "p.d.raw_orders", COLUMNS) == expected


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
    parts = []
    for rows in (ROWS[:cut], ROWS[cut:]):
        part = RowsRead(COLUMNS)
        for row in rows:
            part.add(batch(row))
        part.add(batch())
        parts.append(part.profile)
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
    whole = RowsRead(COLUMNS)
    whole.add(batch(*ROWS))
    assert whole.profile == together(parts)


def test_no_rows_have_the_profile_of_an_empty_table() -> None:
    nothing: Profile = {name: dict.fromkeys(figures) for name, figures in FIGURES.items()}
    assert RowsRead(COLUMNS).profile == TableProfile(0, nothing)


def test_bigquery_accepts_the_query_and_sums_beyond_64_bits() -> None:
    recorder = Recorder((0, *[None] * 13))
    destination_profile(cast("bigquery.Client", recorder), "raw_orders", COLUMNS)
    google_sql = GoogleSql({"raw_orders": {column.name: column.type.lower() for column in COLUMNS}})
    statement = google_sql.check(recorder.query_text)
    types = [column.column.type.type_kind.name for column in statement.output_column_list]
    assert types == ["TYPE_INT64", *["TYPE_BIGNUMERIC", "TYPE_INT64", "TYPE_INT64"] * 4, "TYPE_BIGNUMERIC"]


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
