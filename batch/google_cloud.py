"""Cloud Storage and BigQuery: clients of the real services, or of emulators where the settings name them; clear errors.

BigQuery's library is imported by who asks for a client of it: half a second, which the export has no use for.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import requests
from google.api_core.exceptions import Forbidden, GoogleAPIError, NotFound
from google.auth.credentials import AnonymousCredentials
from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError
from google.cloud.storage import Bucket
from google.cloud.storage import Client as StorageClient
from google.cloud.storage.retry import DEFAULT_RETRY as STORAGE_RETRY

from batch.refusals import refusal_of
from conf.errors import GoogleCloudError, GoogleCloudRefused, up_command
from conf.settings import Settings

if TYPE_CHECKING:
    from google.cloud import bigquery

    from batch.bigquery import Client

_FIRST_ANSWER_SECONDS = 5


def storage_client(settings: Settings) -> StorageClient:
    """A Cloud Storage client: with application default credentials, or with none for an emulator.

    Raises:
        SettingsError: no project is set.
        GoogleCloudError: there are no credentials.
    """
    with explained(settings):
        return StorageClient(settings.require("gcp_project"), **_reach(settings.storage_emulator_host))


def bigquery_client(settings: Settings, step: str = "other", run_id: str | None = None) -> "Client":
    """A BigQuery client: with application default credentials, or with none for an emulator.

    Its jobs are labelled with the `step` that they are a part of, and with the run. Its default dataset is not set: every
    name in a query says its dataset.

    Raises:
        SettingsError: no project is set.
        GoogleCloudError: there are no credentials.
    """
    from batch.bigquery import Client

    with explained(settings):
        return Client(
            settings.require("gcp_project"),
            step=step,
            run_id=run_id,
            max_bytes_billed=settings.bigquery_max_bytes_billed,
            location=settings.bigquery_location,
            **_reach(settings.bigquery_emulator_host),
        )


def open_bucket(settings: Settings) -> Bucket:
    """The bucket of the settings, which is there and may be listed.

    Raises:
        SettingsError: no project or bucket is set.
        GoogleCloudError: it is not there, not ours to list, or Cloud Storage does not answer; says what to do.
    """
    name = settings.require("gcs_bucket")
    client = storage_client(settings)
    with explained(settings):
        # Listing needs no right beyond those on objects; reading the bucket's own metadata would.
        listing = client.list_blobs(name, max_results=1, retry=STORAGE_RETRY.with_timeout(_FIRST_ANSWER_SECONDS))
        next(iter(listing), None)
    return client.bucket(name)


def open_dataset(settings: Settings, client: "bigquery.Client", setting: str = "bigquery_dataset") -> "bigquery.Dataset":
    """The dataset that a setting names, by default the one of the raw tables: it is there and keeps what is put into it.

    Raises:
        GoogleCloudRefused: it deletes tables or days by itself after a time.
        GoogleCloudError: it is not there, not ours to read, or BigQuery does not answer; says what to do.
    """
    from google.cloud import bigquery

    with explained(settings):
        retry = bigquery.DEFAULT_RETRY.with_timeout(_FIRST_ANSWER_SECONDS)
        dataset = client.get_dataset(f"{client.project}.{settings.require(setting)}", retry=retry)
    _require_lasting_dataset(dataset)
    return dataset


def require_lasting(table: "bigquery.Table") -> None:
    """Refuse a table that vanishes by itself, or whose days do: it was made when its dataset still said so.

    Raises:
        GoogleCloudRefused: it does; says how to end that.
    """
    name = f"{table.project}:{table.dataset_id}.{table.table_id}"
    if table.expires:
        raise GoogleCloudRefused(f"{name} vanishes at {table.expires}. End that by `bq update --expiration=0 {name}`.")
    if table.time_partitioning and table.time_partitioning.expiration_ms:
        raise GoogleCloudRefused(
            f"{name} deletes days after a time. End that by `bq update --time_partitioning_expiration=0 {name}`, and"
            " bring back what is gone by `finpro export --full` and `finpro load`."
        )


def _require_lasting_dataset(dataset: "bigquery.Dataset") -> None:
    """Refuse a dataset whose new tables or partitions vanish by themselves: an option of a table cannot say `never` to that."""
    milliseconds = {"table": dataset.default_table_expiration_ms, "partition": dataset.default_partition_expiration_ms}
    ends = {what: after / 86_400_000 for what, after in milliseconds.items() if after}
    if ends:
        name = f"{dataset.project}:{dataset.dataset_id}"
        when = ", ".join(f"{what}s after {days:.4g} days" for what, days in ends.items())
        options = " ".join(f"--default_{what}_expiration=0" for what in ends)
        raise GoogleCloudRefused(
            f"The dataset {name} deletes {when}: what is loaded would vanish. End that by `bq update {options} {name}`."
            " (A sandbox, which is a project without billing, cannot.)"
        )


@contextmanager
def explained(settings: Settings) -> Iterator[None]:
    """What Google's libraries raise inside the block is raised as a GoogleCloudError that says what to do."""
    try:
        yield
    except DefaultCredentialsError as error:
        raise GoogleCloudError(
            "There are no Google credentials: `gcloud auth application-default login`, or set"
            f" GOOGLE_APPLICATION_CREDENTIALS to a key file; `{up_command()}` starts emulators that need none."
        ) from error
    except GoogleAuthError as error:
        raise GoogleCloudError(f"Google refused the credentials: {_first_line(error)}") from error
    except (GoogleAPIError, requests.ConnectionError, requests.Timeout) as error:
        raise _explanation(settings, error) from error


def _explanation(settings: Settings, error: Exception) -> GoogleCloudError:
    """What to do about an error of a service."""
    said = _first_line(error)
    if (known := refusal_of(error)) is not None:
        advice = known.advice.format(project=settings.gcp_project)
        return (GoogleCloudRefused if known.for_a_person else GoogleCloudError)(f"{said}. {advice}")
    if isinstance(error, NotFound):
        return GoogleCloudError(
            f"Not found: {said}. The bucket (FINPRO_GCS_BUCKET) and the datasets (FINPRO_BIGQUERY_DATASET, and those of"
            f" core and marts) are made once, by hand, in the project {settings.gcp_project}, and by `{up_command()}` in the"
            " emulators; tables come with `finpro load` and `finpro transform`."
        )
    if isinstance(error, Forbidden):
        return GoogleCloudRefused(
            f"Not allowed: {said}. finpro needs storage.objectAdmin on the bucket, bigquery.dataEditor on the"
            f" datasets and bigquery.jobUser on the project {settings.gcp_project}."
        )
    return GoogleCloudError(f"{_where(settings)}: {said}")


def _reach(emulator: str | None) -> dict[str, Any]:
    """The arguments that lead a client to an emulator; none for the real service."""
    if emulator is None:
        return {}
    nobody = AnonymousCredentials()  # type: ignore[no-untyped-call]
    return {"credentials": nobody, "client_options": {"api_endpoint": emulator}}


def _where(settings: Settings) -> str:
    hosts = [host for host in (settings.storage_emulator_host, settings.bigquery_emulator_host) if host]
    return f"The emulators at {' and '.join(hosts)} (`{up_command()}` starts what has died)" if hosts else "Google Cloud"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
