"""What lies on `orders` may be of any size, of a transaction that came to nothing, or gone: nothing else is lost, or stops."""

import json
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from confluent_kafka import Producer, TopicPartition
from confluent_kafka.admin import AdminClient, ConfigResource, ResourceType

from batch.postgres import connect
from conf.rules import load_rules
from conf.settings import Settings
from streaming.kafka import ORDERS, ORDERS_DEAD_LETTER, TopicReader, librdkafka_config
from tests.oracle.bad_messages import encoded, good
from tests.runs import screening as runs

pytestmark = pytest.mark.usefixtures("spark_session")


def order(order_id: str, **changes: Any) -> bytes:
    """An order of now."""
    now = datetime.now(UTC).isoformat()
    return encoded(good() | {"order_id": order_id, "event_ts": now, "created_date": now} | changes)


def stored(settings: Settings) -> dict[str, int]:
    """Order → quantity."""
    with connect(settings.require("postgres_dsn")) as connection, connection.cursor() as cursor:
        cursor.execute("select order_id, quantity from raw_orders")
        return dict(cursor.fetchall())


def screened(settings: Settings) -> dict[str, int]:
    done = runs.run_screen("--available-now")
    assert done.returncode == 0, done.stderr
    return stored(settings)


def dead_letters(settings: Settings) -> dict[int, tuple[bytes | None, dict[str, str]]]:
    """Offset → value and headers of its dead letter."""
    found = {}
    for record in runs.consume(settings, ORDERS_DEAD_LETTER):
        headers = {name: value.decode() for name, value in record.headers()}
        found[int(headers["offset"])] = (record.value(), headers)
    return found


def alter(settings: Settings, topic: str, **config: str) -> None:
    """Set what a topic is configured to, and wait until it is."""
    admin = AdminClient(librdkafka_config(settings))
    resource = ConfigResource(ResourceType.TOPIC, settings.topic(topic), set_config=config)
    for done in admin.alter_configs([resource]).values():
        done.result(20)
    deadline = time.monotonic() + 20
    while True:
        (now,) = (done.result(20) for done in admin.describe_configs([resource]).values())
        if all(now[name].value == value for name, value in config.items()):
            return
        assert time.monotonic() < deadline
        time.sleep(0.1)


class Transactions:
    """A producer of transactions on the first partition of `orders`."""

    def __init__(self, settings: Settings, name: str) -> None:
        self._topic = settings.topic(ORDERS)
        self._producer = Producer(librdkafka_config(settings) | {"transactional.id": self._topic + name})
        self._producer.init_transactions(20)

    def begin(self, *values: bytes) -> None:
        self._producer.begin_transaction()
        for value in values:
            self._producer.produce(self._topic, value, partition=0)
        self._producer.flush(20)

    def commit(self) -> None:
        self._producer.commit_transaction(20)

    def abort(self) -> None:
        self._producer.abort_transaction(20)


def test_of_transactions_only_what_was_committed_counts_and_an_open_one_delays_what_is_behind_it(settings: Settings) -> None:
    given_up, kept, left_open = (Transactions(settings, name) for name in ("given up", "kept", "left open"))
    given_up.begin(order("tx-1", quantity=2), order("again"))
    given_up.abort()
    kept.begin(order("tx-1", quantity=3))
    kept.commit()
    runs.send(settings, [(order("again"), 0), (order("again", quantity=7), 0)])  # a used id has its message read again
    assert screened(settings) == {"tx-1": 3, "again": 2}
    assert [headers["reason"] for _, headers in dead_letters(settings).values()] == [
        "order_id again is used by another order, received before"
    ]

    left_open.begin(order("open"))
    runs.send(settings, [(order("behind"), 0), (order("elsewhere"), 1)])
    assert screened(settings).keys() == {"tx-1", "again", "elsewhere"}
    with TopicReader(librdkafka_config(settings), settings.topic(ORDERS)) as reader:
        started = time.monotonic()
        assert len(reader.read(0, 0)) == 3, "what is behind an open transaction cannot be read, and is not waited for"
        assert time.monotonic() - started < 10
    left_open.commit()
    assert screened(settings).keys() == {"tx-1", "again", "elsewhere", "open", "behind"}
    assert screened(settings).keys() == {"tx-1", "again", "elsewhere", "open", "behind"}


def test_a_message_of_any_size_is_a_dead_letter_whole_where_its_topic_takes_it_or_else_by_prefix_and_place(
    settings: Settings,
) -> None:
    producer = Producer(
        librdkafka_config(settings) | {"message.max.bytes": 20_000_000, "compression.type": "gzip", "linger.ms": 0}
    )

    def send(value: bytes) -> None:
        producer.produce(settings.topic(ORDERS), value, partition=2)
        assert producer.flush(60) == 0

    send(b"x" * 1_030_000)  # whole: it fits
    send(b"y" * 5_000_000)  # the broker counts what is left after compression
    alter(settings, ORDERS, **{"max.message.bytes": str(5 << 20)})
    noise = bytes(range(256)) * 12_000
    send(noise[1:] + noise[:1])
    send(order("large", note="z" * 900_000))
    send(order("small"))
    assert screened(settings).keys() == {"large", "small"}
    found = dead_letters(settings)
    assert found[0][0] == b"x" * 1_030_000
    assert "size" not in found[0][1]
    for offset, whole in ((1, b"y" * 5_000_000), (2, noise[1:] + noise[:1])):
        value, headers = found[offset]
        assert value
        assert 1_000_000 < len(value) < len(whole)
        assert whole.startswith(value)
        assert (headers["size"], headers["partition"], headers["offset"]) == (str(len(whole)), "2", str(offset))


def test_many_dead_letters_that_are_large_together_all_arrive(settings: Settings) -> None:
    runs.send(settings, [(b"\0" * 8_000 + str(number).encode(), 3) for number in range(6_000)])  # 48 MB
    runs.send(settings, [(order("good"), 3)])
    done = runs.run_screen("--available-now", "--max-offsets-per-trigger", "150000")
    assert done.returncode == 0, done.stderr
    assert stored(settings).keys() == {"good"}
    assert dead_letters(settings).keys() == set(range(6_000))


def test_what_kafka_has_deleted_before_it_was_screened_is_named_and_one_command_goes_on(settings: Settings) -> None:
    rules = load_rules(settings.rules)
    start = datetime.now(UTC) - timedelta(minutes=10)
    runs.send(settings, runs.by_product(runs.dense_orders(40, rules, seed=1, start=start, step=timedelta(seconds=1))))
    before = len(screened(settings))
    runs.send(settings, [(order(f"gone-{number}"), 0) for number in range(5)] + [(order("left"), 0)])
    with TopicReader(librdkafka_config(settings), settings.topic(ORDERS)) as reader:
        end = reader.ends()[0]
    admin = AdminClient(librdkafka_config(settings))
    for done in admin.delete_records([TopicPartition(settings.topic(ORDERS), 0, end - 1)]).values():
        done.result(20)
    for _ in range(2):
        refused = runs.run_screen("--available-now")
        assert refused.returncode == 3
        assert (
            f"Kafka has deleted what comes next of {settings.topic(ORDERS)}: offsets {end - 6} to {end - 2} of partition 0"
            in (refused.stderr)
        )
        assert "`finpro screen --skip-forgotten`" in refused.stderr
    assert runs.run_screen("--available-now", "--skip-forgotten").returncode == 0
    assert stored(settings).keys() - {"left"} == stored(settings).keys() - {"left", *(f"gone-{n}" for n in range(5))}
    assert len(screened(settings)) == before + 1
    with connect(settings.require("postgres_dsn")) as connection, connection.cursor() as cursor:
        cursor.execute("select end_offsets from screening_ledger order by number desc limit 1")
        assert json.loads(json.dumps(cursor.fetchone()))[0]["0"] == end
