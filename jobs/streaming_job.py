"""Running a streaming query as a service: until it ends, fails, or the process is told to stop."""

import re
import signal
import threading
import time
from typing import Any, ClassVar

from py4j.java_gateway import JavaObject
from pyspark.errors import StreamingQueryException
from pyspark.java_gateway import ensure_callback_server_started
from pyspark.sql import SparkSession
from pyspark.sql.streaming import DataStreamWriter, StreamingQuery

from conf.errors import FinproError, KafkaError, StreamingError, raised_elsewhere
from streaming.progress import Progress

_POLL_SECONDS = 0.2
_GRACE_SECONDS = 120


class _StopRequest:
    """Set by SIGTERM or SIGINT.

    Under spark-submit the JVM is the process that gets the signal, and would begin to shut down in the middle of a
    micro-batch: so its handlers are replaced by this object.
    """

    class Java:
        implements: ClassVar = ["sun.misc.SignalHandler"]

    def __init__(self, spark: SparkSession) -> None:
        self.event = threading.Event()
        gateway: Any = spark.sparkContext._gateway
        ensure_callback_server_started(gateway)  # type: ignore[no-untyped-call]
        jvm = gateway.jvm
        for name in ("TERM", "INT"):
            jvm.sun.misc.Signal.handle(jvm.sun.misc.Signal(name), self)
            signal.signal(getattr(signal, f"SIG{name}"), lambda *_: self.event.set())

    def handle(self, _signal: JavaObject) -> None:
        """Called by the JVM."""
        self.event.set()


def run_until_stopped(spark: SparkSession, writer: DataStreamWriter, progress: Progress) -> None:
    """Start a query and wait for its end, printing progress. On SIGTERM or SIGINT it finishes its micro-batch first.

    Raises:
        FinproError: the query failed; says why and what to do.
    """
    stop = _StopRequest(spark)
    try:
        query = writer.start()
        while query.isActive and not stop.event.wait(_POLL_SECONDS):
            progress.show(query.lastProgress)
        if query.isActive:
            _stop_between_batches(query)
        query.awaitTermination()
        progress.show(query.lastProgress, finished=True)
    except StreamingQueryException as error:
        raise _cause(error) from error
    finally:
        spark.stop()


def _stop_between_batches(query: StreamingQuery) -> None:
    """Stop a query once the micro-batch that it is in has been committed."""
    running = query.lastProgress["batchId"] if query.lastProgress else None
    give_up = time.monotonic() + _GRACE_SECONDS
    while query.isActive and query.status["isTriggerActive"] and time.monotonic() < give_up:
        committed = query.lastProgress["batchId"] if query.lastProgress else None
        if committed != running:
            break
        time.sleep(0.01)
    query.stop()


def _cause(error: StreamingQueryException) -> FinproError:
    """What a person can do about a failed query."""
    text = str(error)
    ours = raised_elsewhere(text)
    if ours:
        return ours
    if "org.apache.kafka" in text:
        return KafkaError(f"Kafka stopped answering: is it running? Start again, nothing is lost.\n({_last_cause(text)})")
    return StreamingError(
        f"The query failed: {_last_cause(text)}\nStart again, nothing is lost; --debug shows where it failed."
    )


def _last_cause(text: str) -> str:
    """The line of a captured stack trace that names the innermost exception."""
    described = text.split("=== Streaming Query ===")[0]
    causes = [line for line in described.splitlines() if re.match(r"(Caused by: )?[\w.$]+(Error|Exception)\b.*: ", line)]
    return (causes[-1] if causes else described.strip().splitlines()[0]).removeprefix("Caused by: ")
