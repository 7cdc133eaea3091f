"""
### The marts

Builds and tests dimensions, the fact and the marts with dbt, and writes their documentation. It starts when
`bigquery_ingest` has validated a load. When a newer load has begun meanwhile, it skips itself: that load's own validation
starts it again.

When a task fails:

- **`build`**, *a test fails*: the message names it and its file, and counts the rows that break it; what was run lies under
  `dbt/target/run` in finpro's home. Correct the model or the data, then clear the task.
- **`build`**, *BigQuery does not answer*: it is tried again by itself.

Parameters: `full_refresh` builds the fact anew instead of merging changes; `select` builds a part, in dbt's words.

Backfill: a run compares the whole fact with the raw tables, so any run brings all marts up to date. After a model has
changed its meaning: `airflow dags trigger transformation_dbt --conf '{"full_refresh": true}'`.
"""

from airflow.sdk import DAG, Param, get_current_context, task
from airflow.sdk.exceptions import AirflowSkipException

from jobs.airflow.defaults import DEFAULT_ARGS, MARTS, VALIDATED_TABLES, WAREHOUSE_POOL, validated_export
from jobs.airflow.notifier import DAG_SUCCEEDED

with DAG(
    dag_id="transformation_dbt",
    description="dbt over the validated raw tables: marts, tests, documentation",
    doc_md=__doc__,
    schedule=[VALIDATED_TABLES],
    catchup=False,
    max_active_runs=1,
    tags=["finpro", "bigquery", "dbt"],
    default_args=DEFAULT_ARGS,
    on_success_callback=DAG_SUCCEEDED,
    params={
        "full_refresh": Param(False, type="boolean", description="Build the fact anew instead of merging changes."),
        "select": Param([], type="array", items={"type": "string"}, description="What to build; by default all."),
    },
) as dag:

    @task(pool=WAREHOUSE_POOL, outlets=[MARTS])
    def build() -> None:
        """Build and test what dbt knows, from the run that was validated."""
        from conf.settings import load_settings
        from jobs.transform import overtaken_by, transform

        settings, run_id, params = load_settings(), validated_export(), get_current_context()["params"]
        if run_id and (newer := overtaken_by(settings, run_id)):
            raise AirflowSkipException(f"Run {newer} is being loaded since {run_id} was validated: its validation starts dbt.")
        selected = tuple(params["select"])
        transform(settings, run_id=run_id, full_refresh=params["full_refresh"], select=selected, say=print)

    build()
