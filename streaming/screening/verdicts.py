"""Screening as a pure function: recent orders and arrivals in, verdicts out.

The verdict on an order is a function of the set of orders, however they were batched: a pattern that completes later
adds its reason to the earlier members, once, as a revision.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import msgspec
import numpy as np
import polars as pl
from numpy.typing import NDArray

from conf.rules import FraudRules
from streaming.contract import CONTENT, ORDER_SCHEMA
from streaming.rules.lists import allowed
from streaming.rules.patterns import Finding
from streaming.rules.rules import findings, taking_part, values_of
from streaming.rules.windows import Ints, ints, spans
from streaming.screening.chunks import PartitionRead
from streaming.screening.division import KEY, keys_of

# The kinds of reasons: the column that holds those of an order as one text, and the list's name outside of screening.
KINDS = {"given": "reasons", "shadow": "shadow_reasons", "suppressed": "suppressed_reasons"}
# For each kind, the column of those that are new.
GAINED = {"given": "gained", "shadow": "shadow_gained", "suppressed": "suppressed_gained"}
# An order with the reasons of each kind so far (sorted names with commas between them, mostly none), and the evidence for each:
# a JSON object by reason, null where there is none.
RECENT_SCHEMA = pl.Schema({**ORDER_SCHEMA, **dict.fromkeys(KINDS, pl.String()), "evidence": pl.String()})
NO_RECENT = pl.DataFrame(schema=RECENT_SCHEMA)
# A verdict to be announced: which of its reasons are new, and whether the order has had an earlier verdict.
VERDICT_SCHEMA = pl.Schema({**RECENT_SCHEMA, **dict.fromkeys(GAINED.values(), pl.String()), "revision": pl.Boolean()})
# What of these tells of an order's verdict, and of its news.
JUDGED = tuple(name for name in RECENT_SCHEMA if name not in ORDER_SCHEMA)
NEWS = tuple(name for name in VERDICT_SCHEMA if name not in RECENT_SCHEMA)
# What is always remembered of an order across products: so little costs next to nothing, and rules that look at other ones of
# these fields than before have it at once.
_ALWAYS = ("order_id", "user_id", "product_id", "quantity", "amount_numeric", "country", "event_ts")


def further_fields(rules: FraudRules) -> list[str]:
    """What else is remembered of an order across products, for rules that look at it: columns of ORDER_SCHEMA."""
    looked_at = set[str]().union(*rules.looked_at.values())
    wanted = looked_at | ({"attributes"} if looked_at & rules.fields.keys() else set())
    return [name for name in ORDER_SCHEMA.names() if name in wanted and name not in _ALWAYS]


def nothing_across(rules: FraudRules) -> pl.DataFrame:
    """No orders, as those across products arrive and, with reasons and evidence, are remembered for these rules."""
    fields = {name: ORDER_SCHEMA[name] for name in (*_ALWAYS, *further_fields(rules))}
    return pl.DataFrame(schema={**fields, KEY: pl.Int64(), **{name: RECENT_SCHEMA[name] for name in JUDGED}})


def taking_part_across(orders: pl.DataFrame, rules: FraudRules, field: str) -> pl.DataFrame:
    """Those of the orders (ORDER_SCHEMA) that take part in a pattern of rules which all look at a field, with its `key`."""
    part = orders[np.flatnonzero(taking_part(orders, rules))]
    keys = pl.Series(KEY, keys_of(values_of(part, rules, field)), dtype=pl.Int64)
    return part.select(*_ALWAYS, *further_fields(rules), keys)


def reason_text(reasons: Iterable[str]) -> str:
    """Reasons as the text of a column of KINDS."""
    return ",".join(sorted(set(reasons)))


_NO_REASONS = pl.Series([[]], dtype=pl.List(pl.String))


def reason_lists(given: pl.Series) -> pl.Series:
    """The texts of a column of KINDS as lists of reasons, sorted."""
    row = np.zeros(len(given), np.int64)
    some = np.flatnonzero((given != "").to_numpy())  # most orders have none
    if not len(some):
        return _NO_REASONS.new_from_index(0, len(given)).alias(given.name)
    different, which = _numbered(given[some])
    row[some] = which + 1
    return pl.Series(given.name, [[], *(one.split(",") for one in different)], dtype=pl.List(pl.String))[row]


def _numbered(texts: pl.Series) -> tuple[list[str], Ints]:
    """The different ones among texts, and which of them each is."""
    encoded = texts.to_arrow(compat_level=pl.CompatLevel.oldest()).dictionary_encode()
    return encoded.dictionary.to_pylist(), encoded.indices.to_numpy()


def names_of(bits: NDArray[np.uint64], names: Sequence[str]) -> pl.Series:
    """Bits, one a name, as the text of a column of KINDS."""
    row = np.zeros(len(bits), np.int64)
    some = np.flatnonzero(bits)
    different, which = np.unique(bits[some], return_inverse=True)
    row[some] = which + 1
    texts = [",".join(name for bit, name in enumerate(names) if one >> bit & 1) for one in different.tolist()]
    return pl.Series(["", *texts], dtype=pl.String)[row]


class _Accumulated(NamedTuple):
    """Reasons of a kind that orders have now, and those that are new among them (texts as in a column of KINDS)."""

    given: pl.Series
    gained: pl.Series

    def without(self, others: pl.Series) -> "_Accumulated":
        """Without those that an order has in another column of KINDS."""
        return _Accumulated(_less(self.given, others), _less(self.gained, others))


def _accumulated(before: pl.Series, found: pl.Series) -> _Accumulated:
    """Reasons only accumulate: what was given before stays."""
    some = np.flatnonzero((found != "").to_numpy())
    nothing = _repeated("", len(before))
    if not len(some):
        return _Accumulated(before, nothing)
    pairs, which = _numbered(before[some] + ";" + found[some])
    united, new = [], []
    for pair in pairs:
        earlier, now = (set(filter(None, part.split(","))) for part in pair.split(";"))
        united.append(reason_text(earlier | now))
        new.append(reason_text(now - earlier))
    texts = [pl.Series(column, dtype=pl.String)[which] for column in (united, new)]
    return _Accumulated(before.scatter(some, texts[0]), nothing.scatter(some, texts[1]))


def _less(texts: pl.Series, others: pl.Series) -> pl.Series:
    """Reasons without others (texts as in a column of KINDS)."""
    some = np.flatnonzero(((texts != "") & (others != "")).to_numpy())
    if not len(some):
        return texts
    pairs = zip(texts[some], others[some], strict=True)
    return texts.scatter(some, [reason_text(set(one.split(",")) - set(other.split(","))) for one, other in pairs])


def _repeated(text: str | None, times: int) -> pl.Series:
    return pl.Series([text], dtype=pl.String).new_from_index(0, times)


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
        verdicts: VERDICT_SCHEMA; new orders, and earlier ones that got a further reason of any kind.
        duplicates: how many arrivals were an order that is already known.
    """

    verdicts: pl.DataFrame
    duplicates: int


_NO_REASONS_YET = pl.col(*KINDS).fill_null("")


def screen(recent: pl.DataFrame, arrivals: pl.DataFrame, rules: FraudRules, key: str = "product_id") -> Screened:
    """Give verdicts on new orders, and revise those of earlier orders whose patterns they complete.

    What a rule in shadow finds is kept apart, and accumulates in the same way: as if the order had two verdicts. So is what a
    list suppresses; of two rules files of which one does and the other does not, the one that gives the reason counts.

    Args:
        recent: the orders known so far (RECENT_SCHEMA), at least those of the arrivals' products that are near in time.
        arrivals: orders as read (ORDER_SCHEMA), in the order they were received.
        rules: in force.
        key: the column of which neighbours have one value. Across products both tables have columns as in `nothing_across`, and
            so have the verdicts.
    """
    known = _with_arrivals(recent, arrivals)
    duplicates = len(recent) + len(arrivals) - len(known)
    is_new = known["given"].is_null().to_numpy()
    keys, events_us = ints(known[key]), ints(known["event_ts"])
    # Who shares no product with an arrival, or is too far in time, can share no pattern or evidence with one either.
    near = spans(keys[is_new], events_us[is_new], 2 * _microseconds(rules.widest_window)).hold(keys, events_us)
    if not near.all():  # mostly they are: to copy them takes as long as many a rule
        known, is_new = known[np.flatnonzero(near)], is_new[near]
    known = known.with_columns(_NO_REASONS_YET)
    found = findings(known, rules)
    kinds = {
        column: _accumulated(known[column], names_of(bits, list(found)))
        for column, bits in bits_of(found, known, rules).items()
    }
    kinds["suppressed"] = kinds["suppressed"].without(kinds["given"].given)
    is_changed = np.logical_or.reduce([is_new, *((kind.gained != "").to_numpy() for kind in kinds.values())])
    changed = np.flatnonzero(is_changed)
    columns = {name: known[name] for name in recent.columns} | {"revision": pl.Series(~is_new)}
    for column, kind in kinds.items():
        columns |= {column: kind.given, GAINED[column]: kind.gained}
    verdicts = pl.DataFrame([columns[name].alias(name) for name in (*recent.columns, *NEWS)])[changed]
    evidence = _renewed(verdicts["evidence"], evidence_of(known["order_id"], found, changed))
    return Screened(verdicts.replace_column(verdicts.get_column_index("evidence"), evidence.alias("evidence")), duplicates)


def bits_of(found: Mapping[str, Finding], orders: pl.DataFrame, rules: FraudRules) -> dict[str, NDArray[np.uint64]]:
    """Which rules hit each order, by kind of reason (KINDS): a bit each, in the order of the findings.

    What a list suppresses is suppressed whether its rule is in shadow or not: so shadow shows what the rule would do.
    """
    bits = {column: np.zeros(len(orders), np.uint64) for column in KINDS}
    suppressing, in_shadow = allowed(orders, rules), rules.in_shadow
    for bit, (name, finding) in enumerate(found.items()):
        rows, one = finding.rows, np.uint64(1 << bit)
        if name in suppressing:
            is_allowed = suppressing[name][rows]
            bits["suppressed"][rows[is_allowed]] |= one
            rows = rows[~is_allowed]
        bits["shadow" if name in in_shadow else "given"][rows] |= one
    return bits


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
        content = [name for name in CONTENT if name in known.columns]
        known = known.unique(["order_id", *content], keep="first", maintain_order=True)
    return known


def evidence_of(order_ids: pl.Series, found: Mapping[str, Finding], wanted: Ints) -> pl.Series:
    """What was found of the orders at the positions `wanted`, as JSON: an object by reason, null where there is nothing.

    Args:
        order_ids: of all orders.
        found: by reason, sorted.
        wanted: ascending.
    """
    place = np.full(len(order_ids), -1)
    place[wanted] = np.arange(len(wanted))
    parts = []
    for reason, finding in found.items():
        which = np.flatnonzero(place[finding.rows] >= 0)
        if len(which):
            texts = evidence_texts(order_ids[finding.members[which].ravel()], finding, which, f'"{reason}":')
            parts.append(pl.DataFrame({"place": place[finding.rows[which]], "part": texts}))
    nothing = _repeated(None, len(wanted))
    if not parts:
        return nothing
    whole = pl.concat(parts).group_by("place", maintain_order=True).agg(pl.col("part").str.join(","))
    return nothing.scatter(whole["place"], "{" + whole["part"] + "}")


# Evidence (JSON) as its parts by reason, each as it is written.
decode_evidence = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def _renewed(before: pl.Series, now: pl.Series) -> pl.Series:
    """Evidence as it was, or renewed: what a reason was given for is kept also when its members are forgotten."""
    if now.null_count() == len(now):
        return before
    both = np.flatnonzero((before.is_not_null() & now.is_not_null()).to_numpy())
    united = now.zip_with(now.is_not_null(), before)
    if not len(both):
        return united
    texts = [united_evidence(pair) for pair in zip(before[both], now[both], strict=True)]
    return united.scatter(both, pl.Series(texts, dtype=pl.String))


def united_evidence(texts: Iterable[str]) -> str:
    """Several evidences (JSON) as one; of what several have, the last counts."""
    evidence = {name: part for text in texts for name, part in decode_evidence(text).items()}
    return msgspec.json.encode(dict(sorted(evidence.items()))).decode()


def evidence_for(reasons: str, evidence: str) -> str:
    """Those parts of evidence (JSON) that are for these reasons (the text of a column of KINDS)."""
    wanted = reasons.split(",")
    return msgspec.json.encode({name: part for name, part in decode_evidence(evidence).items() if name in wanted}).decode()


def evidence_texts(ids: pl.Series, finding: Finding, which: Ints, name: str) -> pl.Series:
    """Evidence as JSON, each after its `name`: `ids` are the order ids of the members of these entries, entry after entry."""
    entries = pl.DataFrame({"order_ids": ids.reshape((len(which), finding.members.shape[1])), "value": finding.value[which]})
    members = pl.col("order_ids").arr.to_list().list.unique(maintain_order=True)
    evidence = pl.struct(members, "value", limit=pl.lit(finding.limit)).struct.json_encode()
    return entries.select(pl.lit(name) + evidence).to_series()


def epoch_us(moment: datetime) -> int:
    """Microseconds since 1970."""
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)


def _microseconds(duration: timedelta) -> int:
    return round(duration.total_seconds() * 1_000_000)
