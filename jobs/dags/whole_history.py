"""
### All of history, once a week

The hourly runs look at the days that have changed. Once a week, on Sunday night, all of the raw tables is compared with
Postgres, then all days of the fact and the marts are built anew from them, and every test looks at all of them: whatever was
changed by hand, or missed, ends here. When a load is under way, the run skips itself, and the next week's comes.

When a task fails:

- **`compare`**, *Inconsistent*: the message names each figure that differs; nothing is built on it. Find out which side was
  changed by hand; a run of `bigquery_ingest` with `full` brings BigQuery back to what Postgres holds.
- **`compare`**, *is not loaded yet*: a load is under way, and it is tried again by itself. *Has been loaded since*: clear it.
- **`rebuild`**, *a test fails* or *Inconsistent*: see the page of `transformation_dbt`. Until it has passed, each run of
  `transformation_dbt` builds all days.
- **`rebuild`**, *BigQuery does not answer*: it is tried again by itself.

Backfill: none is needed, a run is about all of history. At once: `airflow dags trigger whole_history`.
"""

from datetime import timedelta

from airflow.sdk import DAG, CronTriggerTimetable, task
from airflow.sdk.exceptions import AirflowSkipException

from conf.errors import Overtaken
from jobs.airflow.defaults import DEFAULT_ARGS, LONGEST_RUN, TIME_ZONE, WAREHOUSE_POOL
from jobs.airflow.exports import compare
from jobs.airflow.notifier import DAG_SUCCEEDED

with DAG(
    dag_id="whole_history",
    description="All of the raw tables compared, all days of the fact and the marts built and tested anew",
    doc_md=__doc__,
    # Not at once on the Sunday on which Airflow first starts: nothing may be loaded yet.
    schedule=CronTriggerTimetable("30 2 * * 0", timezone=TIME_ZONE, run_immediately=timedelta(0)),
    catchup=False,
    max_active_runs=1,
    dagrun_timeout=LONGEST_RUN,
    tags=["finpro", "bigquery", "dbt"],
    default_args=DEFAULT_ARGS,
) as dag:

    @task(pool=WAREHOUSE_POOL, task_id="compare")
    def compare_all() -> None:
        """Compare all of the raw tables with Postgres."""
        compare(whole=True)

    @task(pool=WAREHOUSE_POOL, on_success_callback=DAG_SUCCEEDED)
    def rebuild() -> None:
        """Build and test all days."""
        from jobs.airflow.settings import task_settings
        from jobs.transform import transform

        try:
            transform(task_settings(), run_id=None, full_refresh=True, select=(), say=print)
        except Overtaken as newer:
            raise AirflowSkipException(str(newer)) from newer

    compare_all() >> rebuild()
