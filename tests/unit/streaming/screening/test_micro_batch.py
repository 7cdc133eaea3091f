"""The driver's part of a micro-batch, without Spark."""

from types import SimpleNamespace
from typing import Any

from streaming.screening.micro_batch import Expressions


def test_expressions_of_few_messages_are_interpreted_and_a_session_is_told_when_that_changes_only() -> None:
    told: list[dict[str, Any]] = []
    spark: Any = SimpleNamespace(conf=SimpleNamespace(set=lambda name, value: told[-1].update({name: value})))
    expressions = Expressions()
    for messages in (0, 250, 3_000, 150_000, 150_000, 90):
        told.append({})
        expressions.suit(spark, messages)
    interpreted = {"spark.sql.codegen.factoryMode": "NO_CODEGEN", "spark.sql.codegen.wholeStage": False}
    compiled = {"spark.sql.codegen.factoryMode": "FALLBACK", "spark.sql.codegen.wholeStage": True}
    assert told == [interpreted, {}, {}, compiled, {}, interpreted]
