"""Hypothesis strategies for sets of orders where it is close: patterns that just hold and just do not, at awkward times.

Everything is drawn small (a few users, products and quantities), so that patterns are frequent and counterexamples short.
Whatever there is one of in each order is rolled with dice (`Dice`): Hypothesis takes longer for a draw than tests take for an
order.
"""

import json
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, time, timedelta, timezone
from itertools import chain, count, pairwise
from operator import itemgetter
from typing import Any, TypeVar
from zoneinfo import ZoneInfo

from hypothesis import strategies as st

from conf.former_rules import CoordinatedUsers, ForeignCountry, NightAmount, NightQuantity, RepeatPurchase, SequentialUsers
from conf.rules import FraudRules
from tests.oracle.brute_force import Message, Order

Item = TypeVar("Item")

ZONES = ("Asia/Jakarta", "UTC", "America/New_York", "Asia/Kathmandu")
MICROSECOND = timedelta(microseconds=1)

# Two of the days have a change to and from daylight saving time in New York, within the night.
_DAYS = (date(2026, 10, 15), date(2026, 3, 8), date(2026, 11, 1))
_CLOCKS = (time(12), time(0), time(4))
_SOURCES = ("web", "mobile", "it's", 'a"b', "back\\slash", "\\N", "{NULL,x}", "tab\tline\nend\r", "toko é 店 🛒")
_LARGEST = 2**63 - 1


@dataclass(frozen=True)
class OrderSet:
    """Messages in the order in which they are received, and the thresholds they are made for."""

    rules: FraudRules
    messages: list[Message]


_ROLLS = st.binary(min_size=64, max_size=64)


class Dice:
    """Choices for many things, from few draws; Hypothesis makes counterexamples simpler where it makes rolls lower."""

    def __init__(self, draw: st.DrawFn) -> None:
        self._rolls = chain.from_iterable(draw(_ROLLS) for _ in count())

    def roll(self, sides: int) -> int:
        """0 or more, below `sides`, of which there are 65,536 at most."""
        return (next(self._rolls) if sides <= 256 else next(self._rolls) << 8 | next(self._rolls)) % sides

    def one_of(self, options: Sequence[Item]) -> Item:
        """One of at most 256 options, the first of which is the simplest."""
        return options[self.roll(len(options))]

    def order_of(self, items: Sequence[Item]) -> list[Item]:
        """The items in any order."""
        return [item for _, item in sorted(((self.roll(65_536), item) for item in items), key=itemgetter(0))]


@dataclass(frozen=True)
class _Purchase:
    """What the rules look at in an order, before it gets an id and all the rest."""

    user: int
    product: int
    quantity: int
    event_ts: datetime


# --- thresholds ---------------------------------------------------------------------------------------------------


def six_rules(version: str = "test", **tables: Any) -> FraudRules:
    """The six rules, with limits of their own where sections are given, in a file of the old form."""
    return FraudRules.model_validate({"version": version, **tables})


@st.composite
def rule_sets(draw: st.DrawFn) -> FraudRules:
    """Thresholds low enough for small sets of orders to cross."""
    members = st.integers(2, 4)
    within = st.integers(1, 20).map(lambda seconds: timedelta(seconds=seconds)) | st.sampled_from(
        (timedelta(0), MICROSECOND, timedelta(milliseconds=500))
    )
    return six_rules(
        version="drawn",
        time_zone=draw(st.sampled_from(ZONES)),
        lateness=timedelta(seconds=draw(st.integers(0, 60))),
        foreign_country=ForeignCountry(home=draw(st.sampled_from(("ID", "SG")))),
        night_quantity=NightQuantity(above=draw(st.sampled_from((1, 2, 100)))),
        night_amount=NightAmount(above=draw(st.sampled_from((1_000, 100_000_000)))),
        repeat_purchase=RepeatPurchase(orders=draw(members), within=draw(within)),
        sequential_users=SequentialUsers(users=draw(members), within=draw(within)),
        coordinated_users=CoordinatedUsers(users=draw(members), within=draw(within)),
    )


# --- orders -------------------------------------------------------------------------------------------------------


@st.composite
def orders(draw: st.DrawFn, rules: FraudRules, *, max_size: int = 40) -> list[Order]:
    """Up to `max_size` orders with ids of their own: planted patterns among scattered purchases.

    They begin around noon, midnight or 04:00 of the rules' zone, one microsecond before or after it, or at it.
    """
    dice = Dice(draw)
    begin = datetime.combine(dice.one_of(_DAYS), dice.one_of(_CLOCKS), ZoneInfo(rules.time_zone)).astimezone(UTC)
    begin += dice.one_of((timedelta(0), -MICROSECOND, MICROSECOND))
    first_user = dice.one_of((1, 1, 98, _LARGEST - 7))
    purchases: list[_Purchase] = []
    for _ in range(draw(st.integers(1, 6))):
        purchases += dice.one_of((_scattered, _planted))(dice, rules, begin, first_user)
    purchases = purchases[:max_size]
    names = dice.order_of(range(len(purchases)))
    return [_order(dice, rules, f"o{name}", purchase) for name, purchase in zip(names, purchases, strict=True)]


def _step(dice: Dice, rules: FraudRules) -> timedelta:
    """How far apart two orders are: nothing, next to nothing, just as much as a rule allows, a little more."""
    if dice.roll(2):
        return timedelta(milliseconds=dice.roll(25_001))
    limits = [
        limit.within for limit in (rules.limits.repeat_purchase, rules.limits.sequential_users, rules.limits.coordinated_users)
    ]
    exact = [limit + nudge for limit in limits for nudge in (timedelta(0), MICROSECOND, -MICROSECOND)]
    halves = [limit / 2 for limit in limits]
    return dice.one_of([timedelta(0), MICROSECOND, *exact, *halves, rules.lateness])


def _scattered(dice: Dice, rules: FraudRules, begin: datetime, first_user: int) -> list[_Purchase]:
    """Purchases of few users, each a step from an earlier one; sometimes all of one hot product."""
    products = dice.one_of(((1,), (1, 2), (1, 2, 203)))
    quantities = (1, 1, 2, rules.limits.night_quantity.above, rules.limits.night_quantity.above + 1)
    times = [begin]
    purchases = []
    for _ in range(1 + dice.roll(12)):
        event_ts = dice.one_of(times) + _step(dice, rules) * dice.one_of((1, -1))
        times.append(event_ts)
        user = first_user + dice.roll(8)
        purchases.append(_Purchase(user, dice.one_of(products), dice.one_of(quantities), event_ts))
    return purchases


def _planted(dice: Dice, rules: FraudRules, begin: datetime, first_user: int) -> list[_Purchase]:
    """One pattern whose last order comes just in time, or one microsecond too late."""
    reason = dice.one_of(("repeat_purchase", "sequential_users", "coordinated_users"))
    within = getattr(rules.limits, reason).within
    users = _pattern_of_users(dice, rules, reason, first_user)
    span = within + dice.one_of((timedelta(0), MICROSECOND))
    start = begin + _step(dice, rules) * dice.one_of((0, 1, 3, -1))
    inner = [start + span * dice.one_of((0, 0.25, 0.5, 1)) for _ in users[2:]]
    times = [start, *inner, start + span][: len(users)]
    product, quantity = dice.one_of((1, 2)), dice.one_of((1, 2, rules.limits.night_quantity.above + 1))
    return [_Purchase(user, product, quantity, event_ts) for user, event_ts in zip(users, times, strict=True)]


def _pattern_of_users(dice: Dice, rules: FraudRules, reason: str, first_user: int) -> list[int]:
    """As many users as complete the pattern, or one too few; consecutive ones sometimes with a gap between them."""
    if reason == "repeat_purchase":
        return [first_user] * (rules.limits.repeat_purchase.orders - dice.one_of((0, 0, 1)))
    if reason == "sequential_users":
        row = [first_user + i for i in range(rules.limits.sequential_users.users)]
        return dice.order_of([*row[:-1], row[-1] + dice.one_of((0, 0, 1))])
    count = rules.limits.coordinated_users.users - dice.one_of((0, 0, 1))
    return [first_user + i for i in dice.order_of(range(8))[:count]]


def _order(dice: Dice, rules: FraudRules, order_id: str, purchase: _Purchase) -> Order:
    above = rules.limits.night_amount.above
    amount_numeric = dice.one_of((1_250_000, 0, above, above + 1, _LARGEST))
    return Order(
        order_id=order_id,
        user_id=purchase.user,
        product_id=purchase.product,
        quantity=purchase.quantity,
        amount=str(amount_numeric),
        amount_numeric=amount_numeric,
        country=dice.one_of([rules.limits.foreign_country.home] * 6 + ["ID", "US"]),
        created_date=purchase.event_ts.replace(microsecond=0),
        event_ts=purchase.event_ts,
        source=dice.one_of(_SOURCES),
    )


# --- messages -----------------------------------------------------------------------------------------------------


@st.composite
def order_sets(draw: st.DrawFn, *, on_time: bool = True, max_size: int = 40, partitions: int = 4) -> OrderSet:
    """Messages for thresholds of their own: see `rule_sets`, `orders` and `messages`."""
    rules = draw(rule_sets())
    content = draw(orders(rules, max_size=max_size))
    return OrderSet(rules, draw(messages(content, rules, on_time=on_time, partitions=partitions)))


@st.composite
def messages(
    draw: st.DrawFn, content: Sequence[Order], rules: FraudRules, *, on_time: bool = True, partitions: int = 4
) -> list[Message]:
    """The orders as they are received: some twice, in the same or other words; some ids used again for other content.

    `on_time`: every message comes within `lateness` of the newest event time received before it. Otherwise in any order.
    """
    dice = Dice(draw)
    sent = list(content)
    for order in content:
        sent += _repetitions(dice, order)
    slack = rules.lateness if on_time else timedelta(days=2)
    # Who is sent at event time + delay, with no delay above the slack, is never further than the slack behind another.
    delayed = sorted(((order.event_ts + _delay(dice, slack), place) for place, order in enumerate(sent)))
    keyed = draw(st.booleans())
    received = [sent[place] for _, place in delayed]
    anywhere = [order.product_id if keyed else dice.roll(partitions) for order in received]
    where = _beyond_doubt(received, anywhere)
    spellings = [dice.roll(6) for _ in received]
    return to_messages(received, partitions=[number % partitions for number in where], spellings=spellings)


def _delay(dice: Dice, slack: timedelta) -> timedelta:
    return dice.one_of((timedelta(0), slack, slack * (dice.roll(65_536) / 65_536)))


def _beyond_doubt(received: Sequence[Order], places: Sequence[int]) -> list[int]:
    """The places, but one place for all that use one id for different orders: so which of them came first is beyond doubt."""
    contents: dict[str, set[Order]] = defaultdict(set)
    for order in received:
        contents[order.order_id].add(replace(order, amount=""))
    first: dict[str, int] = {}
    clashing = [first.setdefault(order.order_id, place) for order, place in zip(received, places, strict=True)]
    return [
        clash if len(contents[order.order_id]) > 1 else place
        for order, clash, place in zip(received, clashing, places, strict=True)
    ]


def _repetitions(dice: Dice, order: Order) -> list[Order]:
    if dice.roll(4) < 3:
        return []
    other_content = (
        replace(order, quantity=order.quantity + 1),
        replace(order, product_id=order.product_id + 1),
        replace(order, event_ts=order.event_ts + MICROSECOND),
        replace(order, country="MY"),
    )
    return [dice.one_of((order, order, *other_content)) for _ in range(1 + dice.roll(2))]


def to_messages(
    received: Sequence[Order], *, partitions: Sequence[int] | None = None, spellings: Sequence[int] | None = None
) -> list[Message]:
    """One message an order, a millisecond apart, the first of them when the newest order is placed."""
    places = partitions or [0] * len(received)
    newest = max((order.event_ts for order in received), default=datetime(2026, 1, 1, tzinfo=UTC))
    start = newest.replace(microsecond=0) + timedelta(seconds=1)
    counts: Counter[int] = Counter()
    result = []
    for number, (order, partition) in enumerate(zip(received, places, strict=True)):
        value = spelled(order, spellings[number] if spellings else 0)
        timestamp = start + timedelta(milliseconds=number)
        key = str(order.product_id).encode()
        result.append(Message("orders", partition, counts[partition], timestamp, key, value))
        counts[partition] += 1
    return result


def spelled(order: Order, spelling: int = 0) -> bytes:
    """The order as the bytes of a message: each number is another way to say the same, 0 the plainest."""
    if spelling == 0:
        return json.dumps(_plain(order)).encode()
    choose = random.Random(spelling)
    fields = _plain(order) | {
        "user_id": choose.choice((order.user_id, f"U{order.user_id}", str(order.user_id))),
        "product_id": choose.choice((order.product_id, f"P{order.product_id}")),
        "amount": choose.choice(_amounts(order.amount_numeric)),
        "created_date": _in_zone(order.created_date, choose),
        "event_ts": _in_zone(order.event_ts, choose),
        "status": choose.choice(("Pending", "PENDING", "pending")),
    }
    if choose.random() < 0.5:
        fields["amount_numeric"] = order.amount_numeric
    if choose.random() < 0.5:
        fields["campaign"] = {"names": ["unknown to the contract", None], "weight": 1.5}
    names = choose.sample(sorted(fields), len(fields))
    indent = choose.choice((None, 1))
    return json.dumps({name: fields[name] for name in names}, indent=indent, ensure_ascii=choose.random() < 0.5).encode()


def _plain(order: Order) -> dict[str, Any]:
    return {
        "order_id": order.order_id,
        "user_id": order.user_id,
        "product_id": order.product_id,
        "quantity": order.quantity,
        "amount": order.amount,
        "country": order.country,
        "created_date": order.created_date.isoformat(),
        "event_ts": order.event_ts.isoformat(),
        "status": "Pending",
        "source": order.source,
    }


def _amounts(rupiah: int) -> tuple[str, ...]:
    dotted = f"{rupiah:,}".replace(",", ".")
    plain = (str(rupiah), f"IDR {rupiah}", f"Rp{rupiah}")
    return (*plain, dotted, f"Rp.{dotted}", f"Rp {dotted}", f"Rp. {dotted}", f"rp{dotted}", f"IDR {dotted}")


def _in_zone(moment: datetime, choose: random.Random) -> str:
    offset = timedelta(minutes=choose.choice((0, 420, -300, 345)))
    text = moment.astimezone(timezone(offset)).isoformat()
    if offset == timedelta(0):
        return text.replace("+00:00", choose.choice(("Z", "+00:00", "+00")))
    return text[:-3] + choose.choice((":", "")) + text[-2:]


# --- what may not matter ------------------------------------------------------------------------------------------


@st.composite
def shuffles(draw: st.DrawFn, items: Sequence[Item]) -> list[Item]:
    """The same items in any order."""
    return Dice(draw).order_of(items)


@st.composite
def micro_batches(draw: st.DrawFn, items: Sequence[Item]) -> list[list[Item]]:
    """The same items in the same order, cut into micro-batches of at least one."""
    dice = Dice(draw)
    cuts = sorted({1 + dice.roll(max(1, len(items) - 1)) for _ in range(dice.roll(13))})
    edges = [0, *cuts, len(items)]
    return [list(items[begin:end]) for begin, end in pairwise(edges) if begin < end]
