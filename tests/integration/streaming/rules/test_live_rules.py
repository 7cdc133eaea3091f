"""Rules that change, and rules in shadow, on the real `finpro screen` with a real Kafka and Postgres."""

import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest

from batch.google_cloud import storage_client
from batch.postgres import connect
from conf.rules import FraudRules, load_rules
from conf.settings import Settings
from streaming.kafka import PROCESSED_ORDERS
from tests.oracle.brute_force import Order, screen
from tests.runs import screening as runs

pytestmark = pytest.mark.usefixtures("spark_session")
SHADOWED = ("coordinated_users", "foreign_country", "sequential_users")


def write(path: Path, text: str) -> FraudRules:
    """Put rules into a file at once, as an editor does."""
    path.with_suffix(".new").write_text(text)
    path.with_suffix(".new").replace(path)
    return load_rules(path)


def orders(count: int, rules: FraudRules, *, seed: int, minutes_ago: float) -> list[Order]:
    start = datetime.now(UTC) - timedelta(minutes=minutes_ago)
    return runs.dense_orders(count, rules, seed=seed, start=start, step=timedelta(milliseconds=400))


def stored(settings: Settings) -> dict[str, list[Any]]:
    """Of each order in `raw_orders`: status, reasons, shadow reasons and the version of the rules."""
    with connect(settings.require("postgres_dsn")) as connection, connection.cursor() as cursor:
        cursor.execute("select order_id, status, reasons, shadow_reasons, rules_version from raw_orders")
        return {order_id: rest for order_id, *rest in cursor.fetchall()}


def expected(sent: list[Order], rules: FraudRules) -> dict[str, list[Any]]:
    """The same of orders that were all screened by these rules, as the brute force says."""
    found = {}
    for order_id, verdict in screen(sent, rules).items():
        reasons = [reason for reason in verdict.reasons if reason not in rules.in_shadow]
        shadow = [reason for reason in verdict.reasons if reason in rules.in_shadow]
        found[order_id] = ["Fraud" if reasons else "Genuine", reasons, shadow, rules.version]
    return found


def wait_for(happened: Callable[[], bool], what: str, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


@contextmanager
def running(output: Path) -> Iterator[Popen[str]]:
    """`finpro screen`, killed in the end if it still runs."""
    with output.open("w") as file:
        process = runs.start_screen("--trigger", "0 seconds", output=file)
        try:
            yield process
        finally:
            if process.poll() is None:
                runs.kill_group(process)


@pytest.fixture
def path(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A rules file that screening reads."""
    path = tmp_path / "rules.toml"
    monkeypatch.setenv("FINPRO_RULES", str(path))
    return path


def test_a_changed_file_is_taken_up_between_two_micro_batches_of_one_run_and_an_unusable_one_is_not(
    settings: Settings, path: Path, tmp_path: Path
) -> None:
    first = write(path, 'version = "1"\n')
    output = tmp_path / "output"
    judged: dict[str, list[Any]] = {}

    def screened_by(rules: FraudRules, *, seed: int, minutes_ago: float) -> None:
        sent = orders(300, rules, seed=seed, minutes_ago=minutes_ago)
        runs.send(settings, runs.by_product(sent))
        judged.update(expected(sent, rules))
        wait_for(lambda: len(stored(settings)) == len(judged), f"orders by version {rules.version} are not stored")
        assert stored(settings) == judged

    def said(text: str) -> None:
        wait_for(lambda: text in output.read_text(), f"{text!r} is not said")

    with running(output) as process:
        screened_by(first, seed=1, minutes_ago=90)
        second = write(path, 'version = "2"\n[foreign_country]\nhome = "SG"\n[repeat_purchase]\norders = 2\nmode = "shadow"\n')
        said("rules version 2 is in force")
        screened_by(second, seed=2, minutes_ago=70)

        path.with_suffix(".new").write_text('version = "3"\n[night_amount]\nabove = -1\n')
        path.with_suffix(".new").replace(path)
        said("the changed rules are refused, version 2 stays in force")
        said("night_amount.above")
        screened_by(second, seed=3, minutes_ago=50)

        write(path, 'version = "1"\n[foreign_country]\nhome = "MY"\n')
        said("version 1 was used before with other contents")
        screened_by(second, seed=4, minutes_ago=30)

        write(path, 'version = "1"\n')
        said("rules version 1 is in force")
        screened_by(first, seed=5, minutes_ago=10)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert output.read_text().count("finpro: ") == 2


def test_a_rule_in_shadow_is_counted_and_reported_everywhere_and_changes_no_status(settings: Settings, path: Path) -> None:
    rules = write(path, 'version = "1"\n' + "".join(f'[{name}]\nmode = "shadow"\n' for name in SHADOWED))
    sent = orders(1_500, rules, seed=6, minutes_ago=60)
    runs.send(settings, runs.by_product(sent))
    done = runs.run_screen("--available-now")
    assert done.returncode == 0, done.stderr

    judged = expected(sent, rules)
    assert any(reasons for _, reasons, _, _ in judged.values())
    assert stored(settings) == judged
    found = runs.outcome(settings)
    last = {
        order_id: [verdict[name] for name in ("status", "reasons", "shadow_reasons", "rules_version")]
        for order_id, verdict in found.last_verdicts.items()
    }
    assert last == judged
    assert {order_id: (alert["reasons"], sorted(alert["evidence"])) for order_id, alert in found.alerts.items()} == {
        order_id: (reasons, reasons) for order_id, (_, reasons, _, _) in judged.items() if reasons
    }
    counts = Counter(reason for _, _, shadow, _ in judged.values() for reason in shadow)
    assert set(counts) == set(SHADOWED)
    in_shadow = ", ".join(f"{reason} {counts[reason]:,}" for reason in SHADOWED)
    assert f"in shadow: {in_shadow} |" in done.stdout.splitlines()[-1]
    assert any(
        found.verdicts_sent[order_id] > 1 for order_id, (_, reasons, shadow, _) in judged.items() if shadow and not reasons
    ), "no pattern was completed in shadow by a later micro-batch"
    assert sum(found.verdicts_sent.values()) == len(runs.consume(settings, PROCESSED_ORDERS))


@pytest.mark.parametrize("place", ["gs", "unwritable"])
def test_the_rules_are_recorded_in_the_lakehouse_before_the_first_verdict_or_nothing_starts(
    settings: Settings, path: Path, place: str
) -> None:
    write(path, 'version = "1"\n')
    bucket = settings.require("gcs_bucket")
    lakehouse = f"gs://{bucket}/lake" if place == "gs" else "/proc/finpro"
    done = runs.run_screen("--available-now", FINPRO_LAKEHOUSE=lakehouse)
    if place == "gs":
        assert done.returncode == 0, done.stderr
        [record] = storage_client(settings).list_blobs(bucket, prefix="lake/rules/")
        assert re.fullmatch(r"lake/rules/\d{8}T\d{6}\.\d{6}Z\.json", record.name)
        assert b'"version": "1"' in record.download_as_bytes()
    else:
        said = done.stdout + done.stderr  # spark-submit makes one of what a job says
        assert done.returncode == 15, said
        assert "finpro: /proc/finpro/rules" in said
        assert "FINPRO_LAKEHOUSE" in said
        assert "Traceback" not in said
