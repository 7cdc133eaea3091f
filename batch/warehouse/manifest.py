"""The record of an export run: which files hold which rows of which snapshot. A run without one never happened.

`gs://<bucket>/raw/manifests/<run_id>.json` is written last and only once, so half a run is never taken for a run.
"""

import re
from datetime import datetime

import msgspec
from google.api_core.exceptions import NotFound, PreconditionFailed
from google.cloud.storage import Blob, Bucket

from conf.errors import ExportError

TABLES = ("raw_users", "raw_products", "raw_orders")  # what a run exports
MANIFESTS = "raw/manifests/"
_RUN_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Column(msgspec.Struct, frozen=True):
    """A column of an exported table, in the table's order; `type` is BigQuery's, such as INT64 or ARRAY<STRING>."""

    name: str
    type: str


class ExportedFile(msgspec.Struct, frozen=True):
    """A Parquet object of the bucket, by its full name; `bytes` is its size there."""

    name: str
    rows: int
    bytes: int


class TableExport(msgspec.Struct, frozen=True):
    """One table of a run.

    `rows` were exported; `source_rows` and `source_profile` (see profile.py) describe the whole table as the run's snapshot
    shows it.
    """

    table: str
    key: list[str]
    columns: list[Column]
    files: list[ExportedFile]
    rows: int
    source_rows: int
    source_profile: dict[str, dict[str, int | str | None]]


class Manifest(msgspec.Struct, frozen=True):
    """A finished run.

    It holds every row that its `snapshot` (pg_current_snapshot) shows and that a transaction from `since_xid` on wrote;
    a `full` run holds every row. The next run goes on from `xmin`, the oldest transaction that was open at the snapshot,
    `oldest_transaction_seconds` old by then (0 when none was). `database` tells one Postgres database from another.
    """

    run_id: str
    full: bool
    since_xid: int | None
    snapshot: str
    xmin: int
    started_at: datetime
    finished_at: datetime
    oldest_transaction_seconds: float
    tables: list[TableExport]
    database: str = ""


def check_run_id(run_id: str) -> str:
    """The same run id, when it can name objects, BigQuery jobs and tables.

    Raises:
        ExportError: it cannot.
    """
    if not _RUN_ID.fullmatch(run_id):
        raise ExportError(f'"{run_id}" cannot be a run id: use 1 to 64 of the characters A-Z a-z 0-9 _ -')
    return run_id


def write_manifest(bucket: Bucket, manifest: Manifest) -> None:
    """Finish a run: from now on it counts.

    Raises:
        ExportError: this run has a manifest already; that one stands.
    """
    text = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
    try:
        _blob_of(bucket, manifest.run_id).upload_from_string(text, content_type="application/json", if_generation_match=0)
    except PreconditionFailed as error:
        raise ExportError(f"Run {manifest.run_id} is finished already: its manifest stands. Use another --run-id.") from error


def find_manifest(bucket: Bucket, run_id: str) -> Manifest | None:
    """The manifest of a run, or None when the run is not finished.

    Raises:
        ExportError: the manifest cannot be read.
    """
    blob = _blob_of(bucket, check_run_id(run_id))
    try:
        return msgspec.json.decode(blob.download_as_bytes(), type=Manifest)
    except NotFound:
        return None
    except msgspec.DecodeError as error:
        raise ExportError(
            f"gs://{bucket.name}/{blob.name} is not a manifest that this version reads ({error}): export again."
        ) from error


def finished_runs(bucket: Bucket) -> list[str]:
    """The run ids of all finished runs, the oldest first: a bucket's clock orders them, since exports exclude each other."""
    blobs = [blob for blob in bucket.list_blobs(prefix=MANIFESTS) if blob.name.endswith(".json")]
    return [_run_of(blob.name) for blob in sorted(blobs, key=lambda blob: (blob.time_created, blob.name))]


def newest_manifest(bucket: Bucket, before: datetime | None = None) -> Manifest | None:
    """The manifest of the run that was finished last, of those that began before a moment if one is given, or None."""
    manifests = (find_manifest(bucket, run_id) for run_id in reversed(finished_runs(bucket)))
    return next((each for each in manifests if each and (before is None or each.started_at < before)), None)


def read_manifest(bucket: Bucket, run_id: str | None = None) -> Manifest:
    """The manifest of a finished run; without a run id, of the newest.

    Raises:
        ExportError: there is no such run, or its manifest cannot be read.
    """
    manifest = find_manifest(bucket, run_id) if run_id else newest_manifest(bucket)
    if manifest is None:
        which = f"no finished run {run_id}" if run_id else "no finished export"
        raise ExportError(f"There is {which} in gs://{bucket.name}/{MANIFESTS}: run `finpro export` first.")
    return manifest


def _blob_of(bucket: Bucket, run_id: str) -> Blob:
    return bucket.blob(f"{MANIFESTS}{run_id}.json")


def _run_of(name: str) -> str:
    return name.removeprefix(MANIFESTS).removesuffix(".json")
