"""What of Kafka needs no broker: records of a client as messages, and what a topic's configuration means."""

from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from confluent_kafka import KafkaError as ClientError
from confluent_kafka import KafkaException, TopicPartition

from conf.errors import KafkaError
from streaming import kafka
from streaming.contract import MESSAGE_COLUMNS, NO_TIMESTAMP, read_messages
from streaming.kafka import OrdersKept, TopicReader, as_messages, kept_by
from tests.oracle.bad_messages import RECEIVED, encoded, good

KAFKAS_OWN = {"cleanup.policy": "delete", "message.timestamp.type": "LogAppendTime"}


class Record:
    """One of confluent-kafka's, as far as it is looked at."""

    def __init__(self, milliseconds: int) -> None:
        self._milliseconds = milliseconds

    def topic(self) -> str:
        return "orders"

    def partition(self) -> int:
        return 0

    def offset(self) -> int:
        return 7

    def timestamp(self) -> tuple[int, int]:
        return 1, self._milliseconds

    def value(self) -> bytes:
        return encoded(good())


class Consumer:
    """One that is told some errors before it is given the offsets of a partition."""

    def __init__(self, *errors: int) -> None:
        self._errors = list(errors)

    def get_watermark_offsets(self, _partition: TopicPartition, **_: float) -> tuple[int, int]:
        if self._errors:
            raise KafkaException(ClientError(self._errors.pop(0)))
        return 3, 7

    def list_topics(self, topic: str, **_: float) -> Any:
        return SimpleNamespace(topics={topic: SimpleNamespace(partitions={0: None})})

    def close(self) -> None:
        pass


def reader(monkeypatch: pytest.MonkeyPatch, *errors: int) -> TopicReader:
    monkeypatch.setattr(kafka, "Consumer", lambda _config: Consumer(*errors))
    return TopicReader({}, "orders")


def test_a_partition_that_has_no_leader_yet_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    of_a_new_topic = reader(monkeypatch, ClientError.NOT_LEADER_FOR_PARTITION, ClientError.LEADER_NOT_AVAILABLE)
    assert of_a_new_topic.kept() == {0: (3, 7)}


def test_what_kafka_refuses_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KafkaError, match=r"did not answer about orders: .*[Aa]uthorization failed"):
        reader(monkeypatch, ClientError.TOPIC_AUTHORIZATION_FAILED).ends()


def test_records_are_messages_as_spark_gives_them() -> None:
    (message,) = as_messages([Record(1_793_502_000_123)]).to_pylist()
    assert tuple(message) == MESSAGE_COLUMNS
    assert message["timestamp"] == datetime(2026, 11, 1, 3, 0, 0, 123_000, UTC)
    assert as_messages([Record(-1)]).column("timestamp").to_pylist() == [NO_TIMESTAMP]


@pytest.mark.parametrize(
    "milliseconds", [-(2**63), -63_000_000_000_000, 253_402_300_800_000, 1_793_502_000_123_000_000, 2**63 - 1]
)
def test_a_record_with_any_timestamp_is_read(milliseconds: int) -> None:
    contents = read_messages(as_messages([Record(milliseconds)]), timedelta(seconds=60), RECEIVED)
    assert len(contents.orders) == (milliseconds > 0)
    assert len(contents.dead_letters) == (milliseconds < 0)


@pytest.mark.parametrize(
    ("config", "loses", "dates"),
    [
        (KAFKAS_OWN, False, False),
        (KAFKAS_OWN | {"cleanup.policy": "compact"}, True, False),
        (KAFKAS_OWN | {"cleanup.policy": "compact,delete"}, True, False),
        (KAFKAS_OWN | {"message.timestamp.type": "CreateTime"}, False, True),
        ({}, False, False),
    ],
)
def test_what_a_topics_configuration_does_to_orders_is_said_with_its_name(
    config: dict[str, Any], loses: bool, dates: bool
) -> None:
    kept = kept_by("shop_orders", config)
    assert [bool(one) for one in kept] == [loses, dates]
    assert all("shop_orders" in one and "kafka-configs.sh" in one for one in filter(None, kept))
    assert OrdersKept() == kept_by("shop_orders", KAFKAS_OWN)
