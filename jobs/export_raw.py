"""The export job: `spark-submit jobs/export_raw.py [options]`, or `finpro export`."""

import argparse
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime

from pyspark import SparkContext

from batch.warehouse.export import export, new_run_id
from batch.warehouse.manifest import Manifest, TableExport
from conf.settings import load_settings
from jobs.spark.session import run_as_program
from streaming.jvm import running_context


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the job; None stands for those of the process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--run-id", default=new_run_id(datetime.now(UTC)), help="name of the run, for good; by default the time"
    )
    parser.add_argument("--full", action="store_true", help="export every row, not only what changed since the run before")
    parser.add_argument("--since", type=moment, help="export again what has changed since then, ISO 8601")
    return parser.parse_args(given)


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
        f"{table.table}: {table.rows:,} of {table.source_rows:,} rows{_more(table)}, {len(table.files)} files,"
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


def _more(table: TableExport) -> str:
    """What else a run brings of a table, and the days of an incremental one."""
    deleted = f", {table.deleted_rows:,} deleted" if table.deleted_rows else ""
    days = f", on {len(table.days):,} of {table.day_count:,} days" if table.days else ""
    return deleted + days


def main(
    given: Sequence[str] | None = None,
    prepare: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = print,
) -> None:
    """Export with these options; `say` hears how it fares. Spark starts when it is needed, and `prepare` is called before that.

    Raises:
        FinproError: something is missing, refuses or does not answer; says what to do.
    """
    options, settings = arguments(given), load_settings()
    with ExitStack() as at_the_end:

        def start_spark() -> SparkContext:
            if (running := running_context()) is not None:
                return running  # which is the process's, not ours to stop
            prepare()
            spark = SparkContext.getOrCreate()
            at_the_end.callback(spark.stop)
            return spark

        say(summary(export(start_spark, settings, options.run_id, full=options.full, since=options.since, say=say)))


if __name__ == "__main__":
    run_as_program(main)
