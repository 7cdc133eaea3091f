"""How a command of `finpro` runs a Spark job: in its own process, as the driver, beside a JVM that starts meanwhile."""

import os
import shlex
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from py4j.protocol import Py4JNetworkError

from conf.errors import StreamingError
from jobs.spark.submit import environment, is_local, log_file, spark_submit

_SILENT_SECONDS = 10  # a cluster that has cores to spare has started an executor by then


def run_job(job: str, work: Callable[[], None], *, master: str, memory: str, conf: Sequence[str], delta: bool = False) -> None:
    """Do the work of `jobs/<job>.py` in this process.

    Spark starts meanwhile: `work` first imports the job and checks what it needs. In a process that has a Spark already the
    job runs on that one, whatever its properties are.

    Raises:
        FinproError: the job failed; says why and what to do.
    """
    if not has_spark():
        become_driver(job, master=master, memory=memory, conf=conf, delta=delta)
        threading.Thread(target=_start, args=(master,), name="start-spark", daemon=True).start()
    try:
        work()
    except Py4JNetworkError as error:
        raise StreamingError(
            f"Spark's JVM ended by itself: {log_file(job)} may say why. Where it was out of memory, --memory gives it more;"
            " start again, nothing is lost."
        ) from error


def become_driver(job: str, *, master: str, memory: str, conf: Sequence[str], delta: bool = False) -> None:
    """Make this process a driver like the one that spark-submit would start: whatever Spark it starts has the same properties.

    Raises:
        SettingsError: a setting cannot be used.
        PlatformError: a jar is missing and cannot be fetched.
    """
    _program, *options, _job = spark_submit(job, [], master=master, memory=memory, conf=conf, delta=delta)
    os.environ.update(environment(job, master=master))
    os.environ["PYSPARK_SUBMIT_ARGS"] = shlex.join([*options, "pyspark-shell"])


def has_spark() -> bool:
    """Whether a Spark runs in this process."""
    from streaming.jvm import running_context  # with PySpark, which takes long

    return running_context() is not None


def _start(master: str) -> None:
    """Start Spark. Where it cannot be, the job meets that again when it asks for its session, and says so."""
    from pyspark import SparkContext

    with suppress(Exception):
        context = SparkContext.getOrCreate()
        if not is_local(master):
            from streaming.jvm import has_executor

            tell_while_waiting(master, lambda: has_executor(context))


def tell_while_waiting(master: str, is_over: Callable[[], bool], *, every_seconds: float = _SILENT_SECONDS) -> None:
    """Say that a cluster gives no cores, as long as it gives none: Spark itself waits for ever, and says so in its log only.

    Args:
        master: Spark master URL.
        is_over: whether there is something to run tasks on; raises when Spark has ended.
        every_seconds: how long it is silent at first; from then on it doubles.
    """
    waited = 0.0
    while True:
        time.sleep(every_seconds)
        if is_over():
            return
        waited += every_seconds
        every_seconds *= 2
        print(
            f"finpro: waiting for {master} for {waited:.0f} s: no worker has given this job cores and memory. Others may hold"
            " them all; --master 'local[2,4]' does without the cluster.",
            file=sys.stderr,
            flush=True,
        )
