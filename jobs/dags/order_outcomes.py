"""
### What turned out about orders, from Kafka to Postgres

Ten minutes before each hour, so that the hour's ingest has it: what the topic `order_outcomes` has by then becomes statements
in the table of that name, each once; what breaks the contract goes to `outcome_dead_letters` with the reason. Without a Kafka
in the settings it skips itself.

When a task fails:

- **`take`**, *Kafka or Postgres does not answer*: it is tried again by itself; the next run takes what has come meanwhile.
- **`take`**, *Kafka has deleted what was never taken*: have the senders send those offsets again, or add them by file; then
  `finpro outcomes take --skip-forgotten` once, by hand.

Backfill: nothing to do, a run takes all since the one before. Of files: `finpro outcomes add FILE`.
"""

from airflow.sdk import DAG, CronTriggerTimetable, task
from airflow.sdk.exceptions import AirflowSkipException

from jobs.airflow.defaults import DEFAULT_ARGS, LONGEST_RUN, TIME_ZONE

with DAG(
    dag_id="order_outcomes",
    description="What turned out about orders, once an hour, from Kafka to Postgres",
    doc_md=__doc__,
    schedule=CronTriggerTimetable("50 * * * *", timezone=TIME_ZONE),
    catchup=False,
    max_active_runs=1,
    dagrun_timeout=LONGEST_RUN,
    tags=["finpro", "fraud"],
    default_args=DEFAULT_ARGS,
) as dag:

    @task(task_id="take")
    def take_statements() -> str:
        """Take what the topic has by now; says how much that was."""
        from jobs.airflow.settings import task_settings
        from streaming.outcomes_topic import take

        settings = task_settings()
        if settings.get("kafka_bootstrap_servers") is None:
            raise AirflowSkipException("FINPRO_KAFKA_BOOTSTRAP_SERVERS is not set.")
        return str(take(settings, skip_forgotten=False))

    take_statements()
