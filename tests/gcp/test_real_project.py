"""A real Google Cloud project: the steps from Postgres to the marts, and whether it refuses what our stand-in for it refuses.

All happens in a bucket and datasets of the tests' own.

    GCP_TEST_PROJECT=my-project .venv/bin/python -m pytest -m gcp

with application default credentials that may make and delete buckets and datasets there. Skipped otherwise.
"""

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import google.auth
import pytest
from google.api_core.exceptions import BadRequest, GoogleAPICallError
from google.auth.exceptions import DefaultCredentialsError
from google.cloud.bigquery import Client, Dataset, LoadJobConfig, QueryJobConfig, ScalarQueryParameter

from batch.google_cloud import bigquery_client, explained, open_dataset, storage_client
from batch.refusals import REFUSALS, refusal_of
from conf.errors import GoogleCloudRefused
from conf.settings import Settings
from tests.oracle.marts import fill, in_postgres, marts
from tests.runs.exports import execute

pytestmark = [pytest.mark.gcp, pytest.mark.timeout(1800)]

FINPRO = Path(sys.executable).with_name("finpro")
WANTED = (
    "no real Google Cloud: set GCP_TEST_PROJECT (and GCP_TEST_LOCATION, when it is not US), and give credentials by"
    " `gcloud auth application-default login` or GOOGLE_APPLICATION_CREDENTIALS"
)
OURS = "finpro-test"  # the label of what these tests make


def days(first_year: int, number: int) -> str:
    """A query for so many days in a row, as `moment`."""
    return (
        f"select timestamp_add(timestamp '{first_year}-01-01', interval day day) as moment"
        f" from unnest(generate_array(1, {number})) as day"
    )


# What the real BigQuery has to refuse by the name that batch/refusals.py has for it: statements that GoogleSQL accepts.
BY_DAY = "create table {dataset}.%s partition by timestamp_trunc(moment, day) as "
REFUSED = {
    "overflow": "select sum(number) as total from unnest([9223372036854775807, 1]) as number",
    "partitions of a job": BY_DAY % "wide" + days(1990, 4_001),
}
# The days of a table that holds too many of them, a job's worth each.
TOO_MANY_DAYS = [
    BY_DAY % "long" + days(1990, 3_900),
    *("insert into {dataset}.long (moment) " + days(year, 3_900) for year in (2001, 2012)),
]


def credentials() -> bool:
    """Whether Google's libraries find credentials on this machine."""
    try:
        google.auth.default()
    except DefaultCredentialsError:
        return False
    return True


def delete_what_killed_tests_left(client: Client) -> None:
    """Delete datasets of these tests that are a day old: a dataset that ends by itself would be refused."""
    for found in client.list_datasets(filter=f"labels.{OURS}"):
        created = client.get_dataset(found.reference).created
        if created and created < datetime.now(UTC) - timedelta(days=1):
            client.delete_dataset(found.reference, delete_contents=True, not_found_ok=True)


@contextmanager
def real_places(settings: Settings, location: str) -> Iterator[None]:
    """The bucket and the datasets of the settings, made, and deleted with all they hold."""
    storage, bigquery = storage_client(settings), bigquery_client(settings)
    delete_what_killed_tests_left(bigquery)
    datasets = [Dataset(f"{bigquery.project}.{name}") for name in settings.bigquery_datasets]
    bucket = storage.create_bucket(settings.require("gcs_bucket"), location=location)
    try:
        for dataset in datasets:
            dataset.location = location
            dataset.labels = {OURS: ""}
            bigquery.create_dataset(dataset)
        yield
    finally:
        for dataset in datasets:
            bigquery.delete_dataset(dataset, delete_contents=True, not_found_ok=True)
        bucket.delete(force=True)


def project_and_location() -> tuple[str, str]:
    """Where to test; skips the test that asks where nowhere is given."""
    project, location = os.environ.get("GCP_TEST_PROJECT"), os.environ.get("GCP_TEST_LOCATION", "US")
    if not project or not credentials():
        pytest.skip(WANTED)
    return project, location


@pytest.fixture(scope="module")
def warehouse() -> Iterator[Settings]:
    """Settings for an empty bucket and dataset of a real project, without a Postgres."""
    project, location = project_and_location()
    name = f"finpro_test_{uuid.uuid4().hex[:12]}"
    settings = Settings(
        gcp_project=project,
        gcs_bucket=name,
        bigquery_dataset=name,
        bigquery_location=location,
        bigquery_max_bytes_billed=10**9,
        storage_emulator_host=None,
        bigquery_emulator_host=None,
    )
    with real_places(settings, location):
        yield settings


@pytest.fixture
def google_cloud(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    """Settings for the embedded Postgres and an empty bucket and dataset of a real project; commands see them as well."""
    project, location = project_and_location()
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


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `finpro`."""
    return subprocess.run([str(FINPRO), *arguments], capture_output=True, text=True)


def finpro(*arguments: str) -> None:
    """Run `finpro`, which must succeed."""
    done = run(*arguments)
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


def test_what_is_deleted_changed_by_hand_or_forgotten_is_so_in_a_real_project(google_cloud: Settings) -> None:
    raw, client = f"{google_cloud.bigquery_dataset}.raw_orders", bigquery_client(google_cloud, "test")
    fill(google_cloud)
    publish("first")
    execute(google_cloud, "delete from raw_orders where order_id = 'first of a day'")
    huge = "amount = '4611686018427387904', amount_numeric = 4611686018427387904"
    execute(google_cloud, f"update raw_orders set {huge} where order_id = 'last of a day'")
    publish("second")
    before = marts(google_cloud)
    assert before == in_postgres(google_cloud)

    client.query(f"update {raw} set amount_numeric = 1 where order_id = 'last of a day'").result()
    assert run("reconcile", "--whole", "--run-id", "second").returncode != 0
    assert "the marts stay as they are" in run("transform", "--run-id", "second").stderr
    assert marts(google_cloud) == before
    finpro("export", "--full", "--run-id", "third")
    for step in ("load", "reconcile", "validate", "transform"):
        finpro(step, "--run-id", "third")
    assert marts(google_cloud) == before

    finpro("forget", "--user", "1")
    core = google_cloud.bigquery_core_dataset
    for table in (f"{google_cloud.bigquery_dataset}.raw_users", f"{core}.dim_users", f"{core}.users_history"):
        names = client.query(f"select distinct name from {table} where user_id = 1").result()
        assert [row.name for row in names] == ["forgotten-1"]
    with_whom = client.query(f"select count(*) as orders from {raw} where user_id = 1").result()
    assert next(iter(with_whom)).orders > 0  # verdicts and sums stay


def refused(settings: Settings, *statements: str) -> GoogleAPICallError:
    """What BigQuery says to the last of some statements."""
    client = bigquery_client(settings, "test")
    *before, last = [statement.format(dataset=settings.bigquery_dataset) for statement in statements]
    for statement in before:
        client.query(statement).result()
    with pytest.raises(GoogleAPICallError) as raised:
        client.query(last).result()
    return raised.value


@pytest.mark.parametrize("kind", REFUSED)
def test_a_refusal_of_the_real_bigquery_is_known_by_name(warehouse: Settings, kind: str) -> None:
    assert refusal_of(refused(warehouse, REFUSED[kind])) is REFUSALS[kind]


def test_a_table_of_more_days_than_it_holds_is_refused_by_name(warehouse: Settings) -> None:
    assert refusal_of(refused(warehouse, *TOO_MANY_DAYS)) is REFUSALS["partitions of a table"]


def test_a_statement_that_reads_more_than_the_setting_allows_is_refused_by_its_name(warehouse: Settings) -> None:
    limited = warehouse.model_copy(update={"bigquery_max_bytes_billed": 1})
    query = "select count(distinct corpus) from `bigquery-public-data.samples.shakespeare`"
    if warehouse.bigquery_location != "US":
        pytest.skip("the public tables are in the US")
    with pytest.raises(GoogleCloudRefused, match="FINPRO_BIGQUERY_MAX_BYTES_BILLED"), explained(limited):
        bigquery_client(limited, "test").query(query).result()


def test_more_files_than_a_job_takes_are_refused_by_name(warehouse: Settings) -> None:
    client, config = bigquery_client(warehouse, "test"), LoadJobConfig(source_format="PARQUET")
    files = [f"gs://{warehouse.gcs_bucket}/{number}" for number in range(10_001)]
    with pytest.raises(GoogleCloudRefused, match="10,000 files"), explained(warehouse):
        client.load_table_from_uri(files, f"{warehouse.bigquery_dataset}.loaded", job_config=config)


def test_a_time_without_a_zone_is_not_compared_with_a_timestamp(warehouse: Settings) -> None:
    parameter = ScalarQueryParameter("now", "DATETIME", "2026-11-22 00:00:00")
    asked, client = QueryJobConfig(query_parameters=[parameter]), bigquery_client(warehouse, "test")
    with pytest.raises(BadRequest, match="No matching signature"):
        client.query("select current_timestamp() > @now", job_config=asked).result()


def test_a_dataset_that_deletes_its_tables_is_refused(warehouse: Settings) -> None:
    client = bigquery_client(warehouse, "test")
    dataset = open_dataset(warehouse, client)
    dataset.default_table_expiration_ms = 3_600_000
    client.update_dataset(dataset, ["default_table_expiration_ms"])
    try:
        with pytest.raises(GoogleCloudRefused, match="deletes tables after"):
            open_dataset(warehouse, client)
    finally:
        dataset.default_table_expiration_ms = None
        client.update_dataset(dataset, ["default_table_expiration_ms"])
    assert open_dataset(warehouse, client).default_table_expiration_ms is None


def test_jobs_carry_their_labels_and_say_what_they_have_read(warehouse: Settings) -> None:
    client = bigquery_client(warehouse, "test", "Run:1")
    client.query(f"create table {warehouse.bigquery_dataset}.numbers as select * from unnest([1, 2]) as number").result()
    job = client.query(f"select sum(number) from {warehouse.bigquery_dataset}.numbers")
    job.result()
    assert client.get_job(job.job_id, location=job.location).labels == {"dag": "manual", "run": "run_1", "step": "test"}
    assert client.usage().processed >= 16
    assert client.usage().billed >= 10_000_000  # the least that a query is charged for
