"""The ledger: who may screen, what a micro-batch goes on from, and what is refused, on a real Postgres, Kafka and Spark."""

import json
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka.admin import AdminClient
from psycopg2.errors import LockNotAvailable

from batch.arrow_sessions import ArrowCursor, arrow_session
from batch.postgres import connect
from batch.sessions import USUAL
from conf.errors import StreamingError
from conf.rules import FraudRules, load_rules
from conf.settings import Settings
from streaming.kafka import ORDERS, PROCESSED_ORDERS, create_topics, librdkafka_config
from streaming.screening import ledger as ledgers
from streaming.screening.ledger import PARTS, Driver, Entry, Ledger, require_open
from tests.runs import screening as runs

HERE = Driver.this()
ELSEWHERE = Driver("far.away", "another kernel", 17)


@pytest.fixture
def dsn(settings: Settings) -> str:
    return settings.require("postgres_dsn")


@pytest.fixture
def rules(settings: Settings) -> FraudRules:
    return load_rules(settings.rules)


Drive = Callable[..., Ledger]


@pytest.fixture
def drive(dsn: str) -> Iterator[Drive]:
    """Makes ledgers of the query `q` that their drivers have taken, and lets them go at the end."""
    made: list[Ledger] = []

    def take(driver: Driver = HERE, **options: Any) -> Ledger:
        made.append(Ledger(dsn, "checkpoint", driver, **options))
        made[-1].take("q")
        return made[-1]

    yield take
    for one in made:
        one.close()


def sql(dsn: str, statement: str, *values: Any) -> list[tuple[Any, ...]]:
    with connect(dsn) as connection, connection.cursor() as cursor:
        cursor.execute(statement, values)
        return cursor.fetchall() if cursor.description else []


def opened(ledger: Ledger, number: int, end: int, *, topic: str = "topic", rules: str = "1") -> Entry:
    return ledger.open(number, {0: end, 1: 0}, lambda: {0: 0, 1: 0}, topic, rules)


def stores(dsn: str, entry: Entry) -> None:
    """What a task does at the beginning of its transaction."""
    with arrow_session(dsn, application_name="test", limits=USUAL) as session:
        require_open(ArrowCursor(session.connection), entry)


# --- one driver at a time --------------------------------------------------------------------------------------------


def test_a_second_driver_is_told_who_has_the_query(drive: Drive, dsn: str) -> None:
    first = drive()
    process = subprocess.Popen(["sleep", "60"])
    try:
        sql(dsn, "update screening_drivers set process = %s", process.pid)
        with pytest.raises(
            StreamingError, match=f"being screened from already, by process {process.pid} on {HERE.host}, since 20"
        ):
            drive()
    finally:
        process.kill()
        process.wait()
    entry = opened(drive(), 0, 10)  # it is gone: at once
    assert entry.epoch == 2
    with pytest.raises(StreamingError, match="has another driver since"):
        opened(first, 0, 10)


def test_a_driver_elsewhere_is_replaced_only_once_it_gives_no_sign_of_life(
    drive: Drive, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledgers, "SIGN_OF_LIFE_SECONDS", 0.2)
    monkeypatch.setattr(ledgers, "LEASE_SECONDS", 2.0)
    said: list[str] = []
    first = drive(ELSEWHERE)
    with pytest.raises(StreamingError, match=r"by process 17 on far\.away"):
        drive(say=said.append)
    assert [text[:22] for text in said] == ["waits up to 2 s for si"]
    first.close()
    assert opened(drive(), 0, 10).epoch == 2, "a driver that lets go need not be waited for"


def test_a_driver_that_was_frozen_hears_that_it_was_replaced_also_when_it_has_nothing_to_do(
    drive: Drive, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledgers, "SIGN_OF_LIFE_SECONDS", 0.1)
    frozen = drive()
    sql(dsn, "update screening_drivers set epoch = epoch + 1")
    time.sleep(1)
    with pytest.raises(StreamingError, match="stores nothing any more, and ends"):
        frozen.require_held()


def test_a_task_of_a_driver_that_was_replaced_stores_nothing_nor_does_one_of_a_settled_micro_batch(
    drive: Drive, dsn: str
) -> None:
    first = drive()
    entry = opened(first, 0, 10)
    stores(dsn, entry)
    again = opened(drive(), 0, 10)
    with pytest.raises(StreamingError, match="has gone on with micro-batch 0 in the meantime: this one stores nothing"):
        stores(dsn, entry)
    with pytest.raises(StreamingError, match="has another driver since"):
        first.settle(entry, {}, 0)
    stores(dsn, again)
    sql(dsn, "update screening_ledger set settled_at = now()")
    with pytest.raises(StreamingError, match="was settled by another attempt"):
        stores(dsn, again)
    sql(dsn, "delete from screening_ledger")
    with pytest.raises(StreamingError, match="no row of micro-batch 0 in screening_ledger: has Postgres lost"):
        stores(dsn, again)


# --- rows ------------------------------------------------------------------------------------------------------------


def test_a_micro_batch_that_is_done_again_has_the_time_and_the_rules_that_it_had(drive: Drive) -> None:
    ledger = drive()
    first = opened(ledger, 0, 10, rules="1")
    again = opened(ledger, 0, 10, rules="2")
    assert (again.moment, again.rules_version, again.ranges) == (first.moment, "1", {0: (0, 10), 1: (0, 0)})
    assert (first.is_again, again.is_again) == (False, True)
    ledger.settle(again, {"orders": 10}, 0)
    assert opened(ledger, 0, 10).is_settled, "Spark had not committed it"
    second = opened(ledger, 1, 15, rules="2")
    assert (second.ranges, second.rules_version) == ({0: (10, 15), 1: (0, 0)}, "2")
    assert second.moment > first.moment


def test_times_of_micro_batches_grow_also_when_a_clock_is_put_back(drive: Drive, dsn: str) -> None:
    ledger = drive()
    first = opened(ledger, 0, 10)
    ledger.settle(first, {}, 0)
    ahead = datetime.now(UTC) + timedelta(hours=1)
    sql(dsn, "update screening_ledger set moment = %s", ahead)
    assert opened(ledger, 1, 20).moment > ahead


def test_one_that_was_planned_anew_and_further_is_opened_as_it_is_planned_now(drive: Drive, dsn: str) -> None:
    ledger = drive()
    first = opened(ledger, 0, 10)
    ledger.settle(first, {}, 0)
    further = opened(ledger, 0, 12)
    assert (further.is_settled, further.moment, further.ranges[0]) == (False, first.moment, (0, 12))
    with pytest.raises(StreamingError, match="the checkpoint is older"):
        opened(ledger, 0, 11)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        ("delete from screening_ledger where number = 1", "holds micro-batch 0: has Postgres lost"),
        ("update screening_ledger set settled_at = null where number = 1", "has Postgres lost"),
        ("delete from screening_ledger", "holds nothing: has Postgres lost"),
        ("update screening_drivers set epoch = 0", "an older driver of checkpoint than this one"),
        ("delete from screening_drivers", "no longer knows who screens from checkpoint"),
        ("update screening_ledger set topic_id = 'another'", "deleted and created again"),
    ],
)
def test_what_the_ledger_does_not_go_on_from_is_refused_before_anything_is_written(
    drive: Drive, dsn: str, loss: str, words: str
) -> None:
    ledger = drive()
    for number in range(2):
        ledger.settle(opened(ledger, number, 10 * number), {}, 0)
    sql(dsn, loss)
    before = sql(dsn, "select number, settled_at from screening_ledger")
    with pytest.raises(StreamingError, match=words):
        opened(ledger, 2, 30)
    assert sql(dsn, "select number, settled_at from screening_ledger") == before


def test_a_micro_batch_whose_work_is_gone_is_not_settled(drive: Drive, dsn: str) -> None:
    ledger = drive()
    entry = opened(ledger, 3 - 3, 10)
    state = "insert into screening_state values ('q', 'partition/2', %s, %s, '', '')"
    sql(dsn, state, 0, entry.number * PARTS)
    with pytest.raises(StreamingError, match="What micro-batch 0 has stored is gone from Postgres"):
        ledger.settle(entry, {}, 2)
    sql(dsn, state, 1, entry.number * PARTS)
    ledger.settle(entry, {}, 2)


def test_old_rows_go_and_the_newest_stays(drive: Drive, dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledgers, "_PRUNE_EVERY", 2)
    ledger = drive(keep=timedelta(days=1))
    for number in range(3):
        sql(dsn, "update screening_ledger set settled_at = now() - interval '2 days'")
        ledger.settle(opened(ledger, number, 10 * number), {}, 0)
    assert sql(dsn, "select number from screening_ledger") == [(2,)]


def test_what_rules_across_products_have_left_goes_after_days(drive: Drive, dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledgers, "_PRUNE_EVERY", 1)
    ledger = drive()
    state = "insert into screening_state values ('q', %s, 0, %s, '', '')"
    for number, divisions in enumerate((["partition/1", "by user_id/1", "by country/1"], ["by country/1"], [])):
        entry = opened(ledger, number, 10 * number + 10)
        for division in divisions:
            sql(dsn, state, division, number * PARTS)
        ledger.settle(entry, {}, len(divisions))
    remembered = "select division from screening_state group by division order by division"
    assert len(sql(dsn, remembered)) == 3
    sql(dsn, "update screening_ledger set moment = now() - interval '4 days' where number < 2")
    sql(dsn, "insert into screening_evidence values ('old', '{}', now() - interval '4 days'), ('new', '{}', now())")
    ledger.settle(opened(ledger, 3, 50), {}, 0)
    assert sql(dsn, remembered) == [("by country/1",), ("partition/1",)]
    assert sql(dsn, "select order_id from screening_evidence") == [("new",)]


def test_a_task_that_still_divides_in_the_former_way_stores_nothing_once_orders_are_shuffled(drive: Drive, dsn: str) -> None:
    ledger = drive()
    entry = opened(ledger, 0, 10)
    again = ledger.reopen(entry, 0)
    with pytest.raises(StreamingError, match="this one stores nothing"):
        stores(dsn, entry)
    stores(dsn, again)
    ledger.reopen(entry, 0)  # as after a commit that Postgres did not confirm
    ledger.settle(again, {}, 0)
    assert opened(ledger, 1, 20).epoch == again.epoch


def test_what_another_query_may_not_have_announced_is_owed_until_it_has_been_read_again(drive: Drive, dsn: str) -> None:
    given_up = Ledger(dsn, "given up", HERE)
    given_up.take("before")
    given_up.settle(opened(given_up, 0, 10), {}, 0)
    left = opened(given_up, 1, 30)
    given_up.close()
    ledger = drive()
    for number, end in enumerate((20, 30)):
        entry = opened(ledger, number, end)
        assert entry.since == left.moment < entry.moment
        assert opened(ledger, number, end).since == left.moment, "done again"
        ledger.settle(entry, {}, 0)
    entry = opened(ledger, 2, 40)
    assert entry.since == entry.moment
    sql(dsn, "delete from screening_ledger where query_id = 'q'")
    assert opened(ledger, 0, 10, topic="another").since > left.moment, "the offsets of another topic are others"


# --- the whole job ---------------------------------------------------------------------------------------------------


def send_some(settings: Settings, rules: FraudRules, count: int, seed: int, *, ago: timedelta = timedelta(minutes=1)) -> None:
    """Orders whose event times end so long ago."""
    step = timedelta(seconds=0.2)
    start = datetime.now(UTC) - count * step - ago
    runs.send(settings, runs.by_product(runs.dense_orders(count, rules, seed=seed, start=start, step=step)))


def rows_stored(settings: Settings) -> int:
    return int(sql(settings.require("postgres_dsn"), "select count(*) from raw_orders")[0][0])


@pytest.mark.usefixtures("spark_session")
@pytest.mark.parametrize("begin", ["earliest", "latest"])
def test_a_first_deployment_on_an_empty_topic_can_be_started_again(settings: Settings, rules: FraudRules, begin: str) -> None:
    for _ in range(2):
        started = runs.run_screen("--available-now", "--starting-offsets", begin)
        assert started.returncode == 0, started.stderr
    send_some(settings, rules, 50, seed=1)
    assert runs.run_screen("--available-now").returncode == 0
    assert rows_stored(settings) == 50
    assert runs.run_screen("--available-now").returncode == 0
    runs.assert_agrees(runs.outcome(settings), runs.judged(settings, rules))


def make_anew(settings: Settings, partitions: int) -> None:
    """Delete the topic `orders` and create it again."""
    admin = AdminClient(librdkafka_config(settings))
    admin.delete_topics([settings.topic(ORDERS)], operation_timeout=15)[settings.topic(ORDERS)].result(20)
    deadline = time.monotonic() + 20
    while settings.topic(ORDERS) in admin.list_topics(timeout=10).topics:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    create_topics(settings, partitions=partitions)


@pytest.mark.usefixtures("spark_session")
@pytest.mark.parametrize(("orders", "partitions"), [(80, 4), (10, 4), (80, 3)], ids=["more", "fewer", "other partitions"])
def test_a_topic_that_was_deleted_and_created_again_is_refused_by_name_and_a_new_checkpoint_screens_all_of_it(
    settings: Settings, rules: FraudRules, orders: int, partitions: int
) -> None:
    send_some(settings, rules, 40, seed=2)
    assert runs.run_screen("--available-now").returncode == 0
    make_anew(settings, partitions)
    start = datetime.now(UTC) - timedelta(minutes=10)
    made = runs.dense_orders(orders, rules, seed=3, start=start, step=timedelta(seconds=1))
    runs.send(settings, runs.by_product(made, partitions))
    for _ in range(2):
        refused = runs.run_screen("--available-now")
        assert refused.returncode == 7
        assert "The topic orders was deleted and created again since it was screened" in refused.stderr
        assert rows_stored(settings) == 40
    Path(settings.checkpoints, "screen_orders").rename(Path(settings.checkpoints, "old"))  # as the message advises
    assert runs.run_screen("--available-now").returncode == 0
    assert rows_stored(settings) == 40 + orders


def announced(settings: Settings) -> Counter[str]:
    """Order → how often its verdict was announced."""
    return Counter(record.key().decode() for record in runs.consume(settings, PROCESSED_ORDERS))


@pytest.mark.usefixtures("spark_session")
def test_orders_that_were_stored_and_not_announced_are_announced_by_a_new_checkpoint(
    settings: Settings, rules: FraudRules
) -> None:
    send_some(settings, rules, 40, seed=4)
    assert runs.run_screen("--available-now").returncode == 0
    send_some(settings, rules, 30, seed=5)
    assert runs.run_screen("--available-now").returncode == 0
    dsn = settings.require("postgres_dsn")
    # As a driver leaves it that dies between the two: nobody has to have seen what is on the topic by now.
    sql(dsn, "update screening_ledger set settled_at = null where number = (select max(number) from screening_ledger)")
    owed = sql(dsn, "select order_id from raw_orders join screening_ledger on screened_at >= moment where settled_at is null")
    before = announced(settings)
    Path(settings.checkpoints, "screen_orders").rename(Path(settings.checkpoints, "old"))
    assert runs.run_screen("--available-now").returncode == 0
    assert announced(settings) - before == Counter(order for (order,) in owed)
    assert len(owed) >= 30


def running(settings: Settings) -> subprocess.Popen[str]:
    """A `finpro screen` that has settled some micro-batches, and goes on."""
    process = runs.start_screen("--trigger", "0 seconds")
    deadline = time.monotonic() + 60
    while len(sql(settings.require("postgres_dsn"), "select 1 from screening_ledger where settled_at is not null")) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


def ended(process: subprocess.Popen[str], *, seconds: float = 60) -> str:
    """What a process has said that ends by itself, with exit code 7."""
    try:
        said, _ = process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            runs.kill_group(process)
    assert process.returncode == 7, said
    assert "Traceback" not in said
    return said


@pytest.mark.usefixtures("spark_session")
def test_a_topic_that_is_made_anew_while_screening_runs_is_refused_before_anything_of_it_is_stored(
    settings: Settings, rules: FraudRules
) -> None:
    send_some(settings, rules, 900, seed=7)
    process = running(settings)
    while rows_stored(settings) < 900:
        time.sleep(0.1)
    make_anew(settings, 4)
    start = datetime.now(UTC) - timedelta(minutes=1)
    runs.send(settings, runs.by_product(runs.dense_orders(2_000, rules, seed=8, start=start, step=timedelta(seconds=0.01))))
    said = ended(process)
    assert "deleted and created again" in said
    assert rows_stored(settings) == 900


@pytest.mark.usefixtures("spark_session")
def test_an_older_copy_of_postgres_put_in_its_place_while_screening_runs_is_noticed_before_anything_is_stored(
    settings: Settings, rules: FraudRules
) -> None:
    tables = ("raw_orders", "screening_state", "screening_ledger", "screening_drivers")
    send_some(settings, rules, 6_000, seed=9)
    process = running(settings)
    dsn = settings.require("postgres_dsn")
    for table in tables:
        sql(dsn, f"create table older_{table} as select * from {table}")  # not one moment, as a copy of files is not
    copied = rows_stored(settings)
    while rows_stored(settings) < copied + 800:
        assert process.poll() is None
        time.sleep(0.05)
    with connect(dsn) as connection, connection.cursor() as cursor:
        cursor.execute(f"lock table {', '.join(tables)} in access exclusive mode")
        for table in tables:
            cursor.execute(f"truncate {table}; insert into {table} select * from older_{table}")
    said = ended(process)
    assert "has Postgres lost what was committed, or been restored from a copy?" in said
    (older,) = sql(dsn, "select count(*) from older_raw_orders")[0]
    assert rows_stored(settings) == older
    refused = runs.run_screen("--available-now")
    assert refused.returncode == 7
    assert "restored from a copy" in refused.stderr
    Path(settings.checkpoints, "screen_orders").rename(Path(settings.checkpoints, "old"))  # as the message advises
    assert runs.run_screen("--available-now").returncode == 0
    assert rows_stored(settings) == 6_000


@pytest.mark.usefixtures("spark_session")
def test_a_planned_micro_batch_is_screened_in_parts_when_the_limit_is_smaller_by_then(
    settings: Settings, rules: FraudRules
) -> None:
    send_some(settings, rules, 2_000, seed=4)
    first = runs.start_screen("--available-now", "--max-offsets-per-trigger", "100000")
    deadline = time.monotonic() + 60
    while not sql(settings.require("postgres_dsn"), "select 1 from screening_ledger"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    runs.kill_group(first)  # as soon as it is planned: before it is settled
    if not sql(settings.require("postgres_dsn"), "select 1 from screening_ledger where settled_at is null"):
        pytest.fail("the micro-batch was settled before the kill")
    assert runs.run_screen("--available-now").returncode == 0  # in parts of 400
    (count,) = sql(settings.require("postgres_dsn"), "select count(distinct screened_at) from raw_orders")[0]
    assert count >= 5
    runs.assert_agrees(runs.outcome(settings), runs.judged(settings, rules))


@pytest.mark.usefixtures("spark_session")
@pytest.mark.parametrize("is_committed", [True, False])
def test_a_checkpoint_from_before_the_ledger_goes_on(settings: Settings, rules: FraudRules, is_committed: bool) -> None:
    dsn = settings.require("postgres_dsn")
    send_some(settings, rules, 500, seed=10, ago=timedelta(minutes=5))
    assert runs.run_screen("--available-now").returncode == 0
    send_some(settings, rules, 300, seed=11)
    (newest,) = sql(dsn, "select max(number) from screening_ledger")[0]
    sql(dsn, "delete from screening_ledger where number < %s", newest)
    as_migrated = "epoch = 0, moment = '-infinity', rules_version = '', topic_id = '', first_offsets = '{}', end_offsets = '{}'"
    sql(dsn, f"update screening_ledger set {as_migrated}, states = null, counts = null; delete from screening_drivers")
    if not is_committed:
        Path(settings.checkpoints, "screen_orders", "commits", str(newest)).unlink()
    done = runs.run_screen("--available-now")
    assert done.returncode == 0, done.stderr
    runs.assert_agrees(runs.outcome(settings), runs.judged(settings, rules))


def freeze(process: subprocess.Popen[str], settings: Settings) -> None:
    """Stop a process where it does not hold the driver's row: else all wait until Postgres gives its transaction up."""
    while True:
        os.killpg(process.pid, signal.SIGSTOP)
        try:
            sql(settings.require("postgres_dsn"), "select from screening_drivers for update nowait")
        except LockNotAvailable:
            os.killpg(process.pid, signal.SIGCONT)
            time.sleep(0.1)
        else:
            return


@pytest.mark.usefixtures("spark_session")
def test_a_frozen_process_that_wakes_after_another_went_on_says_so_and_all_ends_as_the_brute_force_says(
    settings: Settings, rules: FraudRules
) -> None:
    send_some(settings, rules, 6_000, seed=5)
    first = runs.start_screen("--trigger", "0 seconds")
    try:
        deadline = time.monotonic() + 60
        while rows_stored(settings) < 400:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        second = runs.run_screen("--available-now")
        assert second.returncode == 7
        assert f"being screened from already, by process {first.pid} on " in second.stderr
        freeze(first, settings)
        time.sleep(16)  # until its signs of life are old: nobody can see from elsewhere that it is not just slow
        sql(settings.require("postgres_dsn"), "update screening_drivers set machine = 'another kernel'")
        third = runs.run_screen("--available-now")
        assert third.returncode == 0, third.stderr
        os.killpg(first.pid, signal.SIGCONT)
        said, _ = first.communicate(timeout=60)
    finally:
        if first.poll() is None:
            os.killpg(first.pid, signal.SIGCONT)
            runs.kill_group(first)
    assert first.returncode == 7, said
    assert "another driver since" in said or "in the meantime" in said, said
    runs.assert_agrees(runs.outcome(settings), runs.judged(settings, rules))


@pytest.mark.usefixtures("spark_session")
def test_the_files_of_a_checkpoint_are_what_finpro_takes_them_for_and_damaged_ones_are_named(
    settings: Settings, rules: FraudRules
) -> None:
    send_some(settings, rules, 900, seed=6)
    assert runs.run_screen("--available-now").returncode == 0
    folder = Path(settings.checkpoints, "screen_orders")
    rows = sql(settings.require("postgres_dsn"), "select number, first_offsets, end_offsets from screening_ledger order by 1")
    assert len(rows) >= 3
    assert sum(rows[0][1].values()) == 0
    assert sum(rows[-1][2].values()) == 900
    assert [row[2] for row in rows[:-1]] == [row[1] for row in rows[1:]]
    assert [json.loads((folder / "offsets" / str(row[0])).read_text().splitlines()[-1]) for row in rows] == [
        {settings.topic(ORDERS): row[2]} for row in rows
    ]
    newest = folder / "offsets" / str(rows[-1][0])
    whole = newest.read_text()
    for damage in ("", whole[:-20], "v1"):
        newest.write_text(damage)
        refused = runs.run_screen("--available-now")
        assert refused.returncode == 7
        assert f"{newest} is damaged" in refused.stderr
        assert "Traceback" not in refused.stderr
    newest.write_text(whole)
    commit = folder / "commits" / str(rows[-1][0])
    for damage in ("", "v1\n{"):
        commit.write_text(damage)
        refused = runs.run_screen("--available-now")
        assert f"{commit} is damaged: remove it" in refused.stderr
    commit.unlink()  # as the message advises
    assert runs.run_screen("--available-now").returncode == 0
    runs.assert_agrees(runs.outcome(settings), runs.judged(settings, rules))
