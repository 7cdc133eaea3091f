"""The driver's part of a micro-batch, without Spark."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from streaming.screening.division import By, Division
from streaming.screening.micro_batch import MicroBatches


def test_expressions_of_few_messages_are_interpreted_and_a_session_is_told_when_that_changes_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(MicroBatches, "_screen", lambda *_: [])
    monkeypatch.setattr("streaming.screening.micro_batch.summed", lambda _: None)
    told: list[dict[str, Any]] = []
    session = SimpleNamespace(conf=SimpleNamespace(set=lambda name, value: told[-1].update({name: value})))

    def opened(messages: int, *_: Any) -> Any:
        return SimpleNamespace(is_settled=False, offsets=messages, ranges={0: (0, messages)})

    stand_in: Any = SimpleNamespace
    micro_batches = MicroBatches(
        screening=stand_in(backlog_offsets=150_000),
        checkpoint=stand_in(query_id=lambda: "", ends=lambda _: {}, begins=None),
        ledger=stand_in(take=lambda _: None, open=opened, settle=lambda *_: None),
        rules=stand_in(fixed=lambda: nullcontext("")),
        topic_id=lambda: "",
        read=lambda _: stand_in(),
        division=Division(By.PARTITION, 2),
        on_not_keyed=lambda _: None,
        reports=(),
    )
    for messages in (0, 250, 3_000, 150_000, 150_000, 90):
        told.append({})
        micro_batches(stand_in(sparkSession=session), messages)
    interpreted = {"spark.sql.codegen.factoryMode": "NO_CODEGEN", "spark.sql.codegen.wholeStage": False}
    compiled = {"spark.sql.codegen.factoryMode": "FALLBACK", "spark.sql.codegen.wholeStage": True}
    assert told == [interpreted, {}, {}, compiled, {}, interpreted]
