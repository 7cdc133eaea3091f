"""What the rules find: each entry of the rules file over a table of orders.

A rule takes orders (columns as in `contract.ORDER_SCHEMA`, any order), and its finding says which of them have its reason, with
the orders that together make the pattern. All rules are monotone: one more order can only add reasons.
"""

from collections.abc import Sequence, Set
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
        apart: an integer an order; those of different ones are no neighbours. None where all may be.
    """
    table, held = _looked_at(orders, rules, apart)
    return {
        name: _of_pattern(rule, table, _taking_part(table, rule, held.get(name)))
        if rule.pattern
        else _of_condition(table, rules.conditions[name], held[name])
        for name, rule in rules.evaluated.items()
    }


def taking_part(orders: pl.DataFrame, rules: FraudRules) -> Bools:
    """Which orders take part in some pattern: all others can be no neighbours to anyone."""
    table, held = _looked_at(orders, rules)
    part = np.zeros(len(orders), bool)
    for name, rule in rules.evaluated.items():
        if rule.pattern:
            part[_taking_part(table, rule, held.get(name)).rows] = True
    return part


def values_of(orders: pl.DataFrame, rules: FraudRules, field: str) -> pl.Series:
    """The values of any field that rules can look at, null where an order lacks it."""
    return _with_fields(orders, rules, {field})[field]


def _with_fields(orders: pl.DataFrame, rules: FraudRules, looked_at: Set[str]) -> pl.DataFrame:
    local = [name for name in LOCAL_FIELDS if name in looked_at]
    orders = with_local_fields(orders, rules.time_zone, local) if local else orders
    declared = {name: kind for name, kind in rules.fields.items() if name in looked_at}
    return with_declared_fields(orders, declared) if declared else orders


def _looked_at(
    orders: pl.DataFrame, rules: FraudRules, apart: pl.Series | None = None
) -> tuple["_Orders", dict[str, pl.Series]]:
    """Orders with all that rules look at, and for which of them each condition holds."""
    conditions = rules.conditions
    orders = _with_fields(orders, rules, set[str]().union(*rules.looked_at.values()))
    table = _Orders(with_lists(orders, rules) if rules.lists else orders, None if apart is None else ints(apart))
    # Beside a field, so that a condition on none has a row an order too; a number is no name of a field.
    held = table.orders.select("order_id", *(holds(one.term).alias(str(n)) for n, one in enumerate(conditions.values())))
    return table, {name: held[str(n)] for n, name in enumerate(conditions)}


def _of_condition(table: "_Orders", condition: Condition, held: pl.Series) -> Finding:
    """A rule that looks at one order: the order itself is all the evidence."""
    rows = np.flatnonzero(held.to_numpy())
    if not len(rows):  # mostly, of the few orders of a live micro-batch
        return Finding(rows, rows[:, None], held[:0], condition.text)
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


def _taking_part(table: "_Orders", rule: Rule, held: pl.Series | None) -> Equals:
    """The orders that take part in a rule's pattern."""
    of, equals = getattr(rule.pattern, "of", None), table.equals(rule.by or ())
    taking_part = None if held is None else held.to_numpy()
    if of is not None:
        present = table.present(of)
        if isinstance(rule.pattern, Sum):
            present = _both(present, table.is_not_negative(of))
        taking_part = _both(taking_part, present)
    return equals if taking_part is None else Equals(equals.keys, equals.ts, equals.rows[taking_part[equals.rows]])


def _of_pattern(rule: Rule, table: "_Orders", equals: Equals) -> Finding:
    pattern = rule.pattern
    assert pattern is not None  # noqa: S101 - who calls has looked
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
    apart: Ints | None = None
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
            keys += [] if self.apart is None else [self.apart]
            rows = np.lexsort([ts, *reversed(keys)])
            for name in names:
                present = self.present(name)
                rows = rows if present is None else rows[present[rows]]
            self._equals[names] = Equals(keys, ts, rows)
        return self._equals[names]
