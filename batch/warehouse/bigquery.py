"""The load: a finished export's files into staging tables of BigQuery, and from there, by MERGE, into the raw tables.

Whatever fails, the same load again ends in the same tables. A run is merged after all runs that it builds on.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import msgspec
from google.api_core.exceptions import NotFound
from google.cloud.bigquery import LoadJob, LoadJobConfig, QueryJob, SchemaField, Table, TimePartitioning
from google.cloud.bigquery.format_options import ParquetOptions
from google.cloud.storage import Bucket

from batch.google_cloud import explained, open_bucket
from batch.warehouse.bigquery_jobs import run_once
from batch.warehouse.manifest import Column, Manifest, TableExport, find_manifest, finished_runs, read_manifest
from batch.warehouse.tables import LoadedRun, Warehouse
from conf.errors import LoadError, SchemaChanged
from conf.settings import Settings

_PARTITIONED_BY_DAY = {"raw_orders": "created_date"}
_CLUSTERED = {"raw_orders": ["product_id", "user_id"]}
_STAGING_LIVES = timedelta(days=1)
_STANDARD_NAMES = {"INTEGER": "INT64", "FLOAT": "FLOAT64", "BOOLEAN": "BOOL"}  # the API answers with older names


@dataclass(frozen=True)
class LoadedTable:
    """One table of a run that was loaded, and how many rows the run brought."""

    run_id: str
    table: str
    rows: int


def load(settings: Settings, run_id: str | None = None, on_table: Callable[[LoadedTable], None] = lambda _: None) -> list[str]:
    """Load a finished export, by default the newest, and before it the earlier ones that it builds on and that are missing.

    Returns the ids of the runs that were loaded, the oldest first: none when the raw tables hold this run already.

    Raises:
        ExportError: there is no such run.
        LoadError: a run that this one builds on is gone, the raw tables are of another database, or a BigQuery job failed.
        SchemaChanged: a column was removed or retyped.
        GoogleCloudError: bucket or dataset are not there, or do not answer.
    """
    bucket = open_bucket(settings)
    with explained(settings):
        wanted = read_manifest(bucket, run_id)
        warehouse = Warehouse.open(settings)
        runs = _runs_to_load(warehouse, bucket, wanted)
        for manifest in runs:
            _load_run(warehouse, bucket.name, manifest, on_table)
        if not runs:  # one that was killed at its very end left them
            for export in wanted.tables:
                _TableLoad(warehouse, bucket.name, wanted, export).drop_staging()
    return [manifest.run_id for manifest in runs]


def stage(settings: Settings, table: str, run_id: str | None = None) -> int:
    """Load the files of one table into staging, for all the runs that `load` would load: that then has only to merge them.

    Tables can be staged side by side. Returns how many rows were staged.

    Raises:
        As `load`.
    """
    bucket = open_bucket(settings)
    with explained(settings):
        warehouse = Warehouse.open(settings)
        loads = [
            _TableLoad(warehouse, bucket.name, manifest, export)
            for manifest in _runs_to_load(warehouse, bucket, read_manifest(bucket, run_id))
            for export in manifest.tables
            if export.table == table
        ]
        for one in loads:
            one.prepare()
            if one.brings_something:
                one.stage()
    return sum(one.export.rows for one in loads)


def _runs_to_load(warehouse: Warehouse, bucket: Bucket, wanted: Manifest) -> list[Manifest]:
    return missing_runs(wanted, warehouse.newest_complete_run(), lambda: _earlier_runs(bucket, wanted.run_id))


def missing_runs(wanted: Manifest, loaded: LoadedRun | None, earlier: Callable[[], Iterator[Manifest]]) -> list[Manifest]:
    """The runs to load, the oldest first, so that `wanted` is loaded and no change before it is left out.

    `loaded` is the newest run that the raw tables hold; `earlier()` are the finished runs before `wanted`, the newest first.

    Raises:
        LoadError: there is a hole between what is loaded and `wanted`, or their transactions are of different databases.
    """
    if loaded and wanted.finished_at <= loaded.exported_at:
        return []
    runs, before = [wanted], earlier()
    while not _builds_on(runs[0], loaded):
        previous = next(before, None)
        if previous is None or (loaded and previous.finished_at <= loaded.exported_at):
            raise LoadError(
                f"Run {runs[0].run_id} builds on a run that is neither loaded nor to be found any more:"
                " `finpro export --full` starts a new chain."
            )
        runs.insert(0, previous)
    if loaded and (runs[0].database != loaded.database or runs[0].xmin < loaded.xmin):  # transaction ids do not compare
        raise LoadError(
            f"Run {runs[0].run_id} comes from another Postgres database than run {loaded.run_id}, which the raw tables hold, or"
            " from an older copy of it: use another FINPRO_BIGQUERY_DATASET, or drop raw_users, raw_products, raw_orders and"
            " loaded_runs to start over."
        )
    return runs


def _builds_on(run: Manifest, loaded: LoadedRun | None) -> bool:
    """Whether a run can be merged next: it brings everything, or everything since the newest loaded one."""
    if run.full or run.since_xid is None:
        return True
    return loaded is not None and run.database == loaded.database and run.since_xid <= loaded.xmin


def _earlier_runs(bucket: Bucket, run_id: str) -> Iterator[Manifest]:
    finished = finished_runs(bucket)
    for earlier in reversed(finished[: finished.index(run_id)]):
        if manifest := find_manifest(bucket, earlier):
            yield manifest


def _load_run(warehouse: Warehouse, bucket: str, manifest: Manifest, on_table: Callable[[LoadedTable], None]) -> None:
    loads = [_TableLoad(warehouse, bucket, manifest, export) for export in manifest.tables]
    for table in loads:
        table.prepare()
    warehouse.begin_run(manifest)
    try:
        for table in loads:
            if table.brings_something:
                table.stage()
                table.merge()
                if table.export.table == "raw_orders":
                    warehouse.note_days(manifest.run_id, None if manifest.full else table.staging)
            on_table(LoadedTable(manifest.run_id, table.export.table, table.export.rows))
    except (NotFound, LoadError):
        newest = warehouse.newest_complete_run()
        if newest is None or newest.exported_at < manifest.finished_at:
            raise
        return  # another process has loaded this run meanwhile, and dropped its staging tables
    warehouse.complete_run(manifest)
    for table in loads:
        table.drop_staging()


@dataclass(frozen=True)
class _TableLoad:
    """One table of a run on its way from the bucket into the raw table; each step may be done again."""

    warehouse: Warehouse
    bucket: str
    manifest: Manifest
    export: TableExport

    @property
    def raw(self) -> str:
        return self.warehouse.table(self.export.table)

    @property
    def staging(self) -> str:
        return self.warehouse.table(f"staging_{self.export.table}_{self.manifest.run_id}")

    @property
    def brings_something(self) -> bool:
        """Whether there are rows to merge, or, in a full run without any, rows to delete."""
        return bool(self.export.files) or self.manifest.full

    def prepare(self) -> None:
        """Make the raw table where it is missing, and add the columns that it lacks.

        Raises:
            SchemaChanged: it has a column that is no longer exported, or with another type.
        """
        wanted = Table(self.raw, schema=_schema(self.export.columns))
        if day := _PARTITIONED_BY_DAY.get(self.export.table):
            wanted.time_partitioning = TimePartitioning(field=day)
        wanted.clustering_fields = _CLUSTERED.get(self.export.table)
        stored = _types(self.warehouse.client.create_table(wanted, exists_ok=True).schema)
        exported = {column.name: column.type for column in self.export.columns}
        if changes := [
            _change(name, stored[name], exported.get(name)) for name in stored if stored[name] != exported.get(name)
        ]:
            raise SchemaChanged(
                f"{self.export.table} has changed in run {self.manifest.run_id}: {', '.join(changes)}. Nothing of the run was"
                " loaded. Undo the change in Postgres (a new type needs a new column), or change the raw table by hand, then"
                " load again."
            )
        for name in [name for name in exported if name not in stored]:
            self.warehouse.rows(f"alter table `{self.raw}` add column if not exists `{name}` {exported[name]}")

    def stage(self) -> None:
        """Load the run's files into the staging table, which then holds the rows of the manifest.

        Raises:
            LoadError: the load job failed, or the files do not hold what the manifest says.
        """
        if self.export.files:
            client, location = self.warehouse.client, self.warehouse.location
            run_once(client, location, f"{self._job_name}_load", self._submit_load, counts=self._is_staged)
        else:
            self._make_staging()
        if not self._is_staged():
            raise LoadError(
                f"The files of {self.export.table} in run {self.manifest.run_id} do not hold the {self.export.rows:,} rows that"
                " its manifest says: nothing of them was merged. `finpro export --full` makes a new run."
            )

    def merge(self) -> None:
        """Bring the staged rows into the raw table.

        Raises:
            LoadError: the job failed.
        """
        if self.manifest.full:
            self.warehouse.rows(delete_doubles_statement(self.raw, self.export))
        # Whether the raw table still holds the result of a MERGE that was done costs more to find out than to merge again.
        client, location = self.warehouse.client, self.warehouse.location
        run_once(client, location, f"{self._job_name}_merge", self._submit_merge, counts=lambda: False)

    def drop_staging(self) -> None:
        self.warehouse.client.delete_table(self.staging, not_found_ok=True)

    @property
    def _job_name(self) -> str:
        """The same for the same run, table, files and destination, and for no other in the project."""
        content = hashlib.sha256(msgspec.json.encode([self.raw, self.bucket, self.export])).hexdigest()
        return f"finpro_{self.manifest.run_id}_{self.export.table}_{content[:12]}"

    def _make_staging(self) -> Table:
        """The staging table, which vanishes by itself if nobody comes back to drop it."""
        table = Table(self.staging, schema=_schema(self.export.columns))
        table.expires = datetime.now(UTC) + _STAGING_LIVES
        return self.warehouse.client.create_table(table, exists_ok=True)

    def _submit_load(self, job_id: str) -> LoadJob:
        lists = ParquetOptions()  # type: ignore[no-untyped-call]
        lists.enable_list_inference = True  # a Parquet list is a repeated field, not a record that holds one
        config = LoadJobConfig(source_format="PARQUET", schema=_schema(self.export.columns), write_disposition="WRITE_TRUNCATE")
        config.parquet_options = lists
        files = [f"gs://{self.bucket}/{file.name}" for file in self.export.files]
        destination, location = self._make_staging(), self.warehouse.location
        return self.warehouse.client.load_table_from_uri(
            files, destination, job_id=job_id, location=location, job_config=config
        )

    def _submit_merge(self, job_id: str) -> QueryJob:
        statement = merge_statement(self.raw, self.staging, self.manifest, self.export)
        return self.warehouse.client.query(statement, job_id=job_id, job_retry=None, location=self.warehouse.location)

    def _is_staged(self) -> bool:
        try:
            (counted,) = self.warehouse.rows(f"select count(*) as staged from `{self.staging}`")
        except NotFound:
            return False
        return bool(counted["staged"] == self.export.rows)


def merge_statement(raw: str, staging: str, manifest: Manifest, export: TableExport) -> str:
    """The MERGE of a staging table into a raw table, by its key; an older version never overwrites a newer one.

    A full run also deletes what its snapshot no longer has, except rows that a transaction after it may have written.
    """
    columns = [column.name for column in export.columns]
    same_row = " and ".join(f"stored.`{key}` = staged.`{key}`" for key in export.key)
    updates = ", ".join(f"`{column}` = staged.`{column}`" for column in columns if column not in export.key)
    names, values = ", ".join(f"`{column}`" for column in columns), ", ".join(f"staged.`{column}`" for column in columns)
    delete = f"when not matched by source and stored.change_xid < {manifest.xmin} then delete" if manifest.full else ""
    return f"""
        merge `{raw}` as stored using `{staging}` as staged on {same_row}
        when matched and staged.change_xid >= stored.change_xid then update set {updates}
        when not matched then insert ({names}) values ({values})
        {delete}"""


def delete_doubles_statement(raw: str, export: TableExport) -> str:
    """Delete rows that share a key, which only a hand can have put there: a MERGE would keep them all. It brings one back."""
    key = ", ".join(f"`{column}`" for column in export.key)
    same_key = " and ".join(f"doubled.`{column}` = stored.`{column}`" for column in export.key)
    doubled = f"select {key} from `{raw}` group by {key} having count(*) > 1"
    return f"delete from `{raw}` as stored where exists (select 1 from ({doubled}) as doubled where {same_key})"


def _change(column: str, stored: str, exported: str | None) -> str:
    return f"column {column}, {stored}, is gone" if exported is None else f"column {column}, {stored}, is now {exported}"


def _schema(columns: list[Column]) -> list[SchemaField]:
    fields = []
    for column in columns:
        element = column.type.removeprefix("ARRAY<").removesuffix(">")
        fields.append(SchemaField(column.name, element, mode="NULLABLE" if element == column.type else "REPEATED"))
    return fields


def _types(schema: list[SchemaField]) -> dict[str, str]:
    """The columns of a table and their types, as a manifest writes them."""
    types = {}
    for field in schema:
        element = _STANDARD_NAMES.get(field.field_type, field.field_type)
        types[field.name] = f"ARRAY<{element}>" if field.mode == "REPEATED" else element
    return types
