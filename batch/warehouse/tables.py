"""The BigQuery dataset of the raw tables, and its record of which export runs they hold."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from google.cloud.bigquery import QueryJobConfig, ScalarQueryParameter, SchemaField, Table

from batch.bigquery import Client
from batch.google_cloud import bigquery_client, open_dataset
from batch.warehouse.manifest import Manifest
from conf.settings import Settings

_LOADED_RUNS = "loaded_runs"
_LOADED_RUNS_SCHEMA = [
    SchemaField("run_id", "STRING"),
    SchemaField("database", "STRING"),
    SchemaField("xmin", "INT64"),
    SchemaField("exported_at", "TIMESTAMP"),
    SchemaField("started_at", "TIMESTAMP"),
    SchemaField("loaded_at", "TIMESTAMP"),
]


@dataclass(frozen=True)
class LoadedRun:
    """A run that the raw tables hold; one whose load has begun only is not `complete`."""

    run_id: str
    database: str
    xmin: int
    exported_at: datetime
    complete: bool


@dataclass(frozen=True)
class Warehouse:
    """The dataset, as `project.dataset`, where it lives, and a client for it."""

    client: Client
    dataset: str
    location: str

    @classmethod
    def open(cls, settings: Settings, step: str = "other", run_id: str | None = None) -> "Warehouse":
        """The dataset of the settings, with its table of loaded runs; for a step of a run, which its jobs are labelled with.

        Raises:
            SettingsError: no project is set.
            GoogleCloudError: there is no such dataset, it does not last, or BigQuery does not answer.
        """
        client = bigquery_client(settings, step, run_id)
        found = open_dataset(settings, client)
        warehouse = cls(client, f"{found.project}.{found.dataset_id}", found.location)
        client.create_table(Table(warehouse.table(_LOADED_RUNS), schema=_LOADED_RUNS_SCHEMA), exists_ok=True)
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
            merge `{runs}` as stored using (select @run_id as run_id) as begun on stored.run_id = begun.run_id
            when not matched then insert (run_id, database, xmin, exported_at, started_at)
              values (@run_id, @database, @xmin, @exported_at, @now)""",
            manifest,
        )

    def complete_run(self, manifest: Manifest) -> None:
        """Note that the raw tables hold all of this run."""
        self._record("update `{runs}` set loaded_at = @now where run_id = @run_id and loaded_at is null", manifest)

    def rows(self, query: str, parameters: list[ScalarQueryParameter] | None = None) -> list[dict[str, Any]]:
        """The rows of a query, never from the cache; sent again for some minutes where another try can help.

        Raises:
            GoogleAPICallError: BigQuery refuses; see batch.google_cloud.explained.
        """
        config = QueryJobConfig(use_query_cache=False, query_parameters=parameters or [])
        return [dict(row.items()) for row in self.client.query(query, location=self.location, job_config=config).result()]

    def _newest(self, condition: str) -> LoadedRun | None:
        found = self.rows(f"""
            select run_id, database, xmin, exported_at, loaded_at is not null as complete
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
