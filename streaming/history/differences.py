"""What the stream should have said, from bronze, against what silver and quarantine say.

    bronze ─ contract ─ one order an id ─ the rules of its verdict ─> expected ─┐
    silver, quarantine ──────────────────────────────────────────> streamed ──┴─> differences

A difference is found here; `causes` says why it is there.
"""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from functools import reduce
from typing import Any, NamedTuple

from delta.tables import DeltaTable
from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F
from pyspark.sql.types import StructField, StructType

from conf.conditions import Declared
from conf.errors import LakehouseError
from conf.rules import FraudRules
from streaming.contract import CONTENT, FRAUD, NO_TIMESTAMP, TIME_OF_READING
from streaming.history.rescreening import Period, orders_of, rescreened
from streaming.lakehouse.tables import BRONZE_ORDERS, QUARANTINE_ORDERS, SILVER, SILVER_ORDERS, Table
from streaming.rules.proposals import Application
from streaming.rules.recorded import RulesInForce, rules_in_force
from streaming.screening.verdicts import KINDS

# What a message of `orders` is.
STANDING, DUPLICATE, CLASH, UNREADABLE = "order", "duplicate", "clash", "unreadable"

# What can be wrong, and what is said of it where no cause is found.
ORDER_MISSING = "order missing"
ORDER_DIFFERS = "order differs"
ORDER_DOUBLED = "order doubled"
ORDER_UNKNOWN = "order unknown"
NOT_THE_FIRST = "not the first"
STATUS_WRONG = "status wrong"
RULES_UNKNOWN = "rules unknown"
REASONS_MISSING = "reasons missing"
REASONS_SURPLUS = "reasons surplus"
DEAD_LETTER_MISSING = "dead letter missing"
DEAD_LETTER_SURPLUS = "dead letter surplus"
DEAD_LETTER_DOUBLED = "dead letter doubled"
UNCAUSED = {
    ORDER_MISSING: "silver has no verdict on it",
    ORDER_DIFFERS: "silver holds other content than every message with this id",
    ORDER_DOUBLED: "silver has more than one row of it",
    ORDER_UNKNOWN: "bronze has no message of it",
    NOT_THE_FIRST: "an order of other content was received before with this id, in the same partition",
    STATUS_WRONG: "an order is Fraud exactly when it has a reason",
    RULES_UNKNOWN: "no rules of this version were in force",
    REASONS_MISSING: "orders that were on time and screened by the same rules give them",
    REASONS_SURPLUS: "no rules that were in force then give them",
    DEAD_LETTER_MISSING: "quarantine has no dead letter of it",
    DEAD_LETTER_SURPLUS: "no message that breaks the contract lies there",
    DEAD_LETTER_DOUBLED: "quarantine has more than one row of it",
}
# What the name of a reason of another kind ends with where all kinds stand in one list.
SHADOW, SUPPRESSED = " (shadow)", " (suppressed)"

_HELD = ("status", *KINDS.values(), "rules_version", "screened_at", *CONTENT)
# Any of it may be null, since all of it is where silver holds nothing.
_TYPES = {field.name: field.dataType for field in SILVER.fields}
_HELD_TYPE = StructType([StructField(name, _TYPES[name]) for name in _HELD])
_POSITION = ("partition", "offset")


class Snapshot(NamedTuple):
    """The lakehouse at one moment.

    Attributes:
        bronze, silver, quarantine: the tables as of their versions; of one topic.
        versions: table name → version.
        history: which rules were in force when; at least one entry.
        looked_at: when that was.
        applications: rules that were applied to orders of before, as far as that is known.
    """

    bronze: DataFrame
    silver: DataFrame
    quarantine: DataFrame
    versions: dict[str, int]
    history: Sequence[RulesInForce]
    looked_at: datetime
    applications: Sequence[Application] = ()


def snapshot(spark: SparkSession, lakehouse: str, topic: str) -> Snapshot:
    """The lakehouse as it is now: later commits are not seen.

    Args:
        spark: a session with Delta.
        lakehouse: a path, or gs://bucket/folder.
        topic: full name of `orders`.

    Raises:
        LakehouseError: a table or the history of the rules is missing.
        RulesError: what was recorded cannot be read as rules.
    """
    # What silver and quarantine say was received before: bronze, looked at after them, has it as soon as it can.
    versions = {
        table.name: newest_version(spark, table, lakehouse) for table in (SILVER_ORDERS, QUARANTINE_ORDERS, BRONZE_ORDERS)
    }
    history = rules_in_force(spark, lakehouse)
    if not history:
        raise LakehouseError(
            f"{lakehouse} does not say which rules were in force: `finpro screen` notes that there when it starts."
        )

    def as_of(table: Table) -> DataFrame:
        return spark.read.format("delta").option("versionAsOf", versions[table.name]).load(table.path(lakehouse))

    of_topic = F.col("topic") == topic
    bronze, quarantine = as_of(BRONZE_ORDERS).where(of_topic), as_of(QUARANTINE_ORDERS).where(of_topic)
    return Snapshot(bronze, _with_all_columns(as_of(SILVER_ORDERS)), quarantine, versions, history, datetime.now(UTC))


def _with_all_columns(silver: DataFrame) -> DataFrame:
    """A lakehouse of an earlier version has them once the archive has started."""
    missing = {field.name: F.lit(None).cast(field.dataType) for field in SILVER.fields if field.name not in silver.columns}
    return silver.withColumns(missing)


def newest_version(spark: SparkSession, table: Table, lakehouse: str) -> int:
    """The version that a table has now.

    Raises:
        LakehouseError: there is no such table.
    """
    path = table.path(lakehouse)
    if not DeltaTable.isDeltaTable(spark, path):
        raise LakehouseError(f"{path} is no Delta table: `finpro archive` fills the lakehouse that FINPRO_LAKEHOUSE names.")
    return int(DeltaTable.forPath(spark, path).history(1).select("version").collect()[0]["version"])


def at(moment: Column, history: Sequence[RulesInForce], value: Callable[[FraudRules], Any]) -> Column:
    """A value of the rules that were in force at a moment; before the first change known, of the first rules."""
    first, *changes = history

    def since(earlier: Column, change: RulesInForce) -> Column:
        return F.when(moment >= F.lit(change.since), F.lit(value(change.rules))).otherwise(earlier)

    return reduce(since, changes, F.lit(value(first.rules)))


def widest_window(history: Sequence[RulesInForce]) -> timedelta:
    """The longest interval that any pattern could ever span."""
    return max(entry.rules.widest_window for entry in history)


# --- messages --------------------------------------------------------------------------------------------------------


def read_messages_of(lakehouse: Snapshot, since: datetime | None, dead_letters: DataFrame | None = None) -> DataFrame:
    """Messages read by the contract (`history.ORDERS`): all that can matter to orders of `since` or later.

    Nobody receives an order before it happens, but for the skew that the rules allow; a late one may come at any time.
    A message is read by the rules that were in force at its Kafka timestamp; where its dead letter says that a field is of
    another kind than was declared later, before the stream read it, by those.

    When the stream read a message is known where its dead letter says that this was too early, in quarantine or among the
    `dead_letters` that are not there yet (`partition`, `offset`, `reason`). All others are read now: later, so that what is
    ahead of its reading now was so then.
    """
    bronze, history = lakehouse.bronze, lakehouse.history
    if since:
        earliest = (
            since - 2 * widest_window(history) - max(entry.rules.lateness + entry.rules.max_future_skew for entry in history)
        )
        days, moment = F.col("received_date"), F.col("timestamp")
        is_undated = (days == F.lit(NO_TIMESTAMP.date())) & (moment == F.lit(NO_TIMESTAMP))
        bronze = bronze.where((Period(earliest, None).touches(days) & (moment >= F.lit(earliest))) | is_undated)
    ever_declared = {name: kind for entry in history for name, kind in entry.rules.fields.items()}
    ways: list[tuple[timedelta, Declared]] = []
    for entry in history:
        if _way(entry.rules) not in ways:
            ways.append(_way(entry.rules))
    way_then = at(F.col("timestamp"), history, lambda rules: ways.index(_way(rules)))
    parts = [
        orders_of(
            bronze if len(ways) == 1 else bronze.where(way_then == number), skew, lakehouse.looked_at, declared, ever_declared
        )
        for number, (skew, declared) in enumerate(ways)
    ]
    read, told = reduce(DataFrame.unionByName, parts), _told(lakehouse.quarantine)
    if any(entry.rules.fields != ever_declared for entry in history):
        read = _read_as_declared_later(read, bronze, lakehouse, max(skew for skew, _ in ways), ever_declared)
    if dead_letters is not None:
        told = told.unionByName(_told(dead_letters))
    return read if told.isEmpty() else _read_as_told(read, told, history)


def _read_as_declared_later(
    read: DataFrame, bronze: DataFrame, lakehouse: Snapshot, skew: timedelta, ever_declared: Declared
) -> DataFrame:
    """Messages (`history.ORDERS`), with a `reason` for those that quarantine has, and that break a declaration of any rules."""
    given = lakehouse.quarantine.select(*_POSITION).distinct()
    disputed = read.where(F.col("reason").isNull()).join(given, list(_POSITION), "left_semi").select(*_POSITION)
    again = orders_of(bronze.join(disputed, list(_POSITION), "left_semi"), skew, lakehouse.looked_at, ever_declared)
    refused = again.where(F.col("reason").isNotNull()).select(*_POSITION, F.col("reason").alias("refused"))
    both = read.join(refused, list(_POSITION), "left")
    return both.withColumn("reason", F.coalesce("reason", "refused")).select(*read.columns)


def _told(dead_letters: DataFrame) -> DataFrame:
    """Dead letters that say when their message was read: `partition`, `offset`, `told_at`, `told`."""
    told_at = F.regexp_extract("reason", TIME_OF_READING, 1).try_cast("timestamp")
    told = dead_letters.select(*_POSITION, told_at.alias("told_at"), F.col("reason").alias("told"))
    return told.where(F.col("told_at").isNotNull())


def _read_as_told(read: DataFrame, told: DataFrame, history: Sequence[RulesInForce]) -> DataFrame:
    """Messages (`history.ORDERS`), with a `reason` for those that were ahead of when they were read, as they are told to be."""
    first = told.groupBy(*_POSITION).agg(F.min_by("told", "told_at").alias("told"), F.min("told_at").alias("told_at"))
    newest_us = F.unix_micros(F.greatest("created_date", "event_ts"))
    was_ahead = newest_us > F.unix_micros("told_at") + at(F.col("received_at"), history, _skew_us)
    reason = F.coalesce("reason", F.when(was_ahead, F.col("told")))
    return read.join(first, list(_POSITION), "left").withColumn("reason", reason).select(*read.columns)


def _way(rules: FraudRules) -> tuple[timedelta, Declared]:
    """All by which rules decide how a message is read."""
    return rules.max_future_skew, rules.fields


def _skew_us(rules: FraudRules) -> int:
    return rules.max_future_skew // timedelta(microseconds=1)


def judged(read: DataFrame, silver: DataFrame, period: Period, history: Sequence[RulesInForce]) -> DataFrame:
    """What each message (`history.ORDERS`) has to become.

    Adds `role` (STANDING, DUPLICATE, CLASH or UNREADABLE); `reason` says why a message is a dead letter. To a standing
    order it adds `held` (what silver holds under its id: _HELD, or null), `is_held` (and that is this order), `held_rows`,
    `earlier` (the message with this id and other content that was received before it), and `tag`: the version of the rules
    to screen it by, which is that of its verdict, or else the one in force when it was received.
    """
    claims = read.where(F.col("reason").isNull()).drop("reason")
    rows = _of_period(silver, claims, period, history).withColumn("suppressed_reasons", _suppressed())
    row = F.struct(*_HELD).cast(_HELD_TYPE)
    held = rows.groupBy("order_id").agg(F.first(row).alias("held"), F.count("*").alias("held_rows"))
    content, received = F.struct(*CONTENT), ("received_at", *_POSITION, *CONTENT)
    is_held = F.coalesce(content == _fields("held", CONTENT), F.lit(False))
    by_id = Window.partitionBy("order_id")
    claims = (
        claims.join(held, "order_id", "left")
        .withColumn("is_held", is_held)
        # Of several orders with one id the one that silver holds stands, if it is among them; else the first received.
        .withColumn("stands", F.min(F.struct((~F.col("is_held")).alias("is_other"), *received)).over(by_id))
        .withColumn("came_first", F.min(F.struct(*received)).over(by_id))
    )
    is_standing = F.struct(*_POSITION) == _fields("stands", _POSITION)
    was_first = _fields("came_first", CONTENT) == _fields("stands", CONTENT)
    is_clash = content != _fields("stands", CONTENT)
    used = F.format_string("order_id %s is used by another order, received before", F.col("order_id"))
    claims = claims.withColumns(
        {
            "role": F.when(is_standing, STANDING).when(is_clash, CLASH).otherwise(DUPLICATE),
            "reason": F.when(is_clash, used),
            "earlier": F.when(is_standing & ~was_first, _fields("came_first", _POSITION)),
            "tag": _tag(history),
        }
    ).drop("stands", "came_first")
    unreadable = read.where(F.col("reason").isNotNull()).withColumn("role", F.lit(UNREADABLE))
    return claims.unionByName(unreadable, allowMissingColumns=True)


def _suppressed() -> Column:
    """The suppressed reasons of a row of silver: one from before there were any says nothing."""
    return F.coalesce("suppressed_reasons", F.array().cast("array<string>"))


def _fields(struct: str, names: Sequence[str]) -> Column:
    return F.struct(*(F.col(f"{struct}.{name}") for name in names))


def _of_period(silver: DataFrame, claims: DataFrame, period: Period, history: Sequence[RulesInForce]) -> DataFrame:
    """What silver holds of a period's days, and of other days under the ids that it does not hold in these."""
    if period == Period(None, None):
        return silver
    is_near = period.widened(2 * widest_window(history)).touches(F.col("event_date"))
    near = silver.where(is_near)
    elsewhere = claims.select("order_id").distinct().join(near, "order_id", "left_anti")
    if elsewhere.isEmpty():
        return near
    return near.unionByName(silver.where(~is_near).join(elsewhere, "order_id", "left_semi"))


def _tag(history: Sequence[RulesInForce]) -> Column:
    is_known = F.col("is_held") & F.col("held.rules_version").isin(_versions(history))
    return F.when(is_known, F.col("held.rules_version")).otherwise(version_at(F.col("received_at"), history))


def version_at(moment: Column, history: Sequence[RulesInForce]) -> Column:
    """Which rules were in force at a moment."""
    return at(moment, history, lambda rules: rules.version)


def _versions(history: Sequence[RulesInForce]) -> list[str]:
    return sorted({entry.rules.version for entry in history})


# --- verdicts --------------------------------------------------------------------------------------------------------


def expected(messages: DataFrame, period: Period, history: Sequence[RulesInForce]) -> DataFrame:
    """The standing orders of a period (of `judged`) with what the rules of their tag find (`history.FOUND`)."""
    orders = messages.where(F.col("role") == STANDING).drop("role", "reason")
    orders = orders.where(period.widened(widest_window(history)).holds(F.col("event_ts")))
    moment = F.unix_micros("event_ts")
    spans = orders.groupBy("tag").agg(F.min(moment).alias("first"), F.max(moment).alias("last")).collect()
    rules = {entry.rules.version: entry.rules for entry in history}
    window = widest_window(history) // timedelta(microseconds=1)
    parts = [
        rescreened(orders.where(moment.between(span["first"] - window, span["last"] + window)), rules[span["tag"]]).where(
            F.col("tag") == span["tag"]
        )
        for span in spans
    ]
    if not parts:
        parts = [rescreened(orders, history[-1].rules)]
    return reduce(DataFrame.unionByName, parts).where(period.holds(F.col("event_ts")))


def all_reasons(held: str = "") -> Column:
    """The reasons of all kinds as one list, ending with SHADOW or SUPPRESSED, of an order or of a struct of it (`held.`)."""
    return F.concat(
        F.col(f"{held}reasons"),
        _ending(F.col(f"{held}shadow_reasons"), SHADOW),
        _ending(F.col(f"{held}suppressed_reasons"), SUPPRESSED),
    )


def and_less(reasons: Column) -> Column:
    """Reasons (of `all_reasons`) and, as Fraud wins, what is less than they are: the same ones suppressed."""
    return F.concat(reasons, _ending(reasons, SUPPRESSED))


def _ending(reasons: Column, end: str) -> Column:
    return F.transform(reasons, lambda reason: F.concat(reason, F.lit(end)))


def compared(orders: DataFrame, history: Sequence[RulesInForce]) -> DataFrame:
    """Orders (of `expected`) with what is wrong about each.

    Adds `expected` and `streamed` (reasons of all kinds; the latter null where silver has no verdict), `missing`,
    `surplus`, and `wrong`: those of the kinds of difference above that it has, none in most.
    """
    nothing = F.array().cast("array<string>")
    streamed = F.when(F.col("is_held"), all_reasons("held."))
    orders = orders.withColumn("expected", all_reasons()).withColumn("streamed", streamed)
    orders = orders.withColumns(
        {
            "missing": F.coalesce(F.array_except("expected", and_less(F.col("streamed"))), nothing),
            "surplus": F.coalesce(F.array_except("streamed", and_less(F.col("expected"))), nothing),
        }
    )
    is_fraud, has_reasons = F.col("held.status") == FRAUD, F.size("held.reasons") > 0
    wrong = {
        ORDER_MISSING: F.col("held_rows").isNull(),
        ORDER_DIFFERS: F.col("held_rows").isNotNull() & ~F.col("is_held"),
        ORDER_DOUBLED: F.col("held_rows") > 1,
        NOT_THE_FIRST: F.col("earlier").isNotNull(),
        STATUS_WRONG: F.col("is_held") & (is_fraud != has_reasons),
        RULES_UNKNOWN: F.col("is_held") & ~F.col("held.rules_version").isin(_versions(history)),
        REASONS_MISSING: F.size("missing") > 0,
        REASONS_SURPLUS: F.size("surplus") > 0,
    }
    return orders.withColumn("wrong", F.array_compact(F.array(*(F.when(is_so, kind) for kind, is_so in wrong.items()))))


def unknown_orders(messages: DataFrame, silver: DataFrame, period: Period) -> DataFrame:
    """Rows of silver in a period of which bronze has no message."""
    known = messages.where(F.col("role") == STANDING).select("order_id")
    near = silver.where(period.touches(F.col("event_date")) & period.holds(F.col("event_ts")))
    return near.join(known, "order_id", "left_anti").withColumn("suppressed_reasons", _suppressed())


def dead_letters_compared(messages: DataFrame, quarantine: DataFrame, period: Period) -> DataFrame:
    """Dead letters that are missing, surplus or doubled: `partition`, `offset`, `received_at`, `order_id`, `reason`, `wrong`.

    They belong to the period in which they were received.
    """
    owed = messages.where(F.col("role").isin(CLASH, UNREADABLE)).where(period.holds(F.col("received_at")))
    owed = owed.select(*_POSITION, "order_id", F.col("received_at").alias("owed_at"), F.col("reason").alias("owed_for"))
    given = quarantine.where(period.touches(F.col("received_date")) & period.holds(F.col("received_at")))
    given = given.groupBy(*_POSITION).agg(
        F.first("received_at").alias("given_at"), F.first("reason").alias("given_for"), F.count("*").alias("rows")
    )
    wrong = (
        F.when(F.col("rows").isNull(), DEAD_LETTER_MISSING)
        .when(F.col("owed_at").isNull(), DEAD_LETTER_SURPLUS)
        .when(F.col("rows") > 1, DEAD_LETTER_DOUBLED)
    )
    return (
        owed.join(given, list(_POSITION), "full")
        .withColumn("wrong", wrong)
        .where(F.col("wrong").isNotNull())
        .select(
            *_POSITION,
            F.coalesce("owed_at", "given_at").alias("received_at"),
            "order_id",
            F.coalesce("owed_for", "given_for").alias("reason"),
            "wrong",
        )
    )
