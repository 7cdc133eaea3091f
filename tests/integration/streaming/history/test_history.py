"""The rules over history on Spark: slices of time and their margins, and bronze read by the contract."""

import json
import tomllib
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pyspark.sql import SparkSession

from conf.rules import FraudRules
from streaming.history.rescreening import orders_of, rescreened
from tests.oracle.bad_messages import BAD, MAX_FUTURE_SKEW, message
from tests.oracle.brute_force import LONG_AFTER, Message, Order, Unreadable, read, screen
from tests.oracle.order_sets import spelled
from tests.runs.screening import ACROSS_PRODUCTS, dense_orders

HOUR = timedelta(hours=1)
BORDER = datetime(2026, 11, 1, 18, tzinfo=UTC)  # slices of an hour meet here
SILVER = """
    order_id string, user_id bigint, product_id bigint, quantity bigint, amount string, amount_numeric bigint, country string,
    created_date timestamp, event_ts timestamp, source string
"""


def across_borders(rules: FraudRules) -> list[Order]:
    """Three crowds of orders, each some seconds before and after a border between slices."""
    step = timedelta(milliseconds=200)
    starts = [BORDER + number * HOUR - timedelta(seconds=20) for number in range(3)]
    return [order for seed, start in enumerate(starts) for order in dense_orders(200, rules, seed=seed, start=start, step=step)]


def test_patterns_across_the_borders_of_slices_are_whole(spark_session: SparkSession) -> None:
    rules = FraudRules.model_validate(tomllib.loads(Path("conf/fraud_rules.toml").read_text() + ACROSS_PRODUCTS))
    orders = across_borders(rules)
    frame = spark_session.createDataFrame([tuple(vars(order).values()) for order in orders], SILVER)
    found = rescreened(frame, rules).select("order_id", "reasons", "evidence").collect()
    judged = {order_id: verdict.reasons for order_id, verdict in screen(orders, rules).items()}
    assert {row["order_id"]: row["reasons"] for row in found} == judged
    assert {row["order_id"]: list(json.loads(row["evidence"] or "{}")) for row in found} == judged
    assert len(found) == len(orders)
    assert {"busy_user", "foreign_rush", "foreign_country", "coordinated_users"} <= {
        one for row in found for one in row["reasons"]
    }


def test_bronze_read_by_the_contract_is_orders_and_dead_letters(spark_session: SparkSession) -> None:
    orders = dense_orders(50, FraudRules(version="v"), seed=1, start=BORDER - 24 * HOUR, step=timedelta(seconds=1))
    values = [*(bad.value for bad in BAD), *(spelled(order, number % 6) for number, order in enumerate(orders))]
    messages = [message(value, offset=offset) for offset, value in enumerate(values)]
    rows = [(one.topic, one.partition, one.offset, one.timestamp, one.value) for one in messages]
    bronze = spark_session.createDataFrame(
        rows, "topic string, partition int, offset bigint, timestamp timestamp, value binary"
    )
    found = orders_of(bronze, MAX_FUTURE_SKEW, LONG_AFTER).collect()
    assert {row["offset"]: row["order_id"] for row in found} == {one.offset: order_id(one) for one in messages}
    assert all((row["reason"] is None) == (row["order_id"] is not None) for row in found)


def order_id(one: Message) -> str | None:
    """Of the order in a message, None for a dead letter."""
    try:
        return read(one, MAX_FUTURE_SKEW).order_id
    except Unreadable:
        return None
