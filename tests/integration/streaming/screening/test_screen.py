"""`finpro screen` on a real Kafka and Postgres: everything sent ends as the brute force says, whatever it is."""

import itertools
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from confluent_kafka.admin import AdminClient, ConfigResource, NewTopic, ResourceType

from batch.postgres import connect, told_of_silence
from conf.rules import FraudRules, load_rules
from conf.settings import Settings
from jobs import screen_orders
from jobs.local.platform import Platform
from streaming.kafka import (
    FRAUD_ALERT,
    ORDERS,
    ORDERS_DEAD_LETTER,
    PROCESSED_ORDERS,
    TOPICS,
    OrdersKept,
    create_topics,
    librdkafka_config,
    orders_kept,
)
from tests.oracle.bad_messages import BAD, RECEIVED, encoded, good, mutations
from tests.oracle.brute_force import Judgement
from tests.oracle.kafka_keys import keyed_partition
from tests.oracle.order_sets import spelled
from tests.runs import screening as runs
from tests.runs.archive import archive_all
from tests.runs.commands import finpro
from tests.runs.logins import login, own_schema
from tests.runs.silent_servers import Relay

pytestmark = pytest.mark.usefixtures("spark_session")


@pytest.fixture
def rules(settings: Settings) -> FraudRules:
    return load_rules(settings.rules)


def recently(minutes: float) -> datetime:
    return datetime.now(UTC) - timedelta(minutes=minutes)


def frauds(judgement: Judgement) -> set[str]:
    return {reason for verdict in judgement.orders.values() for reason in verdict.reasons}


def end_offsets(settings: Settings) -> dict[str, int]:
    return {topic: len(runs.consume(settings, topic)) for topic in (PROCESSED_ORDERS, FRAUD_ALERT, ORDERS_DEAD_LETTER)}


def misplaced(partition: int) -> tuple[bytes, int]:
    """A good message on a partition to which the key of its product would not lead."""
    product = next(product for product in itertools.count(301) if keyed_partition(product, 4) == (partition + 1) % 4)
    return encoded(good(f"misplaced-{partition}", user_id=301 + 2 * partition, product_id=product)), partition


def last_changes(settings: Settings) -> list[tuple[str, str]]:
    with connect(settings.require("postgres_dsn")) as connection, connection.cursor() as cursor:
        cursor.execute("select order_id, change_xid::text from raw_orders order by 1")
        return cursor.fetchall()


def test_good_bad_and_mutated_messages_end_as_the_brute_force_says_and_a_second_run_adds_nothing(
    settings: Settings, tmp_path: Path
) -> None:
    path = tmp_path / "rules.toml"
    path.write_text('version = "patient"\nlateness = "1 h"\n')  # the mutations all have much the same event time
    rules = load_rules(path)
    start = RECEIVED - timedelta(days=1)
    orders = runs.dense_orders(2_500, rules, seed=1, start=start, step=timedelta(milliseconds=400))
    values = runs.repeated(orders, seed=1)
    bad = [message.value for message in BAD] + [mutation.value for mutation in mutations(7, 300)]
    for number, value in enumerate(bad):
        values.insert(number * 5, (value, number % 4))
    # Whichever partitions a task reads, it finds before it announces anything that products lie on others: what is announced
    # by then is announced again.
    runs.send(settings, [*(misplaced(partition) for partition in range(4)), *values])

    first = runs.run_screen("--available-now", FINPRO_RULES=str(path))
    assert first.returncode == 0, first.stderr
    judgement = runs.judged(settings, rules)
    found = runs.outcome(settings)
    runs.assert_agrees(found, judgement)
    assert frauds(judgement) == {
        "coordinated_users",
        "foreign_country",
        "repeat_purchase",
        "sequential_users",
    } | (frauds(judgement) & {"night_amount", "night_quantity"})
    assert set(found.dead_letters_sent.values()) == {1}

    before = end_offsets(settings), last_changes(settings)
    second = runs.run_screen("--available-now", FINPRO_RULES=str(path))
    assert second.returncode == 0, second.stderr
    assert "Traceback" not in second.stderr + second.stdout, "it ends before its workers have started"
    assert (end_offsets(settings), last_changes(settings)) == before


def test_a_backlog_in_partitions_of_ten_to_one_and_not_keyed_by_product_makes_no_order_late(
    settings: Settings, rules: FraudRules
) -> None:
    orders = runs.dense_orders(2_200, rules, seed=2, start=recently(90), step=timedelta(seconds=1))
    values = [(spelled(order), int(number % 11 == 0)) for number, order in enumerate(orders)]
    runs.send(settings, [value for value in values if value[1] == 0])
    runs.send(settings, [value for value in values if value[1] == 1])
    screened = runs.run_screen("--available-now", "--buckets", "3")
    assert screened.returncode == 0, screened.stderr
    runs.assert_agrees(runs.outcome(settings), runs.judged(settings, rules))
    assert "orders are shuffled from now on" in screened.stdout
    assert "late" not in screened.stdout


def test_a_duplicate_or_a_reused_id_is_recognised_long_after_its_order_has_left_the_state(
    settings: Settings, rules: FraudRules
) -> None:
    old = runs.dense_orders(60, rules, seed=3, start=recently(120), step=timedelta(seconds=1))
    new = runs.dense_orders(60, rules, seed=4, start=recently(10), step=timedelta(seconds=1))
    runs.send(settings, runs.by_product(old))
    runs.send(settings, runs.by_product(new))
    first = runs.run_screen("--available-now")
    assert first.returncode == 0
    assert "shuffled" not in first.stdout, "the topic is keyed by product"
    before = end_offsets(settings), last_changes(settings)
    runs.send(settings, runs.by_product(old))
    assert runs.run_screen("--available-now").returncode == 0
    assert (end_offsets(settings), last_changes(settings)) == before
    stolen = [order.__class__(**{**vars(order), "product_id": order.product_id + 1}) for order in old[:10]]
    runs.send(settings, runs.by_product(stolen))
    assert runs.run_screen("--available-now").returncode == 0
    found = runs.outcome(settings)
    runs.assert_agrees(found, runs.judged(settings, rules))
    assert len(found.dead_letters) == 10


UNLIMITED = str(2**63 - 1)
PRODUCERS_TIME = {
    "message.timestamp.type": "CreateTime",
    "message.timestamp.after.max.ms": UNLIMITED,
    "message.timestamp.before.max.ms": UNLIMITED,
}


@pytest.fixture
def undated(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    """Settings of topics of which `orders` carries whatever time its producers give."""
    undated = settings.model_copy(update={"topic_prefix": f"{settings.topic_prefix}undated_"})
    monkeypatch.setenv("FINPRO_TOPIC_PREFIX", undated.topic_prefix)
    admin = AdminClient(librdkafka_config(undated))
    for created in admin.create_topics([NewTopic(undated.topic(ORDERS), 1, config=PRODUCERS_TIME)]).values():
        created.result(timeout=20)
    create_topics(undated, partitions=1)
    yield undated
    for deleted in admin.delete_topics([undated.topic(name) for name in TOPICS]).values():
        deleted.result(timeout=20)


def milliseconds(moment: datetime) -> int:
    return round(moment.timestamp() * 1000)


def test_kafka_timestamps_of_any_kind_end_as_the_brute_force_says_in_the_stream_the_lakehouse_and_the_audit(
    undated: Settings, rules: FraudRules
) -> None:
    now = datetime.now(UTC)
    stamps = {
        "none": -1,
        "the year -27": -63_000_000_000_000,
        "microseconds": milliseconds(now) * 1000,
        "the year 10000": 253_402_300_800_000,
        "the farthest": (2**63 - 1) // 1000,
        "the farthest back": -(2**63 - 1) // 1000 + 1,
        "fifty minutes ahead": milliseconds(now + timedelta(minutes=50)),
    }
    sent = []
    for number, stamp in enumerate(stamps.values()):
        moments = {
            "honest": now,
            "ahead": now + timedelta(minutes=50),
            "last": datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC),
            "ancient": datetime(998, 7, 6, 5, tzinfo=UTC),
        }
        orders = [
            encoded(good(f"{name}-{number}", event_ts=moment.isoformat(), created_date=min(moment, now).isoformat()))
            for name, moment in moments.items()
        ]
        sent += [(value, stamp) for value in (b"not json", *orders)]
    runs.send_dated(undated, sent)
    screened = runs.run_screen("--available-now")
    assert screened.returncode == 0, screened.stderr
    assert screened.stderr.count("message.timestamp.type is CreateTime") == 1

    found, judgement = runs.outcome(undated), runs.judged(undated, rules)
    runs.assert_agrees(found, judgement)
    in_the_past = {list(stamps).index(name) for name in ("the year -27", "the farthest back")}
    assert set(found.stored) == {
        f"{name}-{number}" for name in ("honest", "ancient") for number in range(len(stamps)) if number not in in_the_past
    }
    reasons = [found.dead_letters[ORDERS, 0, 5 * number] for number in range(len(stamps))]
    before, after = (f"(its Kafka timestamp lies {when})" for when in ("before the year 1", "after the year 9999"))
    remarks = ("", before, after, after, after, before, "")
    assert all(reason.endswith(remark) for reason, remark in zip(reasons, remarks, strict=True)), reasons
    assert sum("its Kafka timestamp lies" in reason for reason in reasons) == 5
    assert "it has no Kafka timestamp" in found.dead_letters[ORDERS, 0, 3]

    archive_all()
    audited = finpro("audit")
    assert audited.returncode == 0, audited.stdout + audited.stderr
    assert "every verdict and every dead letter is what it has to be" in audited.stdout
    since = finpro("audit", "--since", (now - timedelta(minutes=1)).isoformat())
    assert "every verdict and every dead letter is what it has to be" in since.stdout, since.stdout
    assert f"audited {len(found.stored) // 2} orders" in since.stdout


def test_one_producer_whose_clock_is_ahead_hides_no_pattern_of_others(undated: Settings, rules: FraudRules) -> None:
    now = datetime.now(UTC) - timedelta(seconds=10)
    ahead = now + timedelta(minutes=50)
    runs.send_dated(undated, [(encoded(good("ahead", event_ts=ahead.isoformat(), user_id=9)), milliseconds(ahead))])
    assert runs.run_screen("--available-now").returncode == 0
    for second in range(3):
        moment = now + timedelta(seconds=second)
        value = encoded(good(f"later-{second}", event_ts=moment.isoformat(), created_date=moment.isoformat()))
        runs.send_dated(undated, [(value, milliseconds(moment))])
        assert runs.run_screen("--available-now").returncode == 0
    found = runs.outcome(undated)
    runs.assert_agrees(found, runs.judged(undated, rules))
    assert {order_id: row["reasons"] for order_id, row in found.stored.items()} == {
        f"later-{second}": ["repeat_purchase"] for second in range(3)
    }
    assert "when it was read, as its Kafka timestamp does" in found.dead_letters[ORDERS, 0, 0]


def test_a_timestamp_that_spark_cannot_hold_is_named_with_its_place(undated: Settings) -> None:
    runs.send_dated(undated, [(b"in nanoseconds", milliseconds(datetime.now(UTC)) * 1_000_000)])
    failed = runs.run_screen("--available-now")
    assert failed.returncode == 3
    assert f"topic {undated.topic(ORDERS)} partition 0 offset 0" in failed.stderr
    assert "nanoseconds" in failed.stderr
    assert "nothing is lost" not in failed.stderr
    assert "Traceback" not in failed.stderr


def test_a_compacted_topic_of_orders_is_refused_by_name_and_said_by_status(settings: Settings) -> None:
    runs.alter_topic(settings, ORDERS, cleanup_policy="compact,delete")
    failed = runs.run_screen("--available-now")
    assert failed.returncode == 3
    assert f"topic {settings.topic(ORDERS)} is compacted" in failed.stderr
    assert "--add-config cleanup.policy=delete" in failed.stderr
    assert "is compacted" in finpro("status").stdout
    assert "is compacted" in finpro("migrate").stderr


def test_topics_are_made_to_keep_every_message_and_orders_to_carry_kafkas_time(settings: Settings) -> None:
    admin = AdminClient(librdkafka_config(settings))
    asked = [ConfigResource(ResourceType.TOPIC, settings.topic(name)) for name in TOPICS]
    configs = {resource.name: answer.result() for resource, answer in admin.describe_configs(asked).items()}
    own = {name: {key for key, entry in config.items() if not entry.is_default} for name, config in configs.items()}
    assert all("cleanup.policy" in keys for keys in own.values()), "not left to the broker"
    assert {config["cleanup.policy"].value for config in configs.values()} == {"delete"}
    assert configs[settings.topic(ORDERS)]["message.timestamp.type"].value == "LogAppendTime"
    assert orders_kept(settings) == OrdersKept()


def test_sigterm_lets_the_micro_batch_finish_and_exits_0(settings: Settings, rules: FraudRules) -> None:
    orders = runs.dense_orders(6_000, rules, seed=5, start=recently(60), step=timedelta(milliseconds=100))
    runs.send(settings, runs.by_product(orders))
    process = runs.start_screen("--trigger", "0 seconds")
    try:
        deadline = time.monotonic() + 90
        while not last_changes(settings) and time.monotonic() < deadline:
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            runs.kill_group(process)
    assert process.returncode == 0, output
    stored = len(last_changes(settings))
    assert 0 < stored < 6_000
    announced = runs.outcome(settings)
    assert set(announced.last_verdicts) == set(announced.stored)
    offsets, commits = (
        sorted(Path(settings.checkpoints, "screen_orders", name).glob("[0-9]*")) for name in ("offsets", "commits")
    )
    assert len(commits) in (len(offsets), len(offsets) - 1)
    assert runs.run_screen("--available-now").returncode == 0
    runs.assert_agrees(runs.outcome(settings), runs.judged(settings, rules))


@pytest.mark.parametrize(
    ("environment", "code", "words"),
    [
        ({"FINPRO_KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:1"}, 3, ["Kafka at 127.0.0.1:1", "FINPRO_KAFKA_BOOTSTRAP_SERVERS"]),
        ({"FINPRO_POSTGRES_DSN": "postgresql://finpro:x@127.0.0.1:1/finpro"}, 4, ["127.0.0.1:1/finpro", "FINPRO_POSTGRES_DSN"]),
        ({"FINPRO_TOPIC_PREFIX": "nowhere_"}, 3, ["no topic", "nowhere_orders", "finpro migrate"]),
    ],
    ids=["kafka unreachable", "postgres unreachable", "topic missing"],
)
def test_what_is_missing_is_said_in_one_message(
    settings: Settings, environment: dict[str, str], code: int, words: list[str]
) -> None:
    failed = runs.run_screen("--available-now", **environment)
    assert failed.returncode == code
    assert all(word in failed.stderr for word in words), failed.stderr
    assert "Traceback" not in failed.stderr
    assert [line for line in failed.stderr.splitlines() if line.startswith("finpro: ")] == failed.stderr.splitlines()[:1]


def test_a_checkpoint_of_a_version_with_its_state_in_spark_is_refused(settings: Settings) -> None:
    Path(settings.checkpoints, "screen_orders", "state", "0").mkdir(parents=True)
    failed = runs.run_screen("--available-now")
    assert failed.returncode == 7
    assert "was made by an older version of finpro" in failed.stderr
    assert "Traceback" not in failed.stdout + failed.stderr


def test_a_checkpoint_without_its_state_in_postgres_is_refused_and_a_new_one_starts(
    settings: Settings, rules: FraudRules
) -> None:
    runs.send(settings, runs.by_product(runs.dense_orders(60, rules, seed=8, start=recently(10), step=timedelta(seconds=1))))
    assert runs.run_screen("--available-now").returncode == 0
    with connect(settings.require("postgres_dsn")) as connection, connection.cursor() as cursor:
        cursor.execute("truncate screening_state")
    failed = runs.run_screen("--available-now")
    assert failed.returncode == 7
    assert "screening_state in Postgres holds 0 rows of micro-batch 0, and should hold " in failed.stderr
    assert "has Postgres lost what was committed, or been restored from a copy?" in failed.stderr
    assert "Traceback" not in failed.stdout + failed.stderr
    before = end_offsets(settings), last_changes(settings)
    Path(settings.checkpoints, "screen_orders").rename(Path(settings.checkpoints, "old"))
    assert runs.run_screen("--available-now").returncode == 0
    assert (end_offsets(settings), last_changes(settings)) == before


def test_a_wrong_password_is_said_without_the_password(settings: Settings) -> None:
    dsn = settings.require("postgres_dsn")
    password = dsn.split(":")[2].split("@")[0]
    failed = runs.run_screen("--available-now", FINPRO_POSTGRES_DSN=dsn.replace(password, "wrong-secret"))
    assert failed.returncode == 4
    assert "refused the user or password" in failed.stderr
    assert "wrong-secret" not in failed.stderr + failed.stdout
    assert "Traceback" not in failed.stderr


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('time_zone = "Mars/Olympus"', ["time_zone", "Mars/Olympus"]),
        ("[night_quantity]\nabove = -1", ["night_quantity.above", "-1"]),
        ("[repeat_purchase]\nodrers = 3", ["repeat_purchase.odrers", "unknown key"]),
    ],
    ids=["nonsense zone", "negative limit", "unknown key"],
)
def test_a_bad_rules_file_is_said_in_one_message(settings: Settings, tmp_path: Path, line: str, words: list[str]) -> None:
    path = tmp_path / "rules.toml"
    path.write_text(f'version = "1"\n{line}\n')
    failed = runs.run_screen("--available-now", FINPRO_RULES=str(path))
    assert failed.returncode == 2
    assert all(word in failed.stderr for word in [*words, str(path)]), failed.stderr
    assert "Traceback" not in failed.stderr


def test_a_login_with_hasty_limits_and_an_older_table_in_a_schema_of_its_own_screens_into_finpros_tables(
    settings: Settings, platform: Platform, rules: FraudRules
) -> None:
    owner = settings.require("postgres_dsn")
    runs.send(settings, runs.by_product(runs.dense_orders(900, rules, seed=9, start=recently(30), step=timedelta(seconds=1))))
    with login(platform, owner, "finpro_screen", hasty=True) as own:
        own_schema(platform, owner, own)
        screened = runs.run_screen("--available-now", FINPRO_POSTGRES_DSN=own)
        assert screened.returncode == 0, screened.stderr
    runs.assert_agrees(runs.outcome(settings), runs.judged(settings, rules))


@pytest.mark.skipif(sys.platform != "linux", reason="packets are dropped in Linux's way")
def test_a_postgres_that_falls_silent_is_told_of_and_screening_goes_on_once_it_answers(
    settings: Settings, rules: FraudRules, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(screen_orders, "told_of_silence", partial(told_of_silence, every_seconds=0.5))
    dsn = settings.require("postgres_dsn")
    runs.send(
        settings, runs.by_product(runs.dense_orders(6_000, rules, seed=10, start=recently(60), step=timedelta(seconds=0.1)))
    )
    relay, stored_before = Relay(urlsplit(dsn).port or 0), list[int]()

    def fall_silent() -> None:
        while not last_changes(settings):
            time.sleep(0.05)
        with relay.silence():
            time.sleep(1)
            stored_before.append(len(last_changes(settings)))
            time.sleep(5)
            stored_before.append(len(last_changes(settings)))

    silence = threading.Thread(target=fall_silent)
    silence.start()
    soon = {"connect_timeout": "2", "keepalives_idle": "1", "keepalives_interval": "1", "tcp_user_timeout": "1500"}
    with closing(relay):
        screened = runs.run_screen("--available-now", FINPRO_POSTGRES_DSN=relay.dsn(dsn, **soon))
    silence.join()
    assert screened.returncode == 0, screened.stderr
    assert stored_before[0] == stored_before[1] < 6_000, "it was silent while there was work"
    assert "it cannot be reached" in screened.stderr
    assert "answers again, after" in screened.stderr
    runs.assert_agrees(runs.outcome(settings), runs.judged(settings, rules))
