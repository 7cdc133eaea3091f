"""Rules in force for orders of before: `spark-submit jobs/rules/apply.py --since …`, or `finpro rules apply`."""

import argparse
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, cast

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from rich.console import Console

from conf.errors import ApplicationRefused, LimitsBroken
from conf.rules import FraudRules, load_rules
from conf.settings import Settings, load_settings
from jobs.replay import sinks_of
from jobs.spark.session import history_session, run_as_program
from streaming.committed import open_by
from streaming.history.application import Further, applied, orders_of_before, what_is_new, with_announced
from streaming.history.differences import newest_version
from streaming.history.rescreening import Period, parse_period
from streaming.history.unarchived import unarchived_verdicts
from streaming.kafka import require_topics
from streaming.lakehouse.tables import SILVER_ORDERS, silver_orders
from streaming.rules.proposals import Application, add_application, applications, applying_alone, record_of
from streaming.rules.recorded import rules_in_force
from streaming.screening.sinks import require_tables


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the job; None stands for those of the process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--since", required=True, help="event time, an ISO 8601 date or timestamp")
    parser.add_argument("--until", help="event time, not included; by default the last order")
    parser.add_argument("--max-alerts", type=int, help="the most orders that may be announced in all")
    parser.add_argument("--dry-run", action="store_true", help="say what is new, and announce nothing")
    parser.add_argument("--by", required=True, help="who applies them")
    parser.add_argument("--why", default="", help="the reason")
    return parser.parse_args(given)


def rules_of_screening(spark: SparkSession, settings: Settings) -> FraudRules:
    """The rules that screening goes by.

    Raises:
        ApplicationRefused: it has not taken up what the rules file says.
        FinproError: the file, or the record, cannot be read.
    """
    recorded = rules_in_force(spark, settings.lakehouse)
    if not recorded:
        raise ApplicationRefused(f"{settings.lakehouse} does not say which rules are in force: `finpro screen` notes it.")
    if load_rules(settings.rules) != recorded[-1].rules:
        raise ApplicationRefused(
            f"`finpro screen` goes by rules {recorded[-1].rules.version}, and has not taken up what {settings.rules} says: once"
            " it has, orders to come are screened by these rules, and those of before can be."
        )
    return recorded[-1].rules


def require_settled(settings: Settings, rules: FraudRules) -> None:
    """Check that no order is being screened by other rules: from now on all are by these, or stand already.

    Raises:
        ApplicationRefused: a micro-batch that began before these rules has not ended.
    """
    version = open_by(settings)
    if version not in (None, rules.version):
        raise ApplicationRefused(
            f"A micro-batch is being screened by rules {version}: its orders would be left out. Let `finpro screen` finish it,"
            " and `finpro archive` go on."
        )


def require_archived(verdicts: DataFrame | None, rules: FraudRules) -> None:
    """Check that the lakehouse has all orders that were screened by other rules.

    Args:
        verdicts: of `unarchived_verdicts`.
        rules: to be applied.

    Raises:
        ApplicationRefused: some are on their way there.
    """
    waiting = 0 if verdicts is None else verdicts.where(F.col("rules_version") != rules.version).count()
    if waiting:
        raise ApplicationRefused(
            f"{waiting:,} verdicts by other rules than {rules.version} are announced, and not in the lakehouse yet: they"
            " would be left out. Let `finpro archive` go on first."
        )


def to_go_on_with(known: Sequence[Application], rules: FraudRules, period: Period, console: Console) -> Application | None:
    """The application that was interrupted, if it is of these rules; None where there is none.

    Raises:
        ApplicationRefused: it is, and of other orders.
    """
    newest = known[-1] if known else None
    if newest is None or not newest.days_left:
        return None
    if newest.version != rules.version:
        console.print(f"application {newest.number} stays unfinished: rules {newest.version} are no longer in force")
        return None
    if (newest.since, newest.until) != period:
        raise ApplicationRefused(
            f"Application {newest.number} of the same rules is unfinished, which {newest.by} began: first give its"
            f" {_in_words(Period(newest.since, newest.until))}, and it goes on."
        )
    console.print(f"application {newest.number}, which {newest.by} began, has {len(newest.days_left):,} days left")
    return newest


def _in_words(period: Period) -> str:
    ends = {"--since": period.since, "--until": period.until}
    return " ".join(f"{option} {end.isoformat()}" for option, end in ends.items() if end)


def figures_of(found: Sequence[Further]) -> dict[str, Any]:
    """What is new in numbers, as the record keeps it."""
    orders: Counter[str] = Counter()
    amount: Counter[str] = Counter()
    for each in found:
        orders.update(dict.fromkeys(each.gained, each.orders))
        amount.update(dict.fromkeys(each.gained, each.amount))
    return {
        "orders": sum(each.orders for each in found),
        "become_fraud": sum(each.orders for each in found if each.is_new_fraud),
        "reasons": {reason: {"orders": orders[reason], "amount": amount[reason]} for reason in sorted(orders)},
    }


def show(console: Console, rules: FraudRules, period: Period, figures: dict[str, Any]) -> None:
    """Print what is new, in a few lines."""
    console.print(
        f"rules {rules.version}, {_in_words(period)}: {figures['orders']:,} orders get further reasons,"
        f" {figures['become_fraud']:,} of them become Fraud"
    )
    for reason, found in figures["reasons"].items():
        console.print(f"  {reason:<24}{found['orders']:>12,} orders  Rp {found['amount']:,}")


def begun(
    spark: SparkSession,
    settings: Settings,
    silver: DataFrame,
    rules: FraudRules,
    period: Period,
    options: argparse.Namespace,
    console: Console,
) -> Application | None:
    """Say what is new, and note that it is to be added; None where nothing is, or nothing shall be.

    Raises:
        LimitsBroken: it is more than `--max-alerts`.
        ApplicationRefused: the lakehouse lacks orders that were screened by other rules.
    """
    waiting = unarchived_verdicts(spark, settings)
    require_archived(waiting, rules)
    found = what_is_new(with_announced(orders_of_before(silver, rules, period), waiting), rules, period)
    figures = figures_of(found)
    show(console, rules, period, figures)
    if options.max_alerts is not None and figures["orders"] > options.max_alerts:
        raise LimitsBroken(f"--max-alerts {options.max_alerts:,}: {figures['orders']:,} alerts; none was announced")
    if options.dry_run or not found:
        return None
    days = sorted({each.day for each in found})
    with record_of(settings.require("postgres_dsn")) as cursor:
        return add_application(
            *(cursor, rules.version),
            since=cast(datetime, period.since),  # which the options ask for
            until=period.until,
            days=days,
            figures=figures,
            at=datetime.now(UTC),
            by=options.by,
            why=options.why,
        )


def main(given: Sequence[str] | None = None) -> None:
    options, settings = arguments(given), load_settings()
    console = Console(highlight=False, soft_wrap=True)
    dsn = settings.require("postgres_dsn")
    require_topics(settings)
    require_tables(dsn)
    with history_session() as spark, applying_alone(dsn):
        rules = rules_of_screening(spark, settings)
        require_settled(settings, rules)
        period = parse_period(options.since, options.until, rules.time_zone)
        version = newest_version(spark, SILVER_ORDERS, settings.lakehouse)
        silver = spark.read.format("delta").option("versionAsOf", version).load(silver_orders(settings.lakehouse))
        with record_of(dsn) as cursor:
            known = applications(cursor)
        application = to_go_on_with(known, rules, period, console)
        if application is None or options.dry_run:
            application = begun(spark, settings, silver, rules, period, options, console)
        if application is None:
            return
        announced = left_out = 0
        for done in applied(silver, rules, application, sinks_of(settings)):
            announced, left_out = announced + done.published.announced, left_out + done.published.clashes
            console.print(f"{done.day}: {done.published.announced:,} orders, {done.days_left:,} days left")
    console.print(f"application {application.number}: {announced:,} revisions are announced; `finpro archive` comes next")
    if left_out:
        console.print(f"{left_out:,} orders were left out: Postgres does not hold them, or others under their ids")


if __name__ == "__main__":
    run_as_program(main)
