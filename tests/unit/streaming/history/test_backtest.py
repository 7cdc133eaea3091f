"""A backtest's numbers from counts of orders that are alike, by hand, and the page that shows them."""

from datetime import UTC, date, datetime
from typing import Any

import pytest

from conf.former_rules import SIX
from conf.rules import FraudRules
from streaming.history.backtest import BECOMES, STOPS, Alike, Backtest, Example, Hits, figures
from streaming.history.backtest_page import render_backtest
from tests.runs.pages import Page

DAY, NEXT = date(2026, 11, 21), date(2026, 11, 22)
MOMENT = datetime(2026, 11, 21, 17, tzinfo=UTC)


def alike(orders: int, before: str = "", after: str = "", label: str = "", **other: Any) -> Alike:
    """Orders of one million rupiah each; reasons separated by blanks."""
    given, found, planted = (frozenset(text.split()) for text in (before, after, label))
    nothing = frozenset[str]()
    return Alike(DAY, "v1", given, nothing, found, nothing, planted, orders, orders * 1_000_000)._replace(**other)


# 100 orders in all; the rules in force hit 5 for night_amount, the candidate 8, of which 6 carry that label, of 7 that do.
HISTORY = [
    alike(89),
    alike(4, before="night_amount", after="night_amount", label="night_amount"),
    alike(2, after="night_amount", label="night_amount", day=NEXT),
    alike(2, after="night_amount", rules_version="v2"),
    alike(1, before="night_amount", label="night_amount"),
    alike(2, before="foreign_country", shadow_after=frozenset({"foreign_country"})),
]


def test_precision_and_recall_are_those_of_a_worked_example() -> None:
    rule = figures(HISTORY, SIX).rules["night_amount"]
    assert (rule.precision(rule.before), rule.precision(rule.after)) == (5 / 5, 6 / 8)
    assert (rule.recall(rule.before), rule.recall(rule.after)) == (5 / 7, 6 / 7)
    whole = figures(HISTORY, SIX).whole
    assert (whole.precision(whole.before), whole.precision(whole.after)) == (5 / 7, 6 / 8)
    assert (whole.recall(whole.before), whole.recall(whole.after)) == (5 / 7, 6 / 7)


def test_an_order_changes_sides_when_it_gets_its_first_reason_or_loses_its_last() -> None:
    found = figures([*HISTORY, alike(3, before="foreign_country", after="foreign_country night_amount")], SIX)
    assert found.rules["night_amount"].becomes == Hits(4, 4_000_000, 2)
    assert found.rules["night_amount"].stops == Hits(1, 1_000_000, 1)
    assert (found.whole.becomes.orders, found.whole.stops.orders) == (4, 3)
    assert (found.orders, found.changed) == (103, 4 + 1 + 2 + 3)


def test_a_rule_in_shadow_has_hits_and_makes_no_fraud() -> None:
    rule = figures(HISTORY, SIX).rules["foreign_country"]
    assert (rule.before.orders, rule.after.orders) == (2, 2)
    assert (rule.becomes.orders, rule.stops.orders) == (0, 2)


def test_without_labels_there_is_no_precision_and_recall() -> None:
    found = figures([alike(5, after="night_amount"), alike(7)], SIX)
    for effect in (found.whole, *found.rules.values()):
        assert (effect.labels, effect.precision(effect.after), effect.recall(effect.after)) == (None, None, None)


def test_of_the_hits_that_somebody_has_looked_at_the_share_of_frauds_is_told() -> None:
    looked_at = [
        alike(6, after="night_amount", outcome="fraud"),
        alike(2, before="night_amount", after="night_amount", outcome="genuine"),
        alike(5, after="night_amount"),
        alike(9, outcome="fraud"),
    ]
    found = figures(looked_at, SIX)
    rule = found.rules["night_amount"]
    assert rule.after == Hits(13, 13_000_000, 0, reviewed=8, confirmed=6, wrongly_held=2_000_000)
    assert (rule.before.precision_of_reviewed, rule.after.precision_of_reviewed) == (0, 6 / 8)
    assert found.rules["foreign_country"].after.precision_of_reviewed is None
    assert found.reviewed == 17
    shown = {row[0].text: [cell.number for cell in row[1:]] for row in page(found).body("outcomes")}
    assert shown["night amount"] == [2, 8, 0, 0.75, 2_000_000, 2_000_000]


def test_days_are_counted_apart_and_versions_by_orders() -> None:
    found = figures(HISTORY, SIX)
    assert [(row["day"], row["before"], row["after"]) for row in found.days] == [(DAY, 7, 6), (NEXT, 0, 2)]
    assert [(row["night_amount_before"], row["night_amount_after"]) for row in found.days] == [(5, 6), (0, 2)]
    assert found.versions == {"v1": 98, "v2": 2}


def test_amounts_beyond_64_bits_are_exact() -> None:
    largest = 2**63 - 1
    found = figures(
        [alike(1, after="night_amount", amount=largest), alike(1, after="night_amount", day=NEXT, amount=largest)], SIX
    )
    assert found.whole.after.amount == 2 * largest


def example(kind: str = BECOMES, **other: Any) -> Example:
    order = {"order_id": "o1", "user_id": 4, "product_id": 7, "quantity": 2, "amount_numeric": 150_000_000, "country": "ID"}
    evidence = '{"order_ids":["o1","o2"],"value":150000000,"limit":100000000}' if kind == BECOMES else None
    return Example("night_amount", kind, order | {"event_ts": MOMENT} | other, evidence)


def page(found: Backtest, locale: str = "en", **rules: Any) -> Page:
    candidate = FraudRules.model_validate({"version": "v3", **rules})
    return Page(render_backtest(found, candidate, MOMENT, locale=locale))


def test_the_pages_tables_hold_the_figures() -> None:
    shown = page(figures(HISTORY, SIX))
    rules = {row[0].text.replace(" ", "_"): [cell.number for cell in row[1:]] for row in shown.body("by-rule")}
    assert rules["night_amount"] == [5, 8, 8_000_000, 4, 4_000_000, 1, 1_000_000]
    assert rules["Fraud_or_not"] == [7, 8, 8_000_000, 4, 4_000_000, 3, 3_000_000]
    labels = {row[0].text.replace(" ", "_"): [cell.number for cell in row[1:]] for row in shown.body("labels")}
    assert labels["night_amount"] == [7, 1.0, 0.75, 5 / 7, 6 / 7]
    assert [[cell.values for cell in row[1:2]] for row in shown.body("days")] == [[["2", "0"]], [["6", "7"]]]
    assert "rules v1 for 98 orders, rules v2 for 2 orders" in shown.parts["versions"].text


def test_every_rule_has_a_plot_of_its_hits_a_day() -> None:
    html = page(figures(HISTORY, SIX)).html
    assert all(f"Hits of {rule.replace('_', ' ')} a day" in html for rule in SIX)
    assert html.count("<svg") == 1 + len(SIX)


def test_an_example_shows_the_order_and_its_evidence_and_money_as_rupiah() -> None:
    shown = page(figures(HISTORY, SIX, [example(), example(STOPS)])).body("examples")
    assert shown[0][4].text == "Rp\xa0150,000,000"
    assert " ".join(shown[0][5].text.split()) == "Rp 150,000,000, limit Rp 100,000,000 o1, o2"
    assert " ".join(shown[0][0].text.split()) == "o1 becomes Fraud: night amount"
    assert shown[0][1].text == "22 Nov 2026, 00:00:00"
    assert " ".join(shown[1][5].text.split()) == "no longer"


@pytest.mark.parametrize("order_id", ["<script>alert(1)</script>", "{{ 7 * 7 }}", '"&amp;'])
def test_an_order_id_is_shown_as_it_is(order_id: str) -> None:
    shown = page(figures(HISTORY, SIX, [example(order_id=order_id)]))
    assert order_id in shown.body("examples")[0][0].text
    assert "script" not in shown.tags


def test_a_page_without_labels_says_so() -> None:
    shown = page(figures([alike(7)], SIX))
    assert "no order carries a label" in shown.text
    assert "labels" not in shown.tables


def test_a_rule_in_shadow_is_marked() -> None:
    shown = page(figures(HISTORY, SIX), foreign_country={"mode": "shadow"})
    assert [row[0].text for row in shown.body("by-rule") if "shadow" in row[0].text] == ["foreign country in shadow"]


def test_the_page_asks_for_nothing_beyond_itself() -> None:
    shown = page(figures(HISTORY, SIX, [example()]))
    assert shown.addresses == ["data:,"]
    assert not shown.tags & {"script", "iframe", "object", "embed", "img", "base", "form"}
