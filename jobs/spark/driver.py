"""How a command of `finpro` runs a Spark job: in its own process, as the driver, beside a JVM that starts meanwhile."""

import os
import shlex
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress

from py4j.protocol import Py4JNetworkError

from conf.errors import StreamingError
from jobs.spark.submit import environment, log_file, spark_submit


def run_job(job: str, work: Callable[[], None], *, master: str, memory: str, conf: Sequence[str], delta: bool = False) -> None:
    """Do the work of `jobs/<job>.py` in this process.

    Spark starts meanwhile: `work` first imports the job and checks what it needs. In a process that has a Spark already the
    job runs on that one, whatever its properties are.

    Raises:
        FinproError: the job failed; says why and what to do.
    """
    if not has_spark():
        become_driver(job, master=master, memory=memory, conf=conf, delta=delta)
        threading.Thread(target=_start, name="start-spark", daemon=True).start()
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


def _start() -> None:
    """Start Spark. Where it cannot be, the job meets that again when it asks for its session, and says so."""
    from pyspark import SparkContext

    with suppress(Exception):
        SparkContext.getOrCreate()
