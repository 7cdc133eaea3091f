"""The proposal of rules: `spark-submit jobs/rules/propose.py FILE [options]`, or `finpro rules propose`."""

import argparse
from collections.abc import Sequence
from datetime import UTC, datetime, time, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

from pyspark.sql import SparkSession
from rich.console import Console

from batch.report.pages import write_page
from conf.errors import LimitsBroken, RulesError
from conf.rules import FraudRules, load_rules
from conf.settings import Settings, finpro_home, load_settings
from jobs.backtest import backtested, known_orders
from jobs.spark.session import history_session, run_as_program
from streaming.history.proposal import Limits, Trial, mistakes_of, shadowed
from streaming.history.proposal_page import render_proposal
from streaming.history.rescreening import Period
from streaming.rules.content import Content
from streaming.rules.examples import tried
from streaming.rules.promotion import file_in_force, require_own_version, rules_in_force_now
from streaming.rules.proposals import add_proposal, newest_promotion, promotions, record_of
from streaming.rules.recorded import rules_in_force

_MISTAKES = 10  # shown of each kind


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the job; None stands for those of the process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rules", type=Path, help="the proposed rules file")
    parser.add_argument("--days", type=int, default=28, help="how many local days of history, today the last")
    parser.add_argument("--capacity", type=int, help="alerts that people can look at on a day")
    parser.add_argument("--max-alerts", type=int, help="the most alerts on any day")
    parser.add_argument("--min-precision", type=float, help="the least share of alerts that are known as frauds, 0 to 1")
    parser.add_argument("--by", required=True, help="who proposes them")
    parser.add_argument("--output", type=Path, help="where to write the page; by default proposal.html in finpro's home")
    return parser.parse_args(given)


def last_days(days: int, rules: FraudRules, now: datetime) -> Period:
    """The last so many local days, today the last."""
    zone = ZoneInfo(rules.time_zone)
    first = now.astimezone(zone).date() - timedelta(days=days - 1)
    return Period(datetime.combine(first, time(), zone).astimezone(UTC), None)


def run(
    spark: SparkSession, settings: Settings, path: Path, period: Period, limits: Limits, capacity: int | None, console: Console
) -> Trial:
    """Try proposed rules on history, against those in force.

    Raises:
        RulesError: their version was used for others.
        FinproError: a record cannot be read, or there is no history of the period.
    """
    rules, recorded = load_rules(path), rules_in_force(spark, settings.lakehouse)
    in_force = rules_in_force_now(settings, recorded)
    with record_of(settings.require("postgres_dsn")) as cursor:
        promoted = [promotion.content.rules for promotion in promotions(cursor)]
    require_own_version(rules, [in_force, *promoted, *(entry.rules for entry in recorded)])
    orders = known_orders(spark, settings, rules, period, console)
    found = backtested(orders, settings, rules, period, 0)
    return Trial(
        rules=rules,
        in_force=in_force,
        found=found,
        mistakes=mistakes_of(orders, rules, period, _MISTAKES),
        shadowed=shadowed(rules, in_force, recorded, found.rules),
        limits=limits,
        capacity=capacity,
    )


def show(console: Console, trial: Trial) -> None:
    """Print what was found, in a few lines."""
    whole, (day, alerts) = trial.found.whole, trial.busiest
    console.print(f"rules {trial.rules.version} over {trial.found.orders:,} orders of {len(trial.found.days)} days,")
    changed = dict.fromkeys(f"{change.kind} {change.entry or change.field}" for change in trial.changes)
    console.print(f"in the place of rules {trial.in_force.version}: {', '.join(changed) or 'no rule differs'}")
    console.print(
        f"alerts a day: {trial.alerts_a_day:,.1f} ({trial.alerts_a_day_before:,.1f} in force), at most {alerts:,} on {day}"
    )
    if trial.capacity is not None:
        console.print(f"more alerts than the capacity of {trial.capacity:,} on {trial.days_over_capacity} days")
    console.print(f"{whole.becomes.orders:,} orders become Fraud, {whole.stops.orders:,} stop being Fraud")
    if trial.is_known:
        console.print(f"precision: {_share(trial.precision)} of all alerts, {_share(trial.precision_of_new)} of the new ones")
    for one in trial.shadowed:
        console.print(
            f"{one.rule} found {one.effect.before.orders:,} orders in shadow; by it {one.effect.becomes.orders:,} become Fraud"
        )
    for rule in sorted(trial.rules.in_shadow):
        console.print(f"in shadow {rule} would find {trial.found.rules[rule].after.orders:,} orders")


def _share(share: float | None) -> str:
    return "unknown" if share is None else f"{share:.1%}"


def main(given: Sequence[str] | None = None) -> None:
    options, settings = arguments(given), load_settings()
    console = Console(highlight=False, soft_wrap=True)
    content, now = Content.read(options.rules), datetime.now(UTC)
    console.print(tried(options.rules))
    with record_of(settings.require("postgres_dsn")) as cursor:
        follows = newest_promotion(cursor)
    live = file_in_force(settings)
    period = last_days(options.days, load_rules(options.rules), now)
    limits = Limits(options.max_alerts, options.min_precision)
    with history_session() as spark:
        trial = run(spark, settings, options.rules, period, limits, options.capacity, console)
    if Content.read(options.rules) != content:
        raise RulesError(f"{options.rules} was changed while it was tried: propose it again.")
    show(console, trial)
    page = write_page(options.output or finpro_home() / "proposal.html", render_proposal(trial, options.by, now))
    with record_of(settings.require("postgres_dsn")) as cursor:
        number = add_proposal(
            *(cursor, content, trial.rules.version),
            replaces=live.fingerprint if live else "",
            follows=follows,
            figures=trial.figures(),
            failed=trial.broken,
            by=options.by,
        )
    console.print(f"the page is {page}")
    if trial.broken:
        failed = "\n".join(f"  {limit}" for limit in trial.broken)
        raise LimitsBroken(f"{options.rules} does not keep its limits:\n{failed}")
    console.print(f"proposal {number}: `finpro rules promote {options.rules} --why …` puts it in force")


if __name__ == "__main__":
    run_as_program(main)
