"""Made-up orders for the warehouse, and every mart twice: as dbt built it in BigQuery, and computed in Postgres."""

from collections.abc import Sequence
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl

from batch.frames import copy_frame
from batch.google_cloud import bigquery_client
from batch.postgres import connect
from batch.reference_data import generate, products, users
from conf.rules import load_rules
from conf.settings import CONF_DIR, Settings
from streaming.shop.orders import Shop, order_batches
from tests.runs.exports import execute

MARTS = (
    "mart_fraud_attempt_trends",
    "mart_fraud_daily_saved_amount",
    "mart_fraud_reasons_by_day",
    "mart_high_risk_products",
    "mart_products_revenue_profit",
    "mart_rule_quality",
    "mart_top10_active_users",
    "mart_top10_selling_products",
    "mart_top10_users_fraud",
)
USERS, PRODUCTS, ORDERS, DAYS = 60, 25, 2_000, 12

_COMPUTED = Path(__file__).with_suffix(".sql")
_RULES = load_rules(CONF_DIR / "fraud_rules.toml")
_FROM = datetime(2026, 10, 20, tzinfo=UTC)

Rows = list[tuple[Any, ...]]


def fill(settings: Settings) -> None:
    """Users, products, and orders over some days with frauds among them; and orders at the edges of what can come."""
    dsn = settings.require("postgres_dsn")
    generate(dsn, user_count=USERS, product_count=PRODUCTS, seed=3)
    shop = Shop(pl.concat(users(USERS, 3))["user_id"], pl.concat(products(PRODUCTS, 3)))
    rate = ORDERS / (DAYS * 86_400)
    batches = order_batches(lambda: shop, _RULES, orders=ORDERS, seed=5, start=_FROM, rate=rate, bursts=0.2)
    with connect(dsn) as connection, connection.cursor() as cursor:
        for batch in batches:
            copy_frame(cursor, "raw_orders", _verdicts(batch))
    insert_order(settings, "last of a day", "2026-10-24 16:59:59.999999+00")
    insert_order(settings, "first of a day", "2026-10-24 17:00:00+00")
    insert_order(settings, "unknown user", "2026-10-25 10:00:00+00", user=900)
    insert_order(settings, "unknown product", "2026-10-25 10:00:00+00", product=901)
    insert_order(settings, "unknown both", "2026-10-25 10:00:00+00", user=900, product=901, reason="night_amount")
    insert_order(settings, "worth nothing", "2026-10-25 10:00:00+00", amount=0, product=902)
    insert_order(settings, "of another rule", "2026-10-25 10:00:00+00", reason="spree")
    insert_order(settings, "after days without any", "2026-11-09 10:00:00+00", reason="night_amount")
    for number in range(40):  # more frauds than any other user has, with two reasons equally often
        reason = "night_amount" if number % 2 else "foreign_country"
        insert_order(settings, f"tied {number}", "2026-10-26 10:00:00+00", user=903, reason=reason)
    # Two of three frauds and some other orders are looked at; what was said first of some is corrected, at once or later.
    said = "case abs(hashtext(order_id)) %% 4 when %s then 'genuine' else 'fraud' end, 'desk %s'"
    for place, (moment, where) in enumerate([(1, "status = 'Fraud'"), (1, "user_id = 903"), (9, "quantity = 1")]):
        execute(
            settings,
            f"""
            insert into order_outcomes (order_id, outcome, reviewed_by, decided_at, source)
            select order_id, {said}, event_ts + %s * interval '1 day', 'file' from raw_orders
            where {where} and abs(hashtext(order_id)) %% 3 > 0 order by order_id""",
            *(place, place, moment),
        )


def insert_order(
    settings: Settings, order_id: str, moment: str, *, user: int = 1, product: int = 1, amount: int = 70_000, reason: str = ""
) -> None:
    """One order of two pieces, Fraud when there is a reason."""
    statement, values = order_row(order_id, moment, user=user, product=product, amount=amount, reason=reason)
    execute(settings, statement, *values)


def order_row(
    order_id: str, moment: str, *, user: int, product: int, amount: int, reason: str = ""
) -> tuple[str, list[str | int]]:
    """The INSERT of one order of two pieces, and its parameters."""
    statement = """
        insert into raw_orders
          (order_id, user_id, product_id, quantity, amount, amount_numeric, country, created_date, event_ts, status, source,
           reasons, rules_version, screened_at)
        values (%s, %s, %s, 2, %s, %s, 'ID', %s, %s, %s, 'web', %s, 'v', now())"""
    status = "Fraud" if reason else "Genuine"
    return statement, [order_id, user, product, str(amount), amount, moment, moment, status, f"{{{reason}}}"]


def _verdicts(orders: pl.DataFrame) -> pl.DataFrame:
    """Made-up orders as rows of raw_orders: what was planted is Fraud, for the reasons of its label."""
    label = pl.col("label").fill_null("")
    given = ["order_id", "user_id", "product_id", "quantity", "amount", "country", "created_date", "event_ts", "source"]
    return orders.select(
        *given,
        amount_numeric=pl.col("amount").str.replace_all(r"\D", "").cast(pl.Int64),
        status=pl.when(label == "").then(pl.lit("Genuine")).otherwise(pl.lit("Fraud")),
        reasons=pl.format("{{{}}}", label),
        rules_version=pl.lit(_RULES.version),
        screened_at=pl.col("event_ts"),
    )


def marts(settings: Settings) -> dict[str, Rows]:
    """The marts as they stand in BigQuery."""
    return {mart: in_bigquery(settings, mart) for mart in MARTS}


def in_bigquery(settings: Settings, table: str) -> Rows:
    """All rows of a mart or of a table of the core, sorted."""
    dataset = settings.bigquery_marts_dataset if table in MARTS else settings.bigquery_core_dataset
    rows = bigquery_client(settings).query(f"select * from {dataset}.{table}").result()
    return sorted((_comparable(row.values()) for row in rows), key=str)


def in_postgres(
    settings: Settings, cost_changes: Sequence[tuple[int, int, datetime]] = (), time_zone: str = _RULES.time_zone
) -> dict[str, Rows]:
    """The marts, computed from the raw tables of Postgres by tests/oracle/marts.sql.

    `cost_changes` are the products whose cost has changed, what they cost before, and when that was.
    """
    computed = {}
    with connect(settings.require("postgres_dsn")) as connection, connection.cursor() as cursor:
        cursor.execute("select set_config('finpro.time_zone', %s, false)", [time_zone])
        cursor.execute("create temporary table cost_changes (product_id bigint, cost_before bigint, changed_at timestamptz)")
        cursor.executemany("insert into cost_changes values (%s, %s, %s)", cost_changes)
        cursor.execute(_COMPUTED.read_text(encoding="utf-8"))
        for mart in MARTS:
            cursor.execute(f"select * from {mart}")
            computed[mart] = sorted((_comparable(row) for row in cursor.fetchall()), key=str)
    return computed


def _comparable(row: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(_comparable_value(value) for value in row)


def _comparable_value(value: Any) -> Any:
    """Sums of Postgres are decimals; the last digits of a float depend on the order of its operations."""
    if isinstance(value, float):
        return f"{value:.9g}"
    if isinstance(value, Decimal):
        return int(value)
    return tuple(value) if isinstance(value, list) else value
