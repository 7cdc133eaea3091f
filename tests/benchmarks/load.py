"""The load of the benchmark: orders with about 4% planted frauds of all six kinds, the same for every contestant.

Time is cut into stretches of 1,000 orders. In each, a fixed number of orders, drawn at random, is turned into members of
patterns: so the share is exact, patterns overlap neither each other nor a stretch's end, and micro-batches cut through them.
"""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import numpy as np
import polars as pl
from confluent_kafka import Producer

from conf.errors import KafkaError
from conf.rules import FraudRules
from conf.settings import Settings
from streaming.kafka import ORDERS, librdkafka_config

STRETCH = 1_000
USERS, PRODUCTS, QUANTITIES = 20_000, 1_000, 20
PARTITIONER = {"partitioner": "murmur2_random"}  # the one of the Java and Python clients: equal keys, equal partitions
FOREIGN = ("SG", "MY", "US", "CN")
_ORDERS_PER_SINGLE_KIND = 7  # of each STRETCH, for each of the three rules that look at one order
_PATTERNS_PER_KIND = 2  # of each STRETCH, for each of the three rules that look at neighbours

Columns = dict[str, np.ndarray]


def make_orders(count: int, *, rules: FraudRules, rate: float, start: datetime, seed: int) -> pl.DataFrame:
    """Orders in the order of their event time, `rate` of them a second from `start` on.

    Returns the columns of the order contract as they go into JSON, and `label`: the planted reason, or null. Orders of the
    night rules are back-dated to the last night that is over, as they would be when a shop catches up.

    Raises:
        ValueError: `count` is not a multiple of 1,000, the stretch in which the share of frauds is exact.
    """
    if count <= 0 or count % STRETCH:
        raise ValueError(f"The benchmark makes orders by the {STRETCH}: {count} is not a multiple of it")
    rng = np.random.default_rng(seed)
    ids = rng.bytes(16 * count).hex()
    prices = rng.integers(10, 2_000, PRODUCTS + 1) * 1_000
    columns: Columns = {
        "user_id": rng.integers(1, USERS + 1, count),
        "product_id": rng.integers(1, PRODUCTS + 1, count),
        "quantity": rng.integers(1, QUANTITIES + 1, count),
        "event_us": _microseconds(start) + (np.arange(count) * (1e6 / rate)).astype(np.int64),
        "country": np.full(count, rules.limits.foreign_country.home, dtype="U2"),
        "label": np.full(count, "", dtype="U20"),
    }
    members = _Members(rng, count)
    _plant_neighbours(columns, members, rules, rng)
    _plant_singles(columns, members, rules, rng, start)
    columns["amount"] = prices[columns["product_id"]] * columns["quantity"]
    _raise_night_amounts(columns, rules, rng)
    frame = pl.DataFrame(columns).with_columns(order_id=pl.Series([ids[i : i + 32] for i in range(0, len(ids), 32)]))
    return frame.select(_contract(rules))


class _Members:
    """Hands out the rows of every stretch, each row once, in random order."""

    def __init__(self, rng: np.random.Generator, count: int) -> None:
        rows = np.arange(count).reshape(-1, STRETCH)
        self._rows, self._taken = rng.permuted(rows, axis=1), 0

    def take(self, size: int) -> np.ndarray:
        """`size` rows of each stretch, as (stretches, size)."""
        self._taken += size
        return self._rows[:, self._taken - size : self._taken]


def _plant_neighbours(columns: Columns, members: _Members, rules: FraudRules, rng: np.random.Generator) -> None:
    user, product, quantity, label = (columns[name] for name in ("user_id", "product_id", "quantity", "label"))
    for _ in range(_PATTERNS_PER_KIND):
        rows = members.take(rules.limits.repeat_purchase.orders)
        user[rows], product[rows] = user[rows[:, :1]], product[rows[:, :1]]
        label[rows] = "repeat_purchase"

        rows = members.take(rules.limits.sequential_users.users)
        first = rng.integers(1, USERS - rows.shape[1], (len(rows), 1))
        user[rows] = first + np.arange(rows.shape[1])
        product[rows], quantity[rows] = product[rows[:, :1]], quantity[rows[:, :1]]
        label[rows] = "sequential_users"

        rows = members.take(rules.limits.coordinated_users.users)
        user[rows] = (user[rows[:, :1]] + 1 + np.arange(rows.shape[1]) * 97) % USERS + 1
        product[rows], quantity[rows] = product[rows[:, :1]], quantity[rows[:, :1]]
        label[rows] = "coordinated_users"


def _plant_singles(columns: Columns, members: _Members, rules: FraudRules, rng: np.random.Generator, start: datetime) -> None:
    foreign, many, dear = (members.take(_ORDERS_PER_SINGLE_KIND) for _ in range(3))
    columns["country"][foreign] = rng.choice(np.array(FOREIGN), foreign.shape)
    columns["quantity"][many] = rules.limits.night_quantity.above + rng.integers(1, 400, many.shape)
    midnight = _microseconds(_last_midnight(rules, start))
    for rows in (many, dear):
        columns["event_us"][rows] = midnight + rng.integers(0, 4 * 3_600 * 1_000_000, rows.shape)
    for rows, reason in ((foreign, "foreign_country"), (many, "night_quantity"), (dear, "night_amount")):
        columns["label"][rows] = reason


def _raise_night_amounts(columns: Columns, rules: FraudRules, rng: np.random.Generator) -> None:
    """Put the planted night amounts above the limit, and keep the planted night quantities below it: one reason each."""
    limit, label = rules.limits.night_amount.above, columns["label"]
    dear = label == "night_amount"
    columns["amount"][dear] = limit + rng.integers(1, limit, int(dear.sum()))
    many = label == "night_quantity"
    columns["amount"][many] = np.minimum(columns["amount"][many], limit)


def _last_midnight(rules: FraudRules, before: datetime) -> datetime:
    """The local midnight that began the last night which is over."""
    local = (before - timedelta(hours=4)).astimezone(ZoneInfo(rules.time_zone))
    return local.replace(hour=0, minute=0, second=0, microsecond=0)


def _microseconds(moment: datetime) -> int:
    return (moment - datetime.fromtimestamp(0, UTC)) // timedelta(microseconds=1)


def _contract(rules: FraudRules) -> list[pl.Expr]:
    event_ts = pl.from_epoch("event_us", "us").dt.replace_time_zone("UTC").dt.convert_time_zone(rules.time_zone)
    iso = event_ts.dt.to_string("%Y-%m-%dT%H:%M:%S%.6f%:z")
    digits = pl.col("amount").cast(pl.String)
    thousands = digits.str.reverse().str.replace_all(r"(\d{3})", "$1.").str.reverse().str.strip_prefix(".")
    spelling = pl.col("amount") // 1_000 % 3
    amount = (
        pl.when(spelling == 0)
        .then("Rp." + thousands)
        .when(spelling == 1)
        .then("IDR " + digits)
        .when(spelling == 2)
        .then(digits)
    )
    return [
        pl.col("order_id", "user_id", "product_id", "quantity"),
        amount.alias("amount"),
        pl.col("country"),
        iso.alias("created_date"),
        iso.alias("event_ts"),
        pl.lit("Pending").alias("status"),
        pl.lit("benchmark").alias("source"),
        pl.col("label").replace("", None),
    ]


def encode(orders: pl.DataFrame) -> Iterator[tuple[bytes, bytes]]:
    """The Kafka key (the product id) and value (JSON) of each order."""
    keys = orders["product_id"].cast(pl.String).to_list()
    values = orders.drop("label").write_ndjson().encode().splitlines()
    return zip((key.encode() for key in keys), values, strict=True)


def send(settings: Settings, orders: pl.DataFrame) -> None:
    """Put the orders on the `orders` topic as fast as it goes, keyed by product.

    Raises:
        KafkaError: not every order was acknowledged.
    """
    producer = Producer(
        librdkafka_config(settings)
        | PARTITIONER
        | {
            "linger.ms": 20,
            "batch.size": 1 << 18,
            "compression.type": "lz4",
            "queue.buffering.max.messages": 0,
            "queue.buffering.max.kbytes": 1 << 20,
        }
    )
    topic = settings.topic(ORDERS)
    for part in orders.iter_slices(50_000):
        for key, value in encode(part):
            producer.produce(topic, value, key)
        if unsent := producer.flush(60):
            raise KafkaError(f"{unsent} orders were not acknowledged by Kafka within a minute: see the broker's log")
