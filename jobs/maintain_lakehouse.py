"""The upkeep of the lakehouse: `spark-submit jobs/maintain_lakehouse.py [options]`, or `finpro maintain`."""

import argparse
import sys
from datetime import timedelta

from pyspark.sql import SparkSession

from conf.errors import FinproError
from conf.settings import load_settings
from streaming.lakehouse.maintenance import PROPERTIES, maintain, require_retention
from streaming.lakehouse.tables import TABLES


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--force", action="store_true", help="delete files that others may be reading, if the settings say so")
    return parser.parse_args()


def main() -> None:
    options, settings = arguments(), load_settings()
    days = settings.lakehouse_retention_days
    require_retention(days, force=options.force)
    spark = SparkSession.builder.config(map=PROPERTIES).getOrCreate()
    try:
        for table in TABLES:
            done = maintain(spark, settings.lakehouse, table, timedelta(days=days))
            print(
                f"{done.table}: {done.days} days compacted, from {done.before} to {done.after};"
                f" deleted {done.deleted:,} files that were replaced more than {days} days ago",
                flush=True,
            )
    finally:
        spark.stop()


if __name__ == "__main__":
    try:
        main()
    except FinproError as error:
        print(f"finpro: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
