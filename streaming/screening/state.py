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
from streaming.rules.windows import ints
from streaming.screening.chunks import pack_table, unpack_table
from streaming.screening.division import By, Division
from streaming.screening.recent import NOTHING_RECENT, Recent, Segment, whole
from streaming.screening.verdicts import NO_RECENT, Frontier

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
    """The newest row of a bucket."""

    division: str
    bucket: int
    batch: int
    kept: _Kept

    @property
    def needed(self) -> set[int]:
        """The micro-batches in whose rows this state is."""
        return {self.batch, *(segment.batch for segment in self.kept.segments)}


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
    select division, bucket, batch, orders
    from jsonb_to_recordset($2::jsonb) as wanted (division text, bucket integer, batch bigint)
    join screening_state using (division, bucket, batch) where query_id = $1
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
    own = {row.bucket: row for row in rows if row.division == str(batch.division)}
    others = sorted((row for row in rows if row.division != str(batch.division)), key=lambda row: row.batch)
    # A micro-batch may have been begun by the one division, and done again by the other.
    newer = {bucket: [row for row in others if bucket not in own or row.batch >= own[bucket].batch] for bucket in buckets}
    sources = {bucket: [*([own[bucket]] if bucket in own else []), *newer[bucket]] for bucket in newer}
    _meet(cursor, batch.query_id, [row for source in sources.values() for row in source])
    recents = {}
    for bucket, source in sources.items():
        states = [_recent(batch.query_id, row) for row in source]
        recents[bucket] = _moved(states, batch, bucket) if newer[bucket] else next(iter(states), NOTHING_RECENT)
    return Known(recents, {bucket: own[bucket].needed if bucket in own else set() for bucket in sources})


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


_Place = tuple[str, str, int, int]  # of a row: query, division, bucket, micro-batch
# Segments that this worker process has met, as long as the state of their bucket that it knew last has them.
_segments: dict[_Place, Segment] = {}


def _meet(cursor: adbc.Cursor, query_id: str, rows: Iterable[_Row]) -> None:
    """Fetch the segments of these rows that this worker has not met."""
    kept = {(query_id, row.division, row.bucket, segment.batch): segment for row in rows for segment in row.kept.segments}
    missing = [dict(zip(("division", "bucket", "batch"), place[1:], strict=True)) for place in kept.keys() - _segments.keys()]
    if missing:
        cursor.execute(_ORDERS, (query_id, json.dumps(missing)))
        for *place, orders in cursor.fetchall():
            segment = kept[query_id, *place]
            table = unpack_table(orders, NO_RECENT)
            _segments[query_id, *place] = Segment(segment.batch, segment.newest_us, segment.revises, table)


def _recent(query_id: str, row: _Row) -> Recent:
    places = [(query_id, row.division, row.bucket, segment.batch) for segment in row.kept.segments]
    gone = [place for place in places if place not in _segments]
    if gone:
        raise StreamingError(f"screening_state in Postgres lacks the row {gone[0]}: {_START_ANEW}")
    frontier = Frontier(row.kept.newest_us, row.kept.watermark_us)
    return Recent(frontier, row.kept.oldest_us, tuple(_segments[place] for place in places))


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
    with explained(dsn), connect(dsn, application_name="finpro screen") as connection, connection.cursor() as cursor:
        cursor.execute("select max(batch) from screening_state where query_id = %s", [query_id])
        (newest,) = cursor.fetchone() or (None,)
    if newest is None or not committed <= newest <= planned:
        reached = "no state" if newest is None else f"the state of micro-batch {newest}"
        raise StreamingError(
            f"The checkpoint of screening has committed micro-batch {committed}, and Postgres holds {reached}: {_START_ANEW}"
        )
