"""The clients of the real Google Cloud, as far as they go without it: which settings and credentials they ask for."""

from pathlib import Path

import pytest
from google.api_core.exceptions import Forbidden

from batch.google_cloud import bigquery_client, explained, open_bucket, storage_client
from conf.errors import GoogleCloudError, SettingsError
from conf.settings import Settings, embedded_env_file
from jobs.spark.submit import cloud_storage_properties

EMBEDDED = {
    "FINPRO_GCP_PROJECT": "finpro-local",
    "FINPRO_GCS_BUCKET": "embedded",
    "FINPRO_BIGQUERY_DATASET": "embedded",
    "STORAGE_EMULATOR_HOST": "http://127.0.0.1:1",
    "BIGQUERY_EMULATOR_HOST": "http://127.0.0.1:2",
}


@pytest.fixture
def no_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without Google credentials, and without a metadata server to ask."""
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    monkeypatch.setenv("NO_GCE_CHECK", "true")


@pytest.fixture
def embedded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `finpro up` leaves while it runs."""
    monkeypatch.setenv("FINPRO_HOME", str(tmp_path))
    embedded_env_file().write_text("".join(f"{name}={value}\n" for name, value in EMBEDDED.items()), encoding="utf-8")


def test_without_an_emulator_the_clients_ask_for_credentials_and_say_how_to_get_them(no_credentials: None) -> None:
    for client in (storage_client, bigquery_client):
        with pytest.raises(GoogleCloudError, match="gcloud auth application-default login"):
            client(Settings(gcp_project="real"))


def test_a_missing_project_or_bucket_names_its_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINPRO_HOME", str(tmp_path))  # no platform runs there

    with pytest.raises(SettingsError, match="FINPRO_GCP_PROJECT is not set"):
        bigquery_client(Settings())
    with pytest.raises(SettingsError, match="FINPRO_GCS_BUCKET is not set"):
        open_bucket(Settings(gcp_project="real"))


def test_a_refusal_names_the_roles_that_finpro_needs() -> None:
    roles = r"storage\.objectAdmin.*bigquery\.dataEditor.*bigquery\.jobUser"

    with pytest.raises(GoogleCloudError, match=roles), explained(Settings(gcp_project="real")):
        raise Forbidden("Access Denied")  # type: ignore[no-untyped-call]


@pytest.mark.usefixtures("embedded")
def test_the_emulators_serve_whoever_names_no_project_of_his_own() -> None:
    settings = Settings()

    assert (settings.gcp_project, settings.gcs_bucket, settings.bigquery_dataset) == ("finpro-local", "embedded", "embedded")
    assert settings.storage_emulator_host == EMBEDDED["STORAGE_EMULATOR_HOST"]
    assert settings.bigquery_emulator_host == EMBEDDED["BIGQUERY_EMULATOR_HOST"]


@pytest.mark.usefixtures("embedded")
@pytest.mark.parametrize("variable", ["FINPRO_GCP_PROJECT", "FINPRO_GCS_BUCKET"])
def test_a_project_or_bucket_of_ones_own_is_never_looked_for_in_the_emulators(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "real")

    settings = Settings()

    assert settings.storage_emulator_host is None
    assert settings.bigquery_emulator_host is None
    assert "real" in {settings.gcp_project, settings.gcs_bucket}
    assert settings.gcp_project != "finpro-local"


@pytest.mark.usefixtures("embedded")
def test_spark_is_led_to_the_emulator_and_to_nothing_else() -> None:
    assert "spark.hadoop.fs.gs.storage.root.url=http://127.0.0.1:1/" in cloud_storage_properties(Settings())
    assert cloud_storage_properties(Settings(gcp_project="real", gcs_bucket="real")) == []
