"""Killed at random points and finished later, screening ends as if nothing had happened."""

import random
import time
from collections import Counter
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest

from conf.rules import FraudRules, load_rules
from conf.settings import Settings
from jobs.local.platform import Platform, up
from tests.oracle.brute_force import Judgement
from tests.runs import screening as runs

pytestmark = pytest.mark.usefixtures("spark_session")
KILLS = 5


@pytest.fixture
def rules(settings: Settings) -> FraudRules:
    return load_rules(settings.rules)


def planned_batches(settings: Settings) -> int:
    """How many micro-batches the query has planned so far."""
    with suppress(FileNotFoundError):
        return sum(file.name[0].isdigit() for file in Path(settings.checkpoints, "screen_orders", "offsets").iterdir())
    return 0


def wait_for_batches(settings: Settings, more_than: int, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while planned_batches(settings) <= more_than:
        assert time.monotonic() < deadline, "the query does not get on"
        time.sleep(0.05)


def backlog(settings: Settings, rules: FraudRules, count: int, seed: int) -> None:
    start = datetime.now(UTC) - timedelta(hours=2)
    orders = runs.dense_orders(count, rules, seed=seed, start=start, step=timedelta(milliseconds=400))
    runs.send(settings, runs.repeated(orders, seed=seed, keyed=True))


def fewest_hits_across_products(judged: Judgement, rules: FraudRules) -> int:
    """Of the rules across products, how often the rarest of them has hit."""
    hit = Counter(reason for verdict in judged.orders.values() for reason in verdict.reasons)
    return min(hit[name] for part in rules.across_products.values() for name in part.rules)


@pytest.mark.timeout(900)
def test_killed_at_random_points_and_finished_it_ends_as_the_brute_force_says(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Minutes: each kill needs a process that has started, and got on. Half of the kills leave Spark to end by itself.

    The topic is keyed; `test_audit_after_kills` does it where it is not.
    """
    rules = runs.with_rules_across_products(settings.rules, tmp_path / "rules.toml")
    monkeypatch.setenv("FINPRO_RULES", str(tmp_path / "rules.toml"))
    backlog(settings, rules, 12_000, seed=11)
    choose = random.Random(11)
    for kill in range(KILLS):
        planned = planned_batches(settings)
        process = runs.start_screen("--trigger", "0 seconds")
        try:
            wait_for_batches(settings, more_than=max(planned, 1))
            time.sleep(choose.uniform(0, 1.2))
        finally:
            (runs.kill_command if kill % 2 else runs.kill_group)(process)
    finished = runs.run_screen("--available-now")
    assert finished.returncode == 0, finished.stderr
    judged = runs.judged(settings, rules)
    assert fewest_hits_across_products(judged, rules) > 50
    runs.assert_agrees(runs.outcome(settings), judged)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("service", ["postgres", "kafka"])
def test_a_server_that_is_killed_and_comes_back_loses_nothing(
    settings: Settings, rules: FraudRules, platform: Platform, service: str
) -> None:
    backlog(settings, rules, 6_000, seed=12)
    process = runs.start_screen("--trigger", "0 seconds")
    try:
        wait_for_batches(settings, more_than=2)
        server = getattr(platform, service).daemon.process()
        for one in [server, *server.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        time.sleep(2)
        up()
        deadline = time.monotonic() + 120
        planned = planned_batches(settings)
        while process.poll() is None and planned_batches(settings) < planned + 3 and time.monotonic() < deadline:
            time.sleep(0.2)
    finally:
        runs.kill_group(process)
    finished = runs.run_screen("--available-now")
    assert finished.returncode == 0, finished.stderr
    runs.assert_agrees(runs.outcome(settings), runs.judged(settings, rules))
