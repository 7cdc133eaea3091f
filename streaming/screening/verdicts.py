"""Screening as a pure function: recent orders and arrivals in, verdicts out.

The verdict on an order is a function of the set of orders, however they were batched: a pattern that completes later
adds its reason to the earlier members, once, as a revision.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import numpy as np
import polars as pl

from conf.rules import FraudRules
from streaming.contract import CONTENT, ORDER_SCHEMA
from streaming.rules.rules import REASONS, RULES, Finding
from streaming.rules.windows import Ints, ints, spans
from streaming.screening.chunks import PartitionRead

# An order with the reasons and shadow reasons given so far (one bit each, in the order of REASONS) and the evidence for each.
RECENT_SCHEMA = pl.Schema(
    {
        **ORDER_SCHEMA,
        "given": pl.UInt64(),
        "shadow": pl.UInt64(),
        **{f"evidence_{reason}": pl.String() for reason in REASONS},
    }
)
NO_RECENT = pl.DataFrame(schema=RECENT_SCHEMA)
# A verdict to be announced: which of its reasons are new, and whether the order has had an earlier verdict.
VERDICT_SCHEMA = pl.Schema({**RECENT_SCHEMA, "gained": pl.UInt64(), "shadow_gained": pl.UInt64(), "revision": pl.Boolean()})


def reason_lists(given: pl.Series) -> pl.Series:
    """The bits of a `given` or `shadow` column as lists of reasons, sorted."""
    bits, row = given.to_numpy(), np.zeros(len(given), np.int64)
    some = np.flatnonzero(bits)  # most orders have none
    different, which = np.unique(bits[some], return_inverse=True)
    row[some] = which + 1
    lists = [[], *([reason for bit, reason in enumerate(REASONS) if one >> bit & 1] for one in different.tolist())]
    return pl.Series(given.name, lists, dtype=pl.List(pl.String)).gather(row)


def reason_bits(reasons: Iterable[str]) -> int:
    """Reasons as the bits of a `given` or `shadow` column."""
    return sum(1 << REASONS.index(reason) for reason in set(reasons))


NEVER_US = -(2**62)  # before every event time, with room to subtract from


@dataclass(frozen=True)
class Watermark:
    """How far in event time a bucket has come, and up to where it waits for no order any more.

    Attributes:
        newest_us: the newest event time read from each partition so far, epoch microseconds.
        us: the watermark itself, epoch microseconds: an order older than this is late, it may miss neighbours that are gone.
    """

    newest_us: dict[int, int] = field(default_factory=dict)
    us: int = NEVER_US


def advance(
    watermark: Watermark,
    reads: list[PartitionRead],
    lateness: timedelta,
    backlog_offsets: int | None,
    moment: datetime,
) -> Watermark:
    """The watermark after a micro-batch of `moment` that read these ranges.

    The watermark trails the newest event time by `lateness`. While a backlog is being read (the batch came near its
    limit of `backlog_offsets`, so partitions may hold older orders that are yet unread), it trails the partition that
    is furthest behind: Spark gives every partition with a backlog a share of each batch, so the ones in this batch are
    the ones to wait for. A watermark of the newest event of all partitions would make honest orders late whenever
    partitions differ in length. The watermark never moves back.

    Nothing has happened after `moment`: an event time beyond it, of a clock that is ahead, moves nothing as long as it does,
    and a watermark that lies beyond it comes back.
    """
    now_us = epoch_us(moment)
    newest = dict(watermark.newest_us)
    for read in reads:
        if read.newest_us is not None:
            newest[read.partition] = max(read.newest_us, newest.get(read.partition, read.newest_us))
    newest = {partition: min(newest_us, now_us) for partition, newest_us in newest.items()}
    offsets = sum(read.last_offset - read.first_offset + 1 for read in reads)
    has_backlog = backlog_offsets is not None and 2 * offsets >= backlog_offsets
    if has_backlog:  # of a partition that has brought no order yet, nobody knows how far behind it is
        reached = min((newest.get(read.partition, NEVER_US) for read in reads), default=NEVER_US)
    else:
        reached = max(newest.values(), default=NEVER_US)
    lateness_us = _microseconds(lateness)
    return Watermark(newest, min(max(watermark.us, reached - lateness_us), now_us - lateness_us))


class Screened(NamedTuple):
    """What one micro-batch makes of a bucket.

    Attributes:
        verdicts: VERDICT_SCHEMA; new orders, and earlier ones that got a further reason or shadow reason.
        duplicates: how many arrivals were an order that is already known.
    """

    verdicts: pl.DataFrame
    duplicates: int


def screen(recent: pl.DataFrame, arrivals: pl.DataFrame, rules: FraudRules) -> Screened:
    """Give verdicts on new orders, and revise those of earlier orders whose patterns they complete.

    What a rule in shadow finds is kept apart, and accumulates in the same way: as if the order had two verdicts.

    Args:
        recent: the orders known so far (RECENT_SCHEMA), at least those of the arrivals' products that are near in time.
        arrivals: orders as read (ORDER_SCHEMA), in the order they were received.
        rules: the thresholds in force.
    """
    known = _with_arrivals(recent, arrivals)
    duplicates = len(recent) + len(arrivals) - len(known)
    is_new = known["given"].is_null().to_numpy()
    products, events_us = ints(known["product_id"]), ints(known["event_ts"])
    # Who shares no product with an arrival, or is too far in time, can share no pattern or evidence with one either.
    near = spans(products[is_new], events_us[is_new], 2 * _microseconds(rules.widest_window)).hold(products, events_us)
    known, is_new = known[np.flatnonzero(near)], is_new[near]
    findings = {reason: rule(known, rules) for reason, rule in RULES.items()}
    before, shadow_before = (known[name].fill_null(0).to_numpy() for name in ("given", "shadow"))
    given, shadow = before.copy(), shadow_before.copy()
    for bit, (reason, finding) in enumerate(findings.items()):
        reasons = shadow if reason in rules.in_shadow else given
        reasons[finding.rows] |= np.uint64(1 << bit)
    changed = (is_new | (given != before) | (shadow != shadow_before)).nonzero()[0]
    verdicts = known[changed].with_columns(
        *_evidence(known, findings, changed),
        given=pl.Series(given[changed]),
        shadow=pl.Series(shadow[changed]),
        gained=pl.Series((given & ~before)[changed]),
        shadow_gained=pl.Series((shadow & ~shadow_before)[changed]),
        revision=pl.Series(~is_new[changed]),
    )
    return Screened(verdicts, duplicates)


def oldest_needed(watermark_us: int, widest_window: timedelta) -> int:
    """The event time, epoch microseconds, before which an order can form no pattern with an on-time order any more."""
    return watermark_us - _microseconds(widest_window)


def _with_arrivals(recent: pl.DataFrame, arrivals: pl.DataFrame) -> pl.DataFrame:
    """One table of the recent orders and, with no reasons `given` yet (null), the arrivals that are not among them.

    The same order again is left out. A used order_id with other content stays in: which of the two stands is decided
    where all orders ever received are known, in Postgres.
    """
    known = pl.concat([recent, arrivals], how="diagonal")
    if known["order_id"].n_unique() < len(known):
        known = known.unique(["order_id", *CONTENT], keep="first", maintain_order=True)
    return known


def _evidence(known: pl.DataFrame, findings: dict[str, Finding], changed: Ints) -> list[pl.Series]:
    """The evidence of the orders whose verdict is about to be announced (`changed`): as it was, or renewed."""
    place = np.full(len(known), -1)
    place[changed] = np.arange(len(changed))
    columns = []
    for reason, finding in findings.items():
        announced = np.flatnonzero(place[finding.rows] >= 0)
        if len(announced):
            ids = known["order_id"][finding.members[announced].ravel()]
            texts = evidence_texts(ids, finding, announced)
            before = known[f"evidence_{reason}"][changed]
            columns.append(before.scatter(place[finding.rows[announced]], texts))
    return columns


def evidence_texts(ids: pl.Series, finding: Finding, which: Ints) -> pl.Series:
    """Evidence as JSON: `ids` are the order ids of the members of these entries, entry after entry."""
    members = ids.reshape((len(which), finding.members.shape[1])).arr.to_list()
    evidence = pl.DataFrame({"order_ids": members, "value": finding.value[which]})
    return evidence.select(pl.struct("order_ids", "value", limit=pl.lit(finding.limit)).struct.json_encode()).to_series()


def epoch_us(moment: datetime) -> int:
    """Microseconds since 1970."""
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)


def _microseconds(duration: timedelta) -> int:
    return round(duration.total_seconds() * 1_000_000)
