"""Exports and builds for tests of what follows them: finpro's own, without what takes longest: a JVM, dbt's data tests."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
from google.cloud.bigquery import QueryJobConfig
from pyspark import SparkContext

import jobs.transform
from batch.google_cloud import bigquery_client
from batch.postgres import connect
from batch.warehouse.export import export
from conf.settings import Settings


class _Accumulator:
    def __init__(self, value: int) -> None:
        self.value = value

    def add(self, more: int) -> None:
        self.value += more


class _Tasks:
    def __init__(self, parts: Sequence[Any], task: Callable[[Any], Any]) -> None:
        self._parts, self._task = parts, task

    def map(self, task: Callable[[Any], Any]) -> "_Tasks":
        return _Tasks(self._parts, task)

    def foreach(self, task: Callable[[Any], Any]) -> None:
        self.map(task).collect()

    def collect(self) -> list[Any]:
        return [self._task(part) for part in self._parts]


class _OneProcess:
    """As much of a SparkContext as the export asks for: its tasks run here, one after another."""

    defaultParallelism = 1  # noqa: N815  Spark's name

    def accumulator(self, value: int) -> _Accumulator:
        return _Accumulator(value)

    def parallelize(self, parts: Sequence[Any], _slices: int) -> _Tasks:
        return _Tasks(parts, lambda part: part)


# Makes an export run of the raw tables as they are: `export` without its Spark.
export_run = partial(export, lambda: cast("SparkContext", _OneProcess()))


def build_alone(settings: Settings, *select: str, full_refresh: bool = False, run_id: str | None = None) -> str:
    """`finpro transform` without data tests and documentation: for what is not about them. Returns what it said."""
    run: Any = jobs.transform._run_dbt
    said: list[str] = []

    def untested(arguments: list[str], home: Path, say: Callable[[str], None]) -> Any:
        return run([*arguments, "--exclude-resource-type", "test"], home, say)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs.transform, "_run_dbt", untested)
        patch.setattr(jobs.transform, "_write_docs", lambda *_: None)
        jobs.transform.transform(settings, run_id=run_id, full_refresh=full_refresh, select=select, say=said.append)
    return "\n".join(said)


def execute(settings: Settings, statement: str, *parameters: object) -> list[tuple[Any, ...]]:
    """Run a statement in a transaction of its own; its rows, if it has any."""
    with connect(settings.require("postgres_dsn")) as connection, connection.cursor() as cursor:
        cursor.execute(statement, parameters)
        return cursor.fetchall() if cursor.description else []


def fill(settings: Settings, orders: int = 50) -> None:
    """Three users, two products and some orders, among them what is easily lost on the way: big money, microseconds, text."""
    execute(
        settings,
        """
        insert into raw_users (user_id, name, email, phone_number, created_date, source)
        select i, 'Kadek ' || chr(200 + i) || ' 日本 ''"\\', i || '@example.com', '+62', '1969-12-31 23:59:59.999999+00', 'web'
        from generate_series(1, 3) as i""",
    )
    execute(
        settings,
        """
        insert into raw_products (product_id, product_name, category, sub_category, currency, price, cost, created_date, source)
        select i, 'Batik ' || i, 'Fashion', '', 'IDR', 9223372036854775807, 9223372036854775806, now(), 'own_brand'
        from generate_series(1, 2) as i""",
    )
    insert_orders(settings, 1, orders)
    state(settings, "O10", "fraud", "2026-11-03 10:00:00+00")
    state(settings, "O10", "genuine", "2026-11-05 10:00:00.000001+00")


def state(settings: Settings, order_id: str, outcome: str, decided_at: str) -> None:
    """What somebody says that has turned out about an order."""
    execute(
        settings,
        "insert into order_outcomes (order_id, outcome, reviewed_by, reason, decided_at, source)"
        " values (%s, %s, 'desk', 'stays in Postgres', %s, 'file')",
        *(order_id, outcome, decided_at),
    )


def insert_orders(settings: Settings, first: int, last: int) -> None:
    """Orders `first` to `last`: every tenth is a fraud, and they lie an hour and a microsecond apart."""
    execute(
        settings,
        """
        insert into raw_orders
          (order_id, user_id, product_id, quantity, amount, amount_numeric, country, created_date, event_ts, status, source,
           reasons, rules_version, screened_at)
        select 'O' || i, 1 + i %% 4, 1 + i %% 2, 1 + i %% 7, 'Rp.' || i, 4611686018427387904 + i, 'ID', moment, moment,
               case when i %% 10 = 0 then 'Fraud' else 'Genuine' end, 'web',
               case when i %% 10 = 0 then array['foreign_country', 'night_amount'] else array[]::text[] end, '2026-11-01', now()
        from generate_series(%s, %s) as i,
             lateral (select timestamptz '2026-11-01' + i * interval '1 hour 1 microsecond' as moment) as at""",
        first,
        last,
    )


def make_room_for_spark(settings: Settings) -> None:
    """Make the file of raw_orders so long that a full export has slices enough for Spark: of rows that are deleted again."""
    execute(settings, "alter table raw_orders set (autovacuum_enabled = false)")
    insert_orders(settings, 1_000_001, 1_450_000)
    execute(settings, "delete from raw_orders where order_id ~ '^O1[0-9]{6}$'")


def postgres_rows(settings: Settings, table: str) -> list[tuple[Any, ...]]:
    """All rows of a raw table in Postgres, sorted; transaction ids as integers."""
    names = execute(
        settings,
        "select attname from pg_attribute where attrelid = %s::regclass and attnum > 0 and not attisdropped order by attnum",
        table,
    )
    exported = [name for (name,) in names if (table, name) != ("order_outcomes", "reason")]
    columns = ["change_xid::text::bigint" if name == "change_xid" else name for name in exported]
    return sorted(execute(settings, f"select {', '.join(columns)} from {table}"))


def bigquery_rows(settings: Settings, table: str) -> list[tuple[Any, ...]]:
    """All rows of a raw table in BigQuery, sorted, without what the load adds: which run has written them."""
    rows = _query(settings, f"select * from {settings.bigquery_dataset}.{table}")
    return sorted(tuple(value for name, value in row.items() if name != "loaded_run") for row in rows)


def tamper(settings: Settings, statement: str) -> None:
    """Run a DML statement of somebody else's on BigQuery; `{}` stands for the dataset."""
    _query(settings, statement.format(settings.bigquery_dataset))


def table_names(settings: Settings, dataset: str | None = None) -> set[str]:
    """The tables of a dataset, by default that of the raw tables."""
    return {table.table_id for table in bigquery_client(settings).list_tables(dataset or settings.bigquery_dataset)}


def _query(settings: Settings, statement: str) -> Iterator[Any]:
    return iter(bigquery_client(settings).query(statement, job_config=QueryJobConfig(use_query_cache=False)).result())
