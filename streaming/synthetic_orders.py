"""Orders that nobody placed: an even trade of existing users in existing products, with frauds of all six kinds planted.

Everything follows from the seed. Orders come in blocks; a block's content depends on the seed and its own number, its
event times and order ids on the start time as well, so that a later run with the same seed brings new orders.
"""

from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import NamedTuple

import numpy as np
import polars as pl

from conf.errors import PostgresError
from conf.rules import FraudRules

BLOCK = 10_000  # orders made at a time; a pattern lies within one block
PARTNER = "marketplace"  # the source whose orders write ids as text: U17, P203

_SOURCES = ("android", "ios", "web", PARTNER)
_ABROAD = ("AU", "CN", "GB", "HK", "JP", "MY", "NL", "PH", "SG", "TH", "US", "VN")
_NIGHT_ENDS = 4  # o'clock
_NIGHT_START = timedelta(hours=3)  # back-dated orders fall in a night's first hours: 04:00 comes early when clocks go forward
_MOST_PIECES = 20  # of one product in an ordinary order
_ORDINARY_AMOUNT = 2_000_000  # rupiah that an ordinary order stays below, unless one piece costs more
_PATTERN_PIECES = 5  # pattern members buy up to so many more than any ordinary order of their product does
_PATTERN_SPAN = 0.8  # of the rule's interval, at most
_BIGINT_MAX = 2**63 - 1


class _Row(NamedTuple):
    """A planted order before it has an id: what the plan decides."""

    due: float  # seconds after the block's first order
    user_id: int
    product: int  # position in the products
    quantity: int
    country: str
    reasons: list[str]  # of the rules that look at neighbours
    by_night: bool


_ROW_SCHEMA = {
    "due": pl.Float64(),
    "user_id": pl.Int64(),
    "product": pl.Int64(),
    "quantity": pl.Int64(),
    "country": pl.String(),
    "reasons": pl.List(pl.String()),
    "by_night": pl.Boolean(),
}


def order_batches(
    users: pl.Series,
    products: pl.DataFrame,
    rules: FraudRules,
    *,
    orders: int,
    seed: int,
    start: datetime,
    rate: float,
    bursts: float,
) -> Iterator[pl.DataFrame]:
    """Plan `orders` orders, in frames of up to 10,000 rows, in the order in which they are to be sent.

    Args:
        users: ids of the users who buy.
        products: `product_id` and `price` (whole rupiah) of what they buy.
        rules: the rules in force; planted orders satisfy them.
        start: when the first order is placed (aware).
        rate: orders a second of event time.
        bursts: share of the orders that are planted frauds, 0 to 1.

    Returns:
        The columns of the order contract, typed (times are aware, `user_id` and `product_id` integers), and
        `due`: seconds after `start` when the order is to be sent; its `event_ts`, unless it is back-dated to a night.
        `label`: null, or the reasons that a planted order is known to have, sorted and joined by commas. Screening may
        find more: an ordinary order can fall into a pattern by chance, though the plan makes that rare.

    Raises:
        PostgresError: there are no users or products, or too few to plant a pattern.
        RulesError: a limit is so high that no order can exceed it.
    """
    planner = _Planner(users, products, rules, seed, planting=bursts > 0)
    for block, first in enumerate(range(0, orders, BLOCK)):
        size = min(BLOCK, orders - first)
        content = np.random.default_rng([seed, block])
        ids = np.random.default_rng([seed, block, _microseconds(start)])
        begins = first / rate
        rows = planner.rows(content, size, bursts, size / rate, already=first)
        yield _contract(rows.with_columns(pl.col("due") + begins), start, rules, content, ids)


class _Planner:
    """Who buys what and how many of it: ordinary orders, and the six kinds of planted ones."""

    def __init__(self, users: pl.Series, products: pl.DataFrame, rules: FraudRules, seed: int, *, planting: bool) -> None:
        if users.is_empty() or products.is_empty():
            raise PostgresError("There are no users or no products to make orders from: `finpro generate` makes them")
        self._rules = rules
        self._users = users.sort().to_numpy()
        self._products = products.sort("product_id")
        self._prices = self._products["price"].to_numpy()
        rng = np.random.default_rng(seed)
        self._by_activity = rng.permutation(self._users)
        self._most = self._most_pieces()
        self._menu = self._all_ordinary_purchases(rng)
        if planting:
            self._prepare_patterns()

    def rows(self, rng: np.random.Generator, size: int, share: float, seconds: float, already: int) -> pl.DataFrame:
        """A block of `size` orders over `seconds`, ordered by `due`; `already` counts the orders before it."""
        planted = self._planted(rng, int(size * share + rng.random()), seconds)
        ordinary = self._ordinary(rng, size - len(planted), seconds, already)
        return pl.concat([ordinary, planted]).sort("due", maintain_order=True).join(self._products_by_position, on="product")

    @property
    def _products_by_position(self) -> pl.DataFrame:
        return self._products.with_row_index("product").cast({"product": pl.Int64})

    def _most_pieces(self) -> np.ndarray:
        """For each product, the most pieces an ordinary order takes: fewer of dear things, and nothing fraudulent at night."""
        quantity, amount = self._rules.night_quantity.above, self._rules.night_amount.above
        affordable = min(_ORDINARY_AMOUNT, amount) // self._prices
        return np.clip(affordable, 1, max(1, min(_MOST_PIECES, quantity)))
