"""What a rules file may say: every mistake is named with its place, and none ends in a stack trace."""

import contextlib
import copy
import re
import tomllib
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from conf.conditions import ConditionError, parse_condition
from conf.errors import RulesError
from conf.rules import FraudRules, load_rules
from conf.settings import CONF_DIR

SHIPPED = tomllib.loads((CONF_DIR / "fraud_rules.toml").read_text())


def loaded(tmp_path: Path, text: str) -> FraudRules:
    path = tmp_path / "rules.toml"
    path.write_text(text)
    return load_rules(path)


def test_a_file_of_the_old_form_says_what_the_shipped_file_says(tmp_path: Path) -> None:
    """The six rules, their defaults, and their windows."""
    former, shipped = loaded(tmp_path, 'version = "1"'), FraudRules.model_validate(SHIPPED)
    said = {name: rule.model_dump(exclude={"description", "owner"}) for name, rule in sorted(shipped.rules.items())}
    assert {name: rule.model_dump(exclude={"description", "owner"}) for name, rule in former.rules.items()} == said
    assert former.widest_window == shipped.widest_window == timedelta(seconds=10)
    assert len(shipped.as_delivered) == 6


def test_the_readme_shows_the_rules_as_they_are_shipped() -> None:
    readme = (CONF_DIR.parent / "README.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"```toml\n(\[rules\..*?)```", readme, re.DOTALL)
    shipped = {name: {key: said for key, said in rule.items() if key != "examples"} for name, rule in SHIPPED["rules"].items()}
    assert tomllib.loads(shown)["rules"] == shipped


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ('Device = "string"', "fields.Device: a name has small letters, digits and _, a letter first"),
        ('country = "string"', "fields.country: every order or verdict has this field"),
        ('local_hour = "int"', "fields.local_hour: every order or verdict has this field"),
        ('status = "string"', "fields.status: every order or verdict has this field"),
        ('seen = "timestamp"', "fields.seen: Input should be 'string', 'int', 'number' or 'bool' (found 'timestamp')"),
        ("device = 5", "fields.device: Input should be 'string', 'int', 'number' or 'bool' (found 5)"),
        ("\n".join(f'f{number} = "int"' for number in range(33)), "fields: there are 33, at most 32 can be declared"),
    ],
)
def test_a_declaration_that_cannot_be_is_named(tmp_path: Path, fields: str, message: str) -> None:
    with pytest.raises(RulesError) as refused:
        loaded(tmp_path, f'version = "1"\n[fields]\n{fields}\n[rules]\n')
    assert message in str(refused.value)


def test_declared_fields_are_fields_of_rules_and_travel_with_them(tmp_path: Path) -> None:
    text = (
        'version = "1"\n[fields]\ndevice_id = "string"\ntries = "int"\n[rules.x]\nby = ["product_id", "device_id"]\n'
        "sum = { of = 'tries', at_least = 2, within = '1 s' }\nwhen = \"source = 'web'\"\n"
    )
    rules = loaded(tmp_path, text)
    assert rules.looked_at == {"x": {"product_id", "device_id", "tries", "source"}}
    assert rules == FraudRules.model_validate_json(rules.model_dump_json())
    assert FraudRules.model_validate_json(rules.model_copy(update={"fields": {}, "rules": {}}).model_dump_json()).fields == {}
    with pytest.raises(RulesError, match=r"rules\.x\.when: line 1, column 12: expected an integer beside =, found a string"):
        loaded(tmp_path, text.replace("source = 'web'", "   tries = 'a'"))
    with pytest.raises(RulesError, match=r"rules\.x\.by: expected fields, found 'device_id'"):
        loaded(tmp_path, text.replace('device_id = "string"\n', ""))


def test_what_was_recorded_in_the_old_form_is_read() -> None:
    recorded = (
        '{"version":"1","time_zone":"UTC","lateness":30.0,"max_future_skew":60.0,"foreign_country":{"mode":"shadow","home":"SG"},'
        '"night_quantity":{"mode":"enforce","above":5},"night_amount":{"mode":"enforce","above":9},'
        '"repeat_purchase":{"mode":"enforce","orders":4,"within":20.0},'
        '"sequential_users":{"mode":"enforce","users":2,"within":10.0},'
        '"coordinated_users":{"mode":"enforce","users":3,"within":10.0}}'
    )
    rules = FraudRules.model_validate_json(recorded)
    assert rules.in_shadow == {"foreign_country"}
    assert rules.rules["foreign_country"].when == "country <> 'SG'"
    assert rules.rules["night_quantity"].when == "local_hour < 4 and quantity > 5"
    assert rules.rules["repeat_purchase"].within == timedelta(seconds=20)
    assert rules == FraudRules.model_validate_json(rules.model_dump_json())


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("when = \"contry <> 'ID'\"", "rules.x.when: line 1, column 1: expected a field, found contry, did you mean country?"),
        ("when = \"quantity > '9'\"", "rules.x.when: line 1, column 12: expected an integer beside >, found a string"),
        ('when = "quantity >"', "rules.x.when: line 1, column 10: expected a condition in SQL"),
        ('when = "quantity"', "rules.x.when: line 1, column 1: expected a condition, which is true or false, found an integer"),
        ('when = "quantity = null"', "nothing equals null: expected is null or is not null"),
        ('when = "quantity > 1 and\\n  rand() < 1"', "line 2, column 3: expected a part of a condition, found RAND()"),
        ('when = "quantity in (select 1)"', "expected values in brackets after in"),
        ("when = \"event_ts > '2026-01-01'\"", "such as timestamp '2026-11-01 00:00:00+07:00'"),
        ('when = "quantity > 1; drop table raw_orders"', "expected a part of a condition"),
        ('when = "quantity * quantity * quantity > 1"', "this can grow beyond 128 bits"),
        ("", "rules.x: expected when, or by with one of count, distinct, consecutive, sum"),
        ('by = ["product_id"]', "rules.x.by: expected a pattern beside it"),
        ('count = { at_least = 3, within = "1 s" }', "rules.x.by: missing"),
        ('by = ["user_id"]\ncount = { at_least = 3, within = "25 h" }', "rules.x.count.within: must be at most a day"),
        ('by = ["user_id", "user_id"]\ncount = { at_least = 3, within = "1 h" }', "rules.x.by: names a field twice"),
        ('by = []\ncount = { at_least = 3, within = "1 h" }', "rules.x.by: "),
        ('by = ["product_id", "colour"]\ncount = { at_least = 3, within = "1 s" }', "expected fields, found 'colour'"),
        ('by = ["product_id"]\ncount = { at_least = 1, within = "1 s" }', "rules.x.count.at_least"),
        ('by = ["product_id"]\ncount = { at_least = 3, within = "2 days" }', "rules.x.count.within: is not a duration"),
        (
            'by = ["product_id"]\nsum = { of = "country", at_least = 3, within = "1 s" }',
            "rules.x.sum.of: expected a field of integers",
        ),
        (
            'by = ["product_id"]\ncount = { at_least = 3, within = 1 }\nsum = { of = "quantity", at_least = 3, within = 1 }',
            "rules.x: expected one pattern, found count and sum",
        ),
        ('when = "true"\nmode = "maybe"', "rules.x.mode: Input should be 'enforce', 'shadow' or 'off' (found 'maybe')"),
        ('when = "true"\nwho = "me"', "rules.x.who: unknown key"),
    ],
)
def test_a_mistake_is_named_with_its_place(tmp_path: Path, entry: str, message: str) -> None:
    with pytest.raises(RulesError, match=re.escape(message)):
        loaded(tmp_path, f'version = "1"\n[rules.x]\n{entry}\n')


def test_all_mistakes_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(RulesError) as refused:
        loaded(tmp_path, 'version = "1"\n[rules.a]\nwhen = "x > 1"\n[rules.b]\nwhen = "y > 1"\n[rules."C d"]\nwhen = "true"\n')
    said = str(refused.value)
    assert all(place in said for place in ("rules.a.when", "rules.b.when", "rules.C d: a name has"))


def test_at_most_64_rules_can_be_in_force(tmp_path: Path) -> None:
    entries = [f'[rules.r{number}]\nwhen = "quantity > {number}"' for number in range(65)]
    assert len(loaded(tmp_path, "\n".join(['version = "1"', *entries[:64]])).rules) == 64
    with pytest.raises(RulesError, match="there are 65, at most 64 can be in force"):
        loaded(tmp_path, "\n".join(['version = "1"', *entries]))


# --- nonsense -----------------------------------------------------------------------------------------------------

TOKENS = (
    *[
        "(",
        ")",
        ",",
        ".",
        ";",
        "'",
        '"',
        "`",
        "-",
        "+",
        "*",
        "/",
        "%",
        "=",
        "<",
        ">",
        "<>",
        "<=",
        ">=",
        "!=",
        "||",
        "@",
        "?",
        ":",
        "::",
        "[",
        "]",
        "{",
        "}",
        "\\",
        "#",
        "--",
        "/*",
        "*/",
        "$",
        "~",
        "&",
        "|",
        "^",
        "!",
    ],
    *[
        "and",
        "or",
        "not",
        "in",
        "between",
        "is",
        "null",
        "true",
        "false",
        "case",
        "when",
        "then",
        "else",
        "end",
        "select",
        "from",
        "where",
        "cast",
        "as",
        "date",
        "timestamp",
        "interval",
    ],
    *[
        "mod",
        "lower",
        "upper",
        "length",
        "starts_with",
        "coalesce",
        "listed",
        "extract",
        "if",
        "exists",
        "array",
        "struct",
        "over",
        "unnest",
        "like",
        "distinct",
        "all",
        "any",
    ],
    *[
        "quantity",
        "country",
        "event_ts",
        "local_date",
        "local_hour",
        "user_id",
        "amount",
        "1",
        "0",
        "1.5",
        "1e999",
        "99999999999999999999",
        "'ID'",
        "x",
        "é",
        "\x00",
    ],
)


@settings(max_examples=400)
@given(st.lists(st.sampled_from(TOKENS), max_size=12).map(" ".join) | st.text(max_size=30))
@example("(" * 1_000)
@example("not " * 900 + "true")
@example("quantity = 1 or " * 240 + "true")
def test_no_text_is_more_than_a_condition_or_a_mistake(text: str) -> None:
    try:
        condition = parse_condition(text, {})
    except ConditionError:
        return
    assert condition.term.kind == "bool"


def places(table: Any, so_far: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every key of a table and its tables."""
    return [
        place
        for name, value in table.items()
        for place in [(*so_far, name), *(places(value, (*so_far, name)) if isinstance(value, dict) else [])]
    ]


NONSENSE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda parts: st.lists(parts, max_size=3) | st.dictionaries(st.text(max_size=5), parts, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300)
@given(place=st.sampled_from(places(SHIPPED)), value=NONSENSE)
def test_nonsense_in_any_place_is_a_mistake_and_nothing_else(place: tuple[str, ...], value: Any) -> None:
    table = copy.deepcopy(SHIPPED)
    inner = table
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    with contextlib.suppress(ValidationError):
        FraudRules.model_validate(table)
