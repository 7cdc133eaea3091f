"""`finpro report` on the embedded platform: the page's figures against the marts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from batch.google_cloud import bigquery_client
from batch.warehouse.bigquery import load
from batch.warehouse.reconcile import reconcile
from conf.errors import ReportError
from conf.settings import Settings
from jobs.local.platform import Platform
from jobs.report import write_report
from jobs.transform import docs_page, transform
from tests.conftest import own_warehouse
from tests.oracle.marts import fill
from tests.runs.exports import export_run
from tests.runs.pages import Cell, Page


@pytest.fixture(scope="module")
def warehouse(platform: Platform) -> Iterator[Settings]:
    """A warehouse with marts."""
    with own_warehouse(platform) as settings:
        fill(settings)
        export_run(settings, "run-1")
        load(settings, "run-1")
        reconcile(settings, "run-1")
        transform(settings, run_id=None, full_refresh=False, select=(), say=lambda line: None)
        yield settings


@pytest.fixture(scope="module")
def page(warehouse: Settings, tmp_path_factory: pytest.TempPathFactory) -> Page:
    path = write_report(warehouse, tmp_path_factory.mktemp("report") / "new" / "report.html", locale="en")
    return Page(path.read_text(encoding="utf-8"))


def rows(settings: Settings, table: str, order: str, *columns: str) -> list[tuple[Any, ...]]:
    """Columns of all rows of a mart, in an order."""
    dataset = settings.bigquery_marts_dataset if table.startswith("mart_") else settings.bigquery_dataset
    query = f"select {', '.join(columns)} from {dataset}.{table} order by {order}"
    return [row.values() for row in bigquery_client(settings).query(query).result()]


def figures(table: list[list[Cell]]) -> list[tuple[float | None, ...]]:
    """The exact values of a table's cells, without the cells that hold words."""
    return [tuple(cell.number for cell in row if cell.values or cell.text.strip() == "\N{EN DASH}") for row in table]


@pytest.mark.parametrize(
    ("table", "mart", "order", "columns"),
    [
        (
            "saved",
            "mart_fraud_daily_saved_amount",
            "order_date desc",
            ("fraud_orders", "saved_amount", "cumulative_saved_amount"),
        ),
        ("active-users", "mart_top10_active_users", "user_rank", ("user_rank", "orders", "amount")),
        ("selling-products", "mart_top10_selling_products", "product_rank", ("product_rank", "units_sold", "revenue")),
        ("fraud-users", "mart_top10_users_fraud", "user_rank", ("user_rank", "fraud_orders", "fraud_amount")),
        (
            "risky-products",
            "mart_high_risk_products",
            "risk_rank limit 10",
            ("risk_rank", "total_orders", "fraud_orders", "fraud_rate", "fraud_amount"),
        ),
        (
            "products",
            "mart_products_revenue_profit",
            "revenue desc, product_id limit 10",
            ("units_sold", "revenue", "cost", "profit", "margin"),
        ),
        ("monitoring", "ingestion_monitoring", "table_name", ("source_rows", "destination_rows")),
    ],
)
def test_every_figure_of_a_table_is_the_marts(
    warehouse: Settings, page: Page, table: str, mart: str, order: str, columns: tuple[str, ...]
) -> None:
    expected = rows(warehouse, mart, order, *columns)
    assert expected
    assert figures(page.body(table)) == expected


def test_the_trend_is_the_marts_with_each_reason_of_a_day(warehouse: Settings, page: Page) -> None:
    columns = ("total_orders", "fraud_orders", "fraud_rate", "fraud_orders_7d_avg")
    trend = page.body("trend")
    assert figures([row[:-1] for row in trend]) == rows(warehouse, "mart_fraud_attempt_trends", "order_date desc", *columns)
    order = "order_date desc, orders desc, reason"
    by_day = rows(warehouse, "mart_fraud_reasons_by_day", order, "reason", "orders")
    assert ("spree", 1) in by_day
    assert [float(value) for row in trend for value in row[-1].values] == [orders for _, orders in by_day]
    shown = [part.rsplit(" ", 1)[0] for row in trend if row[-1].text for part in row[-1].text.split(", ")]
    assert shown == [reason.replace("_", " ") for reason, _ in by_day]


def test_how_good_a_rule_is_comes_from_its_weeks_together(warehouse: Settings, page: Page) -> None:
    columns = ("rule", "hits", "reviewed", "confirmed", "saved_amount", "wrongly_held_amount")
    expected: dict[str, list[int]] = {}
    for rule, *counts in rows(warehouse, "mart_rule_quality", "rule", *columns):
        before = expected.setdefault(rule, [0] * len(counts))
        expected[rule] = [one + int(more) for one, more in zip(before, counts, strict=True)]
    found = {row[0].text.replace(" ", "_"): [cell.number for cell in row[1:]] for row in page.body("rule-quality")}
    assert found.keys() == expected.keys()
    for rule, (hits, reviewed, confirmed, *amounts) in expected.items():
        precision = found[rule].pop(3)
        assert found[rule] == [hits, reviewed, confirmed, *amounts]
        assert precision == (pytest.approx(confirmed / reviewed) if reviewed >= 20 else None)
    assert any(reviewed >= 20 for _, reviewed, *_ in expected.values())


def test_days_names_and_reasons_are_the_marts(warehouse: Settings, page: Page) -> None:
    days = rows(warehouse, "mart_fraud_attempt_trends", "order_date desc", "order_date")
    assert [row[0].text for row in page.body("trend")] == [f"{day:%-d %b %Y}" for (day,) in days]
    people = rows(warehouse, "mart_top10_users_fraud", "user_rank", "name", "user_id", "main_reason")
    assert [" ".join(row[1].text.split()) for row in page.body("fraud-users")] == [
        f"{name or 'unknown user'} #{user_id} · {reason.replace('_', ' ')}" for name, user_id, reason in people
    ]


def test_totals_are_those_of_the_marts(warehouse: Settings, page: Page) -> None:
    def total(column: str, mart: str) -> Any:
        return int(sum(value for (value,) in rows(warehouse, mart, "1", column) if value is not None))  # a Decimal has a scale

    assert page.parts["tile-orders"].values == [str(total("total_orders", "mart_fraud_attempt_trends"))]
    assert page.parts["tile-frauds"].values[0] == str(total("fraud_orders", "mart_fraud_attempt_trends"))
    assert page.parts["tile-saved"].values == [str(total("saved_amount", "mart_fraud_daily_saved_amount"))]
    assert page.parts["tile-revenue"].values == [str(total("revenue", "mart_products_revenue_profit"))]
    assert page.parts["tile-profit"].values[0] == str(total("profit", "mart_products_revenue_profit"))
    sums = [total(column, "mart_products_revenue_profit") for column in ("revenue", "cost", "profit")]
    assert figures(page.body("categories"))[-1] == tuple(sums)
    by_reason: dict[str, list[int]] = {}
    for reason, orders, amount in rows(warehouse, "mart_fraud_reasons_by_day", "1", "reason", "orders", "amount"):
        before = by_reason.get(reason, [0, 0])
        by_reason[reason] = [before[0] + orders, before[1] + int(amount)]
    assert {row[0].text.replace(" ", "_"): [cell.number for cell in row[1:]] for row in page.body("reasons")} == by_reason


def test_the_page_links_to_the_models_pages_from_where_it_lies(warehouse: Settings, tmp_path: Path) -> None:
    path = write_report(warehouse, tmp_path / "a folder" / "report.html", locale="en")
    linked = [
        address for address in Page(path.read_text(encoding="utf-8")).addresses if address.endswith("dbt_docs/index.html")
    ]
    assert [(path.parent / address).resolve() for address in linked] == [docs_page().resolve()]


def test_without_marts_the_report_says_how_to_make_them(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="finpro transform"):
        write_report(settings, tmp_path / "report.html", locale="en")
    assert not (tmp_path / "report.html").exists()
