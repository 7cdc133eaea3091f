"""The Spark session of a job that works through history: `finpro backtest`, `finpro audit`."""

from collections.abc import Iterator
from contextlib import contextmanager

from pyspark.errors import PySparkException
from pyspark.sql import SparkSession

from conf.errors import LakehouseError, raised_elsewhere


@contextmanager
def history_session() -> Iterator[SparkSession]:
    """A session for one pass over history; what fails in it is raised as an error of ours.

    Raises:
        FinproError: says what to do.
    """
    # How many tasks a shuffle needs shows when it is written: history may be a day or a year.
    spark = SparkSession.builder.config("spark.sql.adaptive.enabled", True).getOrCreate()
    try:
        yield spark
    except PySparkException as error:
        ours = raised_elsewhere(str(error))
        raise ours or LakehouseError(f"The lakehouse could not be worked through: {str(error).splitlines()[0]}") from error
    finally:
        spark.stop()
