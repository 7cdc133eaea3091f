"""`finpro transform` on the embedded platform: the marts against the same figures computed in Postgres."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from batch.google_cloud import bigquery_client
from batch.postgres import connect
from batch.warehouse.bigquery import load
from batch.warehouse.reconcile import reconcile
from conf.errors import TransformError
from conf.settings import Settings, finpro_home, variable
from jobs.local.platform import Platform
from jobs.transform import PROJECT, docs_page, transform
from tests.conftest import own_warehouse
from tests.oracle.bigquery_refusals import BYTES_BILLED
from tests.oracle.marts import MARTS, PRODUCTS, fill, in_bigquery, in_postgres, insert_order, marts, order_row
from tests.oracle.strict_bigquery import StrictBigQuery
from tests.runs.exports import execute, export_run, tamper

TOUCHED = "ingested_at = default, change_xid = default"  # as every writer of finpro does


@pytest.fixture(scope="module")
def settings(platform: Platform) -> Iterator[Settings]:
    """A database, a bucket and a dataset of this module's own, loaded and transformed once."""
    with own_warehouse(platform) as settings:
        fill(settings)
        publish(settings)
        yield settings


@pytest.fixture(scope="module")
def first_build(settings: Settings) -> str:
    """What the first transform said."""
    return build(settings)


@pytest.fixture
def built(settings: Settings, first_build: str) -> Settings:
    return settings


def publish(settings: Settings) -> str:
    """Export, load and reconcile Postgres as it is; returns the run."""
    run_id = f"run-{datetime.now(UTC):%Y%m%dT%H%M%S%f}"
    export_run(settings, run_id)
    load(settings, run_id)
    reconcile(settings, run_id)
    return run_id


def build(settings: Settings, *select: str, full_refresh: bool = False, run_id: str | None = None) -> str:
    said: list[str] = []
    transform(settings, run_id=run_id, full_refresh=full_refresh, select=select, say=said.append)
    return "\n".join(said)


def test_every_mart_equals_its_computation_in_postgres(built: Settings) -> None:
    expected = in_postgres(built)
    assert all(expected.values())
    assert marts(built) == expected


def test_an_order_of_an_unknown_user_or_product_is_in_the_fact_and_counted_by_a_warning(
    built: Settings, first_build: str
) -> None:
    assert {"unknown user", "unknown product", "unknown both"} <= orders_in_the_fact(built).keys()
    assert "warning: every_order_has_a_known_user: 42 rows break it" in first_build
    assert "warning: every_order_has_a_known_product: 3 rows break it" in first_build


def test_the_same_again_changes_nothing(built: Settings) -> None:
    tables = (*MARTS, "fct_orders", "dim_users", "dim_products", "users_history", "products_history")
    before = {table: in_bigquery(built, table) for table in tables}
    build(built)
    assert {table: in_bigquery(built, table) for table in tables} == before


def test_revised_late_and_repriced_rows_arrive_though_a_run_was_killed(built: Settings) -> None:
    with connect(built.require("postgres_dsn")) as late, late.cursor() as cursor:
        cursor.execute(*order_row("late", "2026-10-30 10:00:00+00", user=2, product=2, amount=5))
        insert_order(built, "newer than the late one", "2026-11-02 10:00:00+00")
        publish(built)
        killed_after_the_fact(built)
        assert {"newer than the late one"} == {"newer than the late one", "late"} & orders_in_the_fact(built).keys()
    execute(
        built,
        f"update raw_orders set status = 'Fraud', reasons = '{{night_amount}}', {TOUCHED} where order_id = 'first of a day'",
    )
    execute(built, f"update raw_products set cost = cost - 1, {TOUCHED} where product_id = 1")
    publish(built)
    build(built)
    assert "late" in orders_in_the_fact(built)
    assert "Fraud" in orders_in_the_fact(built)["first of a day"]
    assert marts(built) == in_postgres(built)
    history = history_of_products(built)
    ended = [row for row in history if row["dbt_valid_to"]]
    assert len(history) - len(ended) == PRODUCTS
    assert [(row["product_id"], row["cost"] - row["next_cost"], row["ends"]) for row in ended] == [(1, 1, True)]


def orders_in_the_fact(settings: Settings) -> dict[str, tuple[Any, ...]]:
    return {row[0]: row for row in in_bigquery(settings, "fct_orders")}


def history_of_products(settings: Settings) -> list[dict[str, Any]]:
    """The history of the products, each state with the cost of the next one and whether it ends where that begins."""
    query = f"""
        select
            product_id, cost, dbt_valid_from, dbt_valid_to,
            lead(cost) over (partition by product_id order by dbt_valid_from) as next_cost,
            lead(dbt_valid_from) over (partition by product_id order by dbt_valid_from) = dbt_valid_to as ends
        from {settings.bigquery_dataset}.products_history"""
    return [dict(row.items()) for row in bigquery_client(settings).query(query).result()]


def killed_after_the_fact(settings: Settings) -> None:
    """Start `finpro transform` and kill it as soon as the fact is merged: the marts are those of before."""
    names = ("gcp_project", "bigquery_dataset", "bigquery_emulator_host")
    values = {variable(name): settings.require(name) for name in names}
    command = [str(Path(sys.executable).with_name("finpro")), "transform"]
    process = subprocess.Popen(command, env=os.environ | values, stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        seen = next(line for line in process.stdout if line.startswith("fct_orders: MERGE"))
        process.kill()
    assert seen
    assert process.returncode < 0


def test_the_real_bigquery_takes_what_is_meant_for_it_only_and_a_full_refresh_gives_what_runs_have_merged(
    built: Settings, strict_bigquery: StrictBigQuery
) -> None:
    tables = (*MARTS, "fct_orders", "dim_users", "dim_products")
    merged = {table: in_bigquery(built, table) for table in tables}
    production = built.model_copy(update={"bigquery_emulator_host": None})
    with strict_bigquery.in_place_of_the_real_one(built.require("bigquery_emulator_host")), strict_bigquery.listening() as jobs:
        build(production, "config.materialized:table", "config.materialized:incremental", full_refresh=True)
    assert {table: in_bigquery(built, table) for table in tables} == merged
    declared = [job for job in jobs if "order_id string not null" in job["query"]["query"].lower()]
    assert len(declared) == 1  # the columns of a contract, which the emulator is not told
    labels = [job["labels"] for job in jobs]
    assert {(one["dag"], one["step"]) for one in labels} == {("manual", "transform")}
    assert {one["node"] for one in labels} >= set(tables)


def test_jobs_are_labelled_and_a_refusal_of_bigquery_says_what_to_do(built: Settings, strict_bigquery: StrictBigQuery) -> None:
    limited, run = built.model_copy(update={"bigquery_max_bytes_billed": 10_000_000}), publish(built)
    with (
        strict_bigquery.refusing(BYTES_BILLED, "mart_top10_users_fraud"),
        strict_bigquery.listening() as jobs,
        pytest.raises(
            TransformError, match=r"mart_top10_users_fraud: .*164626432.*\nThe statement would read more than FINPRO_BIG"
        ),
    ):
        build(limited, "mart_top10_users_fraud,resource_type:model", run_id=run)
    sent = [job for job in jobs if job["labels"]["step"] == "transform" and "mart_top10" in job["query"]["query"]]
    assert {job["query"]["maximumBytesBilled"] for job in sent} == {"10000000"}
    assert {job["labels"]["run"] for job in sent} == {run.lower()}

    build(built, "mart_top10_users_fraud,resource_type:model", run_id=run)
    recorded = execute(built, "select step from ingestion_steps where run_id = %s and jobs > 0", run)
    assert {step for (step,) in recorded} == {"load", "reconcile", "transform"}


def test_a_failed_test_is_an_error_that_names_it_and_its_count(built: Settings) -> None:
    consistent = publish(built)
    tamper(
        built,
        "insert into {}.ingestion_monitoring (run_id, table_name, status, finished_at)"
        " values ('later', 'raw_users', 'Inconsistent', timestamp '2100-01-01 00:00:00+00')",
    )
    claim = "the_newest_load_of_every_table_is_consistent"
    with pytest.raises(TransformError, match=f"{claim}: 1 rows break it") as failed:
        build(built, claim)
    assert failed.value.exit_code not in (0, 1)
    assert "1 of 1 tests passed" in build(built, claim, run_id=consistent)
    with pytest.raises(TransformError, match=f"{claim}: 3 rows break it"):
        build(built, claim, run_id="never")
    tamper(built, "delete from {}.ingestion_monitoring where run_id = 'later'")


def test_a_selection_of_nothing_is_an_error(built: Settings) -> None:
    with pytest.raises(TransformError, match="mart_that_is_not_there"):
        build(built, "mart_that_is_not_there")


def test_without_raw_tables_the_message_says_what_to_run(platform: Platform) -> None:
    settings = platform.settings()
    with pytest.raises(TransformError, match=r"has no ingestion_monitoring, raw_orders.*finpro load"):
        build(settings)


def test_the_logic_of_fact_and_marts_passes_its_unit_tests(built: Settings, tmp_path: Path) -> None:
    values = {variable(name): built.require(name) for name in ("gcp_project", "bigquery_dataset", "bigquery_emulator_host")}
    places = {"--project-dir": PROJECT, "--profiles-dir": PROJECT, "--target-path": tmp_path, "--log-path": tmp_path}
    options = [str(part) for place in places.items() for part in place]
    dbt = Path(sys.executable).with_name("dbt")
    done = subprocess.run(
        [dbt, "test", "--selector", "logic", *options], env=os.environ | values, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    assert "PASS=11 WARN=0 ERROR=0 SKIP=0" in done.stdout


def test_the_documentation_is_one_page_and_nothing_is_left_in_the_checkout(built: Settings) -> None:
    page = docs_page().read_text(encoding="utf-8")
    assert all(mart in page for mart in MARTS)
    assert '"send_anonymous_usage_stats": false' in page
    assert {path.name for path in PROJECT.iterdir()}.isdisjoint({"target", "logs", "dbt_packages"})


def test_the_sources_are_declared_as_postgres_has_them(built: Settings) -> None:
    manifest = json.loads((finpro_home() / "dbt" / "target" / "manifest.json").read_text())
    raw = [source for source in manifest["sources"].values() if source["name"].startswith("raw_")]
    declared = {(s["name"], column["name"]): column["data_type"] for s in raw for column in s["columns"].values()}
    found = execute(
        built, "select table_name, column_name, udt_name from information_schema.columns where table_name ~ '^raw_'"
    )
    types = {"int8": "int64", "xid8": "int64", "text": "string", "timestamptz": "timestamp", "_text": "array<string>"}
    assert declared == {(table, column): types[kind] for table, column, kind in found}
