"""The report's page and charts, from figures at hand."""

import re
from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from hypothesis import example, given
from hypothesis import strategies as st

from batch.report.charts import daily_chart
from batch.report.marts import QUERIES, Marts
from batch.report.report_page import LEAST_REVIEWED, Expectation, Gate, Surroundings, render_report
from conf.errors import SettingsError
from jobs.transform import PROJECT
from tests.oracle.googlesql import GoogleSql
from tests.runs.pages import Page

DAY = date(2026, 11, 22)
MONITORING = {
    "run_id": "string",
    "table_name": "string",
    "source_rows": "int64",
    "destination_rows": "int64",
    "status": "string",
    "finished_at": "timestamp",
}


def marts(**other: Any) -> Marts:
    """Figures of one day, one user and one product."""
    trend = {"order_date": DAY, "total_orders": 2_000, "fraud_orders": 3, "fraud_rate": 0.0015, "fraud_orders_7d_avg": 1.5}
    spree = {"reason": "spree", "orders": 2, "amount": 1_000_000}
    quality = {"rule": "spree", "hits": 2, "reviewed": 1, "confirmed": 1}
    saved = {"order_date": DAY, "fraud_orders": 3, "saved_amount": 1_234_567, "cumulative_saved_amount": 1_234_567}
    product = {"product_id": 7, "product_name": "Kopi", "category": "Groceries", "units_sold": 5, "revenue": 9_000_000}
    one = Marts(
        totals={"total_orders": 2_000, "fraud_orders": 3, "first_day": DAY, "last_day": DAY, "saved_amount": 1_234_567},
        reasons=[spree],
        reasons_by_day=[spree | {"order_date": DAY}],
        rule_quality=[quality | {"saved_amount": 900_000, "wrongly_held_amount": 100_000}],
        trend=[trend],
        saved=[saved],
        active_users=[{"user_rank": 1, "user_id": 4, "name": "Siti", "orders": 9, "amount": 1_000}],
        selling_products=[product | {"product_rank": 1}],
        fraud_users=[],
        risky_products=[],
        sales={"revenue": 9_000_000, "cost": 6_000_000, "profit": 3_000_000, "revenue_without_cost": 0},
        categories=[product | {"cost": 6_000_000, "profit": 3_000_000}],
        products=[product | {"cost": 6_000_000, "profit": 3_000_000, "margin": 1 / 3}],
        monitoring=[],
    )
    return one._replace(**other)


def page(figures: Marts | None = None, *, gate: tuple[Expectation, ...] = (), locale: str = "en", **links: str) -> Page:
    now = datetime(2026, 11, 22, 17, tzinfo=UTC)
    found = Gate("run-1", gate) if gate else None
    return Page(
        render_report(
            figures or marts(), Surroundings(found, links, "Asia/Jakarta", "v1", ["dear", "spree"], now), locale=locale
        )
    )


def user(name: str | None) -> list[Mapping[str, Any]]:
    return [{"user_rank": 1, "user_id": 4, "name": name, "orders": 9, "amount": 1_000}]


def test_the_page_asks_for_nothing_beyond_itself() -> None:
    shown = page(docs="data_docs/index.html")
    assert sorted(shown.addresses) == ["data:,", "data_docs/index.html"]
    assert not shown.tags & {"script", "iframe", "object", "embed", "img", "base", "form"}
    assert "default-src 'none'" in shown.html
    assert not re.search(r"https?:|//[a-z]|@import|url\(", shown.html)


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", 'Siti "<b>" & Co', "{{ 7 * 7 }}", "&amp;"])
def test_a_name_is_shown_as_it_is(name: str) -> None:
    shown = page(marts(active_users=user(name)), gate=(Expectation("raw_users", name, False, "warn", False, name),))
    assert name in shown.body("active-users")[0][1].text
    assert shown.text.count(name) == 4
    assert "script" not in shown.tags


def test_an_unknown_user_is_called_unknown() -> None:
    assert "unknown user #4" in page(marts(active_users=user(None))).body("active-users")[0][1].text


@pytest.mark.parametrize(
    ("locale", "written"), [("en", "Rp\xa01,234,567"), ("id", "Rp\xa01.234.567"), ("en-ID", "Rp\xa01.234.567")]
)
def test_money_is_written_as_the_locale_does_and_exact_underneath(locale: str, written: str) -> None:
    cell = page(locale=locale).body("saved")[0][2]
    assert (cell.text, cell.values) == (written, ["1234567"])


def test_a_locale_that_is_none_is_refused() -> None:
    with pytest.raises(SettingsError, match="not a locale"):
        page(locale="klingon")


def test_reasons_of_any_name_are_shown_and_rules_that_have_hit_nothing() -> None:
    assert [[cell.text for cell in row[:2]] for row in page().body("reasons")] == [["spree", "2"], ["dear", "0"]]
    assert page().body("trend")[0][-1].text == "spree 2"
    nothing = page(marts(reasons=[], reasons_by_day=[], rule_quality=[]))
    assert [row[0].text for row in nothing.body("reasons")] == ["dear", "spree"]
    assert "No rule has hit an order yet." in nothing.text


def test_the_precision_of_few_is_hidden_on_the_page_as_in_the_mart() -> None:
    few = marts().rule_quality[0]
    enough = dict(few) | {"reviewed": LEAST_REVIEWED, "confirmed": 15}
    shown = page(marts(rule_quality=[few, enough])).body("rule-quality")
    assert [[cell.number for cell in row[1:]] for row in shown] == [
        [2, 1, 1, None, 900_000, 100_000],
        [2, 20, 15, 0.75, 900_000, 100_000],
    ]
    project = yaml.safe_load(Path(PROJECT, "dbt_project.yml").read_text(encoding="utf-8"))
    assert project["vars"]["least_reviewed"] == LEAST_REVIEWED


def test_times_and_days_are_those_of_the_time_zone() -> None:
    assert "Written 23 Nov 2026, 00:00" in page().text


@pytest.mark.parametrize(
    ("statuses", "said"), [(["Consistent"] * 2, "Consistent"), (["Consistent", "Inconsistent"], "Inconsistent")]
)
def test_one_inconsistent_table_makes_the_newest_run_inconsistent(statuses: list[str], said: str) -> None:
    older = {"run_id": "a", "source_rows": 1, "destination_rows": 1, "finished_at": datetime(2026, 11, 1, tzinfo=UTC)}
    newest = [older | {"run_id": "b", "table_name": f"t{place}", "status": status} for place, status in enumerate(statuses)]
    shown = page(marts(monitoring=[*newest, older | {"table_name": "t0", "status": "Inconsistent"}]))
    assert f"source and warehouse: {said}\n" in shown.text


def test_a_page_without_a_gate_says_how_to_run_one() -> None:
    assert "finpro validate" in page().text


def test_the_gates_chip_counts_what_holds_and_is_red_only_for_what_stops_a_run() -> None:
    held, warned = Expectation("t", "a", True, "fail", False, ""), Expectation("t", "b", False, "warn", False, "2 rows")
    assert "chip warn" in page(gate=(held, warned)).html
    assert "gate: 1 of 2 expectations hold" in page(gate=(held, warned)).text
    assert "1 held after run run-1" in page(gate=(held, warned)).text
    assert "chip bad" in page(gate=(held, warned._replace(stops=True))).html


def test_bars_stand_on_the_ground_as_high_as_their_figures_and_days_without_figures_stay_empty() -> None:
    chart = daily_chart([DAY, DAY + timedelta(days=2)], [10, 40])
    assert [bar.height for bar in chart.bars] == [25, 100]
    assert all(bar.y + bar.height == pytest.approx(100) for bar in chart.bars)
    assert [bar.x + bar.width / 2 for bar in chart.bars] == pytest.approx([100 / 6, 500 / 6])


@pytest.mark.parametrize(("carry_on", "strokes"), [(True, 1), (False, 2)])
def test_over_an_empty_day_a_running_total_carries_on_and_an_average_breaks_off(carry_on: bool, strokes: int) -> None:
    chart = daily_chart([DAY, DAY + timedelta(days=2)], [], [10, 40], carry_on=carry_on)
    assert chart.line.count("M") == strokes


@given(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=400))
@example([10**17 + 1])
def test_every_figure_lies_within_the_scale_and_grid_lines_are_few_whole_numbers(figures: list[int]) -> None:
    chart = daily_chart([DAY + timedelta(days=place) for place in range(len(figures))], figures)
    assert all(-1e-9 <= bar.y <= 100 for bar in chart.bars)
    assert 2 <= len(chart.ticks) <= 6
    assert all(float(tick.value).is_integer() for tick in chart.ticks)
    assert chart.ticks[-1].value >= max(figures)


def declared_marts() -> dict[str, dict[str, str]]:
    """The marts' columns and types, as dbt enforces them."""
    documents = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in Path(PROJECT, "models", "marts").glob("*.yml")]
    models = [model for document in documents for model in document.get("models", [])]
    return {model["name"]: {column["name"]: column["data_type"] for column in model["columns"]} for model in models}


def test_bigquery_accepts_every_query_of_the_report() -> None:
    google_sql = GoogleSql(declared_marts() | {"ingestion_monitoring": MONITORING})
    for query in QUERIES.values():
        assert google_sql.columns(query.replace("{marts}.", "").replace("{raw}.", ""))
