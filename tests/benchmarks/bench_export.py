"""`finpro export` against single-process tools over the same orders, and an incremental run against a full one.

Equal are the rows, the columns, zstd Parquet, the cores and the disk. finpro alone starts a JVM, uploads through Cloud
Storage's emulator where its rivals write a local file, and profiles the table for the reconciliation. A rival would ask
Postgres for that, as finpro does in an incremental run: it is timed by itself as well.
"""

import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from batch.google_cloud import open_bucket
from batch.postgres import open_connection
from batch.warehouse.manifest import read_manifest
from tests.benchmarks.arena import Stage, arena
from tests.benchmarks.measure import BenchmarkError, Usage, finish, running
from tests.benchmarks.rivals.export_peers import PEERS

ROWS = 10_000_000
FULL, ONE_TASK, PROFILE = "finpro", "finpro, one task at a time", "Postgres's profile alone"
NOTHING, ONE = "finpro, nothing changed", "finpro, one order changed"
NEWEST, SPREAD = "finpro, the newest 1% changed", "finpro, 1% changed, of all days"
_INCREMENTAL_RUNS = 5  # in turns: what they differ by is less than a busy moment costs one of them
_TIMEOUT_SECONDS = 900
_FINPRO = [str(Path(sys.executable).parent / "finpro"), "export"]
_PEER = [sys.executable, "-m", "tests.benchmarks.rivals.export_peers"]
# Rows first, indexes after: the same table in half the time. Unlogged: nothing here outlives the benchmark.
_FILL = """
    alter table raw_orders set unlogged;
    alter table raw_orders drop constraint raw_orders_pkey;
    drop index raw_orders_change_xid;
    insert into raw_orders (order_id, user_id, product_id, quantity, amount, amount_numeric, country, created_date, event_ts,
                            status, source, reasons, rules_version, screened_at)
    select 'ORD-' || lpad(i::text, 10, '0'), 1 + i * 7919 % 20000, 1 + i * 104729 % 1000, 1 + i % 5,
           'Rp.' || 1000 + i * 7907 % 9000000, 1000 + i * 7907 % 9000000, case i % 50 when 0 then 'SG' else 'ID' end, at, at,
           case i % 50 when 0 then 'Fraud' else 'Genuine' end, (array['web', 'android', 'ios'])[1 + i % 3],
           case i % 50 when 0 then array['foreign_country'] else '{{}}' end, '2026-11-01', at + interval '1 second'
    from (select i, timestamptz '2026-01-01' + i * interval '0.500001 s' as at from generate_series(1, {rows}::bigint) as i);
    alter table raw_orders add primary key (order_id);
    create index raw_orders_change_xid on raw_orders (change_xid)
"""
_CHANGE = "update raw_orders set country = 'MY' where {which}"


@dataclass(frozen=True)
class ExportRun:
    """What one command took, from its start to its end."""

    name: str
    rows: int
    seconds: float
    peak_mib: int
    growth: float

    @property
    def rate(self) -> float:
        """Rows a second, start-up and all."""
        return self.rows / self.seconds


def measure(stage: Stage, rows: int = ROWS, repeat: int = 1) -> list[ExportRun]:
    """Each tool over the same orders, then finpro with nothing, and in turns with one order and 1% of the orders changed.

    The newest 1% is what an hour changes: each day that holds a change is profiled, and here 1% of all days is all days.
    """
    changes = {
        ONE: "order_id = 'ORD-0000000001'",
        NEWEST: f"order_id > 'ORD-{rows - rows // 100:010}'",
        SPREAD: "product_id % 100 = 7",
    }
    _execute(stage, _FILL.format(rows=rows))
    _execute(stage, "vacuum analyze raw_orders")
    runs = []
    for attempt in range(repeat):
        runs += [_peer(stage, name) for name in PEERS]
        runs.append(_finpro(stage, FULL, f"full-{attempt}", "--full"))
    runs.append(_finpro(stage, ONE_TASK, "one-task", "--full", "--master", "local[1]"))
    if any(run.rows != rows for run in runs):
        raise BenchmarkError(f"not every run exported {rows:,} rows: {runs}")
    runs.append(_profile(stage))
    runs.append(_finpro(stage, NOTHING, "nothing"))
    for attempt in range(_INCREMENTAL_RUNS):
        for number, (name, which) in enumerate(changes.items()):
            _execute(stage, _CHANGE.format(which=which))
            runs.append(_finpro(stage, name, f"changed-{attempt}-{number}"))
    return runs


def _execute(stage: Stage, statements: str) -> None:
    with closing(open_connection(stage.settings.require("postgres_dsn"))) as connection, connection.cursor() as cursor:
        connection.autocommit = True  # VACUUM allows no transaction around it
        cursor.execute(statements)


def _peer(stage: Stage, name: str) -> ExportRun:
    path = stage.folder / f"{name}.parquet"
    usage = _run(stage, [*_PEER, name, str(path)])
    rows = pq.read_metadata(path).num_rows
    path.unlink()
    return _export_run(name, rows, usage)


def _profile(stage: Stage) -> ExportRun:
    return _export_run(PROFILE, 0, _run(stage, [*_PEER, "profile", str(stage.folder / "profile")]))


def _finpro(stage: Stage, name: str, run_id: str, *options: str) -> ExportRun:
    usage = _run(stage, [*_FINPRO, "--run-id", run_id, *options])
    manifest = read_manifest(open_bucket(stage.settings), run_id)
    return _export_run(name, sum(table.rows for table in manifest.tables), usage)


def _export_run(name: str, rows: int, usage: Usage) -> ExportRun:
    return ExportRun(name, rows, usage.seconds, usage.peak_mib, usage.growth)


def _run(stage: Stage, command: Sequence[str]) -> Usage:
    env: Mapping[str, str] = {**os.environ, **stage.environment, "OMP_NUM_THREADS": str(os.cpu_count())}
    with running(command, env, stage.log) as (process, usage):
        finish(process, stage.log, timeout_seconds=_TIMEOUT_SECONDS)
    return usage


def show(console: Console, runs: Sequence[ExportRun]) -> None:
    """Print the runs as a table, ratios first, and what an incremental run costs."""
    last = {run.name: run for run in runs}
    best = max((run for run in runs if run.name in PEERS), key=lambda run: run.rate)
    best_with_profile = best.rows / (best.seconds + last[PROFILE].seconds)
    table = Table("export", title=f"{best.rows:,} orders to Parquet, {best.name} = 1 (aim: at least 0.7)")
    for name in ("ratio", f"{best.name} with profile = 1", "rows/s", "seconds", "most memory, MiB", "memory, end / middle"):
        table.add_column(name, justify="right")
    for run in runs:
        whole = run.rows == best.rows
        ratios = [f"{run.rate / rate:.2f}" if whole else "" for rate in (best.rate, best_with_profile)]
        rate = f"{run.rate:,.0f}" if whole else ""
        table.add_row(run.name, *ratios, rate, f"{run.seconds:.1f}", f"{run.peak_mib:,}", f"{run.growth:.2f}")
    console.print(table)
    typical = {name: statistics.median(run.seconds for run in runs if run.name == name) for name in (FULL, ONE, NEWEST, SPREAD)}
    above = {name: seconds - typical[ONE] for name, seconds in typical.items()}
    console.print(
        f"The newest 1% costs {above[NEWEST] / above[FULL]:.1%} of a full run (aim: at most 5%), 1% of all days"
        f" {above[SPREAD] / above[FULL]:.1%}, each above the {typical[ONE]:.1f} s of a run with one change. Medians of"
        f" {_INCREMENTAL_RUNS} runs in turns."
    )
    faster = last[ONE_TASK].seconds / last[FULL].seconds
    console.print(f"{os.cpu_count()} tasks at a time export everything {faster:.2f} times as fast as one, start-up and all.")


def run(console: Console, *, rows: int = ROWS, repeat: int = 1) -> list[ExportRun]:
    """Measure on a platform of the benchmark's own, and print the table."""
    with arena() as place, place.stage("export_") as stage:
        runs = measure(stage, rows, repeat)
    show(console, runs)
    return runs


if __name__ == "__main__":
    run(Console(highlight=False), rows=int(sys.argv[1]) if sys.argv[1:] else ROWS)
