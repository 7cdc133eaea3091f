"""`python -m tests.benchmarks`: finpro, its rival and the floor, in turns on one broker and one Postgres."""

import json
import os
import platform
import signal
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import psutil
import typer
from rich.console import Console

from conf.errors import FinproError
from conf.rules import load_rules
from tests.benchmarks.arena import RULES, Arena, arena
from tests.benchmarks.contestants import Contestant, finpro, floor, peer
from tests.benchmarks.load import make_orders, send
from tests.benchmarks.report import Results
from tests.benchmarks.runs import run_backlog, run_live

BACKLOG_RATE = 2_000  # orders a second of event time
BACKLOG_TOPICS = "backlog_"
console = Console(soft_wrap=True, highlight=False)


class Part(StrEnum):
    """What can be left out."""

    PEER = "peer"
    FLOOR = "floor"
    FINPRO = "finpro"
    BACKLOG = "backlog"
    LIVE = "live"
    GENERATE = "generate"


def main(
    orders: Annotated[int, typer.Option(min=1_000, help="Orders in the backlog, a multiple of 1,000.")] = 1_000_000,
    repeat: Annotated[int, typer.Option(min=1, help="Runs of each contestant, in turns.")] = 1,
    rate: Annotated[int, typer.Option(min=1, help="Live orders a second.")] = 1_000,
    live_seconds: Annotated[int, typer.Option(min=1, help="How long live orders are timed.")] = 60,
    warm_up_seconds: Annotated[int, typer.Option(min=0, help="How long they are not, at first.")] = 15,
    skip: Annotated[list[Part] | None, typer.Option(help="Leave this out; repeatable.")] = None,
    seed: Annotated[int, typer.Option(help="Of the orders.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every number to this file.")] = None,
) -> None:
    """Measure finpro against a tuned Python process and against bare Spark, on a platform started for it."""
    left_out = set(skip or [])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    results = Results(machine())
    with arena() as place:
        contestants = [make() for make in (peer, floor, finpro) if make.__name__ not in left_out]
        if Part.BACKLOG not in left_out:
            load_backlog(place, orders, seed)
            for contestant in contestants * repeat:
                with place.stage(BACKLOG_TOPICS) as stage:
                    results.backlog.append(run_backlog(contestant, stage, orders))
                console.print(f"{contestant.name}: {results.backlog[-1].rate:,.0f} orders/s")
