"""
### The marts

Builds and tests dimensions, the fact and the marts with dbt, and writes their documentation. It starts when
`bigquery_ingest` has validated a load. When a newer load has begun meanwhile, it skips itself: that load's own validation
starts it again.

When a task fails:

- **`build`**, *a test fails*: the message names it and rows that break it; all of them are in the table `failed_<test>` of the
  core's dataset, and what became of earlier tests is in `test_results`. It is not tried again by itself. Correct the model or
  the data, then clear the task.
- **`build`**, *Inconsistent*: nothing was built. See the page of `bigquery_ingest`.
- **`build`**, *BigQuery does not answer*: it is tried again by itself.

Parameters: `full_refresh` builds all days of the fact anew; `select` builds a part, in dbt's words.

Backfill: a run builds the days that have changed since the last run that succeeded, so any run brings all marts up to date.
After a model has changed its meaning: `airflow dags trigger transformation_dbt --conf '{"full_refresh": true}'`.
"""

from airflow.sdk import DAG, Param, get_current_context, task
from airflow.sdk.exceptions import AirflowSkipException

from conf.errors import Overtaken
from jobs.airflow.defaults import DEFAULT_ARGS, LONGEST_RUN, MARTS, WAREHOUSE_POOL
from jobs.airflow.exports import VALIDATED_TABLES, validated_export
from jobs.airflow.notifier import DAG_SUCCEEDED

with DAG(
    dag_id="transformation_dbt",
    description="dbt over the validated raw tables: marts, tests, documentation",
    doc_md=__doc__,
    schedule=[VALIDATED_TABLES],
    catchup=False,
    max_active_runs=1,
    dagrun_timeout=LONGEST_RUN,
    tags=["finpro", "bigquery", "dbt"],
    default_args=DEFAULT_ARGS,
    params={
        "full_refresh": Param(False, type="boolean", description="Build all days of the fact anew."),
        "select": Param([], type="array", items={"type": "string"}, description="What to build; by default all."),
    },
) as dag:

    @task(pool=WAREHOUSE_POOL, outlets=[MARTS], on_success_callback=DAG_SUCCEEDED)
    def build() -> None:
        """Build and test what dbt knows, from the run that was validated."""
        from jobs.airflow.settings import task_settings
        from jobs.transform import transform

        params = get_current_context()["params"]
        selected = tuple(params["select"])
        try:
            transform(
                task_settings(), run_id=validated_export(), full_refresh=params["full_refresh"], select=selected, say=print
            )
        except Overtaken as newer:
            raise AirflowSkipException(f"{newer} Its own validation starts dbt.") from newer

    build()
