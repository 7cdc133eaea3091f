"""
### Postgres to BigQuery, compared and checked

Exports what changed in `raw_users`, `raw_products`, `raw_orders` and `order_outcomes` since the run before, all on one
snapshot, loads it into BigQuery, compares both sides, and checks the result against expectations. Only when all of it holds
is the asset updated that starts `transformation_dbt`. It runs every hour, and after `batch_raw_loads`.

The export is named after the DAG run, so every try of every task works on the same export: whatever was killed, clear the
task that failed, with those after it, and nothing comes twice.

When a task fails:

- **`export`**, *another export is running*: clear it when that has ended.
- **`export`**, otherwise: its log ends with what Spark said. Cleared, it makes the run again; the failed try left nothing that
  counts.
- **`load.stage`** (files into a staging table, one task a table), *`SchemaChanged`*: a column was removed or retyped in
  Postgres. Undo that, or change the raw table by hand, then clear it. It is not tried again by itself.
- **`load.merge`** (staging into the raw tables), *builds on a run that is not to be found*: trigger with `full`.
- **`reconcile`** (one task a table), *Inconsistent*: the message names each figure that differs. Find out which side was
  changed by hand; a run with `full` brings BigQuery back to what Postgres holds.
- **`reconcile`**, *another run has been loaded since*: nothing is wrong; that run is compared by its own DAG run.
- **`consistency`** tells what was found for all tables, and is skipped when nothing was compared: look at the tasks before it.
- **`validate`**: the gate. The message names each expectation and rows that break it; the data docs show more. Correct it at
  the source, and the next run brings it. Until then dbt does not run, and the marts stay as they were.

Parameters: `full` exports every row, and deletes from BigQuery what Postgres no longer has; `since` exports again what has
changed since a moment.

Backfill: a run takes everything since the run before, so the first one after an outage closes the gap. A stretch again:
`airflow dags trigger bigquery_ingest --conf '{"since": "2026-11-01T00:00:00+07:00"}'`; everything: `--conf '{"full": true}'`.
"""

from airflow.sdk import DAG, AssetOrTimeSchedule, CronTriggerTimetable, Param, TaskGroup, TriggerRule, get_current_context, task
from airflow.sdk.exceptions import AirflowSkipException

from batch.warehouse.manifest import TABLES
from jobs.airflow.defaults import DEFAULT_ARGS, LONGEST_RUN, RAW_TABLES, TIME_ZONE, WAREHOUSE_POOL
from jobs.airflow.exports import VALIDATED_TABLES, compare, export_run_id, this_export
from jobs.airflow.notifier import DAG_SUCCEEDED, RUN_RECONCILED
from jobs.airflow.spark import FinproSparkOperator

with DAG(
    dag_id="bigquery_ingest",
    description="Postgres to BigQuery: export, load, reconcile, validate",
    doc_md=__doc__,
    schedule=AssetOrTimeSchedule(timetable=CronTriggerTimetable("0 * * * *", timezone=TIME_ZONE), assets=[RAW_TABLES]),
    catchup=False,
    max_active_runs=1,
    dagrun_timeout=LONGEST_RUN,
    tags=["finpro", "bigquery", "spark"],
    default_args=DEFAULT_ARGS,
    user_defined_macros={"export_run_id": export_run_id},
    params={
        "full": Param(False, type="boolean", description="Export every row, not only what changed since the last run."),
        "since": Param(None, type=["null", "string"], format="date-time", description="Export again what has changed since."),
    },
) as dag:
    export = FinproSparkOperator(
        task_id="export",
        job="export_raw",
        arguments=[
            "--run-id={{ export_run_id(dag_run.run_after, dag_run.run_id) }}",
            "{{ '--full' if params.full else '' }}",
            "{{ '--since=' ~ params.since if params.since else '' }}",
        ],
    )

    with TaskGroup("load") as load:

        @task
        def stage(table: str) -> None:
            """Load one table's files into staging."""
            from batch.warehouse.bigquery import stage as stage_table
            from jobs.airflow.settings import task_settings

            print(f"{table}: {stage_table(task_settings(), table, this_export()):,} rows staged")

        @task(pool=WAREHOUSE_POOL)
        def merge() -> None:
            """Merge the staged rows of all tables into the raw tables."""
            from batch.warehouse.bigquery import load as load_run
            from jobs.airflow.settings import task_settings

            loaded = load_run(task_settings(), this_export(), on_table=print)
            print(f"loaded {', '.join(loaded)}" if loaded else "the raw tables hold this run already")

        stage.expand(table=TABLES) >> merge()

    @task
    def reconcile(table: str) -> None:
        """Compare one table with the export's snapshot of Postgres."""
        compare(this_export(), [table])

    @task(trigger_rule=TriggerRule.ALL_DONE, on_success_callback=RUN_RECONCILED)
    def consistency() -> None:
        """Tell what was found for all tables."""
        from batch.warehouse.monitoring import findings
        from jobs.airflow.settings import task_settings

        found = findings(task_settings().require("postgres_dsn"), this_export())
        if not found:
            raise AirflowSkipException("No table of this run was compared.")
        for one in found:
            print(f"{one.table_name}: {one.source_rows:,} rows, {one.destination_rows:,} in BigQuery, {one.status}")

    @task(outlets=[VALIDATED_TABLES], on_success_callback=DAG_SUCCEEDED)
    def validate() -> None:
        """Check the raw tables against what they have to be."""
        from jobs.airflow.settings import task_settings
        from jobs.validate import validate as check_tables

        run_id = this_export()
        check_tables(task_settings(), run_id, say=print)
        get_current_context()["outlet_events"][VALIDATED_TABLES].extra = {"run_id": run_id}

    compared = reconcile.expand(table=TABLES)
    export >> load >> compared >> validate()
    compared >> consistency()
