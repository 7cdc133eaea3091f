"""The Spark session of a job: of a Spark that is the job's own, or of one that its process has already."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from pyspark.errors import PySparkException
from pyspark.sql import SparkSession

from conf.errors import FinproError, LakehouseError, raised_elsewhere
from streaming.jvm import running_session


@contextmanager
def job_session(properties: Mapping[str, str | int | bool]) -> Iterator[SparkSession]:
    """A session with these properties, for one job.

    Where this process has a session already, this is another one of the same Spark, which stays. Else Spark ends with the
    block.
    """
    if (running := running_session()) is None:
        spark = SparkSession.builder.config(map=dict(properties)).getOrCreate()
        try:
            yield spark
        finally:
            spark.stop()
        return
    spark = running.newSession()
    for name, value in properties.items():
        spark.conf.set(name, value)
    try:
        yield spark
    finally:
        for query in spark.streams.active:
            query.stop()


@contextmanager
def history_session() -> Iterator[SparkSession]:
    """A session for one pass over history; what fails in it is raised as an error of ours.

    Raises:
        FinproError: says what to do.
    """
    # How many tasks a shuffle needs shows when it is written: history may be a day or a year.
    with job_session({"spark.sql.adaptive.enabled": True}) as spark:
        try:
            yield spark
        except PySparkException as error:
            ours = raised_elsewhere(str(error))
            raise ours or LakehouseError(f"The lakehouse could not be worked through: {str(error).splitlines()[0]}") from error


def run_as_program(main: Callable[[], None]) -> None:
    """What a job's file does when spark-submit runs it: an error a person can act on is one message and an exit code."""
    try:
        main()
    except FinproError as error:
        print(f"finpro: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
