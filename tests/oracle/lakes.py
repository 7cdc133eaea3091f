"""Lakehouses made by hand: messages as bronze, and silver and quarantine as the brute force says they have to be."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from pyspark.sql import SparkSession

from conf.rules import FraudRules
from streaming.history.differences import Snapshot
from streaming.kafka import ORDERS
from streaming.lakehouse.tables import BRONZE, QUARANTINE, SILVER
from streaming.rules.proposals import Application
from streaming.rules.recorded import RulesInForce
from tests.oracle.brute_force import LONG_AFTER, Judgement, Message, Order, judge
from tests.oracle.order_sets import spelled

START = datetime(2026, 11, 1, 3, 0, tzinfo=UTC)
RECEIVED = START + timedelta(seconds=100)


@dataclass
class Lake:
    """A lakehouse that can be tampered with.

    Attributes:
        messages: what bronze holds.
        history: which rules were in force when.
        silver: its rows.
        quarantine: its rows.
        looked_at: when it is.
        applications: rules that were applied to orders of before.
    """

    messages: list[Message]
    history: list[RulesInForce]
    silver: list[dict[str, Any]] = field(default_factory=list)
    quarantine: list[dict[str, Any]] = field(default_factory=list)
    looked_at: datetime = LONG_AFTER
    applications: list[Application] = field(default_factory=list)

    def order(self, order_id: str) -> dict[str, Any]:
        """The row of silver."""
        (row,) = (row for row in self.silver if row["order_id"] == order_id)
        return row

    def says(self, order_id: str, *reasons: str, **changes: Any) -> None:
        """Let silver say this of an order."""
        status = "Fraud" if reasons else "Genuine"
        self.order(order_id).update({"reasons": sorted(reasons), "status": status} | changes)

    def snapshot(self, spark: SparkSession) -> Snapshot:
        """As the audit takes it."""
        bronze = [
            (one.topic, one.partition, one.offset, one.timestamp, one.value, 0, one.key, None, one.timestamp.date())
            for one in self.messages
        ]
        silver = [tuple(row.get(name) for name in SILVER.names) for row in self.silver]
        quarantine = [tuple(row[name] for name in QUARANTINE.names) for row in self.quarantine]
        return Snapshot(
            spark.createDataFrame(bronze, BRONZE),
            spark.createDataFrame(silver, SILVER),
            spark.createDataFrame(quarantine, QUARANTINE),
            {},
            self.history,
            self.looked_at,
            self.applications,
        )


def received(values: Sequence[tuple[bytes | None, int]], start: datetime, step: timedelta) -> list[Message]:
    """Values, each with its partition, as messages that Kafka received one `step` after the other."""
    offsets: Counter[int] = Counter()
    messages = []
    for number, (value, partition) in enumerate(values):
        messages.append(Message(ORDERS, partition, offsets[partition], start + number * step, None, value))
        offsets[partition] += 1
    return messages


def lake_of(messages: list[Message], rules: FraudRules) -> tuple[Lake, Judgement]:
    """A lakehouse in which everything is as it has to be by these rules, and what the brute force said."""
    judgement = judge(messages, rules)
    lake = Lake(messages, [RulesInForce(START - timedelta(days=1), rules)])
    for verdict in judgement.orders.values():
        lake.silver.append(
            vars(verdict)
            | {"shadow_reasons": [], "rules_version": rules.version, "event_date": verdict.event_ts.date()}
            | {"screened_at": verdict.event_ts + timedelta(seconds=2)}
        )
    by_place = {message.place: message for message in messages}
    for place, reason in judgement.dead_letters.items():
        message = by_place[place]
        lake.quarantine.append(
            {"topic": ORDERS, "partition": message.partition, "offset": message.offset, "received_at": message.timestamp}
            | {"value": message.value, "reason": reason, "received_date": message.timestamp.date()}
        )
    return lake, judgement


def purchase(order_id: str, user: int, second: float, *, product: int = 5, **changes: Any) -> Order:
    """An order that no rule for a single order minds, so many seconds after START (noon in Jakarta or so)."""
    moment = START + timedelta(seconds=second)
    order = Order(order_id, user, product, 1, "1000", 1000, "ID", moment.replace(microsecond=0), moment, "web")
    return replace(order, **changes)


def in_turn(orders: Sequence[Order]) -> list[Message]:
    """Orders as messages in one partition, a second apart, the first at RECEIVED."""
    return received([(spelled(order), 0) for order in orders], RECEIVED, timedelta(seconds=1))
