"""The producer: synthetic orders to Kafka at a chosen rate, each one accounted for."""

import logging
import time
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from operator import attrgetter

import kafka.errors
import numpy as np
import polars as pl
from kafka import KafkaProducer
from kafka.producer.future import FutureRecordMetadata

from batch.frames import read_frame
from batch.postgres import connect, explained
from conf.errors import KafkaError, PostgresUnavailable, SettingsError
from conf.rules import load_rules
from conf.settings import Settings
from streaming.kafka import ORDERS, kafka_python_config, require_topics
from streaming.shop.messages import DUPLICATE, ORDER, Message, messages
from streaming.shop.orders import Shop, order_batches

DEFAULT_BURSTS = 0.04
DEFAULT_EVENT_RATE = 200.0

_IN_FLIGHT = 20_000  # messages that may wait for their acknowledgement: the client itself would queue without bound
_AT_ONCE = 1_000  # messages between two looks at the clock
_SHORTEST_NAP_SECONDS, _LONGEST_NAP_SECONDS = 0.002, 0.05
_DELIVERY_TIMEOUT_SECONDS = 120  # long enough for a broker that was killed to come back, in a container of one core too
_PROGRESS_EVERY_SECONDS = 1.0
_WORTH_MENTIONING_SECONDS = 0.25  # a lag below this is caught up at once

# Without a handler of its own the client's log would go to the terminal, beside the one message that matters.
logging.getLogger("kafka").addHandler(logging.NullHandler())


@dataclass(frozen=True)
class Progress:
    """How far a run is: orders handed to Kafka, of how many (0: no end); messages on their way; how late the next one is."""

    sent: int
    orders: int
    unacknowledged: int
    behind_orders: int
    behind_seconds: float

    def __str__(self) -> str:
        text = f"{self.sent:,} of {self.orders:,} orders sent" if self.orders else f"{self.sent:,} orders sent"
        if self.unacknowledged > _AT_ONCE:
            text += f", {self.unacknowledged:,} messages not acknowledged yet"
        if self.behind_seconds >= _WORTH_MENTIONING_SECONDS:
            text += f", behind by {self.behind_orders:,} orders ({self.behind_seconds:.1f} s)"
        return text


@dataclass(frozen=True)
class ProduceReport:
    """What Kafka acknowledged in one run.

    Attributes:
        orders: messages that are orders, each once.
        labels: reason → planted orders that are labelled with it; an order with two reasons counts for both.
        planted: orders with a label.
        duplicates: orders that were sent a second time.
        broken: way to break the contract → messages that break it so.
        seconds: from the first message to the last acknowledgement.
        behind_seconds: how late a message was, at worst; 0 without a rate.
        start: the `start` that together with the seed makes the same run again.
        interrupted: whether it was stopped before all orders were sent.
    """

    orders: int
    labels: dict[str, int]
    planted: int
    duplicates: int
    broken: dict[str, int]
    seconds: float
    behind_seconds: float
    start: datetime
    interrupted: bool

    @property
    def rate(self) -> float:
        """Orders a second."""
        return self.orders / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        lines = [
            f"{self.orders:,} orders acknowledged in {self.seconds:.1f} s: {self.rate:,.0f} orders/s{self._lateness()}",
            f"{self.planted:,} of them planted frauds{_listed(self.labels)}",
        ]
        if self.duplicates:
            lines.append(f"{self.duplicates:,} orders sent twice")
        if self.broken:
            lines.append(f"{sum(self.broken.values()):,} messages that break the contract{_listed(self.broken)}")
        if self.interrupted:
            lines.append("stopped before the end, as asked")
        lines.append(f"--start {_written(self.start)} makes the same messages again")
        return "\n".join(lines)

    def _lateness(self) -> str:
        late = self.behind_seconds >= _WORTH_MENTIONING_SECONDS
        return f", at worst {self.behind_seconds:.1f} s behind" if late else ""


def _written(start: datetime) -> str:
    return start.isoformat(timespec="microseconds")


def _listed(counts: dict[str, int]) -> str:
    return "".join(f"\n  {name:<18}{count:>9,}" for name, count in counts.items())


def produce(
    settings: Settings,
    *,
    orders: int,
    rate: float,
    seed: int,
    bursts: float = DEFAULT_BURSTS,
    broken: float = 0.0,
    duplicates: float = 0.0,
    start: datetime | None = None,
    event_rate: float = DEFAULT_EVENT_RATE,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    stop: Callable[[], bool] = lambda: False,
) -> ProduceReport:
    """Send orders of the users and products in Postgres to the orders topic, and wait until Kafka has them all.

    An order's event time is the moment at which it is due, whether or not it goes out on time. With a rate it is due
    then on the clock. With rate 0 messages go out as fast as they can and look like history: their event times
    lie `event_rate` a second apart and end now. Planted night orders are back-dated to the last night. A run without end
    also makes orders of users and products that come into Postgres meanwhile, and goes on while Postgres is away.

    Args:
        settings: where Kafka and Postgres are, and the rules that planted orders satisfy.
        orders: how many; 0 is until it is stopped.
        rate: orders a second; 0 is as fast as it goes, which has to have an end.
        seed: the same seed and `start` make the same messages.
        bursts: share of the orders that are planted frauds.
        broken: messages in addition that break the contract, as a share of the orders.
        duplicates: orders that come twice, as a share of the orders.
        start: event time of the first order; by default such that event times end now, or begin now with a rate.
        event_rate: orders a second of event time, when `rate` is 0.
        on_progress: hears every second how far the run is.
        stop: asked often; once true, no more is sent and the report says so.

    Raises:
        KafkaError: Kafka cannot be reached, lacks the topic, or did not acknowledge a message.
        PostgresError: Postgres cannot be reached, or has no users and products.
        RulesError: the rules cannot be read, or no order can break them.
        SettingsError: `start` puts event times into the future, or neither `orders` nor `rate` is given.
    """
    if not orders and not rate:
        raise SettingsError("Orders without end (--orders 0) need a --rate: as fast as it goes would fill the disk.")
    rules = load_rules(settings.rules)
    require_topics(settings, (ORDERS,))
    pace = rate or event_rate
    start = start_of_run(start, history=timedelta(seconds=0 if rate else orders / pace), skew=rules.max_future_skew)
    shop = patient(partial(_shop, settings))
    batches = order_batches(shop, rules, orders=orders, seed=seed, start=start, rate=pace, bursts=bursts)
    runs = (
        messages(batch, np.random.default_rng([seed, number, 1]), broken=broken, duplicates=duplicates)
        for number, batch in enumerate(batches)
    )
    with _delivery(settings, start) as delivery:
        pacing = _Pacing(rate, orders, delivery, on_progress, stop)
        interrupted = not all(pacing.send(run) for run in runs)
        delivery.finish()
        return _report(delivery, pacing, start, interrupted)


def _report(delivery: "_Delivery", pacing: "_Pacing", start: datetime, interrupted: bool) -> ProduceReport:
    labels: Counter[str] = Counter()
    for label, count in delivery.labels.items():
        labels.update(dict.fromkeys(label.split(","), count))
    return ProduceReport(
        orders=delivery.kinds[ORDER],
        labels=dict(sorted(labels.items())),
        planted=delivery.labels.total(),
        duplicates=delivery.kinds[DUPLICATE],
        broken={kind: count for kind, count in sorted(delivery.kinds.items()) if kind not in (ORDER, DUPLICATE)},
        seconds=pacing.elapsed,
        behind_seconds=pacing.worst_lag,
        start=start,
        interrupted=interrupted,
    )


def start_of_run(start: datetime | None, history: timedelta, skew: timedelta) -> datetime:
    """When the first order is placed: as asked, or so long ago as the orders' history lasts.

    Raises:
        SettingsError: the start has no offset, or an event time would lie further ahead of now than `skew`.
    """
    now = datetime.now(UTC)
    if start is None:
        return now - history
    if start.tzinfo is None:
        raise SettingsError(f"The start {start.isoformat()} has no offset: write it like {now.isoformat(timespec='seconds')}")
    if start + history > now + skew:
        raise SettingsError(
            f"A start at {start.isoformat()} puts event times into the future, where they are dead letters: start no later than"
            f" {(now - history).isoformat(timespec='seconds')}."
        )
    return start


def patient(ask: Callable[[], Shop]) -> Callable[[], Shop]:
    """As `ask`; while Postgres does not answer, the shop is the one of the last time. Where there is none yet, it raises."""
    known: list[Shop] = []

    def asked() -> Shop:
        try:
            known[:] = [ask()]
        except PostgresUnavailable:
            if not known:
                raise
        return known[0]

    return asked


def _shop(settings: Settings) -> Shop:
    """All users and products of now."""
    dsn = settings.require("postgres_dsn")
    with explained(dsn), connect(dsn, application_name="finpro produce") as connection, connection.cursor() as cursor:
        users = read_frame(cursor, "select user_id from raw_users", {"user_id": pl.Int64})
        products = read_frame(cursor, "select product_id, price from raw_products", {"product_id": pl.Int64, "price": pl.Int64})
    return Shop(users["user_id"], products)


class _Delivery:
    """Hands messages to Kafka and counts those that it acknowledged, by kind and by label."""

    def __init__(self, producer: KafkaProducer, topic: str) -> None:
        self._producer, self._topic = producer, topic
        self._waiting: deque[tuple[FutureRecordMetadata, Message]] = deque()
        self.kinds: Counter[str] = Counter()
        self.labels: Counter[str] = Counter()

    @property
    def acknowledged(self) -> int:
        """Messages that Kafka has for certain."""
        return self.kinds.total()

    @property
    def unacknowledged(self) -> int:
        """Messages on their way."""
        return len(self._waiting)

    def send(self, batch: Sequence[Message]) -> None:
        """Hand messages over, waiting while too many are on their way; raises as soon as one is known to have failed."""
        send, topic, waiting = self._producer.send, self._topic, self._waiting
        for message in batch:
            waiting.append((send(topic, value=message.value, key=message.key, headers=message.headers), message))
        self.settle(_IN_FLIGHT)

    def finish(self) -> None:
        """Wait until nothing is on its way any more."""
        self.settle(0)

    def settle(self, may_wait: int) -> None:
        """Count what was acknowledged, and wait for the rest except so many."""
        waiting, kinds, labels = self._waiting, self.kinds, self.labels
        while waiting and (waiting[0][0].is_done or len(waiting) > may_wait):
            future, message = waiting[0]
            future.get(timeout=_DELIVERY_TIMEOUT_SECONDS)
            waiting.popleft()
            kinds[message.kind] += 1
            if message.kind == ORDER and message.label:
                labels[message.label] += 1


@contextmanager
def _delivery(settings: Settings, start: datetime) -> Iterator[_Delivery]:
    """A delivery to the orders topic; what goes wrong with it is raised as a KafkaError."""
    where = f"Kafka at {settings.require('kafka_bootstrap_servers')}"
    try:
        client = _kafka_producer(settings)
    except kafka.errors.KafkaError as error:
        raise KafkaError(f"{where} does not let orders in; nothing was sent.\n({error})") from error
    delivery = _Delivery(client, settings.topic(ORDERS))
    try:
        yield delivery
    except kafka.errors.KafkaError as error:
        raise KafkaError(
            f"{where} did not take the orders. At least {delivery.acknowledged:,} messages were acknowledged before, others"
            f" may be there too: --start {_written(start)} sends the same messages again, and equal orders change nothing."
            f"\n({error})"
        ) from error
    finally:
        _abandon(client)


def _abandon(client: KafkaProducer) -> None:
    """End the client at once: close() alone, and so `__del__`, waits for what can no longer be delivered."""
    client._sender.force_close()
    client.close(timeout=_DELIVERY_TIMEOUT_SECONDS)


def _kafka_producer(settings: Settings) -> KafkaProducer:
    return KafkaProducer(
        **kafka_python_config(settings),
        acks="all",
        enable_idempotence=True,
        compression_type="lz4",
        linger_ms=5,
        batch_size=131_072,
        max_block_ms=_DELIVERY_TIMEOUT_SECONDS * 1_000,
        delivery_timeout_ms=_DELIVERY_TIMEOUT_SECONDS * 1_000,
        request_timeout_ms=min(_DELIVERY_TIMEOUT_SECONDS // 3, 10) * 1_000,
        bootstrap_timeout_ms=10_000,
        reconnect_backoff_max_ms=1_000,  # the default's 30 s would outlast the delivery timeout
        metrics_enabled=False,
    )


class _Pacing:
    """Sends messages when they are due, and knows how late it is. The clock starts with the first of them."""

    def __init__(
        self, rate: float, orders: int, delivery: _Delivery, on_progress: Callable[[Progress], None], stop: Callable[[], bool]
    ) -> None:
        self._rate, self._orders = rate, orders
        self._delivery, self._on_progress, self._stop = delivery, on_progress, stop
        self._began: float | None = None
        self._next_progress = _PROGRESS_EVERY_SECONDS
        self._sent_orders = 0
        self.worst_lag = 0.0

    @property
    def elapsed(self) -> float:
        """Seconds since the first message."""
        return 0.0 if self._began is None else time.monotonic() - self._began

    def send(self, run: Sequence[Message]) -> bool:
        """Send a run of messages ordered by `due`; returns false when it was stopped on the way."""
        self._began = self._began or time.monotonic()
        sent = 0
        while sent < len(run):
            if self._stop():
                return False
            lag = self.elapsed - run[sent].due if self._rate else 0.0
            if lag < 0:
                self._delivery.settle(_IN_FLIGHT)
                time.sleep(min(max(-lag, _SHORTEST_NAP_SECONDS), _LONGEST_NAP_SECONDS))
                continue
            sent = self._send_due(run, sent)
            self._observe(lag)
        return True

    def _send_due(self, run: Sequence[Message], sent: int) -> int:
        """Send what is due, up to a limit; returns how many of the run are sent by then."""
        until = min(sent + _AT_ONCE, len(run))
        if self._rate:
            until = bisect_right(run, self.elapsed, sent, until, key=attrgetter("due"))
        batch = run[sent:until]
        self._delivery.send(batch)
        self._sent_orders += sum(message.kind == ORDER for message in batch)
        return until

    def _observe(self, lag: float) -> None:
        self.worst_lag = max(self.worst_lag, lag)
        if self.elapsed < self._next_progress:
            return
        self._next_progress = self.elapsed + _PROGRESS_EVERY_SECONDS
        due = int(self.elapsed * self._rate)
        due = min(due, self._orders) if self._orders else due
        behind = max(due - self._sent_orders, 0)
        self._on_progress(Progress(self._sent_orders, self._orders, self._delivery.unacknowledged, behind, lag))
