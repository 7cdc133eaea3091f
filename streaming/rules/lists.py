"""What fields are looked up in: lists as tables, the columns that say whether an order's value is listed, and why, and which
reasons a list suppresses."""

from functools import lru_cache

import polars as pl

from conf.lists import unpacked
from conf.rules import FraudRules
from streaming.rules.windows import Bools

_Lookup = tuple[str, str]  # a field, and the name of a list
_TIME = pl.Datetime("us", "UTC")


def listed(field: str, name: str) -> str:
    """The column that says whether a field's value is in a list at the order's event time; null where the order lacks it."""
    return f"listed({field}, '{name}')"


def why_listed(field: str, name: str) -> str:
    """The column that has the reason for which it is there."""
    return f"reason of {listed(field, name)}"


def with_lists(orders: pl.DataFrame, rules: FraudRules) -> pl.DataFrame:
    """Orders and, of each field that a condition looks up in a list, the two columns that say what was found."""
    lookups = sorted({lookup for condition in rules.conditions.values() for lookup in condition.lookups})
    return orders.with_columns(column for lookup in lookups for column in _found(orders, lookup, rules))


def allowed(orders: pl.DataFrame, rules: FraudRules) -> dict[str, Bools]:
    """By the name of a rule, which orders are on a list that suppresses its reason: nothing where no list does."""
    found: dict[str, Bools] = {}
    for name, entry in rules.lists.items():
        if entry.allows:
            is_listed = _found(orders, (entry.allows.by, name), rules)[0].to_numpy()
            for reason in entry.allows.reasons:
                found[reason] = found[reason] | is_listed if reason in found else is_listed
    return found


def _found(orders: pl.DataFrame, lookup: _Lookup, rules: FraudRules) -> list[pl.Series]:
    field, name = lookup
    values = orders.select(value=pl.col(field).cast(pl.String), event_ts="event_ts")
    entries = _entries(rules.lists[name].content)
    # A list may be much longer than the orders: of all that it holds only what is asked for is joined.
    entries = entries.filter(pl.col("value").is_in(values["value"].unique().implode()))
    holds = pl.col("expiry").is_null() | (pl.col("event_ts") < pl.col("expiry"))
    joined = values.join(entries, on="value", how="left", maintain_order="left")
    is_listed = pl.when(pl.col("value").is_not_null()).then(pl.col("reason").is_not_null() & holds)
    found = joined.select(is_listed.alias(listed(*lookup)), pl.when(is_listed).then("reason").alias(why_listed(*lookup)))
    return found.get_columns()


@lru_cache(maxsize=32)
def _entries(content: str) -> pl.DataFrame:
    """A list as a table: `value`, `reason`, `expiry` (null where it always holds). One for many micro-batches."""
    entries = unpacked(content)
    columns = {"value": entries.values, "reason": entries.reasons, "expiry": entries.expiries_us}
    table = pl.DataFrame(columns, schema={"value": pl.String(), "reason": pl.String(), "expiry": pl.Int64()})
    return table.with_columns(pl.col("expiry").cast(_TIME))
