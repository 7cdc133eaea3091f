"""The rules over history: orders of any stretch of time, screened again by the very functions of the stream.

    orders ─ shuffle by (time slice, product), sort by time ─> runs of orders through a worker ─> reasons with evidence

All neighbours of an order share its product and lie within the widest window of it. So each order goes into the slice of
time that owns it, and as a margin into the slice next to it when it lies that close to the border: every pattern is whole
where it is judged. A worker reads its orders in the order of product and time and keeps only those that later ones may
meet, so that neither a long history nor a hot product needs memory. What limits the speed is the number of executors.

Rules across products take such a way of their own before, by another field; what they find joins the orders.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial, reduce
from typing import NamedTuple, cast
from zoneinfo import ZoneInfo

import numpy as np
import polars as pl
import pyarrow as pa
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import to_arrow_schema
from pyspark.sql.types import ArrayType, LongType, StringType, StructField, StructType

from conf.conditions import Declared
from conf.errors import SettingsError
from conf.rules import FraudRules
from streaming.contract import MESSAGE_COLUMNS, NOTHING_DECLARED, Contents, read_messages
from streaming.rules.rules import findings
from streaming.screening.division import KEY
from streaming.screening.verdicts import (
    KINDS,
    bits_of,
    evidence_of,
    names_of,
    nothing_across,
    reason_lists,
    taking_part_across,
    united_evidence,
)

ORDERS = """
    order_id string, user_id bigint, product_id bigint, quantity bigint, amount string, amount_numeric bigint, country string,
    created_date timestamp, event_ts timestamp, source string, attributes string, partition int, offset bigint,
    received_at timestamp, reason string
"""
# What re-screening adds to an order; evidence is a JSON object by reason, null where the order has none.
FOUND = StructType(
    [
        *(StructField(name, ArrayType(StringType(), containsNull=False), nullable=False) for name in KINDS.values()),
        StructField("evidence", StringType()),
    ]
)

_ACROSS = {f"across_{name}": name for name in KINDS.values()}  # what rules across products have found
_ACROSS_EVIDENCE = "across_evidence"
_SLICE = "slice"  # the first microsecond of the slice of time that a row is in
_SHORTEST_SLICE = timedelta(hours=1)  # a slice of a day's busiest product is some seconds of work
_WINDOWS_IN_A_SLICE = 20  # at least: so margins double at most a tenth of the orders
_AT_ONCE = 50_000  # orders screened together, at least

Fold = Callable[[pl.DataFrame], pl.DataFrame]


class Period(NamedTuple):
    """A stretch of event time, in UTC: `since` belongs to it, `until` does not; None where it has no such end."""

    since: datetime | None
    until: datetime | None

    def widened(self, margin: timedelta) -> "Period":
        """The same, and so much more before and after it."""
        return Period(self.since and self.since - margin, self.until and self.until + margin)

    def holds(self, moment: Column) -> Column:
        """Whether a timestamp of Spark lies in it."""
        after = F.lit(True) if self.since is None else moment >= F.lit(self.since)
        return after if self.until is None else after & (moment < F.lit(self.until))

    def selects(self, moment: pl.Expr) -> pl.Expr:
        """`holds`, of a time of polars."""
        since, until = (pl.lit(end, pl.Datetime("us", "UTC")) for end in self)
        return (moment >= since).fill_null(value=True) & (moment < until).fill_null(value=True)

    def touches(self, day: Column) -> Column:
        """Whether some of a UTC day of Spark's lies in it: what reading can leave out."""
        after = F.lit(True) if self.since is None else day >= F.lit(self.since).cast("date")
        return after if self.until is None else after & (day <= F.lit(self.until).cast("date"))


def parse_period(since: str | None, until: str | None, time_zone: str) -> Period:
    """A period from ISO 8601 dates or timestamps; without an offset they are local times of the zone.

    Raises:
        SettingsError: one of them is neither, or the period is empty.
    """
    period = Period(parse_moment("--since", since, time_zone), parse_moment("--until", until, time_zone))
    if period.since and period.until and period.since >= period.until:
        raise SettingsError(f"There is no time between --since {since} and --until {until}: give the earlier one first.")
    return period


def parse_moment(option: str, text: str | None, time_zone: str) -> datetime | None:
    """What an option says: an ISO 8601 date or timestamp, without an offset a local time of the zone; None of nothing.

    Raises:
        SettingsError: it is neither; names the option.
    """
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=ZoneInfo(time_zone))).astimezone(UTC)
    except (ValueError, OverflowError) as error:
        message = f"{option} {text} is no ISO 8601 date or timestamp, such as 2026-11-22 or 2026-11-22T08:30:00+07:00."
        raise SettingsError(message) from error


def orders_of(
    bronze: DataFrame,
    max_future_skew: timedelta,
    read_at: datetime,
    declared: Declared = NOTHING_DECLARED,
    ever_declared: Declared = NOTHING_DECLARED,
) -> DataFrame:
    """Archived messages (`contract.MESSAGE_COLUMNS`) read by the contract at `read_at`: ORDERS, one row a message.

    `reason` says why a message is a dead letter, which has no other columns than its position and `received_at`; it is
    null for an order. What only several messages together show (an order_id used twice) is not looked at.

    Args:
        bronze: messages.
        max_future_skew: as for `read_messages`.
        read_at: as for `read_messages`.
        declared: the fields that decide what is a dead letter.
        ever_declared: the fields that are among an order's attributes where it has them: other rules may look at them.
    """

    def contents_of(batch: pa.RecordBatch) -> Contents:
        contents = read_messages(batch, max_future_skew, read_at, declared)
        if not ever_declared or ever_declared == declared:
            return contents
        position = ["partition", "offset"]
        more = read_messages(batch, max_future_skew, read_at, ever_declared).orders
        more = more.join(contents.dead_letters, on=position, how="anti")
        return contents._replace(orders=pl.concat([more, contents.orders.join(more, on=position, how="anti")]))

    def read(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            contents = contents_of(batch)
            dead_letters = contents.dead_letters.select("partition", "offset", "received_at", "reason")
            yield from _to_spark(pl.concat([contents.orders, dead_letters], how="diagonal"), schema)

    schema = _arrow_schema(struct_of(ORDERS))
    return bronze.select(*MESSAGE_COLUMNS).mapInArrow(read, ORDERS)


def rescreened(orders: DataFrame, rules: FraudRules) -> DataFrame:
    """Orders as they come, and what the rules find among all of them (FOUND).

    Args:
        orders: one row an order; at least the columns that the rules look at: order_id, user_id, product_id, quantity,
            amount_numeric, country, event_ts, and attributes where they look at declared fields. To judge a period, hand over
            the orders of the widest window around it too.
        rules: to screen by.
    """
    return rescreen(orders, rules, _as_found, StructType([*orders.schema, *FOUND]))


def _as_found(screened: pl.DataFrame) -> pl.DataFrame:
    return screened


def rescreen(orders: DataFrame, rules: FraudRules, fold: Fold, schema: StructType) -> DataFrame:
    """`rescreened`, with each worker's orders folded where they are: what a caller does not need never leaves the worker.

    Args:
        orders: as for `rescreened`.
        rules: to screen by.
        fold: takes tables of orders with FOUND, each order in exactly one of them; returns a table of `schema`.
        schema: of the result.
    """
    found = [_found_across(orders, part, field) for field, part in rules.across_products.items()]
    if found:
        orders, fold = _with_found_across(orders, found), partial(_united, fold)
    return _in_slices(orders, rules.within_products, "product_id", fold, schema)


def _in_slices(orders: DataFrame, rules: FraudRules, key: str, fold: Fold, schema: StructType) -> DataFrame:
    """Orders whose neighbours have the same `key`, screened by rules, and folded."""
    width = _slice_width(rules)
    moment, margin = F.unix_micros("event_ts"), F.lit(_microseconds(rules.widest_window))
    first, last = _slice_of(moment - margin, width), _slice_of(moment + margin, width)
    return (
        orders.withColumn(_SLICE, F.explode(F.sequence(first, last, F.lit(width))))
        .repartition(_SLICE, key)
        .sortWithinPartitions(_SLICE, key, "event_ts", "order_id")
        .mapInArrow(_rescreening(rules, key, fold, _arrow_schema(schema)), schema)
    )


def _found_across(orders: DataFrame, rules: FraudRules, field: str) -> DataFrame:
    """What rules find that all look at a field: `order_id` and FOUND, of the orders that have a reason."""
    columns = [name for name in nothing_across(rules).columns if name in orders.columns]
    part = StructType([*orders.select(*columns).schema, StructField(KEY, LongType(), nullable=False)])
    arrow = _arrow_schema(part)

    def take(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            yield from _to_spark(taking_part_across(_from_spark(batch), rules, field), arrow)

    found = StructType([part["order_id"], *FOUND])
    return _in_slices(orders.select(*columns).mapInArrow(take, part), rules, KEY, _hit, found)


def _hit(screened: pl.DataFrame) -> pl.DataFrame:
    return screened.filter(pl.col("evidence").is_not_null())


def _with_found_across(orders: DataFrame, found: Sequence[DataFrame]) -> DataFrame:
    """Orders with what several divisions have found of them (_ACROSS and _ACROSS_EVIDENCE, lists)."""
    lists = {name: F.flatten(F.collect_list(reasons)) for name, reasons in _ACROSS.items()}
    lists[_ACROSS_EVIDENCE] = F.collect_list("evidence")
    by_order = reduce(DataFrame.unionByName, found).groupBy("order_id").agg(*(one.alias(name) for name, one in lists.items()))
    nothing = F.array().cast("array<string>")
    return orders.join(by_order, "order_id", "left").withColumns({name: F.coalesce(name, nothing) for name in lists})


def _united(fold: Fold, screened: pl.DataFrame) -> pl.DataFrame:
    """Folds orders with all that was found of them, by whichever rules."""
    some = np.flatnonzero((screened[_ACROSS_EVIDENCE].list.len() > 0).to_numpy())
    pairs = zip(screened["evidence"][some].to_list(), screened[_ACROSS_EVIDENCE][some].to_list(), strict=True)
    texts = pl.Series([united_evidence([own, *further] if own else further) for own, further in pairs], dtype=pl.String)
    evidence = screened["evidence"].scatter(some, texts)
    united = {reasons: pl.concat_list(reasons, name).list.sort() for name, reasons in _ACROSS.items()}
    screened = screened.with_columns(**united, evidence=evidence)
    return fold(screened.drop(*_ACROSS, _ACROSS_EVIDENCE))


def _slice_width(rules: FraudRules) -> int:
    return _microseconds(max(_SHORTEST_SLICE, _WINDOWS_IN_A_SLICE * rules.widest_window))


def _slice_of(moment: Column, width: int) -> Column:
    return moment - F.pmod(moment, F.lit(width))


def _rescreening(
    rules: FraudRules, key: str, fold: Fold, schema: pa.Schema
) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    def in_worker(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for screened in rescreened_tables(map(_from_spark, batches), rules, _slice_width(rules), key):
            yield from _to_spark(fold(screened), schema)

    return in_worker


def rescreened_tables(
    tables: Iterable[pl.DataFrame], rules: FraudRules, slice_width: int, key: str = "product_id", at_once: int = _AT_ONCE
) -> Iterator[pl.DataFrame]:
    """What the rules find (FOUND) among orders in the order of slice, product (or `key`) and time; margins are left out.

    Of the newest product the orders of two windows are held back: those of the last one may meet orders to come, and
    those before them are their neighbours.

    Args:
        tables: orders, cut anywhere; `slice` is the first microsecond of the slice of time that the row is in.
        rules: to screen by.
        slice_width: in microseconds. An order belongs to the slice it lies in, and is a neighbour in others.
        key: the column of which neighbours have one value.
        at_once: so many orders are screened together, at least.
    """
    window, held, judged, enough = _microseconds(rules.widest_window), None, 0, at_once
    for table in tables:
        held = table if held is None else pl.concat([held, table])
        if len(held) < enough:
            continue
        neighbours, unjudged = _since(held, key, 2 * window), _since(held, key, window)
        yield _screened(held, judged, unjudged, rules, slice_width)
        held, judged = held[neighbours:], unjudged - neighbours
        enough = max(at_once, 2 * len(held))  # so that a hot product's orders are gone through twice, not with every batch
    if held is not None:
        yield _screened(held, judged, len(held), rules, slice_width)


def _since(orders: pl.DataFrame, key: str, distance: int) -> int:
    """The first row of the newest product, or key, whose time is at most so many microseconds before the newest."""
    newest = orders.row(-1, named=True)
    is_same = (orders[_SLICE] == newest[_SLICE]) & (orders[key] == newest[key])
    is_near = orders["event_ts"].to_physical() >= orders["event_ts"].to_physical()[-1] - distance
    return len(orders) - int((is_same & is_near).sum())


def _screened(orders: pl.DataFrame, first: int, end: int, rules: FraudRules, slice_width: int) -> pl.DataFrame:
    """The orders in rows `first:end` that their slice owns, with what the rules find among all rows (FOUND)."""
    moment = orders["event_ts"].to_physical().to_numpy()
    is_own = moment - moment % slice_width == orders[_SLICE].to_numpy()
    is_own[:first], is_own[end:] = False, False
    found, own = findings(orders, rules, apart=orders[_SLICE]), np.flatnonzero(is_own)
    reasons = {
        KINDS[column]: reason_lists(names_of(bits[own], list(found))) for column, bits in bits_of(found, orders, rules).items()
    }
    evidence = evidence_of(orders["order_id"], found, own)
    return orders.drop(_SLICE)[own].with_columns(**reasons, evidence=evidence)


def struct_of(ddl: str) -> StructType:
    """A schema from its text."""
    return cast(StructType, StructType.fromDDL(ddl))


def _arrow_schema(schema: StructType) -> pa.Schema:
    return to_arrow_schema(schema, timezone="UTC")


def _from_spark(batch: pa.RecordBatch) -> pl.DataFrame:
    return pl.from_arrow(batch)  # type: ignore[return-value]


def _to_spark(table: pl.DataFrame, schema: pa.Schema) -> list[pa.RecordBatch]:
    batches: list[pa.RecordBatch] = table.select(schema.names).to_arrow().cast(schema).to_batches()
    return batches


def _microseconds(duration: timedelta) -> int:
    return duration // timedelta(microseconds=1)
