"""What a task of screening does, in what order."""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, NoReturn

import pyarrow as pa
import pytest

from conf.rules import FraudRules
from streaming.screening import pipeline
from streaming.screening.division import By, Division
from streaming.screening.ledger import Entry
from streaming.screening.pipeline import Screening, Task
from streaming.screening.sinks import KafkaSink
from streaming.screening.state import MicroBatch


@pytest.mark.parametrize(
    ("work", "by"),
    [(pipeline._screen_partitions, By.PARTITION), (pipeline._screen_buckets, By.PRODUCT)],
    ids=["keyed", "shuffled"],
)
def test_a_task_asks_for_the_states_while_its_messages_are_on_their_way(
    work: Any, by: By, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []

    def asked(*_: Any) -> list[Any]:
        steps.append("states")
        return []

    def messages() -> Iterator[pa.RecordBatch]:
        steps.append("messages")
        yield from ()

    def never(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError

    monkeypatch.setattr(pipeline, "in_transaction", asked)
    monkeypatch.setattr(pipeline, "Announcer", lambda kafka: None)
    monkeypatch.setattr(pipeline, "store", never)
    now = datetime.now(UTC)
    task = Task(
        Screening(tasks=2, backlog_offsets=None, dsn="", kafka=KafkaSink({}, {})),
        Entry("", 0, 1, now, now, "1", {}, is_settled=False),
        MicroBatch("", Division(by, 2), 0),
        now,
        FraudRules(version="1"),
    )

    assert list(work(task, messages())) == []
    assert steps == ["states", "messages"]


def test_a_stage_that_no_micro_batch_has_told_anything_does_nothing() -> None:
    def never(*_: Any) -> NoReturn:
        raise AssertionError

    with pytest.raises(RuntimeError, match="outside a micro-batch"):
        pipeline._in_task(never, Screening(2, None, "", KafkaSink({}, {})), FraudRules(version="1"), iter([]))
