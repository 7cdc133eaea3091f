"""What the rules find: each entry of the rules file over a table of orders.

A rule takes orders (columns as in `contract.ORDER_SCHEMA`, any order), and its finding says which of them have its reason, with
the orders that together make the pattern. All rules are monotone: one more order can only add reasons.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date, timedelta

import numpy as np
import polars as pl

from conf.conditions import LOCAL_FIELDS, Condition
from conf.rules import Consecutive, Distinct, FraudRules, Rule, Sum
from streaming.rules import patterns
from streaming.rules.conditions import expression, holds, with_declared_fields, with_local_fields
from streaming.rules.lists import listed, why_listed, with_lists
from streaming.rules.patterns import Equals, Finding
from streaming.rules.windows import Bools, Ints, ints


def findings(orders: pl.DataFrame, rules: FraudRules, apart: pl.Series | None = None) -> dict[str, Finding]:
    """What each rule finds that is not off, by name, sorted.

    Args:
        orders: to be judged, with all that may be neighbours of theirs.
        rules: in force.
        apart: integers; orders of which they differ are no neighbours, whatever else they share.
    """
    conditions, looked_at = rules.conditions, set[str]().union(*rules.looked_at.values())
    local = [name for name in LOCAL_FIELDS if name in looked_at]
    orders = with_local_fields(orders, rules.time_zone, local) if local else orders
    declared = {name: kind for name, kind in rules.fields.items() if name in looked_at}
    orders = with_declared_fields(orders, declared) if declared else orders
    table = _Orders(with_lists(orders, rules) if rules.lists else orders, apart)
    # Beside a field, so that a condition on none has a row an order too; a number is no name of a field.
    held = table.orders.select("order_id", *(holds(one.term).alias(str(n)) for n, one in enumerate(conditions.values())))
    held = held.drop("order_id").rename(dict(zip(map(str, range(len(conditions))), conditions, strict=True)))
    return {
        name: _of_pattern(table, rule, held[name] if name in conditions else None)
        if rule.pattern
        else _of_condition(table, conditions[name], held[name])
        for name, rule in rules.evaluated.items()
    }


def _of_condition(table: "_Orders", condition: Condition, held: pl.Series) -> Finding:
    """A rule that looks at one order: the order itself is all the evidence."""
    rows = np.flatnonzero(held.to_numpy())
    found, measured = table.orders[rows], condition.measured
    if measured:
        value = found.select(expression(measured[0])).to_series()
        limit = measured[1].isoformat() if isinstance(measured[1], date) else measured[1]
        return Finding(rows, rows[:, None], _as_json(value), limit)
    reasons = [found[why_listed(*lookup)].alias(listed(*lookup)) for lookup in condition.lookups]
    shown = found.select(*(_as_json(found[name]) for name in condition.fields), *reasons)
    return Finding(rows, rows[:, None], shown.to_struct() if condition.fields else held.gather(rows), condition.text)


def _as_json(value: pl.Series) -> pl.Series:
    """A value as JSON can hold it: times as text, and integers beyond 64 bits as numbers."""
    if value.dtype.is_temporal():
        return value.cast(pl.String)
    return value.cast(pl.Float64) if value.dtype == pl.Int128 else value


def _of_pattern(table: "_Orders", rule: Rule, held: pl.Series | None) -> Finding:
    pattern = rule.pattern
    assert pattern is not None and rule.by is not None  # noqa: S101, PT018 - the rules were validated
    of = getattr(pattern, "of", None)
    equals = table.equals(rule.by)
    taking_part = None if held is None else held.to_numpy()
    if of is not None:
        present = table.present(of)
        if isinstance(pattern, Sum):
            present = _both(present, table.is_not_negative(of))
        taking_part = _both(taking_part, present)
    if taking_part is not None:
        equals = Equals(equals.keys, equals.ts, equals.rows[taking_part[equals.rows]])
    width = pattern.within // timedelta(microseconds=1)
    if isinstance(pattern, Sum):
        return patterns.total(equals, table.values(pattern.of), pattern.at_least, width)
    if isinstance(pattern, Consecutive):
        return patterns.consecutive(equals, table.values(pattern.of), pattern.at_least, width)
    if isinstance(pattern, Distinct):
        return patterns.distinct(equals, table.values(pattern.of), pattern.at_least, width)
    return patterns.count(equals, pattern.at_least, width)


def _both(one: Bools | None, other: Bools | None) -> Bools | None:
    if one is None or other is None:
        return other if one is None else one
    return one & other


@dataclass
class _Orders:
    """A table of orders, and what several rules need of it: worked out once."""

    orders: pl.DataFrame
    apart: pl.Series | None = None
    _values: dict[str, Ints] = field(default_factory=dict)
    _equals: dict[tuple[str, ...], Equals] = field(default_factory=dict)

    def values(self, name: str) -> Ints:
        """A field as integers; other values are numbered. What is null has any number: it takes no part."""
        if name not in self._values:
            column = self.orders[name]
            column = column.cast(pl.Int64) if column.dtype == pl.Boolean else column
            if column.dtype.is_integer() or column.dtype.is_temporal():
                self._values[name] = ints(column.to_physical().fill_null(0) if column.null_count() else column)
            else:
                self._values[name] = ints(column.rank("dense").fill_null(0).cast(pl.Int64))
        return self._values[name]

    def present(self, name: str) -> Bools | None:
        """Which orders have a field; None where all do."""
        column = self.orders[name]
        return column.is_not_null().to_numpy() if column.null_count() else None

    def is_not_negative(self, name: str) -> Bools | None:
        """Whose field, of integers, is not negative; None where none is."""
        values = self.values(name)
        is_fine: Bools = values >= 0
        return None if is_fine.all() else is_fine

    def equals(self, by: Sequence[str]) -> Equals:
        """The orders that have all these fields, by their values."""
        names = tuple(sorted(by))
        if names not in self._equals:
            keys, ts = [self.values(name) for name in names], self.values("event_ts")
            keys = keys if self.apart is None else [ints(self.apart), *keys]
            rows = np.lexsort([ts, *reversed(keys)])
            for name in names:
                present = self.present(name)
                rows = rows if present is None else rows[present[rows]]
            self._equals[names] = Equals(keys, ts, rows)
        return self._equals[names]
