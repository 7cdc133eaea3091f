"""
### Fraud of the last hour, to Discord

Five minutes after each hour: how many orders were screened in it, how many are frauds, for which reasons, and what they were
worth. One message an hour, never one an alert. Without a webhook in the settings it skips itself.

When a task fails:

- **`send`**, *Discord* refuses or does not answer: it is tried again by itself; nothing else depends on it. Cleared later, it
  tells of its own hour all the same.
- **`send`**, *Postgres does not answer*: `finpro status` shows what is down.

Backfill: `finpro notify digest --hours 24` sends the last day as one message.
"""

from airflow.sdk import DAG, CronTriggerTimetable, get_current_context, task
from airflow.sdk.exceptions import AirflowSkipException

from jobs.airflow.defaults import DEFAULT_ARGS, LONGEST_RUN, TIME_ZONE

with DAG(
    dag_id="fraud_digest",
    description="Counts of fraud by reason, once an hour, to Discord",
    doc_md=__doc__,
    schedule=CronTriggerTimetable("5 * * * *", timezone=TIME_ZONE),
    catchup=False,
    max_active_runs=1,
    dagrun_timeout=LONGEST_RUN,
    tags=["finpro", "fraud"],
    default_args=DEFAULT_ARGS,
) as dag:

    @task
    def send() -> None:
        """Send the digest of the hour before the run, whenever it is tried."""
        from jobs.airflow.settings import task_settings
        from jobs.notify.notices import fraud_digest
        from jobs.notify.notifications import send as send_notice

        settings = task_settings()
        if settings.discord_webhook_url is None:
            raise AirflowSkipException("FINPRO_DISCORD_WEBHOOK_URL is not set.")
        send_notice(settings, fraud_digest(settings, now=get_current_context()["dag_run"].run_after))

    send()
