"""Running the real `finpro screen` on a real Kafka and Postgres, and reading back what became of the messages."""

import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, Any

import msgspec
import psutil
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType

from batch.postgres import connect
from conf.rules import FraudRules, load_rules
from conf.settings import Settings
from streaming.contract import EARLIEST, LATEST
from streaming.kafka import FRAUD_ALERT, ORDERS, ORDERS_DEAD_LETTER, PROCESSED_ORDERS, librdkafka_config
from tests.oracle.brute_force import Judgement, Message, Order, judge
from tests.oracle.kafka_keys import keyed_partition
from tests.oracle.order_sets import spelled
from tests.runs.commands import FINPRO, Ended, finpro

# A few lines of SQL, each column as the brute force has it.
_STORED = """
    select order_id, user_id, product_id, quantity, amount, amount_numeric, country, created_date, event_ts, source,
           status, reasons, suppressed_reasons
    from raw_orders
"""


# Across products, for `dense_orders`: patterns that are often whole and often not, some of them longer than a micro-batch.
ACROSS_PRODUCTS = """
[rules.busy_user]
by = ["user_id"]
count = { at_least = 6, within = "30 s" }
[rules.spree]
by = ["user_id"]
when = "source = 'web'"
sum = { of = "amount_numeric", at_least = 650_000_000, within = "4 min" }
[rules.foreign_rush]
by = ["country"]
when = "country <> 'ID'"
distinct = { of = "user_id", at_least = 9, within = "30 s" }
"""


def with_rules_across_products(delivered: Path, path: Path) -> FraudRules:
    """Write the rules as delivered, and ACROSS_PRODUCTS, to a file: these."""
    path.write_text(delivered.read_text(encoding="utf-8") + ACROSS_PRODUCTS, encoding="utf-8")
    return load_rules(path)


def dense_orders(count: int, rules: FraudRules, *, seed: int, start: datetime, step: timedelta) -> list[Order]:
    """Orders of few users and products, so that all six rules hit often; each a `step` after the one before, or nearly."""
    choose = random.Random(seed)
    orders = []
    for number in range(count):
        amount = choose.choice((rules.limits.night_amount.above, rules.limits.night_amount.above + 1, 1_250_000))
        event_ts = start + number * step + choose.choice((timedelta(0), timedelta(0), step, -2 * step))
        orders.append(
            Order(
                order_id=f"o{seed}-{number}",
                user_id=choose.randint(1, 30),
                product_id=choose.randint(1, 12),
                quantity=choose.choice((1, 2, 3, rules.limits.night_quantity.above + 1)),
                amount=str(amount),
                amount_numeric=amount,
                country=choose.choice((rules.limits.foreign_country.home,) * 9 + ("SG",)),
                created_date=event_ts.replace(microsecond=0),
                event_ts=event_ts,
                source=choose.choice(("web", "it's", 'a"b', "toko é 店")),
            )
        )
    return orders


def repeated(orders: Sequence[Order], *, seed: int, keyed: bool = False) -> list[tuple[bytes | None, int]]:
    """The orders as values, some of them again a little later, and some of their ids again for other content.

    What has one order_id lies in one partition, so that which came first is beyond doubt. So some products lie in several
    partitions, unless the topic is to be keyed by product: then an id is used again for the same product only.
    """
    choose = random.Random(seed)
    sent = by_product(orders)
    for place in sorted(choose.sample(range(len(orders)), len(orders) // 20), reverse=True):
        order, partition = orders[place], sent[place][1]
        others = [replace(order, quantity=order.quantity + 1), replace(order, product_id=order.product_id + 1)]
        other = choose.choice(others[:1] if keyed else others)
        sent.insert(place + choose.randint(1, 60), (spelled(choose.choice((order, other)), place % 6), partition))
    return sent


def alter_topic(settings: Settings, topic: str, **config: str) -> None:
    """Change the configuration of one of finpro's topics, and wait until it is in force; dots are underscores in names here."""
    wanted = {name.replace("_", "."): value for name, value in config.items()}
    altered = ConfigResource(ResourceType.TOPIC, settings.topic(topic))
    for name, value in wanted.items():
        altered.add_incremental_config(ConfigEntry(name, value, incremental_operation=AlterConfigOpType.SET))
    admin = AdminClient(librdkafka_config(settings))  # which has to live until it is answered
    for done in admin.incremental_alter_configs([altered]).values():
        done.result(timeout=20)
    asked = ConfigResource(ResourceType.TOPIC, settings.topic(topic))
    while {name: admin.describe_configs([asked])[asked].result(20)[name].value for name in wanted} != wanted:
        time.sleep(0.02)


def sender(settings: Settings) -> Producer:
    """A producer that keeps the order of what it sends to a partition, also where it has to send something again."""
    producer = Producer(librdkafka_config(settings) | {"enable.idempotence": True, "linger.ms": 5})
    producer.list_topics(settings.topic(ORDERS), timeout=30)  # else it asks for its id before it is connected, and again later
    return producer


def send_dated(settings: Settings, values: Sequence[tuple[bytes, int]]) -> None:
    """Put values on the `orders` topic, each in partition 0 with a timestamp of its producer's, in milliseconds."""
    producer = sender(settings)
    for value, milliseconds in values:
        producer.produce(settings.topic(ORDERS), value, partition=0, timestamp=milliseconds)
    assert producer.flush(60) == 0


def send(settings: Settings, values: Sequence[tuple[bytes | None, int]]) -> None:
    """Put values on the `orders` topic, each on its partition."""
    producer = sender(settings)
    for value, partition in values:
        producer.produce(settings.topic(ORDERS), value, partition=partition)
    assert producer.flush(60) == 0


def by_product(orders: Sequence[Order], partitions: int = 4) -> list[tuple[bytes | None, int]]:
    """Orders as values, spelled in various ways, in the partition that the key `product_id` leads to."""
    return [(spelled(order, number % 6), keyed_partition(order.product_id, partitions)) for number, order in enumerate(orders)]


_SCREEN = ("screen", "--max-offsets-per-trigger", "400")


def run_screen(*options: str, **environment: str) -> Ended:
    """Run `finpro screen`, with small micro-batches, to its end, on the tests' Spark."""
    return finpro(*_SCREEN, *options, **environment)


def start_screen(*options: str, output: IO[str] | int = subprocess.PIPE) -> subprocess.Popen[str]:
    """Start `finpro screen`, with small micro-batches, in a process group of its own."""
    return subprocess.Popen(
        [FINPRO, *_SCREEN, *options], stdout=output, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def kill_group(process: subprocess.Popen[str]) -> None:
    """SIGKILL a started `finpro screen` with all it has started."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def kill_command(process: subprocess.Popen[str], *, seconds: float = 30) -> None:
    """SIGKILL only the command: what it has started, its JVM and its workers, ends because the command is gone."""
    process.kill()
    process.communicate()
    deadline = time.monotonic() + seconds
    while left := _of_session(process.pid):
        assert time.monotonic() < deadline, f"{left} outlive the command"
        time.sleep(0.05)


def _of_session(session: int) -> list[psutil.Process]:
    """The processes that are in the session of one that led it, but for zombies."""
    found = []
    for one in psutil.process_iter():
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(one.pid) == session and one.status() != psutil.STATUS_ZOMBIE:
                found.append(one)
    return found


def consume(settings: Settings, topic: str) -> list[Any]:
    """Every committed record of one of finpro's topics, partition after partition."""
    config = {"group.id": "test", "enable.auto.commit": False, "enable.partition.eof": True, "fetch.wait.max.ms": 10}
    consumer = Consumer(librdkafka_config(settings) | config)
    name = settings.topic(topic)
    try:
        records: dict[int, list[Any]] = {
            one: [] for one in sorted(consumer.list_topics(name, timeout=10).topics[name].partitions)
        }
        consumer.assign([TopicPartition(name, partition, OFFSET_BEGINNING) for partition in records])
        unread = set(records)
        while unread:
            record = consumer.poll(30)  # many at once would be waited for as long as there are fewer
            assert record is not None
            partition = record.partition()
            assert partition is not None
            if error := record.error():
                assert error.code() == KafkaError._PARTITION_EOF
                unread.discard(partition)
            else:
                records[partition].append(record)
    finally:
        consumer.close()
    return [record for of_partition in records.values() for record in of_partition]


def sent_messages(settings: Settings) -> list[Message]:
    """The `orders` topic as the brute force reads it: with the positions and times that Kafka gave."""
    return [
        Message(
            ORDERS,
            record.partition(),
            record.offset(),
            kafka_time(record.timestamp()[1]),
            record.key(),
            record.value(),
        )
        for record in consume(settings, ORDERS)
    ]


def kafka_time(milliseconds: int) -> datetime:
    """A Kafka timestamp; what no datetime holds is the first or last one."""
    try:
        return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=milliseconds)
    except OverflowError:
        return LATEST if milliseconds > 0 else EARLIEST


@dataclass(frozen=True)
class Outcome:
    """What screening left behind.

    Attributes:
        stored: `raw_orders`, by order_id, with the columns of `_STORED`.
        last_verdicts: the newest record of each key on `processed_orders`, by `screened_at`.
        verdicts_sent: how many records each key has there.
        alerts: the newest record of each key on `fraud_alert`.
        dead_letters: position → reason.
        dead_letters_sent: how many records there are for each.
    """

    stored: dict[str, dict[str, Any]]
    last_verdicts: dict[str, dict[str, Any]]
    verdicts_sent: Counter[str]
    alerts: dict[str, dict[str, Any]]
    dead_letters: dict[tuple[str, int, int], str]
    dead_letters_sent: Counter[tuple[str, int, int]]


def outcome(settings: Settings) -> Outcome:
    """Read back everything that screening wrote."""
    with connect(settings.require("postgres_dsn")) as connection, connection.cursor() as cursor:
        cursor.execute(_STORED)
        columns = [column.name for column in cursor.description or ()]
        rows = [dict(zip(columns, row, strict=True)) for row in cursor.fetchall()]
    verdicts = sorted(_decoded(settings, PROCESSED_ORDERS), key=_screened_at)
    dead_letters = [
        ({name: value.decode() for name, value in record.headers()}) for record in consume(settings, ORDERS_DEAD_LETTER)
    ]
    places = [(ORDERS, int(dead_letter["partition"]), int(dead_letter["offset"])) for dead_letter in dead_letters]
    return Outcome(
        stored={row["order_id"]: row for row in rows},
        last_verdicts=dict(verdicts),
        verdicts_sent=Counter(key for key, _ in verdicts),
        alerts=dict(sorted(_decoded(settings, FRAUD_ALERT), key=_screened_at)),
        dead_letters={place: dead_letter["reason"] for place, dead_letter in zip(places, dead_letters, strict=True)},
        dead_letters_sent=Counter(places),
    )


def _screened_at(record: tuple[str, dict[str, Any]]) -> str:
    """By which the newest of a key's records is known: of two tasks that revise an order, either may announce it first."""
    return str(record[1]["screened_at"])


def _decoded(settings: Settings, topic: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for record in consume(settings, topic):
        yield record.key().decode(), msgspec.json.decode(record.value())


def assert_agrees(found: Outcome, judgement: Judgement) -> None:
    """`raw_orders`, the last verdicts, the alerts and the dead letters are what the brute force says, and nothing else is."""
    expected = {order_id: dict(vars(verdict)) for order_id, verdict in judgement.orders.items()}
    assert found.stored.keys() == expected.keys()
    assert [(found.stored[order_id], row) for order_id, row in expected.items() if found.stored[order_id] != row] == []
    assert set(found.dead_letters) == set(judgement.dead_letters)
    assert all(found.dead_letters.values())
    kinds = ("status", "reasons", "suppressed_reasons")
    last = {order_id: [verdict.get(kind, []) for kind in kinds] for order_id, verdict in found.last_verdicts.items()}
    assert last == {order_id: [getattr(verdict, kind) for kind in kinds] for order_id, verdict in judgement.orders.items()}
    alerts = {order_id: (alert["reasons"], sorted(alert["evidence"])) for order_id, alert in found.alerts.items()}
    frauds = {order_id: verdict.reasons for order_id, verdict in judgement.orders.items() if verdict.reasons}
    assert alerts == {order_id: (reasons, reasons) for order_id, reasons in frauds.items()}


def judged(settings: Settings, rules: FraudRules) -> Judgement:
    """The brute force's verdicts on all that lies on the `orders` topic, as if it were read now."""
    return judge(sent_messages(settings), rules, read_at=datetime.now(UTC))
