"""Screening and archiving killed at random, orders bad, shuffled, late: all is right and kept once, differences have causes."""

import random
import time
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from conf.settings import Settings
from streaming.history.audit import audit
from streaming.history.causes import LATE, Reached
from streaming.history.differences import REASONS_MISSING, snapshot
from streaming.history.rescreening import Period
from streaming.kafka import ORDERS
from streaming.lakehouse.tables import TABLES
from tests.chaos.test_kills import fewest_hits_across_products, planned_batches, wait_for_batches
from tests.oracle.bad_messages import BAD
from tests.runs import archive
from tests.runs import screening as runs

KILLS = 5


def commits(settings: Settings) -> int:
    """How many commits the tables have seen, all in all."""
    return sum(archive.committed(table.path(settings.lakehouse)) for table in TABLES)


def has_got_on(settings: Settings, before: int) -> bool:
    return commits(settings) > before


@pytest.mark.timeout(900)
def test_after_kills_shuffles_and_late_orders_all_is_archived_once_and_every_difference_is_late(
    spark_session: SparkSession, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Minutes: each kill needs two processes that have started side by side, and got on. The topic is not keyed.

    Half of the kills leave the Spark of screening to end by itself.
    """
    rules, choose = runs.with_rules_across_products(settings.rules, tmp_path / "rules.toml"), random.Random(21)
    monkeypatch.setenv("FINPRO_RULES", str(tmp_path / "rules.toml"))
    start = datetime.now(UTC) - timedelta(hours=2)
    orders = runs.dense_orders(6_000, rules, seed=21, start=start, step=timedelta(milliseconds=400))
    late = orders[7::100]
    shuffled = sorted(
        (order for order in orders if order not in late), key=lambda order: order.event_ts.timestamp() + choose.uniform(0, 5)
    )
    bad = [(message.value, number % 4) for number, message in enumerate(BAD)]
    runs.send(settings, [*bad, *runs.repeated(shuffled, seed=21), *bad])
    for kill in range(KILLS):
        planned, before = planned_batches(settings), commits(settings)
        screening, archiving = (
            runs.start_screen("--trigger", "500 milliseconds", "--max-offsets-per-trigger", "100"),
            archive.start_archive("--trigger", "0 seconds", "--max-offsets-per-trigger", "400"),
        )
        try:
            wait_for_batches(settings, more_than=max(planned, 1))
            time.sleep(choose.uniform(0, 4))
            (runs.kill_command if kill % 2 else runs.kill_group)(screening)
            archive.wait_until(partial(has_got_on, settings, before))
            time.sleep(choose.uniform(0, 2))
        finally:
            for process in (screening, archiving):
                if process.poll() is None:
                    runs.kill_group(process)
    assert runs.run_screen("--available-now").returncode == 0
    judged = runs.judged(settings, rules)
    assert fewest_hits_across_products(judged, rules) > 50
    runs.assert_agrees(runs.outcome(settings), judged)
    runs.send(settings, runs.by_product(late))
    assert runs.run_screen("--available-now").returncode == 0
    archive.archive_all()
    archive.assert_lakehouse_agrees(spark_session, settings)
    found = audit(snapshot(spark_session, settings.lakehouse, settings.topic(ORDERS)), Period(None, None), Reached())
    assert found.counts.messages == len(runs.sent_messages(settings))
    assert set(found.found) == {(REASONS_MISSING, LATE)}
