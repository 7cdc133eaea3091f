"""Reconciliation: whether BigQuery's raw tables hold exactly what the export's snapshot of Postgres showed.

After each run the days of raw_orders that it has changed are compared, from their partitions alone, and the number of all rows,
which BigQuery knows without reading any; users and products are compared whole. On a slower schedule all of raw_orders is: with
the figures of the run's snapshot, and, day by day, with Postgres itself, where a change may have left no trace for an export.
"""

import io
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime

from google.cloud.bigquery import LoadJobConfig, SchemaField
from psycopg2.extensions import connection as Connection
from psycopg2.extras import Json, execute_values

from batch.google_cloud import explained, open_bucket
from batch.postgres import connect
from batch.postgres import explained as postgres_explained
from batch.sessions import Limits
from batch.warehouse.changes import Window, changed_days, end_of_epoch
from batch.warehouse.days import PARTITIONED_BY
from batch.warehouse.manifest import Manifest, TableExport, TableProfile, read_manifest
from batch.warehouse.profile import (
    day_differences,
    destination_days,
    destination_profile,
    differences,
    of_all_days,
    source_days,
)
from batch.warehouse.snapshot import own_snapshot
from batch.warehouse.steps import counted
from batch.warehouse.tables import Warehouse
from conf.errors import LoadError, ReconciliationError
from conf.settings import Settings

MONITORING = "ingestion_monitoring"
_LIMITS = Limits(idle_in_transaction=1800)  # which lasts as long as BigQuery takes the copy
_COLUMNS = {
    "run_id": "STRING",
    "dag_id": "STRING",
    "table_name": "STRING",
    "source_rows": "INT64",
    "destination_rows": "INT64",
    "source_profile": "STRING",
    "destination_profile": "STRING",
    "status": "STRING",
    "started_at": "TIMESTAMP",
    "finished_at": "TIMESTAMP",
    "compared": "STRING",
}


@dataclass(frozen=True)
class Reconciliation:
    """Both sides of one table of a run, compared: whole, or the days that the run has changed (`compared`).

    `source` and `destination` have the rows of the whole table either way, and the figures of what was compared. `differences`
    are lines, one a figure, with the day where it is known.
    """

    run_id: str
    dag_id: str
    table_name: str
    source: TableProfile
    destination: TableProfile
    differences: Sequence[str]
    compared: str
    started_at: datetime
    finished_at: datetime

    @property
    def status(self) -> str:
        """`Consistent` or `Inconsistent`."""
        return "Inconsistent" if self.differences else "Consistent"


def reconcile(
    settings: Settings,
    run_id: str | None = None,
    dag_id: str = "manual",
    tables: Collection[str] | None = None,
    *,
    whole: bool = False,
) -> list[Reconciliation]:
    """Compare the tables of a run, by default the newest, and keep the findings in `ingestion_monitoring`, here and there.

    `tables` names those to compare; None is all of them. `whole` compares, and so reads, all of raw_orders on both sides, not
    only the days that the run has changed.

    Only the run that was loaded last can be compared: the raw tables have moved on from the others.

    Raises:
        ExportError: there is no such run.
        LoadError: the run is not loaded, or not to its end.
        ReconciliationError: another run has been loaded since, so this one cannot be compared.
        PostgresError, GoogleCloudError: one of the two does not answer or lacks a table.
    """
    dsn, bucket = settings.require("postgres_dsn"), open_bucket(settings)
    with explained(settings):
        manifest = read_manifest(bucket, run_id)
        warehouse = Warehouse.open(settings, "reconcile", manifest.run_id)
        with counted(settings, manifest.run_id, "reconcile", warehouse.client):
            _require_newest(warehouse, manifest)
            exports = [export for export in manifest.tables if tables is None or export.table in tables]
            found = [_compare(warehouse, manifest, export, dag_id, dsn if whole else None) for export in exports]
            _require_newest(warehouse, manifest)  # nothing was merged while the tables were read
        with postgres_explained(dsn), connect(dsn, application_name="finpro reconcile", limits=_LIMITS) as connection:
            # Copied before the lock goes with the transaction: no copy lacks what another one has recorded meanwhile.
            _copy(warehouse, _record(connection, found))
    return found


def require_consistent(found: list[Reconciliation]) -> None:
    """Stop what follows unless both sides agree.

    Raises:
        ReconciliationError: they do not; names every table and figure.
    """
    wrong = [f"  {one.table_name}.{difference}" for one in found for difference in one.differences]
    if wrong:
        raise ReconciliationError(
            f"Run {found[0].run_id} is Inconsistent:\n"
            + "\n".join(wrong)
            + "\n`finpro export --full` and `finpro load` bring BigQuery back to what Postgres holds;"
            " find out first which side was changed by hand."
        )


def _require_newest(warehouse: Warehouse, manifest: Manifest) -> None:
    newest = warehouse.newest_run()
    if newest is None or newest.number < manifest.number:
        raise LoadError(f"Run {manifest.run_id} is not loaded yet: `finpro load --run-id {manifest.run_id}` first.")
    if newest.run_id != manifest.run_id:
        raise ReconciliationError(
            f"Run {manifest.run_id} can no longer be compared: run {newest.run_id} has been loaded since, or is being loaded."
            f" `finpro reconcile --run-id {newest.run_id}` compares the tables as they are now."
        )
    if not newest.complete:
        raise LoadError(f"The load of run {manifest.run_id} was not finished: `finpro load --run-id {manifest.run_id}` does.")


def _compare(
    warehouse: Warehouse, manifest: Manifest, export: TableExport, dag_id: str, whole_of: str | None
) -> Reconciliation:
    """Compare a table: with Postgres at the DSN `whole_of` itself as well, where that is given."""
    started_at = datetime.now(UTC)
    if export.table in PARTITIONED_BY and whole_of:
        compared, source, destination, found = "whole", export.source, *_whole(warehouse, manifest, export, whole_of)
    elif export.days is not None:
        compared, source, destination, found = "changed days", *_changed_days(warehouse, export, export.days)
    else:
        source = export.source
        destination = destination_profile(warehouse.rows, warehouse.table(export.table), export.columns)
        compared, found = "whole", differences(source, destination)
    return Reconciliation(
        run_id=manifest.run_id,
        dag_id=dag_id,
        table_name=export.table,
        source=source,
        destination=destination,
        differences=found,
        compared=compared,
        started_at=started_at,
        finished_at=datetime.now(UTC),
    )


def _changed_days(
    warehouse: Warehouse, export: TableExport, days: dict[date, TableProfile]
) -> tuple[TableProfile, TableProfile, list[str]]:
    """Both sides of the days that a run has changed, and what differs in them, or in the number of all rows."""
    table = warehouse.table(export.table)
    (counted,) = warehouse.rows(f"select count(*) as counted from `{table}`")  # of which BigQuery reads no byte
    there = destination_days(warehouse.rows, table, export.columns, days)
    source = TableProfile(export.source_rows, of_all_days(days.values(), export.columns).columns)
    destination = TableProfile(counted["counted"], of_all_days(there.values(), export.columns).columns)
    rows = differences(TableProfile(source.rows, {}), TableProfile(destination.rows, {}))
    return source, destination, rows + day_differences(days, there)


def _whole(warehouse: Warehouse, manifest: Manifest, export: TableExport, dsn: str) -> tuple[TableProfile, list[str]]:
    """All of BigQuery's side, and what differs: in total from the run's snapshot, and by day from Postgres itself.

    Postgres has moved on since the run: on the days that have changed since, only the total is compared.
    """
    there = destination_days(warehouse.rows, warehouse.table(export.table), export.columns)
    destination = of_all_days(there.values(), export.columns)
    with postgres_explained(dsn), own_snapshot(dsn, "finpro reconcile") as (snapshot, cursor):
        if why := end_of_epoch(cursor, manifest, snapshot):
            raise ReconciliationError(
                f"Run {manifest.run_id} cannot be compared with Postgres: {why}. Export, load and reconcile a new run."
            )
        moved_on = set(changed_days(cursor, export.table, Window(manifest.xmin, snapshot.xmax)))
        here = source_days(cursor, export.table, export.columns)
    by_day = day_differences(*({day: one for day, one in side.items() if day not in moved_on} for side in (here, there)))
    return destination, differences(export.source, destination) + by_day


def _record(connection: Connection, found: list[Reconciliation]) -> bytes:
    """Write the findings into Postgres, over earlier ones of the same run; returns the whole history, a JSON line a row.

    What was found of a whole table is not replaced by what is found of some days.
    """
    rows = [
        (
            *(one.run_id, one.dag_id, one.table_name, one.source.rows, one.destination.rows),
            *(Json(one.source.columns), Json(one.destination.columns), one.status, one.started_at, one.finished_at),
            one.compared,
        )
        for one in found
    ]
    updates = ", ".join(f"{column} = excluded.{column}" for column in _COLUMNS if column not in ("run_id", "table_name"))
    upsert = (
        f"insert into {MONITORING} as kept ({', '.join(_COLUMNS)}) values %s on conflict (run_id, table_name) do update"
        f" set {updates} where kept.compared = 'changed days' or excluded.compared = 'whole'"
    )
    values = ", ".join(f"{column}::text" if column.endswith("_profile") else column for column in _COLUMNS)
    history = f"select row_to_json(kept)::text from (select {values} from {MONITORING} order by started_at, table_name) as kept"
    with connection.cursor() as cursor:
        cursor.execute("set local time zone 'UTC'")
        cursor.execute(f"lock table {MONITORING} in share row exclusive mode")
        execute_values(cursor, upsert, rows)
        cursor.execute(history)
        return "".join(f"{line}\n" for (line,) in cursor).encode()


def _copy(warehouse: Warehouse, history: bytes) -> None:
    """Replace BigQuery's copy of the table, as a whole: after this it is Postgres's."""
    warehouse.client.load_table_from_file(
        io.BytesIO(history),
        warehouse.table(MONITORING),
        location=warehouse.location,
        job_config=LoadJobConfig(
            source_format="NEWLINE_DELIMITED_JSON",
            schema=[SchemaField(name, type_name) for name, type_name in _COLUMNS.items()],
            write_disposition="WRITE_TRUNCATE",
        ),
    ).result()
