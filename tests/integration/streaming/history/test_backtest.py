"""`finpro backtest` after produce, screen and archive on the real platform, against the brute force."""

import io
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession
from rich.console import Console

from batch.reference_data import generate
from conf.errors import LakehouseError
from conf.former_rules import SIX
from conf.rules import FraudRules, load_rules
from conf.settings import Settings, variable
from jobs.backtest import run
from jobs.local.platform import Platform
from streaming.history.backtest import BECOMES, SHADOW, STAYS, STOPS, Backtest, Hits
from streaming.history.rescreening import Period, parse_period
from streaming.kafka import ORDERS, create_topics
from streaming.lakehouse.outcomes import archive_outcomes
from streaming.lakehouse.tables import OUTCOMES_OF_ORDERS
from streaming.shop.producer import produce
from tests.conftest import own_warehouse
from tests.oracle.brute_force import Verdict, judge
from tests.runs.archive import archive_all
from tests.runs.commands import finpro
from tests.runs.exports import execute, state
from tests.runs.pages import Page
from tests.runs.screening import consume, run_screen, sent_messages

# At night in Jakarta, so that all six kinds of planted frauds are on time.
START = datetime(2026, 11, 1, 18, 30, tzinfo=UTC)
EVERYTHING = Period(None, None)
LOWER = {
    "repeat_purchase": {"orders": 2, "within": "30 s"},
    "sequential_users": {"users": 2},
    "coordinated_users": {"users": 2, "within": "1 s"},
    "night_quantity": {"above": 15},
    "night_amount": {"above": 1_500_000},
}
HIGHER = {
    "foreign_country": {"home": "SG"},
    "repeat_purchase": {"orders": 4},
    "sequential_users": {"users": 4},
    "coordinated_users": {"users": 4, "within": "5 s"},
    "night_quantity": {"above": 120},
    "night_amount": {"above": 10_000_000_000},
}


@dataclass(frozen=True)
class History:
    """A lakehouse, and what the brute force knows about it: by order id, the verdict in force and the label."""

    settings: Settings
    rules: FraudRules
    in_force: dict[str, Verdict]
    labels: dict[str, set[str]]

    def candidate(self, **tables: Any) -> FraudRules:
        return FraudRules.model_validate({"version": "candidate", **tables})

    def verdicts(self, rules: FraudRules) -> dict[str, Verdict]:
        """As if every rule were enforced."""
        return judge(sent_messages(self.settings), rules).orders


@pytest.fixture(scope="module")
def history(platform: Platform, tmp_path_factory: pytest.TempPathFactory) -> Iterator[History]:
    """3,000 orders, some twice and some broken, screened and archived."""
    folder = tmp_path_factory.mktemp("backtest")
    with own_warehouse(platform) as warehouse, pytest.MonkeyPatch.context() as patch:
        own = {name: warehouse.require(name) for name in ("postgres_dsn", "gcs_bucket", "bigquery_dataset")}
        own |= {"topic_prefix": f"{own['gcs_bucket']}_", "checkpoints": str(folder / "checkpoints")}
        own |= {"lakehouse": str(folder / "lakehouse")}
        for name, value in (platform.environment() | {variable(field): value for field, value in own.items()}).items():
            patch.setenv(name, value)
        settings = Settings()
        create_topics(settings, partitions=4)
        for _ in generate(own["postgres_dsn"], user_count=200, product_count=40, seed=1, on_rows=lambda *_: None):
            pass
        produce(settings, orders=3_000, rate=0, seed=5, bursts=0.2, broken=0.02, duplicates=0.02, start=START, event_rate=100)
        screened = run_screen("--available-now")
        assert screened.returncode == 0, screened.stderr
        state(settings, "of another shop", "fraud", "2026-11-02 10:00:00+00")
        archive_all()
        rules = load_rules(settings.rules)
        yield History(settings, rules, judge(sent_messages(settings), rules).orders, labels(settings))


def labels(settings: Settings) -> dict[str, set[str]]:
    """Order id → label, of every message that carries one."""
    carrying = [record for record in consume(settings, ORDERS) if record.headers()]
    return {json.loads(record.value())["order_id"]: set(record.headers()[0][1].decode().split(",")) for record in carrying}


def backtested(spark: SparkSession, history: History, rules: FraudRules, period: Period = EVERYTHING) -> Backtest:
    return run(spark, history.settings, rules, period, 2, Console(file=io.StringIO()))


def hits(history: History, concerned: Iterable[Verdict], has_label: Callable[[set[str]], bool]) -> Hits:
    orders = list(concerned)
    labelled = [order for order in orders if has_label(history.labels.get(order.order_id, set()))]
    planted = sum(order.order_id in history.labels for order in orders)
    amount = sum(order.amount_numeric for order in orders)
    return Hits(len(orders), amount, len(labelled), reviewed=planted, confirmed=planted)


def of_rule(history: History, orders: Iterable[Verdict], rule: str) -> Hits:
    return hits(history, (order for order in orders if rule in order.reasons), lambda label: rule in label)


def test_the_rules_in_force_change_nothing(spark_session: SparkSession, history: History) -> None:
    found = backtested(spark_session, history, history.rules)
    assert (found.changed, found.whole.becomes.orders, found.whole.stops.orders) == (0, 0, 0)
    assert found.orders == len(history.in_force) == 3_000
    by_rule = {rule: sum(rule in verdict.reasons for verdict in history.in_force.values()) for rule in SIX}
    assert {rule: effect.after.orders for rule, effect in found.rules.items()} == by_rule
    assert all(by_rule.values())
    assert found.versions == {history.rules.version: 3_000}


@pytest.mark.parametrize("thresholds", [LOWER, HIGHER], ids=["lower", "higher"])
def test_a_candidate_has_the_effects_that_the_brute_force_gives(
    spark_session: SparkSession, history: History, thresholds: dict[str, Any]
) -> None:
    candidate = history.candidate(**thresholds)
    found, after, before = backtested(spark_session, history, candidate), history.verdicts(candidate), history.in_force
    becomes = [order for order in after.values() if order.reasons and not before[order.order_id].reasons]
    stops = [order for order in before.values() if order.reasons and not after[order.order_id].reasons]
    for rule, effect in found.rules.items():
        assert effect.after == of_rule(history, after.values(), rule)
        assert effect.before == of_rule(history, before.values(), rule)
        assert effect.becomes == of_rule(history, becomes, rule)
        assert effect.stops == of_rule(history, stops, rule)
        assert effect.labels == sum(rule in label for label in history.labels.values())
    assert found.whole.after == hits(history, (order for order in after.values() if order.reasons), bool)
    assert found.changed == sum(order.reasons != before[order_id].reasons for order_id, order in after.items())
    assert found.changed


def test_planted_frauds_are_all_found_by_the_rules_they_were_planted_for(spark_session: SparkSession, history: History) -> None:
    found = backtested(spark_session, history, history.rules)
    assert [effect.recall(effect.after) for effect in found.rules.values()] == [1.0] * len(SIX)
    assert found.whole.labels == len(history.labels)


def test_a_candidate_in_shadow_takes_reasons_away_and_counts_them(spark_session: SparkSession, history: History) -> None:
    found = backtested(spark_session, history, history.candidate(repeat_purchase={"mode": "shadow"}))
    alone = [order for order in history.in_force.values() if order.reasons == ["repeat_purchase"]]
    rule = found.rules["repeat_purchase"]
    assert rule.after == rule.before
    assert found.whole.stops.orders == rule.stops.orders == len(alone) > 0
    assert {example.kind for example in found.examples if example.rule == "repeat_purchase"} == {SHADOW, STOPS}


def test_what_turned_out_counts_as_it_was_known_at_a_moment(
    spark_session: SparkSession, history: History, tmp_path: Path
) -> None:
    lakehouse = str(shutil.copytree(history.settings.lakehouse, tmp_path / "lakehouse"))
    settings, dsn = history.settings.model_copy(update={"lakehouse": lakehouse}), history.settings.require("postgres_dsn")
    planted_for = [id_ for id_, label in history.labels.items() if label == {"repeat_purchase"}]  # known to be frauds before
    hit = sorted(id_ for id_ in planted_for if "repeat_purchase" in history.in_force[id_].reasons)
    corrected, *genuine = hit[:3]
    for order_id in hit[:3]:
        state(settings, order_id, "genuine", "2026-11-10 00:00:00+00")
    state(settings, corrected, "fraud", "2026-11-20 00:00:00+00")
    assert [archive_outcomes(spark_session, lakehouse, dsn) for _ in range(2)] == [4, 0]

    def known(until: datetime | None) -> Hits:
        found = run(spark_session, settings, history.rules, EVERYTHING, 0, Console(file=io.StringIO()), until)
        return found.rules["repeat_purchase"].after

    planted = of_rule(history, history.in_force.values(), "repeat_purchase")
    worth = {order_id: history.in_force[order_id].amount_numeric for order_id in hit}
    assert known(datetime(2026, 11, 9, tzinfo=UTC)) == planted
    wrongly = replace(planted, confirmed=planted.confirmed - 3, wrongly_held=sum(worth[order_id] for order_id in hit[:3]))
    assert known(datetime(2026, 11, 10, tzinfo=UTC)) == known(datetime(2026, 11, 19, tzinfo=UTC)) == wrongly
    held = sum(worth[order_id] for order_id in genuine)
    assert known(None) == replace(planted, confirmed=planted.confirmed - 2, wrongly_held=held)

    execute(settings, "alter table order_outcomes disable trigger user")
    execute(settings, "delete from order_outcomes where order_id = %s", corrected)
    execute(settings, "alter table order_outcomes enable trigger user")
    archive_outcomes(spark_session, lakehouse, dsn)  # a database that was restored: all are looked at, none comes twice
    assert known(None).confirmed == planted.confirmed - 2
    assert spark_session.read.format("delta").load(OUTCOMES_OF_ORDERS.path(lakehouse)).count() == 5


def test_a_period_is_half_open_and_its_orders_keep_their_neighbours_outside(
    spark_session: SparkSession, history: History
) -> None:
    times = sorted(order.event_ts for order in history.in_force.values())
    period = parse_period(times[1_000].isoformat(), times[2_000].isoformat(), "Asia/Jakarta")
    found = backtested(spark_session, history, history.rules, period)
    inside = [order for order in history.in_force.values() if times[1_000] <= order.event_ts < times[2_000]]
    assert found.orders == len(inside)
    assert found.changed == 0
    assert found.whole.after.orders == sum(bool(order.reasons) for order in inside) > 0


def test_examples_are_the_earliest_of_each_kind_with_evidence(spark_session: SparkSession, history: History) -> None:
    candidate = history.candidate(**LOWER)
    found, after = backtested(spark_session, history, candidate), history.verdicts(candidate)
    stays = [
        order
        for order in after.values()
        if "foreign_country" in order.reasons and "foreign_country" in history.in_force[order.order_id].reasons
    ]
    earliest = sorted(stays, key=lambda order: (order.event_ts, order.order_id))[:2]
    shown = [example for example in found.examples if (example.rule, example.kind) == ("foreign_country", STAYS)]
    assert [(example.order["order_id"], example.order["event_ts"]) for example in shown] == [
        (order.order_id, order.event_ts) for order in earliest
    ]
    pattern = next(e for e in found.examples if (e.rule, e.kind) == ("repeat_purchase", BECOMES))
    assert pattern.evidence is not None
    assert pattern.order["order_id"] in pattern.evidence


def test_a_period_without_orders_and_a_lakehouse_without_silver_say_what_to_do(
    spark_session: SparkSession, history: History, tmp_path: Path
) -> None:
    with pytest.raises(LakehouseError, match="--since and --until"):
        backtested(spark_session, history, history.rules, Period(START + timedelta(days=9), None))
    elsewhere = replace(history, settings=history.settings.model_copy(update={"lakehouse": str(tmp_path)}))
    with pytest.raises(LakehouseError, match="finpro archive"):
        backtested(spark_session, elsewhere, history.rules)


def test_the_command_prints_a_table_and_writes_the_page(history: History, tmp_path: Path) -> None:
    page = tmp_path / "new" / "backtest.html"
    finished = finpro("backtest", "--rules", str(history.settings.rules), "--output", str(page), "--since", "2026-11-01")
    assert finished.returncode == 0, finished.stderr
    frauds = sum(bool(order.reasons) for order in history.in_force.values())
    assert "3,000 orders" in finished.stdout
    assert "0 orders get other reasons" in finished.stdout
    shown = Page(page.read_text(encoding="utf-8"))
    assert [cell.number for cell in shown.body("by-rule")[-1][1:3]] == [frauds, frauds]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--rules", "no-such.toml"], "no-such.toml"),
        (["--rules", "conf/fraud_rules.toml", "--since", "soon"], "--since soon"),
        (["--rules", "conf/fraud_rules.toml", "--outcomes-until", "soon"], "--outcomes-until soon"),
    ],
)
def test_what_cannot_be_used_is_one_message_before_spark_starts(options: list[str], said: str) -> None:
    finished = finpro("backtest", *options)
    assert finished.returncode == 2
    assert finished.stderr.startswith("finpro: ")
    assert said in finished.stderr
