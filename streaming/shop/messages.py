"""Synthetic orders as Kafka messages; on demand some come twice, and messages that break the contract come between them."""

from collections.abc import Callable
from itertools import cycle, islice
from operator import itemgetter
from typing import Any, NamedTuple
from uuid import UUID

import msgspec
import numpy as np
import polars as pl

from streaming.contract import LABEL_HEADER
from streaming.shop.orders import PARTNER

ORDER, DUPLICATE = "order", "duplicate"  # the kinds of messages that keep the contract

_LATEST_DELAY = 1_000  # orders after which a repeated or broken message has come, at the latest
_FIELDS = (
    "order_id",
    "user_id",
    "product_id",
    "quantity",
    "amount",
    "country",
    "created_date",
    "event_ts",
    "status",
    "source",
)

Fields = dict[str, Any]
_encode = msgspec.json.encode


class Message(NamedTuple):
    """What goes to Kafka, and what it is.

    Attributes:
        due: seconds after the start at which it is to be sent.
        kind: `order`, `duplicate`, or the way in which it breaks the contract (a key of BREAKS).
        key: the product's id.
        value: JSON of an order; anything, or nothing, where it breaks the contract.
        label: reasons of a planted fraud, sorted, joined by commas; None otherwise.
    """

    due: float
    kind: str
    key: bytes
    value: bytes | None
    label: str | None

    @property
    def headers(self) -> list[tuple[str, bytes]]:
        """Kafka headers: the label, where there is one."""
        return [(LABEL_HEADER, self.label.encode())] if self.label else []


def _without(name: str) -> Callable[[Fields], bytes]:
    return lambda order: _encode({field: value for field, value in order.items() if field != name})


def _with(**fields: Any) -> Callable[[Fields], bytes]:
    return lambda order: _encode(order | fields)


# Each takes the fields of an order whose id was never used, and breaks the contract in one way.
BREAKS: dict[str, Callable[[Fields], bytes | None]] = {
    "cut_short": lambda order: _encode(order)[:-20],
    "not_an_object": lambda order: _encode([order]),
    "missing_field": _without("user_id"),
    "null_field": _with(country=None),
    "wrong_type": _with(quantity="two"),
    "quantity_zero": _with(quantity=0),
    "unreadable_amount": _with(amount="Rp.1.25.00"),
    "amounts_disagree": _with(amount="Rp.1.250.000", amount_numeric=1_250_001),
    "no_offset": lambda order: _encode(order | {"event_ts": order["event_ts"][:-6]}),
    "far_future": _with(event_ts="2999-01-01T00:00:00.000000+07:00"),
    "nul_character": _with(source="web\0"),
    "not_utf8": lambda order: _encode(order).replace(b'"Pending"', b'"Pend\xffing"'),
    "empty": lambda order: b"",
    "tombstone": lambda order: None,
}
USED_ORDER_ID = "used_order_id"  # breaks the contract too: other content under the id of an order that went before


def messages(orders: pl.DataFrame, rng: np.random.Generator, *, broken: float, duplicates: float) -> list[Message]:
    """The orders of a batch as messages, in the order in which they are to be sent.

    Args:
        orders: a frame of `order_batches`.
        rng: decides which orders come twice, and which messages break the contract.
        broken: messages that break the contract, as a share of the orders; the ways to break it take turns.
        duplicates: orders that come twice, the same bytes each time, as a share of the orders.

    Returns:
        Every order once, and at most a thousand orders later what it gave rise to, with the same key: so it lies behind
        its order in the same partition.
    """
    fields = _fields(orders)
    keys = [b"%d" % product for product in orders["product_id"]]
    plain = [
        Message(due, ORDER, key, _encode(order), label)
        for due, key, order, label in zip(orders["due"], keys, fields, orders["label"], strict=True)
    ]
    followers = [(row, plain[row]._replace(kind=DUPLICATE)) for row in _some(rng, len(plain), duplicates)]
    kinds = islice(cycle((*BREAKS, USED_ORDER_ID)), int(rng.integers(len(BREAKS) + 1)), None)
    for row, kind in zip(_some(rng, len(plain), broken), kinds, strict=False):
        value = _broken(kind, fields[row], rng)
        followers.append((row, plain[row]._replace(kind=kind, value=value, label=None)))
    return _interleaved(plain, followers, rng)


def _fields(orders: pl.DataFrame) -> list[Fields]:
    """The contract's fields of each order, as they go into JSON."""
    iso_8601 = pl.col("created_date", "event_ts").dt.to_string("%Y-%m-%dT%H:%M:%S%.6f%:z")
    rows = orders.select(_FIELDS).with_columns(iso_8601).to_dicts()
    for order in rows:
        if order["source"] == PARTNER:
            order["user_id"], order["product_id"] = f"U{order['user_id']}", f"P{order['product_id']}"
    return rows


def _some(rng: np.random.Generator, rows: int, share: float) -> list[int]:
    return np.flatnonzero(rng.random(rows) < share).tolist()


def _broken(kind: str, order: Fields, rng: np.random.Generator) -> bytes | None:
    if kind == USED_ORDER_ID:
        return _encode(order | {"quantity": order["quantity"] + 1})
    return BREAKS[kind](order | {"order_id": str(UUID(bytes=rng.bytes(16), version=4))})


def _interleaved(plain: list[Message], followers: list[tuple[int, Message]], rng: np.random.Generator) -> list[Message]:
    """Each follower some way behind the order at its row, due together with the order that it comes after."""
    last = len(plain) - 1
    delays = rng.integers(1, _LATEST_DELAY + 1, size=len(followers)).tolist()
    placed = [(min(row + delay, last), message) for (row, message), delay in zip(followers, delays, strict=True)]
    late = [(place, message._replace(due=plain[place].due)) for place, message in placed]
    together = [*enumerate(plain), *late]
    return [message for _, message in sorted(together, key=itemgetter(0))]
