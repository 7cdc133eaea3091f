"""
### Users and products into Postgres

Makes users and products and loads them into `raw_users` and `raw_products`: what `finpro generate` does. The same parameters
again change nothing, larger counts add. Its success starts `bigquery_ingest`.

When a task fails:

- **`generate`**, *Postgres does not answer*: it is tried again by itself; `finpro status` shows what is down.
- **`generate`**, *a table is missing*: `finpro migrate`, then clear the task.

Backfill: none is needed, a run loads all users and products, whatever its date. More of them:
`airflow dags trigger batch_raw_loads --conf '{"users": 50000}'`.
"""

from airflow.sdk import DAG, CronTriggerTimetable, Param, get_current_context, task

from jobs.airflow.defaults import DEFAULT_ARGS, LONGEST_RUN, RAW_TABLES, TIME_ZONE
from jobs.airflow.notifier import DAG_SUCCEEDED

with DAG(
    dag_id="batch_raw_loads",
    description="Users and products into Postgres",
    doc_md=__doc__,
    schedule=CronTriggerTimetable("0 1 * * *", timezone=TIME_ZONE),
    catchup=False,
    max_active_runs=1,
    dagrun_timeout=LONGEST_RUN,
    tags=["finpro", "postgres", "batch"],
    default_args=DEFAULT_ARGS,
    params={
        "users": Param(20_000, type="integer", minimum=0, description="Users 1 to this one."),
        "products": Param(1_000, type="integer", minimum=0, description="Products 1 to this one."),
        "seed": Param(1, type="integer", minimum=0, description="What they are made from: keep it."),
    },
) as dag:

    @task(outlets=[RAW_TABLES], on_success_callback=DAG_SUCCEEDED)
    def generate() -> None:
        """Upsert users and products."""
        from batch.reference_data import generate as generate_reference_data
        from jobs.airflow.settings import task_settings

        dsn, params = task_settings().require("postgres_dsn"), get_current_context()["params"]
        counts = {"user_count": params["users"], "product_count": params["products"]}
        for loaded in generate_reference_data(dsn, **counts, seed=params["seed"]):
            print(f"{loaded.table}: {loaded.inserted:,} inserted, {loaded.updated:,} updated, {loaded.unchanged:,} unchanged")

    generate()
