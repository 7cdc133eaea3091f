"""The export job: `spark-submit jobs/export_raw.py [options]`, or `finpro export`."""

import argparse
import sys
from datetime import UTC, datetime
from functools import partial

from google.cloud.storage import Bucket
from pyspark import SparkContext
from pyspark.sql import SparkSession

from batch.export import export, new_run_id
from batch.google_cloud import open_bucket
from batch.manifest import TABLES, Manifest
from batch.postgres import connect, explained
from conf.errors import FinproError
from conf.settings import Settings, load_settings


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--run-id", default=new_run_id(datetime.now(UTC)), help="name of the run, for good; by default the time"
    )
    parser.add_argument("--full", action="store_true", help="export every row, not only what changed since the run before")
    parser.add_argument("--since", type=moment, help="export again what has changed since then, ISO 8601")
    return parser.parse_args()


def moment(text: str) -> datetime:
    """A time as ISO 8601 writes it; without an offset it is UTC.

    Raises:
        ValueError: it is not one.
    """
    parsed = datetime.fromisoformat(text)
    return parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)


def summary(manifest: Manifest) -> str:
    """What a run exported, a line a table."""
    lines = [
        f"{table.table}: {table.rows:,} of {table.source_rows:,} rows, {len(table.files)} files,"
        f" {sum(file.bytes for file in table.files) / 2**20:,.1f} MiB"
        for table in manifest.tables
    ]
    since = "every row" if manifest.full else f"what changed since transaction {manifest.since_xid}"
    lines.append(f"run {manifest.run_id} is finished: {since}, to transaction {manifest.xmin}")
    if manifest.oldest_transaction_seconds > 0:
        lines.append(
            f"a transaction had been open for {manifest.oldest_transaction_seconds:,.1f} s: rows written since it began come"
            " again in the next run, with its own"
        )
    return "\n".join(lines)


def check(settings: Settings) -> Bucket:
    """Check what can be checked without Spark: settings, tables, and the bucket, which it opens.

    Raises:
        FinproError: something is missing or does not answer; says what to do.
    """
    dsn = settings.require("postgres_dsn")
    with explained(dsn), connect(dsn, application_name="finpro export") as connection, connection.cursor() as cursor:
        for table in TABLES:
            cursor.execute(f"select from {table} limit 1")
    return open_bucket(settings)


def start_spark() -> SparkContext:
    """The Spark that spark-submit has prepared."""
    return SparkSession.builder.getOrCreate().sparkContext


def main() -> None:
    options, settings = arguments(), load_settings()
    try:
        say = partial(print, flush=True)
        manifest = export(start_spark, settings, options.run_id, full=options.full, since=options.since, say=say)
    finally:
        session = SparkSession.getActiveSession()
        if session:
            session.stop()
    print(summary(manifest))


if __name__ == "__main__":
    try:
        main()
    except FinproError as error:
        print(f"finpro: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
