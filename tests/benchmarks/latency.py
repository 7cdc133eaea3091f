"""How long a live order takes from its sending until its verdict can be read: in Kafka, and in Postgres.

One process sends, reads the output topic and asks Postgres, so that there is one clock. Orders are sent one by one, each
at its own moment. A first stretch warms the contestant up and is not counted.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from threading import Event, Thread

import msgspec
import numpy as np
import psycopg2
from confluent_kafka import Consumer, Producer

from batch.postgres import open_connection
from conf.rules import load_rules
from conf.settings import Settings
from streaming.kafka import ORDERS, PROCESSED_ORDERS, librdkafka_config
from tests.benchmarks.load import PRODUCER, STRETCH, encode, make_orders
from tests.benchmarks.measure import BenchmarkError

START_SECONDS = 120
GRACE_SECONDS = 15
_MAKING_SECONDS = 5
_ASKED_EVERY = 20  # Postgres is asked for one of so many orders: 50 a second are enough for a percentile
_ASK_SECONDS = 0.01


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


def measure_live(
    settings: Settings, *, rate: int, warm_up_seconds: float, seconds: float, seed: int, check: Callable[[], None]
) -> Latency:
    """Send `rate` orders a second to a running contestant, and time the ones after its warm-up.

    Args:
        warm_up_seconds: not counted, from the first verdict on.
        seconds: how long orders are counted.
        check: called now and then; raises when the contestant has failed.

    Raises:
        BenchmarkError: no verdict came, or one that was due.
    """
    watch, sent, counted = Watch(settings), {}, []
    with watch.watching():
        first_seen = None
        for order_id, moment in _send_each(settings, rate=rate, seconds=START_SECONDS + warm_up_seconds + seconds, seed=seed):
            if first_seen is None and watch.in_kafka:
                first_seen = moment
            if first_seen is None or moment < first_seen + warm_up_seconds:
                continue
            if moment > first_seen + warm_up_seconds + seconds:
                break
"""
"""
