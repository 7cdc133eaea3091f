"""Loading users that are made already, against a bare COPY of the same rows into an equal table."""

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass

import polars as pl
from psycopg2.extensions import connection as Connection
from rich.console import Console
from rich.table import Table

from batch.frames import copy_frame
from batch.postgres import open_connection
from batch.reference_data import USERS, load, users
from tests.benchmarks.arena import arena

_BARE = "bare_raw_users"


@dataclass(frozen=True)
class LoadRun:
    """Seconds that each way took, with the commit."""

    rows: int
    bare_copy: float
    first_load: float
    same_again: float

    @property
    def first_ratio(self) -> float:
        """How many times a bare COPY loading into an empty table takes."""
        return self.first_load / self.bare_copy

    @property
    def again_ratio(self) -> float:
        """How many times a bare COPY finding every row there already takes."""
        return self.same_again / self.bare_copy


def measure(dsn: str, rows: int = 1_000_000, repeat: int = 1) -> list[LoadRun]:
    """Load so many users into an empty `raw_users`, and once more, each time beside a bare COPY into a table like it."""
    frames = list(users(rows, seed=1))
    with closing(open_connection(dsn)) as connection:
        return [_run(connection, frames) for _ in range(repeat)]


def _run(connection: Connection, frames: Sequence[pl.DataFrame]) -> LoadRun:
    _timed(connection, lambda: _execute(connection, f"drop table if exists {_BARE}; truncate {USERS.name}"))
    _timed(connection, lambda: _execute(connection, f"create table {_BARE} (like {USERS.name} including all)"))
    bare_copy = _timed(connection, lambda: _copy(connection, frames))
    first_load = _timed(connection, lambda: _load(connection, frames))
    same_again = _timed(connection, lambda: _load(connection, frames))
    _timed(connection, lambda: _execute(connection, f"drop table {_BARE}"))
    return LoadRun(sum(map(len, frames)), bare_copy, first_load, same_again)


def _timed(connection: Connection, work: Callable[[], None]) -> float:
    began = time.perf_counter()
    with connection:
        work()
    return time.perf_counter() - began


def _execute(connection: Connection, statement: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute(statement)


def _copy(connection: Connection, frames: Sequence[pl.DataFrame]) -> None:
    with connection.cursor() as cursor:
        for frame in frames:
            copy_frame(cursor, _BARE, frame)


def _load(connection: Connection, frames: Sequence[pl.DataFrame]) -> None:
    with connection.cursor() as cursor:
        load(cursor, USERS, frames)


def show(console: Console, runs: Sequence[LoadRun]) -> None:
    """Print the runs as a table, ratios first."""
    table = Table("loading users", title=f"{runs[0].rows:,} users, a bare COPY = 1 (aim: at most 2)")
    for name in ("ratio", "seconds", "bare COPY, seconds"):
        table.add_column(name, justify="right")
    for run in runs:
        table.add_row("into an empty table", f"{run.first_ratio:.2f}", f"{run.first_load:.1f}", f"{run.bare_copy:.1f}")
        table.add_row("the same again", f"{run.again_ratio:.2f}", f"{run.same_again:.1f}", f"{run.bare_copy:.1f}")
    console.print(table)


def run(console: Console, *, rows: int = 1_000_000, repeat: int = 3) -> list[LoadRun]:
    """Measure on a platform of the benchmark's own, and print the table."""
    with arena() as place, place.stage("generate_") as stage:
        runs = measure(stage.settings.require("postgres_dsn"), rows, repeat)
    show(console, runs)
    return runs


if __name__ == "__main__":
    run(Console(highlight=False))
