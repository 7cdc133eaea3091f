"""`finpro screen` on a real Kafka and Postgres: everything sent ends as the brute force says, whatever it is."""

import signal
import sys
import threading
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from batch.postgres import connect, told_of_silence
from conf.rules import FraudRules, load_rules
from conf.settings import Settings
from jobs import screen_orders
from jobs.local.platform import Platform
from streaming.kafka import FRAUD_ALERT, ORDERS_DEAD_LETTER, PROCESSED_ORDERS
from tests.oracle.bad_messages import BAD, RECEIVED, mutations
from tests.oracle.brute_force import Judgement
from tests.oracle.order_sets import spelled
from tests.runs import screening as runs
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
    runs.send(settings, values)

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
    assert "Postgres holds no state: has Postgres, or the checkpoint, been restored from a copy?" in failed.stderr
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
