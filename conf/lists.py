"""Lists that conditions look things up in: CSV files beside the rules file, read and checked once, and packed as they travel.

A list's content is a part of the rules: it is recorded with them, and so an audit reads the list as it was. Packed it is one
text, which costs next to nothing to pass on, however many values it has.
"""

import base64
import csv
import io
import json
import re
import zlib
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

MOST_VALUES = 100_000
_HEADER = ["value", "reason", "expiry"]
_LONGEST = 1_024  # characters
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class ListError(ValueError):
    """A list's file cannot be used; the text says where, and what was expected."""


class Entries(NamedTuple):
    """What a list holds, in the order of its values.

    Attributes:
        values: each once.
        reasons: why each is there; empty where the file does not say.
        expiries_us: from when on each no longer holds, epoch microseconds; None where it always does.
    """

    values: list[str]
    reasons: list[str]
    expiries_us: list[int | None]


def read_list(path: Path) -> Entries:
    """The entries of a CSV file with the columns `value`, `reason` and `expiry` (ISO 8601 with an offset).

    Raises:
        ListError: it cannot be read, or breaks the form; names the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ListError(f"cannot read {path}: {error}") from error
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    found: dict[str, tuple[str, int | None]] = {}
    try:
        header = next(rows, [])
        if header != _HEADER:
            raise ListError(f"{path}: expected the header {','.join(_HEADER)}, found {','.join(header)[:100]}")
        for row in rows:
            if not row:
                continue
            value, reason, expiry = _row(row)
            if value in found:
                raise ListError(f"the value {value[:100]!r} is there twice")
            found[value] = (reason, expiry)
    except (ListError, csv.Error) as error:
        where = f"{path}, line {rows.line_num}: " if rows.line_num > 1 else ""
        raise ListError(f"{where}{error}") from None
    if len(found) > MOST_VALUES:
        raise ListError(f"{path}: has {len(found):,} values, at most {MOST_VALUES:,} can be in a list")
    values = sorted(found)
    return Entries(values, [found[value][0] for value in values], [found[value][1] for value in values])


def require_ids(path: Path, entries: Entries) -> None:
    """Check that what `read_list` has read are ids as orders have them: others would allow nobody, and nobody would notice.

    Raises:
        ListError: one is none; names it.
    """
    strange = next((value for value in entries.values if not re.fullmatch("[1-9][0-9]{0,18}", value)), None)
    if strange is not None:
        raise ListError(f"{path}: a list that allows holds ids as orders have them, such as 203, found {strange[:100]!r}")


def _row(row: list[str]) -> tuple[str, str, int | None]:
    if len(row) != len(_HEADER):
        raise ListError(f"expected {len(_HEADER)} fields ({', '.join(_HEADER)}), found {len(row)}")
    value, reason, expiry = (field.strip() for field in row)
    if not value or max(len(value), len(reason)) > _LONGEST:
        raise ListError(f"expected a value, and no field of more than {_LONGEST:,} characters")
    if not expiry:
        return value, reason, None
    try:
        moment = datetime.fromisoformat(expiry)
        if moment.tzinfo is None:
            raise ValueError
        since = moment.astimezone(UTC) - _EPOCH
    except (ValueError, OverflowError):
        expected = "expected an expiry in ISO 8601 with an offset, such as 2026-12-31T00:00:00+07:00, or none"
        raise ListError(f"{expected}, found {expiry[:100]}") from None
    return value, reason, (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


def as_csv(entries: Entries) -> str:
    """Entries as a file that `read_list` reads as the same."""
    text = io.StringIO(newline="")
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(_HEADER)
    for value, reason, expiry_us in zip(*entries, strict=True):
        rows.writerow([value, reason, "" if expiry_us is None else (_EPOCH + timedelta(microseconds=expiry_us)).isoformat()])
    return text.getvalue()


def packed(entries: Entries) -> str:
    """Entries as one text: the same ones always as the same."""
    return base64.b85encode(zlib.compress(json.dumps(entries, ensure_ascii=False).encode(), 6)).decode()


def unpacked(text: str) -> Entries:
    """Back from one text.

    Raises:
        ListError: it is none.
    """
    try:
        return Entries(*json.loads(zlib.decompress(base64.b85decode(text))))
    except (ValueError, TypeError, zlib.error) as error:
        raise ListError(f"is no packed list: {error}") from error
