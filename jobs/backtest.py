"""The backtest job: `spark-submit jobs/backtest.py --rules FILE [options]`, or `finpro backtest`."""

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from delta.tables import DeltaTable
from pyspark.sql import DataFrame, SparkSession
from rich.console import Console
from rich.table import Table

from batch.report.pages import write_page
from conf.errors import LakehouseError
from conf.rules import FraudRules, load_rules
from conf.settings import Settings, finpro_home, load_settings
from jobs.spark.session import history_session, run_as_program
from streaming.history.backtest import Backtest, Effect, backtest, groups_of, labels_of, orders_in_force
from streaming.history.backtest_page import render_backtest
from streaming.history.rescreening import Period, parse_moment, parse_period
from streaming.lakehouse.outcomes import outcomes_at
from streaming.lakehouse.tables import bronze_orders, silver_orders


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the job; None stands for those of the process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rules", type=Path, required=True, help="the candidate: a rules file")
    parser.add_argument("--since", help="event time, an ISO 8601 date or timestamp; by default the first order")
    parser.add_argument("--until", help="event time, not included; by default the last order")
    parser.add_argument("--outcomes-until", help="what was decided until then counts, ISO 8601; by default all")
    parser.add_argument("--output", type=Path, help="where to write the page; by default backtest.html in finpro's home")
    parser.add_argument("--examples", type=int, default=3, help="most orders to show of each rule and kind")
    return parser.parse_args(given)


def check(rules: Path, since: str | None, until: str | None) -> tuple[FraudRules, Period]:
    """Read the candidate and the period; a local time is one of the candidate's time zone.

    Raises:
        RulesError: the rules cannot be used.
        SettingsError: the period cannot be used.
    """
    candidate = load_rules(rules)
    return candidate, parse_period(since, until, candidate.time_zone)


def run(
    spark: SparkSession,
    settings: Settings,
    rules: FraudRules,
    period: Period,
    examples: int,
    console: Console,
    outcomes_until: datetime | None = None,
) -> Backtest:
    """Backtest rules over the lakehouse, against what is known of its orders, or was at `outcomes_until`.

    Raises:
        LakehouseError: silver is not there, or holds no order of the period.
    """
    return backtested(known_orders(spark, settings, rules, period, console, outcomes_until), settings, rules, period, examples)


def known_orders(
    spark: SparkSession,
    settings: Settings,
    rules: FraudRules,
    period: Period,
    console: Console,
    outcomes_until: datetime | None = None,
) -> DataFrame:
    """The lakehouse's orders of a period and their neighbours, with what is known of them (`orders_in_force`).

    Raises:
        LakehouseError: silver is not there.
    """
    silver, bronze = _table(spark, silver_orders(settings.lakehouse)), _table(spark, bronze_orders(settings.lakehouse))
    if silver is None:
        raise LakehouseError(f"There is no {silver_orders(settings.lakehouse)}: `finpro archive` writes it.")
    labels = labels_of(bronze, period).persist() if bronze is not None else None
    if labels is None or labels.isEmpty():
        console.print("no order carries a label: there is no precision and recall")
        labels = None
    outcomes = outcomes_at(spark, settings.lakehouse, outcomes_until)
    return orders_in_force(silver, labels, outcomes, period, rules)


def backtested(orders: DataFrame, settings: Settings, rules: FraudRules, period: Period, examples: int) -> Backtest:
    """What rules make of `known_orders`.

    Raises:
        LakehouseError: there is none of the period.
    """
    found = backtest(groups_of(orders, rules, period, examples), rules, examples)
    if not found.orders:
        raise LakehouseError(f"{silver_orders(settings.lakehouse)} holds no order of this period: look at --since and --until.")
    return found


def _table(spark: SparkSession, path: str) -> DataFrame | None:
    return spark.read.format("delta").load(path) if DeltaTable.isDeltaTable(spark, path) else None


def show(console: Console, found: Backtest, rules: FraudRules) -> None:
    """Print what was found: a table, and over what."""
    table = Table("rule", title=f"rules {rules.version} over {found.orders:,} orders, against the verdicts in force")
    for name in ("hits in force", "hits", "amount, Rp", "become Fraud", "amount, Rp", "stop being Fraud", "amount, Rp"):
        table.add_column(name, justify="right")
    if found.whole.labels is not None:
        table.add_column("precision in force, candidate", justify="right")
        table.add_column("recall in force, candidate", justify="right")
    if found.reviewed:
        table.add_column("frauds of reviewed in force, candidate", justify="right")
    for rule, effect in found.rules.items():
        table.add_row(f"{rule} (shadow)" if rule in rules.in_shadow else rule, *_figures(effect, reviewed=found.reviewed > 0))
    table.add_section()
    table.add_row("Fraud or not", *_figures(found.whole, reviewed=found.reviewed > 0))
    console.print(table)
    versions = ", ".join(f"rules {version} for {orders:,} orders" for version, orders in found.versions.items())
    console.print(f"in force: {versions}; {found.changed:,} orders get other reasons")
    console.print("orders that came later than the lateness allows may differ under the same rules: `finpro audit` tells which")


def _figures(effect: Effect, *, reviewed: bool) -> list[str]:
    hits = (effect.after, effect.becomes, effect.stops)
    figures = [f"{effect.before.orders:,}", *(text for some in hits for text in (f"{some.orders:,}", f"{some.amount:,}"))]
    if effect.labels is not None:
        shares = [[of(some) for some in (effect.before, effect.after)] for of in (effect.precision, effect.recall)]
        figures += [", ".join("\N{EN DASH}" if share is None else f"{share:.1%}" for share in pair) for pair in shares]
    if reviewed:
        figures.append(", ".join(f"{some.confirmed:,} of {some.reviewed:,}" for some in (effect.before, effect.after)))
    return figures


def main(given: Sequence[str] | None = None) -> None:
    options, settings = arguments(given), load_settings()
    rules, period = check(options.rules, options.since, options.until)
    outcomes_until = parse_moment("--outcomes-until", options.outcomes_until, rules.time_zone)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    with history_session() as spark:
        found = run(spark, settings, rules, period, options.examples, console, outcomes_until)
    show(console, found, rules)
    page = write_page(options.output or finpro_home() / "backtest.html", render_backtest(found, rules, datetime.now(UTC)))
    console.print(f"the page is {page}")


if __name__ == "__main__":
    run_as_program(main)
