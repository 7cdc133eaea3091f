"""Jobs of the warehouse before a stricter BigQuery: what it refuses for a moment, for good, and what every job carries."""

import pytest
from google.api_core.exceptions import BadRequest
from google.cloud.bigquery import LoadJobConfig, QueryJobConfig, ScalarQueryParameter

from batch.bigquery import Usage
from batch.google_cloud import bigquery_client
from batch.warehouse.bigquery import load
from batch.warehouse.reconcile import reconcile
from batch.warehouse.steps import record
from conf.errors import GoogleCloudRefused
from conf.settings import Settings
from tests.oracle.bigquery_refusals import CONCURRENT_UPDATE, JOB_RATE_LIMIT, PARTITIONS_OF_A_JOB
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
            assert [one.status for one in reconcile(settings)] == ["Consistent"] * 3

    for step, jobs in (("load", loading), ("reconcile", comparing)):
        labels = [job["labels"] for job in jobs if "query" in job or "sourceUris" in job["load"]]
        assert all(one == {"dag": "manual", "run": "first_run", "step": step} for one in labels)
    assert sum("sourceUris" in job.get("load", {}) for job in loading) == 5
    recorded = dict(
        execute(settings, "select step, array[jobs, bytes_processed] from ingestion_steps where run_id = 'First_Run'")
    )
    assert recorded.keys() == {"load", "reconcile"}
    assert recorded["reconcile"][0] == sum("query" in job for job in comparing)
    assert recorded["reconcile"][1] > 0


def test_a_step_goes_on_where_its_cost_cannot_be_recorded(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    execute(settings, "drop table ingestion_steps")
    record(settings, "first", "load", Usage(1, 2, 3))
    assert "What BigQuery has read for step load of run first is not recorded" in caplog.text


def test_a_merge_of_too_many_days_says_so_by_name(settings: Settings, strict_bigquery: StrictBigQuery) -> None:
    fill(settings, orders=20)
    export_run(settings, "only")
    with strict_bigquery.refusing(PARTITIONS_OF_A_JOB, "as staged"), pytest.raises(GoogleCloudRefused, match="4,000 days"):
        load(settings)
    assert load(settings) == ["only"]


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
