"""What was built on the raw tables: from which run, and what dbt's tests found. Two small tables in the core's dataset."""

import io
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime
from typing import Any

from google.api_core.exceptions import NotFound
from google.cloud.bigquery import LoadJobConfig, ScalarQueryParameter, SchemaField, Table, TimePartitioning

from batch.warehouse.tables import LOADED_DAYS, LOADED_RUNS, LoadedRun, Warehouse

BUILDS = "builds"
TEST_RESULTS = "test_results"
REPLACED_BY_DAY = ("fct_orders", "hits_by_day", "orders_by_day", "orders_by_product", "orders_by_user", "reasons_by_user")
_KEPT = frozenset({*REPLACED_BY_DAY, "products_history"})  # what a build goes on from
_BUILDS_SCHEMA = [
    SchemaField("run_id", "STRING", description="The export run whose load was built on."),
    SchemaField("run_number", "INT64", description="Its number: later runs are not in the fact yet."),
    SchemaField("time_zone", "STRING", description="Decided what a day is."),
    SchemaField(
        "complete", "BOOL", description="True when all was built and tested; false when all days began to be built anew."
    ),
    SchemaField("noted_at", "TIMESTAMP"),
]
_TEST_RESULTS_SCHEMA = [
    SchemaField("run_id", "STRING", description="The export run whose load was built on."),
    SchemaField("test", "STRING", description="Its name in dbt; rows that break it are in the table failed_<test>."),
    SchemaField("status", "STRING", description="pass, warn, fail, error or skipped."),
    SchemaField("failures", "INT64", description="Rows that break it, at most as many as are kept."),
    SchemaField("tested_at", "TIMESTAMP"),
]
_TEST_RESULTS_LIVE = 400 * 24 * 60 * 60 * 1000  # milliseconds: a year can be compared with the one before


@dataclass(frozen=True)
class DataTest:
    """What became of a test; `failures` is None where it could not be run."""

    test: str
    status: str
    failures: int | None


@dataclass(frozen=True)
class Build:
    """A build of everything that came to its end, and the export run that it was built from."""

    run_id: str
    completed_at: datetime


@dataclass(frozen=True)
class Builds:
    """The record of builds in the core's dataset, `project.dataset`."""

    warehouse: Warehouse
    core: str

    @classmethod
    def open(cls, warehouse: Warehouse, core: str) -> "Builds":
        """Open the record to write it; its tables are made where they are missing.

        Raises:
            NotFound: there is no such dataset.
        """
        builds = cls(warehouse, core)
        results = Table(f"{core}.{TEST_RESULTS}", schema=_TEST_RESULTS_SCHEMA)
        results.time_partitioning = TimePartitioning(field="tested_at", expiration_ms=_TEST_RESULTS_LIVE)
        for table in (Table(f"{core}.{BUILDS}", schema=_BUILDS_SCHEMA), results):
            warehouse.client.create_table(table, exists_ok=True)
        return builds

    def changed_days(self, run: LoadedRun, time_zone: str) -> list[date] | None:
        """The UTC days whose orders, or what these cost, may have changed between the last build and a run; None for any day.

        That is so before the first build, after one of all days that did not come to its end, in another time zone, after the
        raw tables were started over, when one of the tables that a build goes on from is gone, and after a full run.
        """
        last = self._last()
        if last is None or not last["complete"] or last["time_zone"] != time_zone or last["run_number"] > run.number:
            return None
        if self._lack_a_table():
            return None
        found = self.warehouse.rows(
            f"select distinct day from `{self.warehouse.table(LOADED_DAYS)}` where run_number > @last and run_number <= @run",
            [ScalarQueryParameter("last", "INT64", last["run_number"]), ScalarQueryParameter("run", "INT64", run.number)],
        )
        days = {row["day"] for row in found}
        return None if None in days else sorted(days | self._days_of_new_costs(last["run_number"]))

    def _days_of_new_costs(self, last: int) -> set[date]:
        """The built days from the first on which a product that came after the run `last` may have got another cost.

        Such a cost holds from when Postgres took it, or, where it does not say so, from when the product's history saw it:
        after its run was exported, perhaps by a build that failed.
        """
        products, runs = self.warehouse.table("raw_products"), self.warehouse.table(LOADED_RUNS)
        found = self.warehouse.rows(
            f"""
            select distinct created_day as day from `{self.core}.orders_by_day`
            where created_day >= (
                select least(
                    min(date(ingested_at)), (select min(date(exported_at)) from `{runs}` where coalesce(number, 0) > @last)
                )
                from `{products}` where coalesce(loaded_run, 0) > @last
            )""",
            [ScalarQueryParameter("last", "INT64", last)],
        )
        return {row["day"] for row in found}

    def last_complete(self) -> Build | None:
        """The last build of everything that came to its end."""
        last = self._last("complete")
        return Build(last["run_id"], last["noted_at"]) if last else None

    def every_day(self) -> list[date]:
        """The UTC days on which raw_orders has orders."""
        orders = self.warehouse.table("raw_orders")
        days = self.warehouse.rows(f"select distinct date(created_date) as day from `{orders}` where created_date is not null")
        return sorted(row["day"] for row in days)

    def begin(self, run: LoadedRun, time_zone: str) -> None:
        """Note that all days are about to be built anew: until a build is complete, no day counts as built."""
        self._note(run, time_zone, complete=False)

    def complete(self, run: LoadedRun, time_zone: str) -> None:
        """Note that all is built and tested up to a run."""
        self._note(run, time_zone, complete=True)

    def record_tests(self, run: LoadedRun, results: Iterable[DataTest]) -> None:
        """Keep what became of tests."""
        more = {"run_id": run.run_id, "tested_at": datetime.now(UTC).isoformat()}
        self._append(TEST_RESULTS, _TEST_RESULTS_SCHEMA, [asdict(result) | more for result in results])

    def _last(self, condition: str = "true") -> dict[str, Any] | None:
        newest = f"select * from `{self.core}.{BUILDS}` where {condition} order by noted_at desc limit 1"
        try:
            return next(iter(self.warehouse.rows(newest)), None)
        except NotFound:
            return None

    def _lack_a_table(self) -> bool:
        return not {table.table_id for table in self.warehouse.client.list_tables(self.core)} >= _KEPT

    def _note(self, run: LoadedRun, time_zone: str, *, complete: bool) -> None:
        row = {"run_id": run.run_id, "run_number": run.number, "time_zone": time_zone, "complete": complete}
        self._append(BUILDS, _BUILDS_SCHEMA, [row | {"noted_at": datetime.now(UTC).isoformat()}])

    def _append(self, table: str, schema: list[SchemaField], rows: list[dict[str, Any]]) -> None:
        if not rows:
            return
        lines = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
        self.warehouse.client.load_table_from_file(
            io.BytesIO(lines),
            f"{self.core}.{table}",
            location=self.warehouse.location,
            job_config=LoadJobConfig(source_format="NEWLINE_DELIMITED_JSON", schema=schema, write_disposition="WRITE_APPEND"),
        ).result()
