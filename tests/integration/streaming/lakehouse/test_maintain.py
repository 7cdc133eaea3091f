"""`finpro maintain`: fewer files and the same rows, beside a running archive, on a local path and in Cloud Storage."""

import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Event, Thread

import pytest
from delta.exceptions import ConcurrentAppendException
from delta.tables import DeltaTable
from pyspark.sql import SparkSession

from conf.errors import LakehouseError, SettingsError
from conf.former_rules import SIX
from conf.settings import Settings
from streaming.kafka import ORDERS, PROCESSED_ORDERS
from streaming.lakehouse.maintenance import PROPERTIES, maintain, require_retention
from streaming.lakehouse.tables import BRONZE, BRONZE_ORDERS, bronze_orders, commit, create_tables, silver_orders
from tests.runs import archive as archive
from tests.runs import screening as runs
from tests.runs.archive import Given
from tests.runs.commands import finpro

NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)


@pytest.fixture
def spark(spark_session: SparkSession) -> SparkSession:
    """The session as the job has it."""
    session = spark_session.newSession()
    for name, value in PROPERTIES.items():
        session.conf.set(name, str(value))
    return session


@pytest.fixture
def lakehouse(spark: SparkSession, tmp_path: Path) -> str:
    create_tables(spark, str(tmp_path / "lakehouse"))
    return str(tmp_path / "lakehouse")


def append(spark: SparkSession, lakehouse: str, day: int, offsets: range) -> None:
    """Append messages to bronze, of one day, the newest first."""
    moment = NOON + timedelta(days=day)
    rows = [
        ("orders", 0, offset, moment - timedelta(seconds=offset), bytearray(b"%d" % offset), 0, None, None, moment.date())
        for offset in offsets
    ]
    frame = spark.createDataFrame(rows, BRONZE).coalesce(1)
    frame.write.format("delta").mode("append").save(bronze_orders(lakehouse))


def parquet_files(lakehouse: str) -> int:
    return len(list(Path(bronze_orders(lakehouse)).rglob("part-*.parquet")))


def test_days_in_pieces_become_one_file_each_ordered_by_time_and_one_that_is_whole_is_left_alone(
    spark: SparkSession, lakehouse: str
) -> None:
    for start in range(0, 60, 20):
        append(spark, lakehouse, 0, range(start, start + 20))
    append(spark, lakehouse, 1, range(100, 120))
    before = archive.rows(spark, bronze_orders(lakehouse)).sort("offset")
    done = maintain(spark, lakehouse, BRONZE_ORDERS, timedelta(days=7))
    assert (done.days, done.before.files, done.after.files, done.deleted) == (1, 4, 2, 0)
    rows = archive.rows(spark, bronze_orders(lakehouse))
    assert rows.sort("offset").equals(before)
    assert rows.filter(rows["offset"] < 100)["timestamp"].is_sorted()
    again = maintain(spark, lakehouse, BRONZE_ORDERS, timedelta(days=7))
    assert (again.days, again.after) == (0, done.after)


def test_replaced_files_stay_for_time_travel_as_long_as_the_retention_and_go_after_it(
    spark: SparkSession, lakehouse: str
) -> None:
    append(spark, lakehouse, 0, range(10))
    append(spark, lakehouse, 0, range(10, 20))
    version = DeltaTable.forPath(spark, bronze_orders(lakehouse)).history(1).collect()[0]["version"]
    maintain(spark, lakehouse, BRONZE_ORDERS, timedelta(days=1))
    assert len(archive.rows(spark, bronze_orders(lakehouse), version)) == 20
    assert parquet_files(lakehouse) == 3
    assert maintain(spark, lakehouse, BRONZE_ORDERS, timedelta(0)).deleted == 2
    assert parquet_files(lakehouse) == 1
    assert len(archive.rows(spark, bronze_orders(lakehouse))) == 20


def test_a_retention_that_would_break_readers_has_to_be_forced() -> None:
    with pytest.raises(SettingsError, match="at least 1 day"):
        require_retention(0, force=False)
    require_retention(0, force=True)
    require_retention(1, force=False)


def test_a_lakehouse_that_is_not_there_or_cannot_be_written_is_a_clear_error(spark: SparkSession, tmp_path: Path) -> None:
    with pytest.raises(LakehouseError, match="`finpro archive` creates them"):
        maintain(spark, str(tmp_path / "nowhere"), BRONZE_ORDERS, timedelta(days=7))
    for unusable in ("/proc/nowhere", "gs://no-such-bucket/lake"):
        with pytest.raises(LakehouseError, match="is FINPRO_LAKEHOUSE right"):
            create_tables(spark, unusable)


@pytest.mark.parametrize(("conflicts", "outcome"), [(2, "written"), (100, "refused")])
def test_a_write_whose_files_were_replaced_meanwhile_is_tried_again_but_not_for_ever(
    spark: SparkSession, lakehouse: str, monkeypatch: pytest.MonkeyPatch, conflicts: int, outcome: str
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    tries = []

    def write() -> None:
        tries.append(1)
        if len(tries) <= conflicts:
            raise ConcurrentAppendException("files were added", "")

    if outcome == "written":
        commit(lakehouse, BRONZE_ORDERS, write)
        assert len(tries) == conflicts + 1
    else:
        with pytest.raises(LakehouseError, match="start again"):
            commit(lakehouse, BRONZE_ORDERS, write)


@contextmanager
def messages_flow(settings: Settings) -> Iterator[list[Given]]:
    """Orders and verdicts keep coming during a block; gives the verdicts sent so far."""
    sent: list[Given] = []
    stop = Event()

    def send() -> None:
        while not stop.wait(0.3):
            number, is_revision = divmod(len(sent), 2)
            verdict = Given(number, SIX[:is_revision], second=len(sent) % 60)
            archive.send_messages(settings, PROCESSED_ORDERS, [{"value": verdict.encoded(), "key": f"o{number}"}])
            archive.send_messages(settings, ORDERS, [{"value": b"%d" % len(sent)}])
            sent.append(verdict)

    sender = Thread(target=send)
    sender.start()
    try:
        yield sent
    finally:
        stop.set()
        sender.join()


def assert_archived(spark: SparkSession, settings: Settings, sent: list[Given]) -> None:
    bronze, silver = (
        archive.rows(spark, bronze_orders(settings.lakehouse)),
        archive.rows(spark, silver_orders(settings.lakehouse)),
    )
    assert archive.as_messages(bronze) == archive.messages_of(settings)
    last = {f"o{verdict.order}": sorted(verdict.reasons) for verdict in sent}
    assert dict(silver.select("order_id", "reasons").rows()) == last
    assert len(silver) == len(last)


def runs_of_the_archive(bronze: str) -> int:
    """How many micro-batches the archive has appended to bronze."""
    return sum('"txn":' in file.read_text() for file in Path(bronze, "_delta_log").glob("*[0-9].json"))


@pytest.mark.timeout(600)
def test_beside_a_running_archive_nothing_fails_and_nothing_is_lost_and_sigterm_ends_it_in_peace(
    settings: Settings, spark_session: SparkSession
) -> None:
    """More than a minute: upkeep and an archive of its own process take turns on the same tables."""
    silver, bronze = silver_orders(settings.lakehouse), bronze_orders(settings.lakehouse)
    process = archive.start_archive("--trigger", "1 second")
    try:
        with messages_flow(settings) as sent:
            archive.wait_until(lambda: archive.committed(silver) > 3)
            begun = runs_of_the_archive(bronze)
            maintained = finpro("maintain")
            assert runs_of_the_archive(bronze) > begun  # upkeep had company
            before = archive.committed(silver)
            archive.wait_until(lambda: archive.committed(silver) > before)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            runs.kill_group(process)
    assert maintained.returncode == 0, maintained.stderr
    assert re.search(r"silver/orders: [1-9]\d* days compacted", maintained.stdout), maintained.stdout
    assert process.returncode == 0, output
    archive.archive_all()
    assert_archived(spark_session, settings, sent)


def test_in_cloud_storage_it_is_the_same(
    settings: Settings, spark_session: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    lakehouse = f"gs://{settings.require('gcs_bucket')}/lake"
    monkeypatch.setenv("FINPRO_LAKEHOUSE", lakehouse)
    in_the_cloud = settings.model_copy(update={"lakehouse": lakehouse})
    sent = [Given(number) for number in range(5)] + [Given(3, ["repeat_purchase"], second=5)]
    for part in (sent[:3], sent[3:]):
        archive.send_messages(settings, PROCESSED_ORDERS, [{"value": verdict.encoded(), "partition": 0} for verdict in part])
        archive.send_messages(settings, ORDERS, [{"value": b"%d" % number, "partition": 0} for number in range(3)])
        archive.archive_all()
    maintained = finpro("maintain")
    assert maintained.returncode == 0, maintained.stderr
    assert "bronze/orders: 1 days compacted, from 2 files" in maintained.stdout
    assert_archived(spark_session, in_the_cloud, sent)
