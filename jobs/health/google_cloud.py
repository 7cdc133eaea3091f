"""Checks of Cloud Storage and BigQuery, and of what went there last."""

import time

from google.api_core.exceptions import NotFound

from batch.google_cloud import bigquery_client, explained, open_bucket, open_dataset
from batch.report.builds import Builds
from batch.warehouse.manifest import newest_manifest
from batch.warehouse.tables import Warehouse
from conf.settings import Settings
from jobs.health.findings import Finding, State, dated, milliseconds_since


def cloud_storage(settings: Settings) -> Finding:
    """Whether the bucket answers."""
    started = time.monotonic()
    bucket = open_bucket(settings)
    return Finding(State.OK, f"gs://{bucket.name}, answers in {milliseconds_since(started)}")


def bigquery(settings: Settings) -> Finding:
    """Whether the dataset answers."""
    started = time.monotonic()
    dataset = open_dataset(settings, bigquery_client(settings, "status"))
    return Finding(State.OK, f"{dataset.project}.{dataset.dataset_id}, answers in {milliseconds_since(started)}")


def export(settings: Settings) -> Finding:
    """The newest finished export."""
    bucket = open_bucket(settings)
    with explained(settings):
        manifest = newest_manifest(bucket)
    if manifest is None:
        return Finding(State.OFF, "never: `finpro export` makes the first run")
    rows = sum(table.rows for table in manifest.tables)
    return dated(manifest.finished_at, f"run {manifest.run_id}, {rows:,} rows")


def load(settings: Settings) -> Finding:
    """The newest export that the raw tables hold whole."""
    warehouse = _warehouse(settings)
    with explained(settings):
        try:
            run = warehouse.newest_complete_run()
        except NotFound:
            run = None
    if run is None:
        return Finding(State.OFF, "never: `finpro load` loads the newest export")
    return dated(run.exported_at, f"run {run.run_id}, exported")


def marts(settings: Settings) -> Finding:
    """The last time that all was built and tested."""
    warehouse = _warehouse(settings)
    with explained(settings):
        build = Builds(warehouse, f"{warehouse.client.project}.{settings.bigquery_core_dataset}").last_complete()
    if build is None:
        return Finding(State.OFF, "never: `finpro transform` builds them from the newest load")
    return dated(build.completed_at, f"of run {build.run_id}, built and tested")


def _warehouse(settings: Settings) -> Warehouse:
    client = bigquery_client(settings)
    dataset = open_dataset(settings, client)
    return Warehouse(client, f"{dataset.project}.{dataset.dataset_id}", dataset.location)
