"""The archiving job: `spark-submit jobs/archive_orders.py [options]`, or `finpro archive`."""

import argparse
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from threading import Event, Thread
from typing import NamedTuple

from prometheus_client import CollectorRegistry
from py4j.protocol import Py4JError
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession
from rich.console import Console

from conf.errors import FinproError
from conf.settings import Settings, load_settings
from jobs.spark.running_job import made_known
from jobs.spark.session import job_session, run_as_program
from jobs.spark.streaming_job import Query, run_until_stopped, stop_requested
from streaming.kafka import (
    ORDERS,
    ORDERS_DEAD_LETTER,
    PROCESSED_ORDERS,
    SOURCE_TUNING,
    require_topics,
    spark_config,
    topic_id,
)
from streaming.lakehouse.archive import (
    ArchiveProgress,
    SinkFunction,
    append_to_bronze,
    merge_into_quarantine,
    merge_into_silver,
)
from streaming.lakehouse.continuation import starting_offsets
from streaming.lakehouse.outcomes import archive_outcomes
from streaming.lakehouse.tables import (
    BRONZE_ORDERS,
    OUTCOMES_OF_ORDERS,
    QUARANTINE_ORDERS,
    SILVER_ORDERS,
    Table,
    create_tables,
)
from streaming.screening.metrics import QueryMetrics

TOPICS = (ORDERS, PROCESSED_ORDERS, ORDERS_DEAD_LETTER)
_SECONDS_BETWEEN_COPIES = 60

_log = logging.getLogger(__name__)


class Stream(NamedTuple):
    """One of the archive's streams: the name of its query, a topic, the table that it goes into, and how."""

    query: str
    topic: str
    table: Table
    sink: SinkFunction


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the job; None stands for those of the process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--available-now", action="store_true", help="archive what is there, then end")
    parser.add_argument("--trigger", default="10 seconds", help="how often a micro-batch starts")
    parser.add_argument("--max-offsets-per-trigger", type=int, default=200_000, help="most messages in a micro-batch")
    parser.add_argument(
        "--tasks", type=int, default=2, help="how many tasks write a table, and so the most files a day gets at once"
    )
    parser.add_argument(
        "--skip-forgotten", action="store_true", help="with a new checkpoint: leave out what Kafka has forgotten"
    )
    return parser.parse_args(given)


def check(settings: Settings) -> None:
    """Check what can be checked without Spark: settings and topics.

    Raises:
        FinproError: something is missing or does not answer; says what to do.
    """
    require_topics(settings, TOPICS)


def streams(settings: Settings, tasks: int) -> list[Stream]:
    """The three streams of the archive."""
    lakehouse, orders = settings.lakehouse, settings.topic(ORDERS)
    to_bronze = append_to_bronze(lakehouse, orders, topic_id(settings, ORDERS), tasks)
    return [
        Stream("archive_bronze", ORDERS, BRONZE_ORDERS, to_bronze),
        Stream("archive_silver", PROCESSED_ORDERS, SILVER_ORDERS, merge_into_silver(lakehouse)),
        Stream("archive_quarantine", ORDERS_DEAD_LETTER, QUARANTINE_ORDERS, merge_into_quarantine(lakehouse)),
    ]


def query(
    spark: SparkSession, settings: Settings, stream: Stream, options: argparse.Namespace, console: Console | None = None
) -> Query:
    """A stream as a query to be started, which tells `console` how it fares.

    Raises:
        FinproError: it cannot go on from its checkpoint, or Kafka does not answer.
    """
    checkpoint = f"{settings.checkpoints}/{stream.query}"
    begin = starting_offsets(spark, settings, stream.topic, stream.table, checkpoint, skip_forgotten=options.skip_forgotten)
    messages = (
        spark.readStream.format("kafka")
        .options(**spark_config(settings))
        .option("subscribe", settings.topic(stream.topic))
        .option("startingOffsets", begin)
        .option("maxOffsetsPerTrigger", options.max_offsets_per_trigger)
        .option("includeHeaders", True)
        .options(**SOURCE_TUNING)
        .load()
    )
    trigger = {"availableNow": True} if options.available_now else {"processingTime": options.trigger}
    writer = messages.writeStream.queryName(stream.query).trigger(**trigger)
    return Query(writer.option("checkpointLocation", checkpoint), stream.sink, ArchiveProgress(stream.table, console))


@contextmanager
def outcomes_beside(spark: SparkSession, settings: Settings) -> Iterator[None]:
    """Copy what is stated about orders from Postgres, at the begin and the end of a block, and every minute in between.

    That it cannot be reached keeps nothing from being archived: statements wait where they are, and the log has why.
    """
    if not (dsn := settings.get("postgres_dsn")):
        yield
        return
    over = Event()

    def copy() -> None:
        try:
            if copied := archive_outcomes(spark, settings.lakehouse, dsn):
                _log.info("%s: %d statements", OUTCOMES_OF_ORDERS.name, copied)
        except (FinproError, Py4JError, PySparkException) as error:
            _log.warning("what turned out about orders is not in the lakehouse yet: %s", str(error).splitlines()[0])

    def copy_until_over() -> None:
        while not over.wait(_SECONDS_BETWEEN_COPIES):
            copy()

    copy()
    beside = Thread(target=copy_until_over, name="outcomes", daemon=True)
    beside.start()
    try:
        yield
    finally:
        over.set()
        beside.join()
    copy()


def main(given: Sequence[str] | None = None, *, console: Console | None = None, stop: Event | None = None) -> None:
    """Archive with these options.

    Args:
        given: the options; None stands for those of the process.
        console: where it tells how it fares; by default the process's output.
        stop: ends it between two micro-batches once it is set; by default signals do.

    Raises:
        FinproError: it cannot go on; says why and what to do.
    """
    options, settings = arguments(given), load_settings()
    check(settings)
    registry = CollectorRegistry()
    with (
        job_session({"spark.sql.shuffle.partitions": options.tasks}) as spark,
        nullcontext(stop) if stop else stop_requested(spark) as stopping,
        ExitStack() as held,
    ):
        create_tables(spark, settings.lakehouse)
        held.enter_context(outcomes_beside(spark, settings))
        queries = [query(spark, settings, stream, options, console) for stream in streams(settings, options.tasks)]
        with made_known("archive", registry, settings):
            run_until_stopped(queries, QueryMetrics(registry), stopping)


if __name__ == "__main__":
    run_as_program(main)
