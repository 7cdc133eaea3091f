"""The upkeep of the lakehouse: `spark-submit jobs/maintain_lakehouse.py [options]`, or `finpro maintain`."""

import argparse
from collections.abc import Sequence
from datetime import timedelta

from delta.tables import DeltaTable

from conf.settings import load_settings
from jobs.spark.session import job_session, run_as_program
from streaming.lakehouse.maintenance import PROPERTIES, maintain, require_retention
from streaming.lakehouse.tables import OUTCOMES_OF_ORDERS, TABLES


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the job; None stands for those of the process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--force", action="store_true", help="delete files that others may be reading, if the settings say so")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> None:
    options, settings = arguments(given), load_settings()
    days = settings.lakehouse_retention_days
    require_retention(days, force=options.force)
    with job_session(PROPERTIES) as spark:
        outcomes = OUTCOMES_OF_ORDERS.path(settings.lakehouse)
        tables = [*TABLES, OUTCOMES_OF_ORDERS] if DeltaTable.isDeltaTable(spark, outcomes) else TABLES
        for table in tables:
            done = maintain(spark, settings.lakehouse, table, timedelta(days=days))
            print(
                f"{done.table}: {done.days} days compacted, from {done.before} to {done.after};"
                f" deleted {done.deleted:,} files that were replaced more than {days} days ago",
                flush=True,
            )


if __name__ == "__main__":
    run_as_program(main)
