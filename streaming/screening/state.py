"""Where buckets keep their recent orders between micro-batches: in Postgres, in the transaction that stores the verdicts.

A step, which is a micro-batch or a part of one, adds one row a bucket to `screening_state`: which segments are remembered (see
`recent`), and the one that it has made. Rows that neither this micro-batch nor the one before needs any more go. So a
micro-batch that is done again, in part or whole, finds the state as it was before, and what it writes is the same once more.

Spark's own state would travel from the JVM to Python and back with each micro-batch, and needs a shuffle: see decision 20.
"""

import json
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

import msgspec
import polars as pl
import pyarrow as pa

from batch.arrow_sessions import ArrowCursor
from conf.errors import StreamingError
from conf.former_rules import SIX
from streaming.rules.windows import ints
from streaming.screening.chunks import pack_table, unpack_table
from streaming.screening.division import KEY, By, Division
from streaming.screening.ledger import LOST_COMMITS, PARTS
from streaming.screening.recent import NOTHING_RECENT, Recent, Segment, whole
from streaming.screening.verdicts import NO_RECENT, RECENT_SCHEMA, Watermark, names_of

_FORMAT = 4  # of what a row holds
# The reasons that there were in format 1, where an order has a bit for each and a column of evidence for each.
_FORMER_REASONS = SIX


class MicroBatch(NamedTuple):
    """Which one it is, or which part of it.

    Attributes:
        query_id: of the checkpoint.
        division: how its products are divided.
        number: counted by Spark.
        part: 0, but for the later parts of a micro-batch that is screened in several.
    """

    query_id: str
    division: Division
    number: int
    part: int = 0

    @property
    def step(self) -> int:
        """Its place among the parts of all micro-batches."""
        return self.number * PARTS + self.part


class _SegmentKept(msgspec.Struct, frozen=True):
    batch: int
    newest_us: int
    revises: bool


class _Kept(msgspec.Struct, frozen=True):
    newest_us: dict[int, int]
    watermark_us: int
    oldest_us: int
    segments: list[_SegmentKept]
    format: int = 0

    @classmethod
    def decode(cls, value: bytes) -> "_Kept":
        """Back from its binary value, in today's format."""
        kept = msgspec.msgpack.decode(value, type=cls)
        if kept.format > _FORMAT:
            raise StreamingError(
                f"screening_state in Postgres was written by a newer version of finpro (format {kept.format}, this one knows"
                f" {_FORMAT}): screen with that one."
            )
        if kept.format == 0:  # a micro-batch had no parts
            segments = [msgspec.structs.replace(segment, batch=segment.batch * PARTS) for segment in kept.segments]
            return msgspec.structs.replace(kept, segments=segments, format=1)
        return kept


class Newest(NamedTuple):
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
    from screening_state where query_id = $1 and batch < $2::bigint
      and case when $3 = '' then not starts_with(division, $4) else starts_with(division, $3) end
    order by division, bucket, batch desc
"""
_ORDERS = """
    select division, bucket, batch, orders
    from jsonb_to_recordset($2::jsonb) as wanted (division text, bucket integer, batch bigint)
    join screening_state using (division, bucket, batch) where query_id = $1
"""


Rows = list[tuple[Any, ...]]
InTransaction = Callable[[Callable[[ArrowCursor], Rows]], Rows]


def newest_before(cursor: ArrowCursor, batch: MicroBatch) -> list[Newest]:
    """The newest row of each bucket before a micro-batch: a task can ask for them before it knows which buckets it has.

    They stand as soon as the micro-batch is open in the ledger: what others still store is refused.

    Raises:
        StreamingError: a newer version of finpro wrote them.
    """
    newest = cursor.rows(_NEWEST, (batch.query_id, str(batch.step), batch.division.family, f"{By.FIELD} "))
    return [Newest(division, bucket, step, _Kept.decode(kept)) for division, bucket, step, kept in newest]


def known_before(
    newest: Collection[Newest],
    batch: MicroBatch,
    buckets: Iterable[int],
    in_transaction: InTransaction,
) -> Known:
    """The states of buckets before a micro-batch. Where orders were divided otherwise until then: of those buckets.

    Args:
        newest: of `newest_before`.
        batch: the micro-batch.
        buckets: of `batch.division`.
        in_transaction: runs what fetches the parts of states that this worker does not have; not called where it has all.

    Raises:
        StreamingError: a part of the state is gone.
    """
    own = {row.bucket: row for row in newest if row.division == str(batch.division)}
    others = sorted((row for row in newest if row.division != str(batch.division)), key=lambda row: row.batch)
    # A micro-batch may have been begun by the one division, and done again by the other.
    newer = {bucket: [row for row in others if bucket not in own or row.batch >= own[bucket].batch] for bucket in buckets}
    sources = {bucket: [*([own[bucket]] if bucket in own else []), *newer[bucket]] for bucket in newer}
    _load_segments(in_transaction, batch.query_id, [row for source in sources.values() for row in source])
    recents = {}
    for bucket, source in sources.items():
        states = [_recent(batch.query_id, row) for row in source]
        recents[bucket] = _moved(states, batch, bucket) if newer[bucket] else next(iter(states), NOTHING_RECENT)
    return Known(recents, {bucket: own[bucket].needed if bucket in own else set() for bucket in sources})


def _moved(states: list[Recent], batch: MicroBatch, bucket: int) -> Recent:
    """The state of a bucket whose products were in other buckets before; where an order is in several, the last counts."""
    division, newest_us = batch.division, dict[int, int]()
    for state in states:
        for partition, reached in state.watermark.newest_us.items():
            if division.by is not By.PARTITION or partition == bucket:
                newest_us[partition] = max(reached, newest_us.get(partition, reached))
    watermark = Watermark(newest_us, min(state.watermark.us for state in states))
    remembered = [whole(state) for state in states if state.segments]
    if not remembered:
        return Recent(watermark)
    orders = pl.concat(remembered).unique("order_id", keep="last", maintain_order=True)
    own = orders.filter(pl.Series(division.bucket_of(orders) == bucket))
    if own.is_empty():
        return Recent(watermark)
    newest = int(ints(own["event_ts"]).max())
    return Recent(watermark, segments=(Segment(batch.step, newest, revises=False, orders=own),))


_Place = tuple[str, str, int, int]  # of a row: query, division, bucket, micro-batch
# Segments that this worker process has loaded or made, as long as the newest state of their bucket that it knows has them.
_segments: dict[_Place, Segment] = {}


def _load_segments(in_transaction: InTransaction, query_id: str, rows: Iterable[Newest]) -> None:
    """Fetch the segments of these rows that this worker does not have."""
    kept = {(query_id, row.division, row.bucket, segment.batch): segment for row in rows for segment in row.kept.segments}
    missing = [dict(zip(("division", "bucket", "batch"), place[1:], strict=True)) for place in kept.keys() - _segments.keys()]
    if missing:
        for *place, orders in in_transaction(lambda cursor: cursor.rows(_ORDERS, (query_id, json.dumps(missing)))):
            segment = kept[query_id, *place]
            table = unpack_table(orders, NO_RECENT)
            table = table if KEY in table.columns else in_todays_form(table)
            _segments[query_id, *place] = Segment(segment.batch, segment.newest_us, segment.revises, table)


def in_todays_form(orders: pl.DataFrame) -> pl.DataFrame:
    """What a segment holds, as RECENT_SCHEMA: until format 3 without suppressed reasons, of which there were none.

    Until format 2 it was without declared fields, too. In format 1 and before reasons were bits, each with its own evidence.
    """
    if orders.schema == RECENT_SCHEMA:  # as nearly all are: to cast each column to what it is takes a live task 0.7 ms
        return orders
    if "suppressed" not in orders.columns:
        orders = orders.with_columns(suppressed=pl.lit("", pl.String))
    if "attributes" not in orders.columns:
        orders = orders.with_columns(attributes=pl.lit(None, pl.String))
    if orders["given"].dtype == pl.String:
        return orders.select(pl.col(name).cast(dtype) for name, dtype in RECENT_SCHEMA.items())
    evidence = [f"evidence_{reason}" for reason in _FORMER_REASONS]
    parts = [pl.lit(f'"{reason}":') + pl.col(f"evidence_{reason}") for reason in _FORMER_REASONS]
    has_evidence = pl.any_horizontal(pl.col(evidence).is_not_null())
    return orders.with_columns(
        *(names_of(orders[bits].cast(pl.UInt64).to_numpy(), _FORMER_REASONS).alias(bits) for bits in ("given", "shadow")),
        evidence=pl.when(has_evidence).then("{" + pl.concat_str(parts, separator=",", ignore_nulls=True) + "}"),
    ).select(pl.col(name).cast(dtype) for name, dtype in RECENT_SCHEMA.items())


def _recent(query_id: str, row: Newest) -> Recent:
    places = [(query_id, row.division, row.bucket, segment.batch) for segment in row.kept.segments]
    gone = [place for place in places if place not in _segments]
    if gone:
        raise StreamingError(f"screening_state in Postgres lacks the row {gone[0]}: {LOST_COMMITS}")
    watermark = Watermark(row.kept.newest_us, row.kept.watermark_us)
    return Recent(watermark, row.kept.oldest_us, tuple(_segments[place] for place in places))


# --- write -----------------------------------------------------------------------------------------------------------

_WRITE = """
    insert into screening_state (query_id, division, bucket, batch, state, orders) values ($1, $2, $3, $4, $6, $7)
    on conflict (query_id, division, bucket, batch) do update set state = excluded.state, orders = excluded.orders
"""
_WRITE_AND_FORGET = f"""
    with gone as (
        delete from screening_state
        where query_id = $1 and division = $2 and bucket = $3 and batch < $4
          and batch not in (select jsonb_array_elements_text($5::jsonb)::bigint)
    ) {_WRITE}
"""


def remember_after(cursor: ArrowCursor, batch: MicroBatch, known: Known, after: dict[int, Recent]) -> None:
    """Write the states of buckets after a micro-batch, or a part of one.

    Later parts forget nothing: what the whole micro-batch goes on from has to stay until it is complete.
    """
    place = (batch.query_id, str(batch.division))
    rows = [_row(batch.step, bucket, known.rows[bucket], recent) for bucket, recent in after.items()]
    if rows:
        columns = [pa.array(column) for column in zip(*((*place, *row) for row in rows), strict=True)]
        values = pa.record_batch(columns, names=[str(place) for place in range(len(columns))])
        cursor.execute_each(_WRITE if batch.part else _WRITE_AND_FORGET, values)


def _row(step: int, bucket: int, needed: set[int], recent: Recent) -> tuple[int, int, str, bytes, bytes]:
    segments = [_SegmentKept(segment.batch, segment.newest_us, segment.revises) for segment in recent.segments]
    kept = _Kept(recent.watermark.newest_us, recent.watermark.us, recent.oldest_us, segments, _FORMAT)
    orders = b"".join(pack_table(segment.orders) for segment in recent.segments if segment.batch == step)
    needed = needed | {segment.batch for segment in segments}
    return bucket, step, json.dumps(sorted(needed)), msgspec.msgpack.encode(kept), orders


def remembered_now(batch: MicroBatch, after: dict[int, Recent]) -> None:
    """After the commit: this worker keeps the segments, and forgets those that these buckets no longer need."""
    for bucket, recent in after.items():
        place = (batch.query_id, str(batch.division), bucket)
        for key in [key for key in _segments if key[:3] == place]:
            del _segments[key]
        _segments.update({(*place, segment.batch): segment for segment in recent.segments})
