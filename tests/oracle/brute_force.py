"""The independent judge: the order contract and the rules read once more, over the whole set of messages at once.

Plain Python, and obviously right rather than fast: no stream, no state, no batches, no vectors. It shares nothing but
the rules file with what it judges, and leaves conditions to DuckDB. Where the design leaves a choice, the choice stands as a
comment beside the code.
"""

import json
import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from functools import lru_cache
from typing import Any
from zoneinfo import ZoneInfo

import duckdb
import pyarrow as pa

from conf.lists import unpacked
from conf.rules import FraudRules

Place = tuple[str, int, int]

_LARGEST = 2**63 - 1
_MOST_LEVELS = 100
NO_TIMESTAMP = datetime(1969, 12, 31, 23, 59, 59, 999_000, UTC)  # -1 milliseconds: sent without one
LONG_AFTER = datetime(9000, 1, 1, tzinfo=UTC)  # when it is read: so late that it bounds no time of an order
_REQUIRED = (
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


class Unreadable(ValueError):
    """A message breaks the order contract; the text says how."""


@dataclass(frozen=True)
class Message:
    """One record of the `orders` topic; `timestamp` is Kafka's own, with its zone.

    One before the year 1 or after the year 9999 counts as the first or last moment that there is.
    """

    topic: str
    partition: int
    offset: int
    timestamp: datetime
    key: bytes | None
    value: bytes | None

    @property
    def place(self) -> Place:
        """Where the message lies: no other message has the same."""
        return self.topic, self.partition, self.offset


@dataclass(frozen=True)
class Order:
    """A message that keeps the contract: times in UTC, `amount_numeric` in rupiah."""

    order_id: str
    user_id: int
    product_id: int
    quantity: int
    amount: str
    amount_numeric: int
    country: str
    created_date: datetime
    event_ts: datetime
    source: str

    @property
    def content(self) -> tuple[object, ...]:
        """What must be equal for "the same order again".

        The spelling of the amount is not part of it: `Rp.1.000` and `IDR 1000` are the same money.
        """
        return (
            self.user_id,
            self.product_id,
            self.quantity,
            self.amount_numeric,
            self.country,
            self.created_date,
            self.event_ts,
            self.source,
        )


@dataclass(frozen=True)
class Verdict(Order):
    """An order with its final status and its sorted reasons: what `raw_orders` must hold in the end."""

    status: str
    reasons: list[str]
    suppressed_reasons: list[str]


@dataclass(frozen=True)
class Judgement:
    """What must come of a set of messages: a verdict an order, a reason a dead letter, and how many changed nothing."""

    orders: dict[str, Verdict]
    dead_letters: dict[Place, str]
    duplicates: int


def kafka_order(message: Message) -> tuple[datetime, int, int]:
    """Sorts messages by Kafka's timestamp, then by partition and offset."""
    return message.timestamp, message.partition, message.offset


def as_given(_message: Message) -> int:
    """Sorts nothing: the messages were received in the order in which they are handed over."""
    return 0


def judge(
    messages: Iterable[Message],
    rules: FraudRules,
    *,
    received: Callable[[Message], Any] = kafka_order,
    read_at: datetime = LONG_AFTER,
) -> Judgement:
    """Read and screen a whole set of messages, all of them read at `read_at`.

    `received` is the sort key that says which of several messages with one order id came first: it stands, the others
    are duplicates when they say the same and dead letters otherwise. A dead letter counts for no rule.
    """
    orders: dict[str, Order] = {}
    dead_letters: dict[Place, str] = {}
    duplicates = 0
    for message in sorted(messages, key=received):
        try:
            order = read(message, rules.max_future_skew, read_at)
        except Unreadable as problem:
            dead_letters[message.place] = str(problem)
            continue
        first = orders.setdefault(order.order_id, order)
        if first.content != order.content:
            dead_letters[message.place] = f"order_id {order.order_id!r} was used before, with other content"
        elif first is not order:
            duplicates += 1
    return Judgement(screen(orders.values(), rules), dead_letters, duplicates)


# --- the order contract -------------------------------------------------------------------------------------------


def read(message: Message, max_future_skew: timedelta, read_at: datetime = LONG_AFTER) -> Order:
    """The order in a message that is read at `read_at`.

    Raises:
        Unreadable: the message breaks the contract.
    """
    fields = _json_object(message.value)
    for name in _REQUIRED:
        if name not in fields:
            raise Unreadable(f"{name} is missing")
        if fields[name] is None:
            raise Unreadable(f"{name} is null")
    amount_numeric = _rupiah(fields["amount"])
    _check_agreement(fields.get("amount_numeric"), amount_numeric)
    _check_pending(fields["status"])
    # A producer's clock may be ahead, or it gives no time at all: then the time of reading has to do.
    received = read_at if message.timestamp == NO_TIMESTAMP else min(message.timestamp, read_at)
    latest = received + max_future_skew
    return Order(
        order_id=_text("order_id", fields["order_id"]),
        user_id=_identifier("user_id", "U", fields["user_id"]),
        product_id=_identifier("product_id", "P", fields["product_id"]),
        quantity=_at_least_one("quantity", fields["quantity"]),
        amount=fields["amount"],
        amount_numeric=amount_numeric,
        country=_country(fields["country"]),
        created_date=_moment("created_date", fields["created_date"], latest),
        event_ts=_moment("event_ts", fields["event_ts"], latest),
        source=_text("source", fields["source"]),
    )


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as its names and values, in order and with repetitions; a JSON array is a plain list."""


def _json_object(value: bytes | None) -> dict[str, Any]:
    if value is None:
        raise Unreadable("a tombstone: the message has no value")
    if not value.strip():
        raise Unreadable("the message is empty")
    try:
        text = value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Unreadable(f"not UTF-8: byte {error.start}") from error
    if text.count("[") + text.count("{") > _MOST_LEVELS and _depth(text) > _MOST_LEVELS:
        raise Unreadable(f"nested deeper than {_MOST_LEVELS} levels")
    parsed = _parse(text)
    if not isinstance(parsed, _Pairs):
        raise Unreadable("not a JSON object")
    # A name given twice means its last value, as nearly every reader of JSON has it: those before it may be anything.
    return dict(parsed)


def _depth(text: str) -> int:
    """How many objects and arrays are open at once, at most; brackets in texts are letters."""
    depth = deepest = 0
    in_text = is_escaped = False
    for letter in text:
        if in_text:
            in_text = is_escaped or letter != '"'
            is_escaped = letter == "\\" and not is_escaped
        elif letter == '"':
            in_text = True
        elif letter in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif letter in "]}":
            depth -= 1
    return deepest


def _parse(text: str) -> Any:
    try:
        # Strict JSON: Python's NaN and Infinity are none, and a byte order mark (json refuses it) is no white space.
        parsed = json.loads(text, object_pairs_hook=_Pairs, parse_int=_json_integer, parse_constant=_no_json_number)
        # An escape such as \ud800 alone is no character, wherever it stands: it could not be written as UTF-8 again.
        json.dumps(parsed, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise Unreadable("not UTF-8: half a surrogate pair in an escape") from error
    except ValueError as error:
        raise Unreadable(f"not JSON: {error}") from error
    return parsed


def _json_integer(digits: str) -> int:
    # Thirty digits are beyond 64 bits whatever follows, and Python refuses to convert thousands of them.
    return int(digits[:30])


def _no_json_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _text(name: str, value: Any, longest: int = 255) -> str:
    if not isinstance(value, str):
        raise Unreadable(f"{name} must be text")
    if "\0" in value:
        raise Unreadable(f"{name} has a NUL character")
    if not 1 <= len(value) <= longest:
        raise Unreadable(f"{name} must have 1 to {longest} characters, not {len(value)}")
    return value


def _integer(name: str, value: Any) -> int:
    # 1.0 and 1e3 are no integers, true is no number, and "3" is text.
    if type(value) is not int:
        raise Unreadable(f"{name} must be an integer")
    if not -_LARGEST - 1 <= value <= _LARGEST:
        raise Unreadable(f"{name} is beyond 64 bits")
    return value


def _at_least_one(name: str, value: Any) -> int:
    if _integer(name, value) < 1:
        raise Unreadable(f"{name} must be at least 1, not {value}")
    return int(value)


def _identifier(name: str, prefix: str, value: Any) -> int:
    # Text is the digits, after the field's own letter or none: P203 is no user. The letter's case does not matter.
    if not isinstance(value, str):
        return _at_least_one(name, value)
    match = re.fullmatch(f"[{prefix}{prefix.lower()}]?([0-9]+)", value)
    if match is None:
        raise Unreadable(f"{name} must be an integer or text such as {prefix}17")
    return _at_least_one(name, _json_integer(match[1].lstrip("0") or "0"))


def _rupiah(value: Any) -> int:
    # Rp, Rp. or IDR in any case, or nothing; at most one space; then digits, with a dot before every three or without.
    text = _text("amount", value, longest=64)
    match = re.fullmatch(r"(?:rp\.? ?|idr ?)?([0-9]+|[0-9]{1,3}(?:\.[0-9]{3})+)", text, re.IGNORECASE | re.ASCII)
    if match is None:
        problem = "is negative" if "-" in text else "cannot be read"
        raise Unreadable(f"amount {problem}: {text!r}")
    rupiah = int(match[1].replace(".", ""))
    if rupiah > _LARGEST:
        raise Unreadable(f"amount is beyond 64 bits: {text!r}")
    return rupiah


def _check_agreement(given: Any, amount_numeric: int) -> None:
    # The field is optional: null says as little as its absence.
    if given is not None and _integer("amount_numeric", given) != amount_numeric:
        raise Unreadable(f"amount_numeric is {given} and amount is {amount_numeric}: they must agree")


def _check_pending(value: Any) -> None:
    if _text("status", value).lower() != "pending":
        raise Unreadable(f"status must be Pending, not {value!r}")


def _country(value: Any) -> str:
    # The shape of ISO 3166 alpha-2, not its list: the list changes, and a foreign country is Fraud anyway.
    text = _text("country", value)
    if re.fullmatch("[A-Z]{2}", text) is None:
        raise Unreadable(f"country must be two letters such as ID, not {text!r}")
    return text


# ISO 8601's extended format of calendar dates: seconds may be left out, a fraction of them follows a dot or a comma.
# As RFC 3339 has it, t, z and a space will do. Digits after the sixth are cut off, not rounded.
_ISO_8601 = re.compile(
    r"(?P<day>[0-9]{4}-[0-9]{2}-[0-9]{2})[Tt ](?P<minute>(?:[01][0-9]|2[0-3]):[0-5][0-9])"
    r"(?::(?P<second>[0-5][0-9])(?:[.,](?P<fraction>[0-9]+))?)?"
    r"(?P<offset>[Zz]|(?P<sign>[+-])(?P<hours>[01][0-9]|2[0-3])(?::?(?P<minutes>[0-5][0-9]))?)?"
)


def _moment(name: str, value: Any, latest: datetime) -> datetime:
    if not isinstance(value, str):
        raise Unreadable(f"{name} must be text")
    match = _ISO_8601.fullmatch(value)
    if match is None:
        raise Unreadable(f"{name} is not an ISO 8601 time: {value!r}")
    if match["offset"] is None:
        raise Unreadable(f"{name} has no offset from UTC: {value!r}")
    ahead = timedelta(hours=int(match["hours"] or 0), minutes=int(match["minutes"] or 0))
    zone = timezone(-ahead if match["sign"] == "-" else ahead)
    microsecond = int((match["fraction"] or "0")[:6].ljust(6, "0"))
    try:
        local = datetime.fromisoformat(f"{match['day']}T{match['minute']}:{match['second'] or '00'}")
        moment = local.replace(microsecond=microsecond, tzinfo=zone).astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise Unreadable(f"{name} is not a time that exists: {value!r}") from error
    if moment > latest:
        raise Unreadable(f"{name} is too far in the future: {value!r}")
    return moment


# --- the rules ----------------------------------------------------------------------------------------------------


def screen(orders: Iterable[Order], rules: FraudRules) -> dict[str, Verdict]:
    """The verdict of every order, given all orders: each has an order id of its own."""
    everything = list(orders)
    hits = {name: _hits(orders, name, rules) for name, orders in _selected(everything, rules.rules, rules).items()}
    verdicts = {}
    for order in everything:
        found = sorted(reason for reason, orders in hits.items() if order.order_id in orders)
        suppressed = [reason for reason in found if _is_suppressed(order, reason, rules)]
        reasons = [reason for reason in found if reason not in suppressed]
        verdicts[order.order_id] = Verdict(**vars(order), **_said(reasons, suppressed))
    return verdicts


def _said(reasons: list[str], suppressed: list[str]) -> dict[str, Any]:
    return {"status": "Fraud" if reasons else "Genuine", "reasons": reasons, "suppressed_reasons": suppressed}


def _is_suppressed(order: Order, reason: str, rules: FraudRules) -> bool:
    for name, entry in rules.lists.items():
        if entry.allows and reason in entry.allows.reasons:
            for value, holds_until in _listed(name, rules):
                if value == str(getattr(order, entry.allows.by)) and (holds_until is None or order.event_ts < holds_until):
                    return True
    return False


def _listed(name: str, rules: FraudRules) -> list[tuple[str, datetime | None]]:
    """What a list holds, and until when."""
    values, _, expiries = unpacked(rules.lists[name].content)
    start = datetime(1970, 1, 1, tzinfo=UTC)
    return [
        (value, None if expiry is None else start + timedelta(microseconds=expiry))
        for value, expiry in zip(values, expiries, strict=True)
    ]


def hits_of(orders: list[Order], name: str, rules: FraudRules) -> set[str]:
    """The ids of the orders that a rule hits."""
    return _hits(_selected(orders, [name], rules).get(name, []), name, rules)


def _hits(taking_part: list[Order], name: str, rules: FraudRules) -> set[str]:
    """The ids of those that a rule hits of the orders that its condition selects."""
    rule = rules.rules[name]
    if rule.by is None:
        return {order.order_id for order in taking_part}
    taking_part = [order for order in taking_part if all(_value(order, field, rules) is not None for field in rule.by)]
    for pattern, hits in (
        (rule.count, _crowd),
        (rule.distinct, _different),
        (rule.consecutive, _row_of_values),
        (rule.sum, _large_sum),
    ):
        if pattern is not None:
            return hits(taking_part, rule.by, pattern, rules)
    raise AssertionError(name)


def _together(orders: list[Order], by: Iterable[str], within: timedelta, rules: FraudRules) -> Iterator[list[Order]]:
    return _intervals(orders, lambda order: tuple(_value(order, field, rules) for field in by), within)


def _crowd(orders: list[Order], by: Iterable[str], pattern: Any, rules: FraudRules) -> set[str]:
    found = set()
    for together in _together(orders, by, pattern.within, rules):
        if len(together) >= pattern.at_least:
            found |= {order.order_id for order in together}
    return found


def _different(orders: list[Order], by: Iterable[str], pattern: Any, rules: FraudRules) -> set[str]:
    found = set()
    having = [order for order in orders if _value(order, pattern.of, rules) is not None]
    for together in _together(having, by, pattern.within, rules):
        if len({_value(order, pattern.of, rules) for order in together}) >= pattern.at_least:
            found |= {order.order_id for order in together}
    return found


def _row_of_values(orders: list[Order], by: Iterable[str], pattern: Any, rules: FraudRules) -> set[str]:
    found = set()
    having = [order for order in orders if _value(order, pattern.of, rules) is not None]
    for together in _together(having, by, pattern.within, rules):
        values = {_value(order, pattern.of, rules) for order in together}
        for first in values:
            row = set(range(first, first + pattern.at_least))
            if row <= values:
                found |= {order.order_id for order in together if _value(order, pattern.of, rules) in row}
    return found


def _large_sum(orders: list[Order], by: Iterable[str], pattern: Any, rules: FraudRules) -> set[str]:
    found = set()
    values = {order.order_id: _value(order, pattern.of, rules) for order in orders}
    having = [order for order in orders if values[order.order_id] is not None and values[order.order_id] >= 0]
    for together in _together(having, by, pattern.within, rules):
        if sum(values[order.order_id] for order in together) >= pattern.at_least:
            found |= {order.order_id for order in together}
    return found


def _value(order: Order, field: str, rules: FraudRules) -> Any:
    if not field.startswith("local_"):
        return getattr(order, field)
    local = _local(order.event_ts, ZoneInfo(rules.time_zone))
    match field:
        case "local_hour":
            return local.hour
        case "local_weekday":
            # A day was added to what lies in year 1: its weekday is that of the day before.
            return (local.isoweekday() - 2) % 7 + 1 if order.event_ts.year == 1 else local.isoweekday()
        case _:
            return local.date()


# Integers have 128 bits there, so that no product of two is too large; times are in UTC, and say no zone.
_COLUMNS = {
    "order_id": "varchar",
    "user_id": "hugeint",
    "product_id": "hugeint",
    "quantity": "hugeint",
    "amount": "varchar",
    "amount_numeric": "hugeint",
    "country": "varchar",
    "created_date": "timestamp",
    "event_ts": "timestamp",
    "source": "varchar",
    "local_hour": "bigint",
    "local_weekday": "bigint",
    "local_date": "date",
}


def _selected(orders: list[Order], names: Iterable[str], rules: FraudRules) -> dict[str, list[Order]]:
    """Of each rule that is not off the orders that its condition selects: another database is asked, with their texts."""
    conditions = {name: rules.rules[name].when for name in names if rules.rules[name].mode != "off"}
    texts = [text for text in dict.fromkeys(conditions.values()) if text is not None]
    answers = dict(zip(texts, _answers(orders, texts, rules), strict=True)) if orders and texts else {}
    return {
        name: list(orders) if text is None else [order for order, yes in zip(orders, answers.get(text, ()), strict=True) if yes]
        for name, text in conditions.items()
    }


def _answers(orders: list[Order], conditions: list[str], rules: FraudRules) -> Iterable[tuple[bool | None, ...]]:
    """Of each condition, whether it holds of each order; None, which is no yes, where it looks at what an order lacks."""
    looked_at = {"event_ts", *re.findall(r"\w+", " ".join(conditions))} & _COLUMNS.keys()
    columns = {name: [_value(order, name, rules) for order in orders] for name in looked_at}
    for name in looked_at & {"user_id", "product_id", "quantity", "amount_numeric"}:
        columns[name] = [str(value) for value in columns[name]]
    for name in looked_at & {"created_date", "event_ts"}:
        columns[name] = [value.replace(tzinfo=None) for value in columns[name]]
    casts = ", ".join(f"cast({name} as {_COLUMNS[name]}) as {name}" for name in columns)
    database = _database()
    database.register("given", pa.table(columns | {"place": range(len(orders))}))
    for name in re.findall(r"listed\(\w+, '(\w+)'\)", " ".join(conditions)):
        entries = [(value, until and until.replace(tzinfo=None)) for value, until in _listed(name, rules)]
        until = pa.array([until for _, until in entries], pa.timestamp("us"))
        database.register(f"list_{name}", pa.table({"value": [value for value, _ in entries], "until": until}))
    asked = re.sub(
        r"listed\((\w+), '(\w+)'\)",
        r"(cast(\1 as varchar) in (select value from list_\2 where until is null or given.event_ts < until))",
        ", ".join(f"({condition})" for condition in conditions),
    )
    found = database.execute(f"select {asked} from (select {casts}, place from given) as given order by place").fetchall()
    return zip(*found, strict=True)


@lru_cache(maxsize=1)
def _database() -> duckdb.DuckDBPyConnection:
    """One for all conditions: to open one takes longer than most questions."""
    return duckdb.connect(config={"threads": 1, "autoinstall_known_extensions": False, "ieee_floating_point_ops": False})


def _local(moment: datetime, zone: ZoneInfo) -> datetime:
    # The first hours of year 1 have no local date west of Greenwich; a day later the clock shows the same time.
    return (moment + timedelta(days=1) if moment.year == 1 else moment).astimezone(zone)


def _intervals(orders: list[Order], group: Callable[[Order], Hashable], within: timedelta) -> Iterator[list[Order]]:
    """Of each group, the orders in the interval that starts at one of its orders and ends `within` later, ends included.

    Any other interval of that length holds no more than the one that starts at its own first order.
    """
    groups = defaultdict(list)
    for order in orders:
        groups[group(order)].append(order)
    for members in groups.values():
        in_time = sorted(members, key=lambda order: (order.event_ts, order.order_id))
        for place in range(len(in_time)):
            yield _interval(in_time, place, within)


def _interval(in_time: list[Order], place: int, within: timedelta) -> list[Order]:
    begin = in_time[place].event_ts
    end = bisect_right(in_time, within, key=lambda order: order.event_ts - begin)
    return in_time[place:end]
