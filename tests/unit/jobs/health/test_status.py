"""`finpro status`: what it makes of answers, errors and silence, and of a streaming job's traces."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from conf.errors import KafkaError, SettingsError
from conf.settings import Settings
from jobs.health import checks as health_checks
from jobs.health.checks import CHECKS
from jobs.health.findings import Finding, State, dated
from jobs.health.status import Health, as_json, health, is_down
from jobs.health.textfile import write_metrics
from jobs.spark.running_job import RunningJob
from streaming.committed import Committed, last_commit


def answers(state: State, text: str = "") -> Callable[[Settings], Finding]:
    return lambda _settings: Finding(state, text)


def raises(error: Exception) -> Callable[[Settings], Finding]:
    def check(_settings: Settings) -> Finding:
        raise error

    return check


def test_a_part_that_fails_or_breaks_does_not_hide_the_others() -> None:
    checks = {
        "refuses": raises(KafkaError("Kafka at k:9092 does not answer.\n(details)")),
        "breaks": raises(ZeroDivisionError("division by zero")),
        "works": answers(State.OK, "fine"),
    }

    parts = {part.part: part for part in health(Settings(), timeout_seconds=5, checks=checks)}

    assert (parts["refuses"].state, parts["refuses"].text) == (State.DOWN, "Kafka at k:9092 does not answer.")
    assert (parts["breaks"].state, parts["breaks"].text) == (
        State.DOWN,
        "cannot be checked: ZeroDivisionError: division by zero",
    )
    assert (parts["works"].state, parts["works"].text) == (State.OK, "fine")


def test_what_is_not_configured_is_off_but_kafka_and_postgres_are_needed() -> None:
    missing = raises(SettingsError("FINPRO_… is not set."))

    parts = health(Settings(), timeout_seconds=5, checks={"Kafka": missing, "Postgres": missing, "BigQuery": missing})

    assert [part.state for part in parts] == [State.DOWN, State.DOWN, State.OFF]


def test_parts_are_asked_side_by_side_and_one_that_is_silent_is_down_when_the_time_is_up() -> None:
    def slow(_settings: Settings) -> Finding:
        time.sleep(0.5)
        return Finding(State.OK, "")

    def silent(_settings: Settings) -> Finding:
        time.sleep(60)
        return Finding(State.OK, "")

    started = time.monotonic()
    parts = health(Settings(), timeout_seconds=2, checks={"silent": silent, **{f"slow {n}": slow for n in range(5)}})

    assert time.monotonic() - started < 4
    assert (parts[0].state, parts[0].text) == (State.DOWN, "no answer within 2 s")
    assert {part.state for part in parts[1:]} == {State.OK}


@pytest.mark.parametrize(("state", "down"), [(State.OK, False), (State.OFF, False), (State.WARN, False), (State.DOWN, True)])
def test_only_what_is_down_makes_the_platform_unhealthy(state: State, down: bool) -> None:
    parts = [Health("a", State.OK, "", 0.1), Health("b", state, "text", 0.25)]

    assert is_down(parts) is down
    assert json.loads(as_json(parts)) == {
        "healthy": not down,
        "parts": [
            {"part": "a", "state": "ok", "text": "", "seconds": 0.1, "at": None},
            {"part": "b", "state": state.value, "text": "text", "seconds": 0.25, "at": None},
        ],
    }


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Finding]:
    """What status finds of `screen`, given its traces on this machine, in the ledger and in Kafka."""

    def found(*, job: RunningJob | None, committed_ago: timedelta | None, waiting: int = 0, measured: object = None) -> Finding:
        commit = None if committed_ago is None else Committed(3, datetime.now(UTC) - committed_ago, {})
        monkeypatch.setattr(health_checks, "find_job", lambda _name: job)
        monkeypatch.setattr(health_checks, "last_settled", lambda _settings: commit)
        monkeypatch.setattr(health_checks, "unread", lambda _settings, _commit: waiting)
        monkeypatch.setattr(health_checks, "_measured", lambda _job: measured)
        return CHECKS["screen"](Settings())

    return found


RUNNING = RunningJob("screen", 4711, datetime(2026, 11, 1, tzinfo=UTC), "http://127.0.0.1:1/metrics")
LIVELY = health_checks._Measured(rows_per_second=812, silent=timedelta(seconds=2), rules_refused=False)
SECONDS, HOURS = timedelta(seconds=3), timedelta(hours=2)


def test_a_job_that_runs_is_ok_with_its_rate_and_what_waits(traces: Callable[..., Finding]) -> None:
    running = replace(RUNNING, started_at=datetime.now(UTC) - timedelta(hours=3, minutes=1))
    found = traces(job=running, committed_ago=SECONDS, waiting=1200, measured=LIVELY)

    assert found.state is State.OK
    assert found.text == "runs for 3 h (process 4711), last micro-batch 3 s ago, 1,200 messages wait, 812/s"


def test_a_job_that_is_idle_for_hours_is_ok_as_long_as_it_says_so(traces: Callable[..., Finding]) -> None:
    assert traces(job=RUNNING, committed_ago=HOURS, measured=LIVELY).state is State.OK


@pytest.mark.parametrize(
    ("measured", "state"),
    [
        (None, State.WARN),
        (LIVELY._replace(silent=timedelta(minutes=6)), State.DOWN),
        (LIVELY._replace(rules_refused=True), State.WARN),
    ],
    ids=["no metrics", "silent for minutes", "rules refused"],
)
def test_a_job_that_runs_but_is_not_well(traces: Callable[..., Finding], measured: object, state: State) -> None:
    assert traces(job=RUNNING, committed_ago=SECONDS, measured=measured).state is state


@pytest.mark.parametrize(
    ("committed_ago", "waiting", "state"),
    [(None, 0, State.OFF), (SECONDS, 9, State.OK), (HOURS, 9, State.DOWN), (HOURS, 0, State.WARN)],
    ids=["never ran", "runs on another machine", "stopped, and messages wait", "stopped, and nothing waits"],
)
def test_a_job_without_a_process_here(
    traces: Callable[..., Finding], committed_ago: timedelta | None, waiting: int, state: State
) -> None:
    assert traces(job=None, committed_ago=committed_ago, waiting=waiting).state is state


def test_the_last_commit_is_the_last_micro_batch_that_was_committed_not_the_one_that_was_begun(tmp_path: Path) -> None:
    for folder, batches in (("offsets", (8, 9, 10)), ("commits", (8, 9))):
        (tmp_path / "q" / folder).mkdir(parents=True)
        for batch in batches:
            (tmp_path / "q" / folder / str(batch)).write_text(f'v1\n{{"conf":{{}}}}\n{{"orders":{{"0":{batch},"1":7}}}}')
    (tmp_path / "q" / "commits" / ".10.tmp").touch()

    commit = last_commit(Settings(checkpoints=str(tmp_path)), "q")

    assert commit
    assert (commit.batch, commit.ends) == (9, {"orders": {0: 9, 1: 7}})
    assert abs(commit.at - datetime.now(UTC)) < timedelta(minutes=1)
    assert last_commit(Settings(checkpoints=str(tmp_path)), "never_started") is None


def test_the_lakehouse_is_as_old_as_bronze_s_newest_version(tmp_path: Path) -> None:
    log = tmp_path / "bronze" / "orders" / "_delta_log"
    log.mkdir(parents=True)
    settings = Settings(lakehouse=str(tmp_path))
    assert CHECKS["lakehouse"](settings).state is State.OFF

    for version in range(9, 13):  # those before have been cleaned up
        (log / f"{version:020}.json").touch()
    (log / "_last_checkpoint").write_text('{"version": 10, "size": 3}')

    found = CHECKS["lakehouse"](settings)
    assert found.state is State.OK
    assert found.text.endswith("(version 12)")


@pytest.mark.parametrize(("minutes", "state"), [(110, State.OK), (130, State.WARN)])
def test_a_run_of_the_hourly_pipeline_is_stale_after_two_hours(minutes: int, state: State) -> None:
    at = datetime.now(UTC) - timedelta(minutes=minutes)
    found = dated(at, "run r, loaded")
    assert (found.state, found.at) == (state, at)


def test_metrics_for_prometheus_are_of_all_parts_that_are_used(tmp_path: Path) -> None:
    ended = datetime(2026, 11, 29, 12, tzinfo=UTC)
    write_metrics(
        tmp_path / "finpro.prom",
        [
            Health("marts", State.WARN, "", 0.1, ended),
            Health("reconciliation", State.DOWN, "", 0.1, ended),
            Health("archive", State.OFF, "", 0.1),
        ],
    )
    lines = (tmp_path / "finpro.prom").read_text().splitlines()
    assert 'finpro_part_down{part="marts"} 0.0' in lines
    assert 'finpro_part_down{part="reconciliation"} 1.0' in lines
    (when,) = [line.split()[1] for line in lines if line.startswith('finpro_run_timestamp_seconds{part="marts"}')]
    assert float(when) == ended.timestamp()
    assert not [line for line in lines if "archive" in line]
