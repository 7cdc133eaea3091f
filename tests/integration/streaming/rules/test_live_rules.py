"""Rules that change, and rules in shadow, on the real `finpro screen` with a real Kafka and Postgres."""

import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest

from batch.google_cloud import storage_client
from batch.postgres import connect
from conf.rules import FraudRules, load_rules
from conf.settings import CONF_DIR, Settings
from streaming.kafka import PROCESSED_ORDERS
from streaming.screening.verdicts import KINDS
from tests.oracle.brute_force import Order, screen
from tests.runs import archive
from tests.runs import screening as runs
from tests.runs.commands import finpro
from tests.runs.spark_events import event_log

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
    """Of each order in `raw_orders`: status, the reasons of each kind and the version of the rules."""
    with connect(settings.require("postgres_dsn")) as connection, connection.cursor() as cursor:
        cursor.execute("select order_id, status, reasons, shadow_reasons, suppressed_reasons, rules_version from raw_orders")
        return {order_id: rest for order_id, *rest in cursor.fetchall()}


def expected(sent: list[Order], rules: FraudRules) -> dict[str, list[Any]]:
    """The same of orders that were all screened by these rules, as the brute force says."""
    found = {}
    for order_id, verdict in screen(sent, rules).items():
        reasons = [reason for reason in verdict.reasons if reason not in rules.in_shadow]
        shadow = [reason for reason in verdict.reasons if reason in rules.in_shadow]
        found[order_id] = ["Fraud" if reasons else "Genuine", reasons, shadow, verdict.suppressed_reasons, rules.version]
    return found


def wait_for(happened: Callable[[], bool], what: str, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


@contextmanager
def running(output: Path, *options: str) -> Iterator[Popen[str]]:
    """`finpro screen`, killed in the end if it still runs."""
    with output.open("w") as file:
        process = runs.start_screen("--trigger", "0 seconds", *options, output=file)
        try:
            yield process
        finally:
            if process.poll() is None:
                runs.kill_group(process)


@contextmanager
def held_up(process: Popen[str]) -> Iterator[None]:
    """The process and what it has started stand still for one block."""
    os.killpg(process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGCONT)


@pytest.fixture
def path(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A rules file that screening reads."""
    path = tmp_path / "rules.toml"
    monkeypatch.setenv("FINPRO_RULES", str(path))
    return path


LISTS = """
[lists.testers]
file = "testers.csv"
allows = { by = "user_id", reasons = ["blocked_source", "coordinated_users", "repeat_purchase"] }
[lists.blocked]
file = "blocked.csv"
[rules.blocked_source]
when = "listed(source, 'blocked')"
"""
SECRET = "tr-4711-tr"  # in lists, and nowhere else


def with_lists(
    path: Path, version: str, users: Iterable[int], *, former_users: Iterable[int], lists: str = LISTS
) -> FraudRules:
    """The delivered rules and lists: what these users do is allowed, and what those did was until yesterday."""
    yesterday = (datetime.now(UTC) - timedelta(days=1)).isoformat()
    lines = [*(f"{user},{SECRET}," for user in users), *(f"{user},{SECRET},{yesterday}" for user in former_users)]
    path.with_name("testers.csv").write_text("value,reason,expiry\n" + "\n".join(lines))
    path.with_name("blocked.csv").write_text(f"value,reason,expiry\nit's,{SECRET},\n{SECRET},,\nweb,{SECRET},{yesterday}\n")
    delivered = (CONF_DIR / "fraud_rules.toml").read_text()
    return write(path, re.sub("^version = .*", f'version = "{version}"', delivered, flags=re.MULTILINE) + lists)


def test_a_changed_file_is_taken_up_between_two_micro_batches_of_one_run_and_an_unusable_one_is_not(
    settings: Settings, path: Path, tmp_path: Path
) -> None:
    """More than a minute: one run goes by all kinds of rules, of lists too, and is audited."""
    first = write(path, 'version = "1"\n')
    output = tmp_path / "output"
    judged: dict[str, list[Any]] = {}

    def screened_by(rules: FraudRules, *, seed: int, minutes_ago: float) -> None:
        sent = orders(300, rules, seed=seed, minutes_ago=minutes_ago)
        # In one micro-batch: they span more than `lateness`, and across products the newest of all partitions counts.
        with held_up(process) if rules.across_products else nullcontext():
            runs.send(settings, runs.by_product(sent))
        judged.update(expected(sent, rules))
        wait_for(lambda: len(stored(settings)) == len(judged), f"orders by version {rules.version} are not stored")
        if rules.across_products:  # whose reasons come a stage later
            wait_for(lambda: stored(settings) == judged, f"reasons by version {rules.version} are not stored", 20)
        assert stored(settings) == judged

    def said(text: str) -> None:
        wait_for(lambda: text in output.read_text(), f"{text!r} is not said")

    with running(output, *event_log(tmp_path / "events")) as process:
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
        screened_by(first, seed=5, minutes_ago=20)

        allowing = with_lists(path, "4", range(1, 11), former_users=range(11, 21))
        said("rules version 4 is in force")
        screened_by(allowing, seed=6, minutes_ago=12)
        fewer = with_lists(path, "5", range(6, 11), former_users=range(1, 6))
        said("rules version 5 is in force")
        screened_by(fewer, seed=7, minutes_ago=8)
        others = LISTS.replace("blocked_source", "renamed_source") + runs.ACROSS_PRODUCTS
        across = with_lists(path, "6", range(6, 11), former_users=range(1, 6), lists=others)
        said("rules version 6 is in force")
        screened_by(across, seed=8, minutes_ago=4)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert output.read_text().count("finpro: ") == 2
    assert_lists_did_something(settings, judged)
    assert {"renamed_source", "busy_user", "foreign_rush"} <= {
        reason for _, reasons, *_ in judged.values() for reason in reasons
    }
    assert output.read_text().splitlines()[-1].count("| suppressed: blocked_source ") == 1

    archive.archive_all()
    audited = finpro("audit")
    assert audited.returncode == 0, audited.stdout
    assert "every verdict and every dead letter is what it has to be" in audited.stdout
    recorded, events = (read_below(folder) for folder in (Path(settings.lakehouse, "rules"), tmp_path / "events"))
    assert allowing.lists["testers"].content in recorded
    assert "SparkListenerTaskEnd" in events
    assert not [text for text in (SECRET, *(one.content for one in allowing.lists.values())) if text in events]


def assert_lists_did_something(settings: Settings, judged: dict[str, list[Any]]) -> None:
    """There are orders that a list has hit, that one has allowed, and that have another reason beside; Kafka says the same."""
    kinds = [(set(reasons), set(suppressed)) for _, reasons, _, suppressed, _ in judged.values()]
    assert any(not reasons and "coordinated_users" in suppressed for reasons, suppressed in kinds)
    assert any(reasons and suppressed for reasons, suppressed in kinds)
    assert any("blocked_source" in reasons for reasons, _ in kinds)
    assert any("blocked_source" in suppressed for _, suppressed in kinds)
    found = runs.outcome(settings)
    last = {order_id: said.get("suppressed_reasons", []) for order_id, said in found.last_verdicts.items()}
    assert last == {order_id: suppressed for order_id, (_, _, _, suppressed, _) in judged.items()}
    assert {order_id: sorted(alert["evidence"]) for order_id, alert in found.alerts.items()} == {
        order_id: reasons for order_id, (_, reasons, _, _, _) in judged.items() if reasons
    }


def read_below(folder: Path) -> str:
    return "".join(path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file())


def test_a_rule_in_shadow_is_counted_and_reported_everywhere_and_changes_no_status(settings: Settings, path: Path) -> None:
    rules = write(path, 'version = "1"\n' + "".join(f'[{name}]\nmode = "shadow"\n' for name in SHADOWED))
    sent = orders(1_500, rules, seed=6, minutes_ago=60)
    runs.send(settings, runs.by_product(sent))
    done = runs.run_screen("--available-now")
    assert done.returncode == 0, done.stderr

    judged = expected(sent, rules)
    assert any(reasons for _, reasons, *_ in judged.values())
    assert stored(settings) == judged
    found = runs.outcome(settings)
    last = {
        order_id: [verdict.get(name, []) for name in ("status", *KINDS.values(), "rules_version")]
        for order_id, verdict in found.last_verdicts.items()
    }
    assert last == judged
    assert {order_id: (alert["reasons"], sorted(alert["evidence"])) for order_id, alert in found.alerts.items()} == {
        order_id: (reasons, reasons) for order_id, (_, reasons, *_) in judged.items() if reasons
    }
    counts = Counter(reason for _, _, shadow, *_ in judged.values() for reason in shadow)
    assert set(counts) == set(SHADOWED)
    in_shadow = ", ".join(f"{reason} {counts[reason]:,}" for reason in SHADOWED)
    assert f"in shadow: {in_shadow} |" in done.stdout.splitlines()[-1]
    assert any(
        found.verdicts_sent[order_id] > 1 for order_id, (_, reasons, shadow, *_) in judged.items() if shadow and not reasons
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
