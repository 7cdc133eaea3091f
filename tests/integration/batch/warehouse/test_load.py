"""The load, into a real table store: what is in Postgres's snapshot is in BigQuery afterwards, whatever went wrong before."""

import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
from google.cloud.bigquery import Client
from google.cloud.bigquery._http import Connection

from batch.google_cloud import bigquery_client, open_bucket
from batch.warehouse.bigquery import load, stage
from batch.warehouse.reconcile import reconcile
from conf.errors import LoadError, SchemaChanged
from conf.settings import Settings
from tests.runs.exports import bigquery_rows, execute, export_run, fill, insert_orders, postgres_rows, table_names, tamper

TABLES = ("raw_users", "raw_products", "raw_orders", "order_outcomes")


class Killed(BaseException):
    """The process ends here, as far as the code under test can tell: nothing may handle this."""


@contextmanager
def killed_after(calls: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Let the next `calls` requests to BigQuery have their effect; the answer to the last of them never arrives."""
    made: list[str] = []
    request = Connection.api_request

    def counted(self: Connection, *args: Any, **kwargs: Any) -> Any:
        answer: Any = request(self, *args, **kwargs)  # type: ignore[no-untyped-call]
        made.append(f"{kwargs.get('method')} {kwargs.get('path')}")
        if len(made) == calls:
            raise Killed
        return answer

    with monkeypatch.context() as patch:
        patch.setattr(Connection, "api_request", counted)
        yield made


def assert_equal(settings: Settings) -> None:
    for table in TABLES:
        assert bigquery_rows(settings, table) == postgres_rows(settings, table)


def change(settings: Settings, first: int, last: int) -> None:
    """New orders, a revision of the newest one before them, and a change of a user and a product."""
    insert_orders(settings, first, last)
    execute(settings, "update raw_users set phone_number = phone_number || '7' where user_id = 2")
    execute(settings, "update raw_products set cost = cost - 1 where product_id = 2")
    execute(settings, "update raw_orders set status = 'Fraud', reasons = '{night_amount}' where order_id = %s", f"O{first - 1}")


def test_a_full_and_incremental_runs_make_bigquery_equal_postgres(settings: Settings) -> None:
    fill(settings, orders=45)
    export_run(settings, "first")
    assert load(settings) == ["first"]
    assert_equal(settings)

    change(settings, 46, 50)
    export_run(settings, "second")
    assert load(settings) == ["second"]
    assert_equal(settings)

    export_run(settings, "nothing_new")
    assert load(settings) == ["nothing_new"]
    assert_equal(settings)
    assert not [name for name in table_names(settings) if name.startswith("staging_")]


def test_orders_are_partitioned_by_the_day_they_were_made_and_clustered(settings: Settings) -> None:
    fill(settings, orders=1)
    export_run(settings, "only")
    load(settings)
    table = bigquery_client(settings).get_table(f"{settings.bigquery_dataset}.raw_orders")
    assert (table.time_partitioning.field, table.time_partitioning.type_) == ("created_date", "DAY")
    assert table.clustering_fields == ["product_id", "user_id"]


def test_runs_that_were_skipped_are_loaded_first_and_in_order(settings: Settings) -> None:
    fill(settings, orders=45)
    export_run(settings, "first")
    for run, number in (("second", 46), ("third", 47)):
        change(settings, number, number)
        export_run(settings, run)
    assert load(settings, "second") == ["first", "second"]
    assert load(settings) == ["third"]
    assert_equal(settings)


def test_what_changed_since_a_moment_is_exported_and_loaded_again(settings: Settings) -> None:
    fill(settings, orders=10)
    first = export_run(settings, "first")
    insert_orders(settings, 11, 12)
    second = export_run(settings, "second")
    load(settings)
    tamper(settings, "delete from {}.raw_orders where order_id = 'O11'")

    again = export_run(settings, "again", since=second.started_at)
    assert (again.full, again.since_xid) == (False, first.xmin)
    load(settings)
    assert_equal(settings)
    assert export_run(settings, "all", since=first.started_at).full


def test_tables_that_were_staged_side_by_side_are_only_merged_by_the_load(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(settings, orders=10)
    export_run(settings, "first")
    insert_orders(settings, 11, 12)
    export_run(settings, "second")
    with ThreadPoolExecutor(len(TABLES)) as pool:
        staged = list(pool.map(partial(stage, settings), TABLES))
    assert staged[:2] >= [3, 2]
    assert staged[2] >= 12
    assert table_names(settings) >= {f"staging_{table}_first" for table in TABLES}

    def loaded_again(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(Client, "load_table_from_uri", loaded_again)
    assert load(settings) == ["first", "second"]
    assert_equal(settings)
    assert stage(settings, "raw_orders") == 0
    assert not {name for name in table_names(settings) if name.startswith("staging_")}


def test_a_run_that_is_loaded_already_or_older_changes_nothing(settings: Settings) -> None:
    fill(settings, orders=45)
    export_run(settings, "first")
    change(settings, 46, 50)
    export_run(settings, "second")
    load(settings)
    assert (load(settings, "first"), load(settings)) == ([], [])

    tamper(settings, "delete from {}.loaded_runs where true")
    assert load(settings, "first") == ["first"]  # unknown to the record: an old full run over newer rows
    assert_equal(settings)


def test_tables_that_were_dropped_to_start_over_are_filled_again(settings: Settings) -> None:
    fill(settings, orders=20)
    export_run(settings, "only")
    load(settings)
    client = bigquery_client(settings)
    for table in (*TABLES, "loaded_runs"):
        client.delete_table(f"{settings.bigquery_dataset}.{table}")
    assert load(settings) == ["only"]  # though its jobs are all there, and done
    assert_equal(settings)


def test_a_hole_in_the_chain_of_runs_stops_the_load(settings: Settings) -> None:
    fill(settings, orders=5)
    export_run(settings, "first")
    load(settings)
    for number, run in enumerate(("lost", "last"), start=6):
        insert_orders(settings, number, number)
        export_run(settings, run)
    open_bucket(settings).blob("raw/manifests/lost.json").delete()
    with pytest.raises(LoadError, match="Run last builds on a run that is neither loaded nor to be found"):
        load(settings)


def test_a_full_run_repairs_what_was_changed_by_hand_on_either_side(settings: Settings) -> None:
    fill(settings, orders=20)
    export_run(settings, "first")
    load(settings)
    tamper(settings, "update {}.raw_orders set amount_numeric = 1 where order_id = 'O1'")
    tamper(settings, "delete from {}.raw_orders where order_id = 'O2'")
    tamper(settings, "insert into {0}.raw_orders select * from {0}.raw_orders where order_id in ('O4', 'O5')")
    execute(settings, "delete from raw_orders where order_id = 'O3'")
    export_run(settings, "second", full=True)
    load(settings)
    assert_equal(settings)


def test_columns_that_are_new_in_postgres_arrive_with_their_values(settings: Settings) -> None:
    fill(settings, orders=5)
    export_run(settings, "first")
    load(settings)
    execute(
        settings,
        "alter table raw_users add birthday date, add is_member boolean, add note text, add tags text[], add visits bigint",
    )
    execute(
        settings,
        "update raw_users set birthday = '1969-07-20', is_member = true, note = '', tags = '{a,b}', visits = 7"
        " where user_id = 1",
    )
    export_run(settings, "second")
    load(settings)
    new = "select birthday, is_member, note, tags, visits from raw_users order by user_id"
    there = bigquery_client(settings).query(new.replace("raw_users", f"{settings.bigquery_dataset}.raw_users")).result()
    empty_lists = [(*row[:3], row[3] or [], row[4]) for row in execute(settings, new)]  # BigQuery has no null list
    assert [row.values() for row in there] == empty_lists
    assert [one.status for one in reconcile(settings)] == ["Consistent"] * 4


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        (
            "alter table raw_users drop column phone_number",
            "raw_users has changed in run second: column phone_number, STRING, is gone",
        ),
        (
            "alter table raw_orders alter column quantity type text",
            "raw_orders has changed in run second: column quantity, INT64, is now STRING",
        ),
    ],
)
def test_a_column_removed_or_retyped_stops_the_load_by_name(settings: Settings, statement: str, message: str) -> None:
    fill(settings, orders=5)
    export_run(settings, "first")
    load(settings)
    before = bigquery_rows(settings, "raw_orders")
    execute(settings, statement)
    insert_orders(settings, 6, 6) if "drop" in statement else None
    export_run(settings, "second")
    with pytest.raises(SchemaChanged, match=message):
        load(settings)
    assert bigquery_rows(settings, "raw_orders") == before


def test_a_file_that_lost_rows_is_not_merged(settings: Settings) -> None:
    fill(settings, orders=20)
    first = export_run(settings, "first")
    change(settings, 21, 22)
    second = export_run(settings, "second")
    bucket = open_bucket(settings)
    whole, short = (bucket.blob(run.tables[2].files[0].name) for run in (first, second))
    bucket.copy_blob(short, bucket, whole.name)
    with pytest.raises(LoadError, match="files of raw_orders in run first do not hold the 20 rows"):
        load(settings)
    assert bigquery_rows(settings, "raw_orders") == []


def test_a_load_that_dies_after_any_request_is_finished_by_the_next(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(settings, orders=9)
    number, calls = 10, 1
    while True:
        change(settings, number, number)
        export_run(settings, f"run{number}")
        with killed_after(calls, monkeypatch) as made:
            try:
                load(settings)
            except Killed:
                pass
            else:
                break  # the load needs fewer requests than that
        load(settings)
        assert_equal(settings)
        number, calls = number + 1, calls + 5
    assert len(made) > 20
    assert_equal(settings)


def test_a_load_that_is_killed_before_its_merge_is_finished_by_the_next(settings: Settings) -> None:
    fill(settings, orders=2_000)
    export_run(settings, "only")
    with subprocess.Popen([sys.executable, "-c", "from jobs.cli import main; main()", "load"]) as process:
        while "staging_raw_users_only" not in table_names(settings):
            assert process.poll() is None
            time.sleep(0.02)
        process.kill()
    assert "staging_raw_users_only" in table_names(settings)
    assert bigquery_rows(settings, "raw_orders") == []
    with pytest.raises(LoadError, match="was not finished: `finpro load --run-id only`"):
        reconcile(settings)

    assert load(settings) == ["only"]
    assert_equal(settings)
    assert "staging_raw_users_only" not in table_names(settings)


def test_two_loads_at_once_end_in_the_same_tables(settings: Settings) -> None:
    fill(settings, orders=200)
    export_run(settings, "first")
    change(settings, 201, 210)
    export_run(settings, "second")
    with ThreadPoolExecutor(2) as pool:
        for loading in [pool.submit(load, settings) for _ in range(2)]:
            loading.result()
    assert_equal(settings)
    assert load(settings) == []
