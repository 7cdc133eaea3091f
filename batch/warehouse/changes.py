"""What has changed in the raw tables since a run, as Postgres knows it: rows, deletions, and the days of both.

Nothing here reads more of a table than what has changed: rows are found by the index on `change_xid`, deletions in
`deleted_rows`, where triggers put them down, and days of raw_orders by the index on `created_date`.

Transaction ids say what has changed as long as they are of one history. A database that was restored to an earlier moment,
moved by pg_dump, or failed over with a loss gives the same ids again, to other changes, or brings those of another server.
So each run leaves a witness in the database (`export_runs`, with a random token that its manifest has as well): committed
after its snapshot was taken, so that a database that has it has all that the snapshot showed, and before its manifest counts.
Where the next run does not find it, a new epoch begins, with every row.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import NamedTuple
from uuid import uuid4

from psycopg2.errors import UniqueViolation
from psycopg2.extensions import cursor as Cursor
from psycopg2.extras import Json, execute_values

from batch.warehouse.days import PARTITIONED_BY
from batch.warehouse.manifest import Column, Manifest, TableProfile
from batch.warehouse.profile import of_all_days
from batch.warehouse.slices import Slice, SourceColumn
from batch.warehouse.snapshot import Snapshot
from conf.errors import ExportError

_SLICE_ROWS = 200_000  # of changed rows: so many are read by the index on change_xid in one go
_LARGE_PART = 0.2  # of a table: from there on its blocks are read in order
_KEPT_DELETIONS = "30 days"


class Window(NamedTuple):
    """Transactions from `since` on, up to and without `before`.

    Ids from beyond a snapshot's end are of another epoch, which the run that began this one exported as they were.
    """

    since: int
    before: int

    @property
    def condition(self) -> str:
        """In SQL, of a row."""
        return f"change_xid >= '{self.since}'::xid8 and change_xid < '{self.before}'::xid8"


@dataclass(frozen=True)
class Deletions:
    """How many deletions of each table a window has, and which tables were truncated."""

    rows: dict[str, int]
    truncated: list[str]


def deletions(cursor: Cursor, window: Window) -> Deletions:
    """What a window has of `deleted_rows`."""
    cursor.execute(
        f"select table_name, count(key), bool_or(key is null) from deleted_rows where {window.condition} group by table_name"
    )
    found = cursor.fetchall()
    return Deletions({table: rows for table, rows, _ in found if rows}, [table for table, _, truncated in found if truncated])


def deleted_slice(table: str, key: SourceColumn, window: Window) -> Slice:
    """The rows that are no longer where they were: the key, and the UTC day.

    What came back is left out: by the id of its transaction its row may be older than the deletion, and in no later run.
    """
    standing = f'standing."{key.name}" = deleted_rows."{key.name}"'
    if column := PARTITIONED_BY.get(table):
        standing += f" and (standing.{column} at time zone 'UTC')::date = deleted_rows.day"
    return Slice(
        table,
        0,
        [key, SourceColumn("day", "date")],
        f"{window.condition} and not exists (select from {table} as standing where {standing})",
        deleted=True,
        source=f'(select key::{key.type} as "{key.name}", day, change_xid from deleted_rows'
        f" where table_name = '{table}' and key is not null) as deleted_rows",
    )


def forget_deletions(cursor: Cursor, window: Window) -> None:
    """Delete from `deleted_rows` what no later run will ask for: what is old, and older than the window or of another epoch."""
    cursor.execute(
        f"delete from deleted_rows where deleted_at < now() - interval '{_KEPT_DELETIONS}'"
        f" and not (change_xid >= '{window.since}'::xid8 and change_xid < '{window.before}'::xid8)"
    )


def changed_rows(cursor: Cursor, table: str, window: Window, by_blocks: Collection[str]) -> list[str]:
    """Conditions that cut the changed rows of a table into slices, by their transactions; a transaction stays whole.

    Where they are a large part of the table, they are cut by its blocks (`by_blocks`), as all of its rows would be.
    """
    cursor.execute(
        f"""
        select first, total, reltuples
        from (
            select min(xid) as first, max(total) as total
            from (
                select change_xid::text::bigint as xid, count(*) over () as total,
                       (row_number() over (order by change_xid) - 1) / {_SLICE_ROWS} as slice
                from {table} where {window.condition}
            ) as numbered
            group by slice
        ) as cut, pg_class
        where pg_class.oid = '{table}'::regclass
        order by first"""
    )
    found = cursor.fetchall()
    if not found:
        return []
    firsts = sorted({first for first, *_ in found})
    _, total, rows = found[0]
    if total > max(_SLICE_ROWS, _LARGE_PART * rows):
        return [f"{blocks} and {window.condition}" for blocks in by_blocks]
    ends = [*firsts[1:], window.before]
    return [Window(first, end).condition for first, end in zip(firsts, ends, strict=True)]


def changed_days(cursor: Cursor, table: str, window: Window) -> list[date]:
    """The UTC days of a partitioned table on which a row was written, or from which one has gone.

    A day of raw_orders has also changed when somebody has said what turned out about one of its orders: what is made of that
    day is made of this, too.
    """
    day = f"({PARTITIONED_BY[table]} at time zone 'UTC')::date"
    about = f"select order_id from order_outcomes where {window.condition}"
    stated = f"union select {day} from raw_orders where order_id in ({about})"
    cursor.execute(
        f"""
        select {day} from {table} where {window.condition}
        union
        select day from deleted_rows where {window.condition} and table_name = '{table}' and day is not null
        {stated if table == "raw_orders" else ""}
        order by 1"""
    )
    return [day for (day,) in cursor.fetchall()]


# --- the profiles of days, kept from run to run --------------------------------------------------------------------------


def with_kept_days(
    cursor: Cursor, table: str, columns: Sequence[Column], changed: Mapping[date, TableProfile]
) -> tuple[TableProfile, int]:
    """The profile of a whole partitioned table, and how many days of it have rows: of the `changed` days, and of the others as
    the run before has kept them."""
    cursor.execute("select day, rows, profile from day_profiles where table_name = %s", [table])
    kept = {day: TableProfile(rows, profile) for day, rows, profile in cursor.fetchall()}
    days = [profile for profile in (kept | dict(changed)).values() if profile.rows]
    return of_all_days(days, columns), len(days)


def keep_days(cursor: Cursor, table: str, profiles: Mapping[date, TableProfile], *, all_days: bool) -> None:
    """Keep the profiles of days for the runs to come, in the place of what is kept of these, or of all days."""
    cursor.execute(
        "delete from day_profiles where table_name = %s and (%s or day = any(%s))", [table, all_days, list(profiles)]
    )
    rows = [(table, day, found.rows, Json(found.columns)) for day, found in profiles.items() if found.rows]
    execute_values(cursor, "insert into day_profiles (table_name, day, rows, profile) values %s", rows)


# --- the epoch of the database -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Witness:
    """What tells a run from all others: its number, and the number before it that this database knows; its token, which is
    random; the token of the first run of its epoch."""

    number: int
    follows: int
    token: str
    epoch: str


def new_witness(cursor: Cursor, newest: Manifest | None, *, goes_on: bool) -> Witness:
    """The witness of a run that begins now; it `goes_on` in the epoch of the `newest` finished run, or begins one.

    Its number is that of the clock (seconds since 1970), so that it is also greater than the numbers in another bucket, which
    raw tables in BigQuery may have been loaded from; and greater than all that bucket and database know, whatever the clock.
    """
    cursor.execute("select coalesce(max(number), 0) from export_runs")
    (known,) = cursor.fetchone() or (0,)
    least = max(known, newest.number if newest else 0) + 1
    token = str(uuid4())
    return Witness(
        number=max(int(datetime.now(UTC).timestamp()), least),
        follows=known,
        token=token,
        epoch=newest.epoch if newest and goes_on else token,
    )


def end_of_epoch(cursor: Cursor, run: Manifest, snapshot: Snapshot) -> str | None:
    """Why the transaction ids of a finished run are not those of this database, in words; None where they are."""
    if not run.token:
        return f"run {run.run_id} was made by an earlier version of finpro"
    if run.database != snapshot.database:
        return f"this database is not the one of run {run.run_id}"
    cursor.execute("select from export_runs where number = %s and token = %s", [run.number, run.token])
    if cursor.rowcount == 0 or run.xmin > snapshot.xmin:
        return (
            f"this database does not know of run {run.run_id}: it was restored to an earlier moment, or has lost its newest"
            " changes in a failover"
        )
    return None


def bear_witness(cursor: Cursor, witness: Witness, run_id: str, snapshot: Snapshot) -> None:
    """Leave the witness of a run in the database; the transaction, and so the moment, is the caller's.

    Raises:
        ExportError: another export has done so since this one began.
    """
    try:
        cursor.execute(
            "insert into export_runs (number, follows, run_id, token, oldest_xid) values (%s, %s, %s, %s, %s::text::xid8)",
            [witness.number, witness.follows, run_id, witness.token, snapshot.xmin],
        )
    except UniqueViolation as error:
        raise ExportError(
            "Another export of this database has overtaken this one, which had lost its lock: this run counts for nothing."
            " Export again."
        ) from error
