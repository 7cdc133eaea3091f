"""What `finpro status` asks: one check a part of the platform. A check says what it saw; what cannot be reached raises."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import msgspec
from pyarrow import fs

from batch.file_systems import file_system
from batch.postgres import connect
from batch.postgres import explained as postgres_explained
from batch.sessions import QUICK, describe
from conf.settings import Settings
from expectations.outcome import data_docs, read_gate_run
from jobs.health.findings import Check, Finding, State, age, dated, duration, milliseconds_since
from jobs.spark.running_job import RunningJob, find_job
from streaming.committed import Committed, last_commit, last_settled, unread
from streaming.kafka import TOPICS, orders_kept, require_topics

# Idle queries say so every 10 seconds, and no micro-batch takes minutes.
_SILENT = timedelta(minutes=5)
_RECENT = timedelta(minutes=1)
_METRICS_SECONDS = 3


# --- services --------------------------------------------------------------------------------------------------------


def _kafka(settings: Settings) -> Finding:
    started = time.monotonic()
    require_topics(settings)
    answer = f"{settings.require('kafka_bootstrap_servers')}, {len(TOPICS)} topics, answers in {milliseconds_since(started)}"
    kept = orders_kept(settings)
    if kept.loses or kept.dates:
        return Finding(State.DOWN if kept.loses else State.WARN, f"{answer}; {kept.loses or kept.dates}")
    return Finding(State.OK, answer)


def _postgres(settings: Settings) -> Finding:
    dsn, started = settings.require("postgres_dsn"), time.monotonic()
    orders = _query(dsn, "select pg_stat_get_live_tuples('raw_orders'::regclass)")  # an estimate: a count reads them all
    return Finding(State.OK, f"{describe(dsn)}, about {orders[0][0]:,} orders, answers in {milliseconds_since(started)}")


def _query(dsn: str, query: str) -> list[tuple[Any, ...]]:
    with (
        postgres_explained(dsn),
        connect(dsn, application_name="finpro status", limits=QUICK) as connection,
        connection.cursor() as cursor,
    ):
        cursor.execute(query)
        return cursor.fetchall()


def _of_google_cloud(name: str, needed: str) -> Check:
    """A check of `google_cloud`, where the setting that it needs is there."""

    def check(settings: Settings) -> Finding:
        settings.require(needed)
        from jobs.health import google_cloud

        finding: Finding = getattr(google_cloud, name)(settings)
        return finding

    return check


def import_what_checks_need(settings: Settings) -> None:
    """Import Google's libraries, where the settings lead there: half a second, which is no part's answer."""
    if settings.gcp_project or settings.gcs_bucket:
        with _without_pandas():
            from jobs.health import google_cloud  # noqa: F401


@contextmanager
def _without_pandas() -> Iterator[None]:
    """What is imported in the block takes pandas for missing: BigQuery's library imports it, for 0.3 s, and nobody asks."""
    sys.meta_path.insert(0, _NoPandas)
    try:
        yield
    finally:
        sys.meta_path.remove(_NoPandas)


class _NoPandas:
    @staticmethod
    def find_spec(name: str, *_: Any) -> None:
        if name == "pandas":
            raise ModuleNotFoundError("pandas is left out", name=name)


# --- streaming jobs --------------------------------------------------------------------------------------------------


def _streaming_job(name: str, reached: Callable[[Settings], list[Committed | None]]) -> Check:
    def check(settings: Settings) -> Finding:
        job, begun = find_job(name), [commit for commit in reached(settings) if commit]
        waiting = sum(unread(settings, commit) for commit in begun)
        if job:
            return _running(job, begun, waiting)
        return _not_running(name, begun, waiting)

    return check


_ARCHIVE_QUERIES = ("archive_bronze", "archive_silver", "archive_quarantine")


def _running(job: RunningJob, begun: list[Committed], waiting: int) -> Finding:
    where = f" at {job.host}" if job.host else ""
    parts = [f"runs for {age(job.started_at)} (process {job.pid}{where})"]
    if begun:
        parts.append(f"last micro-batch {age(max(commit.at for commit in begun))} ago")
    parts.append(f"{waiting:,} messages wait")
    measured = _measured(job)
    if measured is None:
        return Finding(State.WARN, ", ".join([*parts, "its metrics do not answer"]))
    parts.append(f"{measured.rows_per_second:,.0f}/s")
    if measured.silent > _SILENT:
        return Finding(State.DOWN, ", ".join([*parts, f"it has not said a thing for {duration(measured.silent)}"]))
    if measured.rules_refused:
        return Finding(State.WARN, ", ".join([*parts, "the rules file cannot be used: older rules are in force"]))
    return Finding(State.OK, ", ".join(parts))


def _not_running(name: str, begun: list[Committed], waiting: int) -> Finding:
    if not begun:
        return Finding(State.OFF, "has never run with these checkpoints")
    newest = max(commit.at for commit in begun)
    last = f"last micro-batch {age(newest)} ago, {waiting:,} messages wait"
    if datetime.now(UTC) - newest < _RECENT:
        return Finding(State.OK, f"no process of this home, but it works somewhere: {last}")
    return Finding(State.DOWN if waiting else State.WARN, f"does not run: `finpro {name}` starts it; {last}")


class _Measured(NamedTuple):
    """What a job's metrics say: messages a second, how long its quietest query has been silent, and of its rules."""

    rows_per_second: float
    silent: timedelta
    rules_refused: bool


def _measured(job: RunningJob) -> _Measured | None:
    """The metrics of a running job; None where they cannot be had."""
    if job.metrics_url is None:
        return None
    import requests
    from prometheus_client.parser import text_string_to_metric_families

    try:
        text = requests.get(job.metrics_url, timeout=_METRICS_SECONDS).text
    except requests.RequestException:
        return None
    values: dict[str, list[float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            values.setdefault(sample.name, []).append(sample.value)
    heartbeat = min(values.get("finpro_query_heartbeat_timestamp_seconds", []), default=job.started_at.timestamp())
    return _Measured(
        rows_per_second=sum(values.get("finpro_query_input_rows_per_second", [])),
        silent=datetime.now(UTC) - datetime.fromtimestamp(heartbeat, UTC),
        rules_refused=any(values.get("finpro_rules_refused", [])),
    )


# --- the lakehouse and the warehouse's last steps --------------------------------------------------------------------


def _lakehouse(settings: Settings) -> Finding:
    """The newest version of bronze: Delta notes one of the last versions in a file, and numbers those after it."""
    location = settings.require("lakehouse")
    system, path = file_system(f"{location.rstrip('/')}/bronze/orders/_delta_log", settings)
    newest: fs.FileInfo | None = None
    version = _noted_version(system, path)
    while (found := system.get_file_info(f"{path}/{version:020}.json")).type is fs.FileType.File:
        newest, version = found, version + 1
    if newest is None:
        return Finding(State.OFF, f"nothing is archived in {location}")
    return Finding(State.OK, f"{location}, bronze last written {age(newest.mtime)} ago (version {version - 1})")


def _noted_version(system: fs.FileSystem, path: str) -> int:
    noted = f"{path}/_last_checkpoint"
    if system.get_file_info(noted).type is not fs.FileType.File:
        return 0
    with system.open_input_stream(noted) as stream:
        return int(msgspec.json.decode(stream.readall())["version"])


def _reconciliation(settings: Settings) -> Finding:
    found = _query(
        settings.require("postgres_dsn"),
        """
        select run_id, max(finished_at), count(*), string_agg(table_name, ', ') filter (where status <> 'Consistent')
        from ingestion_monitoring group by run_id order by max(finished_at) desc limit 1""",
    )
    if not found:
        return Finding(State.OFF, "never: `finpro reconcile` compares the newest load")
    run_id, finished_at, tables, inconsistent = found[0]
    if inconsistent:
        return Finding(
            State.DOWN, f"run {run_id}: {inconsistent} Inconsistent; `finpro reconcile` names every figure", finished_at
        )
    return dated(finished_at, f"run {run_id}, {tables} tables Consistent")


def _bytes_read(settings: Settings) -> Finding:
    """What the steps of the newest run had BigQuery read, in their order."""
    found = _query(
        settings.require("postgres_dsn"),
        """
        select run_id, max(finished_at), pg_size_pretty(sum(bytes_processed)), pg_size_pretty(sum(bytes_billed)),
               string_agg(step || ' ' || pg_size_pretty(bytes_billed), ', ' order by finished_at)
        from ingestion_steps
        where run_id = (select run_id from ingestion_steps order by finished_at desc limit 1)
        group by run_id""",
    )
    if not found:
        return Finding(State.OFF, "BigQuery has read nothing for a run yet")
    run_id, finished_at, processed, billed, steps = found[0]
    return Finding(State.OK, f"run {run_id}: {processed}, {billed} of them billed ({steps}), {age(finished_at)} ago")


def _validation(_settings: Settings) -> Finding:
    run = read_gate_run(data_docs())
    if run is None:
        return Finding(State.OFF, "never on this machine: `finpro validate` checks the newest load")
    written = datetime.fromtimestamp((data_docs() / "index.html").stat().st_mtime, UTC)
    failed = [outcome for outcome in run.outcomes if outcome.stops]
    if failed:
        return Finding(State.DOWN, f"run {run.run_id}: {len(failed)} expectations fail; {data_docs() / 'index.html'}", written)
    return dated(written, f"run {run.run_id}, {len(run.outcomes)} expectations")


# By part. These two are needed by everything; of the others, one that is not configured is not used.
REQUIRED = ("Kafka", "Postgres")
CHECKS: dict[str, Check] = {
    "Kafka": _kafka,
    "Postgres": _postgres,
    "Cloud Storage": _of_google_cloud("cloud_storage", "gcs_bucket"),
    "BigQuery": _of_google_cloud("bigquery", "gcp_project"),
    "screen": _streaming_job("screen", lambda settings: [last_settled(settings)]),
    "archive": _streaming_job("archive", lambda settings: [last_commit(settings, query) for query in _ARCHIVE_QUERIES]),
    "lakehouse": _lakehouse,
    "export": _of_google_cloud("export", "gcs_bucket"),
    "load": _of_google_cloud("load", "gcp_project"),
    "reconciliation": _reconciliation,
    "bytes read": _bytes_read,
    "validation": _validation,
    "marts": _of_google_cloud("marts", "gcp_project"),
}
