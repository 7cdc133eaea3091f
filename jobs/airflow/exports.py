"""Which export a DAG run is about: the name that all its tasks and messages call it by."""

import hashlib
from collections.abc import Collection
from datetime import UTC, datetime
from typing import Any

from airflow.sdk import Asset, get_current_context

# Updated by the gate alone; the event carries the run that passed.
VALIDATED_TABLES = Asset("finpro_bigquery_validated_tables", group="finpro")


def export_run_id(run_after: datetime, run_id: str) -> str:
    """The name of a DAG run's export, such as 20261122T170000Z-1f3a9c2b: the same for every try of every task."""
    return f"{run_after.astimezone(UTC):%Y%m%dT%H%M%SZ}-{hashlib.sha256(run_id.encode()).hexdigest()[:8]}"


def export_of(dag_run: Any) -> str:
    """The name of the export that a run of `bigquery_ingest` makes."""
    return export_run_id(dag_run.run_after, dag_run.run_id)


def this_export() -> str:
    """The name of the export of the DAG run whose task this is."""
    return export_of(get_current_context()["dag_run"])


def compare(run_id: str | None = None, tables: Collection[str] | None = None, *, whole: bool = False) -> None:
    """Compare raw tables with Postgres, as `reconcile` does, for the DAG whose task this is; fails when they differ."""
    from batch.warehouse.reconcile import reconcile, require_consistent
    from jobs.airflow.settings import task_settings

    found = reconcile(task_settings(), run_id, get_current_context()["dag"].dag_id, tables, whole=whole)
    print(*(f"{one.table_name}: {one.source.rows:,} rows, {one.status}" for one in found), sep="\n")
    require_consistent(found)


def validated_export() -> str | None:
    """The export that was validated last, of those that started the DAG run whose task this is; None when a person did."""
    events: Any = get_current_context()["triggering_asset_events"]
    validated = sorted(events.get(VALIDATED_TABLES, ()), key=lambda event: event.timestamp)
    return str(validated[-1].extra["run_id"]) if validated else None
