"""The BigQuery dataset of the raw tables, and its record of which export runs they hold, and of the days these have changed."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any

from google.cloud.bigquery import ArrayQueryParameter, QueryJobConfig, ScalarQueryParameter, SchemaField, Table

from batch.bigquery import Client
from batch.google_cloud import bigquery_client, open_dataset
from batch.warehouse.manifest import Manifest
from conf.settings import Settings

LOADED_RUNS = "loaded_runs"
LOADED_DAYS = "loaded_days"
_LOADED_RUNS_SCHEMA = [
    SchemaField("run_id", "STRING"),
    SchemaField("database", "STRING"),
    SchemaField("exported_at", "TIMESTAMP"),
    SchemaField("started_at", "TIMESTAMP"),
    SchemaField("loaded_at", "TIMESTAMP"),
    SchemaField("number", "INT64"),
    SchemaField("epoch", "STRING"),
]
_LOADED_DAYS_SCHEMA = [SchemaField("run_number", "INT64"), SchemaField("day", "DATE")]

Parameter = ScalarQueryParameter | ArrayQueryParameter


@dataclass(frozen=True)
class LoadedRun:
    """A run that the raw tables hold; one whose load has begun only is not `complete`."""

    run_id: str
    number: int
    database: str
    epoch: str
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
        """The dataset of the settings, with its tables of loaded runs and days; its jobs are labelled with step and run.

        Raises:
            SettingsError: no project is set.
            GoogleCloudError: there is no such dataset, it does not last, or BigQuery does not answer.
        """
        client = bigquery_client(settings, step, run_id)
        found = open_dataset(settings, client)
        warehouse = cls(client, f"{found.project}.{found.dataset_id}", found.location)
        runs = client.create_table(Table(warehouse.table(LOADED_RUNS), schema=_LOADED_RUNS_SCHEMA), exists_ok=True)
        there = {field.name for field in runs.schema}
        for field in _LOADED_RUNS_SCHEMA:
            if field.name not in there:  # a table of an earlier version
                warehouse.add_column(LOADED_RUNS, field.name, field.field_type)
        client.create_table(Table(warehouse.table(LOADED_DAYS), schema=_LOADED_DAYS_SCHEMA), exists_ok=True)
        return warehouse

    def table(self, name: str) -> str:
        """The full name of one of the dataset's tables."""
        return f"{self.dataset}.{name}"

    def add_column(self, table: str, column: str, type_name: str) -> None:
        """Add a column to one of the tables, if it is not there."""
        self.rows(f"alter table `{self.table(table)}` add column if not exists `{column}` {type_name}")

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
            when not matched then insert (run_id, number, database, epoch, exported_at, started_at)
              values (@run_id, @number, @database, @epoch, @exported_at, @now)""",
            manifest,
        )

    def complete_run(self, manifest: Manifest) -> None:
        """Note the days of raw_orders that this run has changed, and then that the raw tables hold all of it."""
        self._note_days(manifest.number, manifest.table("raw_orders").days)
        self._record("update `{runs}` set loaded_at = @now where run_id = @run_id and loaded_at is null", manifest)

    def _note_days(self, number: int, days: Collection[date] | None) -> None:
        """Write a row a day; one without a day where any may have changed. What is there already stays."""
        changed = "select @number as run_number, cast(null as date) as day"
        parameters: list[Parameter] = [ScalarQueryParameter("number", "INT64", number)]
        if days is not None:
            changed = "select @number as run_number, day from unnest(@days) as day"
            parameters.append(ArrayQueryParameter("days", "DATE", sorted(days)))
        self.rows(
            f"""
            merge `{self.table(LOADED_DAYS)}` as stored using ({changed}) as changed
            on stored.run_number = changed.run_number and (stored.day = changed.day or changed.day is null)
            when not matched then insert (run_number, day) values (changed.run_number, changed.day)""",
            parameters,
        )

    def rows(self, query: str, parameters: Sequence[Parameter] = ()) -> list[dict[str, Any]]:
        """The rows of a query, never from the cache; sent again for some minutes where another try can help.

        Raises:
            GoogleAPICallError: BigQuery refuses; see batch.google_cloud.explained.
        """
        config = QueryJobConfig(use_query_cache=False, query_parameters=list(parameters))
        return [dict(row.items()) for row in self.client.query(query, location=self.location, job_config=config).result()]

    def _newest(self, condition: str) -> LoadedRun | None:
        found = self.rows(f"""
            select run_id, coalesce(number, 0) as number, database, coalesce(epoch, '') as epoch, exported_at,
                   loaded_at is not null as complete
            from `{self.table(LOADED_RUNS)}` where {condition}
            order by coalesce(number, 0) desc, exported_at desc, started_at limit 1""")
        return LoadedRun(**found[0]) if found else None

    def _record(self, statement: str, manifest: Manifest) -> None:
        parameters = [
            ScalarQueryParameter("run_id", "STRING", manifest.run_id),
            ScalarQueryParameter("database", "STRING", manifest.database),
            ScalarQueryParameter("number", "INT64", manifest.number),
            ScalarQueryParameter("epoch", "STRING", manifest.epoch),
            ScalarQueryParameter("exported_at", "TIMESTAMP", manifest.finished_at),
            ScalarQueryParameter("now", "TIMESTAMP", datetime.now(UTC)),
        ]
        used = [parameter for parameter in parameters if f"@{parameter.name}" in statement]
        self.rows(statement.format(runs=self.table(LOADED_RUNS)), used)
