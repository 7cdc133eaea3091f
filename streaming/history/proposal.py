"""What is found about rules that are proposed: alerts a day, precision, the worst mistakes, and which limits they keep."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any, NamedTuple

import polars as pl
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from conf.rules import FraudRules
from streaming.history.backtest import CONFIRMED, Backtest, Effect, Hits
from streaming.history.rescreening import Fold, Period, rescreen, struct_of
from streaming.rules.differences import Difference, differences
from streaming.rules.recorded import RulesInForce

HELD, MISSED = "held", "missed"
MISTAKES = """
    kind string, amount_numeric bigint, event_ts timestamp, order_id string, user_id bigint, product_id bigint, quantity bigint,
    country string, reasons string, label string
"""


class Limits(NamedTuple):
    """What proposed rules have to keep; None where anything goes.

    Attributes:
        alerts: the most orders that may become alerts on any day of the period.
        precision: the least share of the alerts that are frauds, of all alerts and of the new ones (`Trial.precision_of`).
    """

    alerts: int | None
    precision: float | None


class Mistake(NamedTuple):
    """An order that the proposed rules may be wrong about.

    Attributes:
        kind: HELD, where it becomes Fraud and did not turn out to be one; MISSED, where it is none by these rules, although it
            turned out to be one or was Fraud, and not to be genuine.
        reasons: those of the proposed rules, or where they give none, those in force; joined by commas.
        label: the reasons of its label, joined by commas; where it carries none, what turned out: fraud, genuine or blank.
    """

    kind: str
    amount_numeric: int
    event_ts: datetime
    order_id: str
    user_id: int
    product_id: int
    quantity: int
    country: str
    reasons: str
    label: str


class Shadowed(NamedTuple):
    """A rule that is in shadow in the rules in force: since when, what it found in the period, and what becomes of it."""

    rule: str
    since: datetime | None
    effect: Effect
    mode: str


@dataclass(frozen=True)
class Trial:
    """Rules that were tried before they are proposed.

    Attributes:
        rules: those.
        in_force: the rules in force.
        found: their backtest.
        mistakes: the dearest of each kind.
        shadowed: the rules that run in shadow.
        limits: that were given.
        capacity: the alerts that people can look at on a day, if that was said.
    """

    rules: FraudRules
    in_force: FraudRules
    found: Backtest
    mistakes: Sequence[Mistake]
    shadowed: Sequence[Shadowed]
    limits: Limits
    capacity: int | None = None

    @property
    def changes(self) -> list[Difference]:
        """What differs from the rules in force."""
        return differences(self.in_force, self.rules)

    @property
    def alerts_a_day(self) -> float:
        """The mean of the days that have orders."""
        return self.found.whole.after.orders / len(self.found.days)

    @property
    def alerts_a_day_before(self) -> float:
        """The same of the verdicts in force."""
        return self.found.whole.before.orders / len(self.found.days)

    @property
    def busiest(self) -> tuple[date, int]:
        """The day with the most alerts, and how many."""
        row = max(self.found.days, key=lambda day: int(day["after"]))
        return row["day"], row["after"]

    @property
    def days_over_capacity(self) -> int:
        """How many days have more alerts than people can look at."""
        return sum(day["after"] > self.capacity for day in self.found.days) if self.capacity is not None else 0

    @property
    def is_known(self) -> bool:
        """Whether of any order it is known what it was: by a label, or an outcome."""
        return self.found.whole.labels is not None or self.found.reviewed > 0

    def precision_of(self, hits: Hits) -> float | None:
        """The share of hits that carry a label; where no order does, of the reviewed ones those that turned out to be frauds.

        None where there are none.
        """
        whole = self.found.whole
        return whole.precision(hits) if whole.labels is not None else hits.precision_of_reviewed

    @property
    def precision(self) -> float | None:
        """That of all alerts."""
        return self.precision_of(self.found.whole.after)

    @property
    def precision_of_new(self) -> float | None:
        """That of the orders that become Fraud."""
        return self.precision_of(self.found.whole.becomes)

    @property
    def broken(self) -> list[str]:
        """The limits that are not kept, in words."""
        day, alerts = self.busiest
        broken = []
        if self.limits.alerts is not None and alerts > self.limits.alerts:
            broken.append(f"--max-alerts {self.limits.alerts:,}: {alerts:,} alerts on {day}")
        if self.limits.precision is None or not self.found.whole.after.orders:
            return broken
        if self.precision is None:
            return [*broken, f"--min-precision {self.limits.precision:g}: of no alert it is known what it was"]
        shares = {"of all alerts": self.precision, "of the orders that become Fraud": self.precision_of_new}
        return broken + [
            f"--min-precision {self.limits.precision:g}: {share:.1%} {which}"
            for which, share in shares.items()
            if share is not None and share < self.limits.precision
        ]

    def figures(self) -> dict[str, Any]:
        """What the record keeps of it, as JSON can hold it."""
        day, alerts = self.busiest
        return {
            "orders": self.found.orders,
            "days": len(self.found.days),
            "alerts_a_day": self.alerts_a_day,
            "busiest_day": day.isoformat(),
            "busiest_day_alerts": alerts,
            "precision": self.precision,
            "precision_of_new": self.precision_of_new,
            "become_fraud": self.found.whole.becomes.orders,
            "stop_being_fraud": self.found.whole.stops.orders,
            "limits": self.limits._asdict(),
            "capacity": self.capacity,
        }


def mistakes_of(orders: DataFrame, rules: FraudRules, period: Period, count: int) -> list[Mistake]:
    """The dearest orders of a period that rules may be wrong about, at most so many of each kind.

    Args:
        orders: as of `backtest.orders_in_force`.
        rules: the proposed ones.
        period: of event time.
        count: of each kind.
    """
    found = rescreen(orders, rules, dearest(period, count), struct_of(MISTAKES))
    rows = [
        row
        for kind in (HELD, MISSED)
        for row in found.where(F.col("kind") == kind).orderBy(F.desc("amount_numeric"), "order_id").limit(count).collect()
    ]
    # Spark gives local time without saying so.
    return [Mistake(**row.asDict() | {"event_ts": row["event_ts"].astimezone(UTC)}) for row in rows]


def dearest(period: Period, count: int) -> Fold:
    """Keeps those of screened orders (with `before`, `label`, `outcome`) that rules may be wrong about (MISTAKES)."""
    is_asked_for = period.selects(pl.col("event_ts"))
    is_fraud = pl.col("reasons").list.len() > 0
    is_held = is_fraud & (pl.col("before") == "") & (pl.col("outcome") != CONFIRMED)
    is_missed = ~is_fraud & ((pl.col("outcome") == CONFIRMED) | ((pl.col("outcome") == "") & (pl.col("before") != "")))

    def keep(screened: pl.DataFrame) -> pl.DataFrame:
        mistaken = screened.filter(is_asked_for, is_held | is_missed).with_columns(
            kind=pl.when(is_held).then(pl.lit(HELD)).when(is_missed).then(pl.lit(MISSED)),
            label=pl.when(pl.col("label") == "").then("outcome").otherwise("label"),
            reasons=pl.when(is_fraud).then(pl.col("reasons").list.join(",")).when(~is_fraud).then("before"),
        )
        by_amount = mistaken.sort("amount_numeric", "order_id", descending=[True, False])
        return by_amount.group_by("kind", maintain_order=True).head(count)

    return keep


def shadowed(
    rules: FraudRules, in_force: FraudRules, recorded: Sequence[RulesInForce], effects: Mapping[str, Effect]
) -> list[Shadowed]:
    """The rules that run in shadow and are among those proposed."""
    return [
        Shadowed(name, _in_shadow_since(name, recorded), effects[name], rules.rules[name].mode)
        for name in sorted(in_force.in_shadow & rules.evaluated.keys())
    ]


def _in_shadow_since(rule: str, recorded: Sequence[RulesInForce]) -> datetime | None:
    """Since when a rule has been in shadow without a break; None where screening has not gone by it."""
    since = None
    for entry in reversed(recorded):
        if rule not in entry.rules.in_shadow:
            break
        since = entry.since
    return since
