"""Columns that go to a real Kafka: what arrives is what they hold, and what does not arrive is an error."""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, NewTopic
from pydantic import SecretStr

from conf.errors import KafkaError
from conf.settings import Settings
from streaming.kafka import FRAUD_ALERT, ORDERS, ORDERS_DEAD_LETTER, PROCESSED_ORDERS, create_topics, librdkafka_config
from streaming.screening.columns_to_kafka import ColumnProducer
from tests.runs.screening import consume
from tests.runs.secured_servers import BROKER_PASSWORD, BROKER_USER, Authority, SecuredBroker

KINDS = (
    pa.binary(),
    pa.large_binary(),
    pa.string(),
    pa.large_string(),
    pa.binary_view(),
    pa.dictionary(pa.int32(), pa.binary()),
)
MEGABYTE = 1_000_000
PASSWORD = "geheim"

Connect = Callable[..., ColumnProducer]


@pytest.fixture
def connect(settings: Settings) -> Iterator[Connect]:
    """Makes a producer for this test's Kafka; closes it after the test."""
    made = []

    def connect(**changes: Any) -> ColumnProducer:
        producer = ColumnProducer(
            librdkafka_config(settings) | {name.replace("_", "."): value for name, value in changes.items()}
        )
        made.append(producer)
        return producer

    yield connect
    for producer in made:
        producer.close()


def numbered(count: int) -> tuple[pa.Array, pa.Array]:
    """Records of a few hundred keys; each value is the record's number."""
    return pa.array([f"key-{number % 300}" for number in range(count)]), pa.array(map(str, range(count)))


def send(producer: ColumnProducer, topic: str, keys: pa.Array, values: pa.Array, *, with_headers: bool = False) -> None:
    """Send records, with headers that are empty or without any, and wait until the brokers have them."""
    if with_headers:
        producer.send_with_headers(topic, keys, values, [[]] * len(keys))
    else:
        producer.send(topic, keys, values)
    producer.wait()


def pairs(settings: Settings, topic: str) -> Counter[tuple[bytes | None, bytes | None]]:
    return Counter((record.key(), record.value()) for record in consume(settings, topic))


def test_every_kind_of_column_arrives_as_it_is_whole_or_cut_with_nulls_and_empty_values(
    settings: Settings, connect: Connect
) -> None:
    producer, expected = connect(), Counter[tuple[bytes | None, bytes | None]]()
    for kind in KINDS:
        keys = [None, b"", b"a", "é".encode(), b"k" * 300, None, b"last"]
        values = [b"", None, b'{"a":"\0"}', b"v" * 70_000, None, None, "ö".encode()]
        columns = [pa.array(given, pa.binary()).cast(kind) for given in (keys, values)]
        for cut in (slice(0, 7), slice(1, 4), slice(2, 7), slice(3, 3), slice(0, 1), slice(4, 6)):
            producer.send(settings.topic(PROCESSED_ORDERS), *(column[cut] for column in columns))
            expected.update(zip(keys[cut], values[cut], strict=True))
    nothing = pa.array([b"", b""]), pa.nulls(2)  # columns without one byte
    producer.send(settings.topic(PROCESSED_ORDERS), *nothing)
    expected.update({(b"", None): 2})
    producer.wait()
    assert pairs(settings, PROCESSED_ORDERS) == expected


def test_a_partition_has_the_order_in_which_records_were_sent_though_they_are_many_more_than_the_queue_holds(
    settings: Settings, connect: Connect
) -> None:
    producer = connect(queue_buffering_max_messages=1_000)
    keys, values = numbered(100_000)
    send(producer, settings.topic(PROCESSED_ORDERS), keys, values)
    partitions: dict[int, list[int]] = {}
    for record in consume(settings, PROCESSED_ORDERS):
        number = int(record.value())
        assert record.key() == f"key-{number % 300}".encode()
        partitions.setdefault(record.partition(), []).append(number)
    assert all(numbers == sorted(numbers) for numbers in partitions.values())
    assert sorted(number for numbers in partitions.values() for number in numbers) == list(range(100_000))


def test_keys_lie_where_other_clients_of_librdkafka_put_them(settings: Settings, connect: Connect) -> None:
    keys, values = numbered(300)
    producer = connect()
    send(producer, settings.topic(PROCESSED_ORDERS), keys, values)
    other = Producer(librdkafka_config(settings))
    for key in keys.to_pylist():
        other.produce(settings.topic(FRAUD_ALERT), b"", key)
    assert other.flush(30) == 0
    ours, others = (
        {record.key(): record.partition() for record in consume(settings, topic)} for topic in (PROCESSED_ORDERS, FRAUD_ALERT)
    )
    assert ours == others
    assert set(ours.values()) == {0, 1, 2, 3}


def test_records_with_headers_wait_for_room_and_arrive_with_them(settings: Settings, connect: Connect) -> None:
    producer = connect(queue_buffering_max_messages=10)
    keys, values = numbered(300)
    headers = [[("reason", f"é {number}".encode()), ("binary", b"\0\xff"), ("empty", b"")] for number in range(300)]
    headers[0] = []
    producer.send_with_headers(settings.topic(ORDERS_DEAD_LETTER), keys, values, headers)
    nulls = pa.array([None, b"x"], pa.binary()), pa.array([b"", None], pa.binary())
    producer.send_with_headers(settings.topic(FRAUD_ALERT), *nulls, [[("a", b"1"), ("a", b"2")], []])
    producer.wait()
    found = {int(record.value()): record.headers() or [] for record in consume(settings, ORDERS_DEAD_LETTER)}
    assert found == dict(enumerate(headers))
    few = [(record.key(), record.value(), record.headers()) for record in consume(settings, FRAUD_ALERT)]
    assert sorted(few, key=str) == sorted([(None, b"", [("a", b"1"), ("a", b"2")]), (b"x", None, None)], key=str)


@pytest.fixture
def roomy_topic(settings: Settings) -> Iterator[str]:
    """A topic that takes messages of 9 MB from its beginning: a topic that is altered does so only a little later."""
    admin = AdminClient(librdkafka_config(settings))
    topic = NewTopic(settings.topic("roomy"), 4, config={"max.message.bytes": str(9 * MEGABYTE)})
    admin.create_topics([topic])[topic.topic].result(timeout=20)
    yield "roomy"
    admin.delete_topics([topic.topic])[topic.topic].result(timeout=20)


@pytest.mark.parametrize("with_headers", [False, True])
def test_large_records_take_turns_in_a_small_queue_and_what_is_larger_than_all_of_it_is_an_error(
    settings: Settings, connect: Connect, roomy_topic: str, with_headers: bool
) -> None:
    topic, producer = settings.topic(roomy_topic), connect(queue_buffering_max_kbytes=4_000)
    dead_letters = {key: os.urandom(3 * MEGABYTE) for key in (b"a", b"b", b"c", b"d")}
    send(producer, topic, pa.array(dead_letters.keys()), pa.array(dead_letters.values()), with_headers=with_headers)
    assert pairs(settings, roomy_topic) == Counter(dead_letters.items())
    with pytest.raises(KafkaError, match=rf"did not take 1 records: {topic}: .*Message size too large"):
        send(producer, topic, pa.array([b"e"]), pa.array([bytes(5 * MEGABYTE)]), with_headers=with_headers)


def test_a_message_that_is_too_large_for_its_topic_is_an_error_and_the_producer_is_done_with(
    settings: Settings, connect: Connect
) -> None:
    producer, topic = connect(), settings.topic(PROCESSED_ORDERS)
    producer.send(topic, pa.array(["a", "b"]), pa.array([b"small", os.urandom(2 * MEGABYTE)]))
    with pytest.raises(KafkaError) as raised:
        producer.wait()
    servers = settings.require("kafka_bootstrap_servers")
    assert str(raised.value) == f"Kafka at {servers} did not take 1 records: {topic}: Broker: Message size too large"
    assert producer.is_broken
    with pytest.raises(KafkaError, match="make another one"):
        producer.send(topic, pa.array(["c"]), pa.array([b"small"]))
    another = connect()
    send(another, topic, pa.array(["c"]), pa.array([b"small"]))
    assert not another.is_broken
    assert pairs(settings, PROCESSED_ORDERS) == Counter([(b"a", b"small"), (b"c", b"small")])


def test_a_topic_that_does_not_exist_is_an_error(settings: Settings, connect: Connect) -> None:
    for with_headers in (False, True):
        producer = connect(topic_metadata_propagation_max_ms=1_000)
        with pytest.raises(KafkaError, match=r"did not take 3 records: no-such-topic: .*nknown (partition|topic)"):
            send(producer, "no-such-topic", *numbered(3), with_headers=with_headers)
        assert producer.is_broken


def test_a_broker_that_is_away_is_an_error_once_records_time_out_even_while_others_wait_for_room() -> None:
    away = {"bootstrap.servers": "127.0.0.1:1", "message.timeout.ms": 1_000}
    with closing(ColumnProducer(away)) as producer:
        with pytest.raises(KafkaError, match=r"Kafka at 127.0.0.1:1 did not take 5 records: orders: .*timed out .*refused"):
            send(producer, "orders", *numbered(5))
        assert producer.is_broken
    for with_headers in (False, True):
        with closing(ColumnProducer(away | {"queue.buffering.max.messages": 10})) as producer:
            began = time.monotonic()
            with pytest.raises(KafkaError, match=r"did not take \d+ records: orders: .*timed out"):
                send(producer, "orders", *numbered(50), with_headers=with_headers)
            assert time.monotonic() - began < 10


def test_closing_gives_up_what_no_broker_has_taken_at_once() -> None:
    producer = ColumnProducer({"bootstrap.servers": "127.0.0.1:1"})
    producer.send("orders", *numbered(50_000))
    began = time.monotonic()
    producer.close()
    producer.close()
    assert time.monotonic() - began < 5
    assert producer.is_broken
    with pytest.raises(KafkaError, match="closed"):
        producer.wait()


def test_a_configuration_that_means_nothing_is_refused() -> None:
    for wrong in ({"no.such.setting": 1}, {"acks": "none"}, {"acks": 1}):  # the last one is at odds with idempotence
        with pytest.raises(KafkaError, match=r"refuses the configuration for Kafka at 127.0.0.1:1: .*(no.such.setting|acks)"):
            ColumnProducer({"bootstrap.servers": "127.0.0.1:1"} | wrong)


def test_as_many_keys_as_values_are_needed() -> None:
    producer = ColumnProducer({"bootstrap.servers": "127.0.0.1:1"})
    with closing(producer), pytest.raises(ValueError, match="3 keys for 2 values"):
        producer.send("orders", numbered(3)[0], numbered(2)[1])


@pytest.fixture(scope="module")
def secured(another_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """A Kafka with ACLs: `screen` may write verdicts and read orders, `reader` may write nothing."""
    authority = Authority(tmp_path_factory.mktemp("authority"), "authority")
    kafka = SecuredBroker(another_home, authority)
    try:
        kafka.start()
        kafka.daemon.wait_until(kafka.answers, seconds=60)
        kafka.create_user("screen", PASSWORD, reads=[ORDERS], writes=[PROCESSED_ORDERS])
        kafka.create_user("reader", PASSWORD, reads=[ORDERS], writes=[])
        settings = Settings(
            kafka_bootstrap_servers=kafka.address,
            kafka_security_protocol="SASL_SSL",
            kafka_ssl_ca_location=authority.certificate,
            kafka_sasl_mechanism="PLAIN",
            kafka_username=BROKER_USER,
            kafka_password=SecretStr(BROKER_PASSWORD),
        )
        create_topics(settings)
        yield settings
    finally:
        kafka.stop()


def as_user(settings: Settings, name: str, password: str = PASSWORD) -> dict[str, Any]:
    own = {"kafka_sasl_mechanism": "SCRAM-SHA-512", "kafka_username": name, "kafka_password": SecretStr(password)}
    return librdkafka_config(settings.model_copy(update=own))


@pytest.mark.parametrize(
    ("user", "topic"), [("screen", ORDERS), ("screen", FRAUD_ALERT), ("reader", ORDERS)], ids=["reads", "sees not", "nowhere"]
)
def test_a_login_that_may_not_write_is_told_within_seconds_which_topic_and_what_right(
    secured: Settings, user: str, topic: str
) -> None:
    with closing(ColumnProducer(as_user(secured, user))) as producer:
        began = time.monotonic()
        with pytest.raises(KafkaError, match=rf"did not take 5 records: {topic}: .*uthorization failed: .* right Write on"):
            send(producer, topic, *numbered(5))
        assert time.monotonic() - began < 10


def test_a_login_that_may_write_writes_by_tls_and_a_wrong_password_is_named(secured: Settings) -> None:
    with closing(ColumnProducer(as_user(secured, "screen"))) as producer:
        send(producer, PROCESSED_ORDERS, *numbered(5))
    assert pairs(secured, PROCESSED_ORDERS).total() == 5
    wrong = ColumnProducer(as_user(secured, "screen", "wrong") | {"message.timeout.ms": 2_000})
    with closing(wrong), pytest.raises(KafkaError, match=rf"{PROCESSED_ORDERS}: .*timed out \(.*uthentication"):
        send(wrong, PROCESSED_ORDERS, *numbered(5))
