"""`finpro transform` on the embedded platform: the marts against the same figures computed in Postgres."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from batch.google_cloud import bigquery_client
from batch.postgres import connect
from batch.warehouse.bigquery import load
from batch.warehouse.manifest import TABLES
from batch.warehouse.reconcile import reconcile
from batch.warehouse.tables import Warehouse
from conf.conditions import ORDER_FIELDS, parse_condition
from conf.errors import DataTestsFailed, Overtaken, ReconciliationError, TransformError
from conf.rules import load_rules
from conf.settings import CONF_DIR, Settings, finpro_home, variable
from jobs.health.checks import CHECKS
from jobs.health.findings import State
from jobs.local.platform import Platform
from jobs.report import write_report
from jobs.transform import PROJECT, docs_page, transform
from jobs.validate import validate
from streaming.rules.conditions import holds, with_declared_fields, with_local_fields
from tests.conftest import own_warehouse
from tests.oracle.bigquery_refusals import BYTES_BILLED
from tests.oracle.marts import MARTS, fill, in_bigquery, in_postgres, insert_order, marts, order_row
from tests.oracle.strict_bigquery import StrictBigQuery
from tests.runs.exports import build_alone, execute, export_run, state, tamper

COST_CHANGES: list[tuple[int, int, datetime]] = []  # of these tests, in their order
TOUCHED = "ingested_at = default, change_xid = default"  # as every writer of finpro does


DECLARED = """
[fields]
device_id = "string"
tries = "int"
score = "number"
trusted = "bool"
"""
ATTRIBUTES = """
    jsonb_strip_nulls(jsonb_build_object(
        'device_id', 'd"' || product_id, 'tries', nullif(quantity, 2), 'score', quantity / 4.0, 'trusted', quantity > 1))
"""


@pytest.fixture(scope="module")
def settings(platform: Platform, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """A database, a bucket and a dataset of this module's own, loaded and transformed once; by rules that declare fields."""
    rules = tmp_path_factory.mktemp("rules") / "rules.toml"
    rules.write_text((CONF_DIR / "fraud_rules.toml").read_text() + DECLARED)
    with own_warehouse(platform) as settings:
        settings = settings.model_copy(update={"rules": rules})
        fill(settings)
        execute(settings, f"update raw_orders set attributes = {ATTRIBUTES} where quantity < 5")
        insert_order(settings, "of tomorrow", str(datetime.now(UTC) + timedelta(days=1)))
        publish(settings)
        yield settings


@pytest.fixture(scope="module")
def first_build(settings: Settings) -> str:
    """What the first transform said."""
    return build(settings)


@pytest.fixture
def built(settings: Settings, first_build: str) -> Settings:
    return settings


def last_log_of_dbt() -> str:
    """What dbt logged when it was run last."""
    return (finpro_home() / "dbt" / "logs" / "dbt.log").read_text(encoding="utf-8").rpartition("Running with dbt=")[2]


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


def test_an_order_of_an_unknown_user_or_product_is_in_the_fact(built: Settings) -> None:
    assert {"unknown user", "unknown product", "unknown both"} <= orders_in_the_fact(built).keys()


CONDITIONS = [
    *(rule.when for rule in load_rules(CONF_DIR / "fraud_rules.toml").rules.values() if rule.when),
    "mod(quantity, 2) = 1 and upper(source) = 'WEB'",
    "local_weekday in (6, 7) or country is null",
    "local_date between date '2026-10-24' and date '2026-10-25' and not starts_with(amount, '7')",
    "length(order_id) < 20 or coalesce(source, '') <> 'web'",
    "device_id in ('d\"1', 'd\"2') and coalesce(tries, 0) < 3",
    "score >= 0.75 or tries = 1",
    "not trusted or device_id is null",
    "amount_numeric / quantity > 100000.5 and event_ts >= timestamp '2026-10-25 00:00:00+07:00'",
]


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_condition_selects_the_same_orders_in_the_warehouse_as_in_the_stream(built: Settings, condition: str) -> None:
    rows = execute(built, f"select {', '.join(ORDER_FIELDS)}, attributes::text from raw_orders")
    types: dict[str, pl.DataType] = {"string": pl.String(), "int": pl.Int64(), "timestamp": pl.Datetime("us", "UTC")}
    schema = {name: types[kind] for name, kind in ORDER_FIELDS.items()} | {"attributes": pl.String()}
    orders, rules = pl.DataFrame(rows, schema, orient="row"), load_rules(built.rules)
    whole = with_declared_fields(with_local_fields(orders, rules.time_zone), rules.fields)
    in_the_stream = whole.filter(holds(parse_condition(condition, rules.fields).term))["order_id"]
    query = f"select order_id from {built.bigquery_core_dataset}.stg_orders where {condition}"
    assert {row.order_id for row in bigquery_client(built).query(query).result()} == set(in_the_stream)
    assert 0 < len(in_the_stream) < len(orders)


def test_declared_fields_are_json_in_the_warehouse(built: Settings) -> None:
    staging = f"{built.bigquery_core_dataset}.stg_orders"
    text = "json_value(attributes, '$.device_id') || '/' || coalesce(cast(int64(attributes.tries) as string), 'none')"
    found = bigquery_client(built).query(f"select {text} as text from {staging} where float64(attributes.score) < 1").result()
    stored = "attributes->>'device_id' || '/' || coalesce(attributes->>'tries', 'none')"
    expected = execute(built, f"select {stored} from raw_orders where (attributes->'score')::float < 1")
    assert sorted(row.text for row in found) == sorted(text for (text,) in expected)
    assert expected


def test_the_status_knows_from_which_run_the_marts_were_built_and_when(built: Settings, platform: Platform) -> None:
    found = CHECKS["marts"](built)
    assert found.state is State.OK
    assert found.text.startswith(f"of run {newest_run(built)}, built and tested ")
    assert found.at
    assert CHECKS["marts"](platform.settings()).state is State.OFF


def test_the_same_again_changes_nothing(built: Settings) -> None:
    tables = (*MARTS, "fct_orders", "dim_users", "dim_products", "users_history", "products_history")
    before = {table: in_bigquery(built, table) for table in tables}
    build_alone(built)
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
    ((cost, repriced_at),) = execute(
        built,
        f"update raw_products set cost = cost - 1, {TOUCHED} where product_id = 1 returning cost + 1, ingested_at",
    )
    state(built, "tied 0", "fraud", "2026-11-28 10:00:00+00")
    state(built, "tied 1", "genuine", "2026-11-28 10:00:00+00")
    insert_order(built, "the only one of its day", "2026-09-30 10:00:00+00")
    insert_order(built, "moves", "2026-09-28 10:00:00+00")
    insert_order(built, "before the new cost", str(repriced_at - timedelta(microseconds=1)))
    insert_order(built, "at the new cost", str(repriced_at))
    publish(built)
    build_alone(built)
    assert "late" in orders_in_the_fact(built)
    assert "Fraud" in orders_in_the_fact(built)["first of a day"]
    COST_CHANGES.append((1, cost, repriced_at))
    assert marts(built) == in_postgres(built, COST_CHANGES)


def test_only_the_days_that_have_changed_are_checked_and_built_and_all_of_them_in_parts_in_another_time_zone(
    built: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tamper(built, f"update {built.bigquery_core_dataset}.fct_orders set country = 'XX' where order_id = 'last of a day'")
    execute(built, "delete from raw_orders where order_id = 'the only one of its day'")
    execute(built, "update raw_orders set created_date = '2026-09-26 10:00:00+00' where order_id = 'moves'")
    tamper(built, "delete from {}.raw_orders where order_id = 'the only one of its day'")
    publish(built)
    days = "unnest([date '2026-09-30', date '2026-09-28'])"
    tamper(
        built, "insert into {0}.loaded_days select (select max(run_number) from {0}.loaded_days), day from " + days + " as day"
    )
    tamper(built, "update {}.raw_orders set country = 'Id' where order_id = 'last of a day'")
    assert not [outcome for outcome in validate(built, None, say=lambda _: None).outcomes if outcome.stops]
    tamper(built, "update {}.raw_orders set country = 'ID' where order_id = 'last of a day'")
    build_alone(built)
    assert "no changes found, skipping parsing" in last_log_of_dbt()  # though it is another run, with other days
    fact = orders_in_the_fact(built)
    assert "the only one of its day" not in fact
    assert "XX" in fact["last of a day"]
    assert marts(built) == in_postgres(built, COST_CHANGES)

    rules = tmp_path / "rules.toml"
    rules.write_text(built.rules.read_text(encoding="utf-8").replace("Asia/Jakarta", "America/New_York"), encoding="utf-8")
    monkeypatch.setattr("jobs.transform.MOST_DAYS", 9)
    said = build(built.model_copy(update={"rules": rules}))
    assert said.count("fct_orders: ") == 2
    assert "XX" not in orders_in_the_fact(built)["last of a day"]
    assert marts(built) == in_postgres(built, COST_CHANGES, "America/New_York")


def test_an_inconsistent_run_builds_nothing(built: Settings) -> None:
    before = {table: in_bigquery(built, table) for table in (*MARTS, "fct_orders", "dim_users")}
    insert_order(built, "of an inconsistent run", "2026-11-02 10:00:00+00")
    execute(built, f"update raw_users set name = 'Nobody', {TOUCHED} where user_id = 1")
    consistent = newest_run(built)
    run_id = f"run-{datetime.now(UTC):%Y%m%dT%H%M%S%f}"
    export_run(built, run_id)
    load(built, run_id)
    with pytest.raises(ReconciliationError, match=r"raw_users never compared, raw_products never compared"):
        build(built)
    tamper(built, "update {}.raw_orders set amount_numeric = 13777 where order_id = 'last of a day'")
    reconcile(built, run_id, whole=True)
    for asked in (None, run_id):
        with pytest.raises(ReconciliationError, match=f"{run_id}, and the marts stay as they are: raw_orders Inconsistent"):
            build(built, run_id=asked)
    with pytest.raises(Overtaken, match=f"do not show run {consistent}"):
        build(built, run_id=consistent)
    assert {table: in_bigquery(built, table) for table in before} == before
    tamper(built, "update {}.raw_orders set amount_numeric = 70000 where order_id = 'last of a day'")
    reconcile(built, run_id, whole=True)
    build_alone(built, run_id=run_id)
    assert marts(built) == in_postgres(built, COST_CHANGES)


def newest_run(settings: Settings) -> str:
    newest = Warehouse.open(settings).newest_run()
    assert newest
    return newest.run_id


def test_the_history_has_each_state_that_a_transform_saw_once_and_without_gaps(built: Settings) -> None:
    def change(name: str) -> None:
        execute(built, "update raw_users set name = %s where user_id = 7", name)  # bare: ingested_at stays as it is

    def see() -> None:
        publish(built)
        build_alone(built, "+users_history")

    (first,) = history_of_users(built, 7)
    change("a")
    change("b")
    see()
    change("c")
    see()
    see()
    ((touched_at,),) = execute(built, f"update raw_users set name = 'd', {TOUCHED} where user_id = 7 returning ingested_at")
    see()
    build_alone(built, "+users_history", full_refresh=True)
    states = history_of_users(built, 7)
    assert [state["name"] for state in states] == [first["name"], "b", "c", "d"]
    assert [state["dbt_valid_to"] for state in states] == [*(state["dbt_valid_from"] for state in states[1:]), None]
    assert states[-1]["dbt_valid_from"] == touched_at

    ((*row,),) = execute(built, "delete from raw_users where user_id = 7 returning *")
    tamper(built, "delete from {}.raw_users where user_id = 7")
    see()
    assert history_of_users(built, 7)[-1]["dbt_valid_to"] is not None
    execute(built, f"insert into raw_users values ({', '.join(['%s'] * len(row))})", *row)  # as from a copy, ingested_at too
    execute(built, "update raw_users set change_xid = default where user_id = 7")
    see()
    states = history_of_users(built, 7)
    assert [state["name"] for state in states] == [first["name"], "b", "c", "d", "d"]
    assert states[-2]["dbt_valid_to"] < states[-1]["dbt_valid_from"]
    assert states[-1]["dbt_valid_to"] is None


def history_of_users(settings: Settings, user_id: int) -> list[dict[str, Any]]:
    """The states of a user, the oldest first."""
    query = f"select name, dbt_valid_from, dbt_valid_to from {settings.bigquery_core_dataset}.users_history"
    rows = bigquery_client(settings).query(f"{query} where user_id = {user_id} order by dbt_valid_from").result()
    return [dict(row.items()) for row in rows]


def orders_in_the_fact(settings: Settings) -> dict[str, tuple[Any, ...]]:
    return {row[0]: row for row in in_bigquery(settings, "fct_orders")}


def killed_after_the_fact(settings: Settings) -> None:
    """Start `finpro transform` and kill it when the fact and the sums by user are merged: the marts are those of before."""
    values = variables(settings)
    command = [str(Path(sys.executable).with_name("finpro")), "transform"]
    process = subprocess.Popen(command, env=os.environ | values, stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        seen = next(line for line in process.stdout if line.startswith("orders_by_user: MERGE"))
        process.kill()
    assert seen
    assert process.returncode < 0


def variables(settings: Settings) -> dict[str, str]:
    """The settings that lead to the warehouse, as variables of the environment."""
    names = ("gcp_project", "bigquery_dataset", "bigquery_core_dataset", "bigquery_marts_dataset", "bigquery_emulator_host")
    return {variable(name): settings.require(name) for name in names}


def test_the_real_bigquery_takes_what_is_meant_for_it_only_and_a_full_refresh_gives_what_runs_have_merged(
    built: Settings, strict_bigquery: StrictBigQuery
) -> None:
    tables = (*MARTS, "fct_orders", "dim_products")  # users have changed since
    merged = {table: in_bigquery(built, table) for table in tables}
    production = built.model_copy(update={"bigquery_emulator_host": None})
    with strict_bigquery.in_place_of_the_real_one(built.require("bigquery_emulator_host")), strict_bigquery.listening() as jobs:
        build(production, "config.materialized:table", "config.materialized:incremental", full_refresh=True)
    assert {table: in_bigquery(built, table) for table in tables} == merged
    declared = [job for job in jobs if "order_id string not null" in job["query"]["query"].lower()]
    assert len(declared) == 1  # the columns of a contract, which the emulator is not told
    labels = [job["labels"] for job in jobs]
    assert {(one["dag"], one["step"]) for one in labels} == {("manual", "transform")}
    assert {one.get("node") for one in labels} >= set(tables)  # and what finpro itself asks, which has none


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
    known = CHECKS["bytes read"](built)
    assert re.fullmatch(rf"run {run}: .* billed \(load .*, reconcile .*, transform .*\), \d+ s ago", known.text)


def test_a_failed_test_names_its_rows_keeps_them_and_lets_nothing_be_built_on_them(built: Settings) -> None:
    before = {mart: in_bigquery(built, mart) for mart in MARTS}
    insert_order(built, "doubled", "2026-11-02 10:00:00+00")
    run_id = publish(built)
    raw = f"{built.bigquery_dataset}.raw_orders"
    tamper(built, f"insert into {raw} select * from {raw} where order_id = 'doubled'")  # after it was compared
    with pytest.raises(DataTestsFailed, match=r"unique_fct_orders_order_id: 1 rows break it: unique_field doubled") as failed:
        build(built)
    kept = f"{built.bigquery_core_dataset}.failed_unique_fct_orders_order_id"
    assert kept in str(failed.value)
    assert [row[:1] for row in in_bigquery(built, "failed_unique_fct_orders_order_id")] == [("doubled",)]
    assert {mart: in_bigquery(built, mart) for mart in MARTS} == before
    results = {row[1]: row for row in in_bigquery(built, "test_results") if row[0] == run_id}
    assert results["unique_fct_orders_order_id"][2:4] == ("fail", 1)
    assert results["unique_dim_users_user_id"][2:4] == ("pass", 0)

    tamper(built, "delete from {}.raw_orders where order_id = 'doubled'")
    execute(built, "delete from raw_orders where order_id = 'doubled'")
    publish(built)
    build_alone(built)
    assert "doubled" not in orders_in_the_fact(built)
    assert marts(built) == in_postgres(built, COST_CHANGES)


def test_a_selection_of_nothing_is_an_error(built: Settings) -> None:
    with pytest.raises(TransformError, match="mart_that_is_not_there"):
        build(built, "mart_that_is_not_there")


def test_without_raw_tables_the_message_says_what_to_run(platform: Platform) -> None:
    settings = platform.settings()
    with pytest.raises(TransformError, match=r"has no ingestion_monitoring, order_outcomes, raw_orders.*finpro load"):
        build(settings)


def test_the_logic_of_fact_and_marts_passes_its_unit_tests(built: Settings, tmp_path: Path) -> None:
    values = variables(built)
    places = {"--project-dir": PROJECT, "--profiles-dir": PROJECT, "--target-path": tmp_path, "--log-path": tmp_path}
    options = [str(part) for place in places.items() for part in place]
    dbt = Path(sys.executable).with_name("dbt")
    done = subprocess.run(
        [dbt, "test", "--selector", "logic", *options], env=os.environ | values, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    assert "PASS=21 WARN=0 ERROR=0 SKIP=0" in done.stdout


def test_the_documentation_is_one_page_and_nothing_is_left_in_the_checkout(built: Settings) -> None:
    page = docs_page().read_text(encoding="utf-8")
    assert all(mart in page for mart in MARTS)
    assert '"send_anonymous_usage_stats": false' in page
    assert {path.name for path in PROJECT.iterdir()}.isdisjoint({"target", "logs", "dbt_packages"})


def test_the_sources_are_declared_as_postgres_has_them(built: Settings) -> None:
    manifest = json.loads((finpro_home() / "dbt" / "target" / "manifest.json").read_text())
    raw = [source for source in manifest["sources"].values() if source["name"] in TABLES]
    declared = {(s["name"], column["name"]): column["data_type"] for s in raw for column in s["columns"].values()}
    found = execute(
        built,
        "select table_name, column_name, udt_name from information_schema.columns where table_name = any(%s)"
        " and (table_name, column_name) <> ('order_outcomes', 'reason')",
        list(TABLES),
    )
    types = {"int8": "int64", "xid8": "int64", "text": "string", "jsonb": "string", "timestamptz": "timestamp"}
    types |= {"_text": "array<string>"}
    assert declared == {(table, column): types[kind] for table, column, kind in found}


def test_what_is_far_beyond_belief_is_counted_and_named_and_stops_nothing(built: Settings, tmp_path: Path) -> None:
    for number in (1, 2):
        insert_order(built, f"huge {number}", "2026-11-02 10:00:00+00", amount=2**62, reason="night_amount")
    insert_order(built, "huge 3", "2026-11-02 10:00:00+00", amount=2**62)
    insert_order(built, "huge 4", "2026-11-02 10:00:00+00")
    execute(built, "update raw_orders set quantity = 4611686018427387904 where order_id in ('huge 3', 'huge 4')")
    insert_order(built, "of the year 1", "0001-01-01 10:00:00+00")
    insert_order(built, "of the year 9999", "9999-12-30 10:00:00+00", reason="night_amount")
    far = "update raw_orders set event_ts = '2026-11-02 10:00:00+00' where order_id like 'of the year%%'"
    execute(built, far)
    publish(built)
    said = build(built)
    assert marts(built) == in_postgres(built, COST_CHANGES)
    warning = next(line for line in said.splitlines() if line.startswith("warning"))
    assert warning.startswith("warning: every_order_was_created_about_when_it_happened: 2 rows break it: order_id of the year")
    assert "order_id of the year 1, created_date 0001-01-01 10:00:00+00:00" in warning
    page = write_report(built, tmp_path / "report.html", locale="en")
    saved = max(row[3] for row in in_bigquery(built, "mart_fraud_daily_saved_amount"))
    assert saved > 2**63
    assert f'<data value="{saved}"' in page.read_text(encoding="utf-8")
