"""`finpro demo`: the whole flow on the embedded platform, on real input, ending in a table that has to add up.

Steps that do not depend on each other run side by side. What needs Spark runs in this process, on one Spark; the warehouse's
commands run in a second one. Modules that take long to import are imported by the step that needs them.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from subprocess import Popen, TimeoutExpired
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from conf.errors import ReconciliationError, StreamingError
from conf.settings import finpro_home, load_settings
from jobs.local.class_archive import archiving
from jobs.local.platform import Platform, Service, own_home, start
from jobs.spark.driver import become_driver
from jobs.spark.submit import log_file
from jobs.steps.board import Board, Voice
from jobs.steps.second_process import SecondProcess
from jobs.steps.side_by_side import Step, run

if TYPE_CHECKING:
    from pyspark import SparkContext

    from streaming.shop.accounting import Account, Offsets
    from streaming.shop.producer import ProduceReport

USERS, PRODUCTS = 20_000, 1_000
_BROKEN, _DUPLICATES = 0.005, 0.01
_HISTORY = timedelta(days=30)
_STALL_SECONDS = 120
_POLL_SECONDS = 0.2
_LOG = "demo"
_SERVICES = ("postgres", "gcs", "kafka", "bigquery")
_SLOW_IMPORTS = ("expectations.gate", "dbt.cli.main", "dbt.adapters.bigquery", "batch.warehouse.reconcile", "jobs.report")


def demo(*, orders: int, rate: float, seed: int) -> None:
    """Run the flow and print what became of every message.

    Raises:
        ReconciliationError: a count disagrees.
        FinproError: a step failed.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it ends in order, as after Ctrl-C
    began = time.monotonic() - time.process_time()  # until here nothing was waited for, only imported
    console = Console(highlight=False)
    own_home()
    try:
        with archiving(), Flow(orders, rate, seed) as flow, Board(console, began) as board:
            run(flow.steps(), board, flow.give_up)
    except KeyboardInterrupt:
        console.print("Interrupted: what had begun has ended, the platform runs on. The next demo goes on from here.")
        raise
    board.print_where_the_time_went()
    console.print(f"Open {finpro_home() / 'report.html'} to see what the marts say.", soft_wrap=True)
    console.print(
        '`eval "$(.venv/bin/finpro env)"` shows the way in; `.venv/bin/finpro down` stops the platform, its data stay.'
    )


class Flow:
    """The steps, and what they hand to each other. At the end of the block nothing runs any more but the platform."""

    def __init__(self, orders: int, rate: float, seed: int) -> None:
        self._orders, self._rate, self._seed = orders, rate, seed
        self._settings, self._environment = load_settings(), dict[str, str]()
        self._sent: list[ProduceReport] = []
        self._since: dict[str, Offsets] = {}
        self._run_id = ""
        self._is_over, self._all_screened = threading.Event(), threading.Event()
        self._spark, self._second = _Spark(), SecondProcess(_SLOW_IMPORTS)

    def steps(self) -> list[Step]:
        """What is done, and what each waits for."""
        return [
            Step("platform", "Kafka, Postgres, Cloud Storage and BigQuery", self._platform, reaches=_SERVICES),
            Step("spark", "one for all that needs it", self._start_spark, after=["postgres"]),
            Step("generate", "users and products", self._generate, after=["postgres"]),
            Step("produce", "orders in", self._produce, after=["kafka", "generate"]),
            Step("screen", "verdicts out", self._screen, after=["kafka", "spark"]),
            Step("import", "Great Expectations and dbt, in a second process", self._import, after=["spark"]),
            Step("account", "every message accounted for", self._account, after=["screen"]),
            Step("archive", "messages and verdicts to the lakehouse", self._archive, after=["screen"]),
            Step("audit", "every verdict given once more", self._audit, after=["archive"]),
            Step("export", "Postgres to Parquet", self._export, after=["screen", "gcs"]),
            Step("load", "Parquet to BigQuery", self._command("load"), after=["export", "import", "bigquery"]),
            Step("reconcile", "both sides compared", self._command("reconcile"), after=["load"]),
            Step("validate", "the gate", self._command("validate"), after=["reconcile"]),
            Step("transform", "facts, dimensions and marts", self._command("transform"), after=["validate"]),
            Step("report", "what the marts say", self._report, after=["transform"]),
        ]

    def __enter__(self) -> "Flow":
        return self

    def __exit__(self, *_: object) -> None:
        _hear_no_more()
        self._second.end()
        self._spark.end()

    def give_up(self) -> None:
        """Have the steps that are at work end soon."""
        _hear_no_more()
        self._is_over.set()
        self._all_screened.set()
        self._second.end()
        self._spark.cancel()

    # --- what the others need -----------------------------------------------------------------------------------------

    def _platform(self, voice: Voice) -> None:
        def ready(platform: Platform, service: Service) -> None:
            # All have ports by now. This one's will not change any more.
            self._settings, self._environment = platform.settings(), platform.environment()
            os.environ.update(self._environment)
            voice.say(f"{service.daemon.name} at {service.address}")
            voice.reached(service.daemon.name)

        start(ready)

    def _start_spark(self, voice: Voice) -> None:
        version = self._spark.start()
        voice.say(f"Spark {version} logs to {log_file(_LOG)}")

    def _import(self, voice: Voice) -> None:
        self._second.start(voice.say)

    # --- orders in, verdicts out --------------------------------------------------------------------------------------

    def _generate(self, voice: Voice) -> None:
        from batch.reference_data import generate

        dsn = self._settings.require("postgres_dsn")
        for loaded in generate(dsn, user_count=USERS, product_count=PRODUCTS, seed=1):
            voice.say(f"{loaded.table}: {loaded.inserted:,} inserted, {loaded.unchanged:,} unchanged")

    def _produce(self, voice: Voice) -> None:
        from streaming.kafka import ORDERS, ORDERS_DEAD_LETTER, PROCESSED_ORDERS
        from streaming.shop.accounting import end_offsets
        from streaming.shop.producer import produce

        settings = self._settings
        self._wait_until_screened(voice)  # what is left of a run that was interrupted
        self._since = {topic: end_offsets(settings, topic) for topic in (ORDERS, PROCESSED_ORDERS, ORDERS_DEAD_LETTER)}
        send = partial(
            produce,
            settings,
            seed=self._seed,
            broken=_BROKEN,
            duplicates=_DUPLICATES,
            on_progress=lambda progress: voice.now(str(progress)),
            stop=self._is_over.is_set,
        )
        # On a new platform half of the orders are history, which came at once: charts by day need days.
        history = 0 if self._has_orders() else self._orders // 2
        if history:
            self._sent.append(send(orders=history, rate=0, event_rate=history / _HISTORY.total_seconds()))
            voice.say(f"produced, as history of {_HISTORY.days} days  {self._sent[-1]}")
        self._sent.append(send(orders=self._orders - history, rate=self._rate))
        voice.say(f"produced  {self._sent[-1]}")
        self._wait_until_screened(voice)
        self._all_screened.set()

    def _has_orders(self) -> bool:
        from batch.postgres import connect

        with (
            connect(self._settings.require("postgres_dsn"), application_name="finpro demo") as connection,
            connection.cursor() as cursor,
        ):
            cursor.execute("select from raw_orders limit 1")
            return bool(cursor.rowcount)

    def _wait_until_screened(self, voice: Voice) -> None:
        """Wait for the verdicts on all orders that Kafka has by now.

        Raises:
            ReconciliationError: none comes for long.
        """
        from streaming.kafka import ORDERS, TopicReader, librdkafka_config

        with TopicReader(librdkafka_config(self._settings), self._settings.topic(ORDERS)) as reader:
            kept = reader.kept()
        left, since = self._unscreened(kept), time.monotonic()
        while left and not self._is_over.wait(_POLL_SECONDS):
            voice.now(f"{left:,} messages are not screened yet")
            if time.monotonic() - since > _STALL_SECONDS:
                raise ReconciliationError(f"{left:,} messages are not screened, and none was for {_STALL_SECONDS} s.")
            now = self._unscreened(kept)
            left, since = (now, time.monotonic()) if now < left else (left, since)

    def _unscreened(self, kept: dict[int, tuple[int, int]]) -> int:
        """How many of these messages, by their partition, are not screened yet."""
        from streaming.committed import last_settled
        from streaming.kafka import ORDERS

        newest = last_settled(self._settings)
        read = newest.ends.get(self._settings.topic(ORDERS), {}) if newest else {}
        return sum(max(0, end - max(first, read.get(partition, 0))) for partition, (first, end) in kept.items())

    def _screen(self, voice: Voice) -> None:
        from jobs import screen_orders

        options = ["--max-offsets-per-trigger", "20000"]
        self._spark.run(partial(screen_orders.main, options, console=voice.ticker, stop=self._all_screened))
        voice.say(voice.newest)

    def _account(self, voice: Voice) -> None:
        from streaming.shop.accounting import account

        found = account(self._settings, self._since)
        voice.console.print(_reasons(found), soft_wrap=False)
        voice.console.print(_messages(self._sent, found), soft_wrap=False)
        check(self._sent, found)
        voice.console.print("[green]Every order sent is in raw_orders exactly once.[/]")

    # --- the lakehouse ------------------------------------------------------------------------------------------------

    def _archive(self, voice: Voice) -> None:
        from jobs import archive_orders

        self._spark.run(partial(archive_orders.main, ["--available-now"], console=voice.console, stop=self._is_over))

    def _audit(self, voice: Voice) -> None:
        from jobs import audit

        self._spark.run(partial(audit.main, ["--limit", "3"], console=voice.console))

    # --- the warehouse ------------------------------------------------------------------------------------------------

    def _export(self, voice: Voice) -> None:
        from batch.warehouse.export import new_run_id
        from jobs import export_raw

        self._run_id = new_run_id(datetime.now(UTC))
        self._spark.run(partial(export_raw.main, ["--run-id", self._run_id], say=voice.say))

    def _command(self, name: str) -> Callable[[Voice], None]:
        """The work of a command of finpro's that is about an export run."""
        return lambda voice: self._run_command([name, "--run-id", self._run_id], voice)

    def _report(self, voice: Voice) -> None:
        self._run_command(["report"], voice)
        self._second.dismiss()

    def _run_command(self, arguments: list[str], voice: Voice) -> None:
        self._second.run(arguments, self._environment, voice.say)


def _hear_no_more() -> None:
    """What is cut off from here on is no news: Py4J would print a stack trace of a call that the JVM no longer answers."""
    logging.getLogger().addHandler(logging.NullHandler())


class _Spark:
    """The Spark of this process, and its JVM."""

    _jvm: Popen[bytes]

    def __init__(self) -> None:
        self._context: SparkContext | None = None

    def start(self) -> str:
        """Start it, and give its version."""
        from pyspark.sql import SparkSession

        from streaming.jvm import process_of

        # A shuffle of some thousand rows, in as many tasks as there are cores: 200 would take the audit a minute.
        become_driver(_LOG, master="local[2,4]", memory="1g", conf=["spark.sql.shuffle.partitions=2"], delta=True)
        self._context = SparkSession.builder.getOrCreate().sparkContext
        self._jvm = process_of(self._context)
        return self._context.version

    def run(self, job: Callable[[], None]) -> None:
        """Run a job on it.

        Raises:
            StreamingError: the JVM has ended by itself.
            FinproError: the job failed.
        """
        try:
            job()
        except Exception as error:
            with suppress(TimeoutExpired):  # it has not ended, so that is not why
                self._jvm.wait(timeout=1)
                raise StreamingError(f"Spark's JVM ended by itself: {log_file(_LOG)} may say why.") from error
            raise

    def cancel(self) -> None:
        """Have what is at work on it fail soon."""
        if self._context:
            with suppress(Exception):  # its JVM may be no more
                self._context.cancelAllJobs()

    def end(self) -> None:
        """End it, if it was started, with the JVM."""
        if self._context:
            with suppress(Exception):
                self._context.stop()
            self._jvm.communicate()  # the end of its input has it end


def _reasons(found: "Account") -> Table:
    table = Table("reason", title="Frauds by reason")
    for title in ("planted", "of these found", "found in all"):
        table.add_column(title, justify="right")
    for reason, planted in found.planted.items():
        table.add_row(reason, f"{planted:,}", "all" if not found.missing_labels else "not all", f"{found.found[reason]:,}")
    return table


def _messages(sent: list["ProduceReport"], found: "Account") -> Table:
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


def _due(sent: list["ProduceReport"]) -> dict[str, int]:
    """What has to be found of what was sent."""
    due = {
        "orders": sum(report.orders for report in sent),
        "duplicates": sum(report.duplicates for report in sent),
        "dead letters": sum(sum(report.broken.values()) for report in sent),
    }
    return due | {"messages": sum(due.values())}


def check(sent: list["ProduceReport"], found: "Account") -> None:
    """Check that all that was sent was found, and that nothing found is wrong.

    Raises:
        ReconciliationError: a count disagrees; names each.
    """
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
