"""What Postgres knows of the runs and of the fraud of the last hours: the figures that people are told."""

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from batch.postgres import connect, explained

if TYPE_CHECKING:
    from batch.warehouse.reconcile import Reconciliation

_FINDINGS = """
    select run_id, dag_id, table_name, source_rows, destination_rows, status
    from ingestion_monitoring
    where run_id = coalesce(%s, (select run_id from ingestion_monitoring order by finished_at desc limit 1))
    order by started_at, table_name
"""

_FRAUD_BY_HOUR = """
    with screened as (
        select date_trunc('hour', screened_at, 'UTC') as hour, status, amount_numeric, reasons
        from raw_orders
        where screened_at >= %(since)s and screened_at < %(until)s
    ),
    orders_by_hour as (
        select hour, count(*) as orders,
               count(*) filter (where status = 'Fraud') as frauds,
               sum(amount_numeric) filter (where status = 'Fraud') as amount
        from screened
        group by hour
    ),
    counted as (
        select hour, reason, count(*) as orders
        from screened cross join unnest(reasons) as reason
        group by hour, reason
    ),
    reasons_by_hour as (
        select hour, jsonb_object_agg(reason, orders) as reasons
        from counted
        group by hour
    )
    select hour, orders, frauds, amount, coalesce(reasons, '{}')
    from generate_series(%(since)s, %(until)s - interval '1 hour', interval '1 hour') as hour
    left join orders_by_hour using (hour)
    left join reasons_by_hour using (hour)
    order by hour
"""


@dataclass(frozen=True)
class Finding:
    """One row of `ingestion_monitoring`: a table of a run, as reconciliation left it."""

    run_id: str
    dag_id: str
    table_name: str
    source_rows: int
    destination_rows: int
    status: str

    @classmethod
    def of(cls, one: "Reconciliation") -> "Finding":
        """The row that reconciliation writes of what it found."""
        return cls(one.run_id, one.dag_id, one.table_name, one.source.rows, one.destination.rows, one.status)


@dataclass(frozen=True)
class FraudHour:
    """The orders whose verdict was last given in one hour."""

    hour: datetime
    orders: int
    frauds: int
    amount: int
    """What the frauds were worth, in rupiah."""
    reasons: dict[str, int]
    """Reason → frauds that have it; an order may have several."""


def findings(dsn: str, run_id: str | None = None) -> list[Finding]:
    """What reconciliation found for each table of a run, by default the newest one; nothing when there is no such run.

    Raises:
        PostgresError: Postgres does not answer or lacks the table.
    """
    with explained(dsn), connect(dsn, application_name="finpro notify") as connection, connection.cursor() as cursor:
        cursor.execute(_FINDINGS, [run_id])
        return [Finding(*row) for row in cursor.fetchall()]


def fraud_by_hour(dsn: str, since: datetime, until: datetime) -> list[FraudHour]:
    """Orders and frauds by the hour in which they were screened: one entry for each hour from `since` up to `until`.

    Both are full hours. A revision counts in the hour that turned the order into a fraud, not in the one it came in.

    Raises:
        PostgresError: Postgres does not answer or lacks the table.
    """
    with explained(dsn), connect(dsn, application_name="finpro notify") as connection, connection.cursor() as cursor:
        cursor.execute(_FRAUD_BY_HOUR, {"since": since, "until": until})
        return [
            FraudHour(hour, orders or 0, frauds or 0, int(amount or 0), reasons)
            for hour, orders, frauds, amount, reasons in cursor
        ]
