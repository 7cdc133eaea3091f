"""`finpro backtest` over histories of growing length: the time of the whole command, start-up and all.

The history is silver alone, of 1,000,000 orders a day by 20,000 users for 1,000 products, written by Spark itself.
"""

import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from rich.console import Console
from rich.table import Table

from jobs.spark.submit import environment, spark_submit
from streaming.lakehouse.tables import SILVER, SILVER_ORDERS, create_tables, silver_orders
from tests.benchmarks.arena import RULES
from tests.benchmarks.measure import finish, running

ROWS = (1_000_000, 10_000_000)
_TIMEOUT_SECONDS = 900
_FIRST_DAY = "2026-01-01T00:00:00Z"
_BETWEEN_ORDERS_US = 86_400


@dataclass(frozen=True)
class BacktestRun:
    """What one backtest took, from the command's start to its end. Memory is that of the JVM and its workers together."""

    rows: int
    seconds: float
    cpu_seconds: float
    peak_mib: int

    @property
    def rate(self) -> float:
        """Orders a second, start-up and all."""
        return self.rows / self.seconds


def measure(folder: Path, rows: Sequence[int] = ROWS) -> list[BacktestRun]:
    """Backtest histories of so many orders, in a folder for their tables and the command's output."""
    with _spark() as spark:
        for count in rows:
            _fill(spark, _lakehouse(folder, count), count)
    return [_backtest(folder, count) for count in rows]


@contextmanager
def _spark() -> Iterator[SparkSession]:
    _, *options, _ = spark_submit("benchmark", [], master="local[*]", memory="1g", conf=[], delta=True)
    os.environ.update(environment("benchmark", master="local[*]"), PYSPARK_SUBMIT_ARGS=shlex.join([*options, "pyspark-shell"]))
    spark = SparkSession.builder.getOrCreate()
    yield spark
    spark.stop()


def _lakehouse(folder: Path, count: int) -> str:
    return str(folder / f"lakehouse-{count}")


def _fill(spark: SparkSession, lakehouse: str, count: int) -> None:
    create_tables(spark, lakehouse)
    _orders(spark, count).write.format("delta").mode("append").partitionBy(SILVER_ORDERS.day).save(silver_orders(lakehouse))


def _orders(spark: SparkSession, count: int) -> DataFrame:
    """Silver. Every fiftieth order is from abroad, and Fraud."""
    is_fraud = F.col("id") % 50 == 0
    first = F.unix_micros(F.lit(_FIRST_DAY).cast("timestamp"))
    drawn = {name: 1 + F.pmod(F.xxhash64("id", F.lit(name)), F.lit(values)) for name, values in _DRAWN.items()}
    made = {
        "order_id": F.format_string("ORD-%010d", "id"),
        "amount_numeric": 1000 + F.pmod(F.xxhash64("id"), F.lit(9_000_000)),
        "country": F.when(is_fraud, "SG").otherwise("ID"),
        "event_ts": F.timestamp_micros(first + F.col("id") * _BETWEEN_ORDERS_US),
        "status": F.when(is_fraud, "Fraud").otherwise("Genuine"),
        "source": F.lit("web"),
        "reasons": F.when(is_fraud, F.array(F.lit("foreign_country"))).otherwise(F.array().cast("array<string>")),
        "shadow_reasons": F.array().cast("array<string>"),
        "rules_version": F.lit("2026-01-01"),
    }
    derived = {
        "amount": F.col("amount_numeric").cast("string"),
        "created_date": F.col("event_ts"),
        "screened_at": F.col("event_ts"),
        "event_date": F.to_date("event_ts"),
        "attributes": F.lit(None).cast("string"),
        "suppressed_reasons": F.array().cast("array<string>"),
    }
    return spark.range(count).withColumns(drawn | made).withColumns(derived).select(SILVER.names)


_DRAWN = {"user_id": 20_000, "product_id": 1_000, "quantity": 5}


def _backtest(folder: Path, count: int) -> BacktestRun:
    command = [str(Path(sys.executable).parent / "finpro"), "backtest", "--rules", str(RULES)]
    env: Mapping[str, str] = {**os.environ, "FINPRO_LAKEHOUSE": _lakehouse(folder, count)}
    log = folder / f"backtest-{count}.log"
    with running([*command, "--output", str(folder / "backtest.html")], env, log) as (process, usage):
        finish(process, log, timeout_seconds=_TIMEOUT_SECONDS)
    return BacktestRun(count, usage.seconds, usage.cpu_seconds, usage.peak_mib)


def show(console: Console, runs: Sequence[BacktestRun]) -> None:
    """Print the runs, and how the time grows from the first to the last."""
    table = Table("orders", title="backtest")
    for name in ("seconds", "orders/s", "processor seconds", "most memory, MiB"):
        table.add_column(name, justify="right")
    for run in runs:
        table.add_row(f"{run.rows:,}", f"{run.seconds:.1f}", f"{run.rate:,.0f}", f"{run.cpu_seconds:.1f}", f"{run.peak_mib:,}")
    console.print(table)
    first, last = runs[0], runs[-1]
    if last.rows > first.rows:
        further = (last.rows - first.rows) / (last.seconds - first.seconds)
        console.print(
            f"{last.rows / first.rows:.0f} times the orders take {last.seconds / first.seconds:.1f} times as long:"
            f" beyond what does not grow, {further:,.0f} orders/s"
        )


def run(console: Console, rows: Sequence[int] = ROWS) -> list[BacktestRun]:
    """Measure in a folder of the benchmark's own, and print the table."""
    with TemporaryDirectory(prefix="finpro-backtest-") as folder:
        runs = measure(Path(folder), rows)
    show(console, runs)
    return runs


if __name__ == "__main__":
    run(Console(highlight=False), rows=[int(rows) for rows in sys.argv[1:]] or ROWS)
