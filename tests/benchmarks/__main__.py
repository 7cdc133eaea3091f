"""`python -m tests.benchmarks`: finpro, its rival and the floor, in turns on one broker and one Postgres."""

import json
import os
import platform
import signal
import sys
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from rich.console import Console

from conf.errors import FinproError
from conf.rules import load_rules
from tests.benchmarks import bench_backtest, bench_export, bench_generate
from tests.benchmarks.arena import RULES, Arena, arena
from tests.benchmarks.bench_backtest import BacktestRun
from tests.benchmarks.bench_export import ExportRun
from tests.benchmarks.bench_generate import LoadRun
from tests.benchmarks.latency import Pace
from tests.benchmarks.load import make_orders, send
from tests.benchmarks.report import Results
from tests.benchmarks.rivals.contestants import Contestant, finpro, floor, peer
from tests.benchmarks.runs import BacklogRun, LiveRun, run_backlog, run_live

BACKLOG_RATE = 2_000  # orders a second of event time
USERS = 1_000_000
console = Console(width=120, highlight=False)


class Part(StrEnum):
    """What can be left out."""

    PEER = "peer"
    FLOOR = "floor"
    FINPRO = "finpro"
    BACKLOG = "backlog"
    LIVE = "live"
    GENERATE = "generate"
    EXPORT = "export"
    BACKTEST = "backtest"


def main(
    orders: Annotated[int, typer.Option(min=1_000, help="Orders in the backlog, a multiple of 1,000.")] = 1_000_000,
    repeat: Annotated[int, typer.Option(min=1, help="Runs of each contestant, in turns.")] = 1,
    rate: Annotated[int, typer.Option(min=1, help="Live orders a second.")] = 1_000,
    live_seconds: Annotated[int, typer.Option(min=1, help="How long live orders are timed.")] = 60,
    warm_up_seconds: Annotated[int, typer.Option(min=0, help="How long they are not, at first.")] = 15,
    export_orders: Annotated[int, typer.Option(min=1_000, help="Orders to export.")] = bench_export.ROWS,
    skip: Annotated[list[Part] | None, typer.Option(help="Leave this out; repeatable.")] = None,
    seed: Annotated[int, typer.Option(help="Of the orders.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every number to this file.")] = None,
) -> None:
    """Measure finpro against a tuned Python process and against bare Spark, on a platform started for it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    parts = set(Part) - set(skip or [])
    results = Results(machine())
    with arena() as place:
        contestants = [make() for make in (peer, floor, finpro) if make.__name__ in parts]
        if Part.BACKLOG in parts:
            load_backlog(place, orders, seed)
            for contestant in contestants * repeat:
                results.backlog.append(backlog(place, contestant, orders))
        if Part.LIVE in parts:
            pace = Pace(rate, warm_up_seconds, live_seconds)
            for contestant in [each for each in contestants if each.live] * repeat:
                results.live.append(live(place, contestant, pace, seed))
        if Part.GENERATE in parts:
            results.loads = loads(place, repeat)
        if Part.EXPORT in parts:
            results.exports = exports(place, export_orders, repeat)
        if Part.BACKTEST in parts:
            results.backtests = backtests(place)
    results.show(console)
    if json_file:
        json_file.write_text(json.dumps(results.as_json()) + "\n", encoding="utf-8")


def machine() -> dict[str, Any]:
    """What the numbers were measured on, and how busy it was."""
    return {
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "system": platform.platform(),
        "python": platform.python_version(),
        "load_average_before": os.getloadavg()[0],
    }


def load_backlog(place: Arena, count: int, seed: int) -> None:
    """Fill the orders topic that every contestant reads; event times end now."""
    console.print(f"Sending a backlog of {count:,} orders …")
    start = datetime.now(UTC) - timedelta(seconds=count / BACKLOG_RATE)
    with place.stage("backlog_") as stage:
        send(stage.settings, make_orders(count, rules=load_rules(RULES), rate=BACKLOG_RATE, start=start, seed=seed))


def backlog(place: Arena, contestant: Contestant, orders: int) -> BacklogRun:
    """One contestant over the backlog."""
    with place.stage("backlog_") as stage:
        run = run_backlog(contestant, stage, orders)
    console.print(f"{contestant.name}: {run.rate:,.0f} orders/s, {run.seconds:.1f} s")
    return run


def live(place: Arena, contestant: Contestant, pace: Pace, seed: int) -> LiveRun:
    """One contestant on topics of its own, with orders sent as they happen."""
    console.print(f"{contestant.name}: {pace.rate:,} orders/s for {pace.warm_up_seconds} + {pace.seconds} s …")
    with place.stage(f"live_{place.runs}_") as stage:
        return run_live(contestant, stage, pace, seed)


def loads(place: Arena, repeat: int) -> list[LoadRun]:
    """Reference data into Postgres, beside a bare COPY."""
    console.print(f"Loading {USERS:,} users …")
    with place.stage("generate_") as stage:
        return bench_generate.measure(stage.settings.require("postgres_dsn"), USERS, repeat)


def exports(place: Arena, orders: int, repeat: int) -> list[ExportRun]:
    """`finpro export` beside single-process tools."""
    console.print(f"Exporting {orders:,} orders …")
    with place.stage("export_") as stage:
        return bench_export.measure(stage, orders, repeat)


def backtests(place: Arena) -> list[BacktestRun]:
    """`finpro backtest` over histories of growing length."""
    console.print(f"Backtesting {' and '.join(f'{rows:,}' for rows in bench_backtest.ROWS)} orders …")
    with place.stage("backtest_") as stage:
        return bench_backtest.measure(stage.folder)


if __name__ == "__main__":
    try:
        typer.run(main)
    except FinproError as error:
        sys.exit(f"benchmark: {error}")
