"""What `finpro export` says at its end."""

from datetime import UTC, date, datetime

from batch.warehouse.manifest import ExportedFile, Manifest, TableExport, TableProfile
from jobs.export_raw import summary

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)


def table(name: str, *, deleted: int = 0, days: dict[date, TableProfile] | None = None) -> TableExport:
    return TableExport(
        table=name,
        key=["id"],
        columns=[],
        files=[ExportedFile(f"raw/{name}/run/part-00000-x.parquet", 1_200, 2**20)],
        rows=1_200,
        source_rows=90_000,
        source_profile={},
        deleted_rows=deleted,
        days=days,
        day_count=700,
    )


def manifest(since: int | None, *tables: TableExport) -> Manifest:
    return Manifest(
        run_id="run",
        full=since is None,
        since_xid=since,
        snapshot="",
        xmin=77,
        started_at=NOON,
        finished_at=NOON,
        oldest_transaction_seconds=0,
        tables=list(tables),
    )


def test_an_incremental_run_tells_rows_deletions_and_days_of_each_table() -> None:
    days = {date(2026, 11, day): TableProfile(0, {}) for day in (21, 22)}
    assert summary(manifest(50, table("raw_users", deleted=2), table("raw_orders", deleted=3, days=days))).splitlines() == [
        "raw_users: 1,200 of 90,000 rows, 2 deleted, 1 files, 1.0 MiB",
        "raw_orders: 1,200 of 90,000 rows, 3 deleted, on 2 of 700 days, 1 files, 1.0 MiB",
        "run run is finished: what changed since transaction 50, to transaction 77",
    ]


def test_a_full_run_tells_neither_days_nor_deletions() -> None:
    assert summary(manifest(None, table("raw_orders"))).splitlines() == [
        "raw_orders: 1,200 of 90,000 rows, 1 files, 1.0 MiB",
        "run run is finished: every row, to transaction 77",
    ]
