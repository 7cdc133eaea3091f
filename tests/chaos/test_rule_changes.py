"""The rules change while screening is killed again and again: each verdict is by the rules of its micro-batch's own time."""

import random
import time
from collections import defaultdict
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest

from batch.postgres import connect
from conf.rules import FraudRules
from conf.settings import Settings
from streaming.kafka import PROCESSED_ORDERS
from streaming.rules.recorded import RulesInForce, decode_rules, rules_at
from tests.chaos.test_kills import planned_batches, wait_for_batches
from tests.runs import screening as runs

pytestmark = pytest.mark.usefixtures("spark_session")
KILLS = 3


def history(settings: Settings) -> list[RulesInForce]:
    """What the lakehouse says of when which rules were in force."""
    records = sorted(Path(settings.lakehouse, "rules").glob("*.json"))
    return decode_rules(f"[{','.join(record.read_text() for record in records)}]")


def versions_stored(settings: Settings) -> list[tuple[datetime, str]]:
    with connect(settings.require("postgres_dsn")) as connection, connection.cursor() as cursor:
        cursor.execute("select screened_at, rules_version from raw_orders")
        return cursor.fetchall()


@pytest.mark.timeout(600)
def test_a_micro_batch_that_is_replayed_goes_by_the_rules_it_had_and_says_the_same_again(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rules.toml"
    monkeypatch.setenv("FINPRO_RULES", str(path))
    start = datetime.now(UTC) - timedelta(hours=2)
    orders = runs.dense_orders(6_000, FraudRules(version="0"), seed=21, start=start, step=timedelta(milliseconds=400))
    runs.send(settings, runs.by_product(orders))
    choose = random.Random(21)
    replays = 0
    for number in range(KILLS):
        # Each version finds other frauds than the one before.
        path.write_text(f'version = "{number}"\n[foreign_country]\nhome = "{("ID", "SG")[number % 2]}"\n')
        planned = planned_batches(settings)
        process = runs.start_screen("--trigger", "0 seconds")
        try:
            wait_for_batches(settings, more_than=max(planned, 1))
            time.sleep(choose.uniform(0, 0.8))
        finally:
            runs.kill_group(process)
        replays += planned_batches(settings) > len(list(Path(settings.checkpoints, "screen_orders", "commits").glob("[0-9]*")))
    path.write_text('version = "last"\n')
    finished = runs.run_screen("--available-now")
    assert finished.returncode == 0, finished.stdout
    assert replays > 0

    in_force = history(settings)
    assert [entry.rules.version for entry in in_force] == [*map(str, range(KILLS)), "last"]
    stored = versions_stored(settings)
    assert len(stored) == len(orders)
    assert [row for row in stored if rules_at(in_force, row[0]).version != row[1]] == []
    said: dict[tuple[str, str], set[bytes]] = defaultdict(set)
    for record in runs.consume(settings, PROCESSED_ORDERS):
        verdict = msgspec.json.decode(record.value())
        said[verdict["order_id"], verdict["screened_at"]].add(record.value())
    assert all(len(records) == 1 for records in said.values())
    assert len({version for _, version in stored}) > 2
