"""The order contract: bytes from Kafka become orders, or dead letters with a reason a person understands.

This is the trust boundary. Every message is decoded on its own by a typed decoder (one C call each), because decoding
many at once lets malformed neighbours cancel each other out; every further check works on whole columns.
"""

import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from operator import attrgetter
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np
import polars as pl
import pyarrow as pa

from conf.conditions import Declared, DeclaredKind

BIGINT_MAX = 2**63 - 1
UTC_MICROSECONDS = pl.Datetime("us", "UTC")

# What a verdict says of an order: Fraud where it has a reason.
GENUINE, FRAUD = "Genuine", "Fraud"

# The Kafka header in which a planted fraud carries the reasons it was planted for, separated by commas.
LABEL_HEADER = "label"

# What a message from Kafka must bring: the columns of Spark's Kafka source that are read.
MESSAGE_COLUMNS = ("topic", "partition", "offset", "timestamp", "value")

# What Postgres, Spark and Python can all hold. A Kafka timestamp beyond it counts as the first or the last moment of it.
EARLIEST, LATEST = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)
_EARLIEST_US, _LATEST_US = ((end - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1) for end in (EARLIEST, LATEST))
# The timestamp of a message that was sent without one: -1 milliseconds.
NO_TIMESTAMP = datetime(1969, 12, 31, 23, 59, 59, 999_000, UTC)

# JSON nested deeper is refused. The decoder's own limit is the interpreter's: another one in each version of Python, and
# lower the deeper the call.
MOST_LEVELS = 100

# How the reason for an order from the future names the time of reading, where it is that which bounds it.
TIME_OF_READING = r"lies in the future of (\S+), when it was read"

# An order as it travels: its own fields, those of the declared ones that it has (`attributes`: a JSON object by name, in the
# order of the names; null where it has none), and where and when Kafka received it.
ORDER_SCHEMA = pl.Schema(
    {
        "order_id": pl.String(),
        "user_id": pl.Int64(),
        "product_id": pl.Int64(),
        "quantity": pl.Int64(),
        "amount": pl.String(),
        "amount_numeric": pl.Int64(),
        "country": pl.String(),
        "created_date": UTC_MICROSECONDS,
        "event_ts": UTC_MICROSECONDS,
        "source": pl.String(),
        "attributes": pl.String(),
        "partition": pl.Int32(),
        "offset": pl.Int64(),
        "received_at": UTC_MICROSECONDS,
    }
)

NO_ORDERS = pl.DataFrame(schema=ORDER_SCHEMA)

# What makes two messages with one order_id the same order. The text of the amount is presentation, its value is not. Declared
# fields are not content: which are declared changes, and an order that is read once more has to stay the same.
CONTENT = (
    "user_id",
    "product_id",
    "quantity",
    "amount_numeric",
    "country",
    "created_date",
    "event_ts",
    "source",
)

DEAD_LETTER_SCHEMA = pl.Schema(
    {
        "topic": pl.String(),
        "partition": pl.Int32(),
        "offset": pl.Int64(),
        "received_at": UTC_MICROSECONDS,
        "value": pl.Binary(),
        "reason": pl.String(),
    }
)

NO_DEAD_LETTERS = pl.DataFrame(schema=DEAD_LETTER_SCHEMA)

# Orders whose order_id stands for another order, by the position of their message.
CLASH_SCHEMA = pl.Schema({"partition": pl.Int32(), "offset": pl.Int64(), "order_id": pl.String()})
NO_CLASHES = pl.DataFrame(schema=CLASH_SCHEMA)

_Id = Annotated[int, msgspec.Meta(ge=1, le=BIGINT_MAX)] | Annotated[str, msgspec.Meta(max_length=64)]
_Text = Annotated[str, msgspec.Meta(min_length=1, max_length=255)]


class _Message(msgspec.Struct, gc=False):
    """The JSON of one message: names, types and bounds. Fields that neither the contract nor the rules name are ignored."""

    order_id: _Text
    user_id: _Id
    product_id: _Id
    quantity: Annotated[int, msgspec.Meta(ge=1, le=BIGINT_MAX)]
    amount: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    country: str
    created_date: str
    event_ts: str
    status: str
    source: _Text
    amount_numeric: Annotated[int, msgspec.Meta(ge=0, le=BIGINT_MAX)] | None = None


_DECLARED_TYPES: dict[DeclaredKind, Any] = {
    "string": Annotated[str, msgspec.Meta(max_length=1_024)],
    "int": Annotated[int, msgspec.Meta(ge=-BIGINT_MAX - 1, le=BIGINT_MAX)],
    "number": float,
    "bool": bool,
}
DECLARED_DTYPES: dict[DeclaredKind, pl.DataType] = {
    "string": pl.String(),
    "int": pl.Int64(),
    "number": pl.Float64(),
    "bool": pl.Boolean(),
}
NOTHING_DECLARED: Declared = {}

_RUN = 100  # messages that are decoded in one go, or one by one where one of them does not decode
_Decode = Callable[[bytes], _Message]
_decode_names = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
FIELDS = _Message.__struct_fields__

# `17` or `U17` for a user, `203` or `P203` for a product: the digits are the id.
_ID_TEXTS = {"user_id": re.compile(r"[Uu]?0*([0-9]{1,19})"), "product_id": re.compile(r"[Pp]?0*([0-9]{1,19})")}
# `Rp.1.250.000`, `Rp 1.250.000`, `IDR 1250000`, `1250000`: dots only between groups of three.
_AMOUNT_TEXT = r"^(?i:rp\.? ?|idr ?)?([0-9]{1,3}(?:\.[0-9]{3})+|[0-9]+)$"
_AMOUNT = (
    pl.col("amount")
    .str.extract(_AMOUNT_TEXT)
    .str.replace_all(".", "", literal=True)
    .cast(pl.Int64, strict=False)
    .alias("amount_numeric")
)
# What `datetime.fromisoformat` takes beyond ISO 8601's calendar dates is not part of the contract.
_TIMESTAMP_TEXT = re.compile(
    r"(\d{4}-\d{2}-\d{2})[T ](\d{2}:\d{2}(?::\d{2})?)(?:[.,](\d+))?(Z|[+-](?:[01]\d|2[0-3])(?::?[0-5]\d)?)",
    re.ASCII | re.IGNORECASE,
)
# A text of JSON; one without an end goes to the end of the message. Possessive, so that no message is gone through twice.
_JSON_TEXT = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_OPENING, _CLOSING = np.frombuffer(b"[{", np.uint8), np.frombuffer(b"]}", np.uint8)


class Contents(NamedTuple):
    """What a run of messages holds: `orders` (ORDER_SCHEMA) and `dead_letters` (DEAD_LETTER_SCHEMA)."""

    orders: pl.DataFrame
    dead_letters: pl.DataFrame


def read_messages(
    messages: pa.RecordBatch, max_future_skew: timedelta, read_at: datetime, declared: Declared = NOTHING_DECLARED
) -> Contents:
    """Read a run of Kafka messages (MESSAGE_COLUMNS, as Spark's Kafka source gives them).

    Each message is in exactly one of the two results. Never raises for what a message holds.

    Args:
        messages: as received.
        max_future_skew: how far the times of an order may lie ahead of its Kafka timestamp, and of `read_at`: a timestamp
            that a producer gave may itself lie in the future. A message without one is judged by `read_at` alone.
        read_at: when it is read. Of a micro-batch its own time, which is the same on a replay.
        declared: fields that an order may have beside the contract's, and their kinds.
    """
    values = messages.column("value").to_pylist()
    decode = _decoder(tuple(sorted(declared.items())))
    decoded, broken = _decode_each(values, _texts(messages.column("value")), decode)
    orders = _orders(messages, decoded, declared)
    checked = orders.with_columns(reason=pl.coalesce(*_checks(max_future_skew, read_at, declared)))
    if checked["reason"].null_count() < len(checked):
        failed = checked.filter(pl.col("reason").is_not_null()).select("row", "reason")
        broken |= dict(failed.iter_rows())
        checked = checked.filter(pl.col("reason").is_null())
    return Contents(orders=checked.select(ORDER_SCHEMA.names()), dead_letters=dead_letters(messages, broken))


def dead_letters(messages: pa.RecordBatch, reasons: dict[int, str]) -> pl.DataFrame:
    """The messages at these rows as dead letters (DEAD_LETTER_SCHEMA): bytes, position, and why."""
    if not reasons:
        return NO_DEAD_LETTERS
    rows = sorted(reasons)
    taken = messages.take(pa.array(rows, pa.int64()))
    columns = {name: taken.column(name) for name in ("topic", "partition", "offset", "value")}
    stamped = _kafka_timestamps(taken)
    remark = (
        pl.when(stamped < EARLIEST)
        .then(pl.lit(" (its Kafka timestamp lies before the year 1)"))
        .when(stamped > LATEST)
        .then(pl.lit(" (its Kafka timestamp lies after the year 9999)"))
        .otherwise(pl.lit(""))
    )
    frame = pl.from_arrow(pa.table(columns)).with_columns(  # type: ignore[union-attr]
        reason=pl.Series([reasons[row] for row in rows], dtype=pl.String) + remark, received_at=_received_at(taken)
    )
    return frame.select(pl.col(name).cast(dtype) for name, dtype in DEAD_LETTER_SCHEMA.items())


def _received_at(messages: pa.RecordBatch) -> pl.Series:
    stamped = _kafka_timestamps(messages)
    return stamped if _all_exist(stamped) else stamped.clip(EARLIEST, LATEST)


def _all_exist(moments: pl.Series) -> bool:
    """Whether Python, too, has all of these moments (UTC_MICROSECONDS)."""
    known = moments.cast(pl.Int64)
    first, last = known.min(), known.max()
    return first is None or (first >= _EARLIEST_US and last <= _LATEST_US)  # type: ignore[operator, return-value]


def _kafka_timestamps(messages: pa.RecordBatch) -> pl.Series:
    return pl.Series(messages.column("timestamp")).cast(UTC_MICROSECONDS)


def clash_dead_letters(messages: pa.RecordBatch, clashes: pl.DataFrame) -> pl.DataFrame:
    """Those of the messages that clash (CLASH_SCHEMA) as dead letters (DEAD_LETTER_SCHEMA)."""
    if clashes.is_empty():
        return NO_DEAD_LETTERS
    places = pl.DataFrame({name: pl.Series(messages.column(name)) for name in ("partition", "offset")}).with_row_index("row")
    rows = places.join(clashes, on=["partition", "offset"]).select("row", "order_id").iter_rows()
    return dead_letters(messages, {row: f"order_id {used} is used by another order, received before" for row, used in rows})


def clashes_among(orders: pl.DataFrame, stored: Callable[[Sequence[str]], pl.DataFrame]) -> pl.DataFrame:
    """Orders (ORDER_SCHEMA) that use the id of another one among them (CLASH_SCHEMA): what is stored stands, else the first.

    Args:
        orders: as read.
        stored: order ids → what is stored under them, columns `order_id` and CONTENT. Called only where ids clash.
    """
    if orders["order_id"].n_unique() == len(orders):  # so nearly always, and seen in a tenth of the time
        return NO_CLASHES
    contents = orders.unique(["order_id", *CONTENT])["order_id"]
    used_twice = contents.filter(contents.is_duplicated()).unique()
    if used_twice.is_empty():
        return NO_CLASHES
    claims = orders.filter(pl.col("order_id").is_in(used_twice.implode())).sort("received_at", "partition", "offset")
    standing = pl.concat([stored(used_twice.to_list()), claims.select("order_id", *CONTENT)])
    standing = standing.unique("order_id", keep="first", maintain_order=True)
    return claims.join(standing, on=["order_id", *CONTENT], how="anti").select(CLASH_SCHEMA.names())


def _texts(values: pa.Array) -> pl.Series | None:
    """The values as texts; None where one of them is not UTF-8."""
    try:
        return pl.Series(values.cast(pa.string()))
    except pa.ArrowInvalid:
        return None


class _Decoded(NamedTuple):
    """Messages that decode, and the rows that they are in."""

    rows: list[int]
    messages: list[_Message]


@lru_cache(maxsize=16)
def _decoder(declared: tuple[tuple[str, DeclaredKind], ...]) -> _Decode:
    """What decodes a message that may have these fields, too: one that is missing or null is none."""
    fields = [(name, _DECLARED_TYPES[kind] | None, None) for name, kind in declared]
    form: type[Any] = msgspec.defstruct("_Message", fields, bases=(_Message,), gc=False) if fields else _Message
    return msgspec.json.Decoder(form).decode


def _decode_each(values: list[bytes | None], texts: pl.Series | None, decode: _Decode) -> tuple[_Decoded, dict[int, str]]:
    """What decodes, and row → reason for what does not."""
    decoded = _Decoded([], [])
    broken: dict[int, str] = {}
    maybe_deep = _with_many_openings(values, texts)
    looked_at = texts is not None and not maybe_deep
    for first in range(0, len(values), _RUN):
        run = values[first : first + _RUN]
        if looked_at and (messages := _decode_all(run, decode)):
            decoded.rows.extend(range(first, first + len(run)))
            decoded.messages.extend(messages)
            continue
        for row, value in enumerate(run, first):
            try:
                if texts is None and value is not None:
                    value.decode()  # the decoder does not look inside fields that it skips
                if row in maybe_deep:
                    _require_levels(value)  # type: ignore[arg-type]
                message = _decode_last(value, decode)  # type: ignore[arg-type]
            except (msgspec.MsgspecError, ValueError, TypeError) as error:
                broken[row] = _why(value, error)
            else:
                decoded.rows.append(row)
                decoded.messages.append(message)
    return decoded, broken


def _decode_all(values: Sequence[bytes | None], decode: _Decode) -> list[_Message] | None:
    """The messages in all of these; None where one does not decode at once."""
    try:
        return list(map(decode, values))  # type: ignore[arg-type]
    except (msgspec.MsgspecError, ValueError, TypeError):
        return None


def _with_many_openings(values: list[bytes | None], texts: pl.Series | None) -> set[int]:
    """The rows that hold more brackets and braces than a message may be deep; seen over the whole column in no time."""
    if texts is not None:
        return set((texts.str.count_matches(r"[\[{]") > MOST_LEVELS).arg_true())
    return {
        row for row, value in enumerate(values) if value is not None and value.count(b"{") + value.count(b"[") > MOST_LEVELS
    }


def _decode_last(value: bytes, decode: _Decode) -> _Message:
    """The message in a JSON object; of a name that is given more than once, the last value counts.

    The decoder refuses the first wrong value that it meets. Whether a later one takes its place is looked up then only.
    """
    try:
        return decode(value)
    except msgspec.ValidationError:
        return decode(msgspec.json.encode(_decode_names(value)))


class _TooDeep(ValueError):
    """JSON that is nested deeper than MOST_LEVELS."""


def _require_levels(value: bytes) -> None:
    marks = np.frombuffer(_JSON_TEXT.sub(b"", value), np.uint8)
    levels = np.cumsum(np.isin(marks, _OPENING).astype(np.int64) - np.isin(marks, _CLOSING))
    if levels.max(initial=0) > MOST_LEVELS:
        raise _TooDeep(f"nested deeper than {MOST_LEVELS} levels")


def _why(value: bytes | None, error: Exception) -> str:
    if value is None:
        return "tombstone: the message has no value"
    if not value.strip():
        return "empty message"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8: {error.reason}"
    if isinstance(error, _TooDeep):
        return str(error)
    if isinstance(error, msgspec.ValidationError):
        return f"breaks the contract: {error}"
    return f"not JSON: {error}"


def _orders(messages: pa.RecordBatch, decoded: _Decoded, declared: Declared) -> pl.DataFrame:
    """Decoded messages as columns: ids as integers, amounts and times parsed (null where they cannot be).

    Declared fields are in `attributes`, and texts among them also as they are (see `_own`).
    """
    parsed = decoded.messages
    texts = {name: list(map(attrgetter(name), parsed)) for name in FIELDS if name not in ("user_id", "product_id")}
    if len(decoded.rows) < messages.num_rows:
        messages = messages.take(pa.array(decoded.rows, pa.int64()))
    given = [pl.Series(name, texts[name], dtype=dtype) for name, dtype in _FIELD_SCHEMA.items()]
    fields = {column.name: column for column in (*given, *_declared_columns(parsed, declared))}
    event_ts = _timestamps(fields["event_ts"])
    created_at_once = fields["created_date"].equals(fields["event_ts"])  # most orders are
    fields |= {
        "user_id": _ids("user_id", [message.user_id for message in parsed]),
        "product_id": _ids("product_id", [message.product_id for message in parsed]),
        "declared_amount": fields["amount_numeric"],
        "created_date": event_ts if created_at_once else _timestamps(fields["created_date"]),
        "event_ts": event_ts,
        "row": pl.Series(decoded.rows, dtype=pl.Int64),
        "partition": pl.Series(messages.column("partition")).cast(pl.Int32),
        "offset": pl.Series(messages.column("offset")).cast(pl.Int64),
        "received_at": _received_at(messages),
    }
    return pl.DataFrame(fields).with_columns(_AMOUNT)


def _declared_columns(parsed: Sequence[_Message], declared: Declared) -> list[pl.Series]:
    columns = {
        name: pl.Series(name, list(map(attrgetter(name), parsed)), dtype=DECLARED_DTYPES[declared[name]])
        for name in sorted(declared)
    }
    texts = [column.alias(_own(name)) for name, column in columns.items() if declared[name] == "string"]
    return [attributes_of(list(columns.values()), len(parsed)), *texts]


def _own(name: str) -> str:
    """The column of a declared field, which may be called as another column is."""
    return f"attributes.{name}"


def attributes_of(fields: Sequence[pl.Series], orders: int) -> pl.Series:
    """The column `attributes` of so many orders, of declared fields in the order of their names."""
    if not fields:
        return pl.repeat(None, orders, dtype=pl.String, eager=True).alias("attributes")
    # A field that is null is left out: so each is encoded by itself, and stands without its braces.
    parts = [
        pl.when(pl.col(field.name).is_not_null()).then(
            pl.struct(field.name).struct.json_encode().str.strip_prefix("{").str.head(-1)
        )
        for field in fields
    ]
    members = pl.concat_str(parts, separator=",", ignore_nulls=True)
    return pl.DataFrame(fields).select(attributes=pl.when(members != "").then("{" + members + "}")).to_series()


_FIELD_SCHEMA = {
    name: pl.Int64() if name in ("quantity", "amount_numeric") else pl.String()
    for name in FIELDS
    if name not in ("user_id", "product_id")
}


def _ids(name: str, values: list[int | str]) -> pl.Series:
    try:
        return pl.Series(values, dtype=pl.Int64, strict=True)
    except (TypeError, pl.exceptions.PolarsError):
        return pl.Series([_id(_ID_TEXTS[name], value) for value in values], dtype=pl.Int64)


def _id(text: re.Pattern[str], value: int | str) -> int | None:
    if isinstance(value, int):
        return value
    match = text.fullmatch(value)
    number = int(match[1]) if match else 0
    return number if 1 <= number <= BIGINT_MAX else None


def _timestamps(texts: pl.Series) -> pl.Series:
    """ISO 8601 with offset, to the microsecond; null where it is not that. The common form is read as a column."""
    usual = texts.str.contains(r"^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:[0-5]\d(\.\d{1,6})?(Z|[+-]([01]\d|2[0-3]):[0-5]\d)$")
    texts_of_usual = texts if usual.all() else texts.set(~usual, None)
    parsed = texts_of_usual.str.to_datetime("%+", time_unit="us", time_zone="UTC", strict=False)
    if not _all_exist(parsed):
        parsed = parsed.set(~parsed.is_between(EARLIEST, LATEST), None)
    if not parsed.null_count():
        return parsed
    rest = parsed.is_null()
    unusual = pl.Series([_timestamp(text) for text in texts.filter(rest)], dtype=UTC_MICROSECONDS)
    return parsed.scatter(rest.arg_true(), unusual)


def _timestamp(text: str) -> datetime | None:
    match = _TIMESTAMP_TEXT.fullmatch(text)
    if match is None:
        return None
    date, time, fraction, offset = match.groups()
    try:
        return datetime.fromisoformat(f"{date}T{time}{_second_fraction(time, fraction)}{offset.upper()}").astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def _second_fraction(time: str, fraction: str | None) -> str:
    if fraction is None:
        return ""
    if time.count(":") < 2:
        raise ValueError("a fraction of a minute is not part of the contract")
    return f".{fraction[:6].ljust(6, '0')}"


def _checks(max_future_skew: timedelta, read_at: datetime, declared: Declared) -> list[pl.Expr]:
    """Each check is null where an order passes, and says what is wrong where it does not; the first one speaks."""
    reading = pl.lit(read_at).cast(UTC_MICROSECONDS)
    has_timestamp = pl.col("received_at") != NO_TIMESTAMP
    by_kafka = has_timestamp & (pl.col("received_at") <= reading)
    latest = pl.when(by_kafka).then("received_at").otherwise(reading) + max_future_skew
    when_read = f"{read_at.astimezone(UTC).isoformat(timespec='microseconds').replace('+00:00', 'Z')}, when it was read"
    ahead = (
        pl.when(by_kafka)
        .then(pl.lit(" lies in the future of its Kafka timestamp"))
        .when(has_timestamp)
        .then(pl.lit(f" lies in the future of {when_read}, as its Kafka timestamp does"))
        .otherwise(pl.lit(f" lies in the future of {when_read}; it has no Kafka timestamp"))
    )
    return [
        *_USUAL_CHECKS,
        *(pl.when(pl.col(name) > latest).then(pl.lit(name) + ahead) for name in ("created_date", "event_ts")),
        *(
            _fails(pl.col(_own(name)).str.contains("\0", literal=True), f"{name} holds a NUL character")
            for name, kind in sorted(declared.items())
            if kind == "string"
        ),
    ]


def _fails(condition: pl.Expr, reason: str) -> pl.Expr:
    return pl.when(condition).then(pl.lit(reason))


# Those that depend on neither time nor declared fields: to make them takes longer than to ask them of a few orders.
_USUAL_CHECKS = [
    _fails(
        pl.col("order_id").str.contains("\0", literal=True),
        "order_id holds a NUL character",
    ),
    _fails(
        pl.col("source").str.contains("\0", literal=True),
        "source holds a NUL character",
    ),
    _fails(
        pl.col("user_id").is_null(),
        "user_id is not an id: an integer from 1, or text such as U17",
    ),
    _fails(
        pl.col("product_id").is_null(),
        "product_id is not an id: an integer from 1, or text such as P203",
    ),
    _fails(
        pl.col("amount_numeric").is_null(),
        "amount cannot be read as whole rupiah, such as Rp.1.250.000",
    ),
    _fails(
        pl.col("declared_amount").is_not_null() & (pl.col("declared_amount") != pl.col("amount_numeric")),
        "amount and amount_numeric disagree",
    ),
    _fails(
        ~pl.col("country").str.contains("^[A-Z]{2}$"),
        "country is not ISO 3166 alpha-2, such as ID",
    ),
    _fails(pl.col("status").str.to_lowercase() != "pending", "status is not Pending"),
    _fails(
        pl.col("created_date").is_null(),
        "created_date is not an ISO 8601 timestamp with offset",
    ),
    _fails(
        pl.col("event_ts").is_null(),
        "event_ts is not an ISO 8601 timestamp with offset",
    ),
]
