"""What `finpro status` asks: one check a part of the platform. A check says what it saw; what cannot be reached raises."""

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import Any, NamedTuple

import msgspec
import requests
from google.api_core.exceptions import NotFound
from prometheus_client.parser import text_string_to_metric_families
from pyarrow import fs

from batch.file_systems import file_system
from batch.google_cloud import bigquery_client, explained, open_bucket, open_dataset
from batch.postgres import connect, describe
from batch.postgres import explained as postgres_explained
from batch.warehouse.manifest import newest_manifest
from batch.warehouse.tables import Warehouse
from conf.settings import Settings
from expectations.outcome import data_docs, read_gate_run
from jobs.spark.running_job import RunningJob, find_job
from streaming.kafka import TOPICS, require_topics
from streaming.screening.checkpoints import Committed, last_commit, unread

# A schedule of once a day, and two hours for the run itself.
_STALE_RUN = timedelta(hours=26)
# Idle queries say so every 10 seconds, and no micro-batch takes minutes.
_SILENT = timedelta(minutes=5)
_RECENT = timedelta(minutes=1)
_METRICS_SECONDS = 3


class State(Enum):
    """How a part fares; `OFF` is one that is not used here."""

    OK = "ok"
    OFF = "off"
    WARN = "warn"
    DOWN = "down"


class Finding(NamedTuple):
    """What a check saw."""

    state: State
    text: str


Check = Callable[[Settings], Finding]


# --- services --------------------------------------------------------------------------------------------------------


def _kafka(settings: Settings) -> Finding:
    started = time.monotonic()
    require_topics(settings)
    servers = settings.require("kafka_bootstrap_servers")
    return Finding(State.OK, f"{servers}, {len(TOPICS)} topics, answers in {_milliseconds(started)}")


def _postgres(settings: Settings) -> Finding:
    dsn, started = settings.require("postgres_dsn"), time.monotonic()
    orders = _query(dsn, "select pg_stat_get_live_tuples('raw_orders'::regclass)")  # an estimate: a count reads them all
    return Finding(State.OK, f"{describe(dsn)}, about {orders[0][0]:,} orders, answers in {_milliseconds(started)}")


def _cloud_storage(settings: Settings) -> Finding:
    started = time.monotonic()
    bucket = open_bucket(settings)
    return Finding(State.OK, f"gs://{bucket.name}, answers in {_milliseconds(started)}")


def _bigquery(settings: Settings) -> Finding:
    started = time.monotonic()
    dataset = open_dataset(settings, bigquery_client(settings))
    return Finding(State.OK, f"{dataset.project}.{dataset.dataset_id}, answers in {_milliseconds(started)}")


def _milliseconds(started: float) -> str:
    return f"{(time.monotonic() - started) * 1000:,.0f} ms"


def _query(dsn: str, query: str) -> list[tuple[Any, ...]]:
    with connect(dsn, application_name="finpro status") as connection, postgres_explained(dsn), connection.cursor() as cursor:
        cursor.execute(query)
        return cursor.fetchall()


# --- streaming jobs --------------------------------------------------------------------------------------------------


def _streaming_job(name: str, queries: tuple[str, ...]) -> Check:
    def check(settings: Settings) -> Finding:
        job, commits = find_job(name), [last_commit(settings, query) for query in queries]
        begun = [commit for commit in commits if commit]
        waiting = sum(unread(settings, commit) for commit in begun)
        if job:
            return _running(job, begun, waiting)
        return _not_running(name, begun, waiting)

    return check


def _running(job: RunningJob, begun: list[Committed], waiting: int) -> Finding:
    parts = [f"runs for {_age(job.started_at)} (process {job.pid})"]
    if begun:
        parts.append(f"last micro-batch {_age(max(commit.at for commit in begun))} ago")
    parts.append(f"{waiting:,} messages wait")
    measured = _measured(job)
    if measured is None:
        return Finding(State.WARN, ", ".join([*parts, "its metrics do not answer"]))
    parts.append(f"{measured.rows_per_second:,.0f}/s")
    if measured.silent > _SILENT:
        return Finding(State.DOWN, ", ".join([*parts, f"it has not said a thing for {_duration(measured.silent)}"]))
    if measured.rules_refused:
        return Finding(State.WARN, ", ".join([*parts, "the rules file cannot be used: older rules are in force"]))
    return Finding(State.OK, ", ".join(parts))


def _not_running(name: str, begun: list[Committed], waiting: int) -> Finding:
    if not begun:
        return Finding(State.OFF, "has never run with these checkpoints")
    newest = max(commit.at for commit in begun)
    last = f"last micro-batch {_age(newest)} ago, {waiting:,} messages wait"
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
    return Finding(State.OK, f"{location}, bronze last written {_age(newest.mtime)} ago (version {version - 1})")


def _noted_version(system: fs.FileSystem, path: str) -> int:
    noted = f"{path}/_last_checkpoint"
    if system.get_file_info(noted).type is not fs.FileType.File:
        return 0
    with system.open_input_stream(noted) as stream:
        return int(msgspec.json.decode(stream.readall())["version"])


def _export(settings: Settings) -> Finding:
    bucket = open_bucket(settings)
    with explained(settings):
        manifest = newest_manifest(bucket)
    if manifest is None:
        return Finding(State.OFF, "never: `finpro export` makes the first run")
    rows = sum(table.rows for table in manifest.tables)
    return _dated(manifest.finished_at, f"run {manifest.run_id}, {rows:,} rows")


def _load(settings: Settings) -> Finding:
    client = bigquery_client(settings)
    dataset = open_dataset(settings, client)
    with explained(settings):
        try:
            run = Warehouse(client, f"{dataset.project}.{dataset.dataset_id}", dataset.location).newest_complete_run()
        except NotFound:
            run = None
    if run is None:
        return Finding(State.OFF, "never: `finpro load` loads the newest export")
    return _dated(run.exported_at, f"run {run.run_id}, exported")


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
        return Finding(State.DOWN, f"run {run_id}: {inconsistent} Inconsistent; `finpro reconcile` names every figure")
    return _dated(finished_at, f"run {run_id}, {tables} tables Consistent")


def _validation(_settings: Settings) -> Finding:
    run = read_gate_run(data_docs())
    if run is None:
        return Finding(State.OFF, "never on this machine: `finpro validate` checks the newest load")
    written = datetime.fromtimestamp((data_docs() / "index.html").stat().st_mtime, UTC)
    failed = [outcome for outcome in run.outcomes if outcome.stops]
    if failed:
        return Finding(State.DOWN, f"run {run.run_id}: {len(failed)} expectations fail; {data_docs() / 'index.html'}")
    return _dated(written, f"run {run.run_id}, {len(run.outcomes)} expectations")


def _dated(at: datetime, text: str) -> Finding:
    """A finding about something that a schedule should do again every day."""
    is_stale = datetime.now(UTC) - at > _STALE_RUN
    return Finding(State.WARN if is_stale else State.OK, f"{text} {_age(at)} ago")


def _age(at: datetime) -> str:
    return _duration(datetime.now(UTC) - at)


def _duration(length: timedelta) -> str:
    """`12 s`, `3 min`, `5 h`, `2 days`."""
    seconds = max(length.total_seconds(), 0)
    for unit, of_seconds in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * of_seconds:
            return f"{seconds // of_seconds:.0f} {unit}"
    return f"{seconds:.0f} s"


# By part. These two are needed by everything; of the others, one that is not configured is not used.
REQUIRED = ("Kafka", "Postgres")
CHECKS: dict[str, Check] = {
    "Kafka": _kafka,
    "Postgres": _postgres,
    "Cloud Storage": _cloud_storage,
    "BigQuery": _bigquery,
    "screen": _streaming_job("screen", ("screen_orders",)),
    "archive": _streaming_job("archive", ("archive_bronze", "archive_silver", "archive_quarantine")),
    "lakehouse": _lakehouse,
    "export": _export,
    "load": _load,
    "reconciliation": _reconciliation,
    "validation": _validation,
}
