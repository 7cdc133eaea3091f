"""Jobs of the warehouse before a stricter BigQuery: what it refuses for a moment, for good, and what every job carries."""

import pytest
from google.api_core.exceptions import BadRequest
from google.cloud.bigquery import LoadJobConfig, QueryJobConfig, ScalarQueryParameter

from batch.bigquery import Usage
from batch.google_cloud import bigquery_client, explained
from batch.warehouse.bigquery import load
from batch.warehouse.reconcile import reconcile
from batch.warehouse.steps import record
from conf.errors import GoogleCloudRefused
from conf.settings import Settings
from tests.oracle.bigquery_refusals import CONCURRENT_UPDATE, JOB_RATE_LIMIT
from tests.oracle.strict_bigquery import StrictBigQuery
from tests.runs.exports import execute, export_run, fill


def test_a_run_is_loaded_though_jobs_fail_for_a_moment_and_what_each_step_reads_is_recorded(
    settings: Settings, strict_bigquery: StrictBigQuery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batch.warehouse.bigquery_jobs._PAUSES", (0.0, 0.0))
    fill(settings, orders=20)
    export_run(settings, "First_Run")
    with (
        strict_bigquery.listening() as loading,
        strict_bigquery.refusing(JOB_RATE_LIMIT, "sourceUris", times=2),
        strict_bigquery.refusing(CONCURRENT_UPDATE, "as staged", times=2),
    ):
        load(settings)
    with strict_bigquery.listening() as comparing:
        for _ in range(2):  # a step that is done again costs again
            assert [one.status for one in reconcile(settings)] == ["Consistent"] * 4

    for step, jobs in (("load", loading), ("reconcile", comparing)):
        labels = [job["labels"] for job in jobs if "query" in job or "sourceUris" in job["load"]]
        assert all(one == {"dag": "manual", "run": "first_run", "step": step} for one in labels)
    assert sum("sourceUris" in job.get("load", {}) for job in loading) == 6
    recorded = dict(execute(settings, "select step, jobs from ingestion_steps where run_id = 'First_Run'"))
    assert recorded.keys() == {"load", "reconcile"}
    assert recorded["reconcile"] == sum("query" in job for job in comparing)


def test_a_step_goes_on_where_its_cost_cannot_be_recorded(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    execute(settings, "drop table ingestion_steps")
    record(settings, "first", "load", Usage(1, 2, 3))
    assert "What BigQuery has read for step load of run first is not recorded" in caplog.text


def test_a_statement_that_brings_more_than_4000_days_is_refused_by_name(settings: Settings) -> None:
    client, dataset = bigquery_client(settings), settings.bigquery_dataset
    days = "select timestamp_add(timestamp '1990-01-01', interval day day) as moment from unnest(generate_array(1, {})) as day"
    by_day = f"create or replace table {dataset}.by_day partition by timestamp_trunc(moment, day) as "
    merge = (
        "merge {}.by_day as stored using ({}) as staged on stored.moment = staged.moment"
        " when not matched then insert (moment) values (moment)"
    )
    client.query(by_day + days.format(4_000)).result()
    client.query(merge.format(dataset, days.format(4_000))).result()
    for statement in (by_day + days.format(4_001), merge.format(dataset, days.format(4_001))):
        with pytest.raises(GoogleCloudRefused, match=r"at least 4001 partitions.*fewer days at once"), explained(settings):
            client.query(statement).result()


def test_what_the_emulator_takes_and_bigquery_refuses_is_refused(settings: Settings, strict_bigquery: StrictBigQuery) -> None:
    client, table = bigquery_client(settings), f"{settings.bigquery_dataset}.times"
    client.query(f"create table {table} (moment timestamp)").result()
    later = f"select count(*) from {table} where moment > @now"

    def ask(kind: str) -> list[tuple[int]]:
        parameter = ScalarQueryParameter("now", kind, "2026-11-22 00:00:00")
        return [row.values() for row in client.query(later, job_config=QueryJobConfig(query_parameters=[parameter])).result()]

    assert ask("TIMESTAMP") == [(0,)]
    with pytest.raises(BadRequest, match="No matching signature for operator > for argument types: TIMESTAMP, DATETIME"):
        ask("DATETIME")
    assert strict_bigquery.refused.pop().endswith(later)
    with pytest.raises(BadRequest, match=r"Too many sources provided: 10001\. Limit is 10000"):
        client.load_table_from_uri(["gs://b/o"] * 10_001, table, job_config=LoadJobConfig(source_format="PARQUET")).result()
