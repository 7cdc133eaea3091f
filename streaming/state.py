"""Where buckets keep their recent orders between micro-batches: in Postgres, in the transaction that stores the verdicts.

A micro-batch adds one row a bucket to `screening_state`: which segments are remembered (see `recent`), and the one that it
has made. Rows that neither this micro-batch nor the one before needs any more go. So a micro-batch that is done again,
in part or whole, finds the state as it was before, and what it writes is the same once more.

Spark's own state would travel from the JVM to Python and back with each micro-batch, and needs a shuffle: see decision 20.
"""

import json
from collections.abc import Iterable
from typing import NamedTuple

import adbc_driver_postgresql.dbapi as adbc
import msgspec
import polars as pl

from batch.postgres import connect, explained
from conf.errors import StreamingError
from streaming.chunks import pack_table, unpack_table
from streaming.division import By, Division
from streaming.neighbours import ints
from streaming.recent import NOTHING_RECENT, Recent, Segment, whole
from streaming.screening import NO_RECENT, Frontier

_NO_BUCKET = -1  # of a task that had nothing to read: each micro-batch leaves a row


class MicroBatch(NamedTuple):
    """Which one it is.

    Attributes:
        query_id: of the checkpoint.
        division: how its products are divided.
        number: counted by Spark.
    """

    query_id: str
    division: Division
    number: int


class _SegmentKept(msgspec.Struct, frozen=True):
    batch: int
    newest_us: int
    revises: bool


class _Kept(msgspec.Struct, frozen=True):
    newest_us: dict[int, int]
    watermark_us: int
    oldest_us: int
    segments: list[_SegmentKept]


class _Row(NamedTuple):
    """A row of `screening_state`, and which one."""

    division: str
    bucket: int
    batch: int
    kept: _Kept


class Known(NamedTuple):
    """The states of some buckets before a micro-batch.

    Attributes:
        recents: bucket → state.
        rows: bucket → the micro-batches whose rows these states are in.
    """

    recents: dict[int, Recent]
    rows: dict[int, set[int]]


# --- read ------------------------------------------------------------------------------------------------------------

_NEWEST = """
    select distinct on (division, bucket) division, bucket, batch, state
    from screening_state where query_id = $1 and batch < $2::bigint and bucket >= 0
    order by division, bucket, batch desc
"""
_ORDERS = """
    select batch, orders from screening_state where query_id = $1 and division = $2 and bucket = $3::integer
    and batch in (select jsonb_array_elements_text($4::jsonb)::bigint)
"""


def known_before(cursor: adbc.Cursor, batch: MicroBatch, buckets: Iterable[int]) -> Known:
    """The states of buckets before a micro-batch. Where products were divided otherwise until then: of those buckets.

    Raises:
        StreamingError: a part of the state is gone.
    """
    cursor.execute(_NEWEST, (batch.query_id, str(batch.number)))
    rows = [
        _Row(division, bucket, number, msgspec.msgpack.decode(kept, type=_Kept))
        for division, bucket, number, kept in cursor.fetchall()
    ]
    division = str(batch.division)
    own = {row.bucket: row for row in rows if row.division == division}
    others = sorted((row for row in rows if row.division != division), key=lambda row: row.batch)
    recents, needed = {}, {}
    for bucket in buckets:
        row = own.get(bucket)
        newer = [other for other in others if row is None or other.batch > row.batch]
        states = [_read(cursor, batch.query_id, one) for one in [*([row] if row else []), *newer]]
        recents[bucket] = _moved(states, batch, bucket) if newer else next(iter(states), NOTHING_RECENT)
        needed[bucket] = {row.batch, *(segment.batch for segment in row.kept.segments)} if row else set()
    return Known(recents, needed)


def _moved(states: list[Recent], batch: MicroBatch, bucket: int) -> Recent:
    """The state of a bucket whose products were in other buckets before; where an order is in several, the last counts."""
    division, newest_us = batch.division, dict[int, int]()
    for state in states:
        for partition, reached in state.frontier.newest_us.items():
            if division.by is By.PRODUCT or partition == bucket:
                newest_us[partition] = max(reached, newest_us.get(partition, reached))
    orders = pl.concat([whole(state) for state in states]).unique("order_id", keep="last", maintain_order=True)
    own = orders.filter(pl.Series(division.bucket_of(orders) == bucket))
    frontier = Frontier(newest_us, min(state.frontier.watermark_us for state in states))
    if own.is_empty():
        return Recent(frontier)
    newest = int(ints(own["event_ts"]).max())
    return Recent(frontier, segments=(Segment(batch.number, newest, revises=False, orders=own),))


# Segments that this worker process has met, as long as they are a part of any bucket's state.
_segments: dict[tuple[str, str, int, int], Segment] = {}


def _read(cursor: adbc.Cursor, query_id: str, row: _Row) -> Recent:
    place = (query_id, row.division, row.bucket)
    kept = {segment.batch: segment for segment in row.kept.segments}
    missing = [batch for batch in kept if (*place, batch) not in _segments]
    if missing:
        cursor.execute(_ORDERS, (query_id, row.division, str(row.bucket), json.dumps(missing)))
        for batch, orders in cursor.fetchall():
            table = unpack_table(orders, NO_RECENT)
            _segments[(*place, batch)] = Segment(batch, kept[batch].newest_us, kept[batch].revises, table)
    try:
        segments = tuple(_segments[(*place, batch)] for batch in kept)
    except KeyError as error:
        raise StreamingError(f"screening_state in Postgres lacks the row {error}: {_START_ANEW}") from None
    return Recent(Frontier(row.kept.newest_us, row.kept.watermark_us), row.kept.oldest_us, segments)


# --- write -----------------------------------------------------------------------------------------------------------

_WRITE = """
    with gone as (
        delete from screening_state
        where query_id = $1 and division = $2 and bucket = $3 and batch < $4
          and batch not in (select jsonb_array_elements_text($5::jsonb)::bigint)
    )
    insert into screening_state (query_id, division, bucket, batch, state, orders) values ($1, $2, $3, $4, $6, $7)
    on conflict (query_id, division, bucket, batch) do update set state = excluded.state, orders = excluded.orders
"""


def remember_after(cursor: adbc.Cursor, batch: MicroBatch, known: Known, after: dict[int, Recent]) -> None:
    """Write the states of buckets after a micro-batch; those of no bucket where its task read nothing."""
    place = (batch.query_id, str(batch.division))
    rows = [_row(batch.number, bucket, known.rows[bucket], recent) for bucket, recent in after.items()]
    nothing = (_NO_BUCKET, batch.number, "[]", b"", b"")
    cursor.executemany(_WRITE, [(*place, *row) for row in rows or [nothing]])


def _row(batch: int, bucket: int, needed: set[int], recent: Recent) -> tuple[int, int, str, bytes, bytes]:
    segments = [_SegmentKept(segment.batch, segment.newest_us, segment.revises) for segment in recent.segments]
    kept = _Kept(recent.frontier.newest_us, recent.frontier.watermark_us, recent.oldest_us, segments)
    orders = b"".join(pack_table(segment.orders) for segment in recent.segments if segment.batch == batch)
    needed = needed | {segment.batch for segment in segments}
    return bucket, batch, json.dumps(sorted(needed)), msgspec.msgpack.encode(kept), orders


def remembered_now(batch: MicroBatch, after: dict[int, Recent]) -> None:
    """After the commit: this worker keeps the segments, and forgets those that these buckets no longer need."""
    for bucket, recent in after.items():
        place = (batch.query_id, str(batch.division), bucket)
        for key in [key for key in _segments if key[:3] == place]:
            del _segments[key]
        _segments.update({(*place, segment.batch): segment for segment in recent.segments})


# --- at the start ----------------------------------------------------------------------------------------------------

_START_ANEW = (
    "has Postgres, or the checkpoint, been restored from a copy? Move the checkpoint away and start anew, as docs/runbook.md"
    " says (the checkpoint of screening is lost): nothing is lost or doubled."
)


def require_state(dsn: str, query_id: str, committed: int, planned: int) -> None:
    """Check that Postgres holds the state that a checkpoint goes on from.

    Args:
        dsn: of Postgres.
        query_id: of the checkpoint.
        committed, planned: the newest micro-batch of each kind in the checkpoint.

    Raises:
        StreamingError: the state is older or newer than the checkpoint, or was never there.
        PostgresError: Postgres does not answer, or refuses.
    """
    with connect(dsn, application_name="finpro screen") as connection, explained(dsn), connection.cursor() as cursor:
        cursor.execute("select max(batch) from screening_state where query_id = %s", [query_id])
        (newest,) = cursor.fetchone() or (None,)
    if newest is None or not committed <= newest <= planned:
        reached = "no state" if newest is None else f"the state of micro-batch {newest}"
        raise StreamingError(
            f"The checkpoint of screening has committed micro-batch {committed}, and Postgres holds {reached}: {_START_ANEW}"
        )
