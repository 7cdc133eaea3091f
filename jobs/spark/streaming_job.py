"""Running streaming queries as a service: until they end, one fails, or the process is told to stop."""

import json
import logging
import re
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from signal import SIGINT, SIGTERM
from typing import Any, ClassVar, NamedTuple, Protocol

from py4j.java_gateway import JavaObject
from pyspark.errors import StreamingQueryException
from pyspark.java_gateway import ensure_callback_server_started
from pyspark.sql import SparkSession
from pyspark.sql.streaming import DataStreamWriter, StreamingQuery

from conf.errors import FinproError, KafkaError, StreamingError, raised_elsewhere
from streaming.screening.metrics import QueryMetrics

_log = logging.getLogger(__name__)

_POLL_SECONDS = 0.2
_REPORT_SECONDS = 1.0
_GRACE_SECONDS = 120


@contextmanager
def stop_requested(spark: SparkSession) -> Iterator[threading.Event]:
    """Inside the block SIGTERM and SIGINT only set this event, and the process goes on.

    The JVM's handlers give way too: it would begin to shut down in the middle of a micro-batch. Under spark-submit it is the
    process that gets the signal; elsewhere it gets what is sent to a whole group. (In a thread that is not the main one Python
    has no say about signals: there only the caller sets the event.)
    """
    request = _StopRequest()
    gateway: Any = spark.sparkContext._gateway
    ensure_callback_server_started(gateway)  # type: ignore[no-untyped-call]
    java = gateway.jvm.sun.misc.Signal
    usual = {name: java.handle(java(name), request) for name in ("TERM", "INT")}
    is_main = threading.current_thread() is threading.main_thread()
    usual_here = {number: signal.signal(number, request.handle) for number in (SIGTERM, SIGINT) if is_main}
    try:
        yield request.event
    finally:
        for name, handler in usual.items():
            java.handle(java(name), handler)
        for number, handler in usual_here.items():
            signal.signal(number, handler)


class _StopRequest:
    """Handles signals, of the JVM and of this process."""

    class Java:
        implements: ClassVar = ["sun.misc.SignalHandler"]

    def __init__(self) -> None:
        self.event = threading.Event()

    def handle(self, *_: Any) -> None:
        """Called with the signal."""
        self.event.set()


class _Events:
    """Passes Spark's events on to the metrics, as JSON: what PySpark makes of them asks the JVM for each field."""

    class Java:
        implements: ClassVar = ["org.apache.spark.sql.streaming.PythonStreamingQueryListener"]

    def __init__(self, spark: SparkSession, metrics: QueryMetrics) -> None:
        self._metrics = metrics
        gateway: Any = spark.sparkContext._gateway
        ensure_callback_server_started(gateway)  # type: ignore[no-untyped-call]
        spark.streams._jsqm.addListener(gateway.jvm.org.apache.spark.sql.streaming.PythonStreamingQueryListenerWrapper(self))

    # Called by the JVM, under these names.

    def onQueryStarted(self, event: JavaObject) -> None:  # noqa: N802
        self._metrics.started(json.loads(event.json()))

    def onQueryProgress(self, event: JavaObject) -> None:  # noqa: N802
        self._metrics.progressed(json.loads(event.json()))

    def onQueryIdle(self, event: JavaObject) -> None:  # noqa: N802
        self._metrics.idle(json.loads(event.json()))

    def onQueryTerminated(self, event: JavaObject) -> None:  # noqa: N802
        self._metrics.terminated(json.loads(event.json()))


def _tell(metrics: QueryMetrics, spark: SparkSession) -> None:
    """From now on the metrics hear of all queries. That they cannot is no reason to stop."""
    try:
        _Events(spark, metrics)
    except Exception:
        _log.exception("there are no metrics of the queries")


class Reporter(Protocol):
    """Tells people how a query fares."""

    def show(self, progress: Any, *, finished: bool = False) -> None:
        """Called every second, and with `finished` at the end; `progress` is Spark's own of the last micro-batch, if any."""


class Query(NamedTuple):
    """A query to be started, and who tells of it.

    Attributes:
        writer: the query.
        reporter: is told how it fares.
    """

    writer: DataStreamWriter
    reporter: Reporter


def run_until_stopped(spark: SparkSession, queries: Sequence[Query], metrics: QueryMetrics, stop: threading.Event) -> None:
    """Start queries, wait for the end of all, and report. When `stop` is set, each finishes its micro-batch first.

    When one fails, the others are stopped in the same way.

    Args:
        spark: the queries' session.
        queries: what to run.
        metrics: hears of all that happens to the queries.
        stop: see `stop_requested`.

    Raises:
        FinproError: a query failed; says why and what to do.
    """
    _tell(metrics, spark)
    try:
        running = [_Running(query, query.writer.start()) for query in queries]
        _report_until_the_end(running, stop)
        _stop_between_batches([one.started for one in running])
        for one in running:
            one.started.awaitTermination()
            one.query.reporter.show(one.started.lastProgress, finished=True)
    except StreamingQueryException as error:
        raise _cause(error) from error


class _Running(NamedTuple):
    query: Query
    started: StreamingQuery

    def has_failed(self) -> bool:
        """Whether it has ended by an error."""
        return not self.started.isActive and self.started.exception() is not None


def _report_until_the_end(running: Sequence[_Running], stop: threading.Event) -> None:
    """Report every second until all queries have ended, one has failed, or `stop` is set."""
    reported_at = time.monotonic()
    while not any(one.has_failed() for one in running) and any(one.started.isActive for one in running):
        if stop.wait(_POLL_SECONDS):
            break
        if time.monotonic() - reported_at >= _REPORT_SECONDS:
            reported_at = time.monotonic()
            for one in running:
                one.query.reporter.show(one.started.lastProgress)


def _stop_between_batches(queries: Sequence[StreamingQuery]) -> None:
    """Stop each query that is active once the micro-batch that it is in has been committed."""
    busy = {query: _committed(query) for query in queries if query.isActive}
    give_up = time.monotonic() + _GRACE_SECONDS
    while busy:
        for query, batch in list(busy.items()):
            is_done = not query.isActive or not query.status["isTriggerActive"] or _committed(query) != batch
            if is_done or time.monotonic() > give_up:
                query.stop()
                del busy[query]
        time.sleep(0.01)


def _committed(query: StreamingQuery) -> int | None:
    """The micro-batch that was committed last."""
    progress = query.lastProgress
    return progress["batchId"] if progress else None


def _cause(error: StreamingQueryException) -> FinproError:
    """What a person can do about a failed query."""
    text = str(error)
    ours = raised_elsewhere(text)
    if ours:
        return ours
    if "overflows when converting to Spark's microsecond-precision TimestampType" in text:
        return KafkaError(
            "Spark cannot read a message, and starting again does not help: its timestamp, which its producer gave, is beyond"
            " what can be held (nanoseconds in the place of milliseconds?). docs/runbook.md says how to go on: a timestamp that"
            f" Spark cannot hold.\n({_named_cause(text, 'KafkaIllegalStateException')})"
        )
    for exception, advice in _KNOWN_CAUSES.items():
        if exception in text:
            kind = KafkaError if "kafka" in exception else StreamingError
            return kind(f"{advice}\n({_named_cause(text, exception)})")
    return StreamingError(
        f"The query failed, why is not known: {_last_cause(text)}\nWhat was committed is complete, and starting again goes on"
        " from there, which helps if the cause has passed; --debug shows where it failed."
    )


# What a captured stack trace names → what is known of it, and what to do. The first that it names counts.
_KNOWN_CAUSES = {
    "java.lang.OutOfMemoryError": (
        "The JVM has too little memory for a micro-batch. Start again with more (--memory), or with smaller micro-batches"
        " (--max-offsets-per-trigger): one that is planned already is screened in parts then. Nothing is lost."
    ),
    "org.apache.kafka.common.errors.TopicAuthorizationException": (
        "Kafka refuses this login a topic: it needs Read on orders, and Write on what screening writes to. Nothing is lost."
    ),
    "org.apache.kafka.common.errors.UnknownTopicOrPartitionException": (
        "Kafka no longer has a topic that it had: was it deleted? `finpro migrate` creates what is missing."
    ),
    "org.apache.kafka.common.errors.TimeoutException": (
        "Kafka stopped answering: is it running? Start again when it is, nothing is lost."
    ),
    "org.apache.kafka.clients.consumer.OffsetOutOfRangeException": (
        "Kafka no longer has the messages that come next: it has deleted them, or lost them."
    ),
}


def _named_cause(text: str, exception: str) -> str:
    """What an exception in a captured stack trace says."""
    match = re.search(rf"{exception}: (.*)", text)
    return match[1].strip() if match else _last_cause(text)


def _last_cause(text: str) -> str:
    """The line of a captured stack trace that names the innermost exception."""
    described = text.split("=== Streaming Query ===")[0]
    causes = [line for line in described.splitlines() if re.match(r"(Caused by: )?[\w.$]+(Error|Exception)\b.*: ", line)]
    return (causes[-1] if causes else described.strip().splitlines()[0]).removeprefix("Caused by: ")
