"""What the report reads: the marts and the record of ingestion, as rows of plain values."""

from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

from google.api_core.exceptions import NotFound
from google.cloud import bigquery

from conf.errors import ReportError

Row = Mapping[str, Any]

# What a page can show of tables that grow.
DAYS, WEEKS, RISKY_PRODUCTS, PRODUCTS, MONITORED = 90, 13, 10, 10, 15
# The last days with orders; a day that is not yet here, of an order with a wrong date, is not one of them.
_NEWEST_DAY = """
    (
        select coalesce(max(if(order_date <= date_add(current_date(), interval 1 day), order_date, null)), max(order_date))
        from {marts}.mart_fraud_attempt_trends
    )"""
_NEWEST_DAYS = f"date_diff({_NEWEST_DAY}, order_date, day) between 0 and {DAYS - 1}"
# The last weeks in which a rule has hit an order.
_NEWEST_WEEKS = f"""
    date_diff(
        (
            select coalesce(max(if(week <= date_add(current_date(), interval 1 day), week, null)), max(week))
            from {{marts}}.mart_rule_quality
        ), week, day
    ) between 0 and {7 * WEEKS - 1}"""

QUERIES = {
    "totals": """
        select sum(total_orders) as total_orders, sum(fraud_orders) as fraud_orders,
            min(order_date) as first_day, max(order_date) as last_day,
            (select sum(saved_amount) from {marts}.mart_fraud_daily_saved_amount) as saved_amount
        from {marts}.mart_fraud_attempt_trends""",
    "reasons": """
        select reason, sum(orders) as orders, sum(amount) as amount
        from {marts}.mart_fraud_reasons_by_day group by reason order by orders desc, reason""",
    "reasons_by_day": f"""
        select order_date, reason, orders, amount
        from {{marts}}.mart_fraud_reasons_by_day
        where {_NEWEST_DAYS}
        order by order_date, orders desc, reason""",
    "rule_quality": f"""
        select rule, sum(hits) as hits, sum(reviewed) as reviewed, sum(confirmed) as confirmed,
            sum(saved_amount) as saved_amount, sum(wrongly_held_amount) as wrongly_held_amount
        from {{marts}}.mart_rule_quality
        where {_NEWEST_WEEKS}
        group by rule order by hits desc, rule""",
    "trend": f"""
        select order_date, total_orders, fraud_orders, fraud_rate, fraud_orders_7d_avg
        from {{marts}}.mart_fraud_attempt_trends
        where {_NEWEST_DAYS}
        order by order_date""",
    "saved": f"""
        select order_date, fraud_orders, saved_amount, cumulative_saved_amount
        from {{marts}}.mart_fraud_daily_saved_amount
        where {_NEWEST_DAYS}
        order by order_date""",
    "active_users": """
        select user_rank, user_id, name, orders, amount from {marts}.mart_top10_active_users order by user_rank""",
    "selling_products": """
        select product_rank, product_id, product_name, units_sold, revenue
        from {marts}.mart_top10_selling_products order by product_rank""",
    "fraud_users": """
        select user_rank, user_id, name, fraud_orders, fraud_amount, main_reason
        from {marts}.mart_top10_users_fraud order by user_rank""",
    "risky_products": f"""
        select risk_rank, product_id, product_name, category, total_orders, fraud_orders, fraud_rate, fraud_amount
        from {{marts}}.mart_high_risk_products order by risk_rank limit {RISKY_PRODUCTS}""",
    "sales": """
        select coalesce(sum(revenue), 0) as revenue, coalesce(sum(cost), 0) as cost, coalesce(sum(profit), 0) as profit,
            coalesce(sum(if(cost is null, revenue, 0)), 0) as revenue_without_cost
        from {marts}.mart_products_revenue_profit""",
    "categories": """
        select category, sum(units_sold) as units_sold, sum(revenue) as revenue, sum(cost) as cost, sum(profit) as profit
        from {marts}.mart_products_revenue_profit group by category order by revenue desc, category""",
    "products": f"""
        select product_id, product_name, category, units_sold, revenue, cost, profit, margin
        from {{marts}}.mart_products_revenue_profit order by revenue desc, product_id limit {PRODUCTS}""",
    "monitoring": f"""
        select run_id, table_name, source_rows, destination_rows, status, finished_at
        from {{raw}}.ingestion_monitoring order by finished_at desc, table_name limit {MONITORED}""",
}


class Marts(NamedTuple):
    """The figures of a report. Days are dates, money is whole rupiah, rates are 0 to 1, times are in UTC.

    `totals`, `reasons` (the most frequent first) and `sales` cover everything; `trend`, `reasons_by_day` and `saved` the newest
    days that have orders, oldest first; `rule_quality` the newest weeks, those of a rule together. Of the risky products, of
    the products by revenue and of the newest ingestion records there are as many as fit on a page. Names, categories, costs and
    margins are None where a product or user is unknown.
    """

    totals: Row
    reasons: Sequence[Row]
    reasons_by_day: Sequence[Row]
    rule_quality: Sequence[Row]
    trend: Sequence[Row]
    saved: Sequence[Row]
    active_users: Sequence[Row]
    selling_products: Sequence[Row]
    fraud_users: Sequence[Row]
    risky_products: Sequence[Row]
    sales: Row
    categories: Sequence[Row]
    products: Sequence[Row]
    monitoring: Sequence[Row]


def read_marts(client: bigquery.Client, *, marts: str, raw: str) -> Marts:
    """Read every mart, and the record of ingestion, of these two datasets in the client's project.

    Raises:
        ReportError: a mart is missing, or there is not one order in it.
    """
    datasets = {"marts": f"`{client.project}`.{marts}", "raw": f"`{client.project}`.{raw}"}
    queries = {name: query.format(**datasets) for name, query in QUERIES.items()}
    try:
        jobs = {name: client.query(query) for name, query in queries.items()}
        found: dict[str, Any] = {name: [_plain(row) for row in job.result()] for name, job in jobs.items()}
    except NotFound as error:
        raise ReportError(f"A mart is missing: {error.message}. Run `finpro transform` first.") from error
    if not found["trend"]:
        raise ReportError("The marts hold no order yet: export, load and transform some first.")
    single = {name: found[name][0] for name in ("totals", "sales")}
    return Marts(**(found | single))


def _plain(row: bigquery.Row) -> Row:
    """A row with its sums as whole numbers: they are NUMERIC where INT64 could overflow."""
    return {name: int(value) if isinstance(value, Decimal) else value for name, value in row.items()}
