"""`finpro demo`: the whole flow on the embedded platform, on real input, ending in a table that has to add up."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from batch.postgres import connect
from batch.reference_data import generate
from batch.warehouse.export import new_run_id
from conf.errors import FinproError, ReconciliationError, StreamingError
from conf.settings import Settings
from jobs.local.platform import up
from jobs.spark.submit import log_file
from streaming.kafka import ORDERS, ORDERS_DEAD_LETTER, PROCESSED_ORDERS
from streaming.shop.accounting import Account, account, end_offsets
from streaming.shop.producer import ProduceReport, produce

USERS, PRODUCTS = 20_000, 1_000
_BROKEN, _DUPLICATES = 0.005, 0.01
_HISTORY = timedelta(days=30)
_STALL_SECONDS = 120
_FINPRO = str(Path(sys.executable).parent / "finpro")
_LAKEHOUSE_STEPS = {
    "messages and verdicts to the lakehouse": ["archive", "--available-now"],
    "every verdict given once more": ["audit"],
}
_WAREHOUSE_STEPS = {
    "export": "Postgres to Parquet",
    "load": "Parquet to BigQuery",
    "reconcile": "both sides compared",
    "validate": "the gate",
    "transform": "facts, dimensions and marts",
}


def demo(*, orders: int, rate: float, seed: int) -> None:
    """Run the flow and print what became of every message.

    Raises:
        ReconciliationError: a count disagrees.
        FinproError: a step failed.
    """
    console = Console(highlight=False)
    console.rule("platform")
    platform = up()
    settings = platform.settings()
    for service in platform.services:
        console.print(f"{service.daemon.name} at {service.address}")

    console.rule("reference data")
    for loaded in generate(settings.require("postgres_dsn"), user_count=USERS, product_count=PRODUCTS, seed=1):
        console.print(f"{loaded.table}: {loaded.inserted:,} inserted, {loaded.unchanged:,} unchanged")

    console.rule("orders in, verdicts out")
    since = {topic: end_offsets(settings, topic) for topic in (ORDERS, PROCESSED_ORDERS, ORDERS_DEAD_LETTER)}
    stored_before = _stored(settings)
    send = partial(produce, settings, seed=seed, broken=_BROKEN, duplicates=_DUPLICATES)
    sent: list[ProduceReport] = []
    # On a new platform half of the orders are history, there before screening starts: charts by day need days.
    history = 0 if stored_before else orders // 2
    if history:
        sent.append(send(orders=history, rate=0, event_rate=history / _HISTORY.total_seconds()))
        console.print(f"produced, as history of {_HISTORY.days} days  {sent[-1]}")
    with _screening(platform.environment()) as screening:
        sent.append(
            send(
                orders=orders - history,
                rate=rate,
                on_progress=lambda progress: console.print(f"produced  {progress}"),
            )
        )
        console.print(f"produced  {sent[-1]}")
        _wait_until_stored(settings, screening, stored_before + orders)

    console.rule("every message accounted for")
    found = account(settings, since)
    console.print(_reasons(found))
    console.print(_messages(sent, found))
    _check(sent, found)
    console.print(f"[green]Every order sent is in raw_orders exactly once.[/] Postgres: {platform.postgres.address}")

    for title, command in _LAKEHOUSE_STEPS.items():
        console.rule(title)
        _finpro(*command, environment=platform.environment())

    run_id = new_run_id(datetime.now(UTC))
    for step, title in _WAREHOUSE_STEPS.items():
        console.rule(title)
        _finpro(step, "--run-id", run_id, environment=platform.environment())
    console.rule("what the marts say")
    _finpro("report", environment=platform.environment())
    console.print(
        '`eval "$(.venv/bin/finpro env)"` shows the way in; `.venv/bin/finpro down` stops the platform, its data stay.'
    )


def _finpro(*arguments: str, environment: dict[str, str]) -> None:
    """Run a command of finpro's, as a person would; it tells itself what it does, and what went wrong."""
    command = [_FINPRO, *arguments]
    done = subprocess.run(command, env={**os.environ, **environment}, check=False)
    if done.returncode:
        raise FinproError(f"`finpro {' '.join(arguments)}` ended with exit code {done.returncode}.")


@contextmanager
def _screening(environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """`finpro screen` beside us: told to stop at the end of the block, and waited for."""
    command = [_FINPRO, "screen", "--max-offsets-per-trigger", "20000"]
    process = subprocess.Popen(command, env={**os.environ, **environment})
    try:
        yield process
        process.terminate()
        if process.wait(timeout=_STALL_SECONDS):
            raise StreamingError(f"Screening ended with exit code {process.returncode}: {log_file('screen_orders')}")
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _wait_until_stored(settings: Settings, screening: subprocess.Popen[bytes], expected: int) -> None:
    stored, since = _stored(settings), time.monotonic()
    while stored < expected:
        if screening.poll() is not None:
            raise StreamingError(f"Screening ended early with exit code {screening.returncode}: {log_file('screen_orders')}")
        if time.monotonic() - since > _STALL_SECONDS:
            raise ReconciliationError(
                f"{expected - stored:,} orders are not in raw_orders, and none came for {_STALL_SECONDS} s"
            )
        time.sleep(0.5)
        now = _stored(settings)
        stored, since = (now, time.monotonic()) if now > stored else (stored, since)


def _stored(settings: Settings) -> int:
    with connect(settings.require("postgres_dsn")) as connection, connection.cursor() as cursor:
        cursor.execute("select count(*) from raw_orders")
        return int(cursor.fetchone()[0])  # type: ignore[index]


def _reasons(found: Account) -> Table:
    table = Table("reason", title="Frauds by reason")
    for title in ("planted", "of these found", "found in all"):
        table.add_column(title, justify="right")
    for reason, planted in found.planted.items():
        table.add_row(reason, f"{planted:,}", "all" if not found.missing_labels else "not all", f"{found.found[reason]:,}")
    return table


def _messages(sent: list[ProduceReport], found: Account) -> Table:
    table = Table("", title="Messages")
    table.add_column("sent", justify="right")
    table.add_column("found", justify="right")
    table.add_column("where")
    due = _due(sent)
    table.add_row("orders", f"{due['orders']:,}", f"{found.orders:,}", "raw_orders, each once")
    table.add_row("  Genuine", "", f"{found.genuine:,}", "")
    planted = sum(report.planted for report in sent)
    table.add_row("  Fraud", f"≥ {planted:,}", f"{found.frauds:,}", "with reasons; alerts on fraud_alert")
    table.add_row("duplicates", f"{due['duplicates']:,}", f"{found.duplicates:,}", "changed nothing")
    table.add_row("broken", f"{due['dead letters']:,}", f"{found.dead_letters:,}", "orders_dead_letter, each with a reason")
    table.add_row("all", f"{due['messages']:,}", f"{found.messages:,}", "the orders topic")
    return table


def _due(sent: list[ProduceReport]) -> dict[str, int]:
    """What has to be found of what was sent."""
    due = {
        "orders": sum(report.orders for report in sent),
        "duplicates": sum(report.duplicates for report in sent),
        "dead letters": sum(sum(report.broken.values()) for report in sent),
    }
    return due | {"messages": sum(due.values())}


def _check(sent: list[ProduceReport], found: Account) -> None:
    counted = {
        "orders": found.orders,
        "duplicates": found.duplicates,
        "dead letters": found.dead_letters,
        "messages": found.messages,
    }
    pairs = {name: (count, counted[name]) for name, count in _due(sent).items()}
    problems = [f"{name}: {due} sent, {there} found" for name, (due, there) in pairs.items() if due != there]
    problems += [f"{name.replace('_', ' ')}: {count}" for name, count in found.disagreements.items()]
    if problems:
        raise ReconciliationError("The counts disagree.\n  " + "\n  ".join(problems))
