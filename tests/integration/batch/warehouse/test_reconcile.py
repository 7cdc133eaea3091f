"""Reconciliation on a real Postgres and a real table store: it is right while writers run, and sees a single changed value."""

import itertools
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from batch.postgres import connect
from batch.warehouse.bigquery import load
from batch.warehouse.profile import source_profile
from batch.warehouse.reconcile import reconcile, require_consistent
from conf.errors import LoadError, ReconciliationError
from conf.settings import Settings
from tests.runs.archive import wait_until
from tests.runs.exports import bigquery_rows, execute, export_run, fill, insert_orders, tamper

TABLES = ["raw_users", "raw_products", "raw_orders", "order_outcomes"]


@contextmanager
def writers(settings: Settings) -> Iterator[None]:
    """Two connections that insert and revise orders as fast as they can, until the block ends."""
    stop, failures = threading.Event(), []

    def write(numbers: Iterator[int]) -> None:
        try:
            while not stop.is_set():
                number = next(numbers)
                insert_orders(settings, number, number)
                execute(
                    settings,
                    "update raw_orders set status = 'Fraud', reasons = '{a}', screened_at = now() where order_id = %s",
                    f"O{number // 2}",
                )
        except Exception as error:  # raised again where the block ends
            failures.append(error)

    threads = [threading.Thread(target=write, args=[itertools.count(start, 2)]) for start in (10_000, 10_001)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures


def complaint(settings: Settings, *, whole: bool = False) -> str:
    """What is said when both sides do not agree, as they must not."""
    with pytest.raises(ReconciliationError, match="is Inconsistent") as caught:
        require_consistent(reconcile(settings, whole=whole))
    return str(caught.value)


def monitored(settings: Settings) -> list[tuple[str, str, str]]:
    rows = execute(settings, "select run_id, table_name, status from ingestion_monitoring order by started_at, table_name")
    return [(run, table, status) for run, table, status in rows]


def test_every_run_is_consistent_while_writers_run_at_full_speed(settings: Settings) -> None:
    fill(settings, orders=5_000)
    with writers(settings):
        before = execute(settings, "select count(*) from raw_orders")[0][0]
        for run in ("first", "second", "third"):
            export_run(settings, run)
            load(settings)
            require_consistent(reconcile(settings))
            require_consistent(reconcile(settings, whole=True))
        after = execute(settings, "select count(*) from raw_orders")[0][0]
    assert after > before + 100
    assert monitored(settings)[-4:] == [("third", table, "Consistent") for table in TABLES]


BY_HAND_IN_BIGQUERY = [  # what somebody does, how it is undone, and what must be named
    (
        "update {}.raw_orders set amount_numeric = amount_numeric + 1 where order_id = 'O7'",
        "update {}.raw_orders set amount_numeric = amount_numeric - 1 where order_id = 'O7'",
        "raw_orders.amount_numeric: sum",
    ),
    (
        "update {}.raw_orders set event_ts = timestamp_add(event_ts, interval 1 microsecond) where order_id = 'O7'",
        "update {}.raw_orders set event_ts = timestamp_sub(event_ts, interval 1 microsecond) where order_id = 'O7'",
        "raw_orders.event_ts: sum",
    ),
    (
        "update {}.raw_users set name = concat(name, ' ') where user_id = 2",
        "update {}.raw_users set name = rtrim(name) where user_id = 2",
        "raw_users.(texts)",
    ),
    (
        "update {}.raw_orders set status = 'Fraud' where order_id = 'O7'",
        "update {}.raw_orders set status = 'Genuine' where order_id = 'O7'",
        "raw_orders.(texts)",
    ),
    (
        "update {}.raw_orders set reasons = ['night_amount'] where order_id = 'O10'",
        "update {}.raw_orders set reasons = ['foreign_country', 'night_amount'] where order_id = 'O10'",
        "raw_orders.(texts)",
    ),
    (
        "update {}.raw_products set category = 'F', sub_category = 'ashion' where product_id = 1",
        "update {}.raw_products set category = 'Fashion', sub_category = '' where product_id = 1",
        "raw_products.(texts)",
    ),
    ("delete from {}.raw_orders where order_id = 'O7'", None, "raw_orders.rows 20 in Postgres, 19 in BigQuery"),
    ("insert into {0}.raw_users select * from {0}.raw_users where user_id = 1", None, "raw_users.rows 3 in Postgres, 4 in"),
]


def test_a_single_value_changed_by_hand_in_bigquery_is_named(settings: Settings) -> None:
    fill(settings, orders=20)
    export_run(settings, "only")
    load(settings)
    whole = {table: bigquery_rows(settings, table) for table in TABLES}
    for done, undone, named in BY_HAND_IN_BIGQUERY:
        tamper(settings, done)
        said = complaint(settings)
        assert named in said, done
        if undone:
            assert len({line.split(":")[0] for line in said.splitlines() if line.startswith("  ")}) == 1, said
            tamper(settings, undone)
    export_run(settings, "repair", full=True)
    load(settings)
    require_consistent(reconcile(settings))
    assert {table: bigquery_rows(settings, table) for table in TABLES} == whole


BEHIND_THE_EXPORT_S_BACK = [
    (
        "update raw_orders set amount_numeric = amount_numeric + 1 where order_id = 'O7'",
        "raw_orders.2026-11-01: amount_numeric: sum",
    ),
    ("update raw_users set created_date = created_date + interval '1 microsecond' where user_id = 2", "raw_users.created_date"),
    ("update raw_products set product_name = upper(product_name) where product_id = 1", "raw_products.(texts)"),
    ("delete from raw_orders where order_id = 'O8'", "raw_orders.2026-11-01: rows 19 in Postgres, 20 in BigQuery"),
]


def test_a_change_in_postgres_that_leaves_no_trace_is_seen_when_the_whole_is_compared(settings: Settings) -> None:
    fill(settings, orders=20)
    export_run(settings, "first")
    load(settings)
    for table in TABLES:
        execute(settings, f"alter table {table} disable trigger user")
    said = ""
    for number, (statement, named) in enumerate(BEHIND_THE_EXPORT_S_BACK):
        execute(settings, statement)
        export_run(settings, f"incremental{number}")
        load(settings)
        before, said = said, complaint(settings, whole=True)
        assert named in said
        assert named not in before
    export_run(settings, "full", full=True)
    load(settings)
    require_consistent(reconcile(settings))


def test_after_an_incremental_run_only_the_days_that_it_changed_are_read_of_the_orders(settings: Settings) -> None:
    fill(settings, orders=200)
    export_run(settings, "first")
    load(settings)
    assert [one.compared for one in reconcile(settings)] == ["whole"] * 4
    execute(settings, "update raw_orders set quantity = 9 where order_id in ('O30', 'O100')")
    execute(settings, "delete from raw_orders where order_id = 'O60'")
    export_run(settings, "second")
    load(settings)
    found = reconcile(settings)
    assert [(one.status, one.compared) for one in found] == [
        ("Consistent", "whole"),
        ("Consistent", "whole"),
        ("Consistent", "changed days"),
        ("Consistent", "changed days"),
    ]
    orders = found[2]
    days = ("2026-11-02", "2026-11-03", "2026-11-05")
    sums = [sum(4611686018427387904 + i for i in range(1, 201) if i != 60 and when(i).isoformat()[:10] == day) for day in days]
    assert orders.source == orders.destination
    assert (orders.source.rows, orders.source.columns["amount_numeric"]["sum"]) == (199, str(sum(sums)))

    tamper(settings, "update {}.raw_orders set amount_numeric = 1 where order_id = 'O190'")  # on another day
    require_consistent(reconcile(settings))
    said = complaint(settings, whole=True)
    assert "raw_orders.2026-11-08: amount_numeric: sum" in said
    assert "raw_orders.amount_numeric: sum" in said
    reconcile(settings)
    kept = "select status, compared from ingestion_monitoring where run_id = 'second' and table_name = 'raw_orders'"
    assert execute(settings, kept) == [("Inconsistent", "whole")]
    tamper(settings, "update {}.raw_orders set amount_numeric = 1 where order_id = 'O100'")
    assert "raw_orders.2026-11-05: amount_numeric: sum" in complaint(settings)
    tamper(settings, "delete from {}.raw_orders where order_id = 'O180'")  # BigQuery knows the number of all rows
    assert "raw_orders.rows 199 in Postgres, 198 in BigQuery" in complaint(settings)


def when(order: int) -> datetime:
    """The moment of an order that `insert_orders` makes."""
    return datetime(2026, 11, 1, tzinfo=UTC) + order * timedelta(hours=1, microseconds=1)


def test_what_is_kept_of_the_days_makes_the_figures_of_the_whole_table(settings: Settings) -> None:
    fill(settings, orders=200)
    export_run(settings, "first")
    without_a_trace = "alter table raw_orders disable trigger user; {}; alter table raw_orders enable trigger user"
    for number, statement in enumerate(
        (
            "update raw_orders set quantity = 9 where order_id = 'O30'",
            "delete from raw_orders where created_date < '2026-11-02'",
            "update raw_orders set created_date = '2027-01-01' where order_id in ('O77', 'O78')",
            without_a_trace.format("delete from raw_orders where created_date between '2026-11-03' and '2026-11-05'"),
            "update raw_orders set quantity = 8 where order_id = 'O100'",
            "delete from raw_orders",
        )
    ):
        execute(settings, statement)
        orders = export_run(settings, f"run{number}", full="trigger" in statement).table("raw_orders")
        with connect(settings.require("postgres_dsn")) as connection, connection.cursor() as cursor:
            assert orders.source == source_profile(cursor, "raw_orders", orders.columns)
        days = "select count(distinct (created_date at time zone 'UTC')::date) from raw_orders"
        assert execute(settings, days) == [(orders.day_count,)]


def test_an_incremental_export_scans_nothing_of_the_orders_but_what_has_changed(settings: Settings) -> None:
    fill(settings, orders=30_000)
    execute(settings, "analyze raw_orders")
    export_run(settings, "first")
    insert_orders(settings, 30_001, 30_002)
    before = scans_of_orders(settings)
    export_run(settings, "second")
    assert scans_of_orders(settings) == before


def scans_of_orders(settings: Settings) -> Any:
    others = "select count(*) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
    wait_until(lambda: execute(settings, others) == [(0,)])  # a backend tells of its scans before it is gone from there
    return execute(settings, "select seq_scan from pg_stat_user_tables where relname = 'raw_orders'")


def test_a_run_of_an_earlier_state_of_the_database_is_not_compared_with_postgres(settings: Settings) -> None:
    fill(settings, orders=5)
    export_run(settings, "only")
    load(settings)
    execute(settings, "delete from export_runs")  # as in a copy from before the run
    with pytest.raises(ReconciliationError, match="Run only cannot be compared with Postgres: this database does not know"):
        reconcile(settings, whole=True)
    require_consistent(reconcile(settings))


def test_reconciling_twice_keeps_one_finding_a_table_the_same_on_both_sides(settings: Settings) -> None:
    fill(settings, orders=20)
    export_run(settings, "only")
    load(settings)
    tamper(settings, "delete from {}.raw_orders where order_id = 'O7'")
    reconcile(settings)
    assert ("only", "raw_orders", "Inconsistent") in monitored(settings)
    export_run(settings, "again", full=True)
    load(settings)
    reconcile(settings)
    found = reconcile(settings, dag_id="bigquery_ingest")

    assert [one for one in monitored(settings) if one[0] == "again"] == [("again", table, "Consistent") for table in TABLES]
    columns = "run_id, dag_id, table_name, source_rows, destination_rows, status, started_at, finished_at"
    kept = execute(settings, f"select {columns}, source_profile, destination_profile from ingestion_monitoring")
    copied = [
        (*row[:3], row[3], row[4], row[7], row[8], row[9], json.loads(row[5]), json.loads(row[6]))
        for row in bigquery_rows(settings, "ingestion_monitoring")
    ]
    assert sorted(copied, key=str) == sorted(kept, key=str)
    assert {row[1] for row in kept if row[0] == "again"} == {"bigquery_ingest"}
    assert found[2].source.columns["amount_numeric"]["sum"] == str(sum(4611686018427387904 + i for i in range(1, 21)))


def test_tables_compared_side_by_side_are_all_in_bigquerys_copy_of_the_findings(settings: Settings) -> None:
    fill(settings, orders=10)
    export_run(settings, "only")
    load(settings)
    with ThreadPoolExecutor(len(TABLES)) as pool:
        found = list(pool.map(lambda table: reconcile(settings, "only", "a_dag", [table]), TABLES))
    assert [[one.table_name for one in each] for each in found] == [[table] for table in TABLES]
    copied = sorted((row[0], row[1], row[2]) for row in bigquery_rows(settings, "ingestion_monitoring"))
    assert copied == [("only", "a_dag", table) for table in sorted(TABLES)]


def test_a_run_that_the_raw_tables_do_not_hold_as_it_was_is_not_judged(settings: Settings) -> None:
    fill(settings, orders=5)
    export_run(settings, "first")
    with pytest.raises(LoadError, match="Run first is not loaded yet: `finpro load --run-id first`"):
        reconcile(settings)
    load(settings)
    insert_orders(settings, 6, 6)
    export_run(settings, "second")
    load(settings)
    with pytest.raises(ReconciliationError, match="Run first can no longer be compared: run second has been loaded since"):
        reconcile(settings, "first")
    assert monitored(settings) == []


def test_the_command_prints_both_sides_and_exits_with_6_when_they_differ(settings: Settings) -> None:
    fill(settings, orders=20)
    export_run(settings, "only")
    load(settings)
    tamper(settings, "update {}.raw_orders set amount_numeric = amount_numeric + 1 where order_id = 'O7'")
    command = [sys.executable, "-c", "from jobs.cli import main; main()", "reconcile", "--run-id", "only"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 6
    assert "raw_orders                20            20  Inconsistent, whole" in done.stdout
    assert "raw_users                  3             3  Consistent, whole" in done.stdout
    assert "raw_orders.amount_numeric: sum " in done.stderr
    assert "Traceback" not in done.stderr
