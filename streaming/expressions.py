"""Whether Spark compiles the expressions of a micro-batch: for few messages that takes longer than to interpret them."""

from pyspark.sql import SparkSession

_FEW = 3_000  # messages of a micro-batch


class Expressions:
    """How Spark evaluates the expressions of a query: those of few messages are interpreted, others compiled.

    To compile them takes each task 4 ms of the processor, in each micro-batch anew; to interpret them 2 ms for 1,000 messages.
    See decision 38.
    """

    def __init__(self) -> None:
        self._compiled: bool | None = None  # as Spark has been told

    def suit(self, spark: SparkSession, messages: int) -> None:
        """Let a session, the query's own, evaluate them from now on as suits a micro-batch of so many messages."""
        compiled = messages > _FEW
        if compiled is not self._compiled:
            spark.conf.set("spark.sql.codegen.factoryMode", "FALLBACK" if compiled else "NO_CODEGEN")
            spark.conf.set("spark.sql.codegen.wholeStage", compiled)
            self._compiled = compiled
