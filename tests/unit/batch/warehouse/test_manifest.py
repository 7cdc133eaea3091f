"""What a run may be called, and what travels from Postgres's catalogue to the manifest."""

import pytest

from batch.warehouse.manifest import Column, check_run_id
from batch.warehouse.slices import Slice, SourceColumn, described
from conf.errors import ExportError, PostgresUnavailable, raised_elsewhere


@pytest.mark.parametrize("run_id", ["20261122T170000Z", "a", "nightly-2026_11", "x" * 64])
def test_a_run_id_that_can_name_objects_jobs_and_tables_is_taken_as_it_is(run_id: str) -> None:
    assert check_run_id(run_id) == run_id


@pytest.mark.parametrize("run_id", ["", "x" * 65, "a/b", "..", "a b", "a=1", "é", "a\n", "a.json"])
def test_a_run_id_that_could_name_something_else_is_refused(run_id: str) -> None:
    with pytest.raises(ExportError, match="cannot be a run id"):
        check_run_id(run_id)


def test_columns_keep_their_order_and_get_bigquery_types() -> None:
    columns = [
        SourceColumn("order_id", "text"),
        SourceColumn("amount_numeric", "bigint"),
        SourceColumn("event_ts", "timestamp with time zone"),
        SourceColumn("reasons", "text[]"),
        SourceColumn("change_xid", "xid8"),
    ]
    assert described("raw_orders", columns) == [
        Column("order_id", "STRING"),
        Column("amount_numeric", "INT64"),
        Column("event_ts", "TIMESTAMP"),
        Column("reasons", "ARRAY<STRING>"),
        Column("change_xid", "INT64"),
    ]


def test_a_column_that_cannot_travel_is_named_with_its_table_and_type() -> None:
    columns = [SourceColumn("order_id", "text"), SourceColumn("seen_at", "timestamp without time zone")]
    with pytest.raises(ExportError, match=r"raw_orders\.seen_at is timestamp without time zone"):
        described("raw_orders", columns)


def test_the_columns_of_a_file_are_those_of_its_query() -> None:
    part = Slice("raw_orders", 0, [SourceColumn("order", "text"), SourceColumn("change_xid", "xid8")], "true")
    assert part.query == 'select "order" as "order", xid8send("change_xid") as "change_xid" from raw_orders where true'
    assert part.schema.names == ["order", "change_xid"]


def test_an_error_of_ours_is_found_in_a_stack_trace_of_sparks() -> None:
    trace = (
        "An exception was thrown from the Python worker:\nTraceback (most recent call last):\n  File x\n"
        "conf.errors.PostgresUnavailable: Postgres at h:1/d does not answer.\n(no route)\n\n\tat org.apache.spark.api.Runner\n"
    )
    error = raised_elsewhere(trace)
    assert isinstance(error, PostgresUnavailable)
    assert str(error) == "Postgres at h:1/d does not answer.\n(no route)"
    assert raised_elsewhere("conf.errors.re: no error") is None
    assert raised_elsewhere("ValueError: conf.errors is fine") is None
