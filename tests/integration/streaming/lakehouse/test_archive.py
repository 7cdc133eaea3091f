"""`finpro archive` on a real Kafka, into real Delta tables: what was on the topics is in the lakehouse, once."""

import json
import random
import re
import shutil
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient
from delta.tables import DeltaTable
from pyspark.sql import SparkSession
from pyspark.sql.types import StructType

from conf.errors import LakehouseError, StreamingError
from conf.rules import load_rules
from conf.settings import Settings
from streaming.kafka import ORDERS, ORDERS_DEAD_LETTER, PROCESSED_ORDERS, create_topics, existing_topics, librdkafka_config
from streaming.lakehouse.archive import merge_into_quarantine, merge_into_silver
from streaming.lakehouse.continuation import starting_offsets
from streaming.lakehouse.tables import (
    BRONZE_ORDERS,
    SILVER,
    bronze_orders,
    create_tables,
    quarantine_orders,
    silver_orders,
)
from tests.oracle.bad_messages import BAD
from tests.runs import archive as archive
from tests.runs import screening as runs
from tests.runs.archive import Given
from tests.runs.commands import finpro

STRANGE_MESSAGES: list[dict[str, Any]] = [
    {"value": None, "key": b"tombstone"},
    {"value": b"", "key": b""},
    {"value": b"\xff\xfe\x00 not UTF-8", "key": b"\xc3\x28"},
    {"value": b"no key", "headers": [("label", b"night"), ("label", b"again"), ("empty", b""), ("none", None)]},
    {"value": "toko é 店".encode(), "key": b"k", "timestamp": 1},
    {"value": b"x" * 300_000, "key": b"large", "timestamp": 4_102_444_800_123},
]
MESSAGES = "topic string, partition int, offset bigint, value binary, headers array<struct<key:string,value:binary>>"


def test_the_lakehouse_is_what_the_topics_and_raw_orders_are_and_stays_so_when_a_new_checkpoint_begins(
    settings: Settings, spark_session: SparkSession
) -> None:
    rules = load_rules(settings.rules)
    orders = runs.dense_orders(1_200, rules, seed=1, start=datetime.now(UTC) - timedelta(hours=2), step=timedelta(seconds=1))
    values = runs.repeated(orders, seed=1) + [(message.value, number % 4) for number, message in enumerate(BAD)]
    runs.send(settings, values[:-200])
    archive.send_messages(settings, ORDERS, STRANGE_MESSAGES)
    for late_values in ([], values[-200:]):
        runs.send(settings, late_values)
        screened = runs.run_screen("--available-now")
        assert screened.returncode == 0, screened.stderr
        archive.archive_all()
        archive.assert_lakehouse_agrees(spark_session, settings)
        shutil.rmtree(settings.checkpoints)  # screening begins anew as well, and sends its dead letters again


@pytest.fixture
def lakehouse(spark_session: SparkSession, tmp_path: Path) -> str:
    """An empty lakehouse."""
    create_tables(spark_session, str(tmp_path / "lakehouse"))
    return str(tmp_path / "lakehouse")


def merge_verdicts(spark: SparkSession, lakehouse: str, given: Sequence[Given], first_offset: int = 0) -> None:
    """Merge one micro-batch of verdicts."""
    rows = [
        (PROCESSED_ORDERS, 0, offset, bytearray(verdict.encoded()), None) for offset, verdict in enumerate(given, first_offset)
    ]
    merge_into_silver(lakehouse)(spark.createDataFrame(rows, MESSAGES), 0)


def test_many_verdicts_are_merged_compiled_and_few_interpreted(spark_session: SparkSession, lakehouse: str) -> None:
    session, merge = spark_session.newSession(), merge_into_silver(lakehouse)  # as each query has its own
    messages = session.createDataFrame([(PROCESSED_ORDERS, 0, 0, bytearray(Given(1).encoded()), None)], MESSAGES)
    for copies, compiled in ((3_001, "true"), (2, "false")):
        merge(messages.crossJoin(session.range(copies)).drop("id"), 0)
        assert session.conf.get("spark.sql.codegen.wholeStage") == compiled


def standing(spark: SparkSession, lakehouse: str, version: int | None = None) -> dict[str, tuple[Any, ...]]:
    """order_id → status, reasons, shadow reasons, suppressed ones, rules version, second of `screened_at`."""
    silver = archive.rows(spark, silver_orders(lakehouse), version)
    return {
        row["order_id"]: (
            row["status"],
            row["reasons"],
            row["shadow_reasons"],
            row["suppressed_reasons"],
            row["rules_version"],
            row["screened_at"].second,
        )
        for row in silver.to_dicts()
    }


def test_a_table_of_an_earlier_version_gets_what_it_lacks_and_declared_fields_arrive_as_they_were_told(
    spark_session: SparkSession, tmp_path: Path
) -> None:
    lakehouse = str(tmp_path / "lakehouse")
    former = StructType([field for field in SILVER if field.name not in ("attributes", "suppressed_reasons")])
    silver = DeltaTable.create(spark_session).location(silver_orders(lakehouse)).addColumns(former)
    silver.partitionedBy("event_date").execute()
    create_tables(spark_session, lakehouse)
    create_tables(spark_session, lakehouse)
    told = [{"device_id": 'a"b é', "tries": 2**62}, None]
    values = [json.loads(Given(number, []).encoded()) | ({"attributes": one} if one else {}) for number, one in enumerate(told)]
    rows = [(PROCESSED_ORDERS, 0, place, bytearray(json.dumps(one).encode()), None) for place, one in enumerate(values)]
    merge_into_silver(lakehouse)(spark_session.createDataFrame(rows, MESSAGES), 0)
    kept = archive.rows(spark_session, silver_orders(lakehouse)).sort("order_id")["attributes"].to_list()
    assert [one and json.loads(one) for one in kept] == told


def newest_version(spark: SparkSession, lakehouse: str) -> int:
    return int(DeltaTable.forPath(spark, silver_orders(lakehouse)).history(1).collect()[0]["version"])


HISTORY = [
    Given(1, ["night_amount"], version="1", second=1),
    Given(2, [], version="1", second=1),
    Given(1, ["foreign_country"], version="2", second=2),
    Given(2, [], ["night_amount"], version="2", second=2),
    Given(1, ["foreign_country", "night_amount"], [], version="3", second=3),
    Given(2, ["repeat_purchase"], ["night_amount"], version="3", second=3),
    Given(2, [], [], version="4", second=4),
    Given(3, [], version="4", second=4),
    Given(4, [], suppressed_reasons=["night_amount", "repeat_purchase"], version="1", second=1),
    Given(4, ["repeat_purchase"], suppressed_reasons=["coordinated_users"], version="2", second=2),
    Given(4, [], suppressed_reasons=["repeat_purchase"], version="3", second=3),
    Given(5, [], version="1", second=1),
    Given(5, [], suppressed_reasons=["night_amount"], version="2", second=2),
]
AT_THE_END = {
    "o1": ("Fraud", ["foreign_country", "night_amount"], [], [], "2", 2),
    "o2": ("Fraud", ["repeat_purchase"], ["night_amount"], [], "3", 3),
    "o3": ("Genuine", [], [], [], "4", 4),
    "o4": ("Fraud", ["repeat_purchase"], [], ["coordinated_users", "night_amount"], "2", 2),
    "o5": ("Genuine", [], [], ["night_amount"], "2", 2),
}


def test_however_verdicts_are_batched_and_repeated_reasons_accumulate_and_the_last_that_added_one_signs(
    spark_session: SparkSession, lakehouse: str
) -> None:
    choose = random.Random(4)
    place = 0
    while place < len(HISTORY):
        batch = HISTORY[place : place + choose.randint(1, 5)]
        merge_verdicts(spark_session, lakehouse, batch, first_offset=place)
        if choose.random() < 0.5:  # a kill between Delta's commit and Spark's: the micro-batch comes again
            merge_verdicts(spark_session, lakehouse, batch, first_offset=place)
        place += len(batch)
    merge_verdicts(spark_session, lakehouse, HISTORY)
    assert standing(spark_session, lakehouse) == AT_THE_END


def test_time_travel_shows_the_verdict_before_a_revision_and_what_changes_nothing_makes_no_version(
    spark_session: SparkSession, lakehouse: str
) -> None:
    merge_verdicts(spark_session, lakehouse, [Given(1), Given(2)])
    before = newest_version(spark_session, lakehouse)
    merge_verdicts(spark_session, lakehouse, [Given(1, ["repeat_purchase"], version="2", second=9)])
    merge_verdicts(spark_session, lakehouse, [Given(1), Given(2)])
    assert standing(spark_session, lakehouse, before)["o1"] == ("Genuine", [], [], [], "1", 0)
    assert standing(spark_session, lakehouse)["o1"] == ("Fraud", ["repeat_purchase"], [], [], "2", 9)
    assert newest_version(spark_session, lakehouse) == before + 1


def test_of_two_dead_letters_about_one_message_and_of_two_headers_of_one_name_the_first_stands(
    spark_session: SparkSession, lakehouse: str
) -> None:
    def dead_letter(offset: int, about: int, reason: str, *more: tuple[str, Any]) -> tuple[Any, ...]:
        headers = {
            "reason": reason,
            "topic": "orders",
            "partition": 1,
            "offset": about,
            "received_at": "2026-11-22 10:00:00+00:00",
        }
        return (
            ORDERS_DEAD_LETTER,
            0,
            offset,
            None,
            [(name, bytearray(str(value).encode())) for name, value in headers.items()] + list(more),
        )

    merge = merge_into_quarantine(lakehouse)
    passed_on = dead_letter(2, 8, "é", ("offset", bytearray(b"9")), ("reason", None), ("of.somebody", None))
    merge(spark_session.createDataFrame([dead_letter(0, 7, "first"), dead_letter(1, 7, "second"), passed_on], MESSAGES), 0)
    merge(spark_session.createDataFrame([dead_letter(3, 7, "third")], MESSAGES), 1)
    rows = archive.rows(spark_session, quarantine_orders(lakehouse)).sort("offset").rows()
    received = datetime(2026, 11, 22, 10, tzinfo=UTC)
    assert rows == [
        ("orders", 1, 7, received, None, "first", date(2026, 11, 22)),
        ("orders", 1, 8, received, None, "é", date(2026, 11, 22)),
    ]


def test_a_message_that_is_no_verdict_stops_the_archive_and_is_named(spark_session: SparkSession, lakehouse: str) -> None:
    merge = merge_into_silver(lakehouse)
    for value in (None, b"{}", b"[1]", b'{"order_id": "a"'):
        row = (PROCESSED_ORDERS, 3, 17, None if value is None else bytearray(value), None)
        with pytest.raises(LakehouseError, match="processed_orders-3-17"):
            merge(spark_session.createDataFrame([row], MESSAGES), 0)
    assert standing(spark_session, lakehouse) == {}


def test_the_archive_exits_with_the_reason_when_a_message_is_no_verdict(settings: Settings) -> None:
    archive.send_messages(settings, PROCESSED_ORDERS, [{"value": b"someone else's", "partition": 2}])
    finished = finpro("archive", "--available-now")
    assert finished.returncode == LakehouseError.exit_code
    output = finished.stdout + finished.stderr
    assert f"{settings.topic(PROCESSED_ORDERS)}-2-0 (topic, partition, offset) is not a verdict" in output
    assert "Traceback" not in output


class TestAfterARun:
    """What the archive refuses to go on from, once it has archived ten messages."""

    @pytest.fixture
    def begin(self, settings: Settings, spark_session: SparkSession) -> Callable[..., Any]:
        runs.send(settings, [(b"%d" % number, number % 2) for number in range(10)])
        archive.archive_all()
        checkpoint = f"{settings.checkpoints}/archive_bronze"

        def begin(at: Settings = settings, **options: bool) -> Any:
            return json.loads(starting_offsets(spark_session, at, ORDERS, BRONZE_ORDERS, checkpoint, **options))

        return begin

    def test_a_new_checkpoint_begins_where_bronze_ends(self, settings: Settings, begin: Callable[..., Any]) -> None:
        shutil.rmtree(settings.checkpoints)
        assert begin() == {settings.topic(ORDERS): {"0": 5, "1": 5, "2": -2, "3": -2}}

    def test_a_topic_that_was_created_anew_is_refused_with_the_old_checkpoint_and_with_a_new_one(
        self, settings: Settings, begin: Callable[..., Any]
    ) -> None:
        admin = AdminClient(librdkafka_config(settings))
        admin.delete_topics([settings.topic(ORDERS)])[settings.topic(ORDERS)].result(20)
        archive.wait_until(lambda: settings.topic(ORDERS) not in existing_topics(settings))
        create_topics(settings, partitions=4)
        runs.send(settings, [(b"%d" % number, number % 2) for number in range(30)])
        with pytest.raises(LakehouseError, match="created anew"):
            begin()
        shutil.rmtree(settings.checkpoints)
        with pytest.raises(LakehouseError, match="deleted and created again"):
            begin()

    def test_a_checkpoint_of_another_lakehouse_is_refused(
        self, settings: Settings, begin: Callable[..., Any], spark_session: SparkSession, tmp_path: Path
    ) -> None:
        elsewhere = str(tmp_path / "elsewhere")
        create_tables(spark_session, elsewhere)
        with pytest.raises(LakehouseError, match="made for another table"):
            begin(settings.model_copy(update={"lakehouse": elsewhere}))

    def test_a_damaged_file_of_a_checkpoint_is_named_with_what_to_do(
        self, settings: Settings, begin: Callable[..., Any], spark_session: SparkSession
    ) -> None:
        checkpoint, going_on = Path(settings.checkpoints, "archive_bronze"), begin()
        for name in ("made_for.json", "offsets/0", "commits/0"):
            file, whole = checkpoint / name, (checkpoint / name).read_text()
            for damage in ("", whole[:-3]):
                file.write_text(damage)
                with pytest.raises(StreamingError, match=re.escape(f"The file {file} is damaged")):
                    begin()
            file.write_text(whole)
        (checkpoint / "commits" / "0").unlink()  # as it says
        assert begin() == going_on
        archive.archive_all()
        (checkpoint / "made_for.json").unlink()
        with pytest.raises(StreamingError, match=r"lacks the file .*made_for\.json: remove that folder and start again"):
            begin()
        shutil.rmtree(checkpoint)
        archive.archive_all()
        offsets = [row["offset"] for row in archive.rows(spark_session, bronze_orders(settings.lakehouse)).to_dicts()]
        assert sorted(offsets) == sorted([0, 1, 2, 3, 4] * 2)

    def test_a_checkpoint_restored_from_a_copy_is_refused(self, settings: Settings, begin: Callable[..., Any]) -> None:
        copy = Path(settings.checkpoints, "copy")
        shutil.copytree(Path(settings.checkpoints, "archive_bronze"), copy)
        runs.send(settings, [(b"more", 0)])
        archive.archive_all()
        shutil.rmtree(Path(settings.checkpoints, "archive_bronze"))
        copy.rename(Path(settings.checkpoints, "archive_bronze"))
        with pytest.raises(LakehouseError, match="older than bronze"):
            begin()

    def test_what_kafka_has_forgotten_before_it_was_archived_is_a_loud_error_until_it_is_given_up(
        self, settings: Settings, begin: Callable[..., Any]
    ) -> None:
        runs.send(settings, [(b"unarchived", 0)] * 3)
        forgotten = TopicPartition(settings.topic(ORDERS), 0, 7)
        admin = AdminClient(librdkafka_config(settings))
        admin.delete_records([forgotten])[forgotten].result(20)
        with pytest.raises(LakehouseError, match=r"forgotten offsets 5 to 6 of .*--skip-forgotten"):
            begin()
        shutil.rmtree(settings.checkpoints)
        with pytest.raises(LakehouseError, match="forgotten"):
            begin()
        assert begin(skip_forgotten=True)[settings.topic(ORDERS)]["0"] == 7
