"""The DAGs as they are written: who owns them, how they are chained and retried, and what on-call is told."""

import importlib
import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk import DAG, CronTriggerTimetable, RetryAction
from airflow.sdk.exceptions import AirflowSkipException

from batch.warehouse.manifest import check_run_id
from conf.errors import (
    DataTestsFailed,
    ExpectationsFailed,
    FinproError,
    OutcomesError,
    Overtaken,
    PostgresError,
    PostgresUnavailable,
    ReconciliationError,
    SchemaChanged,
    SettingsError,
    TransformError,
)
from conf.settings import CONF_DIR, Settings, load_settings
from jobs.airflow.defaults import DEFAULT_ARGS, MARTS, RAW_TABLES
from jobs.airflow.exports import VALIDATED_TABLES, export_run_id
from jobs.airflow.notifier import DAG_SUCCEEDED, RUN_RECONCILED, TASK_FAILED
from jobs.airflow.server import DAGS

NAMES = sorted(file.stem for file in DAGS.glob("[!_]*.py"))
CHAIN = ["batch_raw_loads", "bigquery_ingest", "transformation_dbt"]
TOO_SLOW_TO_PARSE = ["dbt", "great_expectations", "batch.warehouse.export"]


@pytest.fixture(params=NAMES)
def dag(request: pytest.FixtureRequest) -> DAG:
    return find(request.param)


def find(name: str) -> DAG:
    dag = importlib.import_module(f"jobs.dags.{name}").dag
    assert isinstance(dag, DAG)
    return dag


def task(dag_id: str, task_id: str) -> Any:
    return find(dag_id).get_task(task_id)


def test_the_folder_holds_the_chain_and_no_file_that_hides_dbt() -> None:
    assert set(CHAIN) <= set(NAMES)
    assert not [name for name in NAMES if name.startswith("dbt_")]


def test_a_dag_is_called_as_its_file_and_says_whose_it_is_and_what_it_does(dag: DAG) -> None:
    assert dag.dag_id in NAMES
    assert "finpro" in dag.tags
    assert len(dag.tags) > 1
    assert dag.description
    assert {task.owner for task in dag.tasks} == {"data-engineering"}


def test_the_page_of_a_dag_says_what_to_do_when_each_of_its_tasks_fails_and_how_to_backfill(dag: DAG) -> None:
    page = str(dag.doc_md)
    assert "When a task fails:" in page
    assert [task.task_id for task in dag.tasks if f"**`{task.task_id}`**" not in page] == []
    assert "Backfill:" in page


def test_no_run_overlaps_another_or_makes_up_for_the_past(dag: DAG) -> None:
    assert dag.catchup is False
    assert dag.max_active_runs == 1


def test_a_run_that_hangs_ends_and_makes_room_for_the_next_one(dag: DAG) -> None:
    assert dag.dagrun_timeout
    assert dag.dagrun_timeout > max(task.execution_timeout or timedelta.max for task in dag.tasks)


def test_every_task_is_tried_again_ever_later_and_ends_some_time_and_its_failure_is_told(dag: DAG) -> None:
    tasks: list[Any] = list(dag.tasks)
    for task in tasks:
        assert task.retries >= 2
        assert task.retry_exponential_backoff >= 2
        assert timedelta(0) < task.retry_delay < task.max_retry_delay
        assert task.execution_timeout
        assert TASK_FAILED in _callbacks(task.on_failure_callback)


@pytest.mark.parametrize(("name", "last"), zip(CHAIN, ["generate", "validate", "build"], strict=True))
def test_success_of_the_chain_is_told_by_the_task_that_completes_a_run_and_not_when_that_is_skipped(
    name: str, last: str
) -> None:
    assert DAG_SUCCEEDED in _callbacks(task(name, last).on_success_callback)
    assert not find(name).on_success_callback
    assert {each.task_id for each in find(name).tasks if not each.downstream_task_ids} - {"consistency"} == {last}


def test_consistency_is_told_once_a_run_whatever_was_found() -> None:
    consistency = task("bigquery_ingest", "consistency")
    assert RUN_RECONCILED in _callbacks(consistency.on_success_callback)
    assert consistency.trigger_rule == "all_done"
    assert consistency.upstream_task_ids == {"reconcile"}


def _callbacks(callbacks: Any) -> list[Any]:
    return list(callbacks) if isinstance(callbacks, (list, tuple)) else [callbacks]


@pytest.mark.parametrize(
    "error",
    [SettingsError, SchemaChanged, PostgresError, ReconciliationError, ExpectationsFailed, DataTestsFailed, OutcomesError],
)
def test_what_a_person_must_decide_is_not_tried_again(error: type[FinproError]) -> None:
    decision = DEFAULT_ARGS["retry_policy"].evaluate(error("x"), 1, 3)
    assert decision.action is RetryAction.FAIL


@pytest.mark.parametrize("error", [PostgresUnavailable("x"), TransformError("x"), ConnectionError()])
def test_what_may_pass_by_itself_is_tried_again(error: Exception) -> None:
    assert DEFAULT_ARGS["retry_policy"].evaluate(error, 1, 3).action is not RetryAction.FAIL


def test_a_digest_is_of_the_hour_before_its_run_whenever_it_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    due, asked = datetime(2026, 11, 22, 17, 5, tzinfo=UTC), []

    def digest(_: Settings, *, now: datetime) -> None:
        asked.append(now)

    monkeypatch.setattr("jobs.dags.fraud_digest.get_current_context", lambda: {"dag_run": SimpleNamespace(run_after=due)})
    monkeypatch.setenv("FINPRO_DISCORD_WEBHOOK_URL", "https://discord.com/api/webhooks/1/x")
    monkeypatch.setattr("jobs.airflow.settings.task_settings", load_settings)
    monkeypatch.setattr("jobs.notify.notices.fraud_digest", digest)
    monkeypatch.setattr("jobs.notify.notifications.send", lambda *_: None)
    task("fraud_digest", "send").python_callable()
    assert asked == [due]


def test_what_turned_out_is_taken_without_leaving_anything_out_and_not_where_there_is_no_kafka(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[bool] = []

    def take(_: Settings, *, skip_forgotten: bool) -> None:
        taken.append(skip_forgotten)

    monkeypatch.setenv("FINPRO_HOME", str(tmp_path))  # without a platform, whatever other tests of this process have started
    monkeypatch.delenv("FINPRO_KAFKA_BOOTSTRAP_SERVERS", raising=False)  # a task leaves its settings in its process
    monkeypatch.setattr("jobs.airflow.settings.task_settings", load_settings)
    monkeypatch.setattr("streaming.outcomes_topic.take", take)
    with pytest.raises(AirflowSkipException, match="KAFKA"):
        task("order_outcomes", "take").python_callable()
    monkeypatch.setenv("FINPRO_KAFKA_BOOTSTRAP_SERVERS", "broker:9092")
    task("order_outcomes", "take").python_callable()
    assert taken == [False]


@pytest.mark.parametrize(("dag_id", "task_id"), [("transformation_dbt", "build"), ("whole_history", "rebuild")])
def test_a_build_that_a_newer_load_has_overtaken_is_skipped(monkeypatch: pytest.MonkeyPatch, dag_id: str, task_id: str) -> None:
    def overtaken(*_: object, **__: object) -> None:
        raise Overtaken("Run r2 was loaded last.")

    context = {"params": {"select": [], "full_refresh": False}, "triggering_asset_events": {}}
    monkeypatch.setattr("jobs.dags.transformation_dbt.get_current_context", lambda: context)
    monkeypatch.setattr("jobs.airflow.exports.get_current_context", lambda: context)
    monkeypatch.setattr("jobs.airflow.settings.task_settings", load_settings)
    monkeypatch.setattr("jobs.transform.transform", overtaken)
    with pytest.raises(AirflowSkipException, match="r2"):
        task(dag_id, task_id).python_callable()


def test_dbt_is_started_by_the_gate_and_by_nothing_else() -> None:
    assert list(task("bigquery_ingest", "validate").outlets) == [VALIDATED_TABLES]
    others = [(dag_id, each.task_id) for dag_id in NAMES for each in find(dag_id).tasks if VALIDATED_TABLES in each.outlets]
    assert others == [("bigquery_ingest", "validate")]
    assert started_by("transformation_dbt") == [VALIDATED_TABLES]


def started_by(dag_id: str) -> list[object]:
    """The assets that all have to be updated for a DAG to run."""
    condition: Any = find(dag_id).timetable
    return list(condition.asset_condition.objects)


def test_the_ingest_runs_after_the_raw_loads_and_every_hour() -> None:
    assert list(task("batch_raw_loads", "generate").outlets) == [RAW_TABLES]
    timetable: Any = find("bigquery_ingest").timetable
    assert started_by("bigquery_ingest") == [RAW_TABLES]
    assert timetable.timetable.expression == "0 * * * *"
    assert list(task("transformation_dbt", "build").outlets) == [MARTS]


def test_the_steps_of_the_ingest_follow_each_other_and_each_table_has_its_own_where_they_can() -> None:
    ingest = find("bigquery_ingest")
    order = ["export", "load.stage", "load.merge", "reconcile", "validate"]
    for before, after in pairwise(order):
        assert before in ingest.get_task(after).upstream_task_ids
    assert [each.task_id for each in ingest.tasks if each.is_mapped] == ["load.stage", "reconcile"]


def test_all_of_history_is_built_anew_only_where_all_of_it_is_what_postgres_has() -> None:
    assert task("whole_history", "rebuild").upstream_task_ids == {"compare"}


def test_on_the_sunday_on_which_airflow_first_starts_nothing_is_compared_yet() -> None:
    timetable = find("whole_history").timetable
    assert isinstance(timetable, CronTriggerTimetable)
    assert timetable.run_immediately == timedelta(0)


def test_what_changes_the_raw_tables_and_what_reads_them_for_dbt_share_a_pool_of_one_that_the_file_makes() -> None:
    pools = json.loads((CONF_DIR / "airflow_pools.json").read_text(encoding="utf-8"))
    used = {each.pool for dag_id in NAMES for each in find(dag_id).tasks} - {"default_pool"}
    assert used == set(pools)
    assert task("bigquery_ingest", "load.merge").pool == task("transformation_dbt", "build").pool == "warehouse"
    assert task("whole_history", "compare").pool == task("whole_history", "rebuild").pool == "warehouse"
    assert pools["warehouse"]["slots"] == 1


def test_the_export_of_a_dag_run_has_one_name_that_no_other_run_has() -> None:
    at = datetime(2026, 11, 22, 17, tzinfo=UTC)
    name = export_run_id(at, "manual__2026-11-22T17:00:00.1+00:00_abc")
    assert name.startswith("20261122T170000Z-")
    assert check_run_id(name) == name == export_run_id(at, "manual__2026-11-22T17:00:00.1+00:00_abc")
    assert export_run_id(at, "x" * 250) != name
    assert check_run_id(export_run_id(at, "Änderung " * 25))


@pytest.mark.parametrize("zone", ["Europe/Berlin", None])
def test_the_schedules_are_in_the_time_zone_of_the_settings(zone: str | None) -> None:
    reading = (
        "from jobs.dags.batch_raw_loads import dag; from jobs.dags.bigquery_ingest import dag as ingest;"
        "print(dag.timetable.timezone, ingest.timetable.timetable.timezone)"
    )
    environment = os.environ | ({"FINPRO_SCHEDULE_TIME_ZONE": zone} if zone else {})
    done = subprocess.run([sys.executable, "-c", reading], env=environment, capture_output=True, text=True, check=True)
    assert set(done.stdout.splitlines()[-1].split()) == {zone or "Asia/Jakarta"}


def test_reading_the_dags_imports_nothing_that_takes_long() -> None:
    reading = f"import importlib, sys; [importlib.import_module('jobs.dags.' + name) for name in {NAMES}];"
    reading += f"print([name for name in {TOO_SLOW_TO_PARSE} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", reading], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", NAMES)
def test_reading_a_dag_takes_less_than_a_second_of_the_processor(name: str) -> None:
    reading = "import time, airflow.sdk; from airflow.providers.apache.spark.operators.spark_submit import SparkSubmitOperator;"
    reading += f"begin = time.process_time(); import jobs.dags.{name}; print(time.process_time() - begin)"
    done = subprocess.run([sys.executable, "-c", reading], capture_output=True, text=True, check=True)
    assert float(done.stdout.splitlines()[-1]) < 1
