"""What is said of a query that failed: only what is known of the cause, and advice that helps against it."""

import pytest
from pyspark.errors import StreamingQueryException

from conf.errors import FinproError, KafkaError, PostgresError, StreamingError
from jobs.spark.streaming_job import _cause

_TRACE = """[STREAM_FAILED] Query [id = 1, runId = 2] terminated with exception: Job aborted: Task 0 failed.
Caused by: {}
\tat org.apache.spark.scheduler.Task.run(Task.scala:141)
=== Streaming Query ===
Identifier: screen_orders
"""


@pytest.mark.parametrize(
    ("cause", "kind", "words"),
    [
        ("java.lang.OutOfMemoryError: Java heap space", StreamingError, ["too little memory", "--memory", "Java heap space"]),
        (
            "org.apache.kafka.common.errors.TopicAuthorizationException: Not authorized to access topics: [orders]",
            KafkaError,
            ["refuses this login", "Read on orders", "Not authorized to access topics: [orders]"],
        ),
        (
            "org.apache.kafka.common.errors.UnknownTopicOrPartitionException: This server does not host it.",
            KafkaError,
            ["was it deleted?", "finpro migrate"],
        ),
        (
            "org.apache.kafka.common.errors.TimeoutException: Timed out waiting for a node assignment",
            KafkaError,
            ["is it running?", "nothing is lost"],
        ),
        (
            "org.apache.kafka.clients.consumer.OffsetOutOfRangeException: Fetch position {0} is out of range",
            KafkaError,
            ["deleted them, or lost them"],
        ),
        ("java.lang.IllegalStateException: something new", StreamingError, ["why is not known", "something new", "--debug"]),
        ("conf.errors.PostgresError: Postgres at here: refused", PostgresError, ["Postgres at here: refused"]),
    ],
)
def test_a_known_cause_has_its_own_advice_and_an_unknown_one_promises_nothing(
    cause: str, kind: type[FinproError], words: list[str]
) -> None:
    error = _cause(StreamingQueryException(_TRACE.format(cause)))
    assert type(error) is kind
    assert [word for word in words if word not in str(error)] == []
    assert ("nothing is lost" in str(error).lower()) == any(
        known in cause for known in ("OutOfMemory", "Timeout", "Authorization")
    )
