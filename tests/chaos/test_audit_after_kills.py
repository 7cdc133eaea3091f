"""Screening and archiving killed at random points, orders shuffled and late: the audit finds nothing without a cause."""

import random
import time
from datetime import UTC, datetime, timedelta
from functools import partial

import pytest
from pyspark.sql import SparkSession

from conf.rules import load_rules
from conf.settings import Settings
from streaming.history.audit import audit
from streaming.history.causes import LATE, Reached
from streaming.history.differences import REASONS_MISSING, snapshot
from streaming.history.rescreening import Period
from streaming.kafka import ORDERS
from tests.chaos.test_archive_kills import commits, has_got_on
from tests.chaos.test_kills import planned_batches, wait_for_batches
from tests.runs import screening as runs
from tests.runs.archive import archive_all, start_archive, wait_until

KILLS = 3


@pytest.mark.timeout(900)
def test_after_kills_shuffles_and_late_orders_every_difference_is_late(spark_session: SparkSession, settings: Settings) -> None:
    """Minutes: each kill needs two processes that have started side by side, and got on."""
    rules, choose = load_rules(settings.rules), random.Random(21)
    start = datetime.now(UTC) - timedelta(hours=2)
    orders = runs.dense_orders(4_000, rules, seed=21, start=start, step=timedelta(milliseconds=400))
    late = orders[7::100]
    shuffled = sorted(
        (order for order in orders if order not in late), key=lambda order: order.event_ts.timestamp() + choose.uniform(0, 5)
    )
    runs.send(settings, runs.repeated(shuffled, seed=21))
    for _ in range(KILLS):
        planned, before = planned_batches(settings), commits(settings)
        screening, archiving = (
            runs.start_screen("--trigger", "0 seconds", "--max-offsets-per-trigger", "150"),
            start_archive("--trigger", "1 second"),
        )
        try:
            wait_for_batches(settings, more_than=max(planned, 1))
            wait_until(partial(has_got_on, settings, before))
            time.sleep(choose.uniform(0, 4))
        finally:
            runs.kill_group(screening)
            runs.kill_group(archiving)
    assert runs.run_screen("--available-now").returncode == 0
    runs.send(settings, runs.by_product(late))
    assert runs.run_screen("--available-now").returncode == 0
    archive_all()
    found = audit(snapshot(spark_session, settings.lakehouse, settings.topic(ORDERS)), Period(None, None), Reached())
    assert found.counts.messages == len(runs.sent_messages(settings))
    assert set(found.found) == {(REASONS_MISSING, LATE)}
