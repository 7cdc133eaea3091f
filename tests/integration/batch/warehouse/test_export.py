"""The export on a real Postgres, a real Spark and Cloud Storage's emulator: complete, of one moment, and safe to repeat."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from google.cloud.storage import Bucket
from pydantic import SecretStr
from pyspark import SparkContext
from pyspark.errors import PySparkRuntimeError
from pyspark.sql import SparkSession

from batch.google_cloud import open_bucket
from batch.postgres import connect
from batch.warehouse import changes
from batch.warehouse import export as exporting
from batch.warehouse import snapshot as snapshots
from batch.warehouse.export import export
from batch.warehouse.manifest import (
    TABLES,
    Manifest,
    TableExport,
    TableProfile,
    find_manifest,
    finished_runs,
    newest_manifest,
    read_manifest,
    write_manifest,
)
from batch.warehouse.profile import source_profile
from batch.warehouse.slices import ExportedSlice, Slice, export_slice
from batch.warehouse.snapshot import Snapshot, held_snapshot, reader
from conf.errors import ExportError, PostgresError, PostgresUnavailable
from conf.settings import Settings
from jobs.local.platform import Platform
from tests.runs.logins import login

Start = Callable[[], SparkContext]
COMMAND = [str(Path(sys.executable).parent / "finpro"), "export"]
ORDER_ROW = """
    insert into raw_orders (order_id, user_id, product_id, quantity, amount, amount_numeric, country, created_date, event_ts,
                            status, source, reasons, rules_version, screened_at)
    select {order_id}, 1 + i % 100, 1 + i % 10, 1, 'Rp.' || i, i, 'ID', {at}, {at}, 'Genuine', 'web', '{{}}', 'r1', {at}
    from (select i, timestamptz '2026-11-01' + i * interval '1.000001 s' as at from generate_series({first}, {last}) as i) as s
"""


@pytest.fixture
def spark(spark_session: SparkSession) -> Start:
    """Gives a Spark in this process."""
    return lambda: spark_session.sparkContext


@pytest.fixture
def dsn(settings: Settings) -> str:
    return settings.require("postgres_dsn")


@pytest.fixture
def bucket(settings: Settings) -> Bucket:
    return open_bucket(settings)


def execute(dsn: str, statement: str) -> list[tuple[Any, ...]]:
    with connect(dsn) as connection, connection.cursor() as cursor:
        cursor.execute(statement)
        return cursor.fetchall() if cursor.description else []


def orders(first: int, last: int, prefix: str = "o") -> str:
    """A statement that inserts orders with the ids of a stretch of numbers."""
    return ORDER_ROW.format(order_id=f"'{prefix}' || i", at="at", first=first, last=last)


def user(number: int) -> str:
    """A statement that inserts one user."""
    values = f"{number}, 'User {number}', 'u{number}@example.com', '+62', '2026-01-01', 'web'"
    return f"insert into raw_users (user_id, name, email, phone_number, created_date, source) values ({values})"


def profile(dsn: str, export: TableExport) -> TableProfile:
    """What Postgres says of the whole table."""
    with connect(dsn) as connection, connection.cursor() as cursor:
        return source_profile(cursor, export.table, export.columns)


def never() -> SparkContext:
    raise AssertionError("Spark was started")


def of(manifest: Manifest, table: str) -> TableExport:
    return next(each for each in manifest.tables if each.table == table)


def exported(bucket: Bucket, manifest: Manifest, table: str, *columns: str) -> list[dict[str, Any]]:
    """The rows of a table's files, as the manifest lists them, or these columns of them; each file holds what it says."""
    rows: list[dict[str, Any]] = []
    for file in of(manifest, table).files:
        content = bucket.blob(file.name).download_as_bytes()
        found = pq.read_table(pa.BufferReader(content), columns=list(columns) or None).to_pylist()
        assert (len(found), len(content)) == (file.rows, file.bytes)
        rows += found
    assert len(rows) == of(manifest, table).rows
    return rows


def keys(bucket: Bucket, manifest: Manifest, table: str = "raw_orders") -> list[Any]:
    (key,) = of(manifest, table).key
    return sorted(row[key] for row in exported(bucket, manifest, table, key))


def objects(bucket: Bucket, run_id: str) -> set[str]:
    """The names of all objects that a run has made."""
    return {blob.name for blob in bucket.list_blobs(prefix="raw/") if run_id in blob.name}


@contextmanager
def writer(dsn: str) -> Iterator[None]:
    """Transactions one after the other, each with one user and one order of the same number, from 1,000,000 on."""
    done = threading.Event()

    def write() -> None:
        with connect(dsn) as connection, connection.cursor() as cursor:
            number = 1_000_000
            while not done.is_set():
                number += 1
                cursor.execute(f"{user(number)}; {orders(number, number)}")
                connection.commit()
                time.sleep(0.001)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def test_all_readers_see_one_snapshot_while_a_writer_goes_on(
    spark: Start, settings: Settings, dsn: str, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "_SLICE_BYTES", 2**19)
    execute(dsn, orders(1, 20_000))
    with writer(dsn):
        time.sleep(0.3)
        manifest = export(spark, settings, "busy")
    assert len(of(manifest, "raw_orders").files) > 4
    assert execute(dsn, "select count(*) from raw_orders")[0][0] > of(manifest, "raw_orders").rows
    for table, key in (("raw_orders", "order_id"), ("raw_users", "user_id")):
        # What was written is never changed here: so Postgres can still say what the snapshot showed.
        visible = f"select {key} from {table} where pg_visible_in_snapshot(change_xid, '{manifest.snapshot}')"
        assert keys(bucket, manifest, table) == sorted(value for (value,) in execute(dsn, visible))
        assert of(manifest, table).rows == of(manifest, table).source_rows
    amounts = sum(row["amount_numeric"] for row in exported(bucket, manifest, "raw_orders"))
    assert of(manifest, "raw_orders").source_profile["amount_numeric"]["sum"] == str(amounts)
    in_orders = {number for number in keys(bucket, manifest) if number > "o1000000" and len(number) == 8}
    assert in_orders == {f"o{number}" for number in keys(bucket, manifest, "raw_users")}


def test_a_transaction_that_was_open_during_an_export_arrives_in_the_next_run(
    spark: Start, settings: Settings, dsn: str, bucket: Bucket
) -> None:
    execute(dsn, orders(1, 50))
    with connect(dsn) as late, late.cursor() as cursor:
        cursor.execute(f"{orders(1, 3, 'late')}; update raw_orders set country = 'SG' where order_id = 'o7'")
        execute(dsn, orders(51, 60))
        first = export(spark, settings, "first")
        assert first.oldest_transaction_seconds > 0
        assert keys(bucket, first) == sorted(f"o{number}" for number in range(1, 61))
    execute(dsn, orders(61, 65))
    second = export(spark, settings, "second")
    assert (second.full, second.since_xid) == (False, first.xmin)
    assert set(keys(bucket, second)) >= {"late1", "late2", "late3", "o7", *(f"o{number}" for number in range(61, 66))}
    merged = {row["order_id"]: row for run in (first, second) for row in exported(bucket, run, "raw_orders")}
    stored = execute(dsn, "select order_id, country, change_xid::text::bigint from raw_orders")
    assert sorted((row["order_id"], row["country"], row["change_xid"]) for row in merged.values()) == sorted(stored)
    assert of(second, "raw_orders").source_rows == 68
    third = export(spark, settings, "third")
    assert (third.since_xid, keys(bucket, third), third.oldest_transaction_seconds) == (second.xmin, [], 0)


def test_an_update_by_hand_is_a_change_that_the_next_run_exports(
    spark: Start, settings: Settings, dsn: str, bucket: Bucket
) -> None:
    execute(dsn, f"{orders(1, 20)}; {user(1)}")
    export(spark, settings, "first")
    execute(dsn, "update raw_orders set amount_numeric = 5 where order_id = 'o3'; update raw_users set name = 'Other'")
    second = export(spark, settings, "second")
    assert [(row["order_id"], row["amount_numeric"]) for row in exported(bucket, second, "raw_orders")] == [("o3", 5)]
    assert [row["name"] for row in exported(bucket, second, "raw_users")] == ["Other"]
    everything = export(spark, settings, "everything", full=True)
    assert (everything.full, len(keys(bucket, everything))) == (True, 20)


def test_many_changed_rows_are_read_by_blocks_and_none_comes_twice_or_not_at_all(
    spark: Start, settings: Settings, dsn: str, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute(dsn, orders(1, 6_000))
    export(spark, settings, "first")
    execute(dsn, "update raw_orders set country = 'SG' where amount_numeric % 3 = 0")
    monkeypatch.setattr(exporting, "_SLICE_BYTES", 2**18)
    monkeypatch.setattr(changes, "_SLICE_ROWS", 100)
    second = export(spark, settings, "second")
    assert len(of(second, "raw_orders").files) > 1
    assert keys(bucket, second) == sorted(f"o{number}" for number in range(3, 6_001, 3))


def test_changed_rows_of_a_large_table_are_cut_by_their_transactions_and_none_comes_twice_or_not_at_all(
    spark: Start, settings: Settings, dsn: str, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute(dsn, orders(1, 6_000))
    execute(dsn, "analyze raw_orders")
    export(spark, settings, "first")
    for rest in range(5):
        execute(dsn, f"update raw_orders set country = 'SG' where amount_numeric % 60 = {rest}")
    monkeypatch.setattr(changes, "_SLICE_ROWS", 150)
    second = export(spark, settings, "second")
    assert sorted(file.rows for file in of(second, "raw_orders").files) == [100, 100, 100, 200]
    assert keys(bucket, second) == sorted(f"o{number}" for number in range(1, 6_001) if number % 60 < 5)


def test_every_type_arrives_as_it_is(spark: Start, settings: Settings, dsn: str, bucket: Bucket) -> None:
    execute(
        dsn,
        """
        alter table raw_orders add note text, add due date, add weight float8, add gift boolean, add fee numeric(12, 2),
                               add pieces integer, add channel varchar(8);
        insert into raw_orders values
            ('a', 1, 2, 3, 'Rp.1', 9223372036854775807, 'ID', '2026-11-01 00:00:00.000001+07', '1969-12-31 23:59:59.999999+00',
             'Fraud', 'toko é 店', '{foreign_country,"night, \\"amount"}', 'r1', '2026-11-01 12:00:00.123456+00',
             default, default, default, '{"tries": 1, "device_id": "é\\n\\""}', '{night_amount}',
             null, null, null, null, null, null, null),
            ('b', 1, 2, 3, '', 0, 'ID', '2026-11-01+00', '2026-11-01+00', 'Genuine', '', '{}', 'r1', '2026-11-01+00',
             default, default, default, null, default, '', '2026-02-28', -0.5, false, -1234.56, -7, 'app')""",
    )
    manifest = export(spark, settings, "types")
    first, second = sorted(exported(bucket, manifest, "raw_orders"), key=lambda row: str(row["order_id"]))
    assert first["amount_numeric"] == 2**63 - 1
    assert first["created_date"] == datetime(2026, 10, 31, 17, 0, 0, 1, tzinfo=UTC)
    assert first["event_ts"] == datetime(1969, 12, 31, 23, 59, 59, 999999, tzinfo=UTC)
    assert (first["source"], first["reasons"]) == ("toko é 店", ["foreign_country", 'night, "amount'])
    nullable = ("note", "due", "weight", "gift", "fee", "pieces", "channel")
    assert [first[name] for name in nullable] == [None] * 7
    assert [second[name] for name in nullable] == ["", date(2026, 2, 28), -0.5, False, Decimal("-1234.56"), -7, "app"]
    assert (second["reasons"], second["amount"], second["attributes"]) == ([], "", None)
    assert (first["suppressed_reasons"], second["suppressed_reasons"]) == (["night_amount"], [])
    assert msgspec.json.decode(first["attributes"]) == {"tries": 1, "device_id": 'é\n"'}
    (xid,) = execute(dsn, "select change_xid::text::bigint from raw_orders where order_id = 'a'")[0]
    assert first["change_xid"] == xid
    types = {column.name: column.type for column in of(manifest, "raw_orders").columns}
    assert list(types) == list(first)
    assert [types[name] for name in ("amount_numeric", "event_ts", "reasons", "change_xid", "due", "fee", "attributes")] == [
        *("INT64", "TIMESTAMP", "ARRAY<STRING>", "INT64", "DATE", "NUMERIC", "STRING")
    ]
    read = of(manifest, "raw_orders")
    assert TableProfile(read.source_rows, read.source_profile) == profile(dsn, read)


def test_what_readers_profile_is_what_postgres_says_of_the_table_also_where_it_is_empty(
    spark: Start, settings: Settings, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "_SLICE_BYTES", 2**18)
    execute(dsn, f"{orders(1, 6_000)}; update raw_orders set reasons = '{{night_amount}}', status = 'Fraud' where quantity = 1")
    execute(dsn, f"delete from raw_orders where amount_numeric between 1000 and 5000; {user(1)}")
    manifest = export(spark, settings, "profiled")
    assert of(manifest, "raw_orders").source_rows == 1_999
    for table in manifest.tables:
        assert TableProfile(table.source_rows, table.source_profile) == profile(dsn, table)


def test_a_full_run_whose_readers_miss_a_row_counts_for_nothing(
    spark: Start, settings: Settings, dsn: str, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute(dsn, orders(1, 100))

    def misses_one(part: Slice, **given: Any) -> ExportedSlice:
        return export_slice(replace(part, condition=f"{part.condition} and change_xid is not null limit 99"), **given)

    monkeypatch.setattr(exporting, "export_slice", misses_one)
    with pytest.raises(ExportError, match="raw_orders has 100 rows in the snapshot, of which 99 were read"):
        export(spark, settings, "short")
    assert newest_manifest(bucket) is None


def test_a_spark_that_does_not_start_ends_the_run_at_once(
    settings: Settings, dsn: str, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "_SLICE_BYTES", 2**16)
    execute(dsn, orders(1, 20_000))

    def broken() -> SparkContext:
        raise PySparkRuntimeError("[JAVA_GATEWAY_EXITED] Java gateway process exited before sending its port number.")

    with pytest.raises(ExportError, match=r"left nothing that counts: .*JAVA_GATEWAY_EXITED"):
        export(broken, settings, "broken")
    assert newest_manifest(bucket) is None
    assert len(objects(bucket, "broken")) < 10


def test_little_is_exported_sooner_than_spark_would_have_started(settings: Settings, dsn: str, bucket: Bucket) -> None:
    execute(dsn, f"{orders(1, 100)}; {user(1)}")
    manifest = export(never, settings, "little")
    assert (len(keys(bucket, manifest)), keys(bucket, manifest, "raw_users")) == (100, [1])


def test_much_is_exported_by_this_process_until_spark_has_started_and_then_by_spark(
    spark: Start, settings: Settings, dsn: str, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "_SLICE_BYTES", 2**18)
    execute(dsn, orders(1, 20_000))
    here = os.getpid()

    def noted(part: Slice, **given: Any) -> ExportedSlice:
        done = export_slice(part, **given)
        (tmp_path / f"{part.table}-{part.number}-{os.getpid()}").touch()
        if os.getpid() == here:
            time.sleep(1)  # so that Spark has started long before it could take all
        return done

    monkeypatch.setattr(exporting, "export_slice", noted)
    manifest = export(spark, settings, "much")
    assert keys(bucket, manifest) == sorted(f"o{number}" for number in range(1, 20_001))
    done = [path.name.rsplit("-", 1) for path in tmp_path.glob("raw_*")]
    assert len({part for part, _ in done}) == len(done) > 5
    assert str(here) in {process for _, process in done}
    assert len({process for _, process in done}) > 1


def test_a_new_column_brings_every_row_again_since_no_transaction_wrote_its_default(
    spark: Start, settings: Settings, dsn: str, bucket: Bucket
) -> None:
    execute(dsn, orders(1, 10))
    export(spark, settings, "before")
    execute(dsn, "alter table raw_orders add channel text not null default 'app'")
    said: list[str] = []
    manifest = export(spark, settings, "after", say=said.append)
    assert manifest.full
    assert [row["channel"] for row in exported(bucket, manifest, "raw_orders")] == ["app"] * 10
    assert said == ["the columns of raw_orders have changed since run before: exporting every row"]


def test_a_column_of_a_type_that_cannot_travel_stops_the_run_before_it_begins(
    spark: Start, settings: Settings, dsn: str, bucket: Bucket
) -> None:
    execute(dsn, "alter table raw_users add place point")
    with pytest.raises(ExportError, match=r"raw_users\.place is point"):
        export(spark, settings, "never")
    assert objects(bucket, "never") == set()


def test_a_finished_run_stays_as_it_is(spark: Start, settings: Settings, dsn: str, bucket: Bucket) -> None:
    execute(dsn, orders(1, 10))
    first = export(spark, settings, "once")
    execute(dsn, orders(11, 20))
    assert export(spark, settings, "once", full=True) == first
    assert objects(bucket, "once") == {"raw/manifests/once.json", *(file.name for file in of(first, "raw_orders").files)}
    assert newest_manifest(bucket) == first
    with pytest.raises(ExportError, match="finished already"):
        write_manifest(bucket, msgspec.structs.replace(first, full=False))
    assert read_manifest(bucket, "once") == first


def test_a_task_that_fails_after_its_upload_is_tried_again_and_counts_once(
    spark: Start,
    settings: Settings,
    dsn: str,
    bucket: Bucket,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    execute(dsn, f"{orders(1, 100)}; {user(1)}")

    def fails_once(part: Slice, **given: Any) -> ExportedSlice:
        done = export_slice(part, **given)
        if not (tmp_path / part.table).exists():
            (tmp_path / part.table).touch()
            raise ConnectionError(f"lost after the upload of {part.table}")
        return done

    monkeypatch.setattr(exporting, "export_slice", fails_once)
    manifest = export(spark, settings, "retried")
    assert {path.name for path in tmp_path.iterdir()} == set(TABLES)
    assert (len(keys(bucket, manifest)), keys(bucket, manifest, "raw_users")) == (100, [1])
    assert len(objects(bucket, "retried")) == 3


def test_what_stops_a_task_for_good_is_the_error_of_the_run(
    spark: Start, settings: Settings, dsn: str, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(part: Slice, **given: Any) -> None:
        raise PostgresError(f"Postgres stopped the reading of {part.table}: a disk is full. Export again.")

    monkeypatch.setattr(exporting, "export_slice", stopped)
    with pytest.raises(
        PostgresError, match=r"^Postgres stopped the reading of (raw_\w+|order_outcomes): a disk is full\. Export again\.$"
    ):
        export(spark, settings, "stopped")
    assert newest_manifest(bucket) is None


def test_a_killed_export_counts_for_nothing_and_the_same_run_again_is_complete(
    settings: Settings, dsn: str, bucket: Bucket
) -> None:
    execute(dsn, f"{user(1)}; {orders(1, 450_000)}")  # enough for Spark
    one_at_a_time = [*COMMAND, "--run-id", "night", "--master", "local[1,2]"]
    with subprocess.Popen(one_at_a_time, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        wait_for(lambda: objects(bucket, "night"), process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    half = objects(bucket, "night")
    assert half
    assert finished_runs(bucket) == []
    with pytest.raises(ExportError, match="no finished run night"):
        read_manifest(bucket, "night")
    again = subprocess.run(one_at_a_time, capture_output=True, text=True, timeout=120, check=False)
    assert again.returncode == 0, again.stderr
    manifest = read_manifest(bucket)
    assert keys(bucket, manifest) == sorted(f"o{number}" for number in range(1, 450_001))
    assert keys(bucket, manifest, "raw_users") == [1]
    listed = {file.name for table in manifest.tables for file in table.files}
    assert objects(bucket, "night") == {"raw/manifests/night.json", *listed}
    assert not half & listed
    told = subprocess.run(one_at_a_time, capture_output=True, text=True, timeout=60, check=True)
    assert "run night is finished" in told.stdout
    assert find_manifest(bucket, "night") == manifest


def wait_for(condition: Any, process: subprocess.Popen[str]) -> None:
    give_up = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < give_up
        time.sleep(0.01)


def read(snapshot: Snapshot, query: str) -> list[tuple[Any, ...]]:
    with reader(snapshot) as rows:
        return [tuple(row.values()) for batch in rows(query) for row in batch.to_pylist()]


def test_a_lost_holder_is_an_error_that_says_so_and_not_other_data(settings: Settings, dsn: str) -> None:
    holders = "from pg_stat_activity where application_name = 'finpro export' and datname = current_database()"
    with held_snapshot(dsn, TABLES) as (snapshot, *_):
        execute(dsn, orders(1, 1))
        assert read(snapshot, "select count(*) from raw_orders") == [(0,)]
        assert execute(dsn, f"select pg_terminate_backend(pid, 5000) {holders}") == [(True,)]
        with pytest.raises(PostgresError, match="snapshot is gone"):
            read(snapshot, "select count(*) from raw_orders")


def test_a_reader_that_is_cut_off_between_two_batches_says_so(settings: Settings, dsn: str) -> None:
    with held_snapshot(dsn, TABLES) as (snapshot, *_), reader(snapshot) as rows:
        batches = rows("select pg_backend_pid() as pid, number from generate_series(1, 10000000) as number")
        pid = next(batches).column("pid")[0].as_py()
        execute(dsn, f"select pg_terminate_backend({pid}, 5000)")
        with pytest.raises(PostgresUnavailable, match=r"^Postgres at \S+ stopped the reading: .+\. Export again\.$"):
            deque(batches, maxlen=0)


def test_a_reader_does_not_wait_for_ever_for_who_waits_for_its_holder(
    settings: Settings, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "_WAIT_FOR_READ", "200ms")
    altering = threading.Thread(target=execute, args=(dsn, "alter table raw_orders add x text"))
    with held_snapshot(dsn, TABLES) as (snapshot, *_):
        altering.start()
        while execute(dsn, "select count(*) from pg_locks where not granted and relation = 'raw_orders'::regclass") == [(0,)]:
            time.sleep(0.01)
        with pytest.raises(PostgresError, match="waits to alter"):
            read(snapshot, "select count(*) from raw_orders")
    altering.join()


def test_two_exports_of_one_database_exclude_each_other(
    spark: Start, settings: Settings, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "_WAIT_FOR_LOCK_SECONDS", 0.1)
    with held_snapshot(dsn, TABLES), pytest.raises(ExportError, match="Another export"):
        export(spark, settings, "second")


def test_a_login_with_hasty_limits_exports(
    spark: Start, settings: Settings, dsn: str, bucket: Bucket, platform: Platform
) -> None:
    execute(dsn, orders(1, 20_000))
    with login(platform, dsn, "finpro_export", hasty=True) as own:
        manifest = export(spark, settings.model_copy(update={"postgres_dsn": SecretStr(own)}), "hasty")
    assert of(manifest, "raw_orders").rows == 20_000
    assert manifest == find_manifest(bucket, "hasty")


def test_a_missing_database_is_one_message_before_spark_starts(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINPRO_POSTGRES_DSN", settings.require("postgres_dsn") + "_not_there")
    ended = subprocess.run(COMMAND, capture_output=True, text=True, timeout=60, check=False, env=os.environ)
    assert (ended.returncode, ended.stdout) == (4, "")
    assert "there is no such database" in ended.stderr
