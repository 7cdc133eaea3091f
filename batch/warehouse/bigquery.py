"""The load: a finished export's files into staging tables of BigQuery, and from there, by MERGE, into the raw tables.

Whatever fails, the same load again ends in the same tables. A run is merged after all runs that it builds on, and each row
keeps the number of the run that last wrote it: of two runs that bring a row, that of the greater number stands, whenever it is
merged. What a MERGE reads and writes is told by constant days, for by these alone BigQuery leaves partitions out.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta

import msgspec
from google.api_core.exceptions import NotFound
from google.cloud.bigquery import LoadJob, LoadJobConfig, QueryJob, SchemaField, Table, TimePartitioning
from google.cloud.bigquery.format_options import ParquetOptions
from google.cloud.storage import Bucket

from batch.google_cloud import explained, open_bucket, require_lasting
from batch.warehouse.bigquery_jobs import run_once
from batch.warehouse.days import PARTITIONED_BY, Range, chunks, ranges, within
from batch.warehouse.manifest import (
    Column,
    ExportedFile,
    Manifest,
    TableExport,
    find_manifest,
    finished_manifests,
    read_manifest,
)
from batch.warehouse.steps import counted
from batch.warehouse.tables import LOADED_RUNS, LoadedRun, Warehouse
from conf.errors import LoadError, SchemaChanged
from conf.settings import Settings

_CLUSTERED = {"raw_orders": ["product_id", "user_id"], "order_outcomes": ["order_id"]}
_LOADED_RUN = "loaded_run"  # the column of each raw table that Postgres does not have
_STAGING_LIVES = timedelta(days=1)
_DAYS_A_JOB = 2_000  # BigQuery lets a job change 4,000 partitions
_MOST_DAYS = 10_000  # and a table have so many
_STANDARD_NAMES = {"INTEGER": "INT64", "FLOAT": "FLOAT64", "BOOLEAN": "BOOL"}  # the API answers with older names


@dataclass(frozen=True)
class LoadedTable:
    """One table of a run that was loaded, how many rows the run brought, and how many it told to be deleted."""

    run_id: str
    table: str
    rows: int
    deleted: int = 0


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
        warehouse = Warehouse.open(settings, "load", wanted.run_id)
        with counted(settings, wanted.run_id, "load", warehouse.client):
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
        wanted = read_manifest(bucket, run_id)
        warehouse = Warehouse.open(settings, "load", wanted.run_id)
        loads = [
            _TableLoad(warehouse, bucket.name, manifest, export)
            for manifest in _runs_to_load(warehouse, bucket, wanted)
            for export in manifest.tables
            if export.table == table
        ]
        for one in loads:
            one.prepare()
            if one.brings_something:
                one.stage()
    return sum(one.export.rows for one in loads)


def _runs_to_load(warehouse: Warehouse, bucket: Bucket, wanted: Manifest) -> list[Manifest]:
    loaded = warehouse.newest_complete_run()
    if loaded:
        _require_ours(bucket, wanted, loaded)
    return missing_runs(wanted, loaded, lambda: (each for each in finished_manifests(bucket) if each.number < wanted.number))


def _require_ours(bucket: Bucket, wanted: Manifest, loaded: LoadedRun) -> None:
    """Check that the raw tables hold runs of this bucket or database, or that somebody wants ours in the place of theirs.

    Raises:
        LoadError: neither.
    """
    theirs = find_manifest(bucket, loaded.run_id)
    if theirs and (theirs.epoch, theirs.database) == (loaded.epoch, loaded.database):
        return
    is_wanted = wanted.asked_for or wanted.database == loaded.database
    if not is_wanted or wanted.number <= loaded.number:
        raise LoadError(
            f"The raw tables hold run {loaded.run_id}, of another database or bucket than run {wanted.run_id}. To put the rows"
            " of this one in the place of theirs: `finpro export --full`, `finpro load`; to keep them, use another"
            " FINPRO_BIGQUERY_DATASET."
        )


def missing_runs(wanted: Manifest, loaded: LoadedRun | None, earlier: Callable[[], Iterator[Manifest]]) -> list[Manifest]:
    """The runs to load, the oldest first, so that `wanted` is loaded and no change before it is left out.

    `loaded` is the newest run that the raw tables hold; `earlier()` are the finished runs before `wanted`, the newest first.

    Raises:
        LoadError: there is a hole between what is loaded and `wanted`, or `wanted` is of an earlier version of finpro.
    """
    if loaded and (wanted.number < loaded.number or wanted.run_id == loaded.run_id):
        return []
    if not wanted.number:
        raise LoadError(f"Run {wanted.run_id} was made by an earlier version of finpro: `finpro export` makes one to load.")
    runs, before = [wanted], earlier()
    while not _builds_on(runs[0], loaded):
        previous = next(before, None)
        if (
            previous is None
            or not (loaded.number if loaded else 0) < previous.number < runs[0].number
            or previous.epoch != runs[0].epoch
        ):
            raise LoadError(
                f"Run {runs[0].run_id} builds on a run that is neither loaded nor to be found any more:"
                " `finpro export --full` starts a new chain."
            )
        runs.insert(0, previous)
    return runs


def _builds_on(run: Manifest, loaded: LoadedRun | None) -> bool:
    """Whether a run can be merged next: it brings everything, or everything since the newest loaded one."""
    if run.since_number is None:
        return True
    return loaded is not None and run.epoch == loaded.epoch and run.since_number <= loaded.number


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
            on_table(LoadedTable(manifest.run_id, table.export.table, table.export.rows, table.export.deleted_rows))
    except (NotFound, LoadError):
        newest = warehouse.newest_complete_run()
        if newest is None or newest.number < manifest.number:
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
    def staged_deletions(self) -> str:
        return self.warehouse.table(f"staging_deleted_{self.export.table}_{self.manifest.run_id}")

    @property
    def brings_something(self) -> bool:
        """Whether there are rows to merge or to delete."""
        return bool(self.export.files or self.export.deleted) or self.manifest.full

    def prepare(self) -> None:
        """Make the raw table where it is missing, and add the columns that it lacks.

        Raises:
            SchemaChanged: it has a column that is no longer exported, or with another type.
            GoogleCloudRefused: it ends by itself at some time.
            LoadError: it would have more partitions than BigQuery allows.
        """
        if self.export.day_count > _MOST_DAYS:
            raise LoadError(
                f"{self.export.table} has rows of {self.export.day_count:,} days in run {self.manifest.run_id}, and BigQuery"
                f" allows a table {_MOST_DAYS:,} partitions: nothing of the run was loaded. Look for dates that cannot be right"
                f" (`select min({self._day}), max({self._day}) from {self.export.table}`), correct or delete their rows in"
                " Postgres, then export and load again."
            )
        exported = {column.name: column.type for column in self.export.columns} | {_LOADED_RUN: "INT64"}
        wanted = Table(self.raw, schema=[*_schema(self.export.columns), SchemaField(_LOADED_RUN, "INT64")])
        if self._day:
            wanted.time_partitioning = TimePartitioning(field=self._day)
        wanted.clustering_fields = _CLUSTERED.get(self.export.table)
        found = self.warehouse.client.create_table(wanted, exists_ok=True)
        require_lasting(found)
        stored = _types(found.schema)
        if changes := [
            _change(name, stored[name], exported.get(name)) for name in stored if stored[name] != exported.get(name)
        ]:
            raise SchemaChanged(
                f"{self.export.table} has changed in run {self.manifest.run_id}: {', '.join(changes)}. Nothing of the run was"
                " loaded. Undo the change in Postgres (a new type needs a new column), or change the raw table by hand, then"
                " load again."
            )
        for name in [name for name in exported if name not in stored]:
            self.warehouse.add_column(self.export.table, name, exported[name])

    def stage(self) -> None:
        """Load the run's files into staging tables, which then hold the rows and deletions of the manifest.

        Raises:
            LoadError: a load job failed, or the files do not hold what the manifest says.
        """
        self._stage(self.staging, self.export.columns, self.export.files, self.export.rows)
        if self.export.deleted:
            self._stage(self.staged_deletions, self._deletion_columns, self.export.deleted, self.export.deleted_rows)

    def merge(self) -> None:
        """Bring the staged deletions and rows into the raw table: as many days a job as BigQuery allows.

        Raises:
            LoadError: a job failed.
        """
        if self.manifest.full:
            self._run("doubles", delete_doubles_statement(self.raw, self.export))
        for days in self._parts():
            if self.export.deleted:
                self._run("delete", delete_statement(self.raw, self.staged_deletions, self.manifest, self.export, days))
            if self.export.files or self.manifest.full:
                runs = self.warehouse.table(LOADED_RUNS)
                self._run("merge", merge_statement(self.raw, self.staging, runs, self.manifest, self.export, days))

    def drop_staging(self) -> None:
        for table in (self.staging, self.staged_deletions):
            self.warehouse.client.delete_table(table, not_found_ok=True)

    @property
    def _day(self) -> str | None:
        """The column by which the raw table is partitioned."""
        return PARTITIONED_BY.get(self.export.table)

    @property
    def _deletion_columns(self) -> list[Column]:
        (key,) = self.export.key
        return [next(column for column in self.export.columns if column.name == key), Column("day", "DATE")]

    @property
    def _job_name(self) -> str:
        """The same for the same run, table, files and destination, and for no other in the project."""
        content = hashlib.sha256(msgspec.json.encode([self.raw, self.bucket, self.export])).hexdigest()
        return f"finpro_{self.manifest.run_id}_{self.export.table}_{content[:12]}"

    def _parts(self) -> list[list[Range] | None]:
        """The days that one job after the other is to change; None where one job may look at all of the table."""
        if self._day is None:
            return [None]
        if self.export.days is not None:
            return [ranges(days) for days in chunks(self.export.days, _DAYS_A_JOB)]
        both = " union distinct ".join(f"select date({self._day}) as day from `{each}`" for each in (self.staging, self.raw))
        days = [row["day"] for row in self.warehouse.rows(f"select day from ({both}) where day is not null")]
        ends = [part[-1] for part in chunks(days, _DAYS_A_JOB)][:-1]
        if not ends:
            return [None]
        begins = [date.min, *(end + timedelta(days=1) for end in ends)]
        return [[part] for part in zip(begins, [*ends, date.max], strict=True)]

    def _stage(self, staging: str, columns: list[Column], files: list[ExportedFile], rows: int) -> None:
        client, location = self.warehouse.client, self.warehouse.location

        def submit(job_id: str) -> LoadJob:
            lists = ParquetOptions()  # type: ignore[no-untyped-call]
            lists.enable_list_inference = True  # a Parquet list is a repeated field, not a record that holds one
            config = LoadJobConfig(source_format="PARQUET", schema=_schema(columns), write_disposition="WRITE_TRUNCATE")
            config.parquet_options = lists
            uris = [f"gs://{self.bucket}/{file.name}" for file in files]
            destination = self._make_staging(staging, columns)
            return client.load_table_from_uri(uris, destination, job_id=job_id, location=location, job_config=config)

        def is_staged() -> bool:
            try:
                (counted,) = self.warehouse.rows(f"select count(*) as staged from `{staging}`")
            except NotFound:
                return False
            return bool(counted["staged"] == rows)

        if files:
            kind = "load" if staging == self.staging else "load_deleted"
            run_once(client, location, f"{self._job_name}_{kind}", submit, counts=is_staged)
        else:
            self._make_staging(staging, columns)
        if not is_staged():
            raise LoadError(
                f"The files of {self.export.table} in run {self.manifest.run_id} do not hold the {rows:,} rows that"
                " its manifest says: nothing of them was merged. `finpro export --full` makes a new run."
            )

    def _make_staging(self, name: str, columns: list[Column]) -> Table:
        """A staging table, which vanishes by itself if nobody comes back to drop it."""
        table = Table(name, schema=_schema(columns))
        table.expires = datetime.now(UTC) + _STAGING_LIVES
        return self.warehouse.client.create_table(table, exists_ok=True)

    def _run(self, kind: str, statement: str) -> None:
        """Run a statement that changes the raw table.

        Whether the table still holds the result of one that was done costs more to find out than to do it again.
        """
        client, location = self.warehouse.client, self.warehouse.location
        name = f"{self._job_name}_{kind}_{hashlib.sha256(statement.encode()).hexdigest()[:8]}"

        def submit(job_id: str) -> QueryJob:
            return client.query(statement, job_id=job_id, job_retry=None, location=location)

        run_once(client, location, name, submit, counts=lambda: False)


def merge_statement(
    raw: str, staging: str, runs: str, manifest: Manifest, export: TableExport, days: list[Range] | None
) -> str:
    """The MERGE of a staging table into a raw table, by its key; an older run never overwrites a newer one.

    A full run also deletes what its snapshot no longer has, except rows that a newer run brought. A MERGE that comes late, when
    a newer run is in `runs`, brings nothing: what the raw table lacks of it was deleted since. `days` are those to look at, on
    both sides; None is all of them.
    """
    number, names = manifest.number, [column.name for column in export.columns]
    same_row = " and ".join(f"stored.`{key}` = staged.`{key}`" for key in export.key)
    updates = ", ".join(f"`{name}` = staged.`{name}`" for name in names if name not in export.key)
    inserted, values = ", ".join(f"`{name}`" for name in names), ", ".join(f"staged.`{name}`" for name in names)
    is_older = f"coalesce(stored.`{_LOADED_RUN}`, 0) < {number}"
    delete = f"when not matched by source and {is_older}{_on('stored', export, days)} then delete" if manifest.full else ""
    return f"""
        merge `{raw}` as stored using (
            select * from `{staging}` as staged
            where (select max(number) from `{runs}`) <= {number}{_on("staged", export, days)}
        ) as staged on {same_row}{_on("stored", export, days)}
        when matched and coalesce(stored.`{_LOADED_RUN}`, 0) <= {number} then
          update set {updates}, `{_LOADED_RUN}` = {number}
        when not matched then insert ({inserted}, `{_LOADED_RUN}`) values ({values}, {number})
        {delete}"""


def delete_statement(raw: str, deleted: str, manifest: Manifest, export: TableExport, days: list[Range] | None) -> str:
    """The DELETE of rows that are no longer where they were (staged as `deleted`), except those that a newer run brought."""
    same_row = " and ".join(f"deleted.`{key}` = stored.`{key}`" for key in export.key)
    if column := PARTITIONED_BY.get(export.table):
        same_row += f" and deleted.day = date(stored.`{column}`)"
    return f"""
        delete from `{raw}` as stored
        where coalesce(stored.`{_LOADED_RUN}`, 0) <= {manifest.number}{_on("stored", export, days)}
          and exists (select 1 from `{deleted}` as deleted where {same_row})"""


def _on(side: str, export: TableExport, days: list[Range] | None) -> str:
    return "" if days is None else f" and {within(f'{side}.`{PARTITIONED_BY[export.table]}`', 'timestamp', days)}"


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
