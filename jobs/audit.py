"""The audit job: `spark-submit jobs/audit.py [options]`, or `finpro audit`."""

import argparse
from collections.abc import Sequence

from pyspark.sql import DataFrame, Row, SparkSession
from pyspark.sql import functions as F
from rich.console import Console

from conf.errors import KafkaError, PostgresError, SettingsError, VerdictsUnexplained
from conf.rules import load_rules
from conf.settings import Settings, load_settings
from jobs.replay import sinks_of
from jobs.spark.session import history_session, run_as_program
from streaming.history.audit import FINDING, Audit, audit
from streaming.history.causes import UNEXPLAINED, Reached
from streaming.history.differences import Snapshot, snapshot
from streaming.history.republish import Published, publish_dead_letters, publish_orders
from streaming.history.rescreening import Period, parse_period
from streaming.history.unarchived import reached, with_unarchived_orders
from streaming.kafka import ORDERS, require_topics
from streaming.rules.proposals import applications, record_of
from streaming.screening.sinks import require_tables

_LISTS = ("streamed", "expected")


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the job; None stands for those of the process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--since", help="event time, an ISO 8601 date or timestamp; by default the first order")
    parser.add_argument("--until", help="event time, not included; by default the last order")
    parser.add_argument("--repair", action="store_true", help="announce what is missing")
    parser.add_argument("--limit", type=int, default=20, help="most differences to show")
    parser.add_argument("--output", help="write all differences there: a folder of Parquet files, of CSV where it ends in .csv")
    return parser.parse_args(given)


def check(settings: Settings, since: str | None, until: str | None, *, repair: bool) -> Period:
    """Check what can be checked without Spark, and read the period.

    Raises:
        FinproError: something is missing or does not answer; says what to do.
    """
    if repair:
        require_topics(settings)
        require_tables(settings.require("postgres_dsn"))
    return parse_period(since, until, load_rules(settings.rules).time_zone)


def looked_at(spark: SparkSession, settings: Settings, console: Console) -> tuple[Snapshot, Reached]:
    """The lakehouse, and what Kafka has beyond it where that can be known."""
    topic = settings.topic(ORDERS)
    try:
        so_far = reached(spark, settings)
        with record_of(settings.require("postgres_dsn")) as cursor:
            known = applications(cursor)
        lakehouse = snapshot(spark, settings.lakehouse, topic)._replace(applications=known)
        return with_unarchived_orders(spark, settings, lakehouse), so_far
    except (KafkaError, PostgresError, SettingsError) as error:
        console.print(
            f"note: what is not archived yet cannot be known, and counts as missing; nor what rules were applied to: {error}"
        )
        return snapshot(spark, settings.lakehouse, topic), Reached()


def show(console: Console, lakehouse: Snapshot, found: Audit, limit: int) -> None:
    """Print what was audited and what was found."""
    counts = found.counts
    versions = ", ".join(f"{name} version {version}" for name, version in sorted(lakehouse.versions.items()))
    rules = ", ".join(dict.fromkeys(entry.rules.version for entry in lakehouse.history))
    console.print(
        f"audited {counts.orders:,} orders, {counts.duplicates:,} duplicates and {counts.dead_letters:,} dead letters:"
        f" {counts.messages:,} messages\n{versions}; rules {rules}"
    )
    for one in lakehouse.applications:
        console.print(f"rules {one.version} were applied to orders of before by {one.by}: {one.orders:,} orders ({one.why})")
    if not found.found:
        console.print("every verdict and every dead letter is what it has to be")
        return
    for (wrong, cause), count in sorted(found.found.items()):
        console.print(f"{count:>10,}  {wrong}: {cause}")
    unexplained_first = F.when(F.col("cause") == UNEXPLAINED, 0).otherwise(1)
    shown = found.findings.orderBy(unexplained_first, "wrong", "partition", "offset").limit(limit)
    for row in shown.drop("received_at", "event_ts").collect():  # in some time zones Python lacks the first and last of times
        console.print(_line(row))
    total = sum(found.found.values())
    if total > limit:
        console.print(f"{total - limit:,} more: --limit shows more, --output writes them all")


def _line(row: Row) -> str:
    place = "" if row["partition"] is None else f" (partition {row['partition']}, offset {row['offset']})"
    what = f"order {row['order_id']}{place}" if row["order_id"] else f"message{place}"
    reasons = [f"{name} {', '.join(row[name]) or 'none'}" for name in _LISTS if row[name] is not None]
    return f"{row['cause']}: {what}: {row['wrong']}{''.join(f'; {text}' for text in reasons)}\n    {row['why']}"


def write(findings: DataFrame, output: str) -> None:
    """Write all findings: Parquet, or CSV with lists as text."""
    if output.endswith(".csv"):
        lists = {name: F.concat_ws(", ", F.col(name)) for name in _LISTS}
        findings.withColumns(lists).select(*FINDING).write.mode("overwrite").option("header", True).csv(output)
    else:
        findings.write.mode("overwrite").parquet(output)


def repair(console: Console, settings: Settings, found: Audit) -> Published:
    """Announce what is missing."""
    where = sinks_of(settings)
    orders, dead_letters = publish_orders(found.orders, where), publish_dead_letters(found.dead_letters, where)
    console.print(
        f"repaired: {orders.announced:,} verdicts and {dead_letters.announced:,} dead letters are announced. `finpro archive`"
        " brings them into the lakehouse; what is audited after that has them."
    )
    if orders.clashes:
        console.print(f"{orders.clashes:,} orders were left out: Postgres holds other orders under their ids")
    return orders


def main(given: Sequence[str] | None = None, *, console: Console | None = None) -> None:
    """Audit with these options, and show on the console what is found.

    Raises:
        VerdictsUnexplained: there are differences without a known cause.
        FinproError: it cannot be looked at; says what to do.
    """
    options, settings = arguments(given), load_settings()
    console = console or Console(highlight=False, soft_wrap=True)
    period = check(settings, options.since, options.until, repair=options.repair)
    with history_session() as spark:
        lakehouse, so_far = looked_at(spark, settings, console)
        found = audit(lakehouse, period, so_far)
        show(console, lakehouse, found, options.limit)
        if options.output:
            write(found.findings, options.output)
            console.print(f"all differences are in {options.output}")
        unexplained = found.unexplained
        if options.repair:
            unexplained = found.irreparable + repair(console, settings, found).clashes
    if unexplained:
        raise VerdictsUnexplained(
            f"{unexplained:,} differences have no known cause: docs/audit.md says what each means and what to do."
        )


if __name__ == "__main__":
    run_as_program(main)
