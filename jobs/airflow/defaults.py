"""What the DAGs share: the assets that chain them, how they retry, how long they may take, and who is told of failures."""

from datetime import timedelta
from typing import Any

from airflow.sdk import Asset, ExceptionRetryPolicy, RetryAction, RetryRule

from conf.errors import (
    DataTestsFailed,
    ExpectationsFailed,
    GoogleCloudRefused,
    OutcomesError,
    PostgresError,
    PostgresUnavailable,
    ReconciliationError,
    RulesError,
    SchemaChanged,
    SettingsError,
)
from conf.settings import load_settings
from jobs.airflow.exports import VALIDATED_TABLES
from jobs.airflow.notifier import TASK_FAILED

__all__ = ["DEFAULT_ARGS", "LONGEST_RUN", "MARTS", "RAW_TABLES", "TIME_ZONE", "VALIDATED_TABLES", "WAREHOUSE_POOL"]

# A DAG that has one of these as its schedule runs when a task that has it as an outlet succeeds.
RAW_TABLES = Asset("finpro_postgres_raw_tables", group="finpro")
MARTS = Asset("finpro_bigquery_marts", group="finpro")

TIME_ZONE = load_settings().schedule_time_zone

# One slot, see conf/airflow_pools.json: the raw tables do not move on while dbt reads them.
WAREHOUSE_POOL = "warehouse"

# Longer than all tries of a task; a run that hangs makes room for the next one.
LONGEST_RUN = timedelta(hours=6)

# The same again would fail the same: a person must act.
_FOR_A_PERSON = [
    *(SettingsError, RulesError, GoogleCloudRefused, SchemaChanged, PostgresError),
    *(ReconciliationError, ExpectationsFailed, DataTestsFailed, OutcomesError),
]

DEFAULT_ARGS: dict[str, Any] = {
    "owner": "data-engineering",
    "retries": 3,
    "retry_delay": timedelta(seconds=30),
    "retry_exponential_backoff": 2.0,
    "max_retry_delay": timedelta(minutes=10),
    "retry_policy": ExceptionRetryPolicy(
        [
            RetryRule(PostgresUnavailable, RetryAction.DEFAULT, reason="it may answer again"),
            RetryRule(list(_FOR_A_PERSON), RetryAction.FAIL, reason="the same again would fail the same: a person must act"),
        ]
    ),
    "execution_timeout": timedelta(hours=2),
    "on_failure_callback": TASK_FAILED,
}
