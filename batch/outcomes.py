"""What turned out about orders: statements that somebody has made, read by their contract and appended to `order_outcomes`.

A statement says of an order that it was a fraud, or genuine, who says so, when that was decided, and why. Each stays as it was
made; of those about one order the newest by `decided_at` counts, of two of one moment the one that was taken later.
"""

import csv
import io
from collections.abc import Callable, Collection, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import msgspec
import polars as pl
from psycopg2.extensions import cursor as Cursor

from batch.frames import copy_frame
from batch.postgres import connect, explained, require_rights
from batch.sessions import BULK
from conf.errors import OutcomesError

FILE, TOPIC = "file", "topic"  # where a statement came from

_SKEW = timedelta(minutes=5)  # that clocks may differ by
_RIGHTS = {"order_outcomes": ("select", "insert"), "raw_orders": ("select",)}

_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=255, pattern=r"\A[^\x00]*\Z")]
_Words = Annotated[str, msgspec.Meta(max_length=2000, pattern=r"\A[^\x00]*\Z")]


class Statement(msgspec.Struct, frozen=True):
    """One statement: its names, types and bounds."""

    order_id: _Name
    outcome: Literal["fraud", "genuine"]
    reviewed_by: _Name
    decided_at: Annotated[datetime, msgspec.Meta(tz=True)]
    reason: _Words | None = None


FIELDS = Statement.__struct_fields__
_SCHEMA = pl.Schema(
    {
        "order_id": pl.String(),
        "outcome": pl.String(),
        "reviewed_by": pl.String(),
        "decided_at": pl.Datetime("us", "UTC"),
        "reason": pl.String(),
    }
)


class Taken(NamedTuple):
    """How many statements were given, how many of them are new, and how many of all are about orders that are not there."""

    given: int
    new: int
    of_unknown_orders: int

    def __str__(self) -> str:
        there = f", {self.given - self.new:,} were there already" if self.given > self.new else ""
        unknown = (
            f"; {self.of_unknown_orders:,} are about orders that raw_orders does not hold" if self.of_unknown_orders else ""
        )
        return f"{self.new:,} of {self.given:,} statements taken{there}{unknown}"


# --- the contract ----------------------------------------------------------------------------------------------------


def statement_of(fields: object, read_at: datetime) -> Statement:
    """The statement that a JSON object makes; what the contract does not name is left out.

    Raises:
        ValueError: it breaks the contract; says where and why.
    """
    statement = msgspec.convert(fields, Statement)
    if statement.decided_at > read_at + _SKEW:
        raise ValueError(f"decided_at lies in the future of {read_at:%Y-%m-%dT%H:%M:%SZ}, when it was read")
    try:
        return msgspec.structs.replace(
            statement, decided_at=statement.decided_at.astimezone(UTC), reason=statement.reason or None
        )
    except OverflowError:
        raise ValueError("decided_at lies outside the years 1 to 9999 of UTC") from None


def read_file(path: Path, read_at: datetime) -> list[Statement]:
    """The statements of a file: CSV with a header where its name ends in .csv, else JSON Lines. All of them are right.

    Raises:
        OutcomesError: it cannot be read, or a line breaks the contract; names every such line.
    """
    statements, wrong = [], []
    for line, fields in _lines(path):
        try:
            statements.append(statement_of(_known_only(fields()), read_at))
        except (ValueError, RecursionError) as error:  # msgspec's errors are among them
            wrong.append(f"  line {line}: {error}")
    if wrong:
        raise OutcomesError(
            f"{path}: {len(wrong):,} of {len(wrong) + len(statements):,} statements break the contract, so none was taken:\n"
            + "\n".join(wrong)
        )
    return statements


Line = tuple[int, Callable[[], object]]


def _lines(path: Path) -> Iterator[Line]:
    """The number of each line that says something, and what reads it."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise OutcomesError(f"{path} cannot be read: {error}") from error
    yield from _csv_lines(path, text) if path.suffix.lower() == ".csv" else _json_lines(text)


def _json_lines(text: str) -> Iterator[Line]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, lambda line=line: msgspec.json.decode(line)  # type: ignore[misc]


def _csv_lines(path: Path, text: str) -> Iterator[Line]:
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        names = next(rows, [])
        if missing := [name for name in FIELDS if name not in names and name != "reason"]:
            raise OutcomesError(
                f"{path}: its first line must name the columns {', '.join(FIELDS)}: {', '.join(missing)} missing"
            )
        for cells in rows:
            if cells:
                yield rows.line_num, lambda cells=cells: _record(names, cells)  # type: ignore[misc]
    except csv.Error as error:
        raise OutcomesError(f"{path}: line {rows.line_num} is no CSV: {error}. Nothing was taken.") from error


def _record(names: list[str], cells: list[str]) -> dict[str, str]:
    if len(cells) != len(names):
        raise ValueError(f"{len(cells)} cells, where the first line names {len(names)} columns")
    return dict(zip(names, cells, strict=True))


def _known_only(fields: object) -> object:
    """The same; of a file, whose maker can be asked, what the contract does not name is a mistake."""
    if isinstance(fields, dict) and (unknown := sorted(fields.keys() - set(FIELDS))):
        raise ValueError(f"{', '.join(unknown)} is not a field: {', '.join(FIELDS)} are")
    return fields


# --- Postgres --------------------------------------------------------------------------------------------------------


def add_file(dsn: str, path: Path) -> Taken:
    """Append the statements of a file (see `read_file`), in one transaction. One that is there already is not taken twice.

    Raises:
        OutcomesError: the file cannot be used; nothing was taken.
        PostgresError: Postgres does not answer, lacks the table, or this login may not write there.
    """
    statements = read_file(path, datetime.now(UTC))
    with (
        explained(dsn),
        connect(dsn, application_name="finpro outcomes", limits=BULK) as connection,
        connection.cursor() as cursor,
    ):
        require_rights(cursor, "finpro_outcomes", _RIGHTS)
        return append(cursor, statements, FILE)


def append(cursor: Cursor, statements: Iterable[Statement], source: str) -> Taken:
    """Append statements in their order, by one COPY and one INSERT; those that are there already stay as they are."""
    frame = pl.DataFrame([msgspec.structs.astuple(one) for one in statements], schema=_SCHEMA, orient="row").with_columns(
        line=pl.int_range(pl.len())
    )
    if frame.is_empty():
        return Taken(0, 0, 0)
    columns = ", ".join(_SCHEMA.names())
    cursor.execute(
        f"create temp table stated on commit drop as select {columns}, 0::bigint as line from order_outcomes with no data"
    )
    copy_frame(cursor, "stated", frame)
    cursor.execute("analyze stated")
    cursor.execute(
        f"insert into order_outcomes ({columns}, source) select {columns}, %s from stated order by line on conflict do nothing",
        [source],
    )
    new = cursor.rowcount
    cursor.execute("select count(*) from stated where not exists (select from raw_orders where order_id = stated.order_id)")
    (unknown,) = cursor.fetchone() or (0,)
    cursor.execute("drop table stated")
    return Taken(len(frame), new, int(unknown))


_REASONS = """
    from order_outcomes where reason is not null and exists (
        select from raw_orders where raw_orders.order_id = order_outcomes.order_id and user_id = any(%s))
"""


def forget_reasons(dsn: str, users: Collection[int], *, dry_run: bool) -> int:
    """Erase why, in words, the orders of these users were frauds or genuine: the words may name them. Returns of how many.

    The bytes of all dead letters of the topic go as well.

    Raises:
        PostgresError: Postgres does not answer, lacks a table, or this login may not write there.
    """
    with explained(dsn), connect(dsn, application_name="finpro forget") as connection, connection.cursor() as cursor:
        found = f"select outcome_id {_REASONS}"
        if dry_run:
            cursor.execute(found, [list(users)])
        else:
            cursor.execute(f"update order_outcomes set reason = null where outcome_id in ({found})", [list(users)])
        erased = cursor.rowcount
        if not dry_run:  # what breaks the contract says nothing for certain of whom it is about
            cursor.execute("update outcome_dead_letters set value = null where value is not null")
        return erased
