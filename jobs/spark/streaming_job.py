"""Running streaming queries as a service: until they end, one fails, or the process is told to stop."""

import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from signal import SIGINT, SIGTERM
from typing import Any, NamedTuple, Protocol

from pyspark.errors import StreamingQueryException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.streaming import DataStreamWriter, StreamingQuery

from conf.errors import FinproError, KafkaError, StreamingError, raised_elsewhere
from streaming.jvm import signals_of_the_jvm
from streaming.screening.metrics import QueryMetrics

_POLL_SECONDS = 0.2
_REPORT_SECONDS = 1.0
_GRACE_SECONDS = 120


@contextmanager
def stop_requested(spark: SparkSession) -> Iterator[threading.Event]:
    """Inside the block SIGTERM and SIGINT only set this event, and the process goes on; the JVM's handlers give way too.

    (In a thread that is not the main one Python has no say about signals: there only the caller sets the event.)
    """
    stop = threading.Event()

    def request(*_: Any) -> None:
        stop.set()

    is_main = threading.current_thread() is threading.main_thread()
    with signals_of_the_jvm(spark, request):
        usual = {number: signal.signal(number, request) for number in (SIGTERM, SIGINT) if is_main}
        try:
            yield stop
        finally:
            for number, handler in usual.items():
                signal.signal(number, handler)


class Reporter(Protocol):
    """Tells people how a query fares."""

    def show(self, progress: Any, *, finished: bool = False) -> None:
        """Called every second, and with `finished` at the end; `progress` is Spark's own of the last micro-batch, if any."""


class Query(NamedTuple):
    """A query to be started, and who tells of it.

    Attributes:
        writer: the query, without what it does.
        work: what `foreachBatch` calls: given the rows of a micro-batch, and its number.
        reporter: is told how it fares.
    """

    writer: DataStreamWriter
    work: Callable[[DataFrame, int], None]
    reporter: Reporter


def run_until_stopped(queries: Sequence[Query], metrics: QueryMetrics, stop: threading.Event) -> None:
    """Start queries, wait for the end of all, and report. When `stop` is set, each finishes its micro-batch first.

    When one fails, the others are stopped in the same way.

    Args:
        queries: what to run.
        metrics: hears of all that happens to the queries.
        stop: see `stop_requested`.

    Raises:
        FinproError: a query failed; says why and what to do.
    """
    running = [_Running(query, metrics) for query in queries]
    try:
        _report_until_the_end(running, stop)
        _stop_between_batches(running)
        for one in running:
            one.wait()
            one.query.reporter.show(one.started.lastProgress, finished=True)
    except StreamingQueryException as error:
        raise _cause(error) from error
    finally:
        for one in running:
            one.tell_of_the_end()


class _Gate:
    """Lets micro-batches be worked on until it is closed.

    Spark has no way to stop a query between two micro-batches: whoever looks whether it is in one, and stops it if not, may
    stop the next, which has begun in the meantime.
    """

    def __init__(self, work: Callable[[DataFrame, int], None]) -> None:
        self._work, self._lock = work, threading.Lock()
        self._is_closed, self._begun = False, -1
        self.has_refused = False

    def __call__(self, rows: DataFrame, number: int) -> None:
        with self._lock:
            if self._is_closed:
                self.has_refused = True
                raise StreamingError(f"Micro-batch {number} waits for the next start: the job was told to stop.")
            self._begun = number
        self._work(rows, number)

    def close(self) -> int:
        """From now on no micro-batch begins. Returns the number of the last that did, -1 for none."""
        with self._lock:
            self._is_closed = True
            return self._begun


class _Running:
    """A query that has been started, and what its metrics have heard."""

    def __init__(self, query: Query, metrics: QueryMetrics) -> None:
        self.query, self.gate = query, _Gate(query.work)
        self.started = query.writer.foreachBatch(self.gate).start()
        self._metrics, self._told = metrics, -1
        metrics.started(self.started.name)

    def has_failed(self) -> bool:
        """Whether it has ended by an error."""
        return not self.started.isActive and not self.gate.has_refused and self.started.exception() is not None

    def wait(self) -> None:
        """Wait for its end.

        Raises:
            StreamingQueryException: it has ended by an error.
        """
        try:
            self.started.awaitTermination()
        except StreamingQueryException:
            if not self.gate.has_refused:
                raise

    def tell(self) -> None:
        """Tell the metrics of the micro-batches since the last time: Spark keeps more of them than a second brings."""
        for progress in self.started.recentProgress:
            if progress["batchId"] > self._told:
                self._told = progress["batchId"]
                self._metrics.progressed(progress)

    def tell_if_idle(self) -> None:
        """Tell the metrics when it waits for something to read: as seen in this moment."""
        status = self.started.status
        if not status["isDataAvailable"] and not status["isTriggerActive"] and self.started.isActive:
            self._metrics.idle(self.started.name)

    def tell_of_the_end(self) -> None:
        """Tell the metrics how it has ended."""
        with suppress(Exception):  # where the JVM is gone, nobody knows
            self.tell()
            self._metrics.ended(self.started.name, failed=self.has_failed())


def _report_until_the_end(running: Sequence[_Running], stop: threading.Event) -> None:
    """Report every second until all queries have ended, one has failed, or `stop` is set."""
    reported_at = time.monotonic()
    while not any(one.has_failed() for one in running) and any(one.started.isActive for one in running):
        if stop.wait(_POLL_SECONDS):
            break
        for one in running:
            one.tell_if_idle()
        if time.monotonic() - reported_at >= _REPORT_SECONDS:
            reported_at = time.monotonic()
            for one in running:
                one.tell()
                one.query.reporter.show(one.started.lastProgress)


def _stop_between_batches(queries: Sequence[_Running]) -> None:
    """Stop each query that is active once the micro-batch that it is in has been committed."""
    begun = {query: query.gate.close() for query in queries}
    give_up = time.monotonic() + _GRACE_SECONDS
    while begun:
        for query, number in list(begun.items()):
            if not query.started.isActive or _committed(query.started) >= number or time.monotonic() > give_up:
                query.started.stop()
                del begun[query]
        time.sleep(0.01)


def _committed(query: StreamingQuery) -> int:
    """The micro-batch that was committed last, -1 for none."""
    progress = query.lastProgress
    return int(progress["batchId"]) if progress else -1


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
