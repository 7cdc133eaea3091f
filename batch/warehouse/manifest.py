"""The record of an export run: which files hold which rows of which snapshot. A run without one never happened.

`gs://<bucket>/raw/manifests/<run_id>.json` is written last and only once, so half a run is never taken for a run. Runs are
ordered by their numbers, which the objects also have as metadata: to find the newest one, no other is read.
"""

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, datetime
from typing import NamedTuple

import msgspec
from google.api_core.exceptions import NotFound, PreconditionFailed
from google.cloud.storage import Blob, Bucket

from conf.errors import ExportError

TABLES = ("raw_users", "raw_products", "raw_orders", "order_outcomes")  # what a run exports
MANIFESTS = "raw/manifests/"
Profile = dict[str, dict[str, int | str | None]]
_RUN_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_NUMBER = "number"  # the name of an object's metadata

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TableProfile:
    """Rows of a table: how many, and what profile.py says of their columns."""

    rows: int
    columns: Profile


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

    `rows` were exported in `files`. `deleted` are files of what is no longer there: the key, and where `days` are told the
    UTC day on which it no longer is. `source_rows` and `source_profile` (see profile.py) describe the whole table as the run's
    snapshot shows it.

    `days` are told of a table that is partitioned by day, in a run that is not full: each UTC day of which the run brings rows
    or deletions, with the profile of that whole day. None where any day may have changed. `day_count` is how many days such a
    table has; 0 for other tables.
    """

    table: str
    key: list[str]
    columns: list[Column]
    files: list[ExportedFile]
    rows: int
    source_rows: int
    source_profile: Profile
    deleted: list[ExportedFile] = []
    deleted_rows: int = 0
    days: dict[date, TableProfile] | None = None
    day_count: int = 0

    @property
    def source(self) -> TableProfile:
        """The whole table."""
        return TableProfile(self.source_rows, self.source_profile)


class Manifest(msgspec.Struct, frozen=True):
    """A finished run.

    It holds every row that its `snapshot` (pg_current_snapshot) shows and that a transaction from `since_xid` on wrote;
    a `full` run holds every row, and `asked_for` says that somebody wanted that. The next run goes on from `xmin`, the oldest
    transaction that was open at the snapshot, `oldest_transaction_seconds` old by then (0 when none was).

    `number` is greater than that of each run before it: of two runs that hold a key, the row of the greater number is newer.
    A run that is not full builds on run `since_number`, the newest before it. `database` tells one Postgres database from
    another, and `epoch` one history of a database from another: transaction ids of different epochs do not compare. `token`
    also stands in the database that was read (see changes.py).
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
    number: int = 0  # of runs from before there were numbers
    since_number: int | None = None
    epoch: str = ""
    token: str = ""
    asked_for: bool = False

    def table(self, name: str) -> TableExport:
        """What the run has of a table."""
        return next(each for each in self.tables if each.table == name)


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
    blob = _blob_of(bucket, manifest.run_id)
    blob.metadata = {_NUMBER: str(manifest.number)}
    try:
        blob.upload_from_string(text, content_type="application/json", if_generation_match=0)
    except PreconditionFailed as error:
        raise ExportError(f"Run {manifest.run_id} is finished already: its manifest stands. Use another --run-id.") from error


def find_manifest(bucket: Bucket, run_id: str) -> Manifest | None:
    """The manifest of a run, or None when the run is not finished.

    Raises:
        ExportError: the manifest cannot be read.
    """
    blob = _blob_of(bucket, check_run_id(run_id))
    try:
        return _decoded(blob)
    except NotFound:
        return None


def finished_runs(bucket: Bucket) -> list[str]:
    """The run ids of all finished runs, the oldest first."""
    return [listed.run_id for listed in _listed(bucket)]


def finished_manifests(bucket: Bucket) -> Iterator[Manifest]:
    """The manifests of all finished runs, the newest first, each read when it is asked for.

    Raises:
        ExportError: a manifest cannot be read.
    """
    for listed in reversed(_listed(bucket)):
        if manifest := listed.manifest or _if_ours(listed.blob):
            yield manifest


def newest_manifest(bucket: Bucket, before: datetime | None = None) -> Manifest | None:
    """The manifest of the run of the greatest number, of those that began before a moment if one is given, or None."""
    return next((each for each in finished_manifests(bucket) if before is None or each.started_at < before), None)


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


class _Listed(NamedTuple):
    """A finished run as a listing of the bucket shows it; `manifest` where it had to be read."""

    blob: Blob
    run_id: str
    number: int | None
    manifest: Manifest | None = None

    @property
    def place(self) -> tuple[int, datetime]:
        """Its place among the others: runs without a number come first, in the order in which they were made."""
        if self.manifest:
            return self.manifest.number, self.manifest.finished_at
        return self.number or 0, self.blob.time_created


def _listed(bucket: Bucket) -> list[_Listed]:
    """All finished runs, the oldest first; what else somebody has put there is left out.

    Every export gives its object a number that is greater than all that it finds. So one without a number (of an earlier
    version, or copied without its metadata) is older than those that came after it, and is read only where there is none.
    """
    blobs = [blob for blob in bucket.list_blobs(prefix=MANIFESTS) if _RUN_ID.fullmatch(_run_of(blob.name))]
    found = [_Listed(blob, _run_of(blob.name), _number_of(blob)) for blob in blobs if blob.name.endswith(".json")]
    newest = max((each.blob.time_created for each in found if each.number is not None), default=None)
    runs = []
    for each in found:
        if each.number is not None or (newest and each.blob.time_created < newest):
            runs.append(each)
        elif manifest := _if_ours(each.blob):
            runs.append(each._replace(manifest=manifest))
    return sorted(runs, key=lambda each: each.place)


def _number_of(blob: Blob) -> int | None:
    number = (blob.metadata or {}).get(_NUMBER, "")
    return int(number) if number.isdecimal() else None


def _if_ours(blob: Blob) -> Manifest | None:
    """The manifest that an object holds; None of somebody else's object, and of one that is gone by now."""
    try:
        manifest = _decoded(blob)
    except NotFound:
        return None
    except ExportError as error:
        if _number_of(blob) is not None:
            raise
        _log.warning("%s", error)
        return None
    if manifest.run_id != _run_of(blob.name):
        _log.warning("%s holds the manifest of run %s, and does not count: move it away", _where(blob), manifest.run_id)
        return None
    return manifest


def _decoded(blob: Blob) -> Manifest:
    try:
        return msgspec.json.decode(blob.download_as_bytes(), type=Manifest)
    except msgspec.DecodeError as error:
        raise ExportError(
            f"{_where(blob)} is not a manifest that this version reads ({error}): move it away, and export again."
        ) from error


def _where(blob: Blob) -> str:
    return f"gs://{blob.bucket.name}/{blob.name}"


def _blob_of(bucket: Bucket, run_id: str) -> Blob:
    return bucket.blob(f"{MANIFESTS}{run_id}.json")


def _run_of(name: str) -> str:
    return name.removeprefix(MANIFESTS).removesuffix(".json")
