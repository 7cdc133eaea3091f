"""Rules in force, applied to orders of before: what is new is added in Postgres, and announced as revisions that name it.

    silver ─ rules in force ─> orders whose reasons grow ─ a day at a time ─> added in Postgres ─> announced as they then stand

Reasons only accumulate, and what Postgres then holds is what is announced: so a day may be done twice, and a stream that
revises the same order at the same time loses nothing. The record (`streaming.rules.proposals`) says which days are left.
"""

from collections.abc import Iterator
from datetime import UTC, date, datetime, time, timedelta
from functools import partial
from typing import NamedTuple

import polars as pl
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from conf.rules import FraudRules
from streaming.contract import ORDER_SCHEMA
from streaming.history.backtest import orders_near
from streaming.history.republish import Published, Sinks, as_verdicts, on_executors
from streaming.history.rescreening import Fold, Period, rescreen, struct_of
from streaming.rules.proposals import Application, add_application_day, record_of
from streaming.screening.sinks import Announcer, revise

_POSITION = ("partition", "offset", "received_at")
_ORDER = [name for name in ORDER_SCHEMA.names() if name not in _POSITION]
_GROUPS = "day date, gained string, is_new_fraud boolean, orders bigint, amount decimal(38,0)"
_FURTHER = """
    order_id string, user_id bigint, product_id bigint, quantity bigint, amount string, amount_numeric bigint, country string,
    created_date timestamp, event_ts timestamp, source string, attributes string,
    reasons array<string>, shadow_reasons array<string>, suppressed_reasons array<string>, evidence string
"""


class Further(NamedTuple):
    """Orders of a UTC day that are alike: which reasons they lack that rules give them, how many, and worth what, in rupiah.

    `is_new_fraud` says that they have no reason at all so far.
    """

    day: date
    gained: frozenset[str]
    is_new_fraud: bool
    orders: int
    amount: int


class Done(NamedTuple):
    """A day that is done, and how many are left."""

    day: date
    published: Published
    days_left: int


def orders_of_before(silver: DataFrame, rules: FraudRules, period: Period) -> DataFrame:
    """The orders of a period and their neighbours, with the reasons that they have (`before`).

    Args:
        silver: `lakehouse.SILVER`.
        rules: whose widest window says how far neighbours are.
        period: of event time.
    """
    return orders_near(silver, period, rules).select(*_ORDER, F.col("reasons").alias("before"))


def with_announced(orders: DataFrame, verdicts: DataFrame | None) -> DataFrame:
    """Orders (of `orders_of_before`) with the reasons, too, that are announced and not archived yet (`archive.verdicts`)."""
    if verdicts is None:
        return orders
    announced = verdicts.groupBy("order_id").agg(F.array_distinct(F.flatten(F.collect_list("reasons"))).alias("announced"))
    both = F.array_union("before", F.coalesce("announced", F.array().cast("array<string>")))
    return orders.join(announced, "order_id", "left").withColumn("before", both).drop("announced")


def what_is_new(orders: DataFrame, rules: FraudRules, period: Period) -> list[Further]:
    """What rules find on orders (of `orders_of_before`) of a period that these do not have yet, added up by day and reasons."""
    found = rescreen(orders, rules, _counted(period), struct_of(_GROUPS))
    alike = found.groupBy("day", "gained", "is_new_fraud").agg(F.sum("orders").alias("orders"), F.sum("amount").alias("amount"))
    return [
        Further(row["day"], frozenset(row["gained"].split(",")), row["is_new_fraud"], row["orders"], int(row["amount"]))
        for row in alike.collect()
    ]


def _counted(period: Period) -> Fold:
    def count(screened: pl.DataFrame) -> pl.DataFrame:
        further = _further(screened, period).with_columns(
            day=pl.col("event_ts").dt.date(),
            gained=pl.col("gained").list.join(","),
            is_new_fraud=pl.col("before").list.len() == 0,
        )
        return further.group_by("day", "gained", "is_new_fraud").agg(
            orders=pl.len().cast(pl.Int64), amount=pl.col("amount_numeric").cast(pl.Decimal(38, 0)).sum()
        )

    return count


def _further(screened: pl.DataFrame, period: Period) -> pl.DataFrame:
    """Those of screened orders whose reasons grow, with the reasons that are new (`gained`, sorted)."""
    gained = pl.col("reasons").list.set_difference("before").list.sort()
    of_period = screened.filter(period.selects(pl.col("event_ts"))).with_columns(gained=gained)
    return of_period.filter(pl.col("gained").list.len() > 0)


def applied(silver: DataFrame, rules: FraudRules, application: Application, sinks: Sinks) -> Iterator[Done]:
    """Add and announce what is new, on each day that an application has left.

    Args:
        silver: `lakehouse.SILVER`.
        rules: those of the application.
        application: the one that is being done.
        sinks: where to; whatever time they carry, verdicts have that of the application.

    Raises:
        PostgresError, KafkaError: through Spark, as text; the days that are left can be gone on with.
    """
    for left, day in zip(range(len(application.days_left) - 1, -1, -1), application.days_left, strict=True):
        period = _part(application, day)
        orders = orders_of_before(silver, rules, period)
        further = rescreen(orders, rules, partial(_further, period=period), struct_of(_FURTHER))
        published = _published(further, application, sinks)
        with record_of(sinks.dsn) as cursor:
            add_application_day(cursor, application, day, published.announced)
        yield Done(day, published, left)


def _part(application: Application, day: date) -> Period:
    """What of an application's orders lies on a UTC day."""
    first = datetime.combine(day, time(), UTC)
    ends = [end for end in (application.until, first + timedelta(days=1) if day < date.max else None) if end]
    return Period(max(first, application.since), min(ends, default=None))


def _published(further: DataFrame, application: Application, sinks: Sinks) -> Published:
    def send(table: pl.DataFrame) -> Published:
        places = {name: pl.lit(None, dtype) for name, dtype in ORDER_SCHEMA.items() if name in _POSITION}
        revised = revise(sinks.dsn, as_verdicts(table.with_columns(**places)), application.version, application.at)
        announcer = Announcer(sinks.kafka)
        # Of one that the stream has revised since, the version is another one.
        for (version,), verdicts in revised.verdicts.partition_by("rules_version", as_dict=True, include_key=False).items():
            announcer.verdicts(verdicts, str(version), application.number)
        announcer.wait()
        return Published(len(revised.verdicts), revised.left_out)

    return on_executors(further, send)
