"""What finpro asks of Spark's JVM that PySpark has no public way to ask: the one place that does.

Everywhere else Spark is used by its public API, which tests/unit/test_rooms.py sees to. Each function here says why it is
needed, and is used by tests on a real Spark, which fail when Spark changes what it leans on.
"""

import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, cast

from py4j.java_gateway import JavaObject
from py4j.protocol import Py4JError
from pyspark import SparkContext
from pyspark.java_gateway import ensure_callback_server_started
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.functions import pandas_udf
from pyspark.sql.types import StructType
from pyspark.util import PythonEvalType

if TYPE_CHECKING:
    from pyarrow import RecordBatch


def running_context() -> SparkContext | None:
    """The Spark of this process, if it has one: PySpark tells only by starting one."""
    return SparkContext._active_spark_context


def running_session() -> SparkSession | None:
    """The first session of this process's Spark, if it has one; `getActiveSession` knows that of the thread only."""
    return SparkSession._instantiatedSession


def process_of(context: SparkContext) -> "subprocess.Popen[bytes]":
    """The JVM that this process has started for a Spark: to see whether it still lives, and to wait for its end."""
    gateway: Any = context._gateway
    return cast("subprocess.Popen[bytes]", gateway.proc)


def has_executor(context: SparkContext) -> bool:
    """Whether a Spark has anything to run tasks on by now: its public status tells of jobs and stages only."""
    known: Any = context._jsc.sc().statusTracker().getExecutorInfos()
    return len(known) > 1  # the driver is the first


class ArrowStage:
    """What `DataFrame.mapInArrow` makes of a function, for many plans: that hands it to the JVM anew for each one.

    To do so takes PySpark 30 calls of the JVM, instead of one, and each live micro-batch 4 ms more.
    """

    def __init__(self, function: "Callable[[Iterator[RecordBatch]], Iterator[RecordBatch]]", schema: StructType) -> None:
        self._function = pandas_udf(function, schema, PythonEvalType.SQL_MAP_ARROW_ITER_UDF)  # type: ignore[call-overload]
        self._calls: dict[tuple[str, ...], Any] = {}

    def over(self, rows: DataFrame, *columns: str) -> DataFrame:
        """What the function makes of rows, which have these columns and no others."""
        if columns not in self._calls:
            self._calls[columns] = self._function(*columns)._jc
        java: Any = rows._jdf
        return DataFrame(java.mapInArrow(self._calls[columns], False, None), rows.sparkSession)


class Located(NamedTuple):
    """A place on a file system that Spark reaches, as Hadoop's own objects: `path` and the FileSystem that has it."""

    path: Any
    files: Any


def located(spark: SparkSession, path: str) -> Located:
    """A path on whatever file system Spark reaches (local, gs://, hdfs://): Spark reads tables there, and no single files."""
    jvm: Any = spark._jvm
    java = jvm.org.apache.hadoop.fs.Path(path)
    return Located(java, java.getFileSystem(spark._jsc.hadoopConfiguration()))


def text_of(spark: SparkSession, place: Located) -> str:
    """The text of a file."""
    jvm: Any = spark._jvm
    stream = place.files.open(place.path)
    try:
        return str(jvm.org.apache.commons.io.IOUtils.toString(stream, "UTF-8"))
    finally:
        stream.close()


def why(error: Py4JError) -> str:
    """What Java says of an error."""
    java: JavaObject | None = getattr(error, "java_exception", None)
    return str(java.toString() if java else error)


def delta_appends(spark: SparkSession, path: str) -> dict[str, int]:
    """Under what application ids (`txnAppId`) a Delta table was appended to, and the number of each one's last append.

    delta-spark writes them, and has no way to read them.
    """
    found = _delta_snapshot(spark, path).setTransactions()
    return {found.apply(place).appId(): found.apply(place).version() for place in range(found.size())}


def delta_files(spark: SparkSession, path: str) -> DataFrame:
    """The files that a Delta table consists of now, as its log has them: delta-spark tells how many, and not of which day."""
    return DataFrame(_delta_snapshot(spark, path).allFiles().toDF(), spark)


def delta_id(spark: SparkSession, path: str) -> str:
    """The id that Delta gave a table: another one once it has been deleted and created again.

    delta-spark tells it among details for which it looks at all files of the table first.
    """
    return str(_delta_snapshot(spark, path).metadata().id())


def _delta_snapshot(spark: SparkSession, path: str) -> Any:
    jvm: Any = spark._jvm
    return jvm.org.apache.spark.sql.delta.DeltaLog.forTableWithSnapshot(spark._jsparkSession, path)._2()


@contextmanager
def signals_of_the_jvm(spark: SparkSession, handle: Callable[..., None]) -> Iterator[None]:
    """Inside the block SIGTERM and SIGINT call `handle`, where it is the JVM that gets them.

    Its own handlers would begin to shut Spark down in the middle of a micro-batch, and Spark has no setting for that. Under
    spark-submit it is the process that gets the signal; elsewhere it gets what is sent to a whole group.
    """
    gateway: Any = spark.sparkContext._gateway
    ensure_callback_server_started(gateway)  # type: ignore[no-untyped-call]
    java = gateway.jvm.sun.misc.Signal
    handler = _SignalHandler(handle)
    usual = {number: java.handle(java(number.name[3:]), handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, before in usual.items():
            java.handle(java(number.name[3:]), before)


class _SignalHandler:
    """A handler as the JVM wants it."""

    class Java:
        implements: ClassVar = ["sun.misc.SignalHandler"]

    def __init__(self, handle: Callable[..., None]) -> None:
        self.handle = handle  # called by the JVM, under this name
