"""The steps from Postgres to the marts on a real Google Cloud project, in a bucket and a dataset of the test's own.

    GCP_TEST_PROJECT=my-project .venv/bin/python -m pytest -m gcp

with application default credentials that may make and delete buckets and datasets there. Skipped otherwise.
"""

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import google.auth
import pytest
from google.auth.exceptions import DefaultCredentialsError
from google.cloud.bigquery import Dataset

from batch.google_cloud import bigquery_client, storage_client
from conf.settings import Settings
from tests.oracle.marts import fill, in_postgres, marts
from tests.runs.exports import execute

pytestmark = [pytest.mark.gcp, pytest.mark.timeout(1800)]

FINPRO = Path(sys.executable).with_name("finpro")
WANTED = (
    "no real Google Cloud: set GCP_TEST_PROJECT (and GCP_TEST_LOCATION, when it is not US), and give credentials by"
    " `gcloud auth application-default login` or GOOGLE_APPLICATION_CREDENTIALS"
)
A_DAY_IN_MILLISECONDS = 24 * 60 * 60 * 1000


def credentials() -> bool:
    """Whether Google's libraries find credentials on this machine."""
    try:
        google.auth.default()
    except DefaultCredentialsError:
        return False
    return True


@contextmanager
def real_places(settings: Settings, location: str) -> Iterator[None]:
    """The bucket and the dataset of the settings, made, and deleted with all they hold."""
    storage, bigquery = storage_client(settings), bigquery_client(settings)
    dataset = Dataset(f"{bigquery.project}.{settings.bigquery_dataset}")
    dataset.location = location
    dataset.default_table_expiration_ms = A_DAY_IN_MILLISECONDS  # should this test be killed
    bucket = storage.create_bucket(settings.require("gcs_bucket"), location=location)
    try:
        bigquery.create_dataset(dataset)
        yield
    finally:
        bigquery.delete_dataset(dataset, delete_contents=True, not_found_ok=True)
        bucket.delete(force=True)


@pytest.fixture
def google_cloud(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    """Settings for the embedded Postgres and an empty bucket and dataset of a real project; commands see them as well."""
    project, location = os.environ.get("GCP_TEST_PROJECT"), os.environ.get("GCP_TEST_LOCATION", "US")
    if not project or not credentials():
        pytest.skip(WANTED)
    request.getfixturevalue("settings")  # only now: the embedded platform is not started for a test that is skipped
    name = f"finpro_test_{uuid.uuid4().hex[:12]}"
    for variable in ("STORAGE_EMULATOR_HOST", "BIGQUERY_EMULATOR_HOST"):
        monkeypatch.delenv(variable)
    monkeypatch.setenv("FINPRO_GCP_PROJECT", project)
    monkeypatch.setenv("FINPRO_BIGQUERY_LOCATION", location)
    monkeypatch.setenv("FINPRO_GCS_BUCKET", name)
    monkeypatch.setenv("FINPRO_BIGQUERY_DATASET", name)
    settings = Settings()
    with real_places(settings, location):
        yield settings


def finpro(*arguments: str) -> None:
    """Run `finpro`, which must succeed."""
    done = subprocess.run([str(FINPRO), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def publish(run_id: str) -> None:
    """All steps from Postgres to the marts, for one run."""
    for step in ("export", "load", "reconcile", "validate", "transform"):
        finpro(step, "--run-id", run_id)


def test_the_marts_of_a_real_project_equal_postgres_after_a_full_and_an_incremental_run(
    google_cloud: Settings, tmp_path: Path
) -> None:
    fill(google_cloud)
    publish("first")
    first = marts(google_cloud)
    assert first == in_postgres(google_cloud)

    execute(
        google_cloud,
        "update raw_orders set status = 'Fraud', reasons = '{night_amount}', ingested_at = default, change_xid = default"
        " where order_id = 'first of a day'",
    )
    publish("second")
    finpro("load", "--run-id", "second")  # as after a failure: the jobs of that run are found, not run again
    second = marts(google_cloud)
    assert second == in_postgres(google_cloud)
    assert second != first

    page = tmp_path / "report.html"
    finpro("report", "--output", str(page))
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
