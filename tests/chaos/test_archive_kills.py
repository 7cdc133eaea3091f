"""Killed at random points and finished later, the archive has everything once."""

import random
import time
from datetime import UTC, datetime, timedelta
from functools import partial

import pytest
from pyspark.sql import SparkSession

from conf.rules import load_rules
from conf.settings import Settings
from streaming.lakehouse.tables import TABLES
from tests.oracle.bad_messages import BAD
from tests.runs import archive as archive
from tests.runs import screening as runs

KILLS = 5


def commits(settings: Settings) -> int:
    """How many commits the tables have seen, all in all."""
    return sum(archive.committed(table.path(settings.lakehouse)) for table in TABLES)


def has_got_on(settings: Settings, before: int) -> bool:
    return commits(settings) > before


@pytest.mark.timeout(900)
def test_killed_at_random_points_and_finished_every_table_has_everything_once(
    settings: Settings, spark_session: SparkSession
) -> None:
    """Minutes: each kill needs a process that has started and committed to Delta tables, seconds a table."""
    rules = load_rules(settings.rules)
    orders = runs.dense_orders(6_000, rules, seed=21, start=datetime.now(UTC) - timedelta(hours=2), step=timedelta(seconds=1))
    bad = [(message.value, number % 4) for number, message in enumerate(BAD)]
    runs.send(settings, [*bad, *runs.repeated(orders, seed=21), *bad])
    assert runs.run_screen("--available-now").returncode == 0
    choose = random.Random(21)
    for _ in range(KILLS):
        before = commits(settings)
        process = archive.start_archive("--trigger", "0 seconds", "--max-offsets-per-trigger", "400")
        try:
            archive.wait_until(partial(has_got_on, settings, before))
            time.sleep(choose.uniform(0, 4))
        finally:
            runs.kill_group(process)
    archive.archive_all()
    archive.assert_lakehouse_agrees(spark_session, settings)
