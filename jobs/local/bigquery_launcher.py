"""Starts bqemulator with all it needs at hand; run by the Python of its environment, which has none of finpro's packages.

It wants DuckDB's spatial extension, and would download it: the file comes with a package instead. It parses each statement some
twenty times, once for each of its questions: what was parsed is remembered. And it writes nearly as many, each with a generator
of its own, which takes longer to make than to use: those are used again. It looks for garbage all the time: now it does so
more rarely. And it does what nobody asks it for here: it stores each state of a job, and a copy of a table after each change
of it, and it measures and logs each request.
"""

import gc
import sys
from collections import defaultdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import duckdb
import duckdb_extension_spatial
from bqemulator.api.middleware import AccessLogMiddleware, CorrelationIdMiddleware, MetricsMiddleware
from bqemulator.catalog.duckdb_repository import DuckDBCatalogRepository
from bqemulator.cli import main
from bqemulator.domain.events import TableDataChanged
from bqemulator.versioning.snapshots import SnapshotManager
from fastapi import FastAPI
from sqlglot.dialects.dialect import Dialect
from sqlglot.expressions import Expr
from sqlglot.generator import Generator
from sqlglot.helper import name_sequence

_MOST_REMEMBERED = 256  # statements


def install_spatial() -> None:
    """Copy the extension to where DuckDB looks for it, under HOME."""
    extension = next(Path(duckdb_extension_spatial.__file__).parent.rglob("spatial.duckdb_extension"))
    quoted = str(extension).replace("'", "''")
    with duckdb.connect() as connection:
        connection.execute(f"install '{quoted}'")


def remember_what_was_parsed() -> None:
    """Parse a statement once, and give everyone who asks a copy of their own: a quarter of the time, as measured on dbt's."""
    parse = Dialect.parse

    @lru_cache(_MOST_REMEMBERED)
    def remembered(dialect: Dialect, sql: str) -> list[Expr | None]:
        parsed = parse(dialect, sql)
        for node in (node for expression in parsed if expression for node in expression.walk()):
            node._meta = None  # where it stands in the text, which nobody asks for: to copy that takes longer than the rest
        return parsed

    def parse_or_remember(dialect: Dialect, sql: str, **options: Any) -> list[Any]:
        if options:
            return parse(dialect, sql, **options)
        return [expression and expression.copy() for expression in remembered(dialect, sql)]

    Dialect.parse = parse_or_remember  # type: ignore[assignment]


def use_generators_again() -> None:
    """Make a generator of SQL only where none is at rest: a compiled one parses some thirty templates when it is made."""
    make_and_generate = Dialect.generate
    at_rest: dict[tuple[Any, ...], list[Generator]] = defaultdict(list)

    def generate(dialect: Dialect, expression: Expr, copy: bool = True, **options: Any) -> str:
        if dialect.settings:
            return make_and_generate(dialect, expression, copy, **options)
        alike = at_rest[type(dialect), *sorted(options.items())]
        try:
            generator = alike.pop()
        except IndexError:  # or another one is at work with it, the one that has asked for this among them
            generator = dialect.generator(**options)
        generator._next_name = name_sequence("_t")
        sql = generator.generate(expression, copy=copy)
        alike.append(generator)  # not one that has failed half-way
        return sql

    Dialect.generate = generate  # type: ignore[assignment, method-assign]


def collect_garbage_rarely() -> None:
    """Look for garbage after seventy times as many new objects as Python would, and never among what was imported.

    Trees of statements are many objects, and none of them garbage while it lives: a seventh of the time went into looking.
    """
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)


def store_less() -> None:
    """Store no jobs, which are known until the server ends, and nothing to travel in time by: a tenth of the time each."""

    def only_tell(snapshots: SnapshotManager, project_id: str, dataset_id: str, table_id: str) -> None:
        snapshots._events.publish(TableDataChanged(project_id, dataset_id, table_id))

    DuckDBCatalogRepository._write_job = lambda *_: None
    SnapshotManager.record_change = only_tell


def watch_no_requests() -> None:
    """Leave out what stands before each request only to measure and log it: a fifth of the time. What fails is answered."""
    add = FastAPI.add_middleware

    def add_unless_it_watches(app: FastAPI, kind: Any, *arguments: Any, **options: Any) -> None:
        if kind not in (AccessLogMiddleware, CorrelationIdMiddleware, MetricsMiddleware):
            add(app, kind, *arguments, **options)

    FastAPI.add_middleware = add_unless_it_watches


def miss_pandas_once() -> None:
    """DuckDB looks whether there is a pandas for each value of a statement, in each folder that packages lie in."""
    sys.modules["pandas"] = None  # type: ignore[assignment]


if __name__ == "__main__":
    install_spatial()
    remember_what_was_parsed()
    use_generators_again()
    collect_garbage_rarely()
    store_less()
    watch_no_requests()
    miss_pandas_once()
    main()
