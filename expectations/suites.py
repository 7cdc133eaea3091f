"""The suites: what must hold for each of the raw tables, and what is only worth a warning.

Each expectation says in words what it expects. Great Expectations calls the severity that stops a run `critical`.
Importing this module takes seconds, because the library does.
"""

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any, ClassVar

import great_expectations.expectations as gxe
from great_expectations.expectations.expectation import Expectation
from great_expectations.expectations.metadata_types import FailureSeverity

from conf.rules import NAME
from expectations.outcome import Severity

GX_SEVERITY = {Severity.FAIL: FailureSeverity.CRITICAL, Severity.WARN: FailureSeverity.WARNING}

LATEST_EVENT = "latest_event"  # the run-time parameter that holds the latest event time that is not in the future
MOST_EXAMPLES = 5
_FEW = 100  # orders a day: with less, half or twice as many are chance

RECENT_ORDERS = "recent_orders"  # raw_orders of the last weeks
KEYS = {
    "raw_users": "user_id",
    "raw_products": "product_id",
    "raw_orders": "order_id",
    "order_outcomes": "outcome_id",
    RECENT_ORDERS: "order_id",
}


class ExpectNoRows(gxe.UnexpectedRowsExpectation):
    """A query that finds nothing; unlike the library's own, it shows some of the rows that it found."""

    expectation_type: ClassVar[str] = "expect_no_rows"

    def _validate(self, metrics: dict[str, Any], *arguments: Any, **keywords: Any) -> Any:
        found = super()._validate(metrics, *arguments, **keywords)
        found["result"]["partial_unexpected_index_list"] = metrics["unexpected_rows_query.table"][:MOST_EXAMPLES]
        return found


_REASON = NAME.replace("{", "{{").replace("}", "}}")  # the query is a template


def suites(dataset: str, exported_at: datetime) -> Mapping[str, list[Expectation]]:
    """Raw table, or `recent_orders` → its expectations.

    `dataset` (`project.dataset`) is where the tables lie; they show Postgres as it was when the export began, at `exported_at`.
    """
    orders, arrivals = _orders(dataset), _arrivals(exported_at)
    return {
        "raw_users": _users(),
        "raw_products": _products(),
        "raw_orders": orders,
        "order_outcomes": _outcomes(exported_at),
        RECENT_ORDERS: arrivals,
    }


def _users() -> list[Expectation]:
    return [
        *_key("user_id", "every user has a user_id of its own"),
        *_complete("name", "email", "phone_number", "created_date", "source"),
        gxe.ExpectColumnValuesToBeUnique(column="email", description="no two users share an email"),
    ]


def _products() -> list[Expectation]:
    return [
        *_key("product_id", "every product has a product_id of its own"),
        *_complete("product_name", "category", "sub_category", "price", "cost", "created_date"),
        gxe.ExpectColumnValuesToBeUnique(column="product_name", description="no two products share a name"),
        gxe.ExpectColumnValuesToBeInSet(column="currency", value_set=["IDR"], description="every price is in rupiah"),
        gxe.ExpectColumnValuesToBeBetween(column="cost", min_value=0, description="no cost is negative"),
        ExpectNoRows(
            description="every price is above its cost",
            unexpected_rows_query="select product_id, price, cost from {batch} where not price > cost",
        ),
    ]


def _orders(dataset: str) -> list[Expectation]:
    return [
        *_key("order_id", "every order has an order_id of its own"),
        *_complete("user_id", "product_id", "quantity", "amount", "amount_numeric", "created_date", "event_ts", "screened_at"),
        gxe.ExpectColumnValuesToBeBetween(column="quantity", min_value=1, description="every order is for one piece or more"),
        gxe.ExpectColumnValuesToBeBetween(column="amount_numeric", min_value=0, description="no amount is negative"),
        ExpectNoRows(
            description="the amount's text and its number agree",
            unexpected_rows_query="select order_id, amount, amount_numeric from {batch}"
            " where safe_cast(regexp_replace(amount, '[^0-9]', '') as int64) is distinct from amount_numeric",
        ),
        gxe.ExpectColumnValuesToMatchRegex(
            column="country", regex="^[A-Z]{2}$", description="every country is two capital letters"
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="event_ts", max_value={"$PARAMETER": LATEST_EVENT}, description="no order is from the future"
        ),
        *_verdict(),
        _known("user_id", "raw_users", dataset, "every order is a known user's"),
        _known("product_id", "raw_products", dataset, "every order is for a known product"),
    ]


def _verdict() -> list[Expectation]:
    return [
        *_complete("status", "country", "rules_version"),
        gxe.ExpectColumnValuesToBeInSet(
            column="status", value_set=["Fraud", "Genuine"], description="every order is Genuine or Fraud"
        ),
        ExpectNoRows(
            description="every reason is a name that a rule can have",
            unexpected_rows_query="select order_id, reason from {batch}, unnest(reasons) as reason"
            f" where not regexp_contains(reason, r'^{_REASON}$')",
        ),
        ExpectNoRows(
            description="no reason that an order has is suppressed too",
            unexpected_rows_query="select order_id, reason from {batch}, unnest(suppressed_reasons) as reason"
            " where reason in unnest(reasons)",
        ),
        ExpectNoRows(
            description="an order is Fraud exactly when it has a reason",
            unexpected_rows_query="select order_id, status, array_to_string(reasons, ', ') as reasons from {batch}"
            " where (status = 'Fraud') != (coalesce(array_length(reasons), 0) > 0)",
        ),
    ]


def _outcomes(exported_at: datetime) -> list[Expectation]:
    return [
        *_key("outcome_id", "every statement about an order has an outcome_id of its own"),
        *_complete("order_id", "outcome", "reviewed_by", "decided_at", "source"),
        gxe.ExpectColumnValuesToBeInSet(
            column="outcome", value_set=["fraud", "genuine"], description="every outcome is fraud or genuine"
        ),
        ExpectNoRows(
            description="no outcome was decided after the day of the export",
            unexpected_rows_query=f"select outcome_id, decided_at from {{batch}} where decided_at > {_moment(exported_at, -1)}",
        ),
    ]


def recent(exported_at: datetime) -> str:
    """The condition that makes `recent_orders` of raw_orders: from the day before the export to that of four weeks before."""
    return f"created_date > {_moment(exported_at, 29)} and created_date <= {_moment(exported_at, 0)}"


def _arrivals(exported_at: datetime) -> list[Expectation]:
    """Whether orders come as they did before, whatever has changed in the table."""
    weeks = ", ".join(
        f"countif(created_date > {_moment(exported_at, day + 1)} and created_date <= {_moment(exported_at, day)})"
        for day in (7, 14, 21, 28)
    )
    yesterday = _moment(exported_at, 1)
    return [
        ExpectNoRows(
            description="an order was created within a day before the export",
            severity=GX_SEVERITY[Severity.WARN],
            unexpected_rows_query="select newest from (select max(created_date) as newest from {batch}) as found"
            f" where newest is null or newest < {yesterday}",
        ),
        ExpectNoRows(
            description="the last day brought at least half the least, at most twice the most, of the same day of the four"
            " weeks before",
            severity=GX_SEVERITY[Severity.WARN],
            unexpected_rows_query=f"""
                select orders, least_before, most_before
                from (
                    select countif(created_date > {yesterday}) as orders,
                        least({weeks}) as least_before, greatest({weeks}) as most_before
                    from {{batch}}
                ) as counted
                where least_before >= {_FEW} and (orders * 2 < least_before or orders > most_before * 2)""",
        ),
    ]


def _moment(exported_at: datetime, days: int) -> str:
    return f"timestamp '{exported_at - timedelta(days=days)}'"


def _key(column: str, description: str) -> list[Expectation]:
    return [
        gxe.ExpectColumnValuesToBeUnique(column=column, description=description),
        *_complete(column),
    ]


def _complete(*columns: str) -> list[Expectation]:
    return [gxe.ExpectColumnValuesToNotBeNull(column=column, description=f"{column} is never null") for column in columns]


def _known(column: str, table: str, dataset: str, description: str) -> Expectation:
    return ExpectNoRows(
        description=description,
        severity=GX_SEVERITY[Severity.WARN],
        unexpected_rows_query=f"select order_id, {column} from {{batch}}"
        f" where {column} not in (select {column} from `{dataset}.{table}` where {column} is not null)",
    )
