"""`finpro produce` on a real Kafka and Postgres."""

import signal
import subprocess
import sys
from collections import Counter
from concurrent.futures import Future
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from confluent_kafka.admin import AdminClient

from batch.reference_data import generate
from conf.errors import KafkaError, PostgresError
from conf.rules import load_rules
from conf.settings import Settings
from streaming.kafka import ORDERS, librdkafka_config
from streaming.shop import producer
from streaming.shop.producer import Progress, produce
from tests.runs.screening import alter_topic, consume, judged

COMMAND = [str(Path(sys.executable).with_name("finpro")), "produce"]


@pytest.fixture
def shop(settings: Settings) -> Settings:
    """A place with users and products."""
    generate(settings.require("postgres_dsn"), user_count=20_000, product_count=1_000, seed=1)
    return settings


def test_every_message_that_the_report_counts_is_in_the_topic_and_is_what_it_says(shop: Settings) -> None:
    report = produce(shop, orders=6_000, rate=0, seed=3, broken=0.02, duplicates=0.02)
    records = consume(shop, ORDERS)
    assert len(records) == report.orders + report.duplicates + sum(report.broken.values())
    assert report.orders == 6_000
    assert report.planted == 240
    assert not report.interrupted

    judgement = judged(shop, load_rules(shop.rules))
    assert len(judgement.orders) == report.orders
    assert judgement.duplicates == report.duplicates > 0
    assert len(judgement.dead_letters) == sum(report.broken.values()) > 0


def test_labels_travel_in_a_header_and_are_reasons_that_the_rules_give(shop: Settings) -> None:
    report = produce(shop, orders=6_000, rate=0, seed=3)
    rules = load_rules(shop.rules)
    judgement = judged(shop, rules)
    by_value = {record.value(): dict(record.headers() or []) for record in consume(shop, ORDERS)}
    labels = {value: headers["label"].decode().split(",") for value, headers in by_value.items() if headers}
    assert Counter(reason for label in labels.values() for reason in label) == report.labels
    assert set(report.labels) == set(rules.names)
    verdicts = {order_id: set(verdict.reasons) for order_id, verdict in judgement.orders.items()}
    unfounded = [value for value, label in labels.items() if not set(label) <= verdicts[_order_id(value)]]
    assert not unfounded


def _order_id(value: bytes) -> str:
    return value.decode().split('"order_id":"')[1].split('"')[0]


def test_an_order_lies_in_the_partition_of_its_product(shop: Settings) -> None:
    produce(shop, orders=3_000, rate=0, seed=3, duplicates=0.05)
    places: dict[bytes, set[int]] = {}
    for record in consume(shop, ORDERS):
        places.setdefault(record.key(), set()).add(record.partition())
    assert {len(partitions) for partitions in places.values()} == {1}
    assert {partition for partitions in places.values() for partition in partitions} == {0, 1, 2, 3}


def test_one_seed_and_start_send_the_same_messages_again(shop: Settings) -> None:
    first = produce(shop, orders=2_000, rate=0, seed=3, broken=0.02, duplicates=0.02)
    sent = consume(shop, ORDERS)
    produce(shop, orders=2_000, rate=0, seed=3, broken=0.02, duplicates=0.02, start=first.start)
    both = Counter((record.partition(), record.key(), record.value()) for record in consume(shop, ORDERS))
    once = Counter((record.partition(), record.key(), record.value()) for record in sent)
    assert both == once + once


def test_a_later_run_with_the_same_seed_brings_new_orders(shop: Settings) -> None:
    for _ in range(2):
        produce(shop, orders=500, rate=0, seed=3)
    assert len(judged(shop, load_rules(shop.rules)).orders) == 1_000


def test_a_run_keeps_its_rate_and_its_event_times_are_the_moments_of_sending(shop: Settings) -> None:
    before = datetime.now(UTC)
    report = produce(shop, orders=900, rate=300, seed=3, bursts=0)
    assert before < report.start < datetime.now(UTC)
    assert 2.9 <= report.seconds <= 4.5
    delays = []
    for order, record in _by_order(shop):
        received = datetime.fromtimestamp(record / 1_000, UTC)
        delays.append((received - order).total_seconds())
    assert min(delays) > -0.002  # Kafka's timestamps are whole milliseconds
    assert sorted(delays)[len(delays) // 2] < 0.5


def _by_order(settings: Settings) -> list[tuple[datetime, int]]:
    """Event time and Kafka timestamp (milliseconds) of each message."""
    judgement = judged(settings, load_rules(settings.rules))
    return [(judgement.orders[_order_id(each.value())].event_ts, each.timestamp()[1]) for each in consume(settings, ORDERS)]


def test_a_run_that_cannot_keep_its_rate_says_how_far_behind_it_is(shop: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(producer, "_PROGRESS_EVERY_SECONDS", 0.2)
    heard: list[Progress] = []
    report = produce(shop, orders=20_000, rate=1_000_000, seed=3, on_progress=heard.append)
    behind = [progress for progress in heard if progress.behind_seconds > 0.25]
    assert report.orders == 20_000
    assert report.behind_seconds > 0.25
    assert behind
    assert all(progress.behind_orders == 20_000 - progress.sent for progress in behind)


def test_a_backlog_looks_like_history_that_ends_now(shop: Settings) -> None:
    report = produce(shop, orders=1_000, rate=0, seed=3, bursts=0, event_rate=10)
    events = sorted(verdict.event_ts for verdict in judged(shop, load_rules(shop.rules)).orders.values())
    assert report.seconds < 20
    assert timedelta(seconds=99) < events[-1] - events[0] < timedelta(seconds=100)
    assert timedelta(0) < datetime.now(UTC) - events[-1] < timedelta(seconds=60)


def test_a_stopped_run_counts_what_kafka_has(shop: Settings) -> None:
    asked = iter([False] * 5 + [True])
    report = produce(shop, orders=20_000, rate=0, seed=3, stop=lambda: next(asked))
    assert report.interrupted
    assert report.orders == len(consume(shop, ORDERS)) == 5_000


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_ends_cleanly_on_a_signal(shop: Settings, number: signal.Signals) -> None:
    command = [*COMMAND, "--orders", "0", "--rate", "100"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        process.stderr.readline()
        process.send_signal(number)
        printed, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    acknowledged = int(printed.split()[0])
    assert acknowledged == len(consume(shop, ORDERS)) > 0
    assert "stopped before the end, as asked" in printed


def test_a_message_that_kafka_refuses_is_an_error(shop: Settings) -> None:
    alter_topic(shop, ORDERS, max_message_bytes="100")
    with pytest.raises(KafkaError, match=r"(?s)At least 0 messages were acknowledged.*MessageSizeTooLarge"):
        produce(shop, orders=10, rate=0, seed=3)


def test_a_topic_that_is_gone_in_the_middle_of_a_run_is_an_error(shop: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(producer, "_DELIVERY_TIMEOUT_SECONDS", 3)

    admin = AdminClient(librdkafka_config(shop))
    deletions: list[Future[None]] = []

    def delete_topic(progress: Progress) -> None:
        if not deletions:
            deletions.extend(admin.delete_topics([shop.topic(ORDERS)]).values())

    with pytest.raises(
        KafkaError, match=r"did not take the orders\. At least [\d,]+ messages were acknowledged before, .* --start 20"
    ):
        produce(shop, orders=20_000, rate=500, seed=3, on_progress=delete_topic)


def test_a_missing_topic_is_one_message_that_names_the_command(shop: Settings) -> None:
    with pytest.raises(KafkaError, match=r"no topic .*elsewhere_orders\. `finpro migrate`"):
        produce(shop.model_copy(update={"topic_prefix": "elsewhere_"}), orders=10, rate=0, seed=3)


def test_a_kafka_that_does_not_answer_is_one_message_and_an_exit_code(shop: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINPRO_KAFKA_BOOTSTRAP_SERVERS", "127.0.0.1:9")
    ended = subprocess.run(COMMAND, capture_output=True, text=True)
    assert ended.returncode == KafkaError.exit_code
    assert ended.stderr.startswith("finpro: Kafka at 127.0.0.1:9 does not answer")
    assert "Traceback" not in ended.stderr


def test_without_users_the_message_names_the_command_that_makes_them(settings: Settings) -> None:
    with pytest.raises(PostgresError, match="`finpro generate`"):
        produce(settings, orders=10, rate=0, seed=3)
