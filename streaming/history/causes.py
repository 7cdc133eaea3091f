"""Why a verdict differs from what it should be. Each cause is computed, from bronze and the rules' history; none is assumed.

What an order's stream was certain to see: the orders near it that were on time and were screened by the same rules. The
reasons that these alone give have no excuse to be missing. Any other reason has a pattern with an order among its members
that came late, or was screened by other rules, or is not screened yet: that order is named. Where rules were applied to an
order of before, the stream had screened it by others; and what they give it among orders of before has no excuse either.
"""

from collections.abc import Sequence
from datetime import datetime, timedelta
from functools import reduce
from operator import or_
from typing import NamedTuple

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from conf.rules import FraudRules
from streaming.contract import NO_TIMESTAMP
from streaming.history.differences import (
    DEAD_LETTER_MISSING,
    DUPLICATE,
    NOT_THE_FIRST,
    ORDER_MISSING,
    REASONS_MISSING,
    REASONS_SURPLUS,
    SHADOW,
    STANDING,
    SUPPRESSED,
    all_reasons,
    and_less,
    at,
    version_at,
    widest_window,
)
from streaming.history.rescreening import rescreened
from streaming.rules.patterns import EVIDENCE_ORDERS
from streaming.rules.proposals import Application
from streaming.rules.recorded import RulesInForce

LATE = "late"
APPLIED = "applied"
RULES_CHANGED = "rules changed"
NOT_SCREENED = "not screened yet"
NOT_ARCHIVED = "not archived yet"
STORED_FIRST = "stored first"
FORGOTTEN = "forgotten"
UNEXPLAINED = "unexplained"

_KEY = ("partition", "offset", "wrong")
_CAUSE = ("cause", "why")


class Reached(NamedTuple):
    """How far the streams had come when the lakehouse was looked at; None where that cannot be known.

    Attributes:
        screened: partition of `orders` → the first offset that was not screened.
        verdicts: not yet in silver, though announced: `order_id` and `announced` (reasons of all kinds).
        dead_letters: not yet in quarantine, though announced: `partition` and `offset` of their messages, and `reason`.
    """

    screened: dict[int, int] | None = None
    verdicts: DataFrame | None = None
    dead_letters: DataFrame | None = None


def causes(
    orders: DataFrame,
    dead_letters: DataFrame,
    messages: DataFrame,
    history: Sequence[RulesInForce],
    reached: Reached,
    erased: DataFrame,
    applications: Sequence[Application] = (),
) -> DataFrame:
    """What explains differences: `partition`, `offset`, `wrong`, `cause` and `why`; nothing for one that is unexplained.

    Args:
        orders: of `differences.compared`, those that have a difference.
        dead_letters: of `differences.dead_letters_compared`.
        messages: of `differences.judged`.
        history: which rules were in force when.
        reached: how far the streams had come.
        erased: `partition` and `offset` of the messages of people who are forgotten, which lack the fields that rules declared.
        applications: rules that were applied to orders of before.
    """
    kinds = {row["kind"] for row in orders.select(F.explode("wrong").alias("kind")).distinct().collect()}
    found = [
        _of_kind(orders, NOT_THE_FIRST).transform(_stored_first),
        _not_screened(_of_kind(orders, ORDER_MISSING), ORDER_MISSING, reached.screened),
        _not_screened(dead_letters.where(F.col("wrong") == DEAD_LETTER_MISSING), DEAD_LETTER_MISSING, reached.screened),
    ]
    if REASONS_MISSING in kinds:
        found.append(_pattern_causes(_of_kind(orders, REASONS_MISSING), messages, history, reached.screened, applications))
    if REASONS_SURPLUS in kinds:
        found.append(_other_rules(_of_kind(orders, REASONS_SURPLUS), messages, history))
    looking = {
        name for entry in history for name, fields in entry.rules.looked_at.items() if fields & entry.rules.fields.keys()
    }
    if looking:
        found += [
            _forgotten(_of_kind(orders, kind), kind, sorted(looking), messages, history, erased)
            for kind in (REASONS_MISSING, REASONS_SURPLUS)
            if kind in kinds
        ]
    if reached.verdicts is not None:
        found += [_announced(_of_kind(orders, kind), kind, reached.verdicts) for kind in (ORDER_MISSING, REASONS_MISSING)]
    if reached.dead_letters is not None:
        missing = dead_letters.where(F.col("wrong") == DEAD_LETTER_MISSING)
        waiting = missing.join(reached.dead_letters, ["partition", "offset"], "left_semi")
        found.append(
            waiting.transform(_caused, DEAD_LETTER_MISSING, NOT_ARCHIVED, F.lit("it is on Kafka, beyond what is archived"))
        )
    one = reduce(DataFrame.unionByName, found).groupBy(*_KEY).agg(F.min(F.struct(*_CAUSE)).alias("one"))
    return one.select(*_KEY, "one.*")


def _of_kind(orders: DataFrame, kind: str) -> DataFrame:
    return orders.where(F.array_contains("wrong", kind))


def _caused(rows: DataFrame, wrong: str, cause: str, why: Column) -> DataFrame:
    return rows.select("partition", "offset", F.lit(wrong).alias("wrong"), F.lit(cause).alias("cause"), why.alias("why"))


# --- what has not come so far ----------------------------------------------------------------------------------------


def _is_unscreened(screened: dict[int, int] | None) -> Column:
    """Whether a message lies beyond what was screened."""
    if screened is None:
        return F.lit(False)
    end = reduce(lambda rest, one: F.when(F.col("partition") == one[0], one[1]).otherwise(rest), screened.items(), F.lit(0))
    return F.col("offset") >= end


def _not_screened(rows: DataFrame, wrong: str, screened: dict[int, int] | None) -> DataFrame:
    why = F.format_string("offset %d of partition %d has not been screened yet", F.col("offset"), F.col("partition"))
    return _caused(rows.where(_is_unscreened(screened)), wrong, NOT_SCREENED, why)


def _announced(orders: DataFrame, wrong: str, verdicts: DataFrame) -> DataFrame:
    """Differences that go when what is announced has been archived."""
    rows = orders.join(verdicts, "order_id").where(F.size(F.array_except("missing", and_less(F.col("announced")))) == 0)
    return _caused(rows, wrong, NOT_ARCHIVED, F.lit("the verdict is on Kafka, beyond what is archived"))


def _stored_first(orders: DataFrame) -> DataFrame:
    why = F.format_string(
        "partition %d offset %d was received before, with this id and other content: of two partitions' orders, and of two"
        " whose timestamps are not in the order of their offsets, the one that Postgres stores first stands",
        F.col("earlier.partition"),
        F.col("earlier.offset"),
    )
    is_behind = (F.col("earlier.partition") == F.col("partition")) & (F.col("earlier.offset") < F.col("offset"))
    return _caused(orders.where(~is_behind), NOT_THE_FIRST, STORED_FIRST, why)


# --- what is forgotten -----------------------------------------------------------------------------------------------


def _forgotten(
    orders: DataFrame,
    wrong: str,
    looking: Sequence[str],
    messages: DataFrame,
    history: Sequence[RulesInForce],
    erased: DataFrame,
) -> DataFrame:
    """Orders whose every missing or surplus reason is of a rule that looks at declared fields, which an order near has lost.

    Args:
        orders: that have such a difference.
        wrong: which.
        looking: the rules that look at declared fields.
        messages: of `differences.judged`.
        history: which rules were in force when.
        erased: of `causes`.
    """
    reasons = F.col("missing" if wrong == REASONS_MISSING else "surplus")
    ours = F.array(*(F.lit(name + kind) for name in looking for kind in ("", SHADOW, SUPPRESSED)))
    theirs = messages.where(F.col("role") == STANDING).join(erased, ["partition", "offset"], "left_semi")
    theirs = theirs.select(F.col("product_id").alias("of_product"), F.unix_micros("event_ts").alias("moment"))
    distance = 2 * widest_window(history) // timedelta(microseconds=1)
    is_near = F.abs(F.unix_micros("event_ts") - F.col("moment")) <= distance
    if not _any_across(history):
        is_near &= F.col("of_product") == F.col("product_id")
    rows = orders.where(F.size(F.array_except(reasons, ours)) == 0).join(theirs, is_near, "left_semi")
    why = F.lit("it, or an order near it, is of somebody who is forgotten: what the rule looked at is erased")
    return _caused(rows, wrong, FORGOTTEN, why)


# --- missing reasons -------------------------------------------------------------------------------------------------


def _pattern_causes(
    orders: DataFrame,
    messages: DataFrame,
    history: Sequence[RulesInForce],
    screened: dict[int, int] | None,
    applications: Sequence[Application],
) -> DataFrame:
    """Orders whose every missing reason needs an order that the stream was not certain to see beside them."""
    near = with_delays(messages, history).transform(_near, orders, history)
    near = near.withColumn("is_unscreened", _is_unscreened(screened) & ~F.col("is_held"))
    near = near.transform(_with_rules_of_the_stream, history, applications).persist()
    certain = _seen_for_certain(near, orders, history, applications)
    reasons = _members(orders).join(certain, ["order_id", "reason"], "left")
    others = near.select(
        F.col("order_id").alias("member"), "behind", "allowed", "is_late", "is_unscreened", "streamed_by", "applied"
    )
    is_late, is_of_others = F.col("is_late") & F.col("is_pattern"), F.col("streamed_by") != F.col("tag")
    cause = F.coalesce(
        F.max(F.when(F.col("is_unscreened"), _unscreened_member())),
        F.max_by(_late_member(), F.when(is_late, F.col("behind"))),
        F.max(F.when(is_of_others & F.col("applied").isNotNull(), _applied_member())),
        F.max(F.when(is_of_others, _other_member())),
        F.max(F.when(F.col("is_cut"), _unnamed_member(near))),
    )
    found = F.when(F.bool_or("is_certain"), None).otherwise(cause)
    by_reason = reasons.join(others, "member").groupBy("partition", "offset", "reason").agg(found.alias("found"))
    by_order = by_reason.groupBy("partition", "offset").agg(
        F.count_if(F.col("found").isNull()).alias("unexplained"),
        F.min("found.cause").alias("cause"),
        F.concat_ws("; ", F.sort_array(F.collect_set("found.why"))).alias("why"),
    )
    return by_order.where(F.col("unexplained") == 0).select(
        "partition", "offset", F.lit(REASONS_MISSING).alias("wrong"), *_CAUSE
    )


def with_delays(messages: DataFrame, history: Sequence[RulesInForce]) -> DataFrame:
    """Standing orders (of `differences.judged`) with how late they came.

    Adds `behind` and `allowed` (microseconds): how far an order's event time lies behind the newest one received until
    then, in its millisecond at the latest, and how far it may; and `is_late`. What has no Kafka timestamp was received
    before it was screened, and else, for all that is known, when it happened.
    """
    orders = messages.where(F.col("role").isin(STANDING, DUPLICATE))
    screened_at = F.when(F.col("is_held"), F.col("held.screened_at"))
    known = F.when(F.col("received_at") == F.lit(NO_TIMESTAMP), F.coalesce(screened_at, "event_ts")).otherwise(
        F.col("received_at")
    )
    orders = orders.withColumn("received_at", known).withColumn("minute", F.date_trunc("minute", "received_at"))
    # A window over all orders would be one task: so within a minute, and over the minutes, which are few.
    until_now = Window.partitionBy("minute").orderBy("received_at").rangeBetween(Window.unboundedPreceding, Window.currentRow)
    minutes_before = Window.orderBy("minute").rowsBetween(Window.unboundedPreceding, -1)
    minutes = orders.groupBy("minute").agg(F.max("event_ts").alias("newest_of_minute"))
    minutes = minutes.select("minute", F.max("newest_of_minute").over(minutes_before).alias("newest_before"))
    newest = F.greatest(F.max("event_ts").over(until_now), F.col("newest_before"))
    return (
        orders.join(minutes, "minute")
        .withColumn("behind", F.unix_micros(newest) - F.unix_micros("event_ts"))
        .withColumn("allowed", at(F.col("received_at"), history, _lateness_us))
        .withColumn("is_late", F.col("behind") > F.col("allowed"))
        .where(F.col("role") == STANDING)
        .drop("minute", "newest_before", "role", "reason")
    )


def _lateness_us(rules: FraudRules) -> int:
    return rules.lateness // timedelta(microseconds=1)


def _any_across(history: Sequence[RulesInForce]) -> bool:
    """Whether some rules ever had patterns across products."""
    return any(entry.rules.across_products for entry in history)


def _near(orders: DataFrame, differing: DataFrame, history: Sequence[RulesInForce]) -> DataFrame:
    """Those of the orders that are near differing ones: all that share a pattern or its evidence with them, and some more."""
    width = max(2 * widest_window(history), timedelta(seconds=1)) // timedelta(microseconds=1)
    place = ["cell"] if _any_across(history) else ["product_id", "cell"]
    moment = F.unix_micros("event_ts")
    cell = F.floor((moment - F.pmod(moment, F.lit(width))) / width)
    around = F.explode(F.array(cell - 1, cell, cell + 1)).alias("cell")
    cells = differing.select("product_id", around).select(*place).distinct()
    return orders.withColumn("cell", cell).join(cells, place, "left_semi").drop("cell")


def _members(orders: DataFrame) -> DataFrame:
    """Each missing reason of each order with each `member` of its evidence.

    `is_pattern` where there is more than one, `is_cut` where there may be more than are named.
    """
    evidence = F.from_json("evidence", "map<string, struct<order_ids: array<string>>>")
    ids = evidence[F.regexp_replace("reason", r" \(.*", "")]["order_ids"]
    return (
        orders.withColumn("reason", F.explode("missing"))
        .withColumn("members", ids)
        .select(
            *("partition", "offset", "order_id", "tag", "reason", "members"),
            (F.size("members") > 1).alias("is_pattern"),
            (F.size("members") >= EVIDENCE_ORDERS).alias("is_cut"),
        )
        .withColumn("member", F.explode("members"))
        .drop("members")
    )


def _with_rules_of_the_stream(
    orders: DataFrame, history: Sequence[RulesInForce], applications: Sequence[Application]
) -> DataFrame:
    """Adds `applied` (which rules were, and by whom, in words; null where none were) and `streamed_by`, a version.

    Of an order whose verdict is an application's, that is the version of its receipt: by which it had its former verdict is
    not known more closely.
    """
    words = [
        F.when(_is_of(one), F.lit(f"version {one.version} was applied to it by {one.by}: {one.why}")) for one in applications
    ]
    orders = orders.withColumn("applied", F.coalesce(F.lit(None).cast("string"), *words))
    then = version_at(F.col("received_at"), history)
    return orders.withColumn("streamed_by", F.when(F.col("applied").isNotNull(), then).otherwise(F.col("tag")))


def _is_of(application: Application) -> Column:
    """Whether an order's verdict is that of an application: the time of one that the stream gave since is another."""
    is_its = (F.col("held.rules_version") == application.version) & (F.col("held.screened_at") == F.lit(application.at))
    return F.col("is_held") & is_its


def _seen_for_certain(
    near: DataFrame, orders: DataFrame, history: Sequence[RulesInForce], applications: Sequence[Application]
) -> DataFrame:
    """`order_id`, `reason`, `is_certain`: the reasons that orders give one another which were certain to be seen together.

    By the stream: those that were on time and that it screened by the same rules. By an application: those that were received
    before it, and that the stream had screened by other rules.
    """
    rules = {entry.rules.version: entry.rules for entry in history}
    certain = near.where(~F.col("is_late") & ~F.col("is_unscreened"))
    tags = [row["tag"] for row in orders.select("tag").distinct().collect()] or [history[-1].rules.version]
    found = [_found(certain.where(F.col("streamed_by") == tag), rules[tag]) for tag in tags]
    for one in applications:
        if one.version in tags:
            before = near.where((F.col("streamed_by") != one.version) & (F.col("received_at") < F.lit(one.at)))
            of_it = orders.where(_is_of(one)).select("order_id")
            found.append(_found(before, rules[one.version]).join(of_it, "order_id", "left_semi"))
    reason = F.explode("found").alias("reason")
    return reduce(DataFrame.unionByName, found).select("order_id", reason, F.lit(True).alias("is_certain"))


def _found(orders: DataFrame, rules: FraudRules) -> DataFrame:
    return rescreened(orders, rules).select("order_id", all_reasons().alias("found"))


def _cause_of_member(cause: str, text: str, *columns: Column | str) -> Column:
    return F.struct(F.lit(cause).alias("cause"), F.format_string(text, "reason", "member", *columns).alias("why"))


def _unscreened_member() -> Column:
    return _cause_of_member(NOT_SCREENED, "%s needs order %s, which has not been screened yet")


def _late_member() -> Column:
    text = "%s needs order %s, which came %.1f s behind the newest event time received until then (%.1f s are on time)"
    return _cause_of_member(LATE, text, F.col("behind") / 1_000_000, F.col("allowed") / 1_000_000)


def _applied_member() -> Column:
    text = "%s needs order %s, which the stream screened by rules version %s; later %s"
    return _cause_of_member(APPLIED, text, "streamed_by", "applied")


def _other_member() -> Column:
    text = "%s needs order %s, which was screened by rules version %s, and this one by %s"
    return _cause_of_member(RULES_CHANGED, text, "streamed_by", "tag")


def _unnamed_member(near: DataFrame) -> Column:
    """Why a reason is missing that orders give which are beyond those that evidence names: one of these has to be uncertain."""
    tags, kinds = F.count_distinct("streamed_by") > 1, ("is_unscreened", "is_late")
    unscreened, late, others = near.agg(*(F.bool_or(kind) for kind in kinds), tags).collect()[0]
    cause = NOT_SCREENED if unscreened else LATE if late else RULES_CHANGED if others else UNEXPLAINED
    text = f"%s needs more orders than the {EVIDENCE_ORDERS} that are named"
    return F.struct(F.lit(cause).alias("cause"), F.format_string(text, "reason").alias("why"))


# --- surplus reasons -------------------------------------------------------------------------------------------------


def _other_rules(orders: DataFrame, messages: DataFrame, history: Sequence[RulesInForce]) -> DataFrame:
    """Orders whose every surplus reason is given by other rules, in force between their receipt and their verdict."""
    standing = messages.where(F.col("role") == STANDING).drop("role", "reason")
    near = standing.transform(_near, orders, history).persist()
    rules = {entry.rules.version: entry.rules for entry in history}
    given = [
        _found(near, rules[version])
        .join(orders.where(_was_in_force(version, history)).select("order_id"), "order_id", "left_semi")
        .withColumn("version", F.lit(version))
        for version in rules
    ]
    by_order = (
        reduce(DataFrame.unionByName, given)
        .groupBy("order_id")
        .agg(F.flatten(F.collect_list("found")).alias("given"), F.sort_array(F.collect_set("version")).alias("versions"))
    )
    rows = orders.join(by_order, "order_id").where(F.size(F.array_except("surplus", "given")) == 0)
    why = F.format_string(
        "given by rules that were in force between its receipt and its verdict: %s", F.concat_ws(", ", "versions")
    )
    return _caused(rows, REASONS_SURPLUS, RULES_CHANGED, why)


def _was_in_force(version: str, history: Sequence[RulesInForce]) -> Column:
    """Whether a version that is not an order's own was in force between its receipt and its verdict."""
    ends: list[datetime | None] = [entry.since for entry in history[1:]] + [None]
    periods = [
        (F.lit(entry is history[0]) | (F.lit(entry.since) <= F.col("held.screened_at")))
        & (F.lit(True) if end is None else F.lit(end) > F.col("received_at"))
        for entry, end in zip(history, ends, strict=True)
        if entry.rules.version == version
    ]
    return reduce(or_, periods) & (F.col("tag") != version)
