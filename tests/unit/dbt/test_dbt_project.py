"""The dbt project without a warehouse: its SQL before BigQuery's own analyzer, and what it says about itself."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from batch.report.builds import REPLACED_BY_DAY
from conf.conditions import LOCAL_FIELDS, ORDER_FIELDS
from conf.former_rules import SIX
from conf.rules import load_rules
from conf.settings import CONF_DIR
from jobs.transform import PROJECT
from tests.oracle.googlesql import GoogleSql, Refused

DAYS = [("2026-11-01", "2026-11-03"), ("2026-11-09", "2026-11-09")]
FIELDS = {
    "device_id": ("string", "string"),
    "tries": ("int", "int64"),
    "score": ("number", "float64"),
    "known": ("bool", "bool"),
}
IN_THESE_DAYS = (
    "created_date between timestamp '2026-11-01' and timestamp '2026-11-03 23:59:59.999999'"
    " or created_date between timestamp '2026-11-09' and timestamp '2026-11-09 23:59:59.999999'"
)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """dbt's manifest of a copy of the project, compiled offline."""
    folder = tmp_path_factory.mktemp("dbt")
    project = Path(shutil.copytree(PROJECT, folder / "project"))
    variables = {"FINPRO_GCP_PROJECT": "nowhere", "BIGQUERY_EMULATOR_HOST": "http://127.0.0.1:9"}
    variables |= {"FINPRO_CHANGED_DAYS": json.dumps(DAYS)}
    places = ["--project-dir", project, "--profiles-dir", project, "--target-path", folder, "--log-path", folder]
    options = ["--no-introspect", "--no-populate-cache", "--no-version-check", *map(str, places)]
    options += ["--vars", json.dumps({"declared_fields": {name: kind for name, (kind, _) in FIELDS.items()}})]
    dbt = Path(sys.executable).with_name("dbt")
    done = subprocess.run([dbt, "compile", *options], env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    return dict(json.loads((folder / "manifest.json").read_text()))


@pytest.fixture(scope="module")
def models(manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {node["name"]: node for node in manifest["nodes"].values() if node["resource_type"] == "model"}


@pytest.fixture(scope="module")
def google_sql(manifest: dict[str, Any], models: dict[str, dict[str, Any]]) -> GoogleSql:
    """The analyzer, knowing the raw tables, the models and the snapshots as they are declared."""
    sources = {source["identifier"]: declared(source) for source in manifest["sources"].values()}
    built = {node["name"]: declared(node) for node in manifest["nodes"].values() if node["resource_type"] != "test"}
    return GoogleSql(sources | built)


def declared(node: dict[str, Any]) -> dict[str, str]:
    return {column["name"]: column["data_type"] for column in node["columns"].values()}


def test_every_model_gives_the_columns_and_types_it_declares(models: dict[str, dict[str, Any]], google_sql: GoogleSql) -> None:
    given = {name: google_sql.columns(model["compiled_code"]) for name, model in models.items()}
    expected = {name: declared(model) for name, model in models.items()}
    expected["stg_orders"] |= {name: type_ for name, (_, type_) in FIELDS.items()}
    assert {name: list(columns.items()) for name, columns in given.items()} == {
        name: list(columns.items()) for name, columns in expected.items()
    }


def test_what_is_replaced_by_day_and_its_tests_read_the_changed_days_as_constants(manifest: dict[str, Any]) -> None:
    reading = {
        node["name"]
        for node in manifest["nodes"].values()
        if IN_THESE_DAYS in node["compiled_code"] and node["resource_type"] in ("model", "test")
    }
    assert {*REPLACED_BY_DAY, "unique_fct_orders_order_id", "not_null_fct_orders_order_id"} <= reading
    assert {"the_fact_holds_every_order_as_it_was_loaded", "the_days_hold_every_order_of_the_fact"} <= reading
    assert "every_order_was_created_about_when_it_happened" in reading


def test_bigquery_accepts_every_test_and_snapshot(manifest: dict[str, Any], google_sql: GoogleSql) -> None:
    nodes = [node for node in manifest["nodes"].values() if node["resource_type"] != "model"]
    assert {node["resource_type"] for node in nodes} == {"test", "snapshot"}
    for node in nodes:
        assert google_sql.columns(node["compiled_code"]), node["name"]


@pytest.mark.parametrize(
    ("kind", "query"),
    [
        ("a table that is not there", "select user_id from raw_customers"),
        ("a column that is not there", "select user_idd from raw_users"),
        ("a column of a table that is not joined", "select raw_users.name from raw_orders"),
        ("an ambiguous column", "select user_id from raw_users cross join raw_orders"),
        ("a column that is not grouped", "select user_id, count(*) from raw_orders group by product_id"),
        ("a window in where", "select user_id from raw_orders where row_number() over (order by user_id) = 1"),
        ("a text that is compared with a number", "select user_id from raw_orders where status = 1"),
        ("a timestamp that is compared with a date", "select user_id from raw_orders where created_date = current_date()"),
        ("a sum of texts", "select sum(amount) from raw_orders"),
        ("a branch of another type", "select if(status = 'Fraud', amount_numeric, 'none') from raw_orders"),
        ("a union of different types", "select user_id from raw_users union all select name from raw_users"),
        ("a union without all or distinct", "select user_id from raw_users union select user_id from raw_orders"),
        ("a cast of Postgres", "select user_id::text from raw_users"),
        ("a filter of DuckDB", "select count(*) filter (where status = 'Fraud') from raw_orders"),
        ("date_trunc of Postgres", "select date_trunc('day', created_date) from raw_orders"),
        ("an interval of Postgres", "select created_date + interval '1 day' from raw_orders"),
        (
            "a range of days over a date",
            "select sum(price) over (order by date(created_date) range 6 preceding) from raw_products",
        ),
        ("a function that is not there", "select list_contains(reasons, 'night_amount') from raw_orders"),
        ("too few arguments", "select date_diff(current_date(), day)"),
        ("a misplaced comma", "select user_id, from_ from raw_users,"),
    ],
)
def test_the_analyzer_refuses(google_sql: GoogleSql, kind: str, query: str) -> None:
    with pytest.raises(Refused, match="INVALID_ARGUMENT"):
        google_sql.columns(query)


def test_a_column_of_another_type_than_declared_is_seen(models: dict[str, dict[str, Any]], google_sql: GoogleSql) -> None:
    mart = models["mart_fraud_daily_saved_amount"]
    changed = mart["compiled_code"].replace("sum(fraud_orders)", "avg(fraud_orders)")
    assert changed != mart["compiled_code"]
    assert google_sql.columns(changed) != declared(mart)


def test_every_column_is_described(manifest: dict[str, Any], models: dict[str, dict[str, Any]]) -> None:
    nodes = [*manifest["sources"].values(), *models.values()]
    blank = [
        f"{node['name']}.{column['name']}" for node in nodes for column in node["columns"].values() if not column["description"]
    ]
    assert not blank
    assert not [node["name"] for node in nodes if not node["description"]]


def test_every_mart_and_the_fact_have_unit_tests_and_a_contract(
    manifest: dict[str, Any], models: dict[str, dict[str, Any]]
) -> None:
    tested = {unit_test["model"] for unit_test in manifest["unit_tests"].values()}
    promised = {name for name, model in models.items() if model["config"]["contract"]["enforced"]}
    marts = {name for name in models if name.startswith("mart_")}
    assert len(marts) == 9
    assert marts | {*REPLACED_BY_DAY, "product_costs"} <= tested
    assert promised == marts | {*REPLACED_BY_DAY, "product_costs", "dim_users", "dim_products"}


def test_no_mart_reads_single_orders(models: dict[str, dict[str, Any]]) -> None:
    for mart in (model for name, model in models.items() if name.startswith("mart_")):
        assert not {"model.finpro.fct_orders", "model.finpro.stg_orders"} & set(mart["depends_on"]["nodes"]), mart["name"]


def test_reasons_and_time_zone_are_those_of_the_rules(models: dict[str, dict[str, Any]]) -> None:
    assert tuple(declared(models["mart_fraud_attempt_trends"]))[-len(SIX) :] == SIX
    zone = load_rules(CONF_DIR / "fraud_rules.toml").time_zone
    assert f"date(created_date, '{zone}')" in models["stg_orders"]["compiled_code"]


def test_a_condition_of_a_rule_can_be_tried_on_the_orders(models: dict[str, dict[str, Any]]) -> None:
    assert (ORDER_FIELDS | LOCAL_FIELDS).keys() <= declared(models["stg_orders"]).keys()


def test_the_marts_have_a_dataset_of_their_own_in_which_there_is_nothing_to_reach_a_person_by(manifest: dict[str, Any]) -> None:
    nodes = [node for node in manifest["nodes"].values() if node["resource_type"] in ("model", "snapshot", "test")]
    marts = [node for node in nodes if node["name"].startswith("mart_")]
    assert {node["schema"] for node in marts} == {"finpro_marts"}
    assert {node["schema"] for node in nodes if node not in marts} == {"finpro_core"}
    assert {source["schema"] for source in manifest["sources"].values()} == {"finpro"}
    assert not {"email", "phone_number"} & {column for mart in marts for column in declared(mart)}
    assert all(mart["config"]["materialized"] == "table" for mart in marts)  # a view would need its reader's right on the core


def test_rows_that_break_a_test_are_kept_and_not_without_bound(manifest: dict[str, Any]) -> None:
    tests = [node for node in manifest["nodes"].values() if node["resource_type"] == "test"]
    assert all(node["config"]["store_failures"] and node["config"]["limit"] == 1000 for node in tests)
    assert all(node["alias"].startswith("failed_") for node in tests)
