"""The rules over history, without Spark: any slices, any cuts, and the period a command asks for."""

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.errors import SettingsError
from conf.lists import Entries, packed
from conf.rules import FraudRules
from streaming.contract import ORDER_SCHEMA
from streaming.history.rescreening import parse_period, rescreened_tables
from tests.oracle.brute_force import Order, screen
from tests.oracle.order_sets import orders, rule_sets

MICROSECOND = timedelta(microseconds=1)
START = datetime(2026, 11, 1, tzinfo=UTC)


def table(history: list[Order]) -> pl.DataFrame:
    """Orders as the lakehouse holds them."""
    schema = {name: dtype for name, dtype in ORDER_SCHEMA.items() if name in Order.__dataclass_fields__}
    return pl.DataFrame([vars(order) for order in history], schema=schema)


def sliced(history: pl.DataFrame, rules: FraudRules, width: int) -> pl.DataFrame:
    """Every slice of `width` microseconds that owns an order, with the orders around it: what the shuffle brings a worker."""
    moment = pl.col("event_ts").to_physical()
    window = rules.widest_window // MICROSECOND
    starts = sorted({time // width * width for time in history["event_ts"].to_physical()})
    parts = [
        history.filter(moment.is_between(start - window, start + width - 1 + window)).with_columns(
            slice=pl.lit(start, pl.Int64)
        )
        for start in starts
    ]
    return pl.concat(parts).sort("slice", "product_id", "event_ts", "order_id")


def cut(data: st.DataObject, whole: pl.DataFrame) -> Iterator[pl.DataFrame]:
    """The same rows, in pieces."""
    while len(whole):
        size = data.draw(st.integers(1, len(whole)))
        yield whole[:size]
        whole = whole[size:]


def reasons(tables: Iterator[pl.DataFrame], column: str = "reasons") -> dict[str, list[str]]:
    """Order id → reasons, of tables that hold every order once."""
    found = pl.concat(list(tables)).select("order_id", column)
    assert found["order_id"].is_unique().all()
    return dict(found.iter_rows())


@settings(max_examples=150)
@given(st.data())
def test_any_slices_and_any_cuts_give_the_verdicts_of_one_table(data: st.DataObject) -> None:
    rules = data.draw(rule_sets())
    history = data.draw(orders(rules))
    window = rules.widest_window // MICROSECOND
    width = data.draw(st.sampled_from((1_000_000, 3_600_000_000)) | st.integers(window // 3 + 1, 4 * window + 1))
    pieces = cut(data, sliced(table(history), rules, width))
    found = reasons(rescreened_tables(pieces, rules, width, at_once=data.draw(st.integers(1, 10))))
    assert found == {order_id: verdict.reasons for order_id, verdict in screen(history, rules).items()}


@settings(max_examples=50)
@given(st.data())
def test_evidence_does_not_depend_on_slices_and_cuts(data: st.DataObject) -> None:
    rules = data.draw(rule_sets())
    history = table(data.draw(orders(rules)))
    width = 3 * (rules.widest_window // MICROSECOND) + 1_000_000
    names = ["order_id", "evidence"]
    whole, pieces = sliced(history, rules, 10**15), cut(data, sliced(history, rules, width))
    (one,) = rescreened_tables([whole], rules, 10**15)
    many = pl.concat(rescreened_tables(pieces, rules, width, at_once=1))
    assert many.select(names).sort("order_id").equals(one.select(names).sort("order_id"))


def test_an_order_has_evidence_for_exactly_the_reasons_it_has() -> None:
    history = [order(number, START + timedelta(seconds=3 * number), user=7) for number in range(4)]
    (found,) = rescreened_tables(
        [sliced(table(history), FraudRules(version="v"), 3_600_000_000)], FraudRules(version="v"), 3_600_000_000
    )
    assert found["reasons"].to_list() == [["repeat_purchase"]] * 4
    assert found["evidence"][3] == '{"repeat_purchase":{"order_ids":["o1","o2","o3"],"value":4,"limit":3}}'


def test_a_rule_that_names_a_product_sees_it_in_every_slice() -> None:
    pattern = {"by": ["product_id"], "when": "product_id = 1", "count": {"at_least": 2, "within": "1 s"}}
    rules = FraudRules.model_validate({"version": "v", "rules": {"one": {"when": "product_id = 1"}, "two": pattern}})
    history = sliced(
        table([order(number, START + timedelta(minutes=40 * number)) for number in range(4)]), rules, 3_600_000_000
    )
    (found,) = rescreened_tables([history], rules, 3_600_000_000)
    assert found["reasons"].to_list() == [["one"]] * 4


def test_a_rule_in_shadow_gives_shadow_reasons_and_no_reasons() -> None:
    rules = FraudRules.model_validate({"version": "v", "foreign_country": {"mode": "shadow"}})
    history = sliced(table([order(1, START, country="SG")]), rules, 3_600_000_000)
    (found,) = rescreened_tables([history], rules, 3_600_000_000)
    assert found.select("reasons", "shadow_reasons").row(0) == ([], ["foreign_country"])
    assert found["evidence"].to_list() == ['{"foreign_country":{"order_ids":["o1"],"value":"SG","limit":"ID"}}']


@pytest.mark.parametrize(("by", "value"), [("user_id", "7"), ("product_id", "1")])
def test_a_list_suppresses_a_reason_of_those_on_it(by: str, value: str) -> None:
    content = packed(Entries([value], ["known"], [None]))
    allowing = {"file": "known.csv", "allows": {"by": by, "reasons": ["foreign_country"]}, "content": content}
    rules = FraudRules.model_validate(FraudRules(version="v").model_dump() | {"lists": {"known": allowing}})
    placed = [order(1, START, user=7, country="SG"), order(2, START + timedelta(minutes=1), user=8, country="SG")]
    (found,) = rescreened_tables([sliced(table(placed), rules, 3_600_000_000)], rules, 3_600_000_000)
    given = [[], []] if by == "product_id" else [[], ["foreign_country"]]
    assert found["reasons"].to_list() == given
    assert found["suppressed_reasons"].to_list() == [["foreign_country"], [] if given[1] else ["foreign_country"]]
    assert found["evidence"][0] == '{"foreign_country":{"order_ids":["o1"],"value":"SG","limit":"ID"}}'


@pytest.mark.parametrize("when", ["product_id = 5", "listed(product_id, 'some')"])
def test_a_rule_can_look_at_the_product(when: str) -> None:
    some = {"file": "some.csv", "content": packed(Entries(["5"], [""], [None]))}
    rules = FraudRules.model_validate({"version": "v", "lists": {"some": some}, "rules": {"watched": {"when": when}}})
    placed = [replace(order(product, START), product_id=product) for product in (3, 5, 7)]
    found = reasons(rescreened_tables([sliced(table(placed), rules, 3_600_000_000)], rules, 3_600_000_000))
    assert found == {"o3": [], "o5": ["watched"], "o7": []}


def test_of_a_hot_product_no_more_than_what_may_still_meet_is_held_back() -> None:
    rules = FraudRules(version="v")
    history = sliced(table([order(n, START + timedelta(seconds=n), user=n + 1) for n in range(3_000)]), rules, 3_600_000_000)
    pieces = [history[first : first + 100] for first in range(0, 3_000, 100)]
    sizes = [len(found) for found in rescreened_tables(pieces, rules, 3_600_000_000, at_once=100)]
    assert sum(sizes) == 3_000
    assert max(sizes) <= 200


def order(number: int, event_ts: datetime, *, user: int = 1, country: str = "ID") -> Order:
    return Order(f"o{number}", user, 1, number + 1, "1000", 1000, country, event_ts, event_ts, "web")


def test_a_period_is_read_in_the_time_zone_unless_it_names_an_offset() -> None:
    period = parse_period("2026-11-22", "2026-11-22T08:30:00+00:00", "Asia/Jakarta")
    assert period.since is not None
    assert period.since.tzinfo is UTC
    assert period == (datetime(2026, 11, 21, 17, tzinfo=UTC), datetime(2026, 11, 22, 8, 30, tzinfo=UTC))
    assert parse_period(None, None, "UTC") == (None, None)


@pytest.mark.parametrize(
    ("since", "until", "said"),
    [
        ("yesterday", None, "--since yesterday"),
        (None, "2026-02-30", "--until 2026-02-30"),
        ("0001-01-01", None, "--since 0001-01-01"),
        ("2026-11-22", "2026-11-22", "no time between"),
        ("2026-11-22T00:00:00+00:00", "2026-11-22", "no time between"),
    ],
)
def test_a_period_that_is_none_is_refused(since: str | None, until: str | None, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        parse_period(since, until, "Asia/Jakarta")
