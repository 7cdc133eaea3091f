"""Orders that nobody placed: existing users buy existing products, and frauds of all six kinds are planted among them.

Everything follows from the seed. Orders come in blocks; what is in a block depends on the seed and its number, event times
and order ids depend on the start time as well: a later run with the same seed brings new orders, not used ids.
"""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import count, cycle
from typing import NamedTuple
from zoneinfo import ZoneInfo

import numpy as np
import numpy.typing as npt
import polars as pl

from conf.errors import PostgresError, RulesError
from conf.rules import FraudRules

PARTNER = "marketplace"  # the source that writes ids as text: U17, P203

_BLOCK = 10_000  # orders made at a time; a pattern lies within one block
# Of a run without end: new users and products are known with the next block.
_ENDLESS_BLOCK_SECONDS, _SMALLEST_ENDLESS_BLOCK = 60, 200
_SOURCES = pl.Series(["android", "ios", "web", PARTNER])
_ABROAD = ("AU", "CN", "GB", "HK", "JP", "MY", "NL", "PH", "SG", "TH", "US", "VN")
_NIGHT_ENDS = 4  # o'clock
_BACK_DATED_WITHIN = timedelta(hours=3)  # of midnight: 04:00 is that early in a night when clocks go forward
_MOST_PIECES = 20  # of one product in an ordinary order
_ORDINARY_AMOUNT = 2_000_000  # rupiah; an ordinary order goes beyond it only when one piece does
_PATTERN_PIECES = 5  # members of a pattern buy up to so many pieces more than any ordinary order of their product
_PATTERN_SPAN = 0.8  # of the rule's interval, at most
_BIGINT_MAX = 2**63 - 1

Ints = npt.NDArray[np.int64]


class _Row(NamedTuple):
    """What the plan decides about an order."""

    due: float  # seconds after the start of its block
    user_id: int
    product: int  # position among the products
    quantity: int
    country: str
    at_night: bool = False  # back-dated to the last night, unless it is night when the order is due
    pattern: tuple[str, ...] | None = ()  # reasons of the rules that look at neighbours; null when nothing is planted


_ROW_SCHEMA: dict[str, pl.DataType] = {
    "due": pl.Float64(),
    "user_id": pl.Int64(),
    "product": pl.Int64(),
    "quantity": pl.Int64(),
    "country": pl.String(),
    "at_night": pl.Boolean(),
    "pattern": pl.List(pl.String()),
}


class Shop(NamedTuple):
    """Who may buy what.

    Attributes:
        users: the ids of those who buy.
        products: `product_id` and `price` (whole rupiah) of what they buy.
    """

    users: pl.Series
    products: pl.DataFrame


def order_batches(
    shop: Callable[[], Shop],
    rules: FraudRules,
    *,
    orders: int,
    seed: int,
    start: datetime,
    rate: float,
    bursts: float,
) -> Iterator[pl.DataFrame]:
    """Plan orders, in frames of up to 10,000, in the order in which they are to be sent.

    Args:
        shop: asked for users and products: once, or before each frame where there is no end.
        rules: the rules in force; planted orders satisfy them.
        orders: how many; 0 is without end, a minute's orders or more a frame.
        seed: same seed and start, same orders.
        start: when the first order is placed (aware).
        rate: orders a second, in event time.
        bursts: share of the orders that are planted frauds, 0 to 1.

    Returns:
        The columns of the order contract, typed: ids are integers, times are aware. Also `due`, the seconds after `start`
        at which the order is to be sent: that is its `event_ts`, unless it is back-dated to a night. And `label`: the
        reasons that a planted order is known to have, sorted, joined by commas; null for ordinary orders. Screening can
        find more than the labels, since an ordinary order may complete a pattern by chance; the plan makes that rare.

    Raises:
        PostgresError: no users or products, or too few users to plant a pattern.
        RulesError: a limit is so high that no order can exceed it.
    """
    for block, (first, size) in enumerate(_blocks(orders, rate)):
        if block == 0 or not orders:
            market = _Market(shop(), rules)
            trade, frauds = _Trade(market, seed), _Frauds(market) if bursts > 0 else None
        rng = np.random.default_rng([seed, block])
        planted = frauds.plant(rng, int(size * bursts + rng.random()), size / rate) if frauds else []
        rows = pl.concat(
            [
                trade.ordinary(rng, size - len(planted), size / rate, first),
                pl.DataFrame(planted, schema=_ROW_SCHEMA, orient="row"),
            ]
        ).sort("due", maintain_order=True)
        ids = np.random.default_rng([seed, block, _microseconds(start)])
        yield _orders(rows.with_columns(pl.col("due") + first / rate), market, start, rng, _order_ids(ids, size))


def _blocks(orders: int, rate: float) -> Iterator[tuple[int, int]]:
    """The blocks of a run: how many orders come before each, and how many are in it."""
    if orders:
        return ((first, min(_BLOCK, orders - first)) for first in range(0, orders, _BLOCK))
    size = int(np.clip(_ENDLESS_BLOCK_SECONDS * rate, _SMALLEST_ENDLESS_BLOCK, _BLOCK))
    return ((first, size) for first in count(0, size))


class _Market:
    """Who can buy what, and how much of it is ordinary."""

    def __init__(self, shop: Shop, rules: FraudRules) -> None:
        users, products = shop
        if users.is_empty() or products.is_empty():
            raise PostgresError("There are no users or no products to make orders from: `finpro generate` makes them.")
        self.planted, self.limits = rules.as_delivered, rules.limits
        self.zone = ZoneInfo(rules.time_zone)
        self.users: Ints = users.sort().to_numpy()
        self.products = products.sort("product_id")
        self.prices: Ints = self.products["price"].to_numpy()
        self.most_pieces = self._most_pieces()

    def _most_pieces(self) -> Ints:
        """For each product the most pieces of an ordinary order: fewer of dear ones, and nothing that is a fraud at night."""
        affordable = min(_ORDINARY_AMOUNT, self.limits.night_amount.above) // self.prices
        return np.clip(affordable, 1, max(1, min(_MOST_PIECES, self.limits.night_quantity.above)))


class _Trade:
    """Ordinary orders.

    Every (product, quantity) comes once before any comes again: a random mix would put three different users on one
    product and quantity within seconds all the time, which is what `coordinated_users` looks for. With 1,000 generated
    products this works up to 1,000 orders a second (1 of 40,000 ordinary orders is caught; 300 at 2,000 a second).
    """

    def __init__(self, market: _Market, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self._home = market.limits.foreign_country.home
        self._by_activity = rng.permutation(market.users)
        purchases = np.repeat(np.arange(len(market.prices)), market.most_pieces)
        starts = np.repeat(np.cumsum(market.most_pieces) - market.most_pieces, market.most_pieces)
        pieces = np.arange(len(purchases)) - starts + 1
        self._purchases = rng.permutation(np.column_stack([purchases, pieces]))

    def ordinary(self, rng: np.random.Generator, size: int, seconds: float, already: int) -> pl.DataFrame:
        """`size` orders spread evenly over so many seconds, after `already` others (_ROW_SCHEMA)."""
        chosen = self._purchases[(already + np.arange(size)) % len(self._purchases)]
        buyers = (len(self._by_activity) * rng.random(size) ** 1.5).astype(np.int64)
        columns = {
            "due": (np.arange(size) + rng.random(size)) * (seconds / max(size, 1)),
            "user_id": self._by_activity[buyers],
            "product": chosen[:, 0],
            "quantity": chosen[:, 1],
            "country": [self._home] * size,
            "at_night": [False] * size,
            "pattern": [None] * size,
        }
        return pl.DataFrame(columns, schema=_ROW_SCHEMA)


class _Frauds:
    """Planted frauds: each kind makes the rows of one example of it."""

    def __init__(self, market: _Market) -> None:
        self._market, self._limits = market, market.limits
        self._first_of_run = _runs(market.users, self._limits.sequential_users.users)
        self._require_users()
        self._require_reachable_limits()
        self._quiet = self._quiet_products()
        self._dear = np.argsort(market.prices)[-max(1, len(market.prices) // 10) :]
        self._abroad = [country for country in _ABROAD if country != self._limits.foreign_country.home]
        kinds: dict[str, Callable[[np.random.Generator, float], list[_Row]]] = {
            "repeat_purchase": self._repeat_purchase,
            "foreign_country": self._foreign_country,
            "sequential_users": self._sequential_users,
            "night_quantity": self._night_quantity,
            "coordinated_users": self._coordinated_users,
            "night_amount": self._night_amount,
        }
        self._kinds = tuple(plant for name, plant in kinds.items() if name in market.planted)

    def plant(self, rng: np.random.Generator, budget: int, seconds: float) -> list[_Row]:
        """`budget` orders, the kinds in turn; a pattern that does not fit any more gives way to single orders."""
        rows: list[_Row] = []
        if not self._kinds:
            return rows
        first = int(rng.integers(len(self._kinds)))
        for kind in cycle(self._kinds[first:] + self._kinds[:first]):
            if len(rows) >= budget:
                return rows
            example = kind(rng, seconds)
            if len(rows) + len(example) <= budget:
                rows += example
        return rows

    def _repeat_purchase(self, rng: np.random.Generator, seconds: float) -> list[_Row]:
        rule = self._limits.repeat_purchase
        buyers = np.repeat(_pick(rng, self._market.users), rule.orders + rng.integers(3))
        return self._pattern(rng, seconds, buyers, rule.within, ("repeat_purchase",))

    def _sequential_users(self, rng: np.random.Generator, seconds: float) -> list[_Row]:
        rule, coordinated = self._limits.sequential_users, self._limits.coordinated_users
        first = _pick(rng, self._first_of_run)
        buyers = rng.permutation(self._market.users[first : first + rule.users])
        is_coordinated = rule.users >= coordinated.users and rule.within <= coordinated.within
        reasons = ("coordinated_users", "sequential_users") if is_coordinated else ("sequential_users",)
        return self._pattern(rng, seconds, buyers, rule.within, tuple(name for name in reasons if name in self._market.planted))

    def _coordinated_users(self, rng: np.random.Generator, seconds: float) -> list[_Row]:
        rule, users = self._limits.coordinated_users, self._market.users
        size = min(rule.users + int(rng.integers(3)), len(users))
        widest = len(users) // size
        stride = rng.integers(min(2, widest), widest + 1)  # from two on, no two buyers have consecutive ids
        buyers = users[(rng.integers(len(users)) + stride * np.arange(size)) % len(users)]
        return self._pattern(rng, seconds, buyers, rule.within, ("coordinated_users",))

    def _pattern(
        self, rng: np.random.Generator, seconds: float, buyers: Ints, within: timedelta, reasons: tuple[str, ...]
    ) -> list[_Row]:
        """All these want one product, the same number of pieces, in an interval that lies within the block's `seconds`.

        They take more pieces than any ordinary order, so that no ordinary order joins the pattern.
        """
        product = _pick(rng, self._quiet)
        quantity = int(self._market.most_pieces[product] + rng.integers(1, _PATTERN_PIECES + 1))
        span = min(within.total_seconds() * _PATTERN_SPAN * rng.random(), seconds)
        dues = rng.uniform(0, seconds - span) + span * np.sort(rng.random(len(buyers)))
        home = self._limits.foreign_country.home
        return [
            _Row(due, user, product, quantity, home, pattern=reasons)
            for due, user in zip(dues.tolist(), buyers.tolist(), strict=True)
        ]

    def _foreign_country(self, rng: np.random.Generator, seconds: float) -> list[_Row]:
        product = int(rng.integers(len(self._market.prices)))
        quantity = int(rng.integers(1, self._market.most_pieces[product] + 1))
        return [self._single(rng, seconds, product, quantity, self._abroad[rng.integers(len(self._abroad))])]

    def _night_quantity(self, rng: np.random.Generator, seconds: float) -> list[_Row]:
        product = int(rng.integers(len(self._market.prices)))
        above = self._limits.night_quantity.above
        quantity = above + int(rng.integers(1, _beyond(above) + 1))
        return [self._single(rng, seconds, product, quantity, self._limits.foreign_country.home, at_night=True)]

    def _night_amount(self, rng: np.random.Generator, seconds: float) -> list[_Row]:
        product = _pick(rng, self._dear)
        enough = self._limits.night_amount.above // int(self._market.prices[product]) + 1
        quantity = enough + int(rng.integers(3))
        return [self._single(rng, seconds, product, quantity, self._limits.foreign_country.home, at_night=True)]

    def _single(
        self, rng: np.random.Generator, seconds: float, product: int, quantity: int, country: str, at_night: bool = False
    ) -> _Row:
        return _Row(rng.uniform(0, seconds), _pick(rng, self._market.users), product, quantity, country, at_night)

    def _quiet_products(self) -> Ints:
        """Products whose patterns give no reason of the night rules as well, should it be night; any, where none is so."""
        pieces = self._market.most_pieces + _PATTERN_PIECES
        few = pieces <= self._limits.night_quantity.above
        cheap = pieces * self._market.prices <= self._limits.night_amount.above
        quiet = np.flatnonzero(few & cheap)
        return quiet if len(quiet) else np.arange(len(pieces))

    def _require_users(self) -> None:
        sequential, coordinated = self._limits.sequential_users.users, self._limits.coordinated_users.users
        if not len(self._first_of_run) or len(self._market.users) < coordinated:
            raise PostgresError(
                f"Planted frauds need {sequential} users with consecutive ids and {coordinated} users at all, there are"
                f" {len(self._market.users)}: `finpro generate` makes more, --bursts 0 plants none."
            )

    def _require_reachable_limits(self) -> None:
        dearest, quantity = int(self._market.prices.max()), self._limits.night_quantity.above
        most = max((quantity + _beyond(quantity)) * dearest, self._limits.night_amount.above + 3 * dearest)
        if most > _BIGINT_MAX:
            raise RulesError(
                "The limits of night_quantity or night_amount are higher than any order: an amount has 64 bits."
                " Lower them in the rules file, or plant nothing with --bursts 0."
            )


def _beyond(limit: int) -> int:
    """How far planted orders go beyond a limit, at most."""
    return limit // 4 + 5


def _runs(users: Ints, length: int) -> Ints:
    """Positions in sorted, distinct ids at which so many consecutive ids begin."""
    if len(users) < length:
        return np.array([], dtype=np.int64)
    return np.flatnonzero(users[length - 1 :] - users[: len(users) - length + 1] == length - 1)


def _pick(rng: np.random.Generator, values: Ints) -> int:
    return int(values[rng.integers(len(values))])


def _orders(rows: pl.DataFrame, market: _Market, start: datetime, rng: np.random.Generator, ids: pl.Series) -> pl.DataFrame:
    """Rows of the plan (_ROW_SCHEMA) as orders of the contract, with `due` and `label`."""
    price = market.prices[rows["product"].to_numpy()]
    orders = rows.with_columns(
        order_id=ids,
        product_id=market.products["product_id"].gather(rows["product"]),
        amount_numeric=price * rows["quantity"].to_numpy(),
        event_ts=_event_times(rows, start, market.zone, rng),
        spelling=rng.integers(3, size=len(rows)),
        source=_SOURCES.gather(rng.integers(len(_SOURCES), size=len(rows))),
    )
    return orders.select(
        "order_id",
        "user_id",
        "product_id",
        "quantity",
        _amount_text().alias("amount"),
        "country",
        pl.col("event_ts").alias("created_date"),
        "event_ts",
        pl.lit("Pending").alias("status"),
        "source",
        "due",
        _label(market).alias("label"),
    )


def _event_times(rows: pl.DataFrame, start: datetime, zone: ZoneInfo, rng: np.random.Generator) -> pl.Series:
    moments = _microseconds(start) + (rows["due"].to_numpy() * 1e6).astype(np.int64)
    for row in rows["at_night"].arg_true():
        due = datetime.fromtimestamp(0, UTC) + timedelta(microseconds=int(moments[row]))
        moments[row] = _microseconds(_at_night(due, zone, _BACK_DATED_WITHIN * rng.random()))
    return pl.Series(moments).cast(pl.Datetime("us", "UTC")).dt.convert_time_zone(zone.key)


def _at_night(moment: datetime, zone: ZoneInfo, since_midnight: timedelta) -> datetime:
    """The moment itself when it is night in that zone; else so long after the midnight before it."""
    local = moment.astimezone(zone)
    if local.hour < _NIGHT_ENDS:
        return moment
    midnight = local.replace(hour=0, minute=0, second=0, microsecond=0, fold=0)
    return midnight.astimezone(UTC) + since_midnight


def _amount_text() -> pl.Expr:
    """One of the three spellings of an amount: Rp.1.250.000, IDR 1250000, 1250000."""
    digits = pl.col("amount_numeric").cast(pl.String)
    in_thousands = digits.str.reverse().str.replace_all(r"(\d{3})", "$1.").str.strip_suffix(".").str.reverse()
    spelling = pl.col("spelling")
    return pl.when(spelling == 0).then("Rp." + in_thousands).when(spelling == 1).then("IDR " + digits).otherwise(digits)


def _label(market: _Market) -> pl.Expr:
    """Reasons of a planted order: of the pattern it was made for, and of the rules on one order, read off the order."""
    limits, is_night = market.limits, pl.col("event_ts").dt.hour() < _NIGHT_ENDS
    single_order_rules = {
        "foreign_country": pl.col("country") != limits.foreign_country.home,
        "night_quantity": is_night & (pl.col("quantity") > limits.night_quantity.above),
        "night_amount": is_night & (pl.col("amount_numeric") > limits.night_amount.above),
    }
    reasons = [pl.when(holds).then(pl.lit(reason)) for reason, holds in single_order_rules.items() if reason in market.planted]
    return pl.concat_list("pattern", *reasons).list.drop_nulls().list.sort().list.join(",")


def _order_ids(rng: np.random.Generator, count: int) -> pl.Series:
    """Random UUIDs, version 4 in form."""
    digits = rng.bytes(16 * count).hex()
    parts = (digits[at : at + 32] for at in range(0, len(digits), 32))
    return pl.Series([f"{p[:8]}-{p[8:12]}-4{p[13:16]}-a{p[17:20]}-{p[20:]}" for p in parts], dtype=pl.String)


def _microseconds(moment: datetime) -> int:
    return (moment - datetime.fromtimestamp(0, UTC)) // timedelta(microseconds=1)
