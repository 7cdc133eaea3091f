"""Candidate rules over history: what they would have said, against the verdicts in force, labels, and what turned out.

The workers count orders that are alike (one day, the same reasons before and after, the same label and outcome); everything
shown is worked out from these counts, so that nothing that grows with the history leaves the workers.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, timedelta
from typing import Any, NamedTuple

import polars as pl
from pyspark.sql import DataFrame, Row
from pyspark.sql import functions as F

from conf.conditions import ORDER_FIELDS
from conf.rules import FraudRules
from streaming.contract import LABEL_HEADER
from streaming.history.rescreening import Fold, Period, rescreen, struct_of
from streaming.screening.verdicts import decode_evidence

# What makes orders alike. Reasons and labels are sorted text, joined by commas: those in force, and the candidate's.
ALIKE = ("day", "rules_version", "before", "shadow_before", "after", "shadow_after", "label", "outcome")
_SHOWN = ("event_ts", "order_id", "user_id", "product_id", "quantity", "amount_numeric", "country")
_EXAMPLE = (*_SHOWN, "evidence")
GROUPS = """
    day date, rules_version string, before string, shadow_before string, after string, shadow_after string, label string,
    outcome string, orders bigint, amount decimal(38,0), examples array<struct<
        event_ts: timestamp, order_id: string, user_id: bigint, product_id: bigint, quantity: bigint, amount_numeric: bigint,
        country: string, evidence: string>>
"""
CONFIRMED = "fraud"  # an outcome
BECOMES, STOPS, STAYS, SHADOW = "becomes Fraud", "stops being Fraud", "stays Fraud", "in shadow"

_LONGEST_SKEW = timedelta(days=1)  # that rules can allow: so early before its event time an order may have been received


class Alike(NamedTuple):
    """Orders that are alike: how many, and what they are worth in rupiah; `outcome` is fraud, genuine, or empty."""

    day: date
    rules_version: str
    before: frozenset[str]
    shadow_before: frozenset[str]
    after: frozenset[str]
    shadow_after: frozenset[str]
    label: frozenset[str]
    orders: int
    amount: int
    outcome: str = ""


@dataclass(frozen=True)
class Hits:
    """Some orders: how many, what they are worth in rupiah, and how many of them carry the label in question.

    Of `reviewed` it is known what turned out; of these `confirmed` turned out to be frauds. `wrongly_held` is what the others
    of them are worth, in rupiah.
    """

    orders: int
    amount: int
    labelled: int
    reviewed: int = 0
    confirmed: int = 0
    wrongly_held: int = 0

    @property
    def precision_of_reviewed(self) -> float | None:
        """The share of frauds among those of which it is known; None where it is known of none."""
        return self.confirmed / self.reviewed if self.reviewed else None


@dataclass(frozen=True)
class Effect:
    """What one rule, or all enforced rules together, said and would say.

    Attributes:
        before: the orders it hits in force.
        after: the orders the candidate hits.
        becomes: those that become Fraud, with this reason.
        stops: those that stop being Fraud, and had this reason.
        labels: how many orders carry its label, hit or not; None where no order of the period carries any label.
    """

    before: Hits
    after: Hits
    becomes: Hits
    stops: Hits
    labels: int | None

    def precision(self, hits: Hits) -> float | None:
        """The share of these hits that carry the label; None where there is nothing to tell it by."""
        return hits.labelled / hits.orders if self.labels is not None and hits.orders else None

    def recall(self, hits: Hits) -> float | None:
        """The share of the labelled orders that are among these hits; None where there is nothing to tell it by."""
        return hits.labelled / self.labels if self.labels else None


@dataclass(frozen=True)
class Example:
    """An order and one reason for it.

    Attributes:
        rule: the reason.
        kind: BECOMES, STOPS, STAYS or SHADOW.
        order: event_ts, order_id, user_id, product_id, quantity, amount_numeric, country.
        evidence: the candidate's, as JSON; None for a reason that it does not give.
    """

    rule: str
    kind: str
    order: Mapping[str, Any]
    evidence: str | None


@dataclass(frozen=True)
class Backtest:
    """The answer.

    Attributes:
        orders: how many were screened.
        changed: how many of them get other reasons or shadow reasons than they have.
        whole: Fraud or not, by all enforced rules.
        rules: each rule by itself, enforced or in shadow.
        reviewed: of how many orders it is known what turned out.
        versions: version of the rules in force → orders whose verdict it last added to.
        days: a row a local day: `day`, `before` and `after` (frauds), and `<rule>_before`, `<rule>_after` (hits).
        examples: the earliest few of each rule and kind.
    """

    orders: int
    changed: int
    whole: Effect
    rules: dict[str, Effect]
    reviewed: int
    versions: dict[str, int]
    days: list[dict[str, Any]]
    examples: list[Example]


def orders_near(silver: DataFrame, period: Period, rules: FraudRules) -> DataFrame:
    """The rows of silver (`lakehouse.SILVER`) of a period, and of the neighbours that rules may see beside them."""
    around = period.widened(rules.widest_window)
    orders = silver.where(around.touches(F.col("event_date")) & around.holds(F.col("event_ts")))
    # A lakehouse of an earlier version has declared fields once the archive has started.
    return orders if "attributes" in orders.columns else orders.withColumn("attributes", F.lit(None).cast("string"))


def orders_in_force(
    silver: DataFrame, labels: DataFrame | None, outcomes: DataFrame | None, period: Period, rules: FraudRules
) -> DataFrame:
    """The orders of a period and their neighbours, with the verdict in force, their label, and what turned out.

    An order that carries a label, and about which nothing was stated, turned out to be a fraud: it was made as one.

    Args:
        silver: `lakehouse.SILVER`.
        labels: as of `labels_of`, or None where there are none.
        outcomes: `order_id` and `outcome`, one row an order, or None where nothing was ever stated.
        period: of event time.
        rules: the candidate, whose widest window says how far neighbours are.
    """
    looked_at = set[str]().union(*rules.looked_at.values())
    orders = orders_near(silver, period, rules).select(
        *_SHOWN,
        *sorted(looked_at & (ORDER_FIELDS.keys() - set(_SHOWN))),
        *(["attributes"] if looked_at & rules.fields.keys() else []),
        F.array_join(F.array_sort("reasons"), ",").alias("before"),
        F.array_join(F.array_sort("shadow_reasons"), ",").alias("shadow_before"),
        "rules_version",
    )
    orders = orders.withColumn("label", F.lit("")) if labels is None else orders.join(labels, "order_id", "left")
    orders = orders.withColumn("outcome", F.lit(None)) if outcomes is None else orders.join(outcomes, "order_id", "left")
    by_label = F.when(F.col("label") != "", F.lit(CONFIRMED))
    return orders.withColumn("outcome", F.coalesce("outcome", by_label, F.lit(""))).fillna("", "label")


def labels_of(bronze: DataFrame, period: Period) -> DataFrame:
    """`order_id` and `label` of the messages (`lakehouse.BRONZE`) that carry a label, enough for the orders of a period."""
    received = Period(period.since and period.since - _LONGEST_SKEW, None)
    carried = F.filter("headers", lambda header: header["key"] == LABEL_HEADER)
    return (
        bronze.where(received.touches(F.col("received_date")) & (F.size(carried) > 0))
        .select(
            F.get_json_object(F.col("value").cast("string"), "$.order_id").alias("order_id"),
            carried[0]["value"].cast("string").alias("label"),
            "timestamp",
        )
        .groupBy("order_id")
        .agg(F.min_by("label", "timestamp").alias("label"))
    )


def groups_of(orders: DataFrame, rules: FraudRules, period: Period, examples: int) -> DataFrame:
    """Screen orders (`orders_in_force`) by the candidate, and count those of the period that are alike (GROUPS).

    Every group brings the earliest `examples` of its orders that have a reason, before or after.
    """
    return rescreen(orders, rules, _counting(rules.time_zone, period, examples), struct_of(GROUPS))


def _counting(time_zone: str, period: Period, examples: int) -> Fold:
    day = pl.col("event_ts").dt.convert_time_zone(time_zone).dt.date()
    is_asked_for = period.selects(pl.col("event_ts"))
    has_reason = pl.concat_str("before", "after", "shadow_after") != ""

    def count(screened: pl.DataFrame) -> pl.DataFrame:
        orders = screened.filter(is_asked_for).with_columns(
            day=day, after=pl.col("reasons").list.join(","), shadow_after=pl.col("shadow_reasons").list.join(",")
        )
        counted = orders.group_by(ALIKE).agg(
            orders=pl.len().cast(pl.Int64), amount=pl.col("amount_numeric").cast(pl.Decimal(38, 0)).sum()
        )
        earliest = orders.filter(has_reason).sort("event_ts", "order_id").group_by(ALIKE, maintain_order=True)
        return counted.join(earliest.agg(examples=pl.struct(_EXAMPLE).head(examples)), on=ALIKE, how="left")

    return count


def backtest(groups: DataFrame, rules: FraudRules, examples: int) -> Backtest:
    """Bring the counts together, of GROUPS to numbers.

    Args:
        groups: of `groups_of`.
        rules: the candidate.
        examples: the most shown of each rule and kind.
    """
    earliest = F.array_sort(F.flatten(F.collect_list("examples")))  # by its first fields: event_ts, order_id
    rows = (
        groups.groupBy(*ALIKE)
        .agg(F.sum("orders").alias("orders"), F.sum("amount").alias("amount"), F.slice(earliest, 1, examples).alias("examples"))
        .collect()
    )
    alike = [_alike(row) for row in rows]
    shown = _examples(zip(alike, [row["examples"] for row in rows], strict=True), examples)
    return figures(alike, rules.evaluated, shown)


def _alike(row: Row) -> Alike:
    reasons = {name: _set(row[name]) for name in ("before", "shadow_before", "after", "shadow_after", "label")}
    amount, outcome = int(row["amount"]), row["outcome"]
    return Alike(row["day"], row["rules_version"], **reasons, orders=row["orders"], amount=amount, outcome=outcome)


def _set(joined: str) -> frozenset[str]:
    return frozenset(filter(None, joined.split(",")))


def _examples(orders_of: Iterable[tuple[Alike, Sequence[Row]]], count: int) -> list[Example]:
    """The earliest `count` orders of each rule and kind, by rule and kind."""
    found: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for alike, orders in orders_of:
        for rule_and_kind in _shown_for(alike):
            found[rule_and_kind] += orders
    return [
        _example(rule, kind, order.asDict())
        for (rule, kind), orders in sorted(found.items())
        for order in sorted(orders)[:count]
    ]


def _shown_for(alike: Alike) -> list[tuple[str, str]]:
    """The rules, and the kinds, that orders which are alike are examples of."""
    kind = BECOMES if _becomes_fraud(alike) else STOPS if _stops_being_fraud(alike) else STAYS
    return [(rule, kind) for rule in alike.after or alike.before] + [(rule, SHADOW) for rule in alike.shadow_after]


def _example(rule: str, kind: str, order: dict[str, Any]) -> Example:
    shown = {name: order[name] for name in _SHOWN}
    shown["event_ts"] = order["event_ts"].astimezone(UTC)  # Spark gives local time without saying so
    return Example(rule, kind, shown, _evidence(order["evidence"], rule))


def _evidence(evidence: str | None, rule: str) -> str | None:
    """The part of evidence (JSON, an object by reason) that is for one rule."""
    part = decode_evidence(evidence).get(rule) if evidence else None
    return bytes(part).decode() if part is not None else None


def figures(alike: Sequence[Alike], names: Iterable[str], examples: Sequence[Example] = ()) -> Backtest:
    """All numbers, from the counts of orders that are alike: of the rules of these names, and of others in force."""
    rules = sorted({*names, *(name for each in alike for name in each.before | each.shadow_before)})
    has_labels = any(each.label for each in alike)
    versions: Counter[str] = Counter()
    for each in alike:
        versions[each.rules_version] += each.orders
    return Backtest(
        orders=sum(each.orders for each in alike),
        changed=sum(each.orders for each in alike if _reasons_differ(each)),
        whole=_whole(alike, has_labels=has_labels),
        rules={rule: _effect(alike, rule, has_labels=has_labels) for rule in rules},
        reviewed=sum(each.orders for each in alike if each.outcome),
        versions=dict(sorted(versions.items())),
        days=_days(alike, rules),
        examples=list(examples),
    )


def _reasons_differ(each: Alike) -> bool:
    return (each.before, each.shadow_before) != (each.after, each.shadow_after)


def _becomes_fraud(each: Alike) -> bool:
    return bool(each.after) and not each.before


def _stops_being_fraud(each: Alike) -> bool:
    return bool(each.before) and not each.after


def _whole(alike: Sequence[Alike], *, has_labels: bool) -> Effect:
    def hits(concerned: Callable[[Alike], bool]) -> Hits:
        return _hits(alike, concerned, lambda each: bool(each.label))

    return Effect(
        before=hits(lambda each: bool(each.before)),
        after=hits(lambda each: bool(each.after)),
        becomes=hits(_becomes_fraud),
        stops=hits(_stops_being_fraud),
        labels=hits(lambda each: True).labelled if has_labels else None,
    )


def _effect(alike: Sequence[Alike], rule: str, *, has_labels: bool) -> Effect:
    def hits(concerned: Callable[[Alike], bool]) -> Hits:
        return _hits(alike, concerned, lambda each: rule in each.label)

    return Effect(
        before=hits(lambda each: rule in each.before | each.shadow_before),
        after=hits(lambda each: rule in each.after | each.shadow_after),
        becomes=hits(lambda each: _becomes_fraud(each) and rule in each.after),
        stops=hits(lambda each: _stops_being_fraud(each) and rule in each.before),
        labels=hits(lambda each: True).labelled if has_labels else None,
    )


def _hits(alike: Iterable[Alike], concerned: Callable[[Alike], bool], labelled: Callable[[Alike], bool]) -> Hits:
    hit = [each for each in alike if concerned(each)]
    return Hits(
        orders=sum(each.orders for each in hit),
        amount=sum(each.amount for each in hit),
        labelled=sum(each.orders for each in hit if labelled(each)),
        reviewed=sum(each.orders for each in hit if each.outcome),
        confirmed=sum(each.orders for each in hit if each.outcome == CONFIRMED),
        wrongly_held=sum(each.amount for each in hit if each.outcome and each.outcome != CONFIRMED),
    )


def _days(alike: Sequence[Alike], rules: Sequence[str]) -> list[dict[str, Any]]:
    counts: dict[date, Counter[str]] = {}
    for each in alike:
        of_day = counts.setdefault(each.day, Counter())
        hits = {"before": bool(each.before), "after": bool(each.after)}
        hits |= {f"{rule}_before": True for rule in each.before | each.shadow_before}
        hits |= {f"{rule}_after": True for rule in each.after | each.shadow_after}
        of_day.update({name: each.orders for name, is_hit in hits.items() if is_hit})
    names = ["before", "after", *(f"{rule}_{side}" for rule in rules for side in ("before", "after"))]
    return [{"day": day} | {name: counts[day][name] for name in names} for day in sorted(counts)]
