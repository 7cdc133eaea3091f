"""What the DAGs share: the assets that chain them, how they retry, who is told, and what an export run of theirs is called."""

import hashlib
from datetime import UTC, datetime, timedelta
from typing import Any

from airflow.sdk import Asset, ExceptionRetryPolicy, RetryAction, RetryRule, get_current_context

from conf.errors import ExpectationsFailed, GoogleCloudRefused, ReconciliationError, RulesError, SchemaChanged, SettingsError
from jobs.airflow.notifier import TASK_FAILED

# A DAG that has one of these as its schedule runs when a task that has it as an outlet succeeds.
RAW_TABLES = Asset("finpro_postgres_raw_tables", group="finpro")
VALIDATED_TABLES = Asset("finpro_bigquery_validated_tables", group="finpro")
MARTS = Asset("finpro_bigquery_marts", group="finpro")

TIME_ZONE = "Asia/Jakarta"

# One slot, see conf/airflow_pools.json: the raw tables do not move on while dbt reads them.
WAREHOUSE_POOL = "warehouse"

_FOR_A_PERSON = [SettingsError, RulesError, GoogleCloudRefused, SchemaChanged, ReconciliationError, ExpectationsFailed]

DEFAULT_ARGS: dict[str, Any] = {
    "owner": "data-engineering",
    "retries": 3,
    "retry_delay": timedelta(seconds=30),
    "retry_exponential_backoff": 2.0,
    "max_retry_delay": timedelta(minutes=10),
    "retry_policy": ExceptionRetryPolicy(
        [RetryRule(list(_FOR_A_PERSON), RetryAction.FAIL, reason="the same again would fail the same: a person must act")]
    ),
    "execution_timeout": timedelta(hours=2),
    "on_failure_callback": TASK_FAILED,
}


def export_run_id(run_after: datetime, run_id: str) -> str:
    """The name of a DAG run's export, such as 20261122T170000Z-1f3a9c2b: the same for every try of every task."""
    return f"{run_after.astimezone(UTC):%Y%m%dT%H%M%SZ}-{hashlib.sha256(run_id.encode()).hexdigest()[:8]}"


def this_export() -> str:
    """The name of the export of the DAG run whose task this is."""
    dag_run: Any = get_current_context()["dag_run"]
    return export_run_id(dag_run.run_after, dag_run.run_id)


def validated_export() -> str | None:
    """The export that was validated last, of those that started the DAG run whose task this is; None when a person did."""
    events: Any = get_current_context()["triggering_asset_events"]
    validated = sorted(events.get(VALIDATED_TABLES, ()), key=lambda event: event.timestamp)
    return str(validated[-1].extra["run_id"]) if validated else None
