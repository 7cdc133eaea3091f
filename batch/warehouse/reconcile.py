"""Reconciliation: whether BigQuery's raw tables hold exactly what the export's snapshot of Postgres showed."""

import io
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime

from google.cloud.bigquery import LoadJobConfig, SchemaField
from psycopg2.extensions import connection as Connection
from psycopg2.extras import Json, execute_values

from batch.google_cloud import explained, open_bucket
from batch.postgres import connect
from batch.postgres import explained as postgres_explained
from batch.sessions import Limits
from batch.warehouse.manifest import Manifest, TableExport, read_manifest
from batch.warehouse.profile import TableProfile, destination_profile, differences
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
}


@dataclass(frozen=True)
class Reconciliation:
    """Both sides of one table of a run, compared."""

    run_id: str
    dag_id: str
    table_name: str
    source: TableProfile
    destination: TableProfile
    started_at: datetime
    finished_at: datetime

    @property
    def differences(self) -> list[str]:
        """What differs, a line a figure."""
        return differences(self.source, self.destination)

    @property
    def status(self) -> str:
        """`Consistent` or `Inconsistent`."""
        return "Inconsistent" if self.differences else "Consistent"


def reconcile(
    settings: Settings, run_id: str | None = None, dag_id: str = "manual", tables: Collection[str] | None = None
) -> list[Reconciliation]:
    """Compare the tables of a run, by default the newest, and keep the findings in `ingestion_monitoring`, here and there.

    `tables` names those to compare; None is all of them.

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
            found = [_compare(warehouse, manifest, export, dag_id) for export in exports]
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
    if newest is None or newest.exported_at < manifest.finished_at:
        raise LoadError(f"Run {manifest.run_id} is not loaded yet: `finpro load --run-id {manifest.run_id}` first.")
    if newest.run_id != manifest.run_id:
        raise ReconciliationError(
            f"Run {manifest.run_id} can no longer be compared: run {newest.run_id} has been loaded since, or is being loaded."
            f" `finpro reconcile --run-id {newest.run_id}` compares the tables as they are now."
        )
    if not newest.complete:
        raise LoadError(f"The load of run {manifest.run_id} was not finished: `finpro load --run-id {manifest.run_id}` does.")


def _compare(warehouse: Warehouse, manifest: Manifest, export: TableExport, dag_id: str) -> Reconciliation:
    started_at = datetime.now(UTC)
    return Reconciliation(
        run_id=manifest.run_id,
        dag_id=dag_id,
        table_name=export.table,
        source=TableProfile(export.source_rows, export.source_profile),
        destination=destination_profile(warehouse.client, warehouse.table(export.table), export.columns),
        started_at=started_at,
        finished_at=datetime.now(UTC),
    )


def _record(connection: Connection, found: list[Reconciliation]) -> bytes:
    """Write the findings into Postgres, over earlier ones of the same run; returns the whole history, a JSON line a row."""
    rows = [
        (
            *(one.run_id, one.dag_id, one.table_name, one.source.rows, one.destination.rows),
            *(Json(one.source.columns), Json(one.destination.columns), one.status, one.started_at, one.finished_at),
        )
        for one in found
    ]
    updates = ", ".join(f"{column} = excluded.{column}" for column in _COLUMNS if column not in ("run_id", "table_name"))
    upsert = (
        f"insert into {MONITORING} ({', '.join(_COLUMNS)}) values %s on conflict (run_id, table_name) do update set {updates}"
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
