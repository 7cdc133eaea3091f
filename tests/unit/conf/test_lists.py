"""The files of lists: what they may say, and how their content travels."""

from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.errors import RulesError
from conf.lists import MOST_VALUES, Entries, ListError, packed, read_list, unpacked
from conf.rules import files_of, load_rules

HEADER = "value,reason,expiry\n"
NOON_US = int(datetime(2026, 11, 1, 12, tzinfo=UTC).timestamp()) * 1_000_000


def written(tmp_path: Path, text: str, name: str = "devices.csv") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_is_read_whatever_the_order_of_its_lines(tmp_path: Path) -> None:
    lines = ['d2,"stolen, they say",2026-11-01T19:00:00+07:00\n', "\n", " d1 ,,\n", "é,x,2026-11-01T12:00:00.000001Z\n"]
    found = read_list(written(tmp_path, "\ufeff" + HEADER + "".join(lines)))
    assert found == Entries(["d1", "d2", "é"], ["", "stolen, they say", "x"], [None, NOON_US, NOON_US + 1])
    assert packed(found) == packed(read_list(written(tmp_path, HEADER + "".join(reversed(lines)))))
    assert read_list(written(tmp_path, HEADER)) == Entries([], [], [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected the header value,reason,expiry, found "),
        ("device,reason,expiry\n", "expected the header value,reason,expiry, found device,reason,expiry"),
        (HEADER + "d1,x,\nd2,x\n", "line 3: expected 3 fields (value, reason, expiry), found 2"),
        (HEADER + " ,x,\n", "line 2: expected a value"),
        (HEADER + "d" * 1_025 + ",x,\n", "line 2: expected a value, and no field of more than 1,024 characters"),
        (HEADER + "d1,x,\nd1,y,\n", "line 3: the value 'd1' is there twice"),
        (HEADER + "d1,x,soon\n", "line 2: expected an expiry in ISO 8601 with an offset"),
        (HEADER + "d1,x,2026-11-01\n", "found 2026-11-01"),
        (HEADER + 'd1,"x,\n', "line 2: unexpected end of data"),
        (HEADER + "".join(f"d{number},,\n" for number in range(MOST_VALUES + 1)), "has 100,001 values, at most 100,000"),
    ],
)
def test_what_a_file_says_wrongly_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ListError) as refused:
        read_list(written(tmp_path, text))
    assert message in str(refused.value)
    assert "devices.csv" in str(refused.value)


@given(st.dictionaries(st.text(), st.tuples(st.text(), st.none() | st.integers(-(2**60), 2**60))))
def test_entries_survive_their_packing(found: dict[str, tuple[str, int | None]]) -> None:
    entries = Entries(list(found), [reason for reason, _ in found.values()], [expiry for _, expiry in found.values()])
    assert unpacked(packed(entries)) == entries


@pytest.mark.parametrize("text", ["", "no list", "\u00e9"])
def test_what_is_no_packed_list_is_said_to_be_none(text: str) -> None:
    with pytest.raises(ListError, match="is no packed list"):
        unpacked(text)


RULES = """
version = "1"
[lists.devices]
file = "devices.csv"
[rules.bad]
when = "{when}"
"""


@pytest.mark.parametrize(
    ("when", "message"),
    [
        ("listed(source, 'device')", "line 1, column 16: expected a list, found 'device'; the lists are devices"),
        ("listed(source)", "expected 2 values in listed(…), found 1"),
        ("listed('web', 'devices')", "expected a field of strings or integers first in listed(…)"),
        ("listed(event_ts, 'devices')", "expected a field of strings or integers first in listed(…)"),
        ("listed(lower(source), 'devices')", "expected a field of strings or integers first in listed(…)"),
        ("listed(source, source)", "expected the name of a list in quotes"),
        ("listed(source, 'devices') = 1", "expected a condition beside =, found an integer"),
    ],
)
def test_a_condition_that_looks_up_what_it_cannot_is_named(tmp_path: Path, when: str, message: str) -> None:
    written(tmp_path, HEADER)
    with pytest.raises(RulesError) as refused:
        load_rules(written(tmp_path, RULES.format(when=when), "rules.toml"))
    assert message in str(refused.value)


def test_every_mistake_of_lists_is_named_with_its_place(tmp_path: Path) -> None:
    text = (
        RULES.format(when="listed(source, 'nothing') or listed(source, 'Bad')")
        + '[lists.Bad]\nfile = "devices.csv"\ncontent = ""\n[lists.odd]\nfile = 5\n[lists.none]\n'
    )
    with pytest.raises(RulesError) as refused:
        load_rules(written(tmp_path, text, "rules.toml"))
    for message in (
        "lists.devices.file: cannot read ",
        "lists.Bad.content: unknown key",
        "lists.odd.file: Input should be a valid string",
        "lists.none.file: missing",
    ):
        assert message in str(refused.value)
    with pytest.raises(RulesError, match="no list is declared in"):
        load_rules(written(tmp_path, 'version = "1"\n[rules.x]\nwhen = "listed(source, \'devices\')"\n', "rules.toml"))


@pytest.mark.parametrize(
    ("allows", "content", "message"),
    [
        ("5", "", "lists.devices.allows: Input should be a valid dictionary"),
        ("{}", "", "lists.devices.allows.by: missing"),
        ('{ by = "source", reasons = ["bad"] }', "", "lists.devices.allows.by: Input should be 'user_id' or 'product_id'"),
        ('{ by = "user_id" }', "", "lists.devices.allows.reasons: missing"),
        ('{ by = "user_id", reasons = [] }', "", "lists.devices.allows.reasons: Tuple should have at least 1 item"),
        ('{ by = "user_id", reasons = "bad" }', "", "lists.devices.allows.reasons: Input should be a valid tuple"),
        ('{ by = "user_id", reasons = [5] }', "", "lists.devices.allows.reasons.0: Input should be a valid string"),
        (
            '{ by = "user_id", reasons = ["bud"] }',
            "",
            "lists.devices.allows.reasons: expected names of rules, found 'bud'; the rules are bad",
        ),
        ('{ by = "user_id", reasons = ["bad", "bad"] }', "", "lists.devices.allows.reasons: names a rule twice"),
        ('{ by = "user_id", reasons = ["bad"], until = 5 }', "", "lists.devices.allows.until: unknown key"),
        (
            '{ by = "user_id", reasons = ["bad"] }',
            "7,,\nU17,,\n",
            "devices.csv: a list that allows holds ids as orders have them, such as 203, found 'U17'",
        ),
        ('{ by = "user_id", reasons = ["bad"] }', "07,,\n", "such as 203, found '07'"),
    ],
)
def test_what_a_list_cannot_allow_is_named(tmp_path: Path, allows: str, content: str, message: str) -> None:
    written(tmp_path, HEADER + content)
    text = RULES.format(when="true").replace('csv"', f'csv"\nallows = {allows}')
    with pytest.raises(RulesError) as refused:
        load_rules(written(tmp_path, text, "rules.toml"))
    assert message in str(refused.value)


@pytest.mark.parametrize("text", ["lists = 5", "[lists]\na = 5\nb = { file = 5 }", "[[lists]]", "version ="])
def test_the_files_of_a_file_that_says_nonsense_are_itself(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, text, "rules.toml")
    assert files_of(path) == [path]
    with pytest.raises(RulesError):
        load_rules(path)
