"""What is left of a message of somebody who is forgotten: as much as verdicts, and the proof of them, are made of.

Of an order that is what the contract names; other fields, declared or not, values that a later one of the same name has
replaced, headers and a key of its own go. Of a message that breaks the contract nothing is left but whose it was: it still
breaks it.
"""

import json
import re
from collections.abc import Set
from datetime import timedelta
from typing import Any, NamedTuple

import msgspec
import numpy as np
import polars as pl
import pyarrow as pa

from conf.conditions import Declared
from streaming.contract import FIELDS, LABEL_HEADER, LATEST, NO_TIMESTAMP, NOTHING_DECLARED, read_messages

# The header of a message that is not as it was received any more; its value says since when.
ERASED_HEADER = "forgotten"

Header = dict[str, Any]  # `key` is a text, `value` bytes or None

_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_anything = msgspec.json.Decoder().decode
# Where a message cannot be read, whose it is says this.
_USER = re.compile(rb'"user_id"\s*:\s*"?[Uu]?0*([0-9]{1,19})(?![0-9])')
_USER_TEXT = re.compile(r"[Uu]?0*([0-9]{1,19})")
_LABEL = re.compile(rb"[a-z][a-z0-9_]*(,[a-z][a-z0-9_]*)*")


class Left(NamedTuple):
    """What is left of a message.

    Attributes:
        value, key, headers: what stands in their place.
        is_dead_letter: whether it breaks the contract.
        is_new: whether something of it was erased just now.
    """

    value: bytes
    key: bytes | None
    headers: list[Header] | None
    is_dead_letter: bool
    is_new: bool


def left_of(
    messages: pa.RecordBatch, users: Set[int], erased_at: str, declared: Declared = NOTHING_DECLARED
) -> dict[int, Left]:
    """Row → what is left of that message: of those of these users that hold more, and of all of theirs that break the contract.

    Args:
        messages: columns `value`, `key` and `headers`, as bronze has them.
        users: who is forgotten.
        erased_at: the time that marks what is erased now, as text.
        declared: the fields that were declared when they were received.
    """
    values, keys, headers = (messages.column(name) for name in ("value", "key", "headers"))
    left = {}
    for row, user_id, is_dead_letter in _messages_of(values, users, declared):
        value, key, given = values[row].as_py(), keys[row].as_py(), headers[row].as_py()
        kept = dead_letter_of(user_id) if is_dead_letter else _order_alone(value)
        kept_key = None if is_dead_letter else _key_alone(key, kept)
        kept_headers = None if given is None else [header for header in given if _is_ours(header)]
        is_new = (kept, kept_key, kept_headers) != (value, key, given)
        if is_new and not any(header["key"] == ERASED_HEADER for header in kept_headers or ()):
            kept_headers = [*(kept_headers or ()), {"key": ERASED_HEADER, "value": erased_at.encode()}]
        if is_new or is_dead_letter:
            left[row] = Left(kept, kept_key, kept_headers, is_dead_letter, is_new)
    return left


def dead_letter_of(user_id: int) -> bytes:
    """What is left of a message that breaks the contract; which it still does, and says whose it was."""
    return b'forgotten, of "user_id": %d' % user_id


def _messages_of(values: pa.Array, users: Set[int], declared: Declared) -> list[tuple[int, int, bool]]:
    """The messages of these users: row, user, and whether it breaks the contract; no time does, as all have long been read."""
    count = len(values)
    read = read_messages(
        pa.record_batch(
            {
                "topic": pa.array([""] * count, pa.string()),
                "partition": pa.array(np.zeros(count, np.int32)),
                "offset": pa.array(np.arange(count, dtype=np.int64)),
                "timestamp": pa.array([NO_TIMESTAMP] * count, pa.timestamp("us", "UTC")),
                "value": values,
            }
        ),
        timedelta(0),
        LATEST,
        declared,
    )
    orders = read.orders.filter(pl.col("user_id").is_in(list(users))).select("offset", "user_id").iter_rows()
    found = [(row, user_id, False) for row, user_id in orders]
    for row, value in read.dead_letters.select("offset", "value").iter_rows():
        found += [(row, user_id, True) for user_id in sorted(_users_in(value) & users)[:1]]
    return found


def _users_in(value: bytes | None) -> set[int]:
    """Whose a message that breaks the contract is, as far as it says so."""
    if not value:
        return set()
    found = {int(digits) for digits in _USER.findall(value)}
    try:
        given = _anything(value)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return found
    match = _USER_TEXT.fullmatch(str(given.get("user_id", ""))) if isinstance(given, dict) else None
    return found | {int(match[1])} if match else found


def _order_alone(value: bytes) -> bytes:
    """An order without what the contract does not name; the same bytes where there is nothing else."""
    if not _holds_more(value):
        return value
    given = _fields(value)
    return msgspec.json.encode({name: given[name] for name in FIELDS if name in given})


def _holds_more(value: bytes) -> bool:
    """Whether there are other fields, or one of a name that comes twice, of which the last counts."""
    try:
        names = [name for name, _ in json.loads(value, object_pairs_hook=list)]
    except ValueError:  # a number, in some field that is not ours, that Python would not read
        return True
    return len(names) != len(set(names)) or not set(names) <= set(FIELDS)


def _key_alone(key: bytes | None, order: bytes) -> bytes | None:
    """A key that is one of the order's own ids; None in the place of any other."""
    given = _anything(order)
    ids = {str(given[name]).encode() for name in ("order_id", "user_id", "product_id")}
    digits = {re.sub(rb"^[A-Za-z]?0*", b"", one) for one in ids}
    return key if key in ids | digits else None


def _is_ours(header: Header) -> bool:
    value = header["value"] or b""
    return header["key"] == ERASED_HEADER or (header["key"] == LABEL_HEADER and _LABEL.fullmatch(value) is not None)
