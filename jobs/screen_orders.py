"""The screening job: `spark-submit jobs/screen_orders.py [options]`, or `finpro screen`."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from datetime import timedelta
from functools import partial
from threading import Event
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry
from pyspark.sql import DataFrame, SparkSession
from rich.console import Console

from batch.postgres import told_of_silence
from conf.errors import FinproError, KafkaError, PostgresError, StreamingError
from conf.rules import load_rules
from conf.settings import Settings, load_settings
from jobs.spark.running_job import made_known
from jobs.spark.session import job_session, run_as_program
from jobs.spark.streaming_job import Query, Reporter, run_until_stopped, stop_requested
from streaming.checkpoint import Checkpoint, Ends
from streaming.kafka import (
    ORDERS,
    SOURCE_TUNING,
    forgotten,
    orders_kept,
    require_topics,
    spark_config,
    topic_ids,
)
from streaming.rules.live import LiveRules
from streaming.rules.recorded import record
from streaming.screening.division import By, Division
from streaming.screening.ledger import Ledger, Ranges
from streaming.screening.metrics import QueryMetrics, ScreeningMetrics
from streaming.screening.micro_batch import MicroBatches
from streaming.screening.pipeline import Screening, as_read, warm_up
from streaming.screening.progress import Progress
from streaming.screening.sinks import kafka_sink, require_tables

QUERY_NAME = "screen_orders"


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the job; None stands for those of the process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--available-now", action="store_true", help="screen what is there, then end")
    parser.add_argument("--trigger", default="0 seconds", help='how often a micro-batch starts, such as "1 second"')
    parser.add_argument("--max-offsets-per-trigger", type=int, default=150_000, help="most messages in a micro-batch")
    parser.add_argument("--starting-offsets", default="earliest", help="earliest, latest, or JSON; only without a checkpoint")
    parser.add_argument(
        "--skip-forgotten", action="store_true", help="go on where Kafka has deleted what would come next: it is never screened"
    )
    parser.add_argument("--buckets", type=int, default=2, help="how many tasks screen side by side")
    return parser.parse_args(given)


def screening_of(settings: Settings, options: argparse.Namespace) -> Screening:
    """What every part of the query needs to know."""
    return Screening(
        tasks=options.buckets,
        backlog_offsets=options.max_offsets_per_trigger,
        dsn=settings.require("postgres_dsn"),
        kafka=kafka_sink(settings),
    )


def check(settings: Settings) -> Division:
    """Check what can be checked without Spark: settings, rules, topics, tables. How products are divided by the partitions.

    Warns where the topic's timestamps are its producers'.

    Raises:
        FinproError: something is missing or does not answer; says what to do.
    """
    load_rules(settings.rules)
    partitions = require_topics(settings)[ORDERS]
    kept = orders_kept(settings)
    if kept.loses:
        raise KafkaError(kept.loses)
    if kept.dates:
        print(f"finpro: warning: {kept.dates}", file=sys.stderr)
    require_tables(settings.require("postgres_dsn"))
    return Division(By.PARTITION, partitions)


def require_kept(settings: Settings, reached: Ends) -> None:
    """Check that Kafka still has what comes next.

    Raises:
        KafkaError: it has not: says what is gone, and how to go on.
    """
    gone = forgotten(settings, ORDERS, reached)
    if gone:
        raise _deleted(settings, gone)


def _deleted(settings: Settings, gone: str) -> KafkaError:
    return KafkaError(
        f"Kafka has deleted what comes next of {settings.topic(ORDERS)}: {gone}. Its retention is shorter than screening"
        " was away, and starting again does not help. `finpro screen --skip-forgotten` goes on with what is left. What is"
        " gone is not screened then (where the archive has it, `finpro screen --from-bronze` does that)."
    )


@contextmanager
def _loss_named(settings: Settings, ledger: Ledger, ask_topic_id: Callable[[], str], *, skip: bool) -> Iterator[None]:
    """What fails in the block because Kafka has lost or deleted messages in the meantime says so."""
    try:
        yield
    except (KafkaError, StreamingError) as error:
        lost = _lost(settings, ledger, ask_topic_id, skip=skip)
        if lost:
            raise lost from error
        raise


def _lost(settings: Settings, ledger: Ledger, ask_topic_id: Callable[[], str], *, skip: bool) -> FinproError | None:
    """What is to be said of messages that Kafka no longer has; None where it has them all, or cannot be asked now."""
    with suppress(PostgresError, KafkaError):
        gone = forgotten(settings, ORDERS, ledger.reached())  # first: it waits less for a Kafka that is not there
        if gone and not skip:
            return _deleted(settings, gone)
        try:
            ledger.require_topic(ask_topic_id())
        except StreamingError as made_anew:  # also by a broker that came back without its data
            return made_anew
    return None


class _Watching(NamedTuple):
    """Looks as often as it reports whether the rules have changed, and whether this process still is the driver."""

    rules: LiveRules
    ledger: Ledger
    reporter: Reporter

    def show(self, progress: Any, *, finished: bool = False) -> None:
        if not finished:
            self.rules.look()
            self.ledger.require_held()
        self.reporter.show(progress, finished=finished)


def messages_of(spark: SparkSession, settings: Settings, options: argparse.Namespace, ranges: Ranges) -> DataFrame:
    """What lies on `orders` in these ranges of offsets, as the query reads it."""
    topic = settings.topic(ORDERS)
    offsets = ({partition: place[side] for partition, place in ranges.items()} for side in (0, 1))
    first, end = (json.dumps({topic: {str(partition): offset for partition, offset in side.items()}}) for side in offsets)
    messages = (
        spark.read.format("kafka")
        .options(**spark_config(settings))
        .option("assign", json.dumps({topic: list(ranges)}))
        .option("startingOffsets", first)
        .option("endingOffsets", end)
        .option("failOnDataLoss", not options.skip_forgotten)
        .options(**SOURCE_TUNING)
        .load()
    )
    return as_read(messages, options.buckets)


def screen(
    spark: SparkSession,
    settings: Settings,
    options: argparse.Namespace,
    division: Division,
    console: Console | None,
    stop: Event | None,
) -> None:
    """Screen until stopped, or until what is there has been screened; `main` has the same `console` and `stop`.

    Raises:
        FinproError: it cannot go on; says why and what to do.
    """
    screening = screening_of(settings, options)
    warm_up(spark, options.buckets, screening.kafka)
    checkpoint = Checkpoint(spark, f"{settings.checkpoints}/{QUERY_NAME}")
    if checkpoint.has_state_of_sparks():
        raise StreamingError(
            f"The checkpoint {checkpoint.folder} was made by an older version of finpro, which kept its state there. Move it"
            " away and start anew, as docs/runbook.md says (upgrade): nothing is lost or doubled."
        )
    registry = CollectorRegistry()
    progress, metrics = Progress(console), ScreeningMetrics(registry, load_rules(settings.rules).names)
    ask_topic_id = topic_ids(settings, ORDERS)
    keep = timedelta(days=settings.ledger_days)
    with closing(Ledger(screening.dsn, checkpoint.folder, keep=keep, say=progress.waits)) as ledger:
        reached = ledger.require_continues(checkpoint, ask_topic_id())
        if reached and not options.skip_forgotten:
            require_kept(settings, reached)
        rules = LiveRules(settings.rules, partial(record, spark, settings.lakehouse), reports=[progress, metrics])
        micro_batches = MicroBatches(
            screening,
            checkpoint,
            ledger,
            rules,
            ask_topic_id,
            partial(messages_of, spark, settings, options),
            division,
            progress.shuffles,
            [progress.settled, metrics.settled],
        )
        messages = (
            spark.readStream.format("kafka")
            .options(**spark_config(settings))
            .option("subscribe", settings.topic(ORDERS))
            .option("startingOffsets", options.starting_offsets)
            .option("maxOffsetsPerTrigger", options.max_offsets_per_trigger)
            .option("failOnDataLoss", not options.skip_forgotten)
            .options(**SOURCE_TUNING)
            .load()
        )
        query = (
            as_read(messages, options.buckets)
            .writeStream.queryName(QUERY_NAME)
            .option("checkpointLocation", checkpoint.folder)
            .trigger(**({"availableNow": True} if options.available_now else {"processingTime": options.trigger}))
        )
        asked_to_stop = nullcontext(stop) if stop else stop_requested(spark)
        with (
            made_known("screen", registry, settings),
            asked_to_stop as stopping,
            told_of_silence(screening.dsn, progress.waits),
            _loss_named(settings, ledger, ask_topic_id, skip=options.skip_forgotten),
        ):
            watching = Query(query, micro_batches, _Watching(rules, ledger, progress))
            run_until_stopped([watching], QueryMetrics(registry), stopping)


def main(given: Sequence[str] | None = None, *, console: Console | None = None, stop: Event | None = None) -> None:
    """Screen with these options.

    Args:
        given: the options; None stands for those of the process.
        console: where it tells how it fares; by default the process's output.
        stop: ends it between two micro-batches once it is set; by default signals do.

    Raises:
        FinproError: it cannot go on; says why and what to do.
    """
    options, settings = arguments(given), load_settings()
    by_partition = check(settings)
    with job_session({"spark.sql.shuffle.partitions": options.buckets}) as spark:
        screen(spark, settings, options, by_partition, console, stop)


if __name__ == "__main__":
    run_as_program(main)
