"""The BigQuery dataset of the raw tables, and its record of which export runs they hold."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from google.cloud import bigquery
from google.cloud.bigquery import QueryJobConfig, ScalarQueryParameter, SchemaField, Table

from batch.google_cloud import bigquery_client, open_dataset
from batch.warehouse.manifest import Manifest
from conf.settings import Settings

_LOADED_RUNS = "loaded_runs"
_LOADED_DAYS = "loaded_days"
_LOADED_RUNS_SCHEMA = [
    SchemaField("run_id", "STRING"),
    SchemaField("database", "STRING"),
    SchemaField("xmin", "INT64"),
    SchemaField("exported_at", "TIMESTAMP"),
    SchemaField("started_at", "TIMESTAMP"),
    SchemaField("loaded_at", "TIMESTAMP"),
    SchemaField("number", "INT64"),
]
_LOADED_DAYS_SCHEMA = [SchemaField("run_number", "INT64"), SchemaField("day", "DATE")]


@dataclass(frozen=True)
class LoadedRun:
    """A run that the raw tables hold; one whose load has begun only is not `complete`."""

    run_id: str
    database: str
    xmin: int
    exported_at: datetime
    complete: bool
    number: int = 0


@dataclass(frozen=True)
class Warehouse:
    """The dataset, as `project.dataset`, where it lives, and a client for it."""

    client: bigquery.Client
    dataset: str
    location: str

    @classmethod
    def open(cls, settings: Settings) -> "Warehouse":
        """The dataset of the settings, with its table of loaded runs.

        Raises:
            SettingsError: no project is set.
            GoogleCloudError: there is no such dataset, or BigQuery does not answer.
        """
        client = bigquery_client(settings)
        found = open_dataset(settings, client)
        warehouse = cls(client, f"{found.project}.{found.dataset_id}", found.location)
        client.create_table(Table(warehouse.table(_LOADED_RUNS), schema=_LOADED_RUNS_SCHEMA), exists_ok=True)
        client.create_table(Table(warehouse.table(_LOADED_DAYS), schema=_LOADED_DAYS_SCHEMA), exists_ok=True)
        return warehouse

    def table(self, name: str) -> str:
        """The full name of one of the dataset's tables."""
        return f"{self.dataset}.{name}"

    def newest_run(self) -> LoadedRun | None:
        """The newest run whose load has begun, complete or not."""
        return self._newest("true")

    def newest_complete_run(self) -> LoadedRun | None:
        """The newest run that the raw tables hold whole: they hold all earlier ones, too."""
        return self._newest("loaded_at is not null")

    def begin_run(self, manifest: Manifest) -> None:
        """Note that the raw tables may hold a part of this run from now on."""
        self._record(
            """
            merge `{runs}` as stored using
              (select @run_id as run_id, (select coalesce(max(number), 0) + 1 from `{runs}`) as number) as begun
            on stored.run_id = begun.run_id
            when not matched then insert (run_id, database, xmin, exported_at, started_at, number)
              values (@run_id, @database, @xmin, @exported_at, @now, number)""",
            manifest,
        )

    def note_days(self, run_id: str, staging: str | None) -> None:
        """Note which days of raw_orders this run brings: those of its staging table; without one, it may be any."""
        number = f"(select number from `{self.table(_LOADED_RUNS)}` where run_id = @run_id)"
        run = [ScalarQueryParameter("run_id", "STRING", run_id)]
        days = f"select distinct date(created_date) as day from `{staging}`" if staging else "select cast(null as date) as day"
        self.rows(f"delete from `{self.table(_LOADED_DAYS)}` where run_number = {number}", run)
        self.rows(f"insert into `{self.table(_LOADED_DAYS)}` (run_number, day) select {number}, day from ({days})", run)

    def complete_run(self, manifest: Manifest) -> None:
        """Note that the raw tables hold all of this run."""
        self._record("update `{runs}` set loaded_at = @now where run_id = @run_id and loaded_at is null", manifest)

    def rows(self, query: str, parameters: list[ScalarQueryParameter] | None = None) -> list[dict[str, Any]]:
        """The rows of a query, never from the cache."""
        config = QueryJobConfig(use_query_cache=False, query_parameters=parameters or [])
        return [dict(row.items()) for row in self.client.query(query, location=self.location, job_config=config).result()]

    def _newest(self, condition: str) -> LoadedRun | None:
        found = self.rows(f"""
            select run_id, database, xmin, exported_at, loaded_at is not null as complete, number
            from `{self.table(_LOADED_RUNS)}` where {condition} order by exported_at desc, started_at limit 1""")
        return LoadedRun(**found[0]) if found else None

    def _record(self, statement: str, manifest: Manifest) -> None:
        parameters = [
            ScalarQueryParameter("run_id", "STRING", manifest.run_id),
            ScalarQueryParameter("database", "STRING", manifest.database),
            ScalarQueryParameter("xmin", "INT64", manifest.xmin),
            ScalarQueryParameter("exported_at", "TIMESTAMP", manifest.finished_at),
            ScalarQueryParameter("now", "TIMESTAMP", datetime.now(UTC)),
        ]
        used = [parameter for parameter in parameters if f"@{parameter.name}" in statement]
        self.rows(statement.format(runs=self.table(_LOADED_RUNS)), used)
