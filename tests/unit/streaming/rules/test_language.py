"""The language of rules: conditions against DuckDB, patterns against the judge, with rules and orders that hypothesis makes."""

from datetime import UTC, date, datetime, timedelta
from typing import Any

import duckdb
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.conditions import Kind, parse_condition
from conf.rules import FraudRules
from streaming.contract import ORDER_SCHEMA
from streaming.rules.conditions import holds
from streaming.rules.rules import findings
from tests.oracle import brute_force
from tests.oracle.brute_force import Order
from tests.oracle.order_sets import orders, six_rules

LARGEST = 2**63 - 1

# --- conditions ---------------------------------------------------------------------------------------------------

DECLARED: dict[str, Kind] = {"device": "string", "score": "int", "weight": "number", "flag": "bool", "seen": "timestamp"}
SCHEMA = {
    "user_id": pl.Int64(),
    "quantity": pl.Int64(),
    "amount_numeric": pl.Int64(),
    "country": pl.String(),
    "local_hour": pl.Int64(),
    "local_date": pl.Date(),
    "device": pl.String(),
    "score": pl.Int64(),
    "weight": pl.Float64(),
    "flag": pl.Boolean(),
    "seen": ORDER_SCHEMA["event_ts"],
}
WORDS = ("", "ID", "sg", "it's", "é", "a%_\\b")
NOON = datetime(2026, 11, 1, 12, tzinfo=UTC)

rows = st.fixed_dictionaries(
    {
        "user_id": st.sampled_from((1, 2, 17, LARGEST)),
        "quantity": st.integers(1, 5),
        "amount_numeric": st.sampled_from((0, 7, 1_000, LARGEST)),
        "country": st.sampled_from(("ID", "SG")),
        "local_hour": st.integers(0, 23),
        "local_date": st.sampled_from((date(2026, 11, 1), date(2026, 11, 2))),
        "device": st.none() | st.sampled_from(WORDS),
        "score": st.none() | st.integers(-5, 5) | st.sampled_from((LARGEST, -LARGEST - 1)),
        "weight": st.none() | st.sampled_from((-1.5, 0.0, 0.5, 3.0)),
        "flag": st.none() | st.booleans(),
        "seen": st.none() | st.sampled_from((NOON, NOON + timedelta(microseconds=1))),
    }
)


def quoted(text: str) -> str:
    """A string constant that both dialects read alike."""
    return "'" + text.replace("'", "''") + "'"


plain_words = st.sampled_from([word for word in WORDS if "'" not in word and "\\" not in word]).map(quoted)
strings = st.recursive(
    st.sampled_from(("device", "country")) | plain_words,
    lambda parts: st.one_of(
        parts.map("lower({})".format),
        parts.map("upper({})".format),
        st.tuples(parts, parts).map("coalesce({0[0]}, {0[1]})".format),
    ),
    max_leaves=3,
)
fields = st.sampled_from(("user_id", "quantity", "amount_numeric", "score", "local_hour"))
small = st.sampled_from(("quantity", "local_hour")) | st.integers(-3, 5).map(str)
integers = st.one_of(
    fields,
    st.integers(-3, 20).map(str),
    st.tuples(fields, st.sampled_from(("+", "-", "*")), fields).map(lambda one: f"({one[0]} {one[1]} {one[2]})"),
    st.tuples(fields, small).map(lambda one: f"mod({one[0]}, {one[1]})"),
    fields.map(lambda one: f"(-{one})"),
    strings.map("length({})".format),
    st.tuples(fields, fields).map(lambda one: f"coalesce({one[0]}, {one[1]})"),
)
numbers = st.one_of(
    st.just("weight"),
    st.sampled_from(("1.5e0", "-0.5e0")),
    st.tuples(small, small).map(lambda one: f"({one[0]} / {one[1]})"),
    st.tuples(st.just("weight"), st.sampled_from(("+", "-", "*", "/")), small).map(lambda one: f"({one[0]} {one[1]} {one[2]})"),
)
moments = st.sampled_from(("seen", "timestamp '2026-11-01 12:00:00+00:00'"))
days = st.sampled_from(("local_date", "date '2026-11-02'"))
comparators = st.sampled_from(("=", "<>", "<", "<=", ">", ">="))


def comparisons(terms: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Comparisons, ranges and sets of terms of one kind."""
    return st.one_of(
        st.tuples(terms, comparators, terms).map(" ".join),
        st.tuples(terms, terms, terms).map("({0[0]} between {0[1]} and {0[2]})".format),
        st.tuples(terms, st.lists(terms, min_size=1, max_size=3)).map(lambda one: f"{one[0]} in ({', '.join(one[1])})"),
        st.tuples(terms, st.lists(terms, min_size=1, max_size=3)).map(lambda one: f"{one[0]} not in ({', '.join(one[1])})"),
        terms.map("{} is null".format),
        terms.map("{} is not null".format),
    )


conditions = st.recursive(
    st.one_of(
        *(comparisons(terms) for terms in (strings, integers, numbers, moments, days)),
        st.just("flag"),
        st.tuples(strings, strings).map("starts_with({0[0]}, {0[1]})".format),
    ),
    lambda parts: st.one_of(
        parts.map("not ({})".format),
        st.tuples(parts, parts).map("({0[0]} and {0[1]})".format),
        st.tuples(parts, parts).map("({0[0]} or {0[1]})".format),
        st.tuples(parts, st.sampled_from(("true", "false"))).map("({0[0]}) is {0[1]}".format),
    ),
    max_leaves=4,
)


@pytest.fixture(scope="module")
def database() -> duckdb.DuckDBPyConnection:
    return duckdb.connect(config={"threads": 1, "autoinstall_known_extensions": False, "ieee_floating_point_ops": False})


def by_duckdb(database: duckdb.DuckDBPyConnection, table: pl.DataFrame, condition: str) -> list[bool]:
    """Whether a condition holds, as another database has it: integers have 128 bits there, so that no product is too large."""
    large = [name for name, dtype in SCHEMA.items() if dtype == pl.Int64()]
    columns = ", ".join(f"{name}::hugeint as {name}" if name in large else name for name in SCHEMA)
    database.register("given", table.with_columns(pl.col("seen").dt.replace_time_zone(None)).to_arrow())  # times are in UTC
    found = database.execute(f"select coalesce(({condition}), false) from (select {columns} from given)").fetchall()
    return [holds for (holds,) in found]


@settings(max_examples=300)
@given(condition=conditions, given_rows=st.lists(rows, min_size=1, max_size=6))
def test_a_condition_selects_what_duckdb_selects(
    database: duckdb.DuckDBPyConnection, condition: str, given_rows: list[dict[str, Any]]
) -> None:
    table = pl.DataFrame(given_rows, schema=SCHEMA)
    parsed = parse_condition(condition, DECLARED)
    found = table.select("user_id", found=holds(parsed.term))["found"]
    assert found.to_list() == by_duckdb(database, table, condition)


@pytest.mark.parametrize(
    ("condition", "selected"),
    [
        ("mod(score, 3) = -2", [-5]),
        ("score / 2 = 0.5", [1]),
        ("score / 0 = 1 or score / 0 <> 1", []),
        ("mod(score, 0) is null", [-5, 1, None]),
        ("not (score = 1)", [-5]),
        ("score in (1, 7)", [1]),
        ("score in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)", [1]),
        ("score not in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)", [-5]),
        ("amount_numeric * amount_numeric > 9223372036854775807", [-5, 1, None]),
        ("coalesce(score, 1) = 1", [1, None]),
        ("seen = timestamp '2026-11-01 19:00:00+07:00'", [-5, 1, None]),
    ],
)
def test_it_has_the_answers_of_googlesql(condition: str, selected: list[int | None]) -> None:
    scores = [-5, 1, None]
    columns = {"score": scores, "amount_numeric": [LARGEST] * 3, "seen": [NOON] * 3}
    table = pl.DataFrame(columns, schema={name: SCHEMA[name] for name in columns})
    found = table.filter(holds(parse_condition(condition, DECLARED).term))
    assert found["score"].to_list() == selected


# --- patterns -----------------------------------------------------------------------------------------------------


@st.composite
def language(draw: st.DrawFn) -> FraudRules:
    """A rule of each form, of any fields: orders that are equal in product and whatever else."""
    by = st.sets(st.sampled_from(("user_id", "quantity", "country", "source", "local_hour"))).map(
        lambda more: ["product_id", *sorted(more)]
    )
    of_integers = st.sampled_from(("user_id", "quantity", "amount_numeric"))
    within = st.sampled_from((timedelta(0), timedelta(microseconds=1), timedelta(seconds=1), timedelta(seconds=10)))
    members = st.integers(2, 4)
    takes_part = st.sampled_from((None, "country = 'ID'", "quantity > 1", "mod(user_id, 2) = 0", "local_hour < 4"))

    def rule(form: str, **pattern: Any) -> dict[str, Any]:
        when = draw(takes_part)
        return {"by": draw(by), form: pattern | {"within": draw(within)}} | ({"when": when} if when else {})

    return FraudRules.model_validate(
        {
            "version": "drawn",
            "rules": {
                "counted": rule("count", at_least=draw(members)),
                "different": rule(
                    "distinct", of=draw(st.sampled_from(("user_id", "source", "quantity", "country"))), at_least=draw(members)
                ),
                "in_a_row": rule("consecutive", of=draw(of_integers), at_least=draw(members)),
                "summed": rule(
                    "sum", of=draw(of_integers), at_least=draw(st.sampled_from((1, 5, 2_500_000, 100_000_001, LARGEST)))
                ),
            },
        }
    )


def table_of(placed: list[Order]) -> pl.DataFrame:
    columns = {name: [getattr(order, name) for order in placed] for name in Order.__dataclass_fields__}
    return pl.DataFrame(columns, schema={name: ORDER_SCHEMA[name] for name in columns})


@settings(max_examples=150)
@given(data=st.data(), rules=language())
def test_each_form_of_pattern_finds_what_the_judge_finds_with_evidence_that_holds(
    data: st.DataObject, rules: FraudRules
) -> None:
    placed = data.draw(orders(six_rules(), max_size=25))
    for name, finding in findings(table_of(placed), rules).items():
        found = {placed[row].order_id for row in finding.rows.tolist()}
        assert found == brute_force.hits_of(placed, name, rules), name
        for row, members in zip(finding.rows.tolist(), finding.members.tolist(), strict=True):
            assert row in members
            alone = [placed[place] for place in sorted(set(members))]
            assert placed[row].order_id in brute_force.hits_of(alone, name, rules), name


def test_a_sum_beyond_64_bits_is_a_sum() -> None:
    start = NOON
    placed = [Order(f"o{n}", n + 1, 1, 1, "x", LARGEST, "ID", start, start + timedelta(seconds=n), "web") for n in range(3)]
    entry = {"by": ["product_id"], "sum": {"of": "amount_numeric", "at_least": LARGEST, "within": "10 s"}}
    rules = FraudRules.model_validate({"version": "1", "rules": {"large": entry}})
    finding = findings(table_of(placed), rules)["large"]
    assert sorted(finding.rows) == [0, 1, 2]
    assert set(finding.value) == {LARGEST}


def test_a_rule_that_is_off_finds_nothing_and_needs_no_state() -> None:
    entry = {"by": ["product_id"], "count": {"at_least": 2, "within": "1 h"}, "mode": "off"}
    rules = FraudRules.model_validate({"version": "1", "rules": {"crowd": entry, "all": {"when": "true"}}})
    assert list(findings(table_of([]), rules)) == ["all"]
    assert rules.widest_window == timedelta(0)
