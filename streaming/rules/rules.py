"""The six fraud rules, top to bottom: each a pure function over a table of orders.

A rule takes orders (columns as in `contract.ORDER_SCHEMA`, any order) and the thresholds, and returns which orders have
its reason, with the orders that together make the pattern. All rules are monotone: one more order can only add reasons.
Intervals include both ends.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import polars as pl

from conf.rules import FraudRules
from streaming.rules.windows import (
    Ints,
    consecutive_runs,
    crowded,
    distinct_in_intervals,
    first_cover,
    first_of_each,
    ints,
    time_order,
)

EVIDENCE_ORDERS = 20  # an alert names at most so many orders for a reason


@dataclass(frozen=True)
class Finding:
    """The orders that have one reason, and why.

    Attributes:
        rows: their positions in the table.
        members: a row for each of them: positions of the orders that together make its pattern, itself among them.
        value: what was found for each of them, of the same kind as `limit`.
        limit: the threshold it is held against.
    """

    rows: Ints
    members: Ints
    value: pl.Series
    limit: int | str


def foreign_country(orders: pl.DataFrame, rules: FraudRules) -> Finding:
    """Its country is not `home`."""
    home = rules.foreign_country.home
    return _single(orders["country"] != home, orders["country"], home)


def night_quantity(orders: pl.DataFrame, rules: FraudRules) -> Finding:
    """Local time is in [00:00, 04:00) and quantity is above the limit."""
    above = rules.night_quantity.above
    return _single(
        _is_night(orders, rules) & (orders["quantity"] > above),
        orders["quantity"],
        above,
    )


def night_amount(orders: pl.DataFrame, rules: FraudRules) -> Finding:
    """Local time is in [00:00, 04:00) and the amount is above the limit."""
    above = rules.night_amount.above
    return _single(
        _is_night(orders, rules) & (orders["amount_numeric"] > above),
        orders["amount_numeric"],
        above,
    )


def repeat_purchase(orders: pl.DataFrame, rules: FraudRules) -> Finding:
    """It belongs to `orders` orders of one user for one product, the first and last at most `within` apart."""
    needed = rules.repeat_purchase.orders
    width = _width(rules.repeat_purchase.within)
    product, user, ts = (ints(orders[name]) for name in ("product_id", "user_id", "event_ts"))
    near = crowded([product, user], ts, needed, width)
    order = time_order([product[near], user[near]], ts[near], width)
    starts = np.flatnonzero(order.end - np.arange(len(near)) >= needed)
    ends = order.end[starts]
    cover = first_cover(starts, ends, len(near))
    places = np.flatnonzero(cover >= 0)
    start, end = starts[cover[places]], ends[cover[places]]
    nearest = np.minimum(np.maximum(start, places - needed + 1), end - needed)
    members = nearest[:, None] + np.arange(needed)
    return _pattern(near[order.rows], places, members, value=end - start, limit=needed)


def sequential_users(orders: pl.DataFrame, rules: FraudRules) -> Finding:
    """Same product and quantity: it belongs to orders of `users` users with consecutive ids, all at most `within` apart."""
    needed = rules.sequential_users.users
    product, quantity, user, ts = (ints(orders[name]) for name in ("product_id", "quantity", "user_id", "event_ts"))
    width = _width(rules.sequential_users.within)
    near = crowded([product, quantity], ts, needed, width)
    rows = near[np.lexsort([ts[near], user[near], quantity[near], product[near]])]
    group = np.cumsum((np.diff(product[rows], prepend=0) != 0) | (np.diff(quantity[rows], prepend=0) != 0))
    runs = consecutive_runs(group, user[rows], ts[rows], needed, width)
    by_place = np.lexsort([runs.end.ravel(), runs.start.ravel()])
    starts, ends = runs.start.ravel()[by_place], runs.end.ravel()[by_place]
    cover = first_cover(starts, ends, len(rows))
    places = np.flatnonzero(cover >= 0)
    run, column = np.divmod(by_place[cover[places]], needed)
    members = runs.start[run]
    members[np.arange(len(places)), column] = places
    return _pattern(rows, places, members, value=np.full(len(places), needed), limit=needed)


def coordinated_users(orders: pl.DataFrame, rules: FraudRules) -> Finding:
    """Same product and quantity: it lies in some interval of length `within` with orders of at least `users` users."""
    needed = rules.coordinated_users.users
    product, quantity, user, ts = (ints(orders[name]) for name in ("product_id", "quantity", "user_id", "event_ts"))
    width = _width(rules.coordinated_users.within)
    near = crowded([product, quantity], ts, needed, width)
    order = time_order([product[near], quantity[near]], ts[near], width)
    users = user[near][order.rows]
    different = distinct_in_intervals(order, users)
    starts = np.flatnonzero(different >= needed)
    cover = first_cover(starts, order.end[starts], len(near))
    places = np.flatnonzero(cover >= 0)
    used, interval = np.unique(cover[places], return_inverse=True)
    others = first_of_each(order, users, starts[used], needed)[interval]
    is_own_user = users[others] == users[places][:, None]
    own = np.where(is_own_user.any(axis=1), is_own_user.argmax(axis=1), needed - 1)
    others[np.arange(len(places)), own] = places
    return _pattern(
        near[order.rows],
        places,
        others,
        value=different[starts[cover[places]]],
        limit=needed,
    )


Rule = Callable[[pl.DataFrame, FraudRules], Finding]
RULES: dict[str, Rule] = {
    "coordinated_users": coordinated_users,
    "foreign_country": foreign_country,
    "night_amount": night_amount,
    "night_quantity": night_quantity,
    "repeat_purchase": repeat_purchase,
    "sequential_users": sequential_users,
}
REASONS = tuple(sorted(RULES))


def _width(within: timedelta) -> int:
    """A duration in microseconds."""
    return within // timedelta(microseconds=1)


def _is_night(orders: pl.DataFrame, rules: FraudRules) -> pl.Series:
    return orders.select(pl.col("event_ts").dt.convert_time_zone(rules.time_zone).dt.hour() < 4).to_series()


def _single(found: pl.Series, value: pl.Series, limit: int | str) -> Finding:
    """A rule that looks at one order: the order itself is all the evidence."""
    rows = np.flatnonzero(found.to_numpy())
    return Finding(rows, rows[:, None], value[rows], limit)


def _pattern(rows: Ints, places: Ints, members: Ints, *, value: Ints, limit: int) -> Finding:
    """A rule that looks at several orders, from places in its own sort order to positions in the table."""
    too_many = members.shape[1] > EVIDENCE_ORDERS
    if too_many:
        own_first = np.argsort(members != places[:, None], axis=1, kind="stable")[:, :EVIDENCE_ORDERS]
        members = np.take_along_axis(members, np.sort(own_first, axis=1), axis=1)
    return Finding(rows[places], rows[members], pl.Series(value, dtype=pl.Int64), limit)
