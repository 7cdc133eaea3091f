"""How long a live order takes from its sending until its verdict can be read: in Kafka, and in Postgres.

One process sends, reads the output topic and asks Postgres, so that there is one clock. Orders are sent one by one, each
at its own moment. A first stretch warms the contestant up and is not counted.
"""

import math
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from threading import Event, Thread

import msgspec
import numpy as np
from confluent_kafka import Consumer, Producer

from batch.postgres import open_connection
from conf.rules import load_rules
from conf.settings import Settings
from streaming.kafka import ORDERS, PROCESSED_ORDERS, librdkafka_config
from tests.benchmarks.load import PARTITIONER, STRETCH, encode, make_orders
from tests.benchmarks.measure import BenchmarkError

START_SECONDS = 120
GRACE_SECONDS = 15
_MAKING_SECONDS = 5
_ASKED_EVERY = 20  # Postgres is asked for one of so many orders: 50 a second are enough for a percentile
_ASK_SECONDS = 0.01


@dataclass(frozen=True)
class Pace:
    """`rate` orders a second; from the first verdict on, `warm_up_seconds` that do not count, then `seconds` that do."""

    rate: int
    warm_up_seconds: int
    seconds: int


class OrderId(msgspec.Struct):
    """All that is read of a message."""

    order_id: str


@dataclass(frozen=True)
class Latency:
    """Milliseconds from sending an order until it is seen, for each order counted."""

    kafka_ms: list[float]
    postgres_ms: list[float]


def percentile(values: list[float], percent: float) -> float:
    """The value that `percent` of `values` do not exceed."""
    return float(np.percentile(values, percent))


class Watch:
    """Notes when each order is first seen, in Kafka and in Postgres, from two threads of its own."""

    def __init__(self, settings: Settings) -> None:
        self._settings, self._done = settings, Event()
        self.in_kafka: dict[str, float] = {}
        self.in_postgres: dict[str, float] = {}
        self.awaited: set[str] = set()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch for one block."""
        threads = [Thread(target=target, daemon=True) for target in (self._read_kafka, self._ask_postgres)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._done.set()
            for thread in threads:
                thread.join()

    def _read_kafka(self) -> None:
        decode = msgspec.json.Decoder(OrderId).decode
        config = librdkafka_config(self._settings) | {"group.id": "latency", "auto.offset.reset": "earliest"}
        with closing(Consumer(config)) as consumer:
            consumer.subscribe([self._settings.topic(PROCESSED_ORDERS)])
            while not self._done.is_set():
                message = consumer.poll(0.1)
                if message is not None and message.error() is None:
                    self.in_kafka.setdefault(decode(message.value() or b"").order_id, time.time())

    def _ask_postgres(self) -> None:
        with closing(open_connection(self._settings.require("postgres_dsn"))) as connection:
            connection.autocommit = True
            cursor = connection.cursor()
            while not self._done.wait(_ASK_SECONDS):
                if not self.awaited:
                    continue
                cursor.execute("select order_id from raw_orders where order_id = any(%s)", [list(self.awaited)])
                found, now = cursor.fetchall(), time.time()
                self.in_postgres.update((order_id, now) for (order_id,) in found)
                self.awaited.difference_update(order_id for (order_id,) in found)


def measure_live(settings: Settings, pace: Pace, seed: int) -> Latency:
    """Send orders to a running contestant, and time the ones that come after its warm-up.

    Raises:
        BenchmarkError: no verdict came at all, or one of those that count is missing.
    """
    watch = Watch(settings)
    sent: dict[str, float] = {}
    window: tuple[float, float] | None = None
    with watch.watching():
        for order_id, moment in _send(settings, pace, seed):
            if window is None:
                if watch.in_kafka:
                    window = moment + pace.warm_up_seconds, moment + pace.warm_up_seconds + pace.seconds
            elif moment >= window[1]:
                break
            elif moment >= window[0]:
                sent[order_id] = moment
                if len(sent) % _ASKED_EVERY == 0:
                    watch.awaited.add(order_id)
        if window is None:
            raise BenchmarkError(f"No verdict came within {START_SECONDS} s of the first order")
        _wait_for(watch, sent)
    return Latency(
        kafka_ms=[(watch.in_kafka[order_id] - moment) * 1_000 for order_id, moment in sent.items()],
        postgres_ms=[(seen - sent[order_id]) * 1_000 for order_id, seen in watch.in_postgres.items()],
    )


def _send(settings: Settings, pace: Pace, seed: int) -> Iterator[tuple[str, float]]:
    """Send orders one by one, each at its event time; yields its id and when it was sent (seconds since 1970)."""
    stretches = math.ceil(pace.rate * (START_SECONDS + pace.warm_up_seconds + pace.seconds) / STRETCH)
    start = datetime.now(UTC) + timedelta(seconds=_MAKING_SECONDS)
    orders = make_orders(stretches * STRETCH, rules=load_rules(settings.rules), rate=pace.rate, start=start, seed=seed)
    messages = list(zip(orders["order_id"], encode(orders), strict=True))
    producer = Producer(librdkafka_config(settings) | PARTITIONER | {"linger.ms": 0})
    topic = settings.topic(ORDERS)
    try:
        for number, (order_id, (key, value)) in enumerate(messages):
            time.sleep(max(0.0, start.timestamp() + number / pace.rate - time.time()))
            moment = time.time()
            producer.produce(topic, value, key)
            producer.poll(0)
            yield order_id, moment
    finally:
        producer.flush(GRACE_SECONDS)


def _wait_for(watch: Watch, sent: dict[str, float]) -> None:
    patience = time.monotonic() + GRACE_SECONDS
    while watch.awaited or not sent.keys() <= watch.in_kafka.keys():
        if time.monotonic() > patience:
            missing = len(sent.keys() - watch.in_kafka.keys())
            raise BenchmarkError(
                f"After {GRACE_SECONDS} s {missing} of {len(sent)} verdicts are not in Kafka,"
                f" and {len(watch.awaited)} of {len(sent) // _ASKED_EVERY} not in Postgres"
            )
        time.sleep(0.1)
