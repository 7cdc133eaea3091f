"""Statements about orders: what a file may say, and what is said of a file that may not be taken."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest

from batch.outcomes import Statement, Taken, read_file
from conf.errors import OutcomesError

NOW = datetime(2026, 11, 29, 12, tzinfo=UTC)
HEADER = "order_id,outcome,reviewed_by,decided_at,reason\n"


def written(folder: Path, text: str, name: str = "outcomes.csv") -> Path:
    path = folder / name
    path.write_bytes(text.encode())
    return path


def refused(path: Path) -> str:
    with pytest.raises(OutcomesError) as caught:
        read_file(path, NOW)
    return str(caught.value)


def test_csv_and_json_lines_say_the_same(tmp_path: Path) -> None:
    statements = [
        Statement("o1", "fraud", "desk", datetime(2026, 11, 28, 1, tzinfo=UTC), 'she said "no",\nand paid back'),
        Statement("o2", "genuine", "desk", datetime(2026, 11, 28, 2, 0, 0, 5, tzinfo=UTC)),
    ]
    table = (
        "\ufeffdecided_at,order_id,outcome,reviewed_by,reason\r\n"
        '2026-11-28T08:00:00+07:00,o1,fraud,desk,"she said ""no"",\nand paid back"\r\n\r\n'
        "2026-11-28 02:00:00.000005Z,o2,genuine,desk,\r\n"
    )
    lines = "\n\n".join(msgspec.json.encode(statement).decode() for statement in statements)
    assert read_file(written(tmp_path, table), NOW) == statements
    assert read_file(written(tmp_path, lines, "outcomes.jsonl"), NOW) == statements


def test_every_wrong_line_is_named_with_its_number_and_what_is_wrong(tmp_path: Path) -> None:
    message = refused(
        written(
            tmp_path,
            HEADER
            + "o1,fraud,desk,2026-11-28T08:00:00Z,\n"
            + "o2,maybe,desk,2026-11-28T08:00:00Z,\n"
            + ",fraud,desk,2026-11-28T08:00:00Z,\n"
            + "o4,fraud,desk,2026-11-28T08:00:00,\n"
            + "o5,fraud,desk,28.11.2026,\n"
            + "o6,fraud,desk\n"
            + "o7,fraud,desk,2026-11-29T12:05:01Z,\n"
            + f"o8,fraud,{'x' * 256},2026-11-28T08:00:00Z,\n"
            + "o9,fraud,desk,0001-01-01T00:00:00+14:00,\n"
            + "o\x00,fraud,desk,2026-11-28T08:00:00Z,\n",
        )
    )
    assert "9 of 10 statements break the contract, so none was taken" in message
    lines = message.splitlines()[1:]
    assert [line.split(":")[0].strip() for line in lines] == [f"line {number}" for number in range(3, 12)]
    for line, part in zip(
        lines,
        ("maybe", "order_id", "decided_at", "decided_at", "3 cells", "future", "reviewed_by", "years 1 to 9999", "order_id"),
        strict=True,
    ):
        assert part in line


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("{", "truncated"),
        ("[]", "Expected `object`"),
        ("17", "Expected `object`"),
        ('{"order_id": 1}', "Expected `str`"),
        ('{"order_id": "o1"}', "missing required field"),
        ('{"order_id": "o1", "reasn": "typo"}', "reasn is not a field"),
        ("[" * 5000, "recursion"),
        ('{"order_id": "\\ud800"}', "truncated"),
    ],
)
def test_a_line_that_is_no_statement_gets_a_message(tmp_path: Path, line: str, part: str) -> None:
    message = refused(written(tmp_path, f"\n{line}\n", "outcomes.json"))
    assert "  line 2: " in message
    assert part in message


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    assert "cannot be read" in refused(tmp_path / "missing.csv")
    (tmp_path / "latin.csv").write_bytes(HEADER.encode() + b"\xe9")
    assert "cannot be read" in refused(tmp_path / "latin.csv")
    assert "outcome, decided_at missing" in refused(written(tmp_path, "order_id,reviewed_by\n"))
    assert "line 2 is no CSV" in refused(written(tmp_path, HEADER + '"o1"x,fraud,desk,2026-11-28T08:00:00Z,\n'))


def test_what_was_taken_is_told_in_words() -> None:
    assert str(Taken(3, 3, 0)) == "3 of 3 statements taken"
    assert str(Taken(1200, 1000, 1)) == (
        "1,000 of 1,200 statements taken, 200 were there already; 1 are about orders that raw_orders does not hold"
    )


def test_a_clock_that_is_a_little_ahead_is_no_mistake(tmp_path: Path) -> None:
    ahead = (NOW + timedelta(minutes=5)).isoformat()
    (statement,) = read_file(written(tmp_path, f"{HEADER}o1,fraud,desk,{ahead},\n"), NOW)
    assert statement.decided_at == NOW + timedelta(minutes=5)
