"""Messages that break the order contract, one of every kind, and mutations of messages that keep it."""

import json
import random
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from tests.oracle.brute_force import Message, Unreadable, read

RECEIVED = datetime(2026, 11, 1, 3, 0, 0, tzinfo=UTC)
MAX_FUTURE_SKEW = timedelta(seconds=60)


class BadMessage(NamedTuple):
    """A message value for the dead letters; the reason given there must contain `words`, in any case."""

    name: str
    value: bytes | None
    words: str


@dataclass(frozen=True)
class Mutation:
    """A good message after a mutation; `problem` is what the independent judge says is wrong with it, None: nothing."""

    name: str
    value: bytes
    problem: str | None


def good(order_id: str = "good-1", **changes: Any) -> dict[str, Any]:
    """The fields of a message that keeps the contract, but for `changes`."""
    return {
        "order_id": order_id,
        "user_id": 17,
        "product_id": "P203",
        "quantity": 2,
        "amount": "Rp.1.250.000",
        "country": "ID",
        "created_date": "2026-10-31T10:15:30+07:00",
        "event_ts": "2026-10-31T10:15:30.123456+07:00",
        "status": "Pending",
        "source": "web",
        "amount_numeric": 1_250_000,
    } | changes


def encoded(fields: Any) -> bytes:
    """As the bytes of a message."""
    return json.dumps(fields).encode()


def _without(name: str) -> bytes:
    return encoded({field: value for field, value in good().items() if field != name})


def _with(**changes: Any) -> bytes:
    return encoded(good(**changes))


def _with_raw(name: str, raw: bytes) -> bytes:
    """A field's value as raw JSON text, which `json` itself would not write."""
    return _with(**{name: "@@"}).replace(b'"@@"', raw)


_REQUIRED = [name for name in good() if name != "amount_numeric"]
_OTHER_TYPES: dict[str, tuple[Any, ...]] = {
    "order_id": (17, True, ["a"], {"a": 1}, 1.5),
    "user_id": (
        1.0,
        17.5,
        True,
        ["17"],
        {"id": 17},
        "",
        "seventeen",
        "U",
        "U1.5",
        "UU17",
        "P17",
        " 17",
        "-17",
        "+17",
        "\uff11\uff17",
    ),
    "product_id": (203.0, False, [203], {"id": 203}, "", "P", "P20.3", "U203", "203P", "0x1F"),
    "quantity": (2.0, "2", True, [2], {"n": 2}, ""),
    "amount": (1_250_000, 1.25, True, ["1250000"], {"rupiah": 1}),
    "country": (62, True, ["ID"], {"code": "ID"}),
    "created_date": (1_793_000_000, True, ["2026-10-31T10:15:30Z"], {"at": 1}),
    "event_ts": (1_793_000_000.123, False, [1_793_000_000], {"at": 1}),
    "status": (0, False, ["Pending"], {"is": "Pending"}),
    "source": (1, True, ["web"], {"from": "web"}),
    "amount_numeric": ("1250000", 1_250_000.0, True, [1_250_000], {"rupiah": 1_250_000}, ""),
}
_UNREADABLE_AMOUNTS = (
    *("-1250000", "Rp.-1.250.000", "Rp -5", "", "Rp.", "IDR", "free", "1250000 IDR", "USD 100", "$100"),
    *("1.25", "1.250.00", "12500.000", "1..250", ".250", "1.250.", "1,250,000", "Rp.1.250.000,00", "1 250 000", "1e6"),
    *(" 1250000", "1250000\n", "Rp  1250000", "IDR.1250000", "0x10", "\uff11\uff12\uff15", "+5", "Rp..5", "NaN"),
)
_UNREADABLE_TIMES = (
    *("", "yesterday", "2026-10-31", "10:15:30Z", "31/10/2026 10:15:30Z", "2026-10-31T10Z", "20261031T101530Z"),
    *("2026-13-01T10:15:30Z", "2026-02-29T10:15:30Z", "2026-10-31T24:00:00Z", "2026-10-31T10:60:30Z", "2026-10-31T10:15:60Z"),
    *("2026-10-31T10:15:30.Z", "2026-10-31T10:15.5Z", "2026-10-31T10:15:30+7", "2026-10-31T10:15:30+24:00"),
    *("2026-10-31T10:15:30+07:60", "2026-10-31T10:15:30 Asia/Jakarta", "2026-10-31T10:15:30Z ", " 2026-10-31T10:15:30Z"),
    *("0000-01-01T00:00:00Z", "0001-01-01T00:00:00+07:00", "9999-12-31T23:59:59-07:00", "12026-10-31T10:15:30Z"),
    *("2026-W44-6T10:15:30Z", "1793000000", "\uff12\uff10\uff12\uff16-10-31T10:15:30Z"),
)
_NO_OFFSET = ("2026-10-31T10:15:30", "2026-10-31 10:15:30.123456")
_BEYOND_64_BITS = 2**63


def _not_json() -> list[BadMessage]:
    whole = encoded(good())
    kinds = {
        "plain text": b"an order, please",
        "a bare word": b"pending",
        "cut off": whole[:-1],
        "cut off within a text": whole[:20],
        "single quotes": whole.replace(b'"', b"'"),
        "a comma too many": whole[:-1] + b",}",
        "a comment": whole + b" // urgent",
        "trailing bytes": whole + b"}",
        "a trailing NUL byte": whole + b"\0",
        "two objects": whole + encoded(good("good-2")),
        "two objects on two lines": whole + b"\n" + encoded(good("good-2")),
        "a byte order mark": b"\xef\xbb\xbf" + whole,
        "a form feed": b"\x0c" + whole,
        "csv": b"good-1,17,203,2,1250000,ID",
        "an Avro-like header": b"\x00\x00\x00\x00\x01" + whole,
        "NaN": _with_raw("quantity", b"NaN"),
        "Infinity": _with_raw("quantity", b"Infinity"),
        "-Infinity in an unknown field": _with_raw("weight", b"-Infinity"),
        "a leading zero": _with_raw("quantity", b"02"),
        "a leading plus": _with_raw("quantity", b"+2"),
        "a raw NUL in a text": _with_raw("source", b'"we\0b"'),
        "a raw line break in a text": _with_raw("source", b'"we\nb"'),
        "an unknown escape": _with_raw("source", rb'"we\qb"'),
        "half an escape": _with_raw("source", rb'"we\u12"'),
    }
    return [BadMessage(f"not JSON: {kind}", value, "JSON") for kind, value in kinds.items()]


def _too_deep() -> list[BadMessage]:
    kinds = {
        "lists, one level": _with_raw("path", b"[" * 100 + b"]" * 100),
        "lists and objects, one level": _with_raw("path", b'[{"a":' * 50 + b"1" + b"}]" * 50),
        "behind a text that ends in a backslash": _with_raw("path", rb'["\\",' + b"[" * 99 + b"]" * 100),
        "lists, a hundred thousand levels": _with_raw("path", b"[" * 100_000 + b"]" * 100_000),
        "objects, a hundred thousand levels": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        "never closed": b"[" * 100_000,
    }
    return [BadMessage(f"too deep: {kind}", value, "nested deeper than 100 levels") for kind, value in kinds.items()]


def _not_an_object() -> list[BadMessage]:
    values = (b"null", b"true", b"17", b'"good-1"', b"[]", b"1.5", b"[" + encoded(good()) + b"]")
    return [BadMessage(f"not an object: {value[:10].decode()}", value, "object") for value in values]


def _not_utf_8() -> list[BadMessage]:
    whole = encoded(good())
    kinds = {
        "Latin-1": _with_raw("source", b'"caf\xe9"'),
        "in a field the contract does not know": _with_raw("note", b'"\xff\xfe"'),
        "in a name the contract does not know": _with(zz=1).replace(b"zz", b"\xff\xfe"),
        "UTF-16": whole.decode().encode("utf-16"),
        "random bytes": bytes(range(128, 256)),
        "an overlong NUL": _with_raw("source", b'"we\xc0\x80b"'),
        "a surrogate as bytes": _with_raw("source", b'"we\xed\xa0\x80b"'),
    }
    escapes = {
        "half a surrogate pair": _with_raw("source", rb'"we\ud800b"'),
        "the other half of a surrogate pair": _with_raw("order_id", rb'"\udc00"'),
        "half a surrogate pair in a field the contract does not know": _with_raw("note", rb'"\ud83d\u0020"'),
    }
    return [
        *(BadMessage(f"not UTF-8: {kind}", value, "UTF-8") for kind, value in kinds.items()),
        *(BadMessage(f"an escape that is no character: {kind}", value, "") for kind, value in escapes.items()),
    ]


def _wrong_fields() -> list[BadMessage]:
    missing = [BadMessage(f"{name} missing", _without(name), name) for name in _REQUIRED]
    null = [BadMessage(f"{name} null", _with(**{name: None}), name) for name in _REQUIRED]
    wrong = [
        BadMessage(f"{name} of the wrong type: {value!r}", _with(**{name: value}), name)
        for name, values in _OTHER_TYPES.items()
        for value in values
    ]
    return [
        *missing,
        *null,
        *wrong,
        BadMessage("an empty object", b"{}", "order_id"),
        BadMessage("names in another case", _without("order_id").replace(b"{", b'{"Order_Id": "a", ', 1), "order_id"),
        BadMessage("quantity twice, the last one zero", encoded(good())[:-1] + rb', "quantit\u0079": 0}', "quantity"),
    ]


def _wrong_values() -> list[BadMessage]:
    numbers = [
        BadMessage(f"{name} {kind}", _with_raw(name, raw), name)
        for name in ("user_id", "product_id", "quantity")
        for kind, raw in (
            ("zero", b"0"),
            ("minus zero", b"-0"),
            ("negative", b"-3"),
            ("beyond 64 bits", b"9223372036854775808"),
            ("beyond 64 bits, negative", b"-9223372036854775809"),
            ("beyond 64 bits, unsigned", b"18446744073709551617"),
            ("of five thousand digits", b"9" * 5_000),
            ("with an exponent", b"1e2"),
        )
    ]
    texts = [
        BadMessage("user_id text zero", _with(user_id="U0"), "user_id"),
        BadMessage("user_id text beyond 64 bits", _with(user_id=f"U{_BEYOND_64_BITS}"), "user_id"),
        BadMessage("product_id text of five thousand digits", _with(product_id="P" + "9" * 5_000), "product_id"),
        BadMessage("order_id empty", _with(order_id=""), "order_id"),
        BadMessage("order_id too long", _with(order_id="x" * 256), "order_id"),
        BadMessage("source empty", _with(source=""), "source"),
        BadMessage("source too long", _with(source="x" * 256), "source"),
        BadMessage("source huge", _with(source="x" * 500_000), "source"),
        BadMessage("order_id with an escaped NUL", _with(order_id="good\0one"), "order_id"),
        BadMessage("source with an escaped NUL", _with(source="\0"), "source"),
        BadMessage("amount with an escaped NUL", _with(amount="1250000\0"), "amount"),
    ]
    countries = [
        BadMessage(f"country {country!r}", _with(country=country), "country")
        for country in ("", "I", "IDN", "id", "Id", "Indonesia", "12", "I D", " ID", "ID\n", "I\0", "ÎD", "\uff29\uff24")
    ]
    statuses = [
        BadMessage(f"status {status!r}", _with(status=status), "status")
        for status in ("", "Genuine", "Fraud", "Pending ", "Pend\0ing", "PENDİNG")
    ]
    return numbers + texts + countries + statuses


def _wrong_amounts() -> list[BadMessage]:
    unreadable = [
        BadMessage(f"amount {amount!r}", encoded({**good(amount=amount), "amount_numeric": None}), "amount")
        for amount in _UNREADABLE_AMOUNTS
    ]
    return [
        *unreadable,
        BadMessage("amount beyond 64 bits", _with(amount=str(_BEYOND_64_BITS), amount_numeric=_BEYOND_64_BITS), "amount"),
        BadMessage("amount beyond 64 bits, alone", _with(amount=f"Rp {_BEYOND_64_BITS}", amount_numeric=None), "amount"),
        BadMessage("amount too long", _with(amount="0" * 58 + "1250000"), "amount"),
        BadMessage("amount huge", _with(amount="1" * 500_000, amount_numeric=None), "amount"),
        BadMessage("the two amounts disagree by one", _with(amount_numeric=1_250_001), "amount"),
        BadMessage("the two amounts disagree in sign", _with(amount_numeric=-1_250_000), "amount"),
        BadMessage("amount_numeric beyond 64 bits", _with(amount_numeric=_BEYOND_64_BITS), "amount_numeric"),
        BadMessage("amount_numeric agrees modulo 64 bits", _with(amount_numeric=2**64 + 1_250_000), "amount_numeric"),
    ]


def _wrong_times() -> list[BadMessage]:
    return [
        BadMessage(f"{name} {text!r}", _with(**{name: text}), name)
        for name in ("event_ts", "created_date")
        for text in (*_UNREADABLE_TIMES, *_NO_OFFSET, "2999-01-01T00:00:00Z", "9999-12-31T23:59:59.999999Z")
    ]


BAD: list[BadMessage] = [
    BadMessage("a tombstone", None, "tombstone"),
    BadMessage("an empty message", b"", "empty"),
    BadMessage("a message of white space", b" \n\t ", "empty"),
    BadMessage("not JSON: a hexadecimal number", _with_raw("quantity", b"0x2"), ""),
    *_not_json(),
    *_too_deep(),
    *_not_an_object(),
    *_not_utf_8(),
    *_wrong_fields(),
    *_wrong_values(),
    *_wrong_amounts(),
    *_wrong_times(),
]


def unusual() -> list[tuple[str, bytes]]:
    """Messages that look odd and keep the contract, each with an order id of its own: (name, value)."""
    changes: dict[str, dict[str, Any]] = {
        "numbers as text": {"user_id": "U17", "product_id": "203"},
        "lower-case letters before the ids": {"user_id": "u17", "product_id": "p203"},
        "leading zeros in an id": {"user_id": "U000000000000000000000017"},
        "the largest numbers": {"user_id": 2**63 - 1, "product_id": 2**63 - 1, "quantity": 2**63 - 1},
        "the largest amount": {"amount": "Rp.9.223.372.036.854.775.807", "amount_numeric": 2**63 - 1},
        "an amount of nothing": {"amount": "0", "amount_numeric": 0},
        "no amount_numeric": {"amount_numeric": None},
        "an amount of 64 characters": {"amount": "0" * 57 + "1250000"},
        "PENDING": {"status": "PENDING"},
        "a long source": {"source": "é" * 255},
        "a source that needs quoting": {"source": "\\N\t\r\n\"{,}'\u2028\x01\x7f🛒"},
        "unknown fields": {"note": "hello", "path": [[[{"a": [None]}]]], "weight": 1e300},
        "a NUL in an unknown field": {"note": "a\0b"},
        "an unknown country": {"country": "ZZ"},
        "a very old order": {"event_ts": "0001-01-01T00:00:00Z", "created_date": "1900-01-01T00:00:00+07:00"},
        "half a million unknown characters": {"note": "x" * 500_000},
    }
    amounts: tuple[str, ...] = (
        "1250000",
        "1.250.000",
        "IDR 1250000",
        "IDR 1.250.000",
        "IDR1250000",
        "idr 1.250.000",
        "Rp 1.250.000",
    )
    amounts += ("Rp1.250.000", "Rp. 1.250.000", "Rp.1250000", "RP 1250000", "rp.1.250.000")
    changes |= {f"amount {amount!r}": {"amount": amount} for amount in amounts}
    times: tuple[str, ...] = (
        "2026-10-31T03:15:30Z",
        "2026-10-31 10:15:30.5+07",
        "2026-10-31t10:15:30.123456+0700",
        "2026-10-31T03:15:30z",
    )
    times += (
        "2026-10-31T03:15Z",
        "2026-10-31T03:15:30,5Z",
        "2026-10-31T03:15:30.1234567891-00:00",
        "2026-10-30T04:15:30-23:00",
        "2024-02-29T10:15:30+05:45",
    )
    changes |= {f"event_ts {text!r}": {"event_ts": text} for text in times}
    named = [(name, encoded(good(f"unusual-{number}", **change))) for number, (name, change) in enumerate(changes.items())]
    spaced = b" \r\n\t" + json.dumps(good("unusual-spaced"), indent=4).encode() + b"\n\n"
    twice = encoded(good("unusual-twice"))[:-1] + rb', "note": 1, "note": 2, "quantit\u0079": 3}'
    wrong_first = rb'{"quantity": "x", "status": null, "order_id": 7, "quantit\u0079": 0, ' + encoded(good("unusual-wrong"))[1:]
    deep = _with_raw("path", b"[" * 99 + b"]" * 99)
    brackets = _with_raw("path", json.dumps(['[{"' * 200 + "\\", "[" * 200, {"{" * 200: '"'}]).encode())
    flat = _with_raw("path", b"[" + b"[],{}," * 200 + b"1]")
    raw = json.dumps(good("unusual-raw", source="é\x7f🛒"), ensure_ascii=False).encode()
    more = {
        "white space around": spaced,
        "fields given twice": twice,
        "fields given twice, wrong the first time": wrong_first,
        "UTF-8 without escapes": raw,
        "a hundred levels": deep,
        "hundreds of brackets in texts": brackets,
        "hundreds of lists side by side": flat,
    }
    return [*named, *more.items()]


def message(value: bytes | None, *, offset: int = 0, timestamp: datetime = RECEIVED) -> Message:
    """The value as a record of the topic `orders`."""
    return Message("orders", 0, offset, timestamp, None, value)


# --- mutations ----------------------------------------------------------------------------------------------------


def mutations(
    seed: int, count: int, *, received: datetime = RECEIVED, max_future_skew: timedelta = MAX_FUTURE_SKEW
) -> list[Mutation]:
    """Good messages after one to three mutations each, as if Kafka had received them at `received`.

    Some stay good, and no two of those have the same order id.
    """
    choose = random.Random(seed)
    result: list[Mutation] = []
    order_ids: set[str | None] = set()
    while len(result) < count:
        name, value = _mutated(choose)
        order_id, problem = _opinion(message(value, timestamp=received), max_future_skew)
        if order_id is None or order_id not in order_ids:
            result.append(Mutation(name, value, problem))
            order_ids.add(order_id)
    return result


def _mutated(choose: random.Random) -> tuple[str, bytes]:
    value = encoded(good(str(uuid.UUID(int=choose.getrandbits(128))), quantity=choose.randint(1, 200)))
    chosen = choose.choices(_MUTATIONS, k=choose.choice((1, 1, 1, 2, 3)))
    for mutate in chosen:
        value = mutate(value, choose)
    return ", ".join(mutate.__name__.strip("_") for mutate in chosen), value


def _opinion(mutated: Message, max_future_skew: timedelta) -> tuple[str | None, str | None]:
    """The order id of a good message, or what is wrong with a bad one."""
    try:
        return read(mutated, max_future_skew).order_id, None
    except Unreadable as problem:
        return None, str(problem)


def _flip_a_bit(value: bytes, choose: random.Random) -> bytes:
    if not value:
        return value
    place = choose.randrange(len(value))
    return value[:place] + bytes([value[place] ^ 1 << choose.randrange(8)]) + value[place + 1 :]


def _cut_off(value: bytes, choose: random.Random) -> bytes:
    return value[: choose.randrange(len(value) + 1)]


def _leave_out(value: bytes, choose: random.Random) -> bytes:
    place = choose.randrange(len(value) + 1)
    return value[:place] + value[place + choose.choice((1, 2, 10)) :]


def _insert(value: bytes, choose: random.Random) -> bytes:
    pieces = (b"\0", b"\xff", b" ", b"\n", b"0", b"-", b".", b",", b'"', b"\\", b"{}", b"null", b"\xc3\xa9", b"1e9", b"NaN")
    place = choose.randrange(len(value) + 1)
    return value[:place] + choose.choice(pieces) + value[place:]


def _stutter(value: bytes, choose: random.Random) -> bytes:
    begin = choose.randrange(len(value) + 1)
    end = begin + choose.choice((1, 2, 3))
    return value[:end] + value[begin:]


def _replace_a_digit(value: bytes, choose: random.Random) -> bytes:
    digits = [place for place, byte in enumerate(value) if chr(byte).isdigit() and byte < 128]
    if not digits:
        return value
    place = choose.choice(digits)
    return value[:place] + choose.choice("0123456789").encode() + value[place + 1 :]


def _give_a_name_twice(value: bytes, choose: random.Random) -> bytes:
    name, other = (json.dumps(choose.choice((*_REQUIRED, "amount_numeric", "note"))) for _ in range(2))
    given = choose.choice((b'"x"', b"0", b"null", b"[{}]", b"1e400", b'"\\ud800"', b"7", b"truly", other.encode()))
    pair = name.encode() + b": " + given
    return value.replace(b"{", b"{" + pair + b", ", 1) if choose.random() < 0.7 else value[:-1] + b", " + pair + b"}"


def _change_fields(change: Callable[[dict[str, Any], random.Random], None]) -> Callable[[bytes, random.Random], bytes]:
    """A mutation of a message's fields, which leaves alone what earlier mutations made unreadable."""

    def mutate(value: bytes, choose: random.Random) -> bytes:
        try:
            fields = json.loads(value)
        except (ValueError, RecursionError):
            return value
        if not isinstance(fields, dict) or len(fields) < 2:
            return value
        change(fields, choose)
        return json.dumps(fields, ensure_ascii=choose.random() < 0.5).encode("utf-8", "surrogatepass")

    mutate.__name__ = change.__name__
    return mutate


@_change_fields
def _swap_two_values(fields: dict[str, Any], choose: random.Random) -> None:
    one, other = choose.sample(list(fields), 2)
    fields[one], fields[other] = fields[other], fields[one]


@_change_fields
def _change_a_type(fields: dict[str, Any], choose: random.Random) -> None:
    name = choose.choice(list(fields))
    value = fields[name]
    others = (str(value), [value], {"value": value}, float(len(str(value))), None, True, len(str(value)))
    fields[name] = choose.choice(others)


@_change_fields
def _drop_a_field(fields: dict[str, Any], choose: random.Random) -> None:
    del fields[choose.choice(list(fields))]


@_change_fields
def _rename_a_field(fields: dict[str, Any], choose: random.Random) -> None:
    name = choose.choice(list(fields))
    fields[choose.choice((name.upper(), name + " ", "x" + name))] = fields.pop(name)


@_change_fields
def _change_the_case(fields: dict[str, Any], choose: random.Random) -> None:
    name = choose.choice([name for name, value in fields.items() if isinstance(value, str)] or list(fields))
    fields[name] = str(fields[name]).swapcase()


@_change_fields
def _put_in_an_extreme(fields: dict[str, Any], choose: random.Random) -> None:
    extremes = (0, -1, 1, 2**31, 2**63 - 1, 2**63, 2**64 + 1, "", "0", "é" * 300, "\0", "2026-10-31T00:00:00", "U1", 1e308)
    fields[choose.choice(list(fields))] = choose.choice(extremes)


_MUTATIONS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _flip_a_bit,
    _cut_off,
    _leave_out,
    _insert,
    _stutter,
    _replace_a_digit,
    _swap_two_values,
    _change_a_type,
    _drop_a_field,
    _rename_a_field,
    _change_the_case,
    _put_in_an_extreme,
    _give_a_name_twice,
)
