"""`finpro outcomes take`: the topic order_outcomes on a real broker, into a real Postgres."""

import json
from typing import Any

import pytest
from confluent_kafka import Producer, TopicPartition
from confluent_kafka.admin import AdminClient

import streaming.outcomes_topic
from batch.outcomes import Taken
from conf.errors import OutcomesError
from conf.settings import Settings
from streaming.kafka import ORDER_OUTCOMES, librdkafka_config
from streaming.outcomes_topic import FromTopic, take
from tests.runs.commands import finpro
from tests.runs.exports import execute


def message(order_id: str, outcome: str = "fraud", **more: Any) -> bytes:
    fields = {"order_id": order_id, "outcome": outcome, "reviewed_by": "desk", "decided_at": "2026-11-02T08:00:00Z"}
    return json.dumps(fields | more).encode()


def send(settings: Settings, *values: bytes | None) -> None:
    """Send messages to one partition, by a transaction that is given up and one that is not."""
    transactional = {"transactional.id": settings.topic("test"), "log_level": 0}
    producer = Producer(librdkafka_config(settings) | transactional)
    producer.init_transactions()
    producer.begin_transaction()
    producer.produce(settings.topic(ORDER_OUTCOMES), message("given up"), partition=1)
    producer.flush()
    producer.abort_transaction()
    producer.begin_transaction()
    for value in values:
        producer.produce(settings.topic(ORDER_OUTCOMES), value, key="k", partition=1)
    producer.commit_transaction()


def stated(settings: Settings) -> list[tuple[Any, ...]]:
    return execute(settings, "select order_id, outcome, source from order_outcomes order by outcome_id")


def test_each_message_is_taken_once_or_is_a_dead_letter_with_its_reason_whatever_is_killed(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming.outcomes_topic, "_AT_ONCE", 3)
    broken = [None, b"", b"{", b"\xff", b"[1]", message("o", "perhaps"), message("o\x00")]
    broken.append(message("o", decided_at="2099-01-01T00:00:00Z"))
    corrected = message("o1", "genuine", decided_at="2026-11-03T08:00:00+07:00")
    send(settings, message("o1", note="not of the contract"), corrected, *broken)

    def killed(*_: object) -> None:
        raise ConnectionError

    with monkeypatch.context() as patch:
        patch.setattr(streaming.outcomes_topic, "_go_on_from", killed)
        with pytest.raises(ConnectionError):
            take(settings)
    assert stated(settings) == []
    assert take(settings) == FromTopic(Taken(2, 2, 2), len(broken))
    assert stated(settings) == [("o1", "fraud", "topic"), ("o1", "genuine", "topic")]
    letters = execute(settings, 'select value, reason from outcome_dead_letters order by "offset"')
    assert [value and bytes(value) for value, _ in letters] == broken
    for (_, reason), part in zip(
        letters,
        ("tombstone", "not JSON", "not JSON", "not JSON", "breaks the contract", "perhaps", "order_id", "future"),
        strict=True,
    ):
        assert part in reason

    assert take(settings) == FromTopic(Taken(0, 0, 0), 0)
    send(settings, message("o1"), message("o2"))
    ended = finpro("outcomes", "take")
    assert ended.stdout == "1 of 2 statements taken, 1 were there already; 2 are about orders that raw_orders does not hold\n"

    execute(settings, "update outcome_offsets set topic_id = 'of a topic that was deleted', next_offset = 900")
    assert take(settings).taken == Taken(4, 0, 4)  # a topic that was made anew is taken from its begin


def test_what_kafka_has_deleted_before_it_was_taken_is_told(settings: Settings) -> None:
    send(settings, message("o1"), message("o2"))
    up_to = TopicPartition(settings.topic(ORDER_OUTCOMES), 1, 3)  # what was given up, its end, and o1
    admin = AdminClient(librdkafka_config(settings))
    for done in admin.delete_records([up_to]).values():
        done.result(timeout=20)
    with pytest.raises(OutcomesError, match=r"offsets 0 to 2 of partition 1"):
        take(settings)
    assert take(settings, skip_forgotten=True).taken.new == 1
    assert stated(settings) == [("o2", "fraud", "topic")]
