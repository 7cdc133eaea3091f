"""Forgetting a person: `spark-submit jobs/forget.py [options]`, or `finpro forget`.

Postgres comes first, and has a record of it. From there on each place is tried, whatever became of the others: what could not
be reached is named, and the same command goes on with it.
"""

import argparse
from collections.abc import Callable, Collection, Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from pyspark.errors import PySparkException
from pyspark.sql import SparkSession
from rich.console import Console

from batch.forgetting.files import forget_in_files
from batch.forgetting.tables import forget_in_tables
from batch.forgotten import (
    Forgotten,
    complete,
    forget_in_postgres,
    held_in_postgres,
    keep_in_bucket,
    kept_in_bucket,
    recorded,
)
from batch.google_cloud import explained, open_bucket
from batch.outcomes import forget_reasons
from batch.warehouse.bigquery import load
from batch.warehouse.export import export, new_run_id
from batch.warehouse.manifest import newest_manifest
from batch.warehouse.reconcile import reconcile, require_consistent
from conf.errors import FinproError, ForgetError, KafkaError, LakehouseError
from conf.settings import Settings, finpro_home, load_settings
from jobs.spark.session import job_session, run_as_program
from streaming.kafka import kept_for
from streaming.lakehouse.forgetting import forget_in_lakehouse
from streaming.lakehouse.maintenance import PROPERTIES
from streaming.rules.recorded import rules_in_force

_TIME_TRAVEL = timedelta(days=7)  # of BigQuery, at most; its fail-safe is as long
_NOT_CONFIGURED, _NOTHING = "not configured", "nothing left"


class Place(NamedTuple):
    """A place where somebody was: what was erased there, what remains and until when, and why it could not be done."""

    name: str
    erased: str
    remains: str = ""
    trouble: FinproError | None = None


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the job; None stands for those of the process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--user", dest="users", type=int, action="append", help="who; by default all who were forgotten")
    parser.add_argument("--request", help="what asks for it, kept in the record")
    parser.add_argument("--dry-run", action="store_true", help="say what would be erased")
    return parser.parse_args(given)


def whom(settings: Settings, users: Sequence[int] | None, request: str | None) -> list[Forgotten]:
    """These users, as they are recorded or are to be; without any, all whom Postgres or the bucket knows as forgotten.

    Raises:
        FinproError: Postgres does not answer; where nobody is named, the bucket does not.
    """
    known = {person.user_id: person for person in recorded(settings.require("postgres_dsn"))}
    if users:
        now = datetime.now(UTC)
        return [known.get(user_id) or Forgotten(user_id, now, request) for user_id in sorted(set(users))]
    if settings.get("gcs_bucket"):
        bucket = open_bucket(settings)
        with explained(settings):
            known = {person.user_id: person for person in kept_in_bucket(bucket)} | known
    return [known[user_id] for user_id in sorted(known)]


# --- the places ------------------------------------------------------------------------------------------------------


def in_postgres(settings: Settings, persons: Sequence[Forgotten], *, dry_run: bool) -> Place:
    """Record them, and so erase them from raw_users; and what was written of their orders in words.

    Raises:
        FinproError: nothing is known of one of them, or Postgres does not answer.
    """
    dsn = settings.require("postgres_dsn")
    held = held_in_postgres(dsn, _ids(persons)) if dry_run else forget_in_postgres(dsn, persons)
    remains = "old versions of rows until Postgres vacuums; its WAL and backups, as long as you keep them"
    reasons = forget_reasons(dsn, _ids(persons), dry_run=dry_run)
    return Place("Postgres", _counted({**held._asdict(), "reasons of order_outcomes": reasons}), remains)


def by_a_run(settings: Settings, persons: Sequence[Forgotten], spark: SparkSession) -> Place:
    """Keep a copy of the record in the bucket; bring pseudonyms to BigQuery by an export, which is loaded and reconciled."""
    bucket = open_bucket(settings)
    with explained(settings):
        keep_in_bucket(bucket, persons)
        newest = newest_manifest(bucket)
    if newest is None:
        return Place("a run", "nothing was ever exported")
    if all(person.completed_at for person in persons):
        return Place("a run", "has been made before")
    run_id = f"{new_run_id(datetime.now(UTC))}-forget"
    export(lambda: spark.sparkContext, settings, run_id)
    load(settings, run_id)
    require_consistent(reconcile(settings, run_id, "forget"))
    return Place("a run", f"{run_id}: exported, loaded, Consistent")


def in_bigquery(settings: Settings, persons: Sequence[Forgotten], *, dry_run: bool) -> Place:
    """Erase them from every table of the three datasets."""
    found = forget_in_tables(settings, _ids(persons), dry_run=dry_run)
    end = datetime.now(UTC) + _TIME_TRAVEL
    remains = f"time travel until {end:%Y-%m-%d}, then Google's fail-safe until {end + _TIME_TRAVEL:%Y-%m-%d}; copies of yours"
    return Place("BigQuery", _counted(found), remains)


def in_the_bucket(settings: Settings, persons: Sequence[Forgotten], *, dry_run: bool) -> Place:
    """Erase them from the exported files."""
    bucket = open_bucket(settings)
    with explained(settings):
        found = forget_in_files(bucket, _ids(persons), dry_run=dry_run)
    remains = "replaced objects as long as the bucket keeps them (soft delete, for 7 days unless it says otherwise; versions)"
    rows = f"{found.rows:,} rows in {found.written:,} of {found.looked_at:,} files" if found.rows else _NOTHING
    return Place("exported files", rows, remains)


def in_the_lakehouse(settings: Settings, persons: Sequence[Forgotten], spark: SparkSession, *, dry_run: bool) -> Place:
    """Erase what came with their orders."""
    try:
        declared = [(entry.since, entry.rules.fields) for entry in rules_in_force(spark, settings.lakehouse)]
        found = forget_in_lakehouse(spark, settings.lakehouse, _ids(persons), datetime.now(UTC), declared, dry_run=dry_run)
    except PySparkException as error:
        raise LakehouseError(f"{settings.lakehouse} could not be worked through: {str(error).splitlines()[0]}") from error
    if found is None:
        return Place("lakehouse", f"nothing is archived in {settings.lakehouse}")
    counted = _counted({name.replace("_", " "): count for name, count in found._asdict().items()})
    remains = "what is not archived yet comes as it is: `finpro forget` once it is; in Cloud Storage replaced objects as above"
    return Place("lakehouse", counted, remains)


def in_kafka(settings: Settings) -> Place:
    """How long Kafka keeps what cannot be deleted without all that others have sent before."""
    try:
        until = [f"{topic} {_until(kept)}" for topic, kept in kept_for(settings).items()]
    except KafkaError as error:
        until = [f"unknown: {error}"]
    return Place("Kafka", "nothing: records go with their topic's retention", ", ".join(until) or "unknown")


def elsewhere() -> Place:
    """What finpro has written for people."""
    page = finpro_home() / "report.html"
    remains = f"{page}, until `finpro report` writes it anew; " if page.exists() else ""
    return Place("elsewhere", "nothing", f"{remains}pages, messages and copies that were handed on")


def _ids(persons: Collection[Forgotten]) -> list[int]:
    return [person.user_id for person in persons]


def _counted(found: dict[str, int]) -> str:
    return ", ".join(f"{what} {rows:,}" for what, rows in found.items() if rows) or _NOTHING


def _until(kept: timedelta | None) -> str:
    """When the last of a topic's messages of now goes, in words."""
    try:
        return "for ever" if kept is None else f"until {datetime.now(UTC) + kept:%Y-%m-%d}"
    except OverflowError:
        return "for ever"


def _tried(name: str, work: Callable[[], Place]) -> Place:
    try:
        return work()
    except FinproError as error:
        return Place(name, "", trouble=error)


# --- all of them -----------------------------------------------------------------------------------------------------


def forget(settings: Settings, persons: Sequence[Forgotten], *, dry_run: bool) -> list[Place]:
    """Erase these persons everywhere, or only say what would be.

    Raises:
        FinproError: nothing is known of one of them, or Postgres does not answer: nothing was erased.
    """
    places = [in_postgres(settings, persons, dry_run=dry_run)]
    is_there = settings.get("gcs_bucket") is not None and settings.get("gcp_project") is not None
    with job_session(PROPERTIES) as spark:
        warehouse: dict[str, Callable[[], Place]] = {
            "a run": lambda: by_a_run(settings, persons, spark),
            "BigQuery": lambda: in_bigquery(settings, persons, dry_run=dry_run),
            "exported files": lambda: in_the_bucket(settings, persons, dry_run=dry_run),
        }
        if dry_run:
            del warehouse["a run"]
        places += [_tried(name, work) if is_there else Place(name, _NOT_CONFIGURED) for name, work in warehouse.items()]
        places.append(_tried("lakehouse", lambda: in_the_lakehouse(settings, persons, spark, dry_run=dry_run)))
    is_there = settings.get("kafka_bootstrap_servers") is not None
    places += [in_kafka(settings) if is_there else Place("Kafka", _NOT_CONFIGURED), elsewhere()]
    if not dry_run and not any(place.trouble for place in places):
        complete(settings.require("postgres_dsn"), _ids(persons))
    return places


def show(console: Console, who: str, places: Sequence[Place], *, dry_run: bool) -> None:
    """Print the report: of each place what was erased there, and what remains until when."""
    console.print(f"{who}, {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC: {'would be erased' if dry_run else 'erased'}")
    for place in places:
        console.print(f"{place.name:<15}{'not reached' if place.trouble else place.erased}")
        if place.remains:
            console.print(f"{'':<15}remains: {place.remains}")


def main(given: Sequence[str] | None = None, *, console: Console | None = None) -> None:
    """Forget with these options, and show on the console what was erased.

    Raises:
        ForgetError: nothing is known of somebody, or some place could not be reached; names it.
        FinproError: Postgres does not answer: nothing was erased.
    """
    options, settings = arguments(given), load_settings()
    console = console or Console(highlight=False, soft_wrap=True)
    persons = whom(settings, options.users, options.request)
    if not persons:
        console.print("nobody is forgotten: --user N forgets somebody")
        return
    who = f"user {', '.join(map(str, _ids(persons)))}" if options.users else f"{len(persons):,} who are forgotten"
    places = forget(settings, persons, dry_run=options.dry_run)
    show(console, who, places, dry_run=options.dry_run)
    if wrong := [f"  {place.name}: {place.trouble}" for place in places if place.trouble]:
        raise ForgetError(
            f"{who} could not be erased everywhere:\n"
            + "\n".join(wrong)
            + "\n`finpro forget` goes on with it, once that is mended."
        )


if __name__ == "__main__":
    run_as_program(main)
