"""The rival someone would write instead: one tuned Python process with the same rules and the same sinks, and no engine.

confluent-kafka in and out, msgspec, dictionaries for state, Arrow COPY and one upsert a batch, which overlaps with the next.
What it saves against finpro: state dies with the process, and verdicts look back only, so the first members of a pattern
stay Genuine; it takes the contract on trust (ids are integers, what cannot be read ends it) and gives no evidence.
"""

import gc
import json
import time
from collections import defaultdict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

import msgspec
import pyarrow as pa
from adbc_driver_postgresql import dbapi
from confluent_kafka import Consumer, Message, Producer, TopicPartition

from conf.rules import FraudRules, load_rules
from conf.settings import Settings, load_settings
from streaming.kafka import FRAUD_ALERT, ORDERS, PROCESSED_ORDERS, librdkafka_config

BATCH = 20_000
MICROSECOND = timedelta(microseconds=1)
SECOND = 1_000_000
CONSUMER = {
    "group.id": f"peer-{time.time_ns()}",
    "auto.offset.reset": "earliest",
    "enable.auto.commit": False,
    "fetch.message.max.bytes": 1 << 23,
    "queued.min.messages": 200_000,
}
PRODUCER = {
    "linger.ms": 50,
    "batch.size": 1 << 19,
    "compression.type": "lz4",
    "queue.buffering.max.messages": 0,
    "queue.buffering.max.kbytes": 1 << 20,
}
COLUMNS = (
    "order_id, user_id, product_id, quantity, amount, amount_numeric, country, created_date, event_ts, status, source, reasons"
)

Reasons = tuple[str, ...]


class Order(msgspec.Struct, gc=False):
    """An order as it comes, and with its verdict as it goes."""

    order_id: str
    user_id: int
    product_id: int
    quantity: int
    amount: str
    country: str
    created_date: str
    event_ts: str
    status: str
    source: str
    amount_numeric: int = 0
    reasons: Reasons = ()


Rule = Callable[[Order, int], Reasons]  # from an order and its event time, in microseconds since 1970


def rule_book(rules: FraudRules) -> Rule:
    """All six rules over the orders of one partition; those that come too late meet only the first three."""
    of_itself, repeat, crowd = single_order(rules), repeat_purchase(rules), neighbours(rules)
    lateness, newest = rules.lateness // MICROSECOND, 0

    def give(order: Order, at: int) -> Reasons:
        nonlocal newest
        reasons = of_itself(order, at)
        if at > newest:
            newest = at
        elif at < newest - lateness:
            return reasons
        more = repeat(order, at) + crowd(order, at)
        return tuple(sorted(reasons + more)) if more else reasons

    return give


def single_order(rules: FraudRules) -> Rule:
    """`foreign_country`, `night_amount` and `night_quantity`."""
    home, zone = rules.limits.foreign_country.home, ZoneInfo(rules.time_zone)
    many, dear = rules.limits.night_quantity.above, rules.limits.night_amount.above

    def give(order: Order, at: int) -> Reasons:
        reasons: Reasons = () if order.country == home else ("foreign_country",)
        is_large = order.quantity > many or order.amount_numeric > dear
        if is_large and datetime.fromtimestamp(at // SECOND, zone).hour < 4:
            reasons += ("night_amount",) * (order.amount_numeric > dear) + ("night_quantity",) * (order.quantity > many)
        return reasons

    return give


def repeat_purchase(rules: FraudRules) -> Rule:
    """`repeat_purchase`, from the last purchases of each user and product."""
    orders, within = rules.limits.repeat_purchase.orders, rules.limits.repeat_purchase.within // MICROSECOND
    recent: dict[int, tuple[int, ...]] = {}
    older: dict[int, tuple[int, ...]] = {}
    turned = 0

    def give(order: Order, at: int) -> Reasons:
        nonlocal recent, older, turned
        if at - turned > within:  # two generations instead of expiry: nothing older than two intervals stays
            older, recent, turned = recent, {}, at
        pair = order.user_id << 32 | order.product_id
        times = recent.get(pair) or older.get(pair)
        recent[pair] = times = (*times[1 - orders :], at) if times else (at,)
        return ("repeat_purchase",) if len(times) == orders and at - times[0] <= within else ()

    return give


def neighbours(rules: FraudRules) -> Rule:
    """`coordinated_users` and `sequential_users`, from the recent orders of each product and quantity."""
    run, run_within = rules.limits.sequential_users.users, rules.limits.sequential_users.within // MICROSECOND
    crowd, crowd_within = rules.limits.coordinated_users.users, rules.limits.coordinated_users.within // MICROSECOND
    fewest, widest = min(run, crowd), max(run_within, crowd_within)
    near: dict[int, deque[tuple[int, int]]] = defaultdict(deque)

    def give(order: Order, at: int) -> Reasons:
        around = near[order.product_id << 32 | order.quantity]
        while around and around[0][0] < at - widest:
            around.popleft()
        around.append((at, order.user_id))
        if len(around) < fewest:
            return ()
        crowded = len({user for then, user in around if then >= at - crowd_within}) >= crowd
        in_a_row = longest_run(order.user_id, {user for then, user in around if then >= at - run_within}) >= run
        return ("coordinated_users",) * crowded + ("sequential_users",) * in_a_row

    return give


def longest_run(user: int, users: set[int]) -> int:
    """How many of `users` have consecutive ids, `user` among them."""
    first = last = user
    while first - 1 in users:
        first -= 1
    while last + 1 in users:
        last += 1
    return last - first + 1


def screener(rules: FraudRules) -> Callable[[list[Message]], list[Order]]:
    """A function that turns messages into orders with verdicts. One rule book a partition: a product lives in one of them."""
    decode = msgspec.json.Decoder(Order).decode
    books: dict[int | None, Rule] = defaultdict(lambda: rule_book(rules))

    def screen(messages: list[Message]) -> list[Order]:
        orders = [decode(message.value() or b"") for message in messages]
        times = instants([order.event_ts for order in orders]).cast(pa.int64()).to_pylist()
        for message, order, at in zip(messages, orders, times, strict=True):
            order.amount_numeric = spelled_amount(order.amount)
            order.reasons = books[message.partition()](order, at)
            order.status = "Fraud" if order.reasons else "Genuine"
        return orders

    return screen


def spelled_amount(amount: str) -> int:
    """Whole rupiah of `Rp.1.250.000`, `IDR 1250000` or `1250000`."""
    return int(amount.lstrip("RpID. ").replace(".", ""))


class Sinks:
    """Kafka and Postgres. `write` is called from a thread of its own, one batch at a time, in order."""

    def __init__(self, settings: Settings, consumer: Consumer, rules_version: str) -> None:
        self._processed, self._alerts = settings.topic(PROCESSED_ORDERS), settings.topic(FRAUD_ALERT)
        self._consumer, self._producer = consumer, Producer(librdkafka_config(settings) | PRODUCER)
        self._postgres = dbapi.connect(settings.require("postgres_dsn"))
        # The first verdict stands: the same order again changes nothing.
        self._upsert = (
            f"insert into raw_orders ({COLUMNS}, rules_version, screened_at)"
            f" select {COLUMNS}, '{rules_version}', now() from staged on conflict (order_id) do nothing"
        )
        with self._postgres.cursor() as cursor:
            cursor.execute(f"create temporary table staged as select {COLUMNS} from raw_orders with no data")
        self._postgres.commit()

    def send(self, orders: list[Order]) -> None:
        """Hand verdicts and alerts to Kafka's own threads."""
        encode = msgspec.json.Encoder().encode
        verdicts = [{"key": order.order_id, "value": encode(order)} for order in orders]
        self._producer.produce_batch(self._processed, verdicts)
        self._producer.produce_batch(
            self._alerts, [sent for sent, order in zip(verdicts, orders, strict=True) if order.reasons]
        )

    def write(self, orders: list[Order], positions: list[TopicPartition]) -> None:
        """Upsert a batch, wait until Kafka has its verdicts, then commit where it ended."""
        with self._postgres.cursor() as cursor:
            cursor.execute("truncate staged")
            cursor.adbc_ingest("staged", rows(orders), mode="append", temporary=True)
            cursor.execute(self._upsert)
        self._postgres.commit()
        if self._producer.flush(60):
            raise RuntimeError("Kafka did not acknowledge the verdicts within a minute")
        self._consumer.commit(offsets=positions, asynchronous=False)


def rows(orders: list[Order]) -> pa.Table:
    """The orders as Arrow, for COPY. Spelled out, which takes a fifth of the time of a loop over the fields."""
    return pa.table(
        {
            "order_id": pa.array([order.order_id for order in orders], pa.string()),
            "user_id": pa.array([order.user_id for order in orders], pa.int64()),
            "product_id": pa.array([order.product_id for order in orders], pa.int64()),
            "quantity": pa.array([order.quantity for order in orders], pa.int64()),
            "amount": pa.array([order.amount for order in orders], pa.string()),
            "amount_numeric": pa.array([order.amount_numeric for order in orders], pa.int64()),
            "country": pa.array([order.country for order in orders], pa.string()),
            "created_date": instants([order.created_date for order in orders]),
            "event_ts": instants([order.event_ts for order in orders]),
            "status": pa.array([order.status for order in orders], pa.string()),
            "source": pa.array([order.source for order in orders], pa.string()),
            "reasons": pa.array([order.reasons for order in orders], pa.list_(pa.string())),
        }
    )


def instants(texts: list[str]) -> pa.Array:
    """ISO 8601 texts as microseconds: parsed together, which takes a tenth of the time of each alone."""
    return pa.array(texts, pa.string()).cast(pa.timestamp("us", "UTC"))


def backlog(consumer: Consumer, topic: str) -> int:
    """How many messages the topic holds now."""
    partitions = consumer.list_topics(topic, timeout=10).topics[topic].partitions
    ends = [consumer.get_watermark_offsets(TopicPartition(topic, p), timeout=10) for p in partitions]
    return sum(high - low for low, high in ends)


def main() -> None:
    """Screen what the orders topic holds; print orders, seconds from the first message to the last commit, and the rate."""
    settings = load_settings()
    rules = load_rules(settings.rules)
    consumer = Consumer(librdkafka_config(settings) | CONSUMER)
    sinks = Sinks(settings, consumer, rules.version)
    topic = settings.topic(ORDERS)
    total = backlog(consumer, topic)
    consumer.subscribe([topic])
    messages = consumer.consume(1, 60)
    started, done = time.monotonic(), 0
    screen = screener(rules)
    gc.disable()  # there are no cycles, and looking for them takes an eighth of the time
    with ThreadPoolExecutor(1) as writer:
        written: Future[None] | None = None
        while messages:
            orders = screen(messages)
            sinks.send(orders)
            if written:
                written.result()
            written = writer.submit(sinks.write, orders, consumer.position(consumer.assignment()))
            done += len(orders)
            messages = consumer.consume(min(BATCH, total - done), 10) if done < total else []
        if written:
            written.result()
    seconds = time.monotonic() - started
    consumer.close()
    print(json.dumps({"orders": done, "seconds": round(seconds, 3), "rate": round(done / seconds)}))


if __name__ == "__main__":
    main()
